"""Long texts in parts, and .txt files, which are one text each."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from knowledge_store.errors import InputError
from teacher_dump.corpus.rows import Start

READ_BYTES = 1 << 20

_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")
_LINE_END = re.compile(r"\n")
_SPACE = re.compile(r"\s")


def cut_point(text: str, limit: int, start: int = 0) -> int:
    """Where to cut a text of more than `limit` characters from `start` on: after the last paragraph that fits, or
    else line, or else word, in the second half of what fits; or else after `limit` characters."""
    for ending in (_PARAGRAPH_END, _LINE_END, _SPACE):
        ends = [match.end() for match in ending.finditer(text, start + limit // 2, start + limit)]
        if ends:
            return ends[-1]
    return start + limit


def cut_text(text: str, limit: int) -> Iterator[str]:
    """The parts of a text, each of at most `limit` characters; joined, they are the text."""
    start = 0
    while len(text) - start > limit:
        cut = cut_point(text, limit, start)
        yield text[start:cut]
        start = cut
    yield text[start:]


def text_parts(path: Path, start: Start, limit: int) -> Iterator[tuple[int, int, str, bool]]:
    """(part, offset, text, last) of a .txt file from `start` on, reading no more of it than a part needs. A byte-order mark
    at its beginning is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, part = start.offset, start.part
    text, done, ended = "", 0, False  # the first `done` characters of `text` have been given
    with open(path, "rb") as file:
        if offset == 0 and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            offset = len(codecs.BOM_UTF8)
        file.seek(offset)
        while True:
            if not ended and len(text) - done <= limit:
                text, done = text[done:], 0
            while not ended and len(text) <= limit:
                chunk = file.read(READ_BYTES)
                ended = not chunk
                at = file.tell() - len(chunk) - len(decoder.getstate()[0])
                try:
                    text += decoder.decode(chunk, final=ended)
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path} is not UTF-8 at byte {at + error.start}: convert it, for example with iconv"
                    ) from None
            last = len(text) - done <= limit
            cut = len(text) if last else cut_point(text, limit, done)
            yield part, offset, text[done:cut], last
            if last:
                return
            offset += len(text[done:cut].encode())
            part, done = part + 1, cut
