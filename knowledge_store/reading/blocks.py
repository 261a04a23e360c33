"""The order `blocks`: row groups are shuffled, and sequences within windows of several row groups.

Whoever reads it needs the row groups of one window at a time, and decodes each once in a permutation, so a store of any size
streams with no cache. It takes a few numbers for each row group.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from knowledge_store.reading.order import passes
from knowledge_store.reading.ordinals import Chosen
from knowledge_store.reading.permutation import permuted

_GROUPS = -1  # where a window's number stands in the key of the permutation of row groups


class Blocks:
    """A stream of one dump (see `order.Stream`).

    Args:
        chosen: the sequences, ascending.
        firsts: first ordinal of each row group, and the end, int64 (G + 1,).
        window: row groups in a window, at most; windows are of one size as nearly as whole numbers allow.
        seed, place: as of `order.Shuffled`.
    """

    def __init__(self, chosen: Chosen, firsts: np.ndarray, window: int, seed: int, place: int):
        before = chosen.before(firsts)
        read = np.diff(before) > 0
        self._chosen, self._seed, self._place = chosen, seed, place
        self._first, self._size = before[:-1][read], np.diff(before)[read]
        groups = len(self._size)
        windows = -(-groups // window)
        self._windows = np.arange(windows + 1) * groups // max(windows, 1)
        self._laid_out = lru_cache(2)(self._lay_out)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_laid_out"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._laid_out = lru_cache(2)(self._lay_out)

    def __len__(self) -> int:
        return len(self._chosen)

    def windows_of(self, count: int) -> int:
        """How many windows so many sequences fill, on average, rounded up."""
        return -(-count * (len(self._windows) - 1) // max(len(self), 1))

    def _lay_out(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The row groups of a permutation in its order, and where each begins among its sequences, and the end."""
        groups = permuted(np.arange(len(self._size)), len(self._size), self._seed, self._place, number, _GROUPS)
        return groups, np.concatenate([[0], np.cumsum(self._size[groups])])

    def ordinals(self, items: np.ndarray) -> np.ndarray:
        result = np.empty(len(items), np.int64)
        for number, where, places in passes(items, len(self)):
            groups, starts = self._laid_out(number)
            bounds = starts[self._windows]
            windows = np.searchsorted(bounds, places, side="right") - 1
            for window in np.unique(windows).tolist():
                inside = windows == window
                first, size = int(bounds[window]), int(bounds[window + 1] - bounds[window])
                moved = first + permuted(places[inside] - first, size, self._seed, self._place, number, window)
                group = np.searchsorted(starts, moved, side="right") - 1
                result[where[inside]] = self._chosen[self._first[groups[group]] + moved - starts[group]]
        return result
