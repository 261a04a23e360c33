"""Batches: every sequence once an epoch, in one global order, whatever the ranks, the batch size and the interruptions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_storage import PLACES, new_place
from stores import commit, make_manifest, random_sequences, words, write_store

from knowledge_store import DumpWriter, InputError, KnowledgeStore
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reading.permutation import permuted
from knowledge_store.reading.reader import DumpReader

SHAPES = {
    "sequence_id": ("int64", 1),
    "input_ids": ("int64", 2),
    "attention_mask": ("bool", 2),
    "is_target": ("bool", 2),
    "has_knowledge": ("bool", 2),
    "token_logprob": ("float32", 2),
    "candidate_ids": ("int64", 3),
    "candidate_logprobs": ("float32", 3),
    "tail_logprob": ("float32", 2),
}


@pytest.fixture(scope="module", params=PLACES)
def folder(request, tmp_path_factory: pytest.TempPathFactory):
    """Three shards of 1, 7 and 5 sequences: no size divides another."""
    folder = new_place(request.param, tmp_path_factory.mktemp("batches") / "store")

    writer = DumpWriter.open(folder, make_manifest(shards=3), tokens_table(words(11), words(11)))
    for shard, size in enumerate((1, 7, 5)):
        commit(writer, shard, random_sequences(shard, size))
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return KnowledgeStore.open(folder)


@pytest.fixture(scope="module")
def ids(store) -> list[int]:
    return store.sequences()["sequence_id"].to_pylist()


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch of one dump."""
    return permuted(np.arange(count), count, seed, 0, epoch).tolist()


def taken(batches) -> list[int]:
    return [item for batch in batches for item in batch["sequence_id"].tolist() if item >= 0]


def test_names_shapes_and_types(store):
    for batch in store.batches(batch_size=5):
        rows, length, width = batch["candidate_ids"].shape
        assert (rows, width) == (5, 3)
        assert {name: (str(array.dtype), array.ndim) for name, array in batch.items()} == SHAPES
        assert all(array.shape == (rows, length, width)[: array.ndim] for array in batch.values())
        assert batch["attention_mask"].sum(axis=1).max() == length


def test_rows_are_the_sequences_padded_on_the_right(store, ids):
    for batch in store.batches(batch_size=4, seed=3):
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            if sequence < 0:
                continue
            alone = store[ids.index(sequence)]
            length = len(alone["input_ids"])
            for name, array in alone.items():
                assert np.array_equal(batch[name][row][:length] if array.ndim else batch[name][row], array)
            assert alone["attention_mask"].all()
            assert not batch["attention_mask"][row, length:].any()
            assert not batch["is_target"][row, length:].any()
            assert not batch["has_knowledge"][row, length:].any()
            assert np.isneginf(batch["candidate_logprobs"][row, length:]).all()
            assert (batch["tail_logprob"][row, length:] == 0).all()


def test_candidates_and_tail_sum_to_one_everywhere(store):
    for batch in store.batches(batch_size=6):
        mass = np.exp(batch["candidate_logprobs"].astype(np.float64)).sum(axis=2) + np.exp(batch["tail_logprob"])
        np.testing.assert_allclose(mass, 1, atol=1e-6)


def test_the_order_is_that_of_the_hash(store, ids):
    expected = [ids[ordinal] for ordinal in shuffled(len(ids), 9, 4)]
    assert taken(store.batches(batch_size=1, seed=9, epoch=4)) == expected
    assert taken(store.batches(batch_size=4, seed=9, epoch=4)) == expected
    assert taken(store.batches(batch_size=4, shuffle=False)) == ids


@settings(max_examples=60)
@given(
    legs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 2),
    subset=st.none() | st.lists(st.integers(0, 12), unique=True),
)
def test_interrupted_and_resumed_with_other_ranks(store, ids, legs, seed, epoch, subset):
    """Each leg has a world size and a batch size of its own, and is interrupted; the last one ends the epoch."""
    ordinals = None if subset is None else np.array(subset, np.int64)
    chosen = list(range(len(ids))) if subset is None else subset
    expected = [ids[chosen[place]] for place in shuffled(len(chosen), seed, epoch)]
    state = {"seed": seed, "epoch": epoch, "consumed": 0}
    seen: list[int] = []
    for number, (world, batch_size, steps) in enumerate(legs):
        last = number == len(legs) - 1
        ranks = [
            store.batches(batch_size=batch_size, rank=rank, world_size=world, ordinals=ordinals, **state)
            for rank in range(world)
        ]
        assert len({len(rank) for rank in ranks}) == 1  # else one rank would wait for the others for ever
        iterators = [iter(rank) for rank in ranks]
        for _ in range(len(ranks[0]) if last else min(steps, len(ranks[0]))):
            step = [next(iterator) for iterator in iterators]
            assert all(len(batch["sequence_id"]) == batch_size for batch in step)
            seen += [item for batch in step for item in batch["sequence_id"].tolist() if item >= 0]
        states = [rank.state for rank in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
        assert seen == expected[: state["consumed"]]
    assert seen == expected


def test_a_step_is_the_same_whatever_was_read_before(store):
    batches = store.batches(batch_size=3, seed=2)
    everything = list(batches)
    assert len(everything) == len(batches)
    for step in (3, 0, 2):
        for name, array in batches[step].items():
            assert np.array_equal(array, everything[step][name])
    for step in (-1, len(batches)):
        with pytest.raises(IndexError):
            batches[step]


def test_padding_rows_count_for_nothing(store, ids):
    ranks = [store.batches(batch_size=2, rank=rank, world_size=8) for rank in range(8)]
    batches = [list(rank) for rank in ranks]
    assert [len(each) for each in batches] == [1] * 8
    assert sorted(item for each in batches for item in taken(each)) == sorted(ids)
    [alone] = batches[7]  # 13 sequences are gone before its turn
    assert alone["sequence_id"].tolist() == [-1, -1]
    assert alone["input_ids"].shape == (2, 1)
    for name in ("attention_mask", "is_target", "has_knowledge"):
        assert not alone[name].any()


def test_batches_from_where_an_epoch_ended(store):
    batches = store.batches(batch_size=4)
    list(batches)
    assert batches.state == {"seed": 0, "epoch": 0, "consumed": 13, "snapshot": {"small": store.snapshot()}}
    assert list(store.batches(batch_size=4, **batches.state)) == []
    assert len(store.batches(consumed=99)) == 0
    assert list(store.batches(ordinals=np.array([], np.int64))) == []


def test_one_sequence_by_its_ordinal(store, folder):
    assert len(store) == 13
    expected = [*random_sequences(0, 1), *random_sequences(1, 7), *random_sequences(2, 5)]
    for ordinal, knowledge in enumerate(expected):
        for item in (ordinal, ordinal - 13, np.int64(ordinal)):
            assert store[item]["input_ids"].tolist() == knowledge["token_id"].tolist()
    for ordinal in (13, -14, 10**9):
        with pytest.raises(IndexError, match="has 13, counted from 0"):
            store[ordinal]
    assert [int(each["sequence_id"]) for each in store] == store.sequences()["sequence_id"].to_pylist()


def test_several_dumps_need_a_name(tmp_path):
    folder = write_store(tmp_path / "store", "first", shards=1)
    write_store(folder, "second", shards=2)
    store = KnowledgeStore.open(folder)
    assert store.dumps == ("first", "second")
    assert len(store) == 4 + 8
    for call in (store.batches, store.manifest, store.sequences, store.tokens, lambda: store[0]):
        with pytest.raises(InputError, match=r"name a dump .*first, second"):
            call()
    assert len(store["second", -1]["input_ids"]) == len(random_sequences(1, 4)[-1]["token_id"])
    assert len(taken(store.batches("second"))) == 8
    with pytest.raises(InputError, match="no dump 'third'"):
        store.batches("third")
    with pytest.raises(InputError, match="no dump 'third'"):
        store["third", 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"world_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"rank": 3, "world_size": 3},
        {"consumed": -1},
        {"kinds": ("dreams",)},
        {"ordinals": np.array([0, 13])},
        {"ordinals": np.array([-1])},
    ],
)
def test_impossible_batches_are_refused_at_once(store, wrong):
    with pytest.raises(InputError):
        store.batches(**wrong)


def test_a_dump_without_a_shard_has_no_batches(tmp_path):

    DumpWriter.open(tmp_path / "store", make_manifest(), tokens_table(words(11), words(11)))
    store = KnowledgeStore.open(tmp_path / "store")
    assert len(store) == 0
    with pytest.raises(InputError, match="no committed shard yet"):
        store.batches()
    assert store.sql("SELECT count(*) AS n FROM positions").to_pylist() == [{"n": 0}]
    assert store.sequences().num_rows == 0


def test_a_small_cache_changes_nothing(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("knowledge_store.reading.reader.MEMORY_BYTES", 1)
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 8 * 2048)
    expected = KnowledgeStore.open(folder)
    small = write_store(tmp_path / "small", shards=3, size=6)
    opened = KnowledgeStore.open(small)
    order = [17, 0, 9, 1, 16, 8, 0]
    for ordinal in order:
        meant = random_sequences(ordinal // 6, 6)[ordinal % 6]["token_id"]
        assert opened[ordinal]["input_ids"].tolist() == meant.tolist()
    assert taken(expected.batches(batch_size=3)) == taken(KnowledgeStore.open(folder).batches(batch_size=2))


@pytest.mark.parametrize("window", [1, 3, 100])
def test_blocks_decode_each_row_group_once_without_a_cache(tmp_path, monkeypatch, window):
    monkeypatch.setattr("knowledge_store.reading.reader.MEMORY_BYTES", 1)
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 16 * 2048)
    folder = write_store(tmp_path / "store", shards=4, size=9)
    opened = KnowledgeStore.open(folder, cache_size=0)
    decoded = []
    decode = DumpReader._decode
    monkeypatch.setattr(DumpReader, "_decode", lambda reader, *group: decoded.append(group) or decode(reader, *group))
    found = taken(opened.batches(batch_size=5, seed=2, order="blocks", window=window))
    assert sorted(found) == opened.sequences()["sequence_id"].to_pylist()
    assert len(decoded) == len(set(decoded)) > 8
    assert found != sorted(found)
    ranks = [opened.batches(batch_size=2, seed=2, order="blocks", window=window, rank=rank, world_size=3) for rank in range(3)]
    assert [item for step in zip(*ranks, strict=True) for batch in step for item in taken([batch])] == found
