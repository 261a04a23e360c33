"""Whether predictions stand beside the tokens that they predict, as far as the file itself can tell.

A prediction of token t says more of token t than of the one before it or behind it: the token has a higher rank, and a higher
probability. Where it is no candidate, it is counted as likely as the tail's tokens are on average. What its two neighbours get
is compared position by position, and the mean must be above zero by more than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from teacher_dump.importers.knowledge import Candidates

MOST = 50_000  # positions of a file
SURE = 3.0  # standard errors
LONG = 16  # positions of a sequence that is judged by itself
MOST_OFF = 0.01  # of the sequences: what chance can do, and more
SHIFTS = (-1, 1)


@dataclass
class Alignment:
    """Collects what the positions of a file say.

    Attributes:
        positions: how many were compared.
        hits: how often the likeliest candidate was the token before, the token itself, and the one behind it.
        sequences, off: how many sequences of some length were compared, and how many of them are surely of a neighbour.
        sums, squares: of the differences, by shift: log-probability of the token itself less that of its neighbour (nats).
    """

    positions: int = 0
    sequences: int = 0
    off: int = 0
    hits: np.ndarray = field(default_factory=lambda: np.zeros(3))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(2))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def add(self, token_ids: np.ndarray, candidates: Candidates, vocabulary: int) -> None:
        """Take in a sequence: its T tokens, and what was predicted of some of them."""
        inner = (candidates.places > 0) & (candidates.places < len(token_ids) - 1)
        if self.positions >= MOST or not inner.any():
            return
        places, ids, logprobs = candidates.places[inner], candidates.ids[inner], candidates.logprobs[inner]
        with np.errstate(divide="ignore"):
            left = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1), np.exp(-16)))
        floor = np.minimum(left - np.log(np.maximum(vocabulary - candidates.counts[inner], 1)), logprobs.min(axis=1, initial=0))
        floor = np.where(np.isfinite(floor), floor, left - np.log(vocabulary))

        def said(shift: int) -> np.ndarray:
            among = ids == token_ids[places + shift][:, None]
            return np.where(among.any(axis=1), np.where(among, logprobs, 0).sum(axis=1, where=among), floor)

        own = said(0)
        differences = np.stack([own - said(shift) for shift in SHIFTS])
        hits = np.array([(ids[:, 0] == token_ids[places + shift]).sum() for shift in (-1, 0, 1)])
        one = Alignment(len(places), hits=hits, sums=differences.sum(axis=1), squares=(differences**2).sum(axis=1))
        self.hits, self.sums, self.squares = self.hits + one.hits, self.sums + one.sums, self.squares + one.squares
        self.positions += one.positions
        if one.positions >= LONG:
            self.sequences += 1
            self.off += one.is_off

    @classmethod
    def of_all(cls, parts: Sequence[Alignment]) -> Alignment:
        """What several files say together."""
        sums = [sum((getattr(part, name) for part in parts), np.zeros(())) for name in ("hits", "sums", "squares")]
        counts = [sum(getattr(part, name) for part in parts) for name in ("positions", "sequences", "off")]
        return cls(*counts, *sums)

    @property
    def is_off(self) -> bool:
        """Whether predictions are surely of a neighbour."""
        if not self.positions:
            return False
        means, errors = self._means
        shift = int(np.argmin(means))
        return bool(-means[shift] > SURE * errors[shift] and self.hits[2 * shift] >= self.hits[1])

    @property
    def _means(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the differences (2,), and their standard errors."""
        means = self.sums / self.positions
        return means, np.sqrt(np.maximum(self.squares / self.positions - means**2, 0) / self.positions)

    def complaint(self) -> str | None:
        """Why a file cannot be taken as it is, in words that end a sentence; None where its predictions stand right."""
        if not self.positions:
            return (
                "it has no position between two others, from which one could tell whether predictions stand beside their tokens"
            )
        means, errors = self._means
        sure = (means > SURE * errors) & (self.hits[1] >= self.hits[[0, 2]])
        if sure.all():
            if self.off > MOST_OFF * self.sequences:
                return f"its predictions are off by one in {self.off:,} of {self.sequences:,} sequences, and right in others"
            return None
        shift = int(np.argmin(means))
        hits = f"the likeliest candidate is that one at {self.hits[2 * shift] / self.positions:.1%} of the positions, and the"
        hits += f" token itself at {self.hits[1] / self.positions:.1%}"
        if self.is_off:
            return f"its predictions are off by one: they are of the token {('before', 'behind')[shift]} ({hits})"
        return (
            f"{self.positions:,} positions do not tell whether its predictions are of the tokens they stand beside or of those"
            f" {('before', 'behind')[shift]} ({hits})"
        )

    @property
    def farther(self) -> int:
        """By how much they are off: −1, 0 or 1."""
        if not self.positions:
            return 0
        means = self.sums / self.positions
        shift = int(np.argmin(means))
        return SHIFTS[shift] if means[shift] < 0 else 0
