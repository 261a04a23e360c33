"""Sequences of like lengths together in batches, so that little of a batch is padding.

An order is cut into groups of whole global batches: a global batch is what one optimiser step takes, over all ranks and all
batches that it accumulates. Within a group sequences are sorted by length, the longest first, and cut into global batches,
which then come in a shuffled order. So any way to divide a global batch among ranks and accumulated batches has the same
sequences in each step; as it is sorted, each of these batches holds sequences of like lengths, and so do the batches that the
ranks take at the same time.

An epoch whose sequences are no whole number of global batches ends with a short one: of the batches of the last group, the one
that comes last in the shuffled order is it, so it may have any lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.reading.order import Order
from knowledge_store.reading.permutation import permuted

LENGTH_GROUPS = -2  # where a dump's place stands in the key of a permutation of its own

Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]


class LengthGroups:
    """The items of an order, those of like lengths together.

    A group is as many whole global batches as `group` sequences are, rounded up; where the epoch is no whole number of groups,
    they are made smaller, as evenly as whole global batches allow. It keeps two groups in memory.

    Args:
        order: of an epoch.
        lengths: gives those of sequences, by the places of their dumps and their ordinals there, both int64.
        group: sequences that are sorted together.
        global_batch: sequences of an optimiser step.
        seed, epoch: which order.
    """

    def __init__(self, order: Order, lengths: Lengths, *, group: int, global_batch: int, seed: int, epoch: int):
        self._order, self._lengths = order, lengths
        self._global_batch, self._key = global_batch, (seed, LENGTH_GROUPS, epoch)
        self._batches = -(-len(order) // global_batch)
        self._groups = -(-self._batches // -(-group // global_batch))
        self._group = lru_cache(2)(self._sorted)

    def __len__(self) -> int:
        return len(self._order)

    def items(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As of `Order`."""
        stop = min(stop, len(self))
        if start >= stop:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        # Group g has the global batches from floor(g · batches / groups).
        first, last = (((slot // self._global_batch + 1) * self._groups - 1) // self._batches for slot in (start, stop - 1))
        parts = [self._group(group) for group in range(first, last + 1)]
        within = slice(start - self._start(first), stop - self._start(first))
        places, ordinals = (np.concatenate(arrays)[within] for arrays in zip(*parts, strict=True))
        return places, ordinals

    def _start(self, group: int) -> int:
        """The first slot of a group."""
        return group * self._batches // self._groups * self._global_batch

    def _sorted(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The items of a group, in the order in which they are read."""
        places, ordinals = self._order.items(self._start(group), self._start(group + 1))
        longest_first = np.argsort(-self._lengths(places, ordinals).astype(np.int64), kind="stable")
        batches = -(-len(places) // self._global_batch)
        order = permuted(np.arange(batches), batches, *self._key, group)
        sizes = np.full(batches, self._global_batch)
        sizes[order[-1]] -= batches * self._global_batch - len(places)
        ends = np.cumsum(sizes)
        items = np.concatenate([longest_first[ends[batch] - sizes[batch] : ends[batch]] for batch in order])
        return places[items], ordinals[items]


def check_length_groups(group_by_length: int, global_batch: int) -> None:
    """Raises InputError where a size is less than 1."""
    for name, size in (("group_by_length", group_by_length), ("global_batch", global_batch)):
        if size < 1:
            raise InputError(f"{name} is {size}: give a number of sequences, at least 1")


def padding_share(lengths: np.ndarray, batch_size: int, sizes: np.ndarray | None = None) -> float:
    """How much of an epoch's batches is padding, a last, short batch being filled up with rows of it.

    Args:
        lengths: of the sequences in the order in which they are read, at least one.
        batch_size: items of the order in a forward pass of one process.
        sizes: how many sequences each item has; None where each is one.

    Returns:
        a share of the positions of all batches, at least 0 and below 1.
    """
    if sizes is None:
        sizes = np.ones(len(lengths), np.int64)
    firsts = np.arange(0, len(sizes), batch_size)
    longest = np.maximum.reduceat(lengths, (np.cumsum(sizes) - sizes)[firsts]).astype(np.int64)
    rows = np.add.reduceat(sizes, firsts)
    rows[-1] += -len(sizes) % batch_size
    return 1 - int(lengths.sum(dtype=np.int64)) / int((rows * longest).sum())
