"""Batches for training: the same global order for any number of ranks, resumable from a few integers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading.collate import collate
from knowledge_store.reading.order import batch_items, shuffled, step_count
from knowledge_store.reading.plan import ReadPlan
from knowledge_store.reading.reader import DumpReader


class Batches:
    """The batches of one rank over one epoch of a dump.

    Iterate it, or index a step: `batches[s]` is the same batch whatever was read before. `len()` counts steps, and is the
    same for all ranks: a rank with too few items gets padding rows, which have no targets.

    A batch is a dict of the arrays of all kinds that are read, of B sequences of at most T positions:

        sequence_id     (B,)       int64  −1 for a padding row
        attention_mask  (B, T)     bool   where a kind per position is read; padding is on the right
        KIND_mask       (B, I)     bool   which items of a kind per item there are

    What else is in it, the kinds say (of predictions, `kinds.positions`). Arrays of a kind per position are (B, T, …), per
    sequence (B, …), per item (B, I, …); texts are lists.
    """

    def __init__(self, reader: DumpReader, plan: ReadPlan):
        manifest = reader.manifest
        self._kinds = tuple(manifest.kinds) if plan.kinds is None else plan.kinds
        for kind in self._kinds:
            if kind not in manifest.kinds:
                raise InputError(f"dump {manifest.dump!r} holds no knowledge of kind {kind!r}")
        self._arrays = {kind: KINDS[kind].arrays(manifest) for kind in self._kinds}
        check_snapshot(manifest.dump, reader.snapshot, plan.snapshot)
        chosen = np.arange(len(reader)) if plan.ordinals is None else np.asarray(plan.ordinals, dtype=np.int64)
        if ((chosen < 0) | (chosen >= len(reader))).any():
            raise InputError(f"some of the ordinals are not those of a sequence: the dump has {len(reader)}, counted from 0")
        self._reader, self._plan = reader, plan
        self._mask = (plan.targets or {}).get(manifest.dump)
        self._taken = 0
        self._order = chosen[shuffled(len(chosen), plan.seed, plan.epoch)] if plan.shuffle else chosen

    def __len__(self) -> int:
        return step_count(len(self._order) - self._plan.consumed, self._plan.world_size, self._plan.batch_size)

    @property
    def state(self) -> dict[str, int]:
        """Where all ranks stand after the batches yielded so far; `store.batches(…, **state)` resumes there, with any
        number of ranks. `snapshot` stands for the dump's sequences: a dump that has others now is read in another order,
        and refused."""
        plan = self._plan
        consumed = plan.consumed + self._taken * plan.world_size * plan.batch_size
        return {
            "seed": plan.seed,
            "epoch": plan.epoch,
            "consumed": min(consumed, len(self._order)),
            "snapshot": self._reader.snapshot,
        }

    def __getitem__(self, step: int) -> Arrays:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        plan = self._plan
        items = self._order[batch_items(step, plan.rank, plan.world_size, plan.batch_size, plan.consumed)]
        sequences = [self._read(int(ordinal)) for ordinal in items]
        template = sequences[0] if sequences else self._read(int(self._order[0]))
        padding = [None] * (plan.batch_size - len(sequences))
        return collate([*sequences, *padding], self._arrays, template[1])

    def _read(self, ordinal: int) -> tuple[int, dict[str, Arrays]]:
        sequence_id, knowledge = self._reader.sequence(ordinal, self._kinds)
        for kind, arrays in knowledge.items():
            target = KINDS[kind].target
            if self._mask is not None and target is not None:
                positions = self._mask.positions(ordinal)
                if len(positions) != len(arrays[target]):
                    raise InputError(f"the chosen targets of dump {self._reader.manifest.dump!r} are those of another dump")
                arrays[target] = arrays[target] & positions
        return sequence_id, knowledge

    def __iter__(self) -> Iterator[Arrays]:
        for step in range(len(self)):
            batch = self[step]
            self._taken = step + 1
            yield batch


def check_snapshot(dump: str, snapshot: int, expected: int | None) -> None:
    """Refuse to resume in the order of a dump that has other sequences since: some would be lost and others repeated.

    Args:
        dump: its name.
        snapshot: of the dump.
        expected: what it was when the order was begun; None when it begins now.

    Raises:
        InputError: they differ.
    """
    if expected not in (None, snapshot):
        raise InputError(
            f"dump {dump!r} has other sequences than when this order was begun (it may have grown): begin again without a state"
        )
