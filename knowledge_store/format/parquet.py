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

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.integrity import (
    DIGESTS_KEY,
    CheckedFile,
    DigestingFile,
    GuardedFile,
    open_regular,
    read_footer,
    unreadable,
)
from knowledge_store.format.pages import RowGroup, check_columns, check_row_group, check_statistics, parse_footer
from knowledge_store.format.records import is_sha256
from knowledge_store.storage.local import publish

COMPRESSION = "zstd"
# Slow to write (some 90,000 positions a second on one core, on a thread beside the teacher), as fast as any to read. Against
# level 9 it saves 0.8 bytes a position on WikiText-2, nearly all in token ids.
COMPRESSION_LEVEL = 19
COUNTING = "DELTA_BINARY_PACKED"
TEXT = "DELTA_LENGTH_BYTE_ARRAY"
IDENTIFYING = ("sequence_id", "position", "token_id", "is_target", "token_hash")
STATISTICS = {"sequence_id", "document", "length", "targets"}
MAX_FILE_BYTES = 2**48

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

    Raises (on construction):
        ValueError: a size or a hash is none. Hashes become names of files in the user's cache.
    """

    bytes: int
    sha256: str
    footer_sha256: str
    rows: int
    column_bytes: dict[str, int]

    def __post_init__(self) -> None:
        if not (is_sha256(self.sha256) and is_sha256(self.footer_sha256)):
            raise ValueError("a file's SHA-256 is not 64 hexadecimal digits")
        if not all(0 <= each <= MAX_FILE_BYTES for each in (self.bytes, self.rows, *self.column_bytes.values())):
            raise ValueError("a file's size or number of rows is not possible")

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


def write_readable(table: pa.Table, file: BinaryIO, row_groups: list[int], encoding: dict[str, str] | None = None) -> None:
    """`write_table` to a file of the disk, and make sure that readers will not refuse what it stands for.

    Raises:
        InputError: they would.
        StoreError: it cannot be read.
    """
    write_table(table, file, row_groups, encoding)
    file.flush()
    path = Path(file.name)
    try:
        record = describe(path)
        written = open_parquet(path, record.bytes, record.sha256, record.footer_sha256)
        for number, group in enumerate(written.stated):
            check_row_group(written.checked, number, group)
    except (ValueError, DamageError) as error:
        if not path.exists():  # the dump was removed meanwhile, which whoever gives the file its name will find
            return
        reason = str(error).removeprefix(f"{path} is damaged: ")
        raise InputError(
            f"a shard would be too large to be read again ({reason}):"
            " give a smaller --shard-size, or keep fewer candidates, draws or columns of the corpus"
        ) from None


def publish_table(
    path: Path, table: pa.Table, row_groups: list[int], encoding: dict[str, str] | None = None
) -> tuple[FileRecord, pa.Table]:
    """Publish a table under `path`, or take the file that has that name already.

    Returns:
        the record of what is there, and what is there as a table: another writer's may differ in its last digits.

    Raises:
        DamageError: the file that has that name is damaged, or has other rows or columns.
        InputError: nobody could read it again.
        StoreError: the disk refuses.
    """
    if publish(path, lambda file: write_readable(table, file, row_groups, encoding)):
        return describe(path), table
    # Nothing vouches for that file yet but itself, and from now on its record will: whatever can be checked is.
    try:
        record = describe(path)
        found = read_with_statistics(path, record, table.schema)
        if not same_rows(found, table):
            raise ValueError("it does not have the rows that belong there")
    except (DamageError, ValueError) as error:
        raise DamageError(
            f"{path} has no commit record that vouches for it, and cannot be used ({error}): delete that file and run the same"
            " command again"
        ) from None
    return record, found


def same_rows(found: pa.Table, table: pa.Table) -> bool:
    """Whether two tables are of the same sequences and tokens. Their knowledge may be another device's."""
    keys = [name for name in IDENTIFYING if name in table.column_names]
    return found.schema.equals(table.schema) and found.select(keys).equals(table.select(keys))


def read_file(path: Path, record: FileRecord) -> pa.Table:
    """All of a file.

    Raises:
        DamageError: it is not what its record says, or claims to hold what it cannot.
        StoreError: it cannot be read.
    """
    return _read_all(open_parquet(path, record.bytes, record.sha256, record.footer_sha256))


def read_with_statistics(path: Path, record: FileRecord, schema: pa.Schema) -> pa.Table:
    """`read_file`, and its columns and the footer's statistics, by which SQL leaves out row groups, are looked at too.

    Raises:
        DamageError, StoreError: as of `read_file`, or it has other columns than `schema`.
        ValueError: the statistics are not those of the rows.
    """
    file = open_parquet(path, record.bytes, record.sha256, record.footer_sha256)
    table = _read_all(file)
    if not table.schema.equals(schema):
        raise DamageError(f"{path} does not have the columns of its table")
    check_statistics(table, file.stated)
    return table


def _read_all(file: TableFile) -> pa.Table:
    tables = list(read_row_groups(file))
    return pa.concat_tables(tables) if tables else file.schema_arrow.empty_table().replace_schema_metadata(None)


def describe(path: Path) -> FileRecord:
    """Hash a Parquet file and read its footer.

    Raises:
        DamageError: it is missing or no Parquet file, or claims to hold what it cannot.
        StoreError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            footer = read_footer(path, file.fileno(), size)
        groups = parse_footer(footer, size).groups
        column_bytes: dict[str, int] = {}
        for group in groups:
            for chunk in group.chunks:
                column_bytes[chunk.column] = column_bytes.get(chunk.column, 0) + chunk.compressed
        rows = sum(group.rows for group in groups)
        return FileRecord(size, sha256, hashlib.sha256(footer).hexdigest(), rows, column_bytes)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def check_whole(path: Path, record: FileRecord) -> None:
    """Read all of a file, and make sure that it is the one that was published.

    Raises:
        DamageError: it is not, or is missing.
        StoreError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            sized = os.fstat(file.fileno()).st_size == record.bytes  # a sparse file may be of any size
            intact = sized and hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except OSError as error:
        raise unreadable(path, error) from None
    if not intact:
        raise DamageError(f"{path} is damaged: its contents are not those that were published")


class TableFile(pq.ParquetFile):
    """An open Parquet file of which every byte is checked when it is read, and what its footer states of its row groups."""

    def __init__(self, file: CheckedFile):
        self.checked = file
        self.stated: list[RowGroup] = file.stated().groups
        super().__init__(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
        check_columns(file.stated(), self.schema)


def open_parquet(path: Path, size: int, sha256: str, footer_sha256: str) -> TableFile:
    """Open a file of which every byte is checked when it is read.

    Raises:
        DamageError: its size or footer differ from what was published, it is missing, or claims to hold what it cannot.
        StoreError: it cannot be read.
    """
    try:
        return TableFile(CheckedFile(path, size, sha256, footer_sha256))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from None


def row_group_ends(path: Path, record: FileRecord) -> np.ndarray:
    """How many rows a file has up to the end of each row group, int64 (DamageError, StoreError: as of `open_parquet`)."""
    file = open_parquet(path, record.bytes, record.sha256, record.footer_sha256)
    return np.cumsum([group.rows for group in file.stated], dtype=np.int64)


def read_row_groups(file: TableFile, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of an open file, one at a time.

    Raises:
        DamageError, StoreError: as of `read_row_group`.
    """
    for group in range(file.num_row_groups):
        yield read_row_group(file, group, columns)


def read_row_group(file: TableFile, group: int, columns: list[str] | None = None) -> pa.Table:
    """One row group of an open file.

    Raises:
        DamageError: its bytes are not those that were published, or claim to hold what they cannot.
        StoreError: it cannot be read.
    """
    try:
        check_row_group(file.checked, group, file.stated[group], columns)
        return file.read_row_group(group, columns=columns, use_threads=False).replace_schema_metadata(None)
    except (OSError, MemoryError, ValueError, pa.ArrowException) as error:
        raise unreadable(file.checked.path, error) from None


def dataset(files: list[GuardedFile], schema: pa.Schema) -> ds.Dataset:
    """An Arrow dataset over files of which everything is checked when it is read."""
    file_format = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    fragments = [file_format.make_fragment(pa.PythonFile(file, mode="r")) for file in files]
    return ds.FileSystemDataset(fragments, schema, file_format)
