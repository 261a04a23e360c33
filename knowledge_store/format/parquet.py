"""Parquet files of a store, written so that they can be checked and read so that they are checked.

The footer, whose hash stands in the file's record, holds digests of all that comes before it: no byte is parsed that was not
checked (`integrity`). pyarrow also writes and verifies a checksum for each page. Everything is read through it: DuckDB's own
reader ignores page checksums.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError, KnowledgeStoreError
from knowledge_store.format.integrity import (
    DIGESTS_KEY,
    FILE_SHAPE,
    CheckedFile,
    DigestingFile,
    FileRecord,
    TableFile,
    check_whole,
    describe,
    unreadable,
)
from knowledge_store.storage import Storage

__all__ = [
    "COUNTING",
    "FILE_SHAPE",
    "TEXT",
    "FileRecord",
    "OpenTable",
    "TableFile",
    "check_whole",
    "dataset",
    "describe",
    "encodings",
    "leaf",
    "open_table",
    "publish_table",
    "read_row_group",
    "read_row_groups",
    "read_table",
    "same_rows",
    "write_table",
]

COMPRESSION = "zstd"
# Slow to write (some 90,000 positions a second on one core, on a thread beside the teacher), as fast as any to read. Against
# level 9 it saves 0.8 bytes a position on WikiText-2, nearly all in token ids.
COMPRESSION_LEVEL = 19
COUNTING = "DELTA_BINARY_PACKED"
TEXT = "DELTA_LENGTH_BYTE_ARRAY"
IDENTIFYING = ("sequence_id", "position", "item", "token_id", "is_target", "token_hash")
STATISTICS = {"sequence_id", "document", "length", "targets"}


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


def write_table(
    file: BinaryIO, schema: pa.Schema, row_groups: Iterable[pa.Table], encoding: dict[str, str] | None = None
) -> FileRecord:
    """Write tables of one schema as the row groups of a Parquet file, each as it comes.

    Args:
        file: open, to be written from its beginning.
        schema: of each table.
        row_groups: each is exactly one row group.
        encoding: of each column, by its path; `encodings(schema)` when None.

    Returns:
        the file's record, from the bytes as they were written.
    """
    chosen = encodings(schema) if encoding is None else encoding
    digesting = DigestingFile(file)
    with pq.ParquetWriter(
        digesting,
        schema,
        compression=COMPRESSION,
        compression_level=COMPRESSION_LEVEL,
        write_page_checksum=True,
        store_schema=False,
        use_dictionary=[leaf(column) for column in schema if leaf(column) not in chosen],
        column_encoding=chosen,
        write_statistics=[name for name in schema.names if name in STATISTICS],
    ) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=max(len(table), 1))
        writer.add_key_value_metadata({DIGESTS_KEY: digesting.digests()})
    return digesting.record()


def publish_table(
    storage: Storage,
    name: str,
    schema: pa.Schema,
    row_groups: Iterable[pa.Table],
    encoding: dict[str, str] | None = None,
) -> tuple[FileRecord, bool]:
    """Publish a table, or take the file that has its name already: another writer's, which may differ in its last digits.

    Args:
        storage, name: of the file.
        schema, row_groups, encoding: as of `write_table`; all row groups are taken from the iterable, whoever published it.

    Returns:
        the record of what stands there, and whether this call published it.

    Raises:
        DamageError: the file that has that name is damaged, or has other rows or columns.
        StoreError: the storage refuses.
    """
    remaining = iter(row_groups)
    keys: list[pa.Table] = []
    records: list[FileRecord] = []

    def noted() -> Iterator[pa.Table]:
        for table in remaining:
            keys.append(_identifying(table))
            yield table

    if storage.create(name, lambda file: records.append(write_table(file, schema, noted(), encoding))):
        return records[0], True
    for _ in noted():
        pass
    # Nothing vouches for that file yet, its footer included (whose statistics decide what SQL leaves out), and from now on a
    # record will: it is used only if its rows, written again, give the same bytes.
    try:
        record = describe(storage, name)
        groups = list(read_row_groups(open_table(TableFile(storage, name, record, schema))))
        if not _joined([_identifying(group) for group in groups], schema).equals(_joined(keys, schema)):
            raise ValueError("it does not have the rows that belong there")
        rewritten = write_table(io.BytesIO(), schema, groups, encoding)
        if rewritten.sha256 != record.sha256:
            raise ValueError("it is damaged, or another version of pyarrow wrote it")
    except (DamageError, ValueError) as error:
        raise DamageError(
            f"{storage.locate(name)} has no commit record that vouches for it, and cannot be used ({error}): delete that file"
            " and run the same command again"
        ) from None
    return rewritten, False


def _identifying(table: pa.Table) -> pa.Table:
    return table.select([name for name in IDENTIFYING if name in table.column_names])


def _joined(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables) if tables else _identifying(schema.empty_table())


def same_rows(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables are of the same sequences and tokens. Their knowledge may be another device's."""
    return one.schema.equals(other.schema) and _identifying(one).equals(_identifying(other))


class OpenTable(pq.ParquetFile):
    """An open Parquet file of which every byte is checked when it is read."""

    def __init__(self, checked: CheckedFile):
        self.file = checked.file
        super().__init__(pa.PythonFile(checked, mode="r"), metadata=checked.open(), page_checksum_verification=True)


def open_table(file: TableFile) -> OpenTable:
    """Open a file of which every byte is checked when it is read.

    Raises:
        DamageError: its size, footer, columns or rows differ from what was published, or it is missing.
        StoreError: it cannot be read.
    """
    try:
        return OpenTable(CheckedFile(file))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(file.path, error) from None


def read_row_groups(table: OpenTable, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of an open file, one at a time (DamageError, StoreError: as of `read_row_group`)."""
    for group in range(table.num_row_groups):
        yield read_row_group(table, group, columns)


def read_row_group(table: OpenTable, group: int, columns: list[str] | None = None) -> pa.Table:
    """One row group of an open file.

    Raises:
        DamageError: its bytes are not those that were published.
        StoreError: it cannot be read.
    """
    try:
        return table.read_row_group(group, columns=columns, use_threads=False).replace_schema_metadata(None)
    except (OSError, MemoryError, ValueError, pa.ArrowException) as error:
        raise unreadable(table.file.path, error) from None


def read_table(file: TableFile, columns: list[str] | None = None) -> pa.Table:
    """All of a file, or some columns of it (DamageError, StoreError: as of `open_table` and `read_row_group`)."""
    tables = list(read_row_groups(open_table(file), columns))
    empty = file.schema.empty_table()
    return pa.concat_tables(tables) if tables else empty if columns is None else empty.select(columns)


def dataset(files: list[TableFile], schema: pa.Schema, errors: list[KnowledgeStoreError]) -> ds.Dataset:
    """An Arrow dataset over files of which everything is checked when it is read.

    Args:
        errors: what is wrong with a file is added here too (see `CheckedFile`).
    """
    file_format = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    fragments = [file_format.make_fragment(pa.PythonFile(CheckedFile(file, errors), mode="r")) for file in files]
    return ds.FileSystemDataset(fragments, schema, file_format)
