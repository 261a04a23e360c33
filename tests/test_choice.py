"""Choosing what to train on by SQL: sequences by a query, targets by a condition, and what is refused of both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_storage import MemoryStorage
from stores import DOCUMENTS, write_store

from knowledge_store import InputError, KnowledgeStore, QueryError, sequence_id
from knowledge_store.errors import QueryLimitError
from knowledge_store.reading.target_mask import TargetMask


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> KnowledgeStore:
    """Two dumps of eight sequences in two shards each."""
    folder = tmp_path_factory.mktemp("choice")
    write_store(folder, "small")
    write_store(folder, "other", seed=9)
    return KnowledgeStore.open(folder)


def targets_where(store: KnowledgeStore, met) -> list[list[bool]]:
    """Of each sequence of `small`, which positions are targets that meet a condition on its arrays."""
    sequences = [store["small", ordinal] for ordinal in range(store.sequence_count("small"))]
    return [(arrays["is_target"] & met(arrays)).tolist() for arrays in sequences]


def chosen_targets(store: KnowledgeStore, condition: str) -> list[list[bool]]:
    mask = store.choose_targets(condition, "small").masks["small"]
    return [mask.positions(ordinal).tolist() for ordinal in range(len(mask))]


def test_a_query_chooses_sequences_by_dump(store):
    chosen = store.choose_sequences("SELECT dump, sequence_id FROM sequences WHERE length > 4", ["small", "other"])
    for name in ("small", "other"):
        lengths = store.sequences(name)["length"].to_numpy()
        assert chosen.ordinals[name].tolist() == np.flatnonzero(lengths > 4).tolist()
        assert chosen.ordinals[name].dtype == np.int64
    assert chosen.count == sum(map(len, chosen.ordinals.values()))


def test_the_hash_is_that_of_the_ids_and_not_of_the_query(store):
    first = store.choose_sequences("SELECT dump, sequence_id FROM sequences WHERE dump = 'small' AND document < 2", "small")
    second = store.choose_sequences(
        "SELECT sequence_id, dump FROM sequences WHERE document IN (1, 0) AND dump = 'small' ORDER BY 1 DESC;", "small"
    )
    third = store.choose_sequences("SELECT dump, sequence_id FROM sequences WHERE dump = 'small' AND document = 0", "small")
    assert first.ordinals["small"].tolist() == second.ordinals["small"].tolist() == [0, 1]
    assert first.sha256 == second.sha256 != third.sha256


def test_ids_alone_will_do_in_a_store_of_one_dump(tmp_path):
    store = KnowledgeStore.open(write_store(tmp_path))
    query = f"SELECT sequence_id FROM positions JOIN shards USING (dump) WHERE dump = 'small' AND document >= {DOCUMENTS}"
    query = query.replace("document", "sequence_id").replace(str(DOCUMENTS), str(sequence_id(DOCUMENTS, 0)))
    chosen = store.choose_sequences(query.replace("SELECT", "SELECT DISTINCT"), "small")
    assert chosen.ordinals["small"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("SELECT dump, sequence_id FROM positions WHERE dump = 'small'", "8 sequences .* more than once, the first of them 0:"),
        ("SELECT dump, sequence_id FROM sequences WHERE false", "gives no sequence"),
        ("SELECT * FROM sequences", "it gives dump, sequence_id, document"),
        ("SELECT dump FROM sequences", "it gives dump: write"),
        ("SELECT dump, document, sequence_id FROM sequences", "no others"),
        ("SELECT dump, token_hash::VARCHAR AS sequence_id FROM sequences", "sequence_id of the query is of type string"),
        ("SELECT 1 AS dump, sequence_id FROM sequences", "dump of the query is of type int32"),
        ("SELECT dump, nullif(sequence_id, 0) AS sequence_id FROM sequences WHERE dump = 'small'", "is null"),
        ("SELECT dump, sequence_id FROM sequences", "the dump 'other', which is not among"),
        ("SELECT dump, sequence_id + 1 AS sequence_id FROM sequences WHERE dump = 'small'", "has no sequence 1:"),
        ("SELECT dump, sequence_id FROM sequences WHERE lenght > 4", 'Candidate bindings: "length"'),
        ("DELETE FROM sequences", "only a SELECT"),
    ],
)
def test_what_is_no_choice_of_sequences_is_refused(store, query, error):
    with pytest.raises((InputError, QueryError), match=error) as raised:
        store.choose_sequences(query, "small")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dumps", ["small", ["small", "other"]])
def test_ids_alone_are_refused_where_they_may_be_another_dumps(store, dumps):
    query = "SELECT sequence_id FROM sequences WHERE dump = 'other'"  # `small` has the same ids
    with pytest.raises(QueryError, match="since the store has several dumps"):
        store.check_choice(query, None, dumps)
    with pytest.raises(QueryError, match="since the store has several dumps"):
        store.choose_sequences(query, dumps)


@pytest.mark.parametrize("query", ["length > 4", "", "DELETE FROM sequences"])
def test_what_is_no_statement_is_told_how_to_write_one(store, query):
    with pytest.raises(QueryError, match="is no SELECT statement: write it as SELECT dump, sequence_id FROM sequences WHERE"):
        store.check_choice(query, None, "small")


@pytest.mark.parametrize("query", ["(SELECT {})", "WITH a AS (SELECT {}) FROM a", "-- all\nSELECT {}", "select {};"])
def test_a_statement_may_begin_in_other_ways(store, query):
    store.check_choice(query.format("dump, sequence_id FROM sequences"), None, "small")


def test_a_choice_that_needs_more_than_its_limits_says_what_to_do(store):
    query = "SELECT dump, sequence_id FROM sequences, range(100000000000) WHERE dump = 'small' GROUP BY ALL HAVING count(*) > 1"
    with pytest.raises(QueryLimitError, match=r"not been answered after 0.5 s.*ask for less.*choose_sequences"):
        store.choose_sequences(query, "small", timeout=0.5)


def test_a_store_that_no_other_process_opens_says_what_to_do():
    storage = MemoryStorage()
    write_store(storage)
    with pytest.raises(InputError, match="give `ordinals`"):
        KnowledgeStore.open(storage).choose_sequences("SELECT sequence_id FROM sequences")


def test_a_condition_on_positions_chooses_targets(store):
    expected = targets_where(store, lambda arrays: np.exp(arrays["tail_logprob"]) > 0.05)
    assert any(map(any, expected))
    assert chosen_targets(store, "exp(tail_logprob) > 0.05 -- of the tail") == expected


def test_a_condition_on_candidates_is_met_by_any_of_them(store):
    expected = targets_where(store, lambda arrays: (arrays["candidate_ids"] == 3).any(axis=1))
    assert chosen_targets(store, "Candidates.token_id = 3") == expected
    expected = targets_where(store, lambda arrays: (arrays["candidate_logprobs"][:, 0] < -0.7) & (arrays["input_ids"] > 4))
    assert chosen_targets(store, "rank = 1 AND logprob < -0.7 AND token_id > 4") == expected


def test_a_condition_may_ask_the_store_and_rank_targets(store):
    losses = np.concatenate([arrays["token_logprob"][1:] for arrays in (store["small", n] for n in range(8))])
    middle = np.quantile(losses, 0.5)
    condition = "token_logprob < (SELECT quantile_cont(token_logprob, 0.5) FROM positions WHERE dump = 'small' AND is_target)"
    assert chosen_targets(store, condition) == targets_where(store, lambda arrays: arrays["token_logprob"] < middle)
    mask = store.choose_targets("rank() OVER (PARTITION BY sequence_id ORDER BY position) = 1", "small").masks["small"]
    assert mask.counts().tolist() == [1] * 8


def test_what_is_chosen_is_counted_and_hashed_by_dump(store):
    chosen = store.choose_targets("token_id < 5", ["small", "other"])
    for name, mask in chosen.masks.items():
        lengths = store.sequences(name)["length"].to_numpy()
        assert np.diff(mask.offsets).tolist() == lengths.tolist()
        assert chosen.targets[name].tolist() == (lengths - 1).tolist()
        assert mask.counts().tolist() == [int(mask.positions(ordinal).sum()) for ordinal in range(len(mask))]
    assert chosen.sha256 == store.choose_targets("NOT token_id >= 5", ["small", "other"]).sha256
    assert chosen.sha256 != store.choose_targets("token_id < 6", ["small", "other"]).sha256


@pytest.mark.parametrize(
    ("condition", "error"),
    [
        ("", "the condition is empty"),
        ("false", "no target of small meets"),
        ("tail_logprob", "value is of type float"),
        ("NULL", "value is of type null"),
        ("is_target, true", "is no condition"),
        ("true) AS chosen, (true", "not one expression"),
        ("token_logprb > 1", 'Candidate bindings: "token_logprob"'),
        ("tail_logprob >", "does not parse"),
        ("'", "does not parse"),
        ("avg(tail_logprob) > 0", "GROUP BY"),
        ("true; SELECT 1", "does not parse"),
    ],
)
def test_what_is_no_condition_is_refused(store, condition, error):
    with pytest.raises((InputError, QueryError), match=error) as raised:
        store.check_choice(None, condition, "small")
        store.choose_targets(condition, "small")
    assert "\n" not in str(raised.value)


def test_what_is_no_truth_value_chooses_nothing(store):
    with pytest.raises(QueryError, match="value is of type float"):
        store.choose_targets("tail_logprob", "small")
    with pytest.raises(QueryError, match="not one expression"):
        store.choose_targets("true) AS chosen, (true", "small")


def test_a_choice_is_checked_without_reading_what_it_asks_about(store):
    endless = "(SELECT count(*) FROM range(1000000000000) a, range(1000000000000) b) > 0"
    store.check_choice(f"SELECT dump, sequence_id FROM sequences WHERE {endless}; ", endless, ["small", "other"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mask_holds_what_was_chosen(data):
    lengths = np.array(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=12)))
    mask = TargetMask.empty(lengths)
    expected = [np.zeros(length, bool) for length in lengths]
    for _ in range(data.draw(st.integers(0, 3))):
        ordinals = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=30)), np.int64)
        positions = np.array([data.draw(st.integers(0, int(lengths[ordinal]) - 1)) for ordinal in ordinals], np.int64)
        mask.choose(ordinals, positions)
        for ordinal, position in zip(ordinals, positions, strict=True):
            expected[ordinal][position] = True
    assert [mask.positions(ordinal).tolist() for ordinal in range(len(mask))] == [row.tolist() for row in expected]
    assert mask.counts().tolist() == [int(row.sum()) for row in expected]
    assert mask.bits.nbytes <= lengths.sum() // 8 + 1


def test_counts_are_those_of_a_mask_larger_than_what_is_unpacked_at_once(monkeypatch):
    monkeypatch.setattr("knowledge_store.reading.target_mask.UNPACKED", 16)
    mask = TargetMask.empty(np.array([3, 30, 1, 9, 9]))
    mask.choose(np.array([0, 1, 1, 1, 3, 4, 4]), np.array([2, 0, 17, 29, 8, 0, 0]))
    assert mask.counts().tolist() == [1, 3, 0, 1, 1]
