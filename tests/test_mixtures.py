"""Several dumps read as one corpus, with weights, and several teachers of one corpus."""

from __future__ import annotations

import copy
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import commit, drawn_sequences, knowledge_of, make_manifest, random_sequences, words, write_store

from knowledge_store import DumpWriter, InputError, KnowledgeStore
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reading.order import CHUNK, EpochOrder, InOrder, Shuffled, divided, epoch_shares
from knowledge_store.reading.ordinals import AllBut
from knowledge_store.reading.target_mask import TargetMask

SIZES = {"a": 8, "b": 12, "c": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Three dumps of 8, 12 and 5 sequences, with 3, 5 and 3 candidates."""
    folder = tmp_path_factory.mktemp("mixtures") / "store"
    write_store(folder, "a", shards=2, size=4, seed=0)
    write_store(folder, "b", shards=3, size=4, seed=10, k=5)
    write_store(folder, "c", shards=1, size=5, seed=20)
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return KnowledgeStore.open(folder)


def pairs(batches) -> list[tuple[int, int]]:
    """The dump and sequence of every row that is no padding."""
    rows = [zip(batch["dump"].tolist(), batch["sequence_id"].tolist(), strict=True) for batch in batches]
    return [pair for batch in rows for pair in batch if pair[1] >= 0]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


# --- the order ----------------------------------------------------------------------------------------------------------


@given(shares=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any))
def test_shares_are_divided_evenly_and_in_turn(shares):
    total = sum(shares)
    places, within = divided(np.arange(total), shares)
    for place, share in enumerate(shares):
        slots = np.flatnonzero(places == place)
        assert within[slots].tolist() == list(range(share))
    if len(shares) == 2:  # nowhere more than one away from its share
        counts = np.cumsum(places == 0)
        assert (np.abs(counts - np.arange(1, total + 1) * shares[0] / total) <= 1).all()


@given(
    counts=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 10**6), min_size=2),
    weights=st.lists(st.floats(0.01, 1e6), min_size=5, max_size=5),
)
def test_shares_of_weights_are_those_of_largest_remainders(counts, weights):
    weighted = dict(zip(counts, weights, strict=False))
    exact = [Fraction(repr(weight)) for weight in weighted.values()]
    total, whole = sum(counts.values()), sum(exact)
    quotas = [total * weight / whole for weight in exact]
    try:
        shares = epoch_shares(counts, weighted)
    except InputError:
        assert min(quotas) < 1
        return
    assert sum(shares) == total
    gains = [share - int(quota) for share, quota in zip(shares, quotas, strict=True)]
    assert set(gains) <= {0, 1}
    up = [quota - int(quota) for quota, gain in zip(quotas, gains, strict=True) if gain]
    down = [quota - int(quota) for quota, gain in zip(quotas, gains, strict=True) if not gain]
    assert not up or not down or min(up) >= max(down)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    epochs=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_each_permutation_of_a_dump_has_each_sequence_once(sizes, weights, epochs, seed):
    counts = {str(place): size for place, size in enumerate(sizes)}
    try:
        shares = epoch_shares(counts, {str(place): float(weights[place]) for place in range(len(sizes))})
    except InputError:
        return
    streams = [Shuffled(AllBut(size), seed, place) for place, size in enumerate(sizes)]
    read: list[list[int]] = [[] for _ in sizes]
    for epoch in range(epochs):
        order = EpochOrder(streams, shares, seed, epoch)
        assert len(order) == sum(sizes)
        places, ordinals = order.items(0, len(order) + 10)
        assert [int((places == place).sum()) for place in range(len(sizes))] == shares
        for place, ordinal in zip(places.tolist(), ordinals.tolist(), strict=True):
            read[place].append(ordinal)
        start, stop = sum(sizes) // 3, sum(sizes) // 2
        part = order.items(start, stop)
        assert np.array_equal(part[0], places[start:stop]) and np.array_equal(part[1], ordinals[start:stop])
    for size, ordinals in zip(sizes, read, strict=True):
        for first in range(0, len(ordinals), size):
            part = ordinals[first : first + size]
            assert len(set(part)) == len(part)


def test_an_order_of_many_chunks_is_that_of_its_slots():
    streams = [InOrder(AllBut(3000)), Shuffled(AllBut(500), 1, 1), Shuffled(AllBut(70), 1, 2)]
    order = EpochOrder(streams, [3000, 500, 70], 1, 2)
    places, ordinals = order.items(0, len(order))
    assert ordinals[places == 0].tolist() == list(range(3000))
    for start, stop in ((0, 1), (CHUNK - 3, CHUNK + 5), (2 * CHUNK, 3 * CHUNK + 1), (3500, 9999)):
        found = order.items(start, stop)
        assert np.array_equal(found[0], places[start:stop]) and np.array_equal(found[1], ordinals[start:stop])
    assert all(len(found) == 0 for found in order.items(3570, 3600))
    evenness = np.abs(np.cumsum(places == 1) - np.arange(1, 3571) * 500 / 3570)
    assert evenness.max() < 60  # it does not drift


# --- dumps --------------------------------------------------------------------------------------------------------------


def test_all_of_each_dump_once_without_weights(store):
    batches = store.batches(["c", "a", "b"], batch_size=4, seed=1)
    found = pairs(batches)
    assert batches.shares == batches.sequences == {"c": 5, "a": 8, "b": 12}
    expected = {
        (place, number) for place, dump in enumerate("cab") for number in store.sequences(dump)["sequence_id"].to_pylist()
    }
    assert len(found) == 25 and set(found) == expected
    assert found != pairs(store.batches(["c", "a", "b"], batch_size=4, seed=2))
    assert Counter(place for place, _ in found[:12]).keys() == {0, 1, 2}


def test_rows_are_those_of_their_dump(store):
    ids = {dump: store.sequences(dump)["sequence_id"].to_pylist() for dump in SIZES}
    widths = set()
    for batch in store.batches(["a", "b"], batch_size=3, seed=1):
        widths.add(batch["candidate_ids"].shape[2])
        for row, (place, number) in enumerate(zip(batch["dump"].tolist(), batch["sequence_id"].tolist(), strict=True)):
            if number < 0:
                assert place == -1
                continue
            dump = "ab"[place]
            alone = store[dump, ids[dump].index(number)]
            length, k = alone["candidate_ids"].shape
            assert np.array_equal(batch["input_ids"][row, :length], alone["input_ids"])
            assert np.array_equal(batch["candidate_logprobs"][row, :length, :k], alone["candidate_logprobs"])
            assert np.isneginf(batch["candidate_logprobs"][row, :, k:]).all()
    assert 5 in widths


def test_in_order_is_one_dump_after_the_other(store):
    found = pairs(store.batches(["b", "c"], batch_size=4, shuffle=False))
    expected = [(0, number) for number in store.sequences("b")["sequence_id"].to_pylist()]
    assert found == expected + [(1, number) for number in store.sequences("c")["sequence_id"].to_pylist()]


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_one_dump_with_a_weight_is_that_dump(store, order):
    state = store.batches("b", batch_size=5, seed=3, order=order).state
    plain = list(store.batches("b", batch_size=5, seed=3, order=order))
    for named in ({"b": 1}, {"b": 0.25}, ["b"]):
        batches = store.batches(named, batch_size=5, seed=3, order=order)
        assert batches.state == state
        for one, other in zip(batches, plain, strict=True):
            assert_same(one, other)
    assert "dump" not in plain[0]


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_weights_are_shares_that_go_on_in_the_next_epoch(store, order):
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for epoch in range(5):
        batches = store.batches(weights, batch_size=4, seed=2, epoch=epoch, order=order, window=1)
        assert batches.shares == {"a": 18, "b": 5, "c": 2}
        for place, number in pairs(batches):
            read[place].append(number)
    for place, dump in enumerate(weights):
        numbers = read[place]
        assert len(numbers) == 5 * [18, 5, 2][place]
        passes = [numbers[first : first + SIZES[dump]] for first in range(0, len(numbers), SIZES[dump])]
        assert all(len(set(each)) == len(each) for each in passes)
        assert passes[0] != passes[1]


@settings(max_examples=40, deadline=None)
@given(
    legs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    order=st.sampled_from(["global", "blocks"]),
    weights=st.none() | st.tuples(*[st.integers(1, 9)] * 3),
)
def test_a_mixture_interrupted_and_resumed_with_other_ranks(store, legs, seed, epoch, order, weights):
    named = list("abc") if weights is None else dict(zip("abc", weights, strict=True))
    options = {"order": order, "window": 1}
    expected = pairs(store.batches(named, batch_size=1, seed=seed, epoch=epoch, **options))
    state = {"seed": seed, "epoch": epoch, "consumed": 0}
    seen: list[tuple[int, int]] = []
    for number, (world, batch_size, steps) in enumerate(legs):
        last = number == len(legs) - 1
        ranks = [
            store.batches(named, batch_size=batch_size, rank=rank, world_size=world, **options, **state)
            for rank in range(world)
        ]
        iterators = [iter(rank) for rank in ranks]
        for _ in range(len(ranks[0]) if last else min(steps, len(ranks[0]))):
            seen += pairs(next(iterator) for iterator in iterators)
        state = ranks[0].state
        assert all(rank.state == state for rank in ranks)
        assert seen == expected[: state["consumed"]]
    assert seen == expected


def test_some_sequences_of_each_dump(store):
    ids = {dump: store.sequences(dump)["sequence_id"].to_pylist() for dump in SIZES}
    chosen = {"a": np.array([1, 6, 2]), "b": AllBut(12, np.array([0, 5, 11]))}
    for order in ("global", "blocks"):
        found = pairs(store.batches(list("abc"), ordinals=chosen, order=order, window=2, seed=4))
        expected = [(0, ids["a"][ordinal]) for ordinal in (1, 6, 2)]
        expected += [(1, ids["b"][ordinal]) for ordinal in range(12) if ordinal not in (0, 5, 11)]
        assert sorted(found) == sorted(expected + [(2, number) for number in ids["c"]])


def test_chosen_targets(store):
    lengths = store.sequences("b")["length"].to_numpy()
    mask = TargetMask.empty(lengths)
    mask.choose(np.arange(12), np.ones(12, np.int64))
    for batch in store.batches(["a", "b"], batch_size=4, targets={"b": mask}):
        plain = np.arange(batch["is_target"].shape[1]) > 0
        of_b = batch["dump"] == 1
        assert (batch["is_target"].sum(axis=1)[of_b] == 1).all() and batch["is_target"][of_b, 1].all()
        of_a = batch["dump"] == 0
        assert np.array_equal(batch["is_target"][of_a], batch["attention_mask"][of_a] & plain)
    with pytest.raises(InputError, match="those of another dump"):
        store.batches("a", batch_size=4, targets={"a": TargetMask.empty(lengths[:8] + 1)})[0]


def test_what_is_taken_of_dumps_that_keep_other_things(store, tmp_path):
    folder = write_store(tmp_path / "store", "plain")
    selection = {"name": "top-k", "k": 3, "draw_weight": 0.0625, "draw_seed": 0}
    manifest = make_manifest("drawn", selection=selection, calibration={"temperature": 2.0, "sha256": "00"})
    writer = DumpWriter.open(folder, manifest, tokens_table(words(11), words(11)))
    commit(writer, 0, drawn_sequences(0, 3))
    batches = KnowledgeStore.open(folder).batches(["plain", "drawn"], batch_size=4)
    assert not {"tail_ids", "draw_weight", "tail_logsumexp"} & batches[0].keys()
    assert batches.taken.left_out == dict.fromkeys(("tail_ids", "draw_weight", "tail_logsumexp"), ("plain",))
    assert {
        "plain keeps no draws and drawn keeps draws of weight 0.0625",
        "of positions, the calibration temperature is 2.0 in drawn, and plain has none",
    } <= {*batches.taken.differences}
    batches = KnowledgeStore.open(folder).batches(["drawn", "plain"], batch_size=4)
    assert "drawn keeps draws of weight 0.0625 and plain keeps none" in batches.taken.differences
    assert not any("None" in difference for difference in batches.taken.differences)
    assert store.batches(["a", "c"]).taken.differences == ()
    assert store.batches(["a", "b"]).taken.differences == ("the selection of positions is top-k 3 in a and top-k 5 in b",)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"a": 0}, "weight of the dump a is 0: give a finite number above 0"),
        ({"a": 1, "b": -1.0}, "weight of the dump b is -1.0"),
        ({"a": float("nan"), "b": 1}, "weight of the dump a is nan"),
        ({"a": float("inf"), "b": 1}, "weight of the dump a is inf"),
        ({"a": 1e9, "b": 1}, "weight 1 of the dump b is less than one of the 20 sequences"),
        ({}, "no dump is named"),
        ([], "no dump is named"),
        (["a", "b", "a"], "dump a is named twice"),
        (["a", "z"], "no dump 'z'"),
        ({"a": 1, "z": 1}, "no dump 'z'"),
    ],
)
def test_dumps_that_cannot_be_read(store, named, message):
    with pytest.raises(InputError, match=message):
        store.batches(named)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"ordinals": np.arange(3)}, "do not say of which dump"),
        ({"ordinals": {"z": np.arange(3)}}, "ordinals of 'z', which is not one of the dumps: a, b"),
        ({"ordinals": {"a": np.array([8])}}, "the dump has 8"),
        ({"ordinals": {"a": AllBut(7)}}, "a dump of 7 sequences, and the dump has 8"),
        ({"targets": {"z": None}}, "targets are chosen of 'z'"),
        ({"order": "rows"}, "no order 'rows': use global or blocks"),
        ({"window": 0}, "at least 1 row group"),
        ({"epoch": -1}, "no epoch -1"),
        ({"teachers": {"c": 1}}, "dumps or teachers, not both"),
        ({"snapshot": {"a": 1}}, "begun with a, and not with a, b"),
    ],
)
def test_plans_that_cannot_be_read(store, plan, message):
    with pytest.raises(InputError, match=message):
        store.batches(["a", "b"], **plan)


def test_a_dump_that_has_grown_is_refused_by_name(tmp_path):
    folder = write_store(tmp_path / "store", "a")
    writer = DumpWriter.open(folder, make_manifest("b"), tokens_table(words(11), words(11)))
    commit(writer, 0, random_sequences(0, 3))
    state = KnowledgeStore.open(folder).batches(["a", "b"]).state
    assert len(list(KnowledgeStore.open(folder).batches(["a", "b"], **state))) == 2
    commit(writer, 1, random_sequences(1, 3))
    with pytest.raises(InputError, match="dump 'b' has other sequences than when this order was begun"):
        KnowledgeStore.open(folder).batches(["a", "b"], **state)


def test_other_vocabularies_are_refused(tmp_path):
    folder = write_store(tmp_path / "store", "a")
    other = words(11)
    other[4] = "other"
    writer = DumpWriter.open(folder, make_manifest("b"), tokens_table(other, other))
    commit(writer, 0, random_sequences(0, 3))
    larger = DumpWriter.open(folder, make_manifest("c", 12), tokens_table(words(12), words(12)))
    commit(larger, 0, random_sequences(0, 3))
    padded = DumpWriter.open(folder, make_manifest("d", 13), tokens_table([*words(11), None, None], [*words(11), None, None]))
    commit(padded, 0, random_sequences(0, 3))
    store = KnowledgeStore.open(folder)
    with pytest.raises(InputError, match=r"'a' and 'b' are of different vocabularies: token 4 is 'w4' .* and 'other'"):
        store.batches(["a", "b"])
    with pytest.raises(InputError, match="one has 11 tokens and the other 12"):
        store.batches(["a", "c"])
    assert len(pairs(store.batches(["a", "d"]))) == 11  # rows of a head that stand for no token


# --- teachers -----------------------------------------------------------------------------------------------------------


def teacher_of(folder, dump: str, texts: dict[int, list[np.ndarray]], seed: int, k: int = 3, **changes) -> None:
    """A dump of another teacher of given token ids, by shard."""
    random = np.random.default_rng(seed)
    writer = DumpWriter.open(folder, make_manifest(dump, k=k, shards=3, **changes), tokens_table(words(11), words(11)))
    for shard, tokens in texts.items():
        commit(writer, shard, [knowledge_of(ids, random.normal(0, 2, (len(ids), 11)), k) for ids in tokens])


@pytest.fixture(scope="module")
def corpus() -> dict[int, list[np.ndarray]]:
    """The token ids of three shards."""
    random = np.random.default_rng(5)
    return {shard: [random.integers(0, 11, n) for n in random.integers(2, 9, size)] for shard, size in enumerate((4, 3, 5))}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, corpus):
    """Three teachers: the second has committed two shards, and the third has others, with one sequence that differs."""
    folder = tmp_path_factory.mktemp("teachers") / "store"
    teacher_of(folder, "big", corpus, 1)
    teacher_of(folder, "coder", {shard: corpus[shard] for shard in (0, 2)}, 2, k=5)
    altered = copy.deepcopy({shard: corpus[shard] for shard in (1, 2)})
    altered[2][1] = (altered[2][1] + 1) % 11
    teacher_of(folder, "small", altered, 3)
    return KnowledgeStore.open(folder)


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_teachers_of_the_same_sequences(teachers, order):
    batches = teachers.batches(teachers={"big": 3, "coder": 1}, batch_size=4, order=order, window=1)
    assert batches.lacking == {"big": 0, "coder": 3} and batches.sequences == {"big": 9}
    assert batches.state["snapshot"].keys() == {"big", "coder"}
    ids = {dump: teachers.sequences(dump)["sequence_id"].to_pylist() for dump in ("big", "coder")}
    seen = []
    for batch in batches:
        assert batch["teacher_weights"].tolist() == [[0.75, 0.25]] * 4 and batch["teacher_weights"].dtype == np.float32
        assert batch["1/candidate_ids"].shape[2] == 5 and "1/input_ids" not in batch and "1/is_target" not in batch
        for row, number in enumerate(batch["sequence_id"].tolist()):
            if number < 0:
                assert np.isneginf(batch["1/candidate_logprobs"][row]).all()
                continue
            seen.append(number)
            first, second = (teachers[dump, ids[dump].index(number)] for dump in ("big", "coder"))
            length = len(first["input_ids"])
            assert np.array_equal(first["input_ids"], second["input_ids"])
            assert np.array_equal(batch["candidate_ids"][row, :length], first["candidate_ids"])
            assert np.array_equal(batch["1/candidate_ids"][row, :length], second["candidate_ids"])
            assert np.array_equal(batch["1/tail_logprob"][row, :length], second["tail_logprob"])
    assert sorted(seen) == ids["coder"]


def test_what_a_teacher_lacks_is_left_out_and_counted(teachers):
    batches = teachers.batches(teachers={"big": 1, "coder": 1, "small": 2}, batch_size=3)
    assert batches.lacking == {"big": 1, "coder": 3, "small": 5}  # the sequence with other tokens is lacking in both
    numbers = [number for batch in batches for number in batch["sequence_id"].tolist() if number >= 0]
    of_shard = teachers.sequences("big")["sequence_id"].to_pylist()[7:]
    assert sorted(numbers) == [number for place, number in enumerate(of_shard) if place != 1]
    assert {"1/candidate_ids", "2/candidate_ids"} <= batches[0].keys()
    lacking, left_out = teachers.lacking(["big", "coder", "small"])
    assert lacking == batches.lacking and left_out.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    batches = teachers.batches("coder", teachers={"coder": 1, "big": 1}, ordinals={"coder": np.array([8, 0, 3])}, shuffle=False)
    assert batches.lacking == {"coder": 3, "big": 0}
    numbers = [number for batch in batches for number in batch["sequence_id"].tolist() if number >= 0]
    assert numbers == [teachers.sequences("coder")["sequence_id"].to_pylist()[ordinal] for ordinal in (8, 0, 3)]


def test_one_teacher_is_that_dump(teachers):
    plain = teachers.batches("big", batch_size=3)
    for one, other in zip(teachers.batches(teachers={"big": 5}, batch_size=3), plain, strict=True):
        assert one.pop("teacher_weights").tolist() == [[1]] * 3
        assert_same(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {"files": [{"name": "numbers.jsonl", "bytes": 1, "sha256": "11"}]}}, "the SHA-256 of corpus file 1 is 00"),
        ({"plan": {"max_length": 32}}, "the plan's max length is 64 in the first and 32 in the second"),
        ({"tokenizer": {"size": 11, "bos_token_id": 1}}, "the tokenizer's bos token id is None in the first and 1"),
    ],
)
def test_teachers_of_another_corpus_are_refused(tmp_path, corpus, changes, message):
    teacher_of(tmp_path / "store", "big", corpus, 1)
    teacher_of(tmp_path / "store", "other", corpus, 2, **changes)
    store = KnowledgeStore.open(tmp_path / "store")
    with pytest.raises(InputError, match=f"not two teachers of one corpus: {message}"):
        store.batches(teachers={"big": 1, "other": 1})


def test_teachers_with_nothing_in_common(tmp_path, corpus):
    teacher_of(tmp_path / "store", "big", {0: corpus[0]}, 1)
    teacher_of(tmp_path / "store", "other", {1: corpus[1]}, 2)
    store = KnowledgeStore.open(tmp_path / "store")
    with pytest.raises(InputError, match="no sequence in common"):
        store.batches(teachers={"big": 1, "other": 1})


@pytest.mark.parametrize(
    ("named", "message"),
    [({}, "no teacher is named"), ({"big": 0}, "weight of the teacher big is 0"), ({"big": 1, "z": 1}, "no dump 'z'")],
)
def test_teachers_that_cannot_be_read(teachers, named, message):
    with pytest.raises(InputError, match=message):
        teachers.batches(teachers=named)
