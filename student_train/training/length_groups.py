"""Batches of sequences of like lengths, for trainers that have rows of their own.

`knowledge_store.reading.length_groups` says what the order is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from knowledge_store.errors import InputError
from knowledge_store.reading.length_groups import LengthGroups, check_length_groups, padding_share
from knowledge_store.reading.order import EpochOrder, Shuffled
from knowledge_store.reading.ordinals import AllBut

ITEMS = 2**16  # slots that are computed at once


class LengthGroupSampler(Sampler[int]):
    """Rows of like lengths together: the order of `DistillationDataset` with `group_by_length`, as a sampler.

    It gives the rows of all processes, and leaves it to the loader to cut them into batches and to divide these among the
    processes in turn, as accelerate does, and with it the trainers of transformers and TRL. The order is a function of the seed
    and the epoch alone.

    Args:
        lengths: of the rows, in tokens.
        group_by_length: rows that are sorted together, rounded up to whole global batches.
        global_batch: rows of an optimiser step: batch size × processes × accumulated batches. Each step has the same rows
            however these three are chosen.
        seed: of the order.

    Raises:
        InputError: there are no rows, or a size is less than 1.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, group_by_length: int, global_batch: int, seed: int = 0):
        self._lengths = np.asarray(lengths, np.int64)
        if not len(self._lengths):
            raise InputError("there is no row to sample: give the lengths of at least one")
        check_length_groups(group_by_length, global_batch)
        self._group_by_length, self._global_batch = group_by_length, global_batch
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        for start in range(0, len(self), ITEMS):
            yield from order.items(start, start + ITEMS)[1].tolist()

    def padding_share(self, batch_size: int) -> float:
        """How much of the batches of the next epoch is padding, for a batch size of each process."""
        return padding_share(self._lengths[self._order().items(0, len(self))[1]], batch_size)

    def _order(self) -> LengthGroups:
        count = len(self)
        return LengthGroups(
            EpochOrder([Shuffled(AllBut(count), self._seed, 0)], [count], self._seed, self._epoch),
            lambda _, rows: self._lengths[rows],
            group=self._group_by_length,
            global_batch=self._global_batch,
            seed=self._seed,
            epoch=self._epoch,
        )
