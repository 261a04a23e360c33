"""Rows of .json files: one list of rows, or one row a line.

A list is never held whole, and can be entered at any of its rows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from knowledge_store.errors import InputError
from teacher_dump.corpus.compression import READ_BYTES, ends_early, open_bytes
from teacher_dump.corpus.json_text import DECODER, RepeatedName
from teacher_dump.corpus.jsonl import json_rows
from teacher_dump.corpus.rows import Row, Start

# A fault this close to the end of what was read may be none: the longest value that is no string or number is `-Infinity`.
_MARGIN = 12


def json_file_rows(path: Path, start: Start) -> Iterator[Row]:
    """The rows of a .json file from `start` on.

    Raises:
        InputError: it is neither a list nor one row a line, or its list is broken: what follows a break cannot be told.
    """
    with open_bytes(path) as file:
        head = _Text(file, path, 0)
        head.skip_space()
        is_list = head.next == "["
    if is_list:
        yield from _list_rows(path, start)
        return
    for row in json_rows(path, start):
        if row.problem is not None and row.offset == 0:
            raise InputError(
                f"{path}, line {row.number}: {row.problem}. A .json file is a list of rows, `[{{…}}, {{…}}]`, or one row a line"
            )
        yield row


class _Text:
    """The text of a file from a byte on, of which a little is held."""

    def __init__(self, file: BinaryIO, path: Path, offset: int):
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = offset  # read from the file
        self.offset = offset  # of `text[place]` in the file
        self.text, self.place = "", 0
        self.ended = False
        if offset == 0:
            self.more(READ_BYTES)
            if self.text.startswith("\ufeff"):
                self.advance(1)

    def more(self, size: int) -> None:
        chunk = self._file.read(size)
        self.ended = not chunk
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            place = self._bytes - pending + error.start
            raise InputError(f"{self._path} is not UTF-8 at byte {place}: convert it, for example with iconv") from None
        self._bytes += len(chunk)
        self.text, self.place = self.text[self.place :] + text, 0

    def advance(self, count: int) -> None:
        passed = self.text[self.place : self.place + count]
        self.offset += len(passed.encode())
        self.place += count

    def skip_space(self) -> None:
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
                self.offset += 1
            if self.place < len(self.text) or self.ended:
                return
            self.more(READ_BYTES)

    @property
    def next(self) -> str:
        return self.text[self.place : self.place + 1]

    def value(self, number: int) -> tuple[Any, str | None]:
        """The value that begins here, or why it is none that can be used; the text advances past it."""
        size = READ_BYTES
        while True:
            problem = None
            try:
                try:
                    value, end = DECODER.raw_decode(self.text, self.place)
                except RepeatedName as error:
                    problem = str(error)
                    value, end = json.JSONDecoder().raw_decode(self.text, self.place)
                after = self.text[end : end + 1]
                whole = after != "" and not (
                    isinstance(value, int | float) and after not in " \t\r\n,]" and end >= len(self.text) - _MARGIN
                )
                if whole or self.ended:  # a number goes on where its digits do
                    self.advance(end - self.place)
                    return value, problem
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _MARGIN
                if self.ended and not self.text.rstrip().endswith("]"):
                    raise ends_early(self._path) from None
                if self.ended or not cut_off:
                    raise self.broken(number, f"not JSON ({error.msg})", error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(number, f"not JSON ({error})", self.place) from None
            self.more(size)
            size *= 2

    def broken(self, number: int, problem: str, place: int) -> InputError:
        byte = self.offset + len(self.text[self.place : place].encode())
        return InputError(
            f"{self._path}, row {number}: {problem} at byte {byte}, and where the list's next row begins cannot be told."
            " Repair the file, or make it .jsonl, where a bad row is that row alone"
        )


def _list_rows(path: Path, start: Start) -> Iterator[Row]:
    number = start.row - 1
    with open_bytes(path, start.offset) as file:
        text = _Text(file, path, start.offset)
        text.skip_space()
        if start.offset == 0:
            text.advance(1)  # the list's bracket
            text.skip_space()
            if text.next == "]":
                raise InputError(f"{path} is an empty list")
        while True:
            number += 1
            offset = text.offset
            value, problem = text.value(number)
            yield Row(number, offset, None if problem else value, problem)
            text.skip_space()
            separator = text.next
            if separator not in (",", "]"):
                if not separator:
                    raise ends_early(path)
                raise text.broken(number, f"followed by {separator!r}, not by a comma", text.place)
            text.advance(1)
            text.skip_space()
            if separator == "]":
                if text.next:
                    raise InputError(f"{path} goes on after its list, at byte {text.offset}: a .json file holds one list")
                return
