"""Parquet files of a store, written so that they can be checked and read so that they are checked.

pyarrow writes and verifies a checksum for each page; the footer, which no page checksum covers, is hashed into the file's
record and checked before Parquet parses it. Everything is read through pyarrow: DuckDB's own reader ignores page checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError
from knowledge_store.publication import publish

MAGIC = b"PAR1"
COMPRESSION = "zstd"
COMPRESSION_LEVEL = 9


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


def write_table(table: pa.Table, file: BinaryIO, row_groups: list[int]) -> None:
    """Write `table` as Parquet with the given numbers of rows in its row groups."""
    with pq.ParquetWriter(
        file,
        table.schema,
        compression=COMPRESSION,
        compression_level=COMPRESSION_LEVEL,
        write_page_checksum=True,
        store_schema=False,
        write_statistics=[name for name in table.schema.names if name in ("sequence_id", "document", "length", "targets")],
    ) as writer:
        start = 0
        for rows in row_groups:
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
            start += rows


def publish_table(path: Path, table: pa.Table, row_groups: list[int]) -> FileRecord:
    """Publish a table under `path`, or take the file that has that name already. Returns the record of what is there."""
    publish(path, lambda file: write_table(table, file, row_groups))
    return describe(path)


def describe(path: Path) -> FileRecord:
    """Hash a Parquet file and read its footer.

    Raises:
        DamageError: it is missing or no Parquet file.
    """
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        footer_sha256 = hashlib.sha256(read_footer(path)).hexdigest()
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    column_bytes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            name = chunk.path_in_schema.split(".")[0]
            column_bytes[name] = column_bytes.get(name, 0) + chunk.total_compressed_size
    return FileRecord(size, sha256, footer_sha256, metadata.num_rows, column_bytes)


def read_footer(path: Path) -> bytes:
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


def check_footer(path: Path, size: int, footer_sha256: str) -> None:
    """Make sure a file has the size and the footer that were published.

    Raises:
        DamageError: it has not, or is missing.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise DamageError(f"{path} is damaged: it has {found:,} bytes and was published with {size:,}")
        if hashlib.sha256(read_footer(path)).hexdigest() != footer_sha256:
            raise DamageError(f"{path} is damaged: its footer is not the one that was published")
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None


def open_parquet(path: Path, size: int, footer_sha256: str) -> pq.ParquetFile:
    """Open a file whose footer is checked now and whose pages are checked as they are read.

    Raises:
        DamageError: its size or footer differ from what was published.
    """
    check_footer(path, size, footer_sha256)
    return pq.ParquetFile(path, page_checksum_verification=True)


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
        return file.read_row_group(group, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DamageError(f"{path} is damaged: {error}") from None


def dataset(paths: list[Path], schema: pa.Schema) -> ds.Dataset:
    """An Arrow dataset over files whose footers have been checked; pages are checked as they are read."""
    file_format = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    system = pa.fs.LocalFileSystem()
    fragments = [file_format.make_fragment(str(path), system) for path in paths]
    return ds.FileSystemDataset(fragments, schema, file_format, system)
