"""Sequences grouped by length: the same sequences once an epoch, the same global batches however they are divided, and no more
padding than without."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from knowledge_store import InputError, KnowledgeStore
from knowledge_store.reading.length_groups import LengthGroups, padding_share
from knowledge_store.reading.order import EpochOrder, Shuffled
from knowledge_store.reading.ordinals import AllBut

LENGTHS = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=1, max_size=3)
SPLITS = st.tuples(*[st.integers(1, 3)] * 3)  # batch size, ranks, accumulated batches


def orders(lengths: list[list[int]], group: int, global_batch: int, seed: int = 0, epoch: int = 0):
    """An epoch of dumps of such lengths, without groups and with them; and the lengths of places and ordinals."""
    arrays = [np.array(of_dump) for of_dump in lengths]

    def lengths_of(places: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        return np.array([arrays[place][ordinal] for place, ordinal in zip(places, ordinals, strict=True)], np.int64)

    counts = [len(of_dump) for of_dump in lengths]
    streams = [Shuffled(AllBut(count), seed, place) for place, count in enumerate(counts)]
    plain = EpochOrder(streams, counts, seed, epoch)
    return plain, LengthGroups(plain, lengths_of, group=group, global_batch=global_batch, seed=seed, epoch=epoch), lengths_of


def pairs(order, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
    places, ordinals = order.items(start, len(order) if stop is None else stop)
    assert places.dtype == ordinals.dtype == np.int64
    return list(zip(places.tolist(), ordinals.tolist(), strict=True))


@settings(max_examples=60)
@given(lengths=LENGTHS, group=st.integers(1, 50), global_batch=st.integers(1, 12), epoch=st.integers(0, 3), data=st.data())
def test_every_sequence_once_and_any_slot_by_itself(lengths, group, global_batch, epoch, data):
    plain, grouped, _ = orders(lengths, group, global_batch, epoch=epoch)
    everything = pairs(grouped)
    assert len(grouped) == len(plain)
    assert sorted(everything) == sorted(pairs(plain))
    start, stop = data.draw(st.integers(0, len(plain) + 2)), data.draw(st.integers(0, len(plain) + 2))
    fresh = orders(lengths, group, global_batch, epoch=epoch)[1]
    assert pairs(fresh, start, stop) == everything[start:stop]


@settings(max_examples=60)
@given(lengths=LENGTHS, split=SPLITS, groups=st.integers(1, 5), seed=st.integers(0, 3))
def test_padding_is_never_more_than_without(lengths, split, groups, seed):
    """However a global batch is divided; an epoch whose last step is short may have one batch of the longest more."""
    batch_size, ranks, accumulated = split
    global_batch = batch_size * ranks * accumulated
    plain, grouped, lengths_of = orders(lengths, groups * global_batch, global_batch, seed)
    slots = [
        lengths_of(*order.items(0, len(order))).sum() / (1 - padding_share(lengths_of(*order.items(0, len(order))), batch_size))
        for order in (plain, grouped)
    ]
    longest = max(max(of_dump) for of_dump in lengths)
    more = 0 if len(plain) % global_batch == 0 else batch_size * longest
    assert slots[1] <= slots[0] + more + 1e-6


@settings(max_examples=60)
@given(lengths=LENGTHS, global_batch=st.integers(1, 8), groups=st.integers(1, 4))
def test_a_group_holds_what_stood_there_sorted_into_global_batches(lengths, global_batch, groups):
    plain, grouped, lengths_of = orders(lengths, groups * global_batch, global_batch)
    steps = -(-len(plain) // global_batch)
    parts = -(-steps // groups)
    ends = [part * steps // parts * global_batch for part in range(parts + 1)]
    for start, stop in pairwise(ends):
        assert stop - start <= groups * global_batch
        assert sorted(pairs(grouped, start, stop)) == sorted(pairs(plain, start, stop))
        batches = [
            lengths_of(*grouped.items(first, min(first + global_batch, stop)))
            for first in range(start, min(stop, len(plain)), global_batch)
        ]
        assert all((np.diff(batch) <= 0).all() for batch in batches)
        # They are neighbours in length: no batch reaches into another's.
        ranges = sorted((batch.min(), batch.max()) for batch in batches)
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def test_batches_of_a_group_are_shuffled_anew_in_each_epoch():
    lengths = [list(range(1, 401))]
    firsts = [[int(orders(lengths, 400, 10, seed, epoch)[1].items(0, 1)[1][0]) for epoch in range(60)] for seed in (0, 1)]
    assert firsts[0] != firsts[1]
    assert len(set(firsts[0])) > 20  # of 40 batches
    lasts = [orders([list(range(1, 396))], 400, 10, 0, epoch)[1].items(390, 395)[1].mean() for epoch in range(60)]
    assert min(lasts) < 100 < 300 < max(lasts)  # a short last step has any lengths


def test_the_share_of_padding():
    assert padding_share(np.array([4, 4, 2, 2]), 2) == 0
    assert padding_share(np.array([4, 2, 4, 2]), 2) == 0.25
    assert padding_share(np.array([4, 4, 2]), 2) == 1 - 10 / 12


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two dumps, of 9 and 14 sequences of 1 to 9 tokens."""
    folder = write_store(tmp_path_factory.mktemp("groups") / "store", "first", shards=3, size=3)
    return KnowledgeStore.open(write_store(folder, "second", shards=2, size=7))


def steps(store, dump, split, **plan) -> list[list[tuple[int, int]]]:
    """What each optimiser step reads, over all ranks and accumulated batches: dumps and ids."""
    batch_size, world_size, accumulated = split
    ranks = [store.batches(dump, batch_size, rank=rank, world_size=world_size, **plan) for rank in range(world_size)]
    found: list[list[tuple[int, int]]] = []
    for step in range(len(ranks[0])):
        rows = [] if step % accumulated == 0 else found.pop()
        for rank in ranks:
            batch = rank[step]
            ids = batch["sequence_id"].tolist()
            dumps = batch["dump"].tolist() if "dump" in batch else [0] * len(ids)
            rows += [pair for pair in zip(dumps, ids, strict=True) if pair[1] >= 0]
            lengths = batch["attention_mask"].sum(axis=1)
            assert "global_batch" not in plan or (np.diff(lengths) <= 0).all()  # the longest first, rows of padding last
        found.append(sorted(rows))
    return found


@settings(max_examples=25)
@given(
    split=st.sampled_from([(6, 1, 1), (3, 2, 1), (2, 3, 1), (1, 6, 1), (3, 1, 2), (2, 1, 3), (1, 3, 2), (1, 2, 3), (1, 1, 6)]),
    group=st.integers(1, 30),
    epoch=st.integers(0, 2),
    dumps=st.sampled_from(["first", ["first", "second"], {"first": 2.0, "second": 1.0}]),
    subset=st.none() | st.lists(st.integers(0, 8), min_size=4, unique=True),
    interrupted=st.integers(0, 2),
    order=st.sampled_from(["global", "blocks"]),
)
def test_another_split_reads_the_same_in_each_step(store, split, group, epoch, dumps, subset, interrupted, order):
    plan = {"group_by_length": group, "global_batch": 6, "seed": 5, "epoch": epoch, "order": order}
    if subset is not None:
        plan["ordinals"] = {"first": np.array(subset)}
    expected = steps(store, dumps, (6, 1, 1), **plan)
    assert steps(store, dumps, split, **plan) == expected
    assert steps(store, dumps, split, **plan, consumed=6 * interrupted) == expected[interrupted:]
    ungrouped = steps(store, dumps, (6, 1, 1), seed=5, epoch=epoch, order=order, ordinals=plan.get("ordinals"))
    assert sorted(chain(*expected)) == sorted(chain(*ungrouped))
    assert [*map(len, expected)] == [*map(len, ungrouped)]


def test_padding_of_an_epoch_is_that_of_its_batches(store):
    plan = {"batch_size": 2, "seed": 1}
    for more in ({}, {"group_by_length": 12, "global_batch": 4}):
        batches = store.batches("second", **plan, **more)
        masks = [batch["attention_mask"] for batch in batches]
        expected = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
        assert batches.padding_share() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"group_by_length": 10}, "give both"),
        ({"global_batch": 8}, "give both"),
        ({"group_by_length": 0, "global_batch": 8}, "group_by_length is 0"),
        ({"group_by_length": 10, "global_batch": 0}, "global_batch is 0"),
        ({"group_by_length": 10, "global_batch": 12}, "a multiple of 8"),
        ({"group_by_length": 10, "global_batch": 8, "world_size": 3}, "a multiple of 24"),
        ({"group_by_length": 10, "global_batch": 8, "shuffle": False}, "in order"),
    ],
)
def test_impossible_groups_are_refused(store, plan, reason):
    with pytest.raises(InputError, match=reason):
        store.batches("first", **plan)
