"""The order of an epoch, pinned: a run that resumes years later, elsewhere, goes on in the order it began."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torture import order

from knowledge_store import InputError
from knowledge_store.reading.blocks import Blocks
from knowledge_store.reading.order import EpochOrder, Shuffled, batch_items, step_count
from knowledge_store.reading.ordinals import AllBut, Listed
from knowledge_store.reading.permutation import permuted


def shuffled(count: int, *key: int) -> np.ndarray:
    """A whole permutation."""
    return permuted(np.arange(count), count, *key)


COUNTS = st.integers(0, 300)
INTEGERS = st.integers(-(2**70), 2**70)


# Of a count and a key, the first numbers. Computed once, and again by a network in plain Python.
PINNED = {
    (10, (0, 0, 0)): [3, 6, 9, 5, 2, 8, 4, 7, 0, 1],
    (10, (0, 0, 1)): [0, 4, 6, 7, 3, 9, 2, 5, 1, 8],
    (10, (1, 0, 0)): [1, 8, 2, 7, 3, 0, 5, 9, 6, 4],
    (1_000_000, (42, 0, 7)): [78389, 470736, 171778, 612059, 448189],
    (2**40 + 3, (-1, 1, 2**65 + 1)): [601354185400, 199407978051, 572936506189, 781396425429, 692710919731],
    (2**63, (5,)): [5771902609972628536, 1171343109066492198, 6954391028274012111, 8060420394748842980, 1148991652971613813],
}


PINNED_BLOCKS = [0, 5, 2, 7, 1, 8, 6, 3, 9, 11, 10, 11, 3, 9, 10, 2, 8, 7, 1, 6, 0, 5]


@pytest.mark.parametrize(("count", "key"), PINNED)
def test_pinned_orders(count, key):
    expected = PINNED[count, key]
    assert permuted(np.arange(len(expected)), count, *key).tolist() == expected


@given(count=COUNTS, seed=INTEGERS, epoch=INTEGERS)
def test_every_order_is_a_permutation_and_a_pure_function(count, seed, epoch):
    order = shuffled(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, shuffled(count, seed, epoch))
    assert order.dtype == np.int64


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_seeds_and_epochs_have_orders_of_their_own(seed, epoch):
    orders = [shuffled(100, seed, epoch), shuffled(100, seed + 1, epoch), shuffled(100, seed, epoch + 1)]
    orders.append(shuffled(100, epoch, seed))
    distinct = 4 if seed != epoch else 3
    assert len({tuple(order.tolist()) for order in orders}) == distinct


@given(count=st.integers(1, 2**63), key=st.tuples(INTEGERS, INTEGERS), data=st.data())
def test_places_of_any_permutation_are_apart(count, key, data):
    places = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=20))
    found = permuted(np.array(places, np.int64), count, *key)
    assert ((found >= 0) & (found < count)).all() and len(set(found.tolist())) == len(places)
    assert [int(permuted(np.array([place]), count, *key)[0]) for place in places[:3]] == found[:3].tolist()


def test_small_permutations_are_equally_likely():
    """Chi-square over all orders of five items."""
    epochs, orders = 6000, 120
    counts = Counter(tuple(shuffled(5, 7, 0, epoch).tolist()) for epoch in range(epochs))
    assert len(counts) == orders
    expected = epochs / orders
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 172  # 119 degrees of freedom: p = 0.001


def test_large_permutations_do_not_correlate():
    count = 100_003
    first, other = shuffled(count, 1, 0, 0), shuffled(count, 1, 0, 1)
    for one, two in ((np.arange(count), first), (first, other), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(count)


def test_seeds_may_be_numpy_integers():
    assert np.array_equal(shuffled(20, np.int64(3), np.int32(2)), shuffled(20, 3, 2))


def test_orders_look_shuffled():
    """Every item comes first about equally often, and neighbours part."""
    count, epochs = 20, 4000
    orders = np.array([shuffled(count, 5, epoch) for epoch in range(epochs)])
    for place in (0, 7, count - 1):
        frequencies = np.bincount(orders[:, place], minlength=count)
        expected = epochs / count
        assert ((frequencies - expected) ** 2 / expected).sum() < 44  # chi-square, 19 degrees of freedom: p = 0.001
    neighbours = (np.abs(np.diff(orders, axis=1)) == 1).mean()
    assert abs(neighbours - 2 / count) < 0.01


def starts(sizes: list[int]) -> np.ndarray:
    """First ordinals of row groups of these sizes, and the end."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def test_an_order_takes_no_memory_however_long():
    stream = Shuffled(AllBut(10**12, np.array([5, 10**11])), 1, 0)
    order = EpochOrder([stream], [len(stream)], 1, 0)
    tracemalloc.start()
    _, ordinals = order.items(7 * 10**11, 7 * 10**11 + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ordinals.tolist())) == 1000 and ordinals.max() < 10**12
    assert peak < 2**20


def test_pinned_blocks():
    blocks = Blocks(AllBut(12, np.array([4])), starts([3, 2, 4, 3]), window=2, seed=1, place=0)
    assert blocks.ordinals(np.arange(22)).tolist() == PINNED_BLOCKS


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 5),
    seed=INTEGERS,
    place=st.integers(0, 3),
    data=st.data(),
)
def test_blocks_are_permutations_window_by_window(sizes, window, seed, place, data):
    count = sum(sizes)
    read = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1))
    excluded = np.array(sorted(set(range(count)) - set(read)), np.int64)
    chosen = data.draw(st.sampled_from([AllBut(count, excluded), Listed(np.array(read), count).ascending()]))
    blocks = Blocks(chosen, starts(sizes), window, seed, place)
    assert len(blocks) == len(read)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    permutations = []
    for number in range(3):
        ordinals = blocks.ordinals(np.arange(number * len(read), (number + 1) * len(read)))
        assert sorted(ordinals.tolist()) == sorted(read)
        # A row group is read in one window: between its first and its last sequence stand no more groups than a window has.
        groups = group_of[ordinals]
        for group in set(groups.tolist()):
            where = np.flatnonzero(groups == group)
            assert len(set(groups[where[0] : where[-1] + 1].tolist())) <= window
        permutations.append(ordinals)
    items = np.array(data.draw(st.lists(st.integers(0, 3 * len(read) - 1))), np.int64)
    assert np.array_equal(blocks.ordinals(items), np.concatenate(permutations)[items])


def test_blocks_look_shuffled():
    """Row groups come in any order, and the sequences of a window too."""
    sizes, window = [10] * 40, 8
    blocks = Blocks(AllBut(400), starts(sizes), window, 3, 0)
    orders = blocks.ordinals(np.arange(300 * 400)).reshape(300, 400)
    firsts = np.bincount(orders[:, :80].ravel(), minlength=400)  # of the first window
    assert ((firsts - 60) ** 2 / 60).sum() < 600
    mixed = [len(set((order[:80] // 10).tolist())) for order in orders]
    assert set(mixed) == {window}
    assert all((np.abs(np.diff(order)) == 1).mean() < 0.1 for order in orders)


@given(count=st.integers(0, 60), data=st.data())
def test_all_but_a_few_stands_for_the_array(count, data):
    excluded = np.array(sorted(data.draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=count))), np.int64)
    kept = AllBut(count, excluded)
    expected = np.setdiff1d(np.arange(count), excluded)
    assert len(kept) == len(expected) and list(kept) == expected.tolist()
    assert np.array_equal(np.asarray(kept), expected) and np.asarray(kept).dtype == np.int64
    assert np.array_equal(kept.before(np.arange(count + 1)), np.searchsorted(expected, np.arange(count + 1)))
    other = np.array(sorted(data.draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=count))), np.int64)
    assert np.array_equal(np.asarray(kept.without(other)), np.setdiff1d(expected, other))


@pytest.mark.parametrize("excluded", [[3, 1], [1, 1], [-1], [5]])
def test_what_is_left_out_has_to_be_ascending_ordinals(excluded):
    with pytest.raises(InputError, match="not ascending numbers below 5"):
        AllBut(5, np.array(excluded))


@given(items=st.integers(0, 200), world=st.integers(1, 9), batch=st.integers(1, 9), consumed=st.integers(0, 220))
def test_ranks_share_the_items_in_order(items, world, batch, consumed):
    left = items - consumed
    steps = step_count(left, world, batch)
    taken = [
        item
        for step in range(steps)
        for rank in range(world)
        for item in range(items)[batch_items(step, rank, world, batch, consumed)]
    ]
    assert taken == list(range(items))[consumed:]
    assert (steps - 1) * world * batch < max(left, 0) <= steps * world * batch or steps == 0


def test_epochs_of_ranks_and_workers_that_die_and_go_on(tmp_path):
    """A search for a history of training, deaths and other ranks that loses, repeats or reorders a sequence."""
    assert order.check_order(order.small_store(tmp_path / "store"), seed=0, examples=12) >= 12
