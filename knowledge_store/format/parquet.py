"""Parquet files of a store, written so that they can be checked and read so that they are checked.

The footer, whose hash stands in the file's record, holds digests of all that comes before it: no byte is parsed that was not
checked (`integrity`). pyarrow also writes and verifies a checksum for each page. Everything is read through it: DuckDB's own
reader ignores page checksums.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError, KnowledgeStoreError
from knowledge_store.format.integrity import (
    DIGESTS_KEY,
    CheckedFile,
    DigestingFile,
    FileRecord,
    TableFile,
    column_sizes,
    describe,
    unreadable,
)
from knowledge_store.format.scan_ahead import FarDataset
from knowledge_store.storage import Storage

if TYPE_CHECKING:
    import pyarrow.dataset as ds

COMPRESSION = "zstd"
# Slow to write (some 90,000 positions a second on one core, on a thread beside the teacher), as fast as any to read. Against
# level 9 it saves 0.8 bytes a position on WikiText-2, nearly all in token ids.
COMPRESSION_LEVEL = 19
COUNTING = "DELTA_BINARY_PACKED"
TEXT = "DELTA_LENGTH_BYTE_ARRAY"
STATISTICS = {"sequence_id", "document", "length", "targets"}


@dataclass(frozen=True)
class Columns:
    """How the columns of a table are stored, as those who make the table declare.

    Attributes:
        encoding: Parquet's name of it, by the column's path; one that is left out has a dictionary.
        levels: of the compression, by the column's path; COMPRESSION_LEVEL for one that is left out.
        identifying: names of the columns that any two writers make alike; the others may differ in their last digits.
    """

    encoding: Mapping[str, str] = field(default_factory=dict)
    levels: Mapping[str, int] = field(default_factory=dict)
    identifying: tuple[str, ...] = ()


UNDECLARED = Columns()


def _leaf(column: pa.Field) -> str:
    """The path of a column's values in a Parquet schema."""
    return f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name


def write_table(file: BinaryIO, schema: pa.Schema, row_groups: Iterable[pa.Table], columns: Columns = UNDECLARED) -> FileRecord:
    """Write tables of one schema as the row groups of a Parquet file, each as it comes.

    Args:
        file: open, to be written from its beginning.
        schema: of each table.
        row_groups: each is exactly one row group.
        columns: how they are stored.

    Returns:
        the file's record, from the bytes as they were written.
    """
    paths = [_leaf(column) for column in schema]
    digesting = DigestingFile(file)
    with pq.ParquetWriter(
        digesting,
        schema,
        compression=COMPRESSION,
        compression_level={path: columns.levels.get(path, COMPRESSION_LEVEL) for path in paths},
        write_page_checksum=True,
        store_schema=False,
        use_dictionary=[path for path in paths if path not in columns.encoding],
        column_encoding=dict(columns.encoding),
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
    columns: Columns = UNDECLARED,
) -> tuple[FileRecord, bool]:
    """Publish a table, or take the file that has its name already: another writer's, which may differ in its last digits.

    Args:
        storage, name: of the file.
        schema, row_groups, columns: as of `write_table`; all row groups are taken from the iterable, whoever published it.

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
            keys.append(table.select(columns.identifying))
            yield table

    if storage.create(name, lambda file: records.append(write_table(file, schema, noted(), columns))):
        return records[0], True
    for _ in noted():
        pass
    # Nothing vouches for that file yet, its footer included, and from now on a record will: whatever can be checked is.
    try:
        record = describe(storage, name)
        standing = open_table(TableFile(storage, name, record, schema))
        groups = list(read_row_groups(standing))
        if not _joined(groups, schema, columns).equals(_joined(keys, schema, columns)):
            raise ValueError("it does not have the rows that belong there")
        rewritten = io.BytesIO()
        write_table(rewritten, schema, groups, columns)
        if _statistics(standing.metadata) != _statistics(pq.read_metadata(rewritten)):  # by which SQL leaves out row groups
            raise ValueError("its statistics are not those of its rows")
        return replace(record, column_bytes=column_sizes(standing.metadata)), False
    except (DamageError, ValueError) as error:
        raise DamageError(
            f"{storage.locate(name)} has no commit record that vouches for it, and cannot be used ({error}): delete that file"
            " and run the same command again"
        ) from None


def _statistics(metadata: pq.FileMetaData) -> list[list[dict[str, object] | None]]:
    """Of each column of each row group."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [[group.column(index).statistics for index in range(metadata.num_columns)] for group in groups]
    return [[column and column.to_dict() for column in group] for group in columns]


def _joined(tables: Iterable[pa.Table], schema: pa.Schema, columns: Columns) -> pa.Table:
    """The identifying columns of tables of one schema."""
    return pa.concat_tables([table.select(columns.identifying) for table in (schema.empty_table(), *tables)])


def same_rows(one: pa.Table, other: pa.Table, columns: Columns) -> bool:
    """Whether two tables are of the same sequences and tokens. Their knowledge may be another device's."""
    names = list(columns.identifying)
    return one.schema.equals(other.schema) and one.select(names).equals(other.select(names))


class OpenTable(pq.ParquetFile):
    """An open Parquet file of which every byte is checked when it is read."""

    def __init__(self, checked: CheckedFile):
        self.file = checked.file
        self._checked = checked
        # pre_buffer: all of a row group, or of its columns, is asked for at once, and not page by page.
        super().__init__(
            pa.PythonFile(checked, mode="r"), metadata=checked.open(), pre_buffer=True, page_checksum_verification=True
        )

    def again(self) -> OpenTable:
        """The same file for another thread. Nothing is read for it."""
        return OpenTable(self._checked.again())


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
    except (OSError, ValueError, pa.ArrowException) as error:
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
    import pyarrow.dataset as ds  # here, since it takes longer to import than all the rest where pandas is installed

    file_format = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(pre_buffer=True, page_checksum_verification=True)
    )
    if any(file.storage.at_once > 1 for file in files):
        return FarDataset(files, schema, file_format, errors)
    fragments = [file_format.make_fragment(pa.PythonFile(CheckedFile(file, errors), mode="r")) for file in files]
    return ds.FileSystemDataset(fragments, schema, file_format)
