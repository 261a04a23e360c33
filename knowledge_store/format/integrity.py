"""Files that are read so that no byte reaches a Parquet reader before it is checked.

Parquet's own page checksums cover the contents of pages alone: a flipped bit in a page's header can turn one encoding into
another, and every value of the page into a wrong one. So a writer keeps a digest of each block of the file, whatever is in it,
in the footer, whose hash stands in the commit record; and a reader that is asked for some bytes reads the blocks they lie in
and hashes those. Nothing is believed because of a time stamp or because it was checked before: disks decay without telling.

A file without digests, written before there were any, is read and hashed whole when it is first used, which gives its
digests. They are remembered under the file's SHA-256, so they cannot belong to other contents.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError, KnowledgeStoreError, StoreError
from knowledge_store.format.pages import Chunk, Footer, check_chunk, check_columns, parse_footer

MAGIC = b"PAR1"
BLOCK_BYTES = 16 * 1024
DIGEST_BYTES = 8
DIGESTS_KEY = b"knowledge-store.blocks"  # in the footer's key-value metadata

MAX_FOOTER_BYTES = 8 * 2**20
REMEMBERED_FILES = 16_384  # whose digests were computed, half a thousandth of their bytes


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.sha256(block).digest()[:DIGEST_BYTES]


class DigestingFile:
    """A file to write to that keeps the digest of each block of what is written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._rest = bytearray()
        self._digests = bytearray()
        self.closed = False

    def write(self, data: bytes) -> int:
        """Write it all."""
        self._file.write(data)
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
        """One digest after the other, in hexadecimal, of all that is written so far; the last block may be shorter."""
        last = _digest(bytes(self._rest)) if self._rest else b""
        return (self._digests + last).hex().encode()


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a file, as `open` takes it for its `opener`. To open a pipe would be to wait for it.

    Raises:
        DamageError: it is a pipe, a folder or a device.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamageError(f"{path} is damaged: it is not a file")
    return descriptor


def _pread(path: Path, descriptor: int, start: int, end: int, size: int) -> bytes:
    """Bytes as they stand in a file (DamageError: it ends before)."""
    parts = []
    while start < end:
        part = os.pread(descriptor, end - start, start)
        if not part:
            raise DamageError(f"{path} is damaged: it ends before its {size:,} bytes")
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_footer(path: Path, descriptor: int, size: int) -> bytes:
    """The bytes of an open Parquet file's footer: metadata, its length, and the magic number at the end.

    Raises:
        DamageError: the file is too short, or does not end as Parquet does.
        OSError: it cannot be read.
    """
    end = _pread(path, descriptor, max(size - 8, 0), size, size)
    length = int.from_bytes(end[:4], "little") + 8
    if end[4:] != MAGIC or length > min(size, MAX_FOOTER_BYTES):
        raise DamageError(f"{path} is damaged: it does not end as a Parquet file does")
    return _pread(path, descriptor, size - length, size, size)


def unreadable(path: Path, error: Exception) -> KnowledgeStoreError:
    """What to say of a file that could not be read: what the system refuses is not the file's damage."""
    if isinstance(error, KnowledgeStoreError):
        return error
    if isinstance(error, FileNotFoundError):
        return DamageError(f"{path} is missing")
    if isinstance(error, OSError) and error.errno:
        return StoreError(f"cannot read {path}: {os.strerror(error.errno)}")
    return DamageError(f"{path} is damaged: {error}")


class _Descriptor:
    """An open file that is closed when nobody holds it."""

    def __init__(self, path: Path):
        self.number = open_regular(path)
        weakref.finalize(self, os.close, self.number)


_computed: OrderedDict[str, bytes] = OrderedDict()


def open_files(count: int) -> Callable[[Path], _Descriptor]:
    """Opens files, and keeps the `count` last ones open."""
    return lru_cache(count)(_Descriptor)


class CheckedFile:
    """A published Parquet file, to be read by pyarrow (as a `pa.PythonFile`). It is opened when it is first read.

    Args:
        path, size, sha256, footer_sha256: where it is, and its record.
        opened: opens it; None keeps it open as long as this object lives.
    """

    closed = False

    def __init__(
        self,
        path: Path,
        size: int,
        sha256: str,
        footer_sha256: str,
        opened: Callable[[Path], _Descriptor] | None = None,
    ):
        self.path = path
        self.size, self._sha256, self._footer_sha256 = size, sha256, footer_sha256
        self._opened = opened or open_files(1)
        self._place = 0
        self._footer = b""
        self._digests = b""
        self._stated = Footer([], {})
        self.texts: dict[int, int] = {}  # bytes that the column chunks of texts which were checked stand for, by their start

    def _open(self) -> None:
        """Check size and footer, and find the digests of what stands before it."""
        opened = self._opened(self.path)
        found = os.fstat(opened.number).st_size
        if found != self.size:
            raise DamageError(f"{self.path} is damaged: it has {found:,} bytes and was published with {self.size:,}")
        footer = read_footer(self.path, opened.number, self.size)
        length = len(footer)
        if hashlib.sha256(footer).hexdigest() != self._footer_sha256:
            raise DamageError(f"{self.path} is damaged: its footer is not the one that was published")
        self._stated = parse_footer(footer, self.size)
        if DIGESTS_KEY in self._stated.metadata:
            self._digests = bytes.fromhex(self._stated.metadata[DIGESTS_KEY].decode())
        elif self._sha256 in _computed:
            self._digests = _computed[self._sha256]
        else:
            self._digests = _computed[self._sha256] = self._compute(self.size - length)
            while len(_computed) > REMEMBERED_FILES:
                _computed.popitem(last=False)
        self._footer = footer

    def _compute(self, before: int) -> bytes:
        """The digests of the first `before` bytes of a file that has none."""
        whole = hashlib.sha256()
        digests = bytearray()
        for start in range(0, self.size, BLOCK_BYTES):
            block = self._read(start, min(start + BLOCK_BYTES, self.size))
            whole.update(block)
            if start < before:
                digests += _digest(block[: before - start])
        if whole.hexdigest() != self._sha256:
            raise DamageError(f"{self.path} is damaged: its contents are not those that were published")
        return bytes(digests)

    def _read(self, start: int, end: int) -> bytes:
        """Bytes as they stand in the file."""
        opened = self._opened(self.path)  # held: another thread's files may take its place among those that are kept open
        return _pread(self.path, opened.number, start, end, self.size)

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
                raise DamageError(f"{self.path} is damaged: its contents are not those that were published")
        if end > before:
            data = memoryview(bytes(data) + self._footer)
        return data[start - begin : end - begin]

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

    def stated(self) -> Footer:
        """What its footer states (DamageError, StoreError: as of `read`)."""
        self.read_at(self.size, self.size)
        return self._stated

    def read_at(self, start: int, end: int) -> memoryview:
        """The bytes from one place in the file to another (DamageError, StoreError: as of `read`)."""
        try:
            if not self._footer:
                self._open()
            return self._checked(start, min(end, self.size))
        except (OSError, ValueError, MemoryError) as error:
            raise unreadable(self.path, error) from None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        return self._place

    def tell(self) -> int:
        """Where the next read begins."""
        return self._place

    def close(self) -> None:
        """It is closed when nobody holds it."""

    def again(self) -> CheckedFile:
        """The same file, to be read from a place of its own."""
        return CheckedFile(self.path, self.size, self._sha256, self._footer_sha256, self._opened)


class GuardedFile(CheckedFile):
    """A published Parquet file for a reader that looks at nothing itself, such as Arrow's datasets.

    It has the columns and rows of its table, and what a column chunk claims to hold is checked before any of it is handed out.

    Args:
        path, size, sha256, footer_sha256, opened: as of `CheckedFile`.
        schema, rows: what it must hold.
        errors: what is raised is added here too, for a caller whom the exception cannot reach.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        sha256: str,
        footer_sha256: str,
        opened: Callable[[Path], _Descriptor],
        schema: pa.Schema,
        rows: int,
        errors: list[KnowledgeStoreError],
    ):
        super().__init__(path, size, sha256, footer_sha256, opened)
        self._schema, self._rows, self._errors = schema, rows, errors
        self._starts: list[int] | None = None
        self._chunks: list[tuple[int, Chunk]] = []
        self._at_hand: tuple[int, memoryview] = 0, memoryview(b"")

    def read_at(self, start: int, end: int) -> memoryview:
        """As of `CheckedFile`; what is about to be handed out need not be read and hashed again."""
        first, data = self._at_hand
        if first <= start and end <= first + len(data):
            return data[start - first : end - first]
        return super().read_at(start, end)

    def read(self, count: int = -1) -> memoryview:
        """The next `count` bytes, fewer at the end of the file.

        Raises:
            DamageError: they are not those that were published, or claim to hold what they cannot.
            StoreError: they cannot be read.
        """
        start = self._place
        try:
            data = super().read(count)
            if self._starts is None:
                self._starts = self._look()
            first, last = bisect_left(self._starts, start), bisect_left(self._starts, self._place)
            self._at_hand = start, data
            for group, chunk in self._chunks[first:last]:
                check_chunk(self, group, chunk)
            del self._starts[first:last], self._chunks[first:last]
            return data
        except (KnowledgeStoreError, OSError, ValueError, MemoryError, pa.ArrowException) as error:
            found = unreadable(self.path, error)
            # Another one of the same words: this one's traceback will lead to whoever holds this file.
            self._errors.append(type(found)(str(found)))
            raise found from None
        finally:
            self._at_hand = 0, memoryview(b"")

    def _look(self) -> list[int]:
        """Check columns and rows, and note the column chunks. Returns where each begins, in order."""
        # Where a file lacks a column, Arrow's datasets would make one of nulls.
        schema = pq.read_metadata(pa.BufferReader(MAGIC + self._footer)).schema
        groups = self._stated.groups
        if not schema.to_arrow_schema().equals(self._schema) or sum(group.rows for group in groups) != self._rows:
            raise DamageError(f"{self.path} is damaged: it does not have the columns and rows of its table")
        check_columns(self._stated, schema)
        chunks = ((number, chunk) for number, group in enumerate(groups) for chunk in group.chunks)
        self._chunks = sorted(chunks, key=lambda each: each[1].start)
        return [chunk.start for _, chunk in self._chunks]
