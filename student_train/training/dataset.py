"""A store's batches as tensors.

The store decides the order, a pure function of (seed, epoch), and gives any step of it at once; this module only carries
it. Worker processes of a `DataLoader` take every so-manyth step, in the order in which the loader asks them, so no batch
is lost, repeated or reordered for any number of workers, and none is read twice.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.reading.mixture import Named
from knowledge_store.reading.order import step_count
from knowledge_store.reading.plan import ReadPlan
from student_train.training.ranks import rank_and_world_size, refuse_another_division

START_METHOD = "forkserver"
IGNORED = -100  # the label that every library's cross-entropy leaves out


class DistillationDataset(IterableDataset[dict[str, Any]]):
    """Batches of a dump as dictionaries of tensors; give it to a `DataLoader` with `batch_size=None`.

    Each batch has every column that `KnowledgeStore.batches` gives (see there for shapes), as tensors (texts as lists), and
    `labels` (B, T): `input_ids` where a position counts, −100 elsewhere. Rows of padding, whose `sequence_id` is −1, attend
    to their first token so that no model divides by an empty softmax; none of their positions counts.

    Every process reads its own share, so nothing else may divide it among them: a loader that would is refused.

    Args:
        store: an open store.
        dump: which dump, or several, as `KnowledgeStore.batches` takes them; may be left out when there is one.
        endless: continue with the next epoch instead of stopping. Such a dataset has no length.
        prepare: what is made of each batch of arrays before it becomes tensors, in the process that reads it; None for nothing.
        rank, world_size: whose share is read. Where both are left out they are found when batches are asked for, in
            `torch.distributed` or the environment (see `ranks`).
        plan: the other fields of `knowledge_store.reading.plan.ReadPlan`, which say what is read and in what order, such as
            `batch_size=8, seed=1`. `state_after` gives those with which another run resumes.

    Raises:
        InputError: there is no such dump or rank, nothing to read, dumps that do not go together, or one has grown since the
            order was begun.
    """

    def __init__(
        self,
        store: KnowledgeStore,
        dump: Named = None,
        *,
        endless: bool = False,
        prepare: Callable[[Arrays], Arrays] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **plan: Any,
    ) -> None:
        super().__init__()
        if (rank is None) != (world_size is None):
            raise InputError("give both rank and world_size, or neither")
        self.store = store
        self._process = os.getpid()
        self.dump = dump
        self._found = rank is None  # in each use
        self._plan = ReadPlan(rank=rank or 0, world_size=1 if world_size is None else world_size, **plan)
        self.endless = endless
        self.prepare = prepare
        batches = store.read(self._plan, dump)
        self.dumps, self.snapshot, self.sequences = batches.dumps, batches.state["snapshot"], len(batches.order)
        if not self.sequences:
            raise InputError(f"there is no sequence to read in {', '.join(self.dumps)}")
        # The epoch to read next, and of which epoch how many batches are passed over. Worker processes see it change, also
        # those that live through several epochs.
        self._next = torch.tensor([self._plan.epoch, 0, 0]).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        # A started process may know nothing of the group of processes that this one belongs to.
        return {**self.__dict__, "_plan": self.plan, "_found": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_process": os.getpid()}

    @property
    def plan(self) -> ReadPlan:
        """What is read, and by which rank."""
        if not self._found:
            return self._plan
        rank, world_size = rank_and_world_size()
        return replace(self._plan, rank=rank, world_size=world_size)

    @property
    def start_method(self) -> str | None:
        """How a loader is to start its workers, for `multiprocessing_context`: None where any way will do. A store that is read
        over a network is not read in a process that was forked."""
        return None if self.store.storage.forkable else START_METHOD

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank takes in a whole epoch."""
        return self._batches_left(self.plan, 0)

    def padding_share(self) -> float:
        """How much of the first epoch's batches is padding (see `Batches.padding_share`)."""
        plan = replace(self.plan, consumed=0)
        return self.store.read(plan, self.dump).padding_share()

    def __len__(self) -> int:
        if self.endless:
            raise TypeError("an endless DistillationDataset has no length")
        _, consumed = self._start()
        return self._batches_left(self.plan, consumed)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration reads: a whole one, or, of the epoch that the plan begins with, what is left of it.

        Raises:
            InputError: the plan begins with a later one.
        """
        refuse_another_division(sys._getframe(1).f_locals.get("self"))
        if epoch < self._plan.epoch:
            raise InputError(
                f"this dataset begins with epoch {self._plan.epoch}, so there is no epoch {epoch} to read: count from there,"
                f" in a loader of accelerate too (`loader.set_epoch({self._plan.epoch})`)"
            )
        self._next[0] = epoch

    def pass_over(self, epoch: int, batches: int) -> None:
        """Give empty dictionaries for the first batches of an epoch, for a reader that only counts them."""
        self._next[1], self._next[2] = epoch, batches

    def state_after(self, batches: int) -> dict[str, Any]:
        """Where to begin again after each rank took `batches` batches from here: seed, epoch, consumed and snapshot."""
        plan, (epoch, consumed) = self.plan, self._start()
        while batches >= self._batches_left(plan, consumed):
            batches -= self._batches_left(plan, consumed)
            epoch, consumed = epoch + 1, 0
        consumed += batches * plan.batch_size * plan.world_size
        return {"seed": plan.seed, "epoch": epoch, "consumed": consumed, "snapshot": self.snapshot}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        refuse_another_division(sys._getframe(1).f_locals.get("self"))
        return self._read(self.plan, *self._start())

    def _read(self, plan: ReadPlan, epoch: int, consumed: int) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if not self.store.storage.forkable and self._process != os.getpid():
            raise InputError(
                f"{self.store.address} is not read in a process that was forked: give the loader"
                " multiprocessing_context=dataset.start_method"
            )
        # A forked worker must not share open files with its parent, and must not see shards that were committed meanwhile.
        store = copy.copy(self.store) if info else self.store
        passed_epoch, passed = self._next[1:].tolist()
        taken = 0  # batches of this rank before this epoch, over all workers
        opened = store.read(plan, self.dump)
        while True:
            left = self._batches_left(plan, consumed)
            batches = opened.at(epoch, consumed)
            # The loader takes batches from its workers in turn: the rank's batch number `taken + step` is that of
            # worker (taken + step) mod workers.
            for step in range((worker - taken) % workers, left, workers):
                yield {} if epoch == passed_epoch and step < passed else self._tensors(batches[step])
            if not self.endless:
                return
            taken += left
            epoch, consumed = epoch + 1, 0

    def _tensors(self, batch: Arrays) -> dict[str, Any]:
        return tensors(batch if self.prepare is None else self.prepare(batch))

    def _start(self) -> tuple[int, int]:
        """The epoch that is read next, and how many items of it are consumed."""
        epoch = int(self._next[0])
        return epoch, self._plan.consumed if epoch == self._plan.epoch else 0

    def _batches_left(self, plan: ReadPlan, consumed: int) -> int:
        return step_count(self.sequences - consumed, plan.world_size, plan.batch_size)


def tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of arrays as tensors, with `labels` where it has the text. Lists, which hold texts, stay as they are."""
    result = {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }
    if "input_ids" in result:
        result["attention_mask"] = result["attention_mask"].long()
        result["attention_mask"][result["sequence_id"] < 0, :1] = 1
        result["labels"] = torch.where(result["is_target"], result["input_ids"], IGNORED)
    return result
