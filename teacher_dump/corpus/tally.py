"""Counts what becomes of the rows of a corpus, document by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from knowledge_store.format.corpus_counts import CorpusCounts, LeftOut
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.rows import BadRow, stops
from teacher_dump.corpus.tokenisation import TokenSequence

MAX_REASONS = 50
OTHER_REASONS = "other reasons"


class Tally:
    """Counts what becomes of documents.

    Args:
        too_long: what becomes of rows that are too long: cut, skip or refuse.
    """

    def __init__(self, too_long: str):
        self._too_long = too_long
        self._counts: Counter[str] = Counter()
        self._left_out: dict[str, LeftOut] = {}

    def use(self, document: Document, sequences: Sequence[TokenSequence]) -> None:
        """Count a document that is used."""
        self._counts["rows"] += document.part == 0
        self._counts["sequences"] += len(sequences)
        for sequence in sequences:
            self._counts["positions"] += len(sequence.token_ids)
            self._counts["targets"] += int(sequence.is_target.sum())
            self._counts["cut"] += sequence.tokens_cut > 0
            self._counts["answers_cut"] += sequence.targets_cut > 0
            self._counts["dropped_reasoning"] += sequence.dropped_reasoning

    def leave_out(self, document: Document, problem: BadRow) -> None:
        """Count a document that is not used."""
        self._counts["rows"] += 1
        bad = stops(problem, self._too_long, skip_bad_rows=False)
        reason = problem.reason
        if reason not in self._left_out and len(self._left_out) >= MAX_REASONS:
            reason = OTHER_REASONS
        before = self._left_out.get(reason, LeftOut(0, bad, document.file, document.row, str(problem)))
        self._left_out[reason] = replace(before, rows=before.rows + 1, bad=before.bad or bad)

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self._counts["rows"]

    @property
    def rows_left_out(self) -> int:
        """Rows so far that are left out."""
        return sum(left.rows for left in self._left_out.values())

    @property
    def positions(self) -> int:
        """Tokens of all sequences so far."""
        return self._counts["positions"]

    @property
    def counts(self) -> CorpusCounts:
        """The counts so far."""
        return CorpusCounts(**self._counts, left_out=dict(self._left_out))
