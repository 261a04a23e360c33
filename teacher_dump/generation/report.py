"""What was written, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_store.format.corpus_counts import Sentence
from knowledge_store.quantities import counted, percentage
from teacher_dump.corpus.columns import CUT_OFF, FINISH


@dataclass(frozen=True)
class GenerateReport:
    """What a call of `generate` did.

    Attributes:
        output: the folder.
        files: how many it wrote; files_existing: of its rank that were there; files_missing: of other ranks, that are not there
            yet; files_planned: of all.
        texts, tokens: that it wrote.
        cut_off: texts that were cut off; empty: that have no words; inexact: whose tokens are others where they are read again.
        seconds: that it took.
        left_out: how many rows of the prompts cannot be used, by reason.
    """

    output: Path
    files: int
    files_existing: int
    files_missing: int
    files_planned: int
    texts: int
    tokens: int
    cut_off: int
    empty: int
    inexact: int
    seconds: float
    left_out: dict[str, int]

    @property
    def sentences(self) -> list[Sentence]:
        """What a person should know of the texts."""
        sentences = []
        if self.left_out:
            reasons = "; ".join(f"{rows:,} {reason}" for reason, rows in self.left_out.items())
            number = sum(self.left_out.values())
            sentences.append(Sentence(f"{counted(number, 'row was', 'rows were')} left out: {reasons}", strong=True))
        if self.cut_off:
            share = percentage(self.cut_off / self.texts)
            sentences.append(
                Sentence(
                    f"{counted(self.cut_off, 'text was', 'texts were')} cut off at --max-new-tokens ({share}): where they are"
                    " dumped no end is learned from them, and --where \"finish = 'stop'\" leaves them out of training",
                    strong=self.cut_off > self.texts / 2,
                )
            )
        if self.empty:
            sentences.append(
                Sentence(
                    f"{counted(self.empty, 'text has', 'texts have')} no words, since the teacher ended at once: a dump leaves"
                    " them out, and counts them",
                    strong=False,
                )
            )
        if self.inexact:
            sentences.append(
                Sentence(
                    f"{counted(self.inexact, 'text is', 'texts are')} cut into other tokens when read again than were written"
                    " (`exact` is false), so that a dump says something else of them than `logprob`",
                    strong=False,
                )
            )
        return sentences


class Tally:
    """Counts texts as they are written."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(texts=0, tokens=0, cut_off=0, empty=0, inexact=0)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Count some rows."""
        for row in rows:
            completion = row["completion"]
            words = completion if isinstance(completion, str) else completion[0]["content"]
            self.counts.update(
                texts=1,
                tokens=len(row["tokens"]),
                cut_off=row[FINISH] == CUT_OFF,
                empty=not words.strip(),
                inexact=not row["exact"] and bool(words.strip()),
            )

    def figures(self, seconds: float) -> dict[str, str]:
        """For progress."""
        return {"tokens/s": f"{self.counts['tokens'] / max(seconds, 1e-9):,.0f}", "cut off": f"{self.counts['cut_off']:,}"}
