"""What can be wrong with a dump before its teacher is asked. No torch here: a mistake is reported at once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from knowledge_store.calibration.file import read_calibration
from knowledge_store.errors import DamageError, InputError, MismatchError
from knowledge_store.format.commits import files_in_commits
from knowledge_store.format.layout import MANIFEST_FILE, commit_shard
from knowledge_store.format.manifest import Manifest, check_version, read_manifest
from knowledge_store.format.records import read_record
from knowledge_store.storage.local import TEMPORARY_PREFIX, disk_errors
from knowledge_store.store import check_store
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.documents import check_files
from teacher_dump.teachers.files import check_local_teacher


def check_request(config: DumpConfig, rank: int, world_size: int) -> None:
    """Make sure that what a call of `dump` or `repair` was given can be used.

    Raises:
        InputError: the rank is none, or a file of the corpus, the calibration or the teacher cannot be used.
        NewerVersionError: something of the dump has a newer format version.
        DamageError: its `commits` is not a folder, or the calibration is damaged.
        StoreError: one of the dump's records cannot be read.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank} is not one of --world-size {world_size}: ranks count from 0")
    check_files(config.corpus)
    with disk_errors("read", config.store):
        _check_versions(config.store / config.dump_name)
    if config.calibration is not None:
        read_calibration(config.calibration).to_manifest()


def _check_versions(folder: Path) -> None:
    """Make sure that this version can resume a dump: which shards exist is known by the names of their records alone, and a
    newer knowledge-store may have written one. Each record is read, which takes 0.2 ms."""
    records = [path for path in files_in_commits(folder) if commit_shard(path.name) is not None]
    if not folder.is_dir():
        return
    for path in (folder / MANIFEST_FILE, *records):
        with suppress(DamageError):  # missing, or for --repair
            check_version(read_record(path), path)


def check_place(config: DumpConfig, existing: Manifest | None) -> str:
    """Make sure that the store is one or can become one, and that the teacher's folder and dtype can be used.

    Args:
        config: of the dump.
        existing: the manifest of the dump that is resumed or repaired.

    Returns:
        the dtype to load the teacher in: the one that the dump was begun in, whatever the device.

    Raises:
        InputError, StoreError: they cannot.
        MismatchError: another dtype is asked for.
    """
    with disk_errors("read", config.store):
        path = config.store
        # A store that another worker is just making counts.
        if path.exists() and not (path.is_dir() and all(entry.name.startswith(TEMPORARY_PREFIX) for entry in path.iterdir())):
            check_store(path)
    check_local_teacher(config.teacher, config.gguf_file)
    begun_in = existing.teacher.get("dtype") if existing is not None else None
    if begun_in is None or config.dtype == begun_in:
        return config.dtype
    if config.dtype != "auto":
        raise MismatchError(
            f"dump {config.dump_name!r} in {config.store} was made differently: teacher.dtype was {begun_in} and is now"
            f" {config.dtype}. Leave --dtype out to resume it, or give this dump another --name"
        )
    return str(begun_in)


def existing_manifest(folder: Path) -> Manifest | None:
    """The manifest of a dump's folder; None where there is none.

    Raises:
        DamageError: it is damaged.
    """
    with disk_errors("read", folder):
        exists = (folder / MANIFEST_FILE).is_file()
    return read_manifest(folder) if exists else None
