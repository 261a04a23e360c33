"""Batches for training: the same global order for any number of ranks, resumable from a few integers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.reading.collate import collate
from knowledge_store.reading.order import batch_items, shuffled, step_count
from knowledge_store.reading.plan import ReadPlan
from knowledge_store.reading.reader import DumpReader


class Batches:
    """The batches of one rank over one epoch of a dump.

    Iterate it, or index a step: `batches[s]` is the same batch whatever was read before. `len()` counts steps, and is the
    same for all ranks: a rank with too few items gets padding rows, which have no targets.

    A batch is a dict of numpy arrays, B sequences of at most T positions with at most K candidates:

        sequence_id         (B,)      int64    −1 for a padding row
        input_ids           (B, T)    int64    0 on padding, which is on the right
        attention_mask      (B, T)    bool
        is_target           (B, T)    bool     counts for training
        has_knowledge       (B, T)    bool     what the teacher predicted here is kept
        token_logprob       (B, T)    float32  the teacher's log-probability (nats) of the token that stands here
        candidate_ids       (B, T, K) int64    likeliest first; 0 where there are none
        candidate_logprobs  (B, T, K) float32  −inf where there are none; with the tail they sum to one
        tail_logprob        (B, T)    float32  log of the probability outside the candidates

    Beside these, which are of the kind `positions`, there are the arrays of each other kind that is read; see `collate`.

    Position t holds the prediction of token t, made from the tokens before it: pair it with a model's output at t − 1. Without
    knowledge (position 0, context, padding) all mass is in the tail.
    """

    def __init__(self, reader: DumpReader, plan: ReadPlan):
        manifest = reader.manifest
        self._kinds = tuple(manifest.kinds) if plan.kinds is None else plan.kinds
        for kind in self._kinds:
            if kind not in manifest.kinds:
                raise InputError(f"dump {manifest.dump!r} holds no knowledge of kind {kind!r}")
        check_snapshot(manifest.dump, reader.snapshot, plan.snapshot)
        chosen = np.arange(len(reader)) if plan.ordinals is None else np.asarray(plan.ordinals, dtype=np.int64)
        if ((chosen < 0) | (chosen >= len(reader))).any():
            raise InputError(f"some of the ordinals are not those of a sequence: the dump has {len(reader)}, counted from 0")
        self._reader, self._plan = reader, plan
        self._taken = 0
        self._order = chosen[shuffled(len(chosen), plan.seed, plan.epoch)] if plan.shuffle else chosen

    def __len__(self) -> int:
        return step_count(len(self._order) - self._plan.consumed, self._plan.world_size, self._plan.batch_size)

    @property
    def state(self) -> dict[str, int]:
        """Where all ranks stand after the batches yielded so far; `store.batches(…, **state)` goes on from there, with any
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
        sequences = [self._reader.sequence(int(ordinal), self._kinds) for ordinal in items]
        template = sequences[0] if sequences else self._reader.sequence(int(self._order[0]), self._kinds)
        padding = [None] * (plan.batch_size - len(sequences))
        return collate([*sequences, *padding], self._kinds, template[1], self._reader.manifest)

    def __iter__(self) -> Iterator[Arrays]:
        for step in range(len(self)):
            batch = self[step]
            self._taken = step + 1
            yield batch


def check_snapshot(dump: str, found: int, expected: int | None) -> None:
    """Refuse to go on in the order of a dump that has other sequences since: some would be lost and others repeated.

    Args:
        dump: its name.
        found: its `snapshot`.
        expected: what it was when the order was begun; None when it begins now.

    Raises:
        InputError: they differ.
    """
    if expected not in (None, found):
        raise InputError(
            f"dump {dump!r} has other sequences than when this order was begun (it may have grown): begin anew, without a state"
        )
