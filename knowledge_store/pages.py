"""What a Parquet file claims to hold, checked before anything is made of it: a few bytes may stand for terabytes.

A footer states rows, values and sizes; the header in front of each page states them once more, and is what a reader allocates
by. Neither is covered by page checksums, and a stranger's file may state anything. So both are read here first: they must
agree, every page must carry a checksum, and what a column chunk stands for is bounded, by a constant or by its bytes.
Headers are Thrift, compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md), with the fields of
parquet-format's parquet.thrift.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# What a column chunk may stand for whatever its size: its rows' worth of a constant takes hardly a byte.
MOST_VALUES = 2**22
MOST_BYTES = 2**28
# And for each byte of it: no real text or number is smaller.
VALUES_PER_BYTE = 16
BYTES_PER_BYTE = 64

MOST_COLUMNS = 4096
HEADER_BYTES = 256  # most headers take less than 60

_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)
_DELTA_BYTE_ARRAY = 7  # each value names a part of the one before: a bomb by design, and nothing here writes it


@dataclass(frozen=True)
class Page:
    """A page as its header states it.

    Attributes:
        kind: 0 data, 1 index, 2 dictionary, 3 data (version 2).
        start, compressed: where its bytes begin in the file, and how many.
        uncompressed: bytes.
        values: how many, nulls included; 0 of an index page.
        encoding: its number in parquet.thrift; −1 of an index page.
        checksum: CRC-32 of its bytes, None without one.
    """

    kind: int
    start: int
    compressed: int
    uncompressed: int
    values: int
    encoding: int
    checksum: int | None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a page header has a number of too many bytes")


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A Thrift struct: its integers and structs by field number; texts are skipped, and nothing else is in a page header."""
    if depth > 3:
        raise ValueError("a page header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[at]
        at += 1
        if not head:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            raw, at = _varint(data, at)
            number = (raw >> 1) ^ -(raw & 1)
        kind = head & 0x0F
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            raw, at = _varint(data, at)
            fields[number] = (raw >> 1) ^ -(raw & 1)
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            fields[number], at = _struct(data, at, depth + 1)
        else:
            raise ValueError("a page header has a field of an unknown type")


def _page(data: bytes, start: int) -> Page:
    """The page whose header `data` begins with, at `start` in the file. IndexError: it is cut off; ValueError: it is none."""
    fields, end = _struct(data, 0)
    if end > len(data):
        raise IndexError
    kind = fields.get(1)
    place = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}.get(kind)  # type: ignore[arg-type]
    own = fields.get(place, {}) if place else {}
    if kind not in (_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2) or not isinstance(own, dict):
        raise ValueError("a page is of no known kind")
    encoding = own.get(4 if kind == _DATA_PAGE_V2 else 2, -1)
    checksum = fields.get(4)
    compressed, uncompressed, values = (fields.get(3, ""), fields.get(2, ""), own.get(1, 0))
    if any(type(each) is not int for each in (compressed, uncompressed, values, encoding, checksum or 0)):
        raise ValueError("a page header lacks a number")
    if min(compressed, uncompressed, values) < 0:
        raise ValueError("a page header states less than nothing")
    return Page(kind, start + end, compressed, uncompressed, values, encoding, None if checksum is None else checksum % 2**32)


def chunk_pages(descriptor: int, start: int, size: int) -> Iterator[Page]:
    """The pages of a column chunk of an open file, from its place and compressed size.

    Raises:
        ValueError: they are not that.
        OSError: the file cannot be read.
    """
    end = start + size
    while start < end:
        for most in (HEADER_BYTES, 2**20):  # a header holds the least and greatest value, which may be long
            try:
                page = _page(os.pread(descriptor, min(most, end - start), start), start)
                break
            except IndexError:
                continue
        else:
            raise ValueError("a page header is cut off")
        start = page.start + page.compressed
        if start > end:
            raise ValueError("a page is longer than its column")
        yield page


def check_file(metadata: pq.FileMetaData, size: int) -> None:
    """Make sure that what a footer states is possible for a file of so many bytes.

    Raises:
        ValueError: it is not; says what.
    """
    rows = [metadata.row_group(group).num_rows for group in range(min(metadata.num_row_groups, metadata.num_rows + 1))]
    if len(rows) < metadata.num_row_groups:
        raise ValueError(f"it states {metadata.num_row_groups:,} row groups for {metadata.num_rows:,} rows")
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its row groups do not hold the {metadata.num_rows:,} rows it states")
    if metadata.num_rows > 4 * (MOST_VALUES + size):
        raise ValueError(f"it states {metadata.num_rows:,} rows, more than its {size:,} bytes can stand for")
    if metadata.num_columns > MOST_COLUMNS:
        raise ValueError(f"it states {metadata.num_columns:,} columns")


def check_row_group(file: pq.ParquetFile, path: Path, group: int, columns: Collection[str] | None = None) -> None:
    """Make sure that the pages of a row group are what its footer states, and stand for no more than their bytes can.

    Args:
        file: open; path: its own.
        group: number of the row group.
        columns: the columns that are to be read; None for all.

    Raises:
        ValueError: they do not; says what.
        OSError: the file cannot be read.
    """
    metadata = file.metadata.row_group(group)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for index in range(metadata.num_columns):
            chunk = metadata.column(index)
            name = chunk.path_in_schema.split(".")[0]
            if columns is None or name in columns:
                texts = _check_chunk(chunk, descriptor)
                if texts is not None and texts * chunk.num_values > MOST_BYTES:
                    _check_texts(path, group, name, max(MOST_BYTES, BYTES_PER_BYTE * chunk.total_compressed_size))
    finally:
        os.close(descriptor)


def _check_chunk(chunk: pq.ColumnChunkMetaData, descriptor: int) -> int | None:
    """Check one column chunk. Returns the bytes of its dictionary of texts, None without one."""
    name, values = chunk.path_in_schema, chunk.num_values
    size, stated = chunk.total_compressed_size, chunk.total_uncompressed_size
    if chunk.compression not in ("ZSTD", "UNCOMPRESSED"):
        raise ValueError(f"column {name} is compressed with {chunk.compression}, and a store's files with Zstandard")
    if size < 0 or not 0 <= values <= max(MOST_VALUES, VALUES_PER_BYTE * size):
        raise ValueError(f"column {name} states {values:,} values in {size:,} bytes")
    if not 0 <= stated <= max(MOST_BYTES, BYTES_PER_BYTE * size):
        raise ValueError(f"column {name} states {stated:,} bytes, compressed to {size:,}")
    if not values:
        return None  # no page is read, and of a chunk without rows no place is stated
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    if start < 0:
        raise ValueError(f"column {name} begins before its file does")
    texts = None
    found = uncompressed = 0
    for page in chunk_pages(descriptor, start, size):
        if page.checksum is None:
            raise ValueError(f"a page of column {name} has no checksum")
        if page.encoding == _DELTA_BYTE_ARRAY:
            raise ValueError(f"column {name} is encoded as no writer of a store does")
        uncompressed += page.uncompressed
        if page.kind in (_DATA_PAGE, _DATA_PAGE_V2):
            found += page.values
        elif page.kind == _DICTIONARY_PAGE and chunk.physical_type == "BYTE_ARRAY":
            texts = page.uncompressed
    if found != values or uncompressed > stated:
        raise ValueError(f"the pages of column {name} are not what its footer states")
    return texts


def _check_texts(path: Path, group: int, column: str, most: int) -> None:
    """Make sure that the texts of a column, each of which its pages may name any number of times, are not too many bytes."""
    with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=[column]) as file:
        table = file.read_row_group(group, columns=[column], use_threads=False)
    total = 0
    for chunk in table[column].chunks:
        if not isinstance(chunk, pa.DictionaryArray):
            return  # within a list, say, which no text of a store is
        lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
        total += pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0
    if total > most:
        raise ValueError(f"column {column} stands for {total:,} bytes of text")
