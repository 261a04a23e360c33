"""What a Parquet file claims to hold, checked before anything is made of it: a few bytes may stand for terabytes.

A footer states rows, values and sizes; the header in front of each page states them once more, and is what a reader allocates
by. Neither is covered by page checksums, and a stranger's file may state anything. So both are read here first: they must
agree, every page must carry a checksum, and what a column chunk stands for is bounded, by a constant or by its bytes.

Both are Thrift, compact protocol (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md), with the fields of
parquet-format's parquet.thrift, and are parsed here: pyarrow ends the process where the metadata of a column chunk that Python
asks it for is unsound (its size statistics, say), and only what of a footer is needed here is ever made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from knowledge_store.format.integrity import CheckedFile

# What a file may stand for whatever its size: its rows' worth of a constant takes hardly a byte.
MAX_BYTES = 2**28
# And for each byte of it: no real text or number is smaller.
BYTES_PER_BYTE = 64

MAX_COLUMNS = 4096
MAX_ROW_GROUPS = 2**14
MAX_CHUNKS = 2**16  # of more than a hundred million positions
MAX_DEPTH = 12
MAGIC_BYTES = 4  # that a file begins with
HEADER_BYTES = 256  # most headers of pages take less than 60
BLOCK_BYTES = 2**18  # more than a block of Zstandard, compressed

_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)
_RLE = 3
_DELTA_LENGTHS, _DELTA_BYTE_ARRAY = 6, 7  # of the second each value names a part of the one before: a bomb by design
_BYTE_ARRAY = 6
_PHYSICAL = {"BOOLEAN": 0, "INT32": 1, "INT64": 2, "FLOAT": 4, "DOUBLE": 5, "BYTE_ARRAY": _BYTE_ARRAY}
_WIDTHS = {0: 1, 1: 4, 2: 8, 4: 4, 5: 8}
_CODECS = {0: "UNCOMPRESSED", 1: "SNAPPY", 2: "GZIP", 3: "LZO", 4: "BROTLI", 5: "LZ4", 6: "ZSTD", 7: "LZ4_RAW"}

# Types of Thrift. Which fields of a struct are wanted, and of which type: a list stands for a list, a dict for a struct, None
# for what may not be there. All others are skipped, and so would a reader do with a wanted one of another type.
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_BITS = {_I32: 32, _I64: 64}
_Type = Any  # int | list[_Type] | dict[int, _Type] | None
_Fields = dict[int, _Type]
_DATA: _Fields = {1: _I32, 2: _I32, 3: _I32, 4: _I32}
_DICTIONARY: _Fields = {1: _I32, 2: _I32}
_DATA_V2: _Fields = {1: _I32, 4: _I32}
_PAGE: _Fields = {1: _I32, 2: _I32, 3: _I32, 4: _I32, 5: _DATA, 7: _DICTIONARY, 8: _DATA_V2}
_STATISTICS: _Fields = {1: _BINARY, 2: _BINARY, 3: _I64, 5: _BINARY, 6: _BINARY}
_SIZES: _Fields = {1: _I64, 2: [_I64], 3: [_I64]}
_COLUMN: _Fields = {
    1: _I32, 3: [_BINARY], 4: _I32, 5: _I64, 6: _I64, 7: _I64, 9: _I64, 11: _I64, 12: _STATISTICS, 16: _SIZES, 17: None
}  # fmt: skip
_CHUNK: _Fields = {1: _BINARY, 3: _COLUMN, 8: None, 9: None}
_FOOTER: _Fields = {3: _I64, 4: [{1: [_CHUNK], 3: _I64}], 5: [{1: _BINARY, 2: _BINARY}], 8: None, 9: None}


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column chunk as the footer states it.

    Attributes:
        column: the name of its top-level column; path: the whole path.
        physical: number of its physical type; codec: of its compression, both in parquet.thrift.
        values: how many, nulls included.
        compressed, uncompressed: bytes, headers included.
        start: where it begins in the file.
        bounds: its least and greatest values, as they stand in its statistics; empty without.
        nulls: how many of its values are null, as its statistics say; None where they do not.
        levels: how many repetition and how many definition levels it counts; 0 where it does not.
    """

    column: str
    path: str
    physical: int
    codec: int
    values: int
    compressed: int
    uncompressed: int
    start: int
    bounds: frozenset[bytes]
    nulls: int | None
    levels: tuple[int, int]

    @property
    def nested(self) -> bool:
        """Whether its values are those of lists."""
        return self.path != self.column


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group as the footer states it: how many rows, and its column chunks."""

    rows: int
    chunks: list[Chunk]


@dataclass(frozen=True, slots=True)
class Footer:
    """What of a footer is needed: the row groups, and the file's key-value metadata."""

    groups: list[RowGroup]
    metadata: dict[bytes, bytes]


# --- Thrift -----------------------------------------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
        if shift > 63:
            raise ValueError("a number has too many bytes")


def _list(data: bytes, at: int) -> tuple[int, int, int]:
    """The head of a list: kind of its elements, how many, and where they begin."""
    head = data[at]
    at += 1
    size = head >> 4
    if size == 15:
        size, at = _varint(data, at)
    if size > len(data) - at:
        raise IndexError
    return head & 0x0F, size, at


def _skip(data: bytes, at: int, kind: int, depth: int, element: bool = False) -> int:
    """Where a value ends."""
    if kind in (1, 2):
        return at + 1 if element else at
    if kind == 3:
        return at + 1
    if kind in (4, 5, 6):
        while data[at] >= 0x80:
            at += 1
        return at + 1
    if kind == 7:
        return at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return at + length
    if kind == 9:
        inner, size, at = _list(data, at)
        for _ in range(size):
            at = _skip(data, at, inner, depth + 1, element=True)
        return at
    if kind == 12:
        return _struct(data, at, {}, depth + 1)[1]
    raise ValueError("a field is of an unknown type")


def _struct(data: bytes, at: int, wanted: _Fields, depth: int = 0, left: list[int] | None = None) -> tuple[dict[int, Any], int]:
    """A struct: its wanted fields by number, and where it ends. IndexError: it is cut off; ValueError: it is none.

    `left` counts down how many structs may still be made.
    """
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if left is not None:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("it states more row groups and columns than any shard has")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[at]
        at += 1
        if not head:
            return fields, at
        kind = head & 0x0F
        if head >> 4:
            number += head >> 4
        else:
            raw, at = _varint(data, at)
            number = (raw >> 1) ^ -(raw & 1)
        if not 0 < number < 2**15:
            raise ValueError("a field has no number")  # readers keep 16 bits of it, and may take it for another field
        if number not in wanted:
            at = _skip(data, at, kind, depth)
        elif number in fields:
            raise ValueError("a field stands twice")  # which of them counts, parsers disagree about
        else:
            fields[number], at = _value(data, at, kind, wanted[number], depth, left)


def _value(data: bytes, at: int, kind: int, wanted: _Type, depth: int, left: list[int] | None) -> tuple[Any, int]:
    """A value of a wanted type, and where it ends. Arguments and errors as of `_struct`."""
    if isinstance(wanted, dict) and kind == _STRUCT:
        return _struct(data, at, wanted, depth + 1, left)
    if isinstance(wanted, list) and kind == _LIST:
        inner, size, at = _list(data, at)
        if size > MAX_ROW_GROUPS:
            raise ValueError(f"it lists {size:,} row groups or columns")
        values = []
        for _ in range(size):
            value, at = _value(data, at, inner, wanted[0], depth, left)
            values.append(value)
        return values, at
    if kind != wanted:
        raise ValueError("a field is of another type, or is none that a store's files have")
    raw, at = _varint(data, at)
    if kind == _BINARY:
        return data[at : at + raw], at + raw
    if raw >= 2 ** _BITS[kind]:
        raise ValueError("a number has too many bits")
    return (raw >> 1) ^ -(raw & 1), at


def _numbers(fields: dict[int, Any], *wanted: int) -> list[int]:
    """Some fields of a struct. ValueError: one is not there, or is no number that fits 63 bits."""
    found = [fields.get(number) for number in wanted]
    if not all(each is not None and 0 <= each < 2**63 for each in found):
        raise ValueError("a number is missing, or is below 0")
    return found  # type: ignore[return-value]


# --- footers ----------------------------------------------------------------------------------------------------------------


def parse_footer(footer: bytes, size: int) -> Footer:
    """What a footer states, once it is possible for a file of `size` bytes.

    Args:
        footer: the end of the file: metadata, their length, and the magic number.
        size: of the file.

    Raises:
        ValueError: it is not; says what.
    """
    try:
        fields, _ = _struct(footer[:-8], 0, _FOOTER, left=[MAX_ROW_GROUPS + 3 * MAX_CHUNKS])
        [rows] = _numbers(fields, 3)
        groups = fields.get(4, [])
        if len(groups) > rows + 1:
            raise ValueError(f"it states {len(groups):,} row groups for {rows:,} rows")
        found = []
        chunks = 0
        for group in groups:
            columns = group.get(1, [])
            chunks += len(columns)
            if len(columns) > MAX_COLUMNS or chunks > MAX_CHUNKS:
                raise ValueError(f"it states {chunks:,} columns in its row groups")
            [count] = _numbers(group, 3)
            if count and not columns:
                raise ValueError(f"a row group of {count:,} rows has no columns")
            found.append(RowGroup(count, [_chunk(column, count, size) for column in columns]))
        metadata = {each[1]: each.get(2, b"") for each in fields.get(5, [])}
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"its footer is none ({type(error).__name__})") from None
    if sum(group.rows for group in found) != rows:
        raise ValueError(f"its row groups do not hold the {rows:,} rows it states")
    stated = [chunk for group in found for chunk in group.chunks]
    if sum(chunk.compressed for chunk in stated) > size:
        raise ValueError(f"its columns state more bytes than its {size:,}")
    total = sum(max(chunk.uncompressed, chunk.values * _width(chunk)) for chunk in stated)
    if total > most_bytes(size):
        raise ValueError(f"it stands for {total:,} bytes, too many for its {size:,}")
    return Footer(found, metadata)


def most_bytes(size: int) -> int:
    """How many bytes a file of `size` bytes may stand for."""
    return max(MAX_BYTES, BYTES_PER_BYTE * size)


def _width(chunk: Chunk) -> int:
    """Bytes of a value in memory, at least: a text's own bytes are left out, the levels of one in a list are not."""
    return _WIDTHS.get(chunk.physical, 4) + 4 * chunk.nested


def _chunk(fields: dict[int, Any], rows: int, size: int) -> Chunk:
    """A column chunk of a row group of `rows` rows, in a file of `size` bytes."""
    stated = fields.get(3)
    if stated is None or fields.get(1):
        raise ValueError("a column lies in another file, or nowhere")
    names = [raw.decode() for raw in stated.get(3, [])]
    physical, codec, values, uncompressed, compressed, start = _numbers(stated, 1, 4, 5, 6, 7, 9)
    dictionary = stated.get(11)
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    if values and not MAGIC_BYTES <= start <= size - compressed:  # elsewhere a reader finds pages that nobody wrote
        raise ValueError("a column lies outside of the file")
    statistics, sizes = stated.get(12) or {}, stated.get(16) or {}
    bounds = frozenset(each for each in statistics.values() if isinstance(each, bytes))
    if any(len(bound) != _WIDTHS.get(physical, len(bound)) for bound in bounds):
        raise ValueError("a column's least or greatest value is none of its type")
    if 1 in sizes and physical != _BYTE_ARRAY:
        raise ValueError("a column that has no texts counts their bytes")
    levels = len(sizes.get(2, [])), len(sizes.get(3, []))
    name, path = names[0] if names else "", ".".join(names)
    found = Chunk(name, path, physical, codec, values, compressed, uncompressed, start, bounds, statistics.get(3), levels)
    if values < rows or (values > rows and not found.nested):
        raise ValueError(f"column {path} states {values:,} values for {rows:,} rows")
    return found


def check_columns(footer: Footer, schema: pq.ParquetSchema) -> None:
    """Make sure that the columns of each row group are those of the file's schema: what is checked is then what is read.

    Raises:
        ValueError: they are not.
    """
    leaves = [schema.column(number) for number in range(len(schema.names))]
    for group in footer.groups:
        if len(group.chunks) != len(leaves):
            raise ValueError(f"a row group has {len(group.chunks):,} columns, and its file {len(leaves):,}")
        for chunk, leaf in zip(group.chunks, leaves, strict=True):
            if chunk.path != leaf.path or chunk.physical != _PHYSICAL.get(leaf.physical_type):
                raise ValueError(f"a row group has a column {chunk.path!r} where its file has {leaf.path!r}")
            most = leaf.max_repetition_level, leaf.max_definition_level
            if most != ((1, 3) if chunk.nested else (0, 1)):
                raise ValueError(f"column {chunk.path} is nested as none of a store is")
            if any(levels not in (0, level + 1) for levels, level in zip(chunk.levels, most, strict=True)):
                raise ValueError(f"column {chunk.path} counts levels that it does not have")


def check_statistics(table: pa.Table, groups: list[RowGroup]) -> None:
    """Make sure that the statistics of a file are those of its rows: SQL leaves out row groups by them.

    Args:
        table: all rows of the file.
        groups: as its footer states them.

    Raises:
        ValueError: they are not; says of which column.
    """
    start = 0
    for group in groups:
        for chunk in group.chunks:
            if chunk.column not in table.column_names:
                raise ValueError(f"a row group states a column {chunk.column!r}")
            column = table[chunk.column].slice(start, group.rows)
            simple = not pa.types.is_nested(column.type)  # of a list, the null ones among its values are counted
            if simple and chunk.nulls not in (None, column.null_count):
                raise ValueError(f"its statistics of column {chunk.column} are not those of its rows")
            if not chunk.bounds:
                continue
            bounds = pc.min_max(column).as_py().values() if pa.types.is_integer(column.type) and len(column) else ()
            width = _WIDTHS.get(chunk.physical, 4)
            if chunk.bounds != {bound.to_bytes(width, "little", signed=bound < 0) for bound in bounds if bound is not None}:
                raise ValueError(f"its statistics of column {chunk.column} are not those of its rows")
        start += group.rows


# --- pages ------------------------------------------------------------------------------------------------------------------


def _page(data: bytes, start: int) -> Page:
    """The page whose header `data` begins with, at `start` in the file. IndexError: it is cut off; ValueError: it is none."""
    fields, end = _struct(data, 0, _PAGE)
    if end > len(data):
        raise IndexError
    kind, uncompressed, compressed = _numbers(fields, 1, 2, 3)
    if kind > _DATA_PAGE_V2:
        raise ValueError("a page is of no known kind")
    values, encoding = 0, -1
    if kind != _INDEX_PAGE:
        own = fields.get({_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}[kind])
        if own is None:
            raise ValueError("a page has the header of another kind")
        values, encoding = _numbers(own, 1, 4 if kind == _DATA_PAGE_V2 else 2)
        if kind == _DATA_PAGE and (own.get(3), own.get(4)) != (_RLE, _RLE):
            raise ValueError("a page's levels are encoded as no writer of a store does")
    checksum = fields.get(4)
    return Page(kind, start + end, compressed, uncompressed, values, encoding, None if checksum is None else checksum % 2**32)


def chunk_pages(file: CheckedFile, start: int, size: int) -> Iterator[Page]:
    """The pages of a column chunk, from its place and compressed size.

    Raises:
        ValueError: they are not that.
        DamageError, StoreError: the file is not what was published, or cannot be read.
    """
    end = start + size
    while start < end:
        for most in (HEADER_BYTES, 2**20):  # a header holds the least and greatest value, which may be long
            try:
                page = _page(bytes(file.read_at(start, min(start + most, end))), start)
                break
            except IndexError:
                continue
        else:
            raise ValueError("a page header is cut off")
        start = page.start + page.compressed
        if start > end:
            raise ValueError("a page is longer than its column")
        yield page


def check_row_group(file: CheckedFile, group: int, stated: RowGroup, columns: Collection[str] | None = None) -> None:
    """`check_chunk` of the columns of a row group that are to be read; None for all.

    Raises:
        ValueError, DamageError, StoreError: as of `check_chunk`.
    """
    for chunk in stated.chunks:
        if columns is None or chunk.column in columns:
            check_chunk(file, group, chunk)


def check_chunk(file: CheckedFile, group: int, chunk: Chunk) -> None:
    """Make sure that the pages of a column chunk are what the footer states, and stand for no more than their bytes can.

    Args:
        file: a Parquet file; what its texts stand for is added up there.
        group: number of the row group that the chunk is of.
        chunk: as the footer states it.

    Raises:
        ValueError: they do not; says what.
        DamageError, StoreError: the file is not what was published, or cannot be read.
    """
    # Pages may name each text of a dictionary any number of times.
    texts = _check_pages(chunk, file) * chunk.values
    if not texts:
        return
    others = sum(size for start, size in file.texts.items() if start != chunk.start)
    if others + texts > most_bytes(file.size):
        texts = _bytes_of_texts(file, group, chunk, texts)
    if others + texts > most_bytes(file.size):
        raise ValueError(f"its texts stand for {others + texts:,} bytes, too many for its {file.size:,}")
    file.texts[chunk.start] = texts


def _check_pages(chunk: Chunk, file: CheckedFile) -> int:
    """Check all but texts. Returns the bytes of the chunk's dictionary of texts, 0 without one."""
    name, size = chunk.path, chunk.compressed
    if chunk.codec not in (0, 6):
        codec = _CODECS.get(chunk.codec, "what is not known")
        raise ValueError(f"column {name} is compressed with {codec}, and a store's files with Zstandard")
    texts = found = uncompressed = 0
    if not chunk.values:
        return texts  # no page is read, and of a chunk without rows no place is stated
    for number, page in enumerate(chunk_pages(file, chunk.start, size)):
        if page.checksum is None:
            raise ValueError(f"a page of column {name} has no checksum")
        if page.encoding == _DELTA_BYTE_ARRAY or (page.kind == _DICTIONARY_PAGE and number):
            raise ValueError(f"column {name} is encoded as no writer of a store does")
        uncompressed += page.uncompressed
        if page.kind in (_DATA_PAGE, _DATA_PAGE_V2):
            found += page.values
            if page.encoding == _DELTA_LENGTHS:
                _check_lengths(file, chunk, page)
        elif page.kind == _DICTIONARY_PAGE and chunk.physical == _BYTE_ARRAY:
            texts = page.uncompressed
    if found != chunk.values or uncompressed > chunk.uncompressed:
        raise ValueError(f"the pages of column {name} are not what its footer states")
    return texts


def _check_lengths(file: CheckedFile, chunk: Chunk, page: Page) -> None:
    """Make sure that a page of texts has no more lengths than values: it counts them itself, and room is made for so many.

    In front of them are the definition levels, after their size; the lengths begin with the size of their blocks, how many
    parts a block has, and how many lengths there are (parquet-format, Encodings.md).
    """
    if page.kind != _DATA_PAGE or chunk.nested:
        raise ValueError(f"column {chunk.path} is encoded as no writer of a store does")
    for most in (BLOCK_BYTES, page.compressed):
        data = bytes(file.read_at(page.start, page.start + min(most, page.compressed)))
        source = pa.BufferReader(data)
        try:
            with pa.CompressedInputStream(source, "zstd") if chunk.codec else source as stream:
                levels = int.from_bytes(stream.read(4), "little")
                if levels > page.values + 64:
                    break
                stream.read(levels)
                head = bytes(stream.read(32))
            _, at = _varint(head, 0)
            _, at = _varint(head, at)
            if _varint(head, at)[0] <= page.values:
                return
            break
        except (OSError, IndexError):  # cut off
            continue
    raise ValueError(f"a page of column {chunk.path} does not have the lengths of its {page.values:,} values")


def _bytes_of_texts(file: CheckedFile, group: int, chunk: Chunk, most: int) -> int:
    """How many bytes of text a column chunk with a dictionary stands for; `most`, where it is a list of texts."""
    source = pa.PythonFile(file.again(), mode="r")
    # Whoever reads this file may be a thread of Arrow's pool for reading, and buffering ahead would wait for another of them.
    options = {"pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(source, read_dictionary=[chunk.path], **options) as texts:
        table = texts.read_row_group(group, columns=[chunk.column], use_threads=False)
    total = 0
    for part in table[chunk.column].chunks:
        if not isinstance(part, pa.DictionaryArray):
            return most
        lengths = pc.binary_length(part.dictionary).take(part.indices)
        total += pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0
    return total
