"""Copying dumps from one store to another, between any two storages, checked on the way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from knowledge_store.catalogue.dumps import open_dumps
from knowledge_store.errors import DamageError, InputError, MismatchError, MissingFileError
from knowledge_store.format.commits import commit_records, read_commit_of
from knowledge_store.format.integrity import MAX_READ, FileRecord, check_whole
from knowledge_store.format.layout import commit_file, manifest_file, table_file, tokens_file
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import Storage, contents, open_storage
from knowledge_store.writing.writer import create_store, remove_leftovers


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        dumps: their names.
        shards: copied now.
        existing: shards that were in the destination already, all of whose bytes are those that were published there.
        bytes: of the shards copied now.
    """

    dumps: tuple[str, ...]
    shards: int
    existing: int
    bytes: int


def copy(
    source: str | Path | Storage, destination: str | Path | Storage, dump: str | None = None, reporter: Reporter = SILENT
) -> Copied:
    """Copy the committed shards of dumps. What was cut off resumes: shards that are in the destination stay as they are.

    The digest of every file is checked, of what is copied on the way, and of what is in the destination already by reading it.
    A commit record comes after the files of its shard.

    Args:
        source, destination: stores; the destination is made if need be.
        dump: which one; None for all.
        reporter: hears of progress in shards.

    Raises:
        InputError: the source has no such dump, or the destination is the source.
        MismatchError: the destination has another dump of that name.
        DamageError: a file of the source is damaged; neither it nor its commit record is copied. Or one that is in the
            destination already is; says what to do.
        StoreError: the source is no store, the destination cannot be one, or one of them cannot be read or written.
    """
    origin, target = open_storage(source), open_storage(destination)
    if origin.cache_key == target.cache_key:
        raise InputError(f"{origin.address} cannot be copied into itself: give another store as the destination")
    dumps = open_dumps(origin)
    names = tuple(dumps.manifests) if dump is None else (dumps.name(dump),)
    for name, reason in dumps.closed.items() if dump is None else ():
        reporter.note(f"{name} is not copied: {reason}")
    create_store(target)
    records = {name: commit_records(origin, name) for name in names}
    shards = existing = size = 0
    with reporter.progress("copying", sum(map(len, records.values())), "shards") as advance:
        for name in names:
            manifest = read_manifest(origin, name)
            _copy_beginning(origin, target, manifest)
            remove_leftovers(target, manifest)
            committed = commit_records(target, name)
            for shard in records[name]:
                if shard in committed:
                    _check_shard(target, manifest, shard)
                    existing += 1
                else:
                    size += _copy_shard(origin, target, manifest, shard)
                    shards += 1
                advance(1)
    return Copied(names, shards, existing, size)


def _copy_beginning(origin: Storage, target: Storage, manifest: Manifest) -> None:
    """The vocabulary and the manifest, unless they are there."""
    try:
        existing = read_manifest(target, manifest.dump)
    except MissingFileError:
        _copy_file(origin, target, tokens_file(manifest.dump), FileRecord.from_dict(manifest.derived["tokens"]))
        target.create(manifest_file(manifest.dump), contents(manifest.to_bytes()))
        existing = read_manifest(target, manifest.dump)
    differences = existing.differences(manifest)
    if differences:
        raise MismatchError(
            f"{target.address} has a dump {manifest.dump!r} that was made differently: {'; '.join(differences)}. Rename one of"
            " the two"
        )


def _copy_shard(origin: Storage, target: Storage, manifest: Manifest, shard: int) -> int:
    """One committed shard. Returns its bytes."""
    commit = read_commit_of(origin, manifest, shard)
    for table, record in commit.files.items():
        _copy_file(origin, target, table_file(manifest.dump, table, shard), record)
    target.create(commit_file(manifest.dump, shard), contents(commit.to_bytes()))
    return sum(record.bytes for record in commit.files.values())


def _check_shard(target: Storage, manifest: Manifest, shard: int) -> None:
    """Make sure that a shard of the destination is what was published there.

    Raises:
        DamageError: it is not.
    """
    record_file = target.locate(commit_file(manifest.dump, shard))
    try:
        commit = read_commit_of(target, manifest, shard)
    except DamageError as error:
        raise DamageError(f"{error}; delete that file, and copy again") from None
    for table, record in commit.files.items():
        try:
            check_whole(target, table_file(manifest.dump, table, shard), record)
        except MissingFileError as error:
            raise DamageError(f"{error}; delete {record_file}, and copy again") from None
        except DamageError as error:
            raise DamageError(f"{error}; delete that file and {record_file}, and copy again") from None


def _copy_file(origin: Storage, target: Storage, name: str, record: FileRecord) -> None:
    def write(file: BinaryIO) -> None:
        whole = hashlib.sha256()
        size = origin.size(name)
        for start in range(0, size, MAX_READ):
            data = origin.read(name, start, min(start + MAX_READ, size))
            whole.update(data)
            file.write(data)
        if (size, whole.hexdigest()) != (record.bytes, record.sha256):
            raise DamageError(f"{origin.locate(name)} is damaged: its contents are not those that were published")

    if not target.create(name, write):  # of a copy that was cut off
        try:
            check_whole(target, name, record)
        except DamageError as error:
            raise DamageError(f"{error}; delete that file, and copy again") from None
