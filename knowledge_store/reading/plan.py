"""What is read of one or several dumps, in what order, and by which rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.reading.length_groups import check_length_groups
from knowledge_store.reading.ordinals import AllBut
from knowledge_store.reading.target_mask import TargetMask

ORDERS = ("global", "blocks")
WINDOW = 16


@dataclass(frozen=True)
class ReadPlan:
    """The batches of one rank over one epoch. `KnowledgeStore.batches` and `DistillationDataset` take its fields as keywords.

    Attributes:
        batch_size: sequences in a batch, for each rank; of `groups`, groups.
        seed, epoch: decide the order, the same for every rank and any number of ranks.
        rank, world_size: step s of rank r takes items [(sW + r)B, (sW + r + 1)B) of the order.
        consumed: items that all ranks together have taken before (see `Batches.state`).
        ordinals: read only these sequences, an int64 array or an `AllBut`, by dump where there are several; None, or a dump
            that is not named, reads all.
        groups: read the groups of dumps that have them whole: wherever this plan, or an order, counts sequences, it counts
            groups, and a batch holds all chosen sequences of its groups (see `reading.groups`).
        targets: of which dump which targets count; all of them where a dump is not named.
        shuffle: False reads them in order, dump after dump.
        order: `global` has any sequence after any other; `blocks` shuffles row groups, and sequences within windows of so many
            of them, so that each row group is decoded once (see `reading.blocks`).
        window: row groups in a window of the order `blocks`.
        group_by_length: so many sequences of the order are sorted by length together, so that a batch has little padding (see
            `reading.length_groups`); None leaves the order as it is. With `blocks` the windows that they fill are in memory.
        global_batch: with `group_by_length`, the sequences of an optimiser step: batch size × ranks × accumulated batches. Any
            others that multiply to the same have the same sequences in each step.
        kinds: which kinds of knowledge; None means all the dumps have.
        teachers: dumps of one corpus that are read together, each with its weight in the loss; then no other dump is named.
        snapshot: of each dump when the order was begun (see `Batches.state`); None when it begins now.

    Raises (on construction):
        InputError: there are no such batches.
    """

    batch_size: int = 8
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    consumed: int = 0
    ordinals: Mapping[str, np.ndarray | AllBut] | np.ndarray | AllBut | None = None
    groups: bool = False
    targets: Mapping[str, TargetMask] | None = None
    shuffle: bool = True
    order: str = "global"
    window: int = WINDOW
    group_by_length: int | None = None
    global_batch: int | None = None
    kinds: tuple[str, ...] | None = None
    teachers: Mapping[str, float] | None = None
    snapshot: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.world_size < 1 or not 0 <= self.rank < self.world_size or self.consumed < 0:
            rank = f"rank {self.rank} of {self.world_size}"
            raise InputError(f"no such batches: batch size {self.batch_size}, {rank}, {self.consumed} consumed")
        if self.epoch < 0:
            raise InputError(f"there is no epoch {self.epoch}: they are counted from 0")
        if self.order not in ORDERS:
            raise InputError(f"there is no order {self.order!r}: use {' or '.join(ORDERS)}")
        if self.window < 1:
            raise InputError(f"a window has at least 1 row group, not {self.window}")
        self._check_length_groups()

    def _check_length_groups(self) -> None:
        if (self.group_by_length is None) != (self.global_batch is None):
            raise InputError(
                "group_by_length and global_batch go together: give both, the second as the sequences of an optimiser step over"
                " all ranks and accumulated batches"
            )
        if self.group_by_length is None or self.global_batch is None:
            return
        check_length_groups(self.group_by_length, self.global_batch)
        if not self.shuffle:
            raise InputError("sequences that are read in order are not grouped by length: leave out shuffle or group_by_length")
        if self.global_batch % (self.batch_size * self.world_size):
            raise InputError(
                f"a global batch of {self.global_batch} sequences is no whole number of batches of {self.batch_size} on"
                f" {self.world_size} rank(s): make it a multiple of {self.batch_size * self.world_size}"
            )
