"""Parquet files of a store, written so that they can be checked and read so that they are checked.

The footer, whose hash stands in the file's record, holds digests of all that comes before it: no byte is parsed that was not
checked (`checked_file`). pyarrow also writes and verifies a checksum for each page. Everything is read through it: DuckDB's own
reader ignores page checksums.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from knowledge_store.checked_file import DIGESTS_KEY, MAGIC, CheckedFile, DigestingFile
from knowledge_store.errors import DamageError, KnowledgeStoreError, StoreError
from knowledge_store.publication import publish

COMPRESSION = "zstd"
# Slow to write (some 90,000 positions a second on one core, on a thread beside the teacher), as fast as any to read. Against
# level 9 it saves 0.8 bytes a position on WikiText-2, nearly all in token ids.
COMPRESSION_LEVEL = 19
COUNTING = "DELTA_BINARY_PACKED"
TEXT = "DELTA_LENGTH_BYTE_ARRAY"
STATISTICS = {"sequence_id", "document", "length", "targets"}


FILE_SHAPE = {"bytes": int, "sha256": str, "footer_sha256": str, "rows": int, "column_bytes": {...: int}}


@dataclass(frozen=True)
class FileRecord:
    """What a published Parquet file must look like.

    Attributes:
        bytes: its size.
        sha256: hash of all of it.
        footer_sha256: hash of its footer (metadata, length and magic).
        rows: how many rows it holds.
        column_bytes: compressed bytes of each top-level column.
    """

    bytes: int
    sha256: str
    footer_sha256: str
    rows: int
    column_bytes: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> FileRecord:
        """The record of plain JSON values (shape FILE_SHAPE)."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def leaf(field: pa.Field) -> str:
    """The path of a column's values in a Parquet schema."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def encodings(schema: pa.Schema) -> dict[str, str]:
    """How each column is encoded, by its path; a column left out has a dictionary.

    Keys count up. Token ids repeat as phrases, which Zstandard finds in the plain values and a dictionary's packed
    codes hide from it (7.0 against 6.0 bytes for five candidates). Steps are small numbers above a power of two: byte by byte,
    all but the lowest are the same, and that one takes hardly more than its entropy.
    """
    chosen = {name: COUNTING for name in schema.names if name in ("sequence_id", "position")}
    for column in schema:
        if column.name.endswith("_steps"):
            chosen[leaf(column)] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_binary(column.type):
            chosen[column.name] = TEXT
            continue
        value_type = column.type.value_type if pa.types.is_list(column.type) else column.type
        if value_type == pa.uint32():
            chosen[leaf(column)] = "PLAIN"
    return chosen


def write_table(table: pa.Table, file: BinaryIO, row_groups: list[int], encoding: dict[str, str] | None = None) -> None:
    """Write `table` as Parquet with the given numbers of rows in its row groups.

    Args:
        encoding: of each column, by its path; `encodings(table.schema)` when None.
    """
    chosen = encodings(table.schema) if encoding is None else encoding
    digesting = DigestingFile(file)
    with pq.ParquetWriter(
        digesting,
        table.schema,
        compression=COMPRESSION,
        compression_level=COMPRESSION_LEVEL,
        write_page_checksum=True,
        store_schema=False,
        use_dictionary=[leaf(column) for column in table.schema if leaf(column) not in chosen],
        column_encoding=chosen,
        write_statistics=[name for name in table.schema.names if name in STATISTICS],
    ) as writer:
        start = 0
        for rows in row_groups:
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
            start += rows
        writer.add_key_value_metadata({DIGESTS_KEY: digesting.digests()})


def publish_table(
    path: Path, table: pa.Table, row_groups: list[int], encoding: dict[str, str] | None = None
) -> tuple[FileRecord, pa.Table]:
    """Publish a table under `path`, or take the file that has that name already.

    Returns:
        the record of what is there, and what is there as a table: another writer's may differ in its last digits.

    Raises:
        DamageError: the file that has that name has other rows or columns.
        StoreError: the disk refuses.
    """
    ours = publish(path, lambda file: write_table(table, file, row_groups, encoding))
    record = describe(path)
    if ours:
        return record, table
    found = read_file(path)
    if len(found) != len(table) or not found.schema.equals(table.schema):
        raise DamageError(
            f"{path} was left by an unfinished run, and does not have the rows that belong there:"
            " delete that file and run the same command again"
        )
    return record, found


def _unreadable(path: Path, error: Exception) -> KnowledgeStoreError:
    """What to say of a file that could not be read: what the system refuses is not the file's damage."""
    if isinstance(error, OSError) and error.errno:
        return StoreError(f"cannot read {path}: {os.strerror(error.errno)}")
    return DamageError(f"{path} is damaged: {error}")


def read_file(path: Path) -> pa.Table:
    """All of a file that `describe` has found to be the published one, or that nobody has published yet.

    Raises:
        DamageError: a page does not match its checksum.
        StoreError: it cannot be read.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(use_threads=False).replace_schema_metadata(None)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _read_footer(path: Path) -> bytes:
    """The bytes of a Parquet file's footer: metadata, its length, and the magic number at the end.

    Raises:
        DamageError: the file is too short, or does not end as Parquet does.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little") + 8
        if end[4:] != MAGIC or length > size:
            raise DamageError(f"{path} is damaged: it does not end as a Parquet file does")
        file.seek(size - length)
        return file.read(length)


def describe(path: Path) -> FileRecord:
    """Hash a Parquet file and read its footer.

    Raises:
        DamageError: it is missing or no Parquet file.
        StoreError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        footer_sha256 = hashlib.sha256(_read_footer(path)).hexdigest()
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    column_bytes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            name = chunk.path_in_schema.split(".")[0]
            column_bytes[name] = column_bytes.get(name, 0) + chunk.total_compressed_size
    return FileRecord(size, sha256, footer_sha256, metadata.num_rows, column_bytes)


def check_whole(path: Path, record: FileRecord) -> None:
    """Read all of a file, and make sure that it is the one that was published.

    Raises:
        DamageError: it is not, or is missing.
        StoreError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    if not intact:
        raise DamageError(f"{path} is damaged: its contents are not those that were published")


def open_parquet(path: Path, size: int, sha256: str, footer_sha256: str) -> pq.ParquetFile:
    """Open a file of which every byte is checked when it is read.

    Raises:
        DamageError: its size or footer differ from what was published, or it is missing.
        StoreError: it cannot be read.
    """
    file = CheckedFile(path, size, sha256, footer_sha256)
    return pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)


def read_row_groups(file: pq.ParquetFile, path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of an open file, one at a time.

    Raises:
        DamageError: a page does not match its checksum.
    """
    for group in range(file.num_row_groups):
        yield read_row_group(file, path, group, columns)


def read_row_group(file: pq.ParquetFile, path: Path, group: int, columns: list[str] | None = None) -> pa.Table:
    """One row group of an open file.

    Raises:
        DamageError: a page does not match its checksum.
    """
    try:
        return file.read_row_group(group, columns=columns, use_threads=False).replace_schema_metadata(None)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def dataset(files: list[CheckedFile], schema: pa.Schema) -> ds.Dataset:
    """An Arrow dataset over files of which every byte is checked when it is read."""
    file_format = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    fragments = [file_format.make_fragment(pa.PythonFile(file, mode="r")) for file in files]
    return ds.FileSystemDataset(fragments, schema, file_format)
