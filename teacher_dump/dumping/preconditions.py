"""What can be wrong with a dump before its teacher is asked. No torch here: a mistake is reported at once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from knowledge_store.errors import DamageError, InputError, MismatchError, MissingFileError
from knowledge_store.format.commits import commit_records
from knowledge_store.format.layout import commit_file, manifest_file
from knowledge_store.format.manifest import Manifest, check_version, read_manifest
from knowledge_store.format.records import read_record
from knowledge_store.format.store_file import check_store, occupied
from knowledge_store.reporter import Reporter
from knowledge_store.storage import Storage, concurrently
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.mismatch import check_options
from teacher_dump.dumping.request import check_teacher, parameters_asked
from teacher_dump.teachers.loading import SERVER, Loading, check_loading
from teacher_dump.teachers.protocol import Teacher


def check_request(config: DumpConfig, storage: Storage, rank: int, world_size: int) -> None:
    """Make sure that what a call of `dump` or `repair` was given can be used.

    Raises:
        InputError: the rank is not one of the world size, or a file that an option names cannot be used.
        NewerVersionError: something of the dump has a newer format version.
        DamageError: its `commits` is not a folder, or a file that an option names is damaged.
        StoreError: one of the dump's records cannot be read.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank} is not one of --world-size {world_size}: ranks count from 0")
    _check_versions(storage, config.dump_name)
    for kind in config.kinds:
        parameters_asked(config, kind)


def _check_versions(storage: Storage, dump: str) -> None:
    """Make sure that this version can resume a dump: which shards exist is known by the names of their records alone, and a
    newer knowledge-store may have written one. Each record is read, which takes 0.2 ms."""

    def check(name: str) -> None:
        with suppress(DamageError):  # missing, or for --repair
            check_version(read_record(storage, name), storage.locate(name))

    names = (commit_file(dump, shard) for shard in commit_records(storage, dump))
    concurrently(storage, check, [manifest_file(dump), *names])


def as_made(config: DumpConfig, existing: Manifest | None) -> DumpConfig:
    """A configuration with the `--columns` that a dump was made with, where none are asked for."""
    names = existing.corpus.get("columns", {}) if existing is not None else {}
    if config.columns is not None or not names:
        return config
    return replace(config, columns=",".join(f"{part}={name}" for part, name in names.items()))


def check_place(config: DumpConfig, storage: Storage, existing: Manifest | None) -> Loading:
    """Make sure that the store is one or can become one, and that the teacher's engine, dtype and quantisation can be used.

    Args:
        config: of the dump.
        storage: of its store.
        existing: the manifest of the dump that is resumed or repaired.

    Returns:
        how the teacher is loaded: with the engine, dtype and quantisation that the dump was begun with, whatever the device.

    Raises:
        InputError, StoreError: they cannot.
        MismatchError: others are asked for.
    """
    if occupied(storage):  # else it can become a store; so can one that another worker is just making
        check_store(storage)
    if existing is None:
        return config.loading
    if "import" in existing.plan:
        raise MismatchError(
            f"dump {config.dump_name!r} in {storage.address} was imported: `teacher-dump import`, given what it was made from,"
            " resumes it, and repairs it with --repair"
        )
    begun_in = {
        "engine": existing.teacher.get("engine", "transformers"),
        "dtype": existing.teacher.get("dtype", config.dtype),
        "quantize": existing.teacher.get("quantize", "none"),
    }
    served = existing.teacher.get("engine") == SERVER
    if served != (config.teacher_url is not None):
        way = (
            f"by a server, and --teacher-url is missing. Give the address of one that serves {existing.teacher['served_name']}"
            if served
            else f"by {begun_in['engine']}, and --teacher-url is given now. Leave it out"
        )
        raise MismatchError(f"dump {config.dump_name!r} in {storage.address} was made {way}, or give this dump another --name")
    for name, asked, unset in (
        ("engine", config.engine, None),
        ("dtype", config.dtype, "auto"),
        ("quantize", config.quantize, None),
    ):
        if asked not in (unset, begun_in[name]):
            raise MismatchError(
                f"dump {config.dump_name!r} in {storage.address} was made differently: --{name} was {begun_in[name]} and is now"
                f" {asked}. Leave --{name} out to resume it, or give this dump another --name"
            )
    loading = replace(config.loading, **begun_in)
    check_loading(loading)
    return loading


def check_before_loading(
    config: DumpConfig, storage: Storage, existing: Manifest | None, teacher: Teacher | None, reporter: Reporter
) -> Loading:
    """All that can be wrong with a dump or its repair before a teacher is loaded (see `check_place` and `check_options`).

    Args:
        existing: the manifest of the dump that is resumed or repaired.
        teacher: the one that is loaded already.

    Returns:
        how a teacher is loaded.
    """
    loading = check_place(config, storage, existing)
    if existing is not None:
        check_options(config, storage, existing, reporter=reporter)
    if teacher is None:
        check_teacher(config)
    return loading


def existing_manifest(storage: Storage, dump: str) -> Manifest | None:
    """The manifest of a dump; None where it is missing.

    Raises:
        DamageError: it is damaged.
    """
    try:
        return read_manifest(storage, dump)
    except MissingFileError:
        return None
