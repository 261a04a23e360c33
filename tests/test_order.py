"""The order of an epoch, pinned: a run that resumes years later, elsewhere, goes on in the order it began."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torture import order

from knowledge_store.reading.order import batch_items, shuffled, step_count

COUNTS = st.integers(0, 300)
INTEGERS = st.integers(-(2**70), 2**70)


# Computed once, and again by a plain-Python SplitMix64.
PINNED = {
    (0, 0): [6, 1, 5, 0, 9, 4, 2, 7, 8, 3],
    (0, 1): [5, 8, 4, 1, 6, 2, 7, 0, 3, 9],
    (1, 0): [0, 8, 1, 4, 9, 3, 7, 2, 6, 5],
}
PINNED_LARGE = [847217, 507899, 79559, 764781, 517992]


def test_pinned_orders():
    assert shuffled(10, 0, 0).tolist() == PINNED[0, 0]
    assert shuffled(10, 0, 1).tolist() == PINNED[0, 1]
    assert shuffled(10, 1, 0).tolist() == PINNED[1, 0]
    assert shuffled(1_000_000, 42, 7)[:5].tolist() == PINNED_LARGE


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
