"""Renderings with marks: where in a rendered conversation the words of each field stand.

A mark is one character of a private-use plane, and each field has two of its own, one before its words and one after them,
inside the white space at their ends, so that a template that strips words does the same to them. A template that does not look
into the words makes the same text of a conversation with marks as of one without, but for the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from teacher_dump.corpus.chat.fields import NAME, VALUE, Field
from teacher_dump.corpus.rows import BadRow

FIRST = 0xF0000
LAST = 0xFFFFD
# A mark, or what Python and JSON write for one within quotation marks.
MARK = re.compile(rf"[{chr(FIRST)}-{chr(LAST)}]|\\U000f[0-9a-f]{{4}}|\\udb[89ab][0-9a-f]\\ud[c-f][0-9a-f]{{2}}")
MAX_FIELDS = (LAST - FIRST) // 2

_WORD = re.compile(r"\w+")


@dataclass
class Marks:
    """The marks of one rendering, handed out as its fields are written.

    Attributes:
        around: whether a field is marked around its words; others are marked inside them, or not at all.
        inside: whether a field is marked in the middle of its words, where a template looks at their ends.
        fields: that are marked, in the order of their marks.
        unmarked: fields with words that are not.
        values: fields that are numbers or truth values.
        words: of each marked field, what has to be found between its marks.
    """

    around: Callable[[Field], bool] = lambda place: True
    inside: Callable[[Field], bool] = lambda place: False
    fields: list[Field] = field(default_factory=list)
    unmarked: list[Field] = field(default_factory=list)
    values: list[Field] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def change(self, place: Field, value: Any) -> Any:
        """A field's value with its marks."""
        if place.kind == VALUE:
            self.values.append(place)
            return value
        core = value.strip()
        if not core:
            return value
        if MARK.search(core):
            raise BadRow(f"`{place.name}` has characters of a private-use plane (U+F0000 to U+FFFFD): remove them")
        around = self.around(place)
        if not around and not self.inside(place):
            self.unmarked.append(place)
            return value
        number = len(self.fields)
        if number >= MAX_FIELDS:
            raise BadRow(f"it has more than {MAX_FIELDS:,} fields with words: divide it")
        self.fields.append(place)
        opening, closing = chr(FIRST + 2 * number), chr(FIRST + 2 * number + 1)
        if place.kind == NAME:  # names may be sorted
            self.words.append("")
            return f"{value}{opening}{closing}"
        begin = value.index(core)
        end = begin + len(core)
        if around:
            self.words.append(core)
            return f"{value[:begin]}{opening}{core}{closing}{value[end:]}"
        self.words.append("")
        middle = begin + len(core) // 2
        return f"{value[:middle]}{opening}{closing}{value[middle:]}"


@dataclass(frozen=True)
class Mark:
    """A mark where it was found: its place in the text without marks, its field, and whether it closes it."""

    position: int
    field: Field
    closes: bool


class Marked:
    """A rendering with marks, taken apart.

    Attributes:
        text: the rendering without its marks.
        marks: those in it, in order.
        places: for each field that is there whole, the indices in `marks` of its first pair.
        cut: fields of which a part is missing.
        missing: fields that are not there at all.
    """

    def __init__(self, rendered: str, marks: Marks):
        self.marks: list[Mark] = []
        self.places: dict[Field, tuple[int, int]] = {}
        self.cut: list[Field] = []
        pieces, begin, length = [], 0, 0
        for match in MARK.finditer(rendered):
            pieces.append(rendered[begin : match.start()])
            length += match.start() - begin
            begin = match.end()
            number, closes = divmod(_character(match[0]) - FIRST, 2)
            if number >= len(marks.fields):
                raise BadRow(f"it has a character of a private-use plane ({match[0]!r}): remove it")
            self.marks.append(Mark(length, marks.fields[number], bool(closes)))
        pieces.append(rendered[begin:])
        self.text = "".join(pieces)
        opened: dict[Field, int] = {}
        for index, mark in enumerate(self.marks):
            if not mark.closes:
                opened[mark.field] = index
            elif mark.field in opened and mark.field not in self.places:
                self.places[mark.field] = (opened[mark.field], index)
        for place, words in zip(marks.fields, marks.words, strict=True):
            if place in self.places:
                first, last = (self.marks[index].position for index in self.places[place])
                if not _holds(self.text[first:last], words):
                    del self.places[place]
                    self.cut.append(place)
            elif place in opened:
                self.cut.append(place)
        self.missing = [place for place in marks.fields if place not in self.places and place not in self.cut]

    def begin(self, place: Field) -> int:
        """Where a field's words begin in the text."""
        return self.marks[self.places[place][0]].position

    def end(self, place: Field) -> int:
        """Where a field's words end in the text."""
        return self.marks[self.places[place][1]].position

    def next_mark(self, index: int) -> int:
        """Where the mark after the mark of an index stands; the text's end after the last."""
        return self.marks[index + 1].position if index + 1 < len(self.marks) else len(self.text)

    def after(self, place: Field) -> str | None:
        """What follows a field's words until the next mark; None where the field is missing."""
        if place not in self.places:
            return None
        return self.text[self.end(place) : self.next_mark(self.places[place][1])]


def _character(written: str) -> int:
    """Which character a mark is, however it is written."""
    if len(written) == 1:
        return ord(written)
    if written[1] == "U":
        return int(written[2:], 16)
    return 0x10000 + ((int(written[2:6], 16) - 0xD800) << 10) + int(written[8:12], 16) - 0xDC00


def _holds(text: str, words: str) -> bool:
    """Whether words are in a text: as they are, as JSON text has them, or one by one in order, with other signs between."""
    if words in text or any(json.dumps(words, ensure_ascii=escaped)[1:-1] in text for escaped in (False, True)):
        return True
    place = 0
    for word in _WORD.findall(words):
        place = text.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True
