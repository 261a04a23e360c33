"""Which sequences of a dump are read. Where that is nearly all of them, it takes memory only for those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from knowledge_store.errors import InputError


class AllBut:
    """The ordinals 0 … count − 1 of a dump without a few: stands for an ascending int64 array of them, and becomes one with
    `np.asarray`.

    Args:
        count: sequences of the dump.
        excluded: ascending ordinals that are left out, int64.

    Raises:
        InputError: `excluded` is not ascending, or has others than the dump's.
    """

    def __init__(self, count: int, excluded: np.ndarray | None = None):
        self.count = count
        self.excluded = np.empty(0, np.int64) if excluded is None else np.asarray(excluded, np.int64)
        if (np.diff(self.excluded, prepend=-1, append=count) < 1).any():
            raise InputError(f"the ordinals that are left out are not ascending numbers below {count}: sort them")
        # How many are kept before each of the excluded.
        self._before = self.excluded - np.arange(len(self.excluded))

    def __len__(self) -> int:
        return self.count - len(self.excluded)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The ordinals at some places (int64, each at least 0 and below the length)."""
        places = np.asarray(places, np.int64)
        return places + np.searchsorted(self._before, places, side="right")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.int64, copy=False)

    def __iter__(self) -> Iterator[int]:
        return iter(np.asarray(self).tolist())

    def without(self, ordinals: np.ndarray) -> AllBut:
        """These without others."""
        return AllBut(self.count, np.union1d(self.excluded, ordinals)) if len(ordinals) else self

    def ascending(self) -> AllBut:
        """The same."""
        return self

    def before(self, ordinals: np.ndarray) -> np.ndarray:
        """How many of these sequences have a lower ordinal than each of `ordinals`, int64."""
        below: np.ndarray = ordinals - np.searchsorted(self.excluded, ordinals)
        return below


class Listed:
    """Ordinals in an order of the caller's, as an array.

    Raises:
        InputError: some are not those of a sequence.
    """

    def __init__(self, ordinals: np.ndarray, count: int):
        self._ordinals = np.asarray(ordinals, dtype=np.int64)
        if ((self._ordinals < 0) | (self._ordinals >= count)).any():
            raise InputError(f"some of the ordinals are not those of a sequence: the dump has {count}, counted from 0")

    def __len__(self) -> int:
        return len(self._ordinals)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._ordinals[places]

    def without(self, ordinals: np.ndarray) -> Listed:
        """These without others."""
        return self._of(self._ordinals[~np.isin(self._ordinals, ordinals)]) if len(ordinals) else self

    def ascending(self) -> Listed:
        """The same, sorted."""
        return self._of(np.sort(self._ordinals))

    @classmethod
    def _of(cls, ordinals: np.ndarray) -> Listed:
        other = object.__new__(cls)
        other._ordinals = ordinals
        return other

    def before(self, ordinals: np.ndarray) -> np.ndarray:
        """As of `AllBut`, of ascending ordinals."""
        return np.searchsorted(self._ordinals, ordinals)


Chosen = AllBut | Listed


def chosen(ordinals: np.ndarray | AllBut | None, count: int) -> Chosen:
    """The sequences that are read of a dump that has `count`; None stands for all.

    Raises:
        InputError: some are not those of a sequence.
    """
    if ordinals is None:
        return AllBut(count)
    if isinstance(ordinals, AllBut):
        if ordinals.count != count:
            raise InputError(f"the ordinals are those of a dump of {ordinals.count} sequences, and the dump has {count}")
        return ordinals
    return Listed(ordinals, count)
