"""Batches for training: the same global order for any number of ranks, resumable from a few integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading.blocks import Blocks
from knowledge_store.reading.collate import SEPARATOR, collate
from knowledge_store.reading.collate import Sequence as Read
from knowledge_store.reading.groups import Groups, check_groups
from knowledge_store.reading.length_groups import LengthGroups, padding_share
from knowledge_store.reading.mixture import taken
from knowledge_store.reading.order import (
    CHUNK,
    EpochOrder,
    InOrder,
    Order,
    Shuffled,
    Stream,
    batch_items,
    epoch_shares,
    step_count,
)
from knowledge_store.reading.ordinals import Chosen, chosen
from knowledge_store.reading.plan import ReadPlan
from knowledge_store.reading.reader import DumpReader
from knowledge_store.reading.teachers import TeachersReader, taken_of_teachers

CHUNKS = 4  # of the order, kept in memory
STEPS = 64  # whose items are kept: as many as a reader looks ahead


class Batches:
    """The batches of one rank over one epoch of one or several dumps.

    Iterate it, or index a step: `batches[s]` is the same batch whatever was read before. `len()` counts steps, and is the
    same for all ranks: a rank with too few items gets padding rows, which have no targets.

    A batch is a dict of the arrays of all kinds that are read, of B sequences of at most T positions:

        sequence_id     (B,)       int64  −1 for a padding row
        dump            (B,)       int64  of several dumps, the place of the row's in the order in which they were named; −1 for
                                          a padding row
        attention_mask  (B, T)     bool   where a kind per position is read; padding is on the right
        KIND_mask       (B, I)     bool   which items of a kind per item there are
        group           (B,)       int64  of groups, the place of the row's among those of the batch; −1 for a padding row
        score           (B,)       float64  of groups, what the corpus says the answer is worth; NaN where it says nothing

    What else is in it, the kinds say (of predictions, `kinds.positions`). Arrays of a kind per position are (B, T, …), per
    sequence (B, …), per item (B, I, …); texts are lists. Of several dumps it has the arrays that all of them have.

    Of several teachers of one corpus it has all arrays of the first, of each teacher m = 1, 2, … after it what that one knows,
    as `m/ARRAY`, and

        teacher_weights (B, M)     float32  of each teacher; they sum to one

    Of groups, `batch_size` counts groups, and B is what they have together: the answers of a group stand one after the other.
    A padding row stands for a group then.

    Attributes:
        dumps: the names of the dumps.
        readers: of the dumps; of several teachers, one for all.
        weights: of the dumps, where they have some.
        sequences: how many sequences, or groups, are read of each dump, as long as none is repeated.
        shares: how many of them an epoch has of each dump.
        order: what stands in each slot of the epoch, all ranks together.
        taken: what is read of the dumps' kinds.
        lacking: of several teachers, how many sequences are left out because a dump lacks them, by dump: see `TeachersReader`.
    """

    def __init__(self, readers: Mapping[str, DumpReader | TeachersReader], weights: Mapping[str, float] | None, plan: ReadPlan):
        self.dumps = tuple(readers)
        self.weights = weights
        self.readers = list(readers.values())
        self.lacking: dict[str, int] = {}
        left_out = [np.empty(0, np.int64)] * len(readers)
        if plan.teachers is None:
            self.taken = taken([reader.manifest for reader in self.readers], plan.kinds)
        else:
            [teachers] = self.readers
            assert isinstance(teachers, TeachersReader)
            self.taken = taken_of_teachers(teachers.manifests, plan.kinds)
            self.lacking, left_out = teachers.lacking, [teachers.left_out]
        self._snapshots = {dump: number for reader in self.readers for dump, number in reader.snapshots.items()}
        check_snapshots(self._snapshots, plan.snapshot)
        self._chosen = [
            chosen(ordinals, len(reader)).without(missing)
            for reader, ordinals, missing in zip(self.readers, _by_dump(plan.ordinals, self.dumps), left_out, strict=True)
        ]
        self._masks = [(plan.targets or {}).get(dump) for dump in self.dumps]
        self._groups: list[Groups] = []
        if plan.groups:
            check_groups([reader.manifest for reader in self.readers])
            self._groups = [
                Groups(reader.manifest.dump, *reader.scored_documents, of_dump)
                for reader, of_dump in zip(self.readers, self._chosen, strict=True)
            ]
            self._chosen = [groups.firsts for groups in self._groups]
        unknown = (plan.targets or {}).keys() - set(self.dumps)
        if unknown:
            raise InputError(f"targets are chosen of {min(unknown)!r}, which is not one of the dumps: {', '.join(self.dumps)}")
        self.sequences = {dump: len(of_dump) for dump, of_dump in zip(self.dumps, self._chosen, strict=True)}
        self._streams = [self._stream(place, of_dump, plan) for place, of_dump in enumerate(self._chosen)]
        self._begin(plan)

    def _stream(self, place: int, of_dump: Chosen, plan: ReadPlan) -> Stream:
        if not plan.shuffle:
            return InOrder(of_dump)
        if plan.order == "global":
            return Shuffled(of_dump, plan.seed, place)
        reader = self.readers[place]
        blocks = Blocks(of_dump.ascending(), reader.row_groups, plan.window, plan.seed, place)
        # A batch may begin in one window and end in the next; a group of like lengths reaches into as many as it fills.
        windows = 1 + blocks.windows_of((plan.group_by_length or 0) + (plan.global_batch or 1))
        reader.keep(windows * plan.window * len(self.taken.kinds))
        return blocks

    def _begin(self, plan: ReadPlan) -> None:
        self._plan = plan
        self._steps = 0
        self._last_step: int | None = None
        shares = epoch_shares(self.sequences, self.weights)
        self.shares = dict(zip(self.dumps, shares, strict=True))
        self.order: Order = EpochOrder(self._streams, shares, plan.seed, plan.epoch, plan.shuffle)
        if plan.group_by_length and plan.global_batch:
            self.order = LengthGroups(
                self.order,
                self._lengths,
                group=plan.group_by_length,
                global_batch=plan.global_batch,
                seed=plan.seed,
                epoch=plan.epoch,
            )
        self._chunk = lru_cache(CHUNKS)(lambda number: self.order.items(number * CHUNK, (number + 1) * CHUNK))
        self._step_items = lru_cache(STEPS)(self._find_step_items)

    def at(self, epoch: int, consumed: int = 0) -> Batches:
        """The batches of another epoch, or from another place in it."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._begin(replace(self._plan, epoch=epoch, consumed=consumed))
        return other

    def __len__(self) -> int:
        return step_count(len(self.order) - self._plan.consumed, self._plan.world_size, self._plan.batch_size)

    @property
    def state(self) -> dict[str, Any]:
        """Where all ranks stand after the batches yielded so far; `store.batches(…, **state)` resumes there, with any
        number of ranks. `snapshot` has a number for each dump that stands for its sequences: a dump that has others now is read
        in another order, and refused."""
        plan = self._plan
        consumed = plan.consumed + self._steps * plan.world_size * plan.batch_size
        return {
            "seed": plan.seed,
            "epoch": plan.epoch,
            "consumed": min(consumed, len(self.order)),
            "snapshot": dict(self._snapshots),
        }

    def __getitem__(self, step: int) -> Arrays:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        plan = self._plan
        items = self._step_items(step)
        upcoming = [self._members(self._step_items(later)) for later in self._upcoming(step)]
        sequences = self._read(self._members(items), upcoming)
        template = sequences[0] if sequences else self._read(self._items(0, 1))[0]
        padding = [None] * (plan.batch_size - len(items))
        batch = collate([*sequences, *padding], self.taken.kinds, template.knowledge)
        if len(self.dumps) == 1:
            del batch["dump"]
        if plan.groups:
            batch |= self._group_arrays(items, len(padding))
        if plan.teachers is not None:
            shares = np.array(list(plan.teachers.values())) / math.fsum(plan.teachers.values())
            batch["teacher_weights"] = np.tile(shares.astype(np.float32), (len(batch["sequence_id"]), 1))
        return batch

    def padding_share(self, most: int = 2**16) -> float:
        """How much of the batches of this epoch is padding, as a share of their positions. In an epoch of more than `most`
        sequences or groups, of the batches of the first so many."""
        places, ordinals = self.order.items(0, most)
        lengths, sizes = self._member_lengths(places, ordinals)
        return padding_share(lengths, self._plan.batch_size, sizes)

    def _lengths(self, places: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """How many tokens the items of an order have, by the places of their dumps and their ordinals there: of a group, its
        longest sequence; all int64."""
        lengths, sizes = self._member_lengths(places, ordinals)
        longest: np.ndarray = np.maximum.reduceat(lengths, np.cumsum(sizes) - sizes) if len(sizes) else lengths
        return longest

    def _member_lengths(self, places: np.ndarray, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens each sequence of some items has, and how many sequences each item; all int64."""
        sizes = np.ones_like(ordinals)
        if self._plan.groups:
            items = zip(places.tolist(), ordinals.tolist(), strict=True)
            members = [self._groups[place].members(first) for place, first in items]
            sizes = np.array(list(map(len, members)), np.int64)
            places, ordinals = np.repeat(places, sizes), np.concatenate([ordinals[:0], *members])
        result = np.empty_like(ordinals)
        for place, reader in enumerate(self.readers):
            where = np.flatnonzero(places == place)
            result[where] = reader.lengths(ordinals[where])
        return result, sizes

    def _items(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The place of the dump and the ordinal of each slot of the order, as far as there are any."""
        found: list[tuple[int, int]] = []
        for number in range(start // CHUNK, -(-min(stop, len(self.order)) // CHUNK)):
            places, ordinals = self._chunk(number)
            within = slice(max(start - number * CHUNK, 0), stop - number * CHUNK)
            found += zip(places[within].tolist(), ordinals[within].tolist(), strict=True)
        return found

    def _members(self, items: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """The place and the ordinal of each sequence of some items of the order."""
        if not self._plan.groups:
            return items
        return [(place, ordinal) for place, first in items for ordinal in self._groups[place].members(first).tolist()]

    def _group_arrays(self, items: Sequence[tuple[int, int]], padding: int) -> Arrays:
        """`group` and `score` of a batch of these groups and so many padding rows."""
        members = [(place, self._groups[place].members(first)) for place, first in items]
        groups = [np.full(len(ordinals), group) for group, (_, ordinals) in enumerate(members)]
        scores = [self._groups[place].scores(ordinals) for place, ordinals in members]
        return {
            "group": np.concatenate([*groups, np.full(padding, -1)]).astype(np.int64),
            "score": np.concatenate([*scores, np.full(padding, np.nan)]),
        }

    def _find_step_items(self, step: int) -> list[tuple[int, int]]:
        """The place and the ordinal of each item of this rank's batch number `step`."""
        plan = self._plan
        items = batch_items(step, plan.rank, plan.world_size, plan.batch_size, plan.consumed)
        return self._items(items.start, items.stop)

    def _upcoming(self, step: int) -> range:
        """The steps that are likely to be asked for next: as many further on, again and again, as this one is from the one
        before. Workers of a loader take every so-manyth."""
        ahead = max(reader.ahead for reader in self.readers)
        stride = 0 if self._last_step is None else step - self._last_step
        self._last_step = step
        if not ahead or stride < 1:
            return range(0)
        return range(step + stride, min(step + ahead * stride + 1, len(self)), stride)

    def _read(self, items: Sequence[tuple[int, int]], upcoming: Sequence[Sequence[tuple[int, int]]] = ()) -> list[Read]:
        """Sequences by the places of their dumps and their ordinals there; `upcoming` are those of the next batches."""

        def ordinals(batch: Sequence[tuple[int, int]], of_place: int) -> list[int]:
            return [ordinal for place, ordinal in batch if place == of_place]

        kinds = tuple(self.taken.kinds)
        found = {
            place: iter(self.readers[place].sequences(ordinals(items, place), kinds, [ordinals(o, place) for o in upcoming]))
            for place in {place for place, _ in items}
        }
        return [self._masked(place, ordinal, *next(found[place])) for place, ordinal in items]

    def _masked(self, place: int, ordinal: int, sequence_id: int, knowledge: dict[str, Arrays]) -> Read:
        """A sequence of which the chosen targets count."""
        if (mask := self._masks[place]) is not None:
            positions = mask.positions(ordinal)
            for kind, arrays in knowledge.items():
                target = None if SEPARATOR in kind else KINDS[kind].target
                if target is None:
                    continue
                if len(positions) != len(arrays[target]):
                    raise InputError(f"the chosen targets of {self.dumps[place]} are those of another dump: choose them again")
                arrays[target] = arrays[target] & positions
        return Read(sequence_id, knowledge, place)

    def __iter__(self) -> Iterator[Arrays]:
        for step in range(len(self)):
            batch = self[step]
            self._steps = step + 1
            yield batch


def _by_dump(ordinals: Any, dumps: Sequence[str]) -> list[Any]:
    """Which sequences are read of each dump (InputError: it does not say of which dump, or of another)."""
    if not isinstance(ordinals, Mapping):
        if ordinals is not None and len(dumps) > 1:
            raise InputError(f"the ordinals do not say of which dump they are: give them by name, of {', '.join(dumps)}")
        return [ordinals] * len(dumps)
    unknown = ordinals.keys() - set(dumps)
    if unknown:
        raise InputError(f"there are ordinals of {min(unknown)!r}, which is not one of the dumps: {', '.join(dumps)}")
    return [ordinals.get(dump) for dump in dumps]


def check_snapshots(snapshots: Mapping[str, int], expected: Mapping[str, int] | None) -> None:
    """Refuse to resume in the order of dumps that have other sequences since: some would be lost and others repeated.

    Args:
        snapshots: of the dumps.
        expected: what they were when the order was begun; None when it begins now.

    Raises:
        InputError: a dump has another one, or the dumps are others.
    """
    if expected is None:
        return
    if expected.keys() != snapshots.keys():
        raise InputError(
            f"this order was begun with {', '.join(expected)}, and not with {', '.join(snapshots)}: name the same dumps, or"
            " begin again without a state"
        )
    for dump, snapshot in snapshots.items():
        if expected[dump] != snapshot:
            raise InputError(
                f"dump {dump!r} has other sequences than when this order was begun (it may have grown): begin again without a"
                " state"
            )
