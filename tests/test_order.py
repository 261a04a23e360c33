"""The order of an epoch, pinned: a run that resumes years later, elsewhere, goes on in the order it began."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torture import order

from knowledge_store.reading.order import batch_items, step_count
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
