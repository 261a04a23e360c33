"""The bytes of corpus files, compressed or not; a compressed file that ends too early is noticed."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from knowledge_store.errors import InputError

READ_BYTES = 1 << 20
ZSTD_BYTES = 1 << 16  # compressed; text can be hundreds of times as long

COMPRESSED = (".gz", ".zst")


def uncompressed_name(path: Path) -> str:
    """A file's name without the ending of its compression."""
    return path.stem if path.suffix in COMPRESSED else path.name


def ends_early(path: Path) -> InputError:
    """What is said of a file that ends too early."""
    return InputError(f"{path} ends in the middle: it was cut off while written or copied")


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file. Unlike the library's own reader, it notices a file that ends too early."""

    def __init__(self, file: BinaryIO, path: Path):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._file, self._path = file, path
        self._frame = self._new()
        self._inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            chunk = chunk or self._file.read(ZSTD_BYTES)
            if not chunk:
                if self._inside and not self._frame.eof:
                    raise ends_early(self._path)
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._inside = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as error:
                raise InputError(f"{self._path} is not a sound Zstandard file: {error}") from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _GzipReader(io.RawIOBase):
    """Decompressed bytes of a .gz file, whose faults are told by the file's name."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._stream = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except EOFError:
            raise ends_early(self._path) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self._path} is not a sound gzip file: {error}") from None

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(path: Path, offset: int = 0) -> BinaryIO:
    """The uncompressed bytes of a file from `offset` on, for the caller to close.

    Raises:
        OSError: the file cannot be opened.
        InputError (as it is read): it is not a sound compressed file, or ends too early.
    """
    file = open(path, "rb")  # noqa: SIM115 — the caller closes it
    if path.suffix not in COMPRESSED:
        file.seek(offset)
        return file
    raw = _ZstdReader(file, path) if path.suffix == ".zst" else _GzipReader(file, path)
    stream = io.BufferedReader(raw, READ_BYTES)
    while offset and (skipped := stream.read(min(offset, READ_BYTES))):
        offset -= len(skipped)
    return cast(BinaryIO, stream)
