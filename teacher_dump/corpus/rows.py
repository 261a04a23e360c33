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
        positions: how many tokens the shard's sequences have together.
    """

    document: int
    file: int
    row: int
    part: int
    offset: int
    positions: int = 0


@dataclass(frozen=True)
class Row:
    """A row of a file, as it was read.

    Attributes:
        number: counted from 1.
        offset: where it begins, in bytes of uncompressed text; 0 in Parquet.
        record: what it holds. problem: why it cannot be read.
    """

    number: int
    offset: int
    record: Any = None
    problem: str | None = None


class BadRow(Exception):
    """A row of the corpus cannot be used; the message says why.

    Attributes:
        reason: the same with nothing in it that differs from row to row, so that rows can be counted by it; without one, what
            stands before the first parenthesis or colon of the message.
    """

    def __init__(self, problem: str, reason: str | None = None):
        super().__init__(problem)
        self.reason = reason or problem.split(" (")[0].split(": ")[0]


class LongRow(BadRow):
    """A row has more tokens than a sequence may have, and is not to be cut."""

    REASON = "longer than --max-length"

    def __init__(self, tokens: int, max_length: int):
        super().__init__(f"{self.REASON} (it has {tokens:,} tokens, and may have {max_length:,})")


class EmptyRow(BadRow):
    """A row has nothing to learn from. There is nothing wrong with it."""

    def __init__(self) -> None:
        super().__init__("nothing to learn from")


def stops(problem: BadRow, too_long: str, skip_bad_rows: bool) -> bool:
    """Whether a row that cannot be used stops what is done with its corpus, or is left out and counted."""
    if isinstance(problem, LongRow):
        return too_long == "refuse"
    return not isinstance(problem, EmptyRow) and not skip_bad_rows
