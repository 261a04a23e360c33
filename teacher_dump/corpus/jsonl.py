"""Rows of .jsonl files, compressed by Zstandard or not."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from knowledge_store.errors import InputError
from teacher_dump.corpus.rows import Row, Start

READ_BYTES = 1 << 20
ZSTD_BYTES = 1 << 16  # compressed; text can be hundreds of times as long


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
                    raise InputError(f"{self._path} ends in the middle: it was cut off while written or copied")
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


def _open(path: Path, offset: int) -> BinaryIO:
    """The uncompressed bytes of a file from `offset` on."""
    file = open(path, "rb")  # noqa: SIM115 — the caller closes it
    if path.suffix != ".zst":
        file.seek(offset)
        return file
    stream = io.BufferedReader(_ZstdReader(file, path), READ_BYTES)
    while offset and (skipped := stream.read(min(offset, READ_BYTES))):
        offset -= len(skipped)
    return cast(BinaryIO, stream)


def json_rows(path: Path, start: Start) -> Iterator[Row]:
    offset, number = start.offset, start.row - 1
    with _open(path, offset) as file:
        for line in file:
            number += 1
            if line.strip():
                yield _json_row(line, number, offset)
            offset += len(line)


def _json_row(line: bytes, number: int, offset: int) -> Row:
    try:
        return Row(number, offset, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
    except UnicodeDecodeError as error:
        return Row(number, offset, problem=f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return Row(number, offset, problem=f"not JSON ({error})")
