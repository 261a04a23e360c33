"""Commit records: a shard exists once its record does, and the record says what its files must look like."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from knowledge_store.errors import DamageError
from knowledge_store.layout import FORMAT_NAME, FORMAT_VERSION
from knowledge_store.manifest import check_version
from knowledge_store.parquet import FILE_SHAPE, FileRecord
from knowledge_store.records import check_shape, read_record, seal

_SHAPE = {
    "dump": str,
    "shard": int,
    "first_document": int,
    "documents": int,
    "files": {...: FILE_SHAPE},
    "statistics": {...: int | float},
    "skipped": [dict],
    "made_by": {"committed_at": str},
}


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard.

    Attributes:
        dump, shard: which one.
        first_document, documents: the part of the plan it covers.
        files: for each table (`sequences` and each kind), the record of its Parquet file.
        statistics: named counts and means over the shard, for the index (see each kind's `statistics`).
        skipped: rows of the corpus that were left out, as {"file", "row", "reason"}.
        made_by: library versions, device, host and times; for people, never compared.
    """

    dump: str
    shard: int
    first_document: int
    documents: int
    files: dict[str, FileRecord]
    statistics: dict[str, float]
    skipped: list[dict[str, Any]]
    made_by: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The record as the bytes of its file."""
        return seal({"format": FORMAT_NAME, "version": FORMAT_VERSION, **asdict(self)})


def read_commit(path: Path) -> CommitRecord:
    """Read a commit record.

    Raises:
        DamageError: it is missing, altered, or not shaped as a commit record.
        StoreError: it is of a newer format version.
    """
    record = read_record(path)
    check_version(record, path)
    try:
        check_shape(record, _SHAPE, "a commit record")
    except ValueError as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    found = {field.name: record[field.name] for field in fields(CommitRecord)}
    files = {table: FileRecord.from_dict(each) for table, each in record["files"].items()}
    return CommitRecord(**{**found, "files": files})
