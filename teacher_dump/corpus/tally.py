"""Counts what becomes of the rows of a corpus, document by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from knowledge_store.format.corpus_counts import CorpusCounts, LeftOut
from teacher_dump.corpus.columns import CUT_OFF
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.rows import BadRow, stops
from teacher_dump.corpus.tokenisation import TokenSequence

MAX_REASONS = 50
MAX_PIECE_REASONS = 1000  # of one piece, so that its first reasons are counted as they are when the whole has fewer
OTHER_REASONS = "other reasons"


class Tally:
    """Counts what becomes of documents.

    Args:
        too_long: what becomes of rows that are too long: cut, skip or refuse.
        max_reasons: rows left out for further reasons are counted together.
    """

    def __init__(self, too_long: str, max_reasons: int = MAX_REASONS):
        self._too_long = too_long
        self._max_reasons = max_reasons
        self._counts: Counter[str] = Counter()
        self._left_out: dict[str, LeftOut] = {}

    def use(self, document: Document, sequences: Sequence[TokenSequence]) -> None:
        """Count a document that is used."""
        self._counts["rows"] += document.part == 0
        self._counts["sequences"] += len(sequences)
        self._counts["unfinished"] += document.finish == CUT_OFF
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
        self._add(problem.reason, LeftOut(1, bad, document.file, document.row, str(problem)))

    def add(self, counts: CorpusCounts) -> None:
        """Add what was counted of the documents that follow, by all their reasons."""
        for name in ("rows", "sequences", "positions", "targets", "cut", "answers_cut", "dropped_reasoning", "unfinished"):
            self._counts[name] += getattr(counts, name)
        for reason, left in counts.left_out.items():
            self._add(reason, left)

    def _add(self, reason: str, left: LeftOut) -> None:
        if reason not in self._left_out and len(self._left_out) >= self._max_reasons:
            reason = OTHER_REASONS
        before = self._left_out.get(reason, replace(left, rows=0))
        self._left_out[reason] = replace(before, rows=before.rows + left.rows, bad=before.bad or left.bad)

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
