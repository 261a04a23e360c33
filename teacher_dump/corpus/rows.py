"""What the readers of each type of file give, and where they begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Start:
    """Where a shard begins.

    Attributes:
        document: its first document's number.
        file: index of the corpus file; row: counted from 1; part: of that row, counted from 0.
        offset: of the row (of the part, in a .txt file) in bytes of uncompressed text; unused in Parquet and Arrow.
        characters: how much text the shard holds, to measure progress by.
    """

    document: int
    file: int
    row: int
    part: int
    offset: int
    characters: int = 0


@dataclass(frozen=True)
class Row:
    """A row of a file, as it was read.

    Attributes:
        number: counted from 1.
        offset: where it begins, in bytes of uncompressed text; 0 in Parquet and Arrow.
        record: what it holds. problem: why it cannot be read.
    """

    number: int
    offset: int
    record: Any = None
    problem: str | None = None


class BadRow(Exception):
    """A row of the corpus cannot be used; the message says why."""
