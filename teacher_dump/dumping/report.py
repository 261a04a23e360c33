"""What one call of `dump` or `repair` did."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.format.corpus_counts import CorpusCounts, Sentence


@dataclass(frozen=True)
class DumpReport:
    """What one call of `dump` or `repair` did.

    Attributes:
        dump: its name.
        shards: committed by this call; shards_planned: in the whole dump; shards_of_others: other ranks' that were committed by
            this call; shards_missing: that nobody has committed when the call returns.
        shards_existing: of this rank's, those that needed nothing.
        positions, seconds: of this call.
        counts: of the whole corpus, what becomes of its rows; None where a repair found nothing to do.
        max_length: of the dump.
    """

    dump: str
    shards: int
    shards_existing: int
    shards_planned: int
    positions: int = 0
    seconds: float = 0.0
    counts: CorpusCounts | None = None
    max_length: int = 0
    shards_of_others: int = 0
    shards_missing: int = 0

    @property
    def sentences(self) -> list[Sentence]:
        """What became of the corpus's rows, in words."""
        return [] if self.counts is None else self.counts.sentences(self.max_length)
