"""Groups of answers: each whole, once an epoch, whatever the ranks, the batch size, the order and the interruptions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import assert_equal, served
from stores import make_manifest, write_group_store, write_store

from knowledge_store import KINDS, Field, InputError, Kind, KnowledgeStore, StoreError, verify
from knowledge_store.format.sequences import sequences_schema, split_sequence_id
from knowledge_store.kinds import check_kinds

SIZES = {
    "groups": ((2, 3, 2, 5), (4, 0, 2), (2, 2, 3, 2, 0, 6)),
    "others": ((2, 2, 2), (3, 2)),
}
COUNTS = {dump: sum(sum(size > 0 for size in of_shard) for of_shard in sizes) for dump, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two dumps of groups, in row groups of a few sequences, and one that has none."""
    folder = tmp_path_factory.mktemp("groups") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 1500)
        for seed, (dump, sizes) in enumerate(SIZES.items()):
            write_group_store(folder, dump, sizes, seed=10 * seed)
        write_store(folder, "plain")
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return KnowledgeStore.open(folder)


def groups_of(batch) -> list[tuple[int, list[int]]]:
    """The place of the dump and the sequence ids of each group of a batch, which stand one after the other."""
    dumps = batch.get("dump", np.zeros(len(batch["group"])))
    found: list[tuple[int, list[int]]] = []
    for row, group in enumerate(batch["group"].tolist()):
        if group < 0:
            assert batch["sequence_id"][row] == -1 and np.isnan(batch["score"][row])
            continue
        if group == len(found):
            found.append((int(dumps[row]), []))
        assert group == len(found) - 1 and found[-1][0] == dumps[row]
        found[-1][1].append(int(batch["sequence_id"][row]))
    return found


def expected_groups(store, dump, ordinals=None, **plan) -> list[tuple[int, list[int]]]:
    """The groups of an epoch the plain way: the first chosen sequences of all groups are read as sequences, one by one, and
    each stands for all that are chosen of its document."""
    names = [dump] if isinstance(dump, str) else list(dump)
    chosen = {}
    for name in names:
        ids = np.array(store.sequences(name)["sequence_id"].to_pylist())
        listed = (ordinals or {}).get(name, np.arange(len(ids)))
        by_document: dict[int, list[int]] = {}
        for ordinal in listed:
            by_document.setdefault(split_sequence_id(int(ids[ordinal]))[0], []).append(int(ordinal))
        chosen[name] = {min(members): ids[sorted(members)].tolist() for members in by_document.values()}
    firsts = {name: np.array(list(members)) for name, members in chosen.items()}
    by_id = [{members[0]: members for members in chosen[name].values()} for name in names]
    found = []
    for batch in store.batches(dump, batch_size=1, ordinals=firsts, **plan):
        place = int(batch["dump"][0]) if "dump" in batch else 0
        found.append((place, by_id[place][int(batch["sequence_id"][0])]))
    return found


def some_answers(store, dump, random) -> np.ndarray:
    """At least two answers of some groups, in any order."""
    documents = np.array(store.sequences(dump)["document"].to_pylist())
    found = []
    for document in np.unique(documents):
        members = np.flatnonzero(documents == document)
        if random.random() < 0.7:
            found += random.sample(members.tolist(), random.randint(2, len(members)))
    random.shuffle(found)
    return np.array(found, np.int64)


@settings(max_examples=40)
@given(
    legs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=3),
    dump=st.sampled_from(["groups", ["groups", "others"], {"others": 2.0, "groups": 1.0}]),
    order=st.sampled_from([{"order": "global"}, {"order": "blocks", "window": 2}, {"shuffle": False}]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
    random=st.none() | st.randoms(use_true_random=False),
)
def test_every_group_whole_and_once_interrupted_and_resumed_with_other_ranks(store, legs, dump, order, seed, epoch, random):
    """Each leg has a world size and a batch size of its own, and is interrupted; the last one ends the epoch."""
    ordinals = None if random is None else {"groups": some_answers(store, "groups", random)}
    if ordinals is not None and not len(ordinals["groups"]):
        return
    plan = {"ordinals": ordinals, **order}
    expected = expected_groups(store, dump, seed=seed, epoch=epoch, **plan)
    state = {"seed": seed, "epoch": epoch, "consumed": 0}
    seen: list[tuple[int, list[int]]] = []
    for number, (world, batch_size, steps) in enumerate(legs):
        ranks = [
            store.batches(dump, batch_size, groups=True, rank=rank, world_size=world, **plan, **state) for rank in range(world)
        ]
        assert {len(rank) for rank in ranks} == {-(-(len(expected) - state["consumed"]) // (world * batch_size))}
        iterators = [iter(rank) for rank in ranks]
        last = number == len(legs) - 1
        for _ in range(len(ranks[0]) if last else min(steps, len(ranks[0]))):
            for batch in map(next, iterators):
                found = groups_of(batch)
                assert len(found) + (batch["group"] < 0).sum() == batch_size
                seen += found
        assert all(rank.state == ranks[0].state for rank in ranks)
        state = ranks[0].state
        assert seen == expected[: state["consumed"]]
    assert seen == expected


def test_an_epoch_has_every_answer_and_its_score(store, folder):
    table = store.sequences("groups")
    scores = dict(zip(table["sequence_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    batches = store.batches("groups", 4, groups=True, seed=2)
    rows = [row for batch in batches for row in zip(batch["sequence_id"].tolist(), batch["score"].tolist(), strict=True)]
    found = {sequence: None if np.isnan(score) else score for sequence, score in rows if sequence >= 0}
    assert found == scores and set(scores.values()) == {None, 1.0, 0.0}
    assert batches.sequences == {"groups": COUNTS["groups"]} and len(batches.order) == COUNTS["groups"]
    for batch in batches:
        assert batch["group"].dtype == np.int64 and batch["score"].dtype == np.float64
        assert len(batch["group"]) == len(batch["score"]) == len(batch["input_ids"])
    ordinary = [row for batch in store.batches("groups", 4) for row in batch["sequence_id"].tolist() if row >= 0]
    assert sorted(ordinary) == sorted(scores)


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_arrays_are_those_of_the_sequences(store, folder, order):
    """From the decoded cache, too, and without one."""
    ids = store.sequences("groups")["sequence_id"].to_pylist()
    plan = {"batch_size": 3, "groups": True, "seed": 4, "order": order, "window": 2}
    decoded = KnowledgeStore.open(folder, cache_size=0).batches("groups", **plan)
    for batch, other in zip(store.batches("groups", **plan), decoded, strict=True):
        assert_equal(batch, other)
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            length = int(batch["attention_mask"][row].sum())
            if sequence >= 0:
                alone = store["groups", ids.index(sequence)]["candidate_logprobs"]
                assert np.array_equal(batch["candidate_logprobs"][row, :length], alone)


@pytest.mark.parametrize(("batch_size", "world"), [(4, 1), (2, 2), (1, 4), (1, 1)])
def test_groups_of_like_lengths(store, batch_size, world):
    """A step has the same groups for any cut, by their longest answers."""
    plan = {"groups": True, "group_by_length": 8, "global_batch": 4, "seed": 1}
    dumps = ["groups", "others"]
    whole = [sorted(groups_of(batch)) for batch in store.batches(dumps, 4, **plan)]
    ranks = [store.batches(dumps, batch_size, rank=rank, world_size=world, **plan) for rank in range(world)]
    accumulated = 4 // (batch_size * world)
    parts = [[groups_of(rank[step]) for rank in ranks] for step in range(len(ranks[0]))]
    found = [
        sorted(group for step in parts[first : first + accumulated] for of_rank in step for group in of_rank)
        for first in range(0, len(parts), accumulated)
    ]
    assert found == whole and sum(map(len, whole)) == sum(COUNTS.values())
    [batches] = [store.batches(dumps, 4, **plan)]
    for batch in batches:
        lengths = batch["attention_mask"].sum(axis=1)
        longest = [lengths[batch["group"] == group].max() for group in range(len(groups_of(batch)))]
        assert longest == sorted(longest, reverse=True)
    masks = [batch["attention_mask"] for batch in batches]
    padded = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
    assert batches.padding_share() == pytest.approx(padded)


def test_a_batch_of_padding_alone(store):
    [batch] = store.batches("others", 2, groups=True, rank=3, world_size=4)
    assert batch["group"].tolist() == batch["sequence_id"].tolist() == [-1, -1]
    assert batch["input_ids"].shape == (2, 1) and not batch["attention_mask"].any() and np.isnan(batch["score"]).all()


def test_several_teachers_of_one_corpus(store, tmp_path):
    write_group_store(tmp_path / "store", "one", SIZES["groups"])
    write_group_store(tmp_path / "store", "two", SIZES["groups"])
    opened = KnowledgeStore.open(tmp_path / "store")
    batches = opened.batches(batch_size=3, groups=True, teachers={"one": 1.0, "two": 3.0}, seed=5)
    found = [group for batch in batches for group in groups_of(batch)]
    assert found == expected_groups(store, "groups", seed=5)
    for batch in batches:
        assert batch["teacher_weights"].shape == (len(batch["group"]), 2)
        assert np.array_equal(batch["1/candidate_ids"], batch["candidate_ids"])


@pytest.mark.parametrize("plan", [{"seed": 3}, {"order": "blocks", "window": 1}, {"group_by_length": 4, "global_batch": 2}])
def test_a_served_store_gives_the_same(store, folder, plan):
    with served(folder) as where, where.open() as remote:
        for dump in ("groups", ["groups", "others"]):
            here, there = (opened.batches(dump, 2, groups=True, **plan) for opened in (store, remote))
            for one, other in zip(here, there, strict=True):
                assert_equal(one, other)


@pytest.mark.parametrize(
    ("dump", "plan", "reason"),
    [
        ("plain", {}, "dump 'plain' has no groups"),
        (["groups", "plain"], {}, "dump 'plain' has no groups"),
        ("groups", {"ordinals": np.array([0, 1, 2, 5])}, "of 2 of the 3 groups of dump 'groups' fewer than two answers"),
        ("groups", {"ordinals": np.array([0, 1, 0])}, "more than once"),
    ],
)
def test_what_are_no_groups_is_refused(store, dump, plan, reason):
    with pytest.raises(InputError, match=reason):
        store.batches(dump, groups=True, **plan)


def test_row_groups_hold_whole_groups(store):
    documents = store.sequences("groups")["document"].to_numpy()
    firsts = store._readers.of_dump("groups").row_groups
    assert len(firsts) > 8 and all(documents[first] != documents[first - 1] for first in firsts[1:-1])


def test_a_group_of_one_answer_and_scores_without_a_number_are_damage(tmp_path):
    assert verify(write_group_store(tmp_path / "sound")).sound
    [damage] = verify(write_group_store(tmp_path / "one", sizes=((1, 2),))).damage
    assert "sequences/00000.parquet has a group of one answer" in damage


def test_a_corpus_keeps_a_score_of_its_own():
    plan = {"max_length": 64, "groups": True}
    own = {"score": "int64", "Score": "string", "corpus_score": "bool"}
    names = sequences_schema(make_manifest(columns=own, plan=plan)).names[10:]
    assert sorted(names) == ["corpus_Score", "corpus_corpus_score", "corpus_score_2", "score"] and names[0] == "score"
    assert sequences_schema(make_manifest(columns={"score": "int64"})).names[10:] == ["score"]


def test_a_kind_may_not_have_the_arrays_of_groups(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "marks", Kind("marks", "sequence", lambda manifest: (Field("score", pa.float32()),)))
    check_kinds(make_manifest(kinds=("positions", "marks")), "store")
    with pytest.raises(StoreError, match="'score' is reserved"):
        check_kinds(make_manifest(kinds=("positions", "marks"), plan={"max_length": 64, "groups": True}), "store")
