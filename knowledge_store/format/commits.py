"""Commit records: a shard exists once its record does, and the record says what its files must look like."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from knowledge_store.errors import DamageError
from knowledge_store.format.integrity import FILE_SHAPE, FileRecord
from knowledge_store.format.layout import COMMITS, FORMAT_NAME, FORMAT_VERSION, commit_file, commit_shard, manifest_file
from knowledge_store.format.manifest import Manifest, check_version
from knowledge_store.format.records import check_shape, is_sha256, read_record, seal
from knowledge_store.storage import Entry, Storage

_SHAPE = {
    "dump": str,
    "shard": int,
    "identity": str,
    "first_document": int,
    "documents": int,
    "files": {...: FILE_SHAPE},
    "statistics": {...: int | float},
    "skipped": [dict],
    "made_by": {"committed_at": str},
}

_STATISTIC = re.compile(r"[a-z][a-z0-9_]{0,63}\.[a-z][a-z0-9_]{0,63}")  # TABLE.NAME: columns of the relation `shards`
MAX_STATISTICS = 256
MAX_COUNT = 2**53  # whole numbers that a float holds


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard.

    Attributes:
        dump, shard: which one.
        identity: `identity_sha256` of the manifest it was made by.
        first_document, documents: the part of the plan it covers.
        files: for each table (`sequences` and each kind), the record of its Parquet file.
        statistics: named counts and means over the shard, "TABLE.NAME", for the index (see each kind's `statistics`).
        skipped: rows of the corpus that were skipped, as {"file", "row", "reason"}, and "detail" where there is more to say.
        made_by: library versions, device, host and times; for people, never compared.
    """

    dump: str
    shard: int
    identity: str
    first_document: int
    documents: int
    files: dict[str, FileRecord]
    statistics: dict[str, float]
    skipped: list[dict[str, Any]]
    made_by: dict[str, Any]

    def to_record(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {"format": FORMAT_NAME, "version": FORMAT_VERSION, **asdict(self)}

    def to_bytes(self) -> bytes:
        """The record as the bytes of its file."""
        return seal(self.to_record())


def is_statistic(name: str) -> bool:
    """Whether something can be the name of a statistic: "TABLE.NAME"."""
    return _STATISTIC.fullmatch(name) is not None


def _check_limits(record: dict[str, Any]) -> None:
    """ValueError: a number of a commit record is one that nothing can be made of, or a statistic has no name for a column."""
    statistics = record["statistics"]
    if len(statistics) > MAX_STATISTICS or not all(map(is_statistic, statistics)):
        raise ValueError("its statistics are too many, or have names that cannot be used")
    if not all(abs(value) <= MAX_COUNT for value in statistics.values()):
        raise ValueError("one of its statistics is not possible")
    if not all(0 <= record[name] <= MAX_COUNT for name in ("shard", "first_document", "documents")):
        raise ValueError("it records documents that are not possible")


def commit_records(storage: Storage, dump: str) -> dict[int, Entry]:
    """The commit records of a dump, by shard, from one listing; none where nothing is committed yet.

    Raises:
        DamageError: the name of their folder is that of something else.
        StoreError: they cannot be listed.
    """
    return commit_entries(storage.files(f"{dump}/{COMMITS}"))


def commit_entries(entries: list[Entry]) -> dict[int, Entry]:
    """The commit records among the files of a dump's `commits`, by shard."""
    shards = ((commit_shard(entry.name), entry) for entry in entries)
    return dict(sorted(((shard, entry) for shard, entry in shards if shard is not None), key=lambda pair: pair[0]))


def read_commit(storage: Storage, dump: str, shard: int) -> CommitRecord:
    """Read the commit record of a shard.

    Raises:
        MissingFileError: it is not there.
        DamageError: it is altered, or not shaped as a commit record.
        StoreError: it is of another format version, or cannot be read.
    """
    return commit_of(read_record(storage, commit_file(dump, shard)), storage.locate(commit_file(dump, shard)))


def commit_of(record: dict[str, Any], path: str) -> CommitRecord:
    """The commit record that an unsealed object is, which stands in the file at `path` (raises as `read_commit`)."""
    check_version(record, path)
    try:
        check_shape(record, _SHAPE, "a commit record")
        if not is_sha256(record["identity"]):
            raise ValueError("its dump's identity is not a SHA-256")
        _check_limits(record)
        files = {table: FileRecord.from_dict(file) for table, file in record["files"].items()}
    except ValueError as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    named = {field.name: record[field.name] for field in fields(CommitRecord)}
    return CommitRecord(**{**named, "files": files})


def read_commit_of(storage: Storage, manifest: Manifest, shard: int) -> CommitRecord:
    """The commit record of a shard of a dump, which belongs to that dump.

    Raises:
        DamageError: it does not, or as of `read_commit`.
        StoreError: as of `read_commit`.
    """
    commit = read_commit(storage, manifest.dump, shard)
    complaint = misplaced(commit, manifest, shard, storage)
    if complaint:
        raise DamageError(complaint)
    return commit


def misplaced(commit: CommitRecord, manifest: Manifest, shard: int, storage: Storage) -> str | None:
    """Why a commit record is not the one of a shard of a dump, or None if it is.

    Args:
        commit: as it was read.
        manifest: of the dump.
        shard: whose record it is to be.
        storage: where it was read.
    """
    path = storage.locate(commit_file(manifest.dump, shard))
    manifest_path = storage.locate(manifest_file(manifest.dump))
    if (commit.dump, commit.shard) != (manifest.dump, shard):
        return f"{path} is damaged: it is the record of shard {commit.shard} of {commit.dump!r}"
    if commit.identity != manifest.identity_sha256:
        return f"{path} does not belong to {manifest_path}: one of them is from another dump of that name"
    if shard >= manifest.shard_count:
        return f"{path} does not belong to {manifest_path}, which plans {manifest.shard_count} shards: delete it"
    return None
