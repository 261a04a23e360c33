"""Which positions of a dump count for training, where not all of its targets do: one bit for each position."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

UNPACKED = 1 << 22  # bits that are unpacked at once, a byte each


@dataclass(frozen=True, eq=False)
class TargetMask:
    """The chosen positions of each sequence of a dump, by ordinal. It takes a bit for a position and 8 bytes for a sequence.

    Attributes:
        offsets: where the positions of each sequence begin among all of the dump, and the end, int64 (N + 1,).
        bits: the positions of all sequences side by side, eight to a byte, the first in the lowest bit, uint8.
    """

    offsets: np.ndarray
    bits: np.ndarray

    @classmethod
    def empty(cls, lengths: np.ndarray) -> TargetMask:
        """A mask that chooses nothing of sequences with so many positions each, (N,)."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return cls(offsets, np.zeros(-(-int(offsets[-1]) // 8), np.uint8))

    def choose(self, ordinals: np.ndarray, positions: np.ndarray) -> None:
        """Choose these positions too, (M,), each of the sequence beside it, (M,); in any order, and some of them twice."""
        places = np.unique(self.offsets[ordinals] + positions)
        if not len(places):
            return
        byte = places >> 3
        first = np.flatnonzero(np.diff(byte, prepend=-1))
        self.bits[byte[first]] |= np.bitwise_or.reduceat((1 << (places & 7)).astype(np.uint8), first)

    def __len__(self) -> int:
        """How many sequences the dump has."""
        return len(self.offsets) - 1

    def positions(self, ordinal: int) -> np.ndarray:
        """Which positions of a sequence are chosen, bool (T,)."""
        return self._between(*self.offsets[ordinal : ordinal + 2].tolist())

    def _between(self, start: int, end: int) -> np.ndarray:
        shift = start & 7
        return np.unpackbits(self.bits[start >> 3 : (end + 7) >> 3], count=end - start + shift, bitorder="little")[
            shift:
        ].astype(bool)

    def counts(self) -> np.ndarray:
        """How many positions of each sequence are chosen, int64 (N,)."""
        counts = np.zeros(len(self), np.int64)
        first = 0
        while first < len(self):
            last = max(first + 1, int(np.searchsorted(self.offsets, self.offsets[first] + UNPACKED, side="right")) - 1)
            start = int(self.offsets[first])
            chosen = np.cumsum(self._between(start, int(self.offsets[last])), dtype=np.int64)
            ends = np.concatenate([np.zeros(1, np.int64), chosen])[self.offsets[first : last + 1] - start]
            counts[first:last] = np.diff(ends)
            first = last
        return counts

    @property
    def sha256(self) -> str:
        """Of the lengths of the sequences and of what is chosen of them."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.bits.tobytes())
        return digest.hexdigest()
