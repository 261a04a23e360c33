"""Files that are read so that no byte reaches a Parquet reader before it is checked.

Parquet's own page checksums cover the contents of pages alone: a flipped bit in a page's header can turn one encoding into
another, and every value of the page into a wrong one. So a writer keeps a digest of each block of the file, whatever is in it,
in the footer, whose hash stands in the commit record; and a reader that is asked for some bytes reads the blocks they lie in
and hashes those. Nothing is believed because of a time stamp or because it was checked before: disks decay without telling.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError, KnowledgeStoreError, StoreError
from knowledge_store.format.records import is_sha256
from knowledge_store.storage import Storage

MAGIC = b"PAR1"
BLOCK_BYTES = 16 * 1024
DIGEST_BYTES = 8
DIGESTS_KEY = b"knowledge-store.blocks"  # in the footer's key-value metadata
FOOTER_BYTES = 64 * 1024  # read at once from a file's end, and what its digests take: Arrow reads as much before a scan
MAX_FILE_BYTES = 2**48
MAX_READ = 4 * 2**20  # bytes at once of a file that is read whole

FILE_SHAPE = {"bytes": int, "sha256": str, "footer_sha256": str, "rows": int, "column_bytes": {...: int}}


@dataclass(frozen=True)
class FileRecord:
    """What a published Parquet file must look like.

    Attributes:
        bytes: its size.
        sha256: hash of all of it.
        footer_sha256: hash of its footer (metadata, length and magic).
        rows: how many rows it holds.
        column_bytes: compressed bytes of each top-level column; empty where the record is of the index, which sums them up.

    Raises (on construction):
        ValueError: a size is not possible, or a hash is not one. Hashes become names of files in the user's cache.
    """

    bytes: int
    sha256: str
    footer_sha256: str
    rows: int
    column_bytes: dict[str, int]

    def __post_init__(self) -> None:
        if not (is_sha256(self.sha256) and is_sha256(self.footer_sha256)):
            raise ValueError("a file's SHA-256 is not 64 hexadecimal digits")
        if not all(0 <= number <= MAX_FILE_BYTES for number in (self.bytes, self.rows, *self.column_bytes.values())):
            raise ValueError("a file's size or number of rows is not possible")

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> FileRecord:
        """The record of plain JSON values (shape FILE_SHAPE)."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class TableFile:
    """A published Parquet file of a store: where it is, what its bytes must be, and the columns of its table."""

    storage: Storage
    name: str
    record: FileRecord
    schema: pa.Schema

    @property
    def path(self) -> str:
        """How people find it."""
        return self.storage.locate(self.name)


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.sha256(block).digest()[:DIGEST_BYTES]


class DigestingFile:
    """A file to write a Parquet file to, that hashes what is written: the whole, each block of what is before the footer, and
    the footer."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._rest = bytearray()
        self._digests = bytearray()
        self._whole = hashlib.sha256()
        self._bytes = 0
        self._footer: bytearray | None = None
        self.closed = False

    def write(self, data: bytes) -> int:
        """Write it all."""
        self._file.write(data)
        self._whole.update(data)
        self._bytes += len(data)
        if self._footer is not None:
            self._footer += data
            return len(data)
        self._rest += data
        whole = len(self._rest) // BLOCK_BYTES * BLOCK_BYTES
        with memoryview(self._rest) as written:
            for start in range(0, whole, BLOCK_BYTES):
                self._digests += _digest(written[start : start + BLOCK_BYTES])
        del self._rest[:whole]
        return len(data)

    def flush(self) -> None:
        """Hand on what is written."""
        self._file.flush()

    def close(self) -> None:
        """Write no more. Whoever opened the file closes it."""
        self.closed = True

    def digests(self) -> bytes:
        """One digest after the other, in hexadecimal, of all blocks; the last may be shorter. What is written from here on is
        the footer."""
        last = _digest(bytes(self._rest)) if self._rest else b""
        self._footer = bytearray()
        return (self._digests + last).hex().encode()

    def record(self) -> FileRecord:
        """The record of the file, when all of it is written."""
        return _record(self._bytes, self._whole.hexdigest(), bytes(self._footer or b""))


def _record(size: int, sha256: str, footer: bytes) -> FileRecord:
    metadata = parse_footer(footer)
    return FileRecord(size, sha256, hashlib.sha256(footer).hexdigest(), metadata.num_rows, column_sizes(metadata))


def column_sizes(metadata: pq.FileMetaData) -> dict[str, int]:
    """Compressed bytes of each top-level column."""
    column_bytes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(metadata.num_columns):
            chunk = row_group.column(index)
            column = chunk.path_in_schema.split(".")[0]
            column_bytes[column] = column_bytes.get(column, 0) + chunk.total_compressed_size
    return column_bytes


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """What a footer (metadata, length and magic) says."""
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))


def read_footer(storage: Storage, name: str, size: int) -> bytes:
    """The bytes of a Parquet file's footer: metadata, its length, and the magic number at the end.

    Args:
        size: of the file.

    Raises:
        DamageError: it is missing, has another size, or does not end as Parquet does.
        StoreError: it cannot be read.
    """
    end, length = _read_end(storage, name, size)
    return end[-length:]


def _read_end(storage: Storage, name: str, size: int) -> tuple[bytes, int]:
    """The bytes at a Parquet file's end, and how many of them are the footer (raises as `read_footer`)."""
    start = max(size - FOOTER_BYTES - size // BLOCK_BYTES * 2 * DIGEST_BYTES, 0) // BLOCK_BYTES * BLOCK_BYTES
    end = storage.read(name, start, size + 1)
    if len(end) != size - start:
        actual_size = storage.size(name)
        raise DamageError(f"{storage.locate(name)} is damaged: it has {actual_size:,} bytes and was published with {size:,}")
    length = int.from_bytes(end[-8:-4], "little") + 8
    if end[-4:] != MAGIC or length > size:
        raise DamageError(f"{storage.locate(name)} is damaged: it does not end as a Parquet file does")
    return (end, length) if length <= len(end) else (storage.read(name, size - length, size), length)


def describe(storage: Storage, name: str) -> FileRecord:
    """The record of a file as it stands, all of which is hashed, without `column_bytes`: pyarrow may end this process if asked
    for the columns of a footer that nothing vouches for, unless their rows were read before.

    Raises:
        DamageError: it is missing or no Parquet file.
        StoreError: it cannot be read.
    """
    size = storage.size(name)
    try:
        footer = read_footer(storage, name, size)
        rows = parse_footer(footer).num_rows
        return FileRecord(size, file_sha256(storage, name, size), hashlib.sha256(footer).hexdigest(), rows, {})
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(storage.locate(name), error) from None


def file_sha256(storage: Storage, name: str, size: int) -> str:
    """SHA-256 of the first `size` bytes of a file (DamageError: it is missing; StoreError)."""
    whole = hashlib.sha256()
    for start in range(0, size, MAX_READ):
        whole.update(storage.read(name, start, min(start + MAX_READ, size)))
    return whole.hexdigest()


def check_whole(storage: Storage, name: str, record: FileRecord) -> None:
    """Read all of a file, and make sure that it is the one that was published.

    Raises:
        DamageError: it is not, or is missing, or its record says other things of it than it is.
        StoreError: it cannot be read.
    """
    size, path = storage.size(name), storage.locate(name)
    if size != record.bytes:  # before it is hashed: a sparse file may be of any size
        raise DamageError(f"{path} is damaged: it has {size:,} bytes and was published with {record.bytes:,}")
    if file_sha256(storage, name, size) != record.sha256:
        raise DamageError(f"{path} is damaged: its contents are not those that were published")
    try:
        published = _record(size, record.sha256, read_footer(storage, name, size))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from None
    if published != record:
        raise DamageError(f"{path} does not match its record: its footer, rows or columns are others")


def unreadable(path: str, error: Exception) -> Exception:
    """What to say of a file that could not be read: what the system refuses is not the file's damage."""
    if isinstance(error, KnowledgeStoreError | MemoryError):
        return error
    if isinstance(error, OSError) and error.errno:
        return StoreError(f"cannot read {path}: {os.strerror(error.errno)}")
    return DamageError(f"{path} is damaged: {error}")


FOOTER_FACTS = {"_footer", "_before", "_digests", "metadata"}


class CheckedFile:
    """A published Parquet file, to be read by pyarrow (as a `pa.PythonFile`). Nothing of it is read before it is asked for.

    Args:
        file: where it is, and what it must be.
        errors: what is raised is added here too, for a caller whom the exception cannot reach (DuckDB says only that reading
            failed).
    """

    closed = False

    def __init__(self, file: TableFile, errors: list[KnowledgeStoreError] | None = None):
        self.file = file
        self._errors = errors
        self._place = 0
        self.size = file.record.bytes

    @cached_property
    def _footer(self) -> bytes:
        """The footer, checked, and of the columns and rows of its table: Arrow would make nulls of a missing column."""
        file = self.file
        end, length = _read_end(file.storage, file.name, self.size)
        footer = end[-length:]
        if hashlib.sha256(footer).hexdigest() != file.record.footer_sha256:
            raise DamageError(f"{file.path} is damaged: its footer is not the one that was published")
        metadata = parse_footer(footer)
        if not metadata.schema.to_arrow_schema().equals(file.schema) or metadata.num_rows != file.record.rows:
            raise DamageError(f"{file.path} is damaged: it does not have the columns and rows of its table")
        self.metadata = metadata
        self._digests = bytes.fromhex((metadata.metadata or {}).get(DIGESTS_KEY, b"").decode())
        self._before = end[:-length]  # the whole rest, of a small file: it is not asked for again
        return footer

    def again(self) -> CheckedFile:
        """The same file, with a place of its own in it; the footer is not read again."""
        other = CheckedFile(self.file, self._errors)
        known = {name: value for name, value in self.__dict__.items() if name in FOOTER_FACTS}
        other.__dict__ |= known
        return other

    def open(self) -> pq.FileMetaData:
        """Check the footer. Returns what it says (DamageError, StoreError)."""
        self.read_at(self.size, self.size)
        return self.metadata

    def _checked(self, start: int, end: int) -> memoryview:
        """Bytes of the file, checked."""
        before = self.size - len(self._footer)
        if start >= before:
            return memoryview(self._footer)[start - before : end - before]
        first, last = start // BLOCK_BYTES, -(-min(end, before) // BLOCK_BYTES)
        begin = first * BLOCK_BYTES
        data = memoryview(self._read(begin, min(last * BLOCK_BYTES, before)))
        for block in range(first, last):
            at = block * BLOCK_BYTES - begin
            expected = self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
            if _digest(data[at : at + BLOCK_BYTES]) != expected:
                raise DamageError(f"{self.file.path} is damaged: its contents are not those that were published")
        if end > before:
            data = memoryview(bytes(data) + self._footer)
        return data[start - begin : end - begin]

    def _read(self, start: int, end: int) -> bytes:
        """Bytes before the footer, not checked, from memory as far as they came with it."""
        known = self.unknown
        if start >= known:
            return self._before[start - known : end - known]
        if end <= known:
            return self._stored(start, end)
        return self._stored(start, known) + self._before[: end - known]

    def _stored(self, start: int, end: int) -> bytes:
        """Bytes of the file as it is stored."""
        return self.file.storage.read(self.file.name, start, end)

    @property
    def unknown(self) -> int:
        """Where the bytes begin that came with the footer."""
        return self.size - len(self._footer) - len(self._before)

    def read(self, count: int = -1) -> memoryview:
        """The next `count` bytes, fewer at the end of the file.

        Raises:
            DamageError: they are not those that were published.
            StoreError: they cannot be read.
        """
        end = self.size if count < 0 else min(self._place + count, self.size)
        data = self.read_at(self._place, end)
        self._place = end
        return data

    def read_at(self, start: int, end: int) -> memoryview:
        """The bytes from one place in the file to another (DamageError, StoreError: as of `read`)."""
        try:
            return self._checked(start, min(end, self.size))
        except (KnowledgeStoreError, OSError, ValueError, pa.ArrowException) as error:
            reason = unreadable(self.file.path, error)
            if self._errors is not None and isinstance(reason, KnowledgeStoreError):
                # Another one of the same words: this one's traceback leads to whoever holds this file.
                self._errors.append(type(reason)(str(reason)))
            raise reason from None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        return self._place

    def tell(self) -> int:
        """Where the next read begins."""
        return self._place

    def close(self) -> None:
        """Nothing is open."""
