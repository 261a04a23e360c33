"""What became of the rows of a corpus: the part of a manifest that says how many are used, cut, and left out, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from knowledge_store.quantities import counted, percentage

MANY = 0.05  # of the rows: from here on, what is lost is said with emphasis

COUNTS_SHAPE = {
    "rows": int,
    "sequences": int,
    "positions": int,
    "targets": int,
    "cut": int,
    "answers_cut": int,
    "dropped_reasoning": int,
    "unfinished": int,
    "left_out": {...: {"rows": int, "bad": bool, "file": int, "row": int, "problem": str}},
}


@dataclass(frozen=True)
class LeftOut:
    """Rows that are left out for one reason.

    Attributes:
        rows: how many.
        bad: whether they could not be used; else they were left out as the options say, or had no text.
        file, row, problem: of the first of them: index of its file, number counted from 1, and what is wrong with it.
    """

    rows: int
    bad: bool
    file: int
    row: int
    problem: str


@dataclass(frozen=True)
class Sentence:
    """Something to tell a person; `strong` where much was lost."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class CorpusCounts:
    """What became of the rows of a corpus.

    Attributes:
        rows: all of them.
        sequences, positions, targets: of those that are used; positions are all tokens.
        cut: rows whose end was cut off at the maximum length.
        answers_cut: those of them that lost targets with it.
        dropped_reasoning: messages of which the chat template leaves the reasoning out.
        unfinished: rows that say that they were cut off where they were written, so that no end is learned behind them.
        left_out: the rows that are not used, by reason.
    """

    rows: int = 0
    sequences: int = 0
    positions: int = 0
    targets: int = 0
    cut: int = 0
    answers_cut: int = 0
    dropped_reasoning: int = 0
    unfinished: int = 0
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    @property
    def rows_left_out(self) -> int:
        """How many rows are not used."""
        return sum(rows.rows for rows in self.left_out.values())

    @property
    def rows_used(self) -> int:
        """How many rows are used."""
        return self.rows - self.rows_left_out

    @property
    def by_reason(self) -> list[tuple[str, LeftOut]]:
        """The rows that are left out, for each reason, most first."""
        return sorted(self.left_out.items(), key=lambda item: (-item[1].rows, item[0]))

    def to_record(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CorpusCounts:
        """From a record of COUNTS_SHAPE."""
        left_out = {reason: LeftOut(**rows) for reason, rows in record["left_out"].items()}
        return cls(**{**record, "left_out": left_out})

    def sentences(self, max_length: int, unused: str = "left out") -> list[Sentence]:
        """The counts in words: rows used and left out, with the reasons; then what was cut, and reasoning that is not there.

        Args:
            max_length: of a sequence, in tokens.
            unused: what is said of rows that are not used.
        """
        sentences = [self._rows(unused)]
        if self.cut:
            share = self.cut / max(self.rows_used, 1)
            answers = f"{self.answers_cut:,} answers lose" if self.answers_cut != 1 else "1 answer loses"
            text = (
                f"{counted(self.cut, 'row is', 'rows are')} cut at {max_length:,} tokens ({percentage(share)});"
                f" {answers if self.answers_cut else 'no answer loses'} the end"
            )
            sentences.append(Sentence(text, share > MANY))
        if self.dropped_reasoning:
            messages = counted(self.dropped_reasoning, "message", "messages")
            sentences.append(Sentence(f"the chat template leaves the reasoning of {messages} out"))
        if self.unfinished:
            rows = counted(self.unfinished, "row was", "rows were")
            sentences.append(
                Sentence(f"{rows} cut off when written, as `finish` or `finish_reason` says: no end is learned there")
            )
        return sentences

    def _rows(self, unused: str) -> Sentence:
        verb = "is" if 1 in (self.rows, self.rows_used) else "are"
        used = f"{self.rows_used:,} of {counted(self.rows, 'row', 'rows')} {verb} used"
        if not self.left_out:
            return Sentence(used)
        share = self.rows_left_out / max(self.rows, 1)
        reasons = "; ".join(f"{rows.rows:,} {reason}" for reason, rows in self.by_reason)
        return Sentence(f"{used}, {self.rows_left_out:,} {unused} ({percentage(share)}): {reasons}", share > MANY)
