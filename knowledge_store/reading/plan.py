"""What is read of a dump, in what order, and by which rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.reading.target_mask import TargetMask


@dataclass(frozen=True)
class ReadPlan:
    """The batches of one rank over one epoch. `KnowledgeStore.batches` and `DistillationDataset` take its fields as keywords.

    Attributes:
        batch_size: sequences in a batch, for each rank.
        seed, epoch: decide the order, the same for every rank and any number of ranks.
        rank, world_size: step s of rank r takes items [(sW + r)B, (sW + r + 1)B) of the order.
        consumed: items that all ranks together have taken before (see `Batches.state`).
        ordinals: read only these sequences; None reads all.
        targets: of which dump which targets count; all of them where a dump is not named.
        shuffle: False reads them in order.
        kinds: which kinds of knowledge; None means all the dump has.
        snapshot: of the dump when the order was begun (see `Batches.state`); None when it begins now.

    Raises (on construction):
        InputError: there are no such batches.
    """

    batch_size: int = 8
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    consumed: int = 0
    ordinals: np.ndarray | None = None
    targets: Mapping[str, TargetMask] | None = None
    shuffle: bool = True
    kinds: tuple[str, ...] | None = None
    snapshot: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.world_size < 1 or not 0 <= self.rank < self.world_size or self.consumed < 0:
            rank = f"rank {self.rank} of {self.world_size}"
            raise InputError(f"no such batches: batch size {self.batch_size}, {rank}, {self.consumed} consumed")
