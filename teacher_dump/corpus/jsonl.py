"""Rows of .jsonl files, compressed or not."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from knowledge_store.errors import InputError
from teacher_dump.corpus.compression import open_bytes
from teacher_dump.corpus.json_text import json_value
from teacher_dump.corpus.rows import Row, Start

_MARKS = {  # the longer first, which begin as the others do
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
LIST_HINT = "a file that is one list of rows is read under the name .json"


def json_rows(path: Path, start: Start) -> Iterator[Row]:
    """The rows of a file from `start` on: each line that is not blank is one, numbered as an editor numbers lines."""
    offset, number = start.offset, start.row - 1
    with open_bytes(path, offset) as file:
        for line in file:
            number += 1
            if number == 1:
                _check_encoding(path, line)
            if line.strip():
                yield _json_row(line, number, offset)
            offset += len(line)


def _check_encoding(path: Path, line: bytes) -> None:
    """Refuse a file that begins with a byte-order mark of another encoding (InputError): each of its lines would be bad."""
    for encoding, marks in _MARKS.items():
        if line.startswith(marks):
            raise InputError(f"{path} is {encoding}, not UTF-8: convert it, for example with iconv -f {encoding} -t UTF-8")


def _json_row(line: bytes, number: int, offset: int) -> Row:
    text = ""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        value = json_value(text)
        if isinstance(value, list):
            raise ValueError(f"a list, not an object with columns ({LIST_HINT})")
        return Row(number, offset, value)
    except UnicodeDecodeError as error:
        return Row(number, offset, problem=f"not UTF-8 (byte {error.start + 1} of the line)")
    except ValueError as error:
        if number == 1 and text.strip() == "[":  # the beginning of a list that is laid out over lines
            return Row(number, offset, problem=f"not JSON ({LIST_HINT})")
        return Row(number, offset, problem=str(error))
