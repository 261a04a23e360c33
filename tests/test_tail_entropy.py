"""The entropy of what lies beyond the candidates: how it is extracted, stored, checked, and asked for by SQL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import Arrays, commit, log_softmax, make_manifest, random_sequences, words

from knowledge_store import DumpWriter, KnowledgeStore, verify
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds.positions import exact_steps
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump.extraction.distributions import knowledge_of


@pytest.mark.parametrize("k", [1, 5, 7])
@pytest.mark.parametrize("vocabulary", [7, 3001])
def test_it_is_that_of_float64(k, vocabulary):
    logits = np.random.default_rng(k).normal(0, 4, (20, vocabulary)).astype(np.float32)
    logits[:, 1] = np.finfo(np.float32).min  # a token that is never given
    tokens = torch.zeros(20, dtype=torch.int64)
    found = knowledge_of(torch.from_numpy(logits.copy()), tokens, Selection("top-k", k), entropy=True)
    plain = knowledge_of(torch.from_numpy(logits.copy()), tokens, Selection("top-k", k))
    assert all(torch.equal(found[name], values) for name, values in plain.items())
    rest = log_softmax(logits)
    np.put_along_axis(rest, found["candidate_ids"].numpy(), -np.inf, 1)
    tail = np.exp(rest).sum(axis=1, keepdims=True)
    within = np.exp(rest) / np.maximum(tail, 1e-300)
    expected = -(within * np.log(np.maximum(within, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(found["tail_entropy"], expected, atol=2e-5)


VOCABULARY, K = 11, 3


def sequences_with_entropy() -> tuple[list[Arrays], np.ndarray]:
    """Knowledge of a few sequences, and the teacher's entropy at every position that has some (nats)."""
    knowledge = random_sequences(0, 3, VOCABULARY, VOCABULARY)
    entropies = []
    for arrays in knowledge:
        logprobs = arrays["candidate_logprobs"].astype(np.float64)
        rest = logprobs[:, K:]
        tail = np.logaddexp.reduce(rest, axis=1)
        arrays["tail_entropy"] = -(np.exp(rest - tail[:, None]) * (rest - tail[:, None])).sum(axis=1).astype(np.float32)
        arrays["tail_logprob"] = tail.astype(np.float32)
        for name in ("candidate_ids", "candidate_logprobs"):
            arrays[name] = arrays[name][:, :K]
        entropies.append(-(np.exp(logprobs) * logprobs).sum(axis=1)[arrays["has_knowledge"]])
    return knowledge, np.concatenate(entropies)


def write(folder: Path, knowledge: list[Arrays], **changes) -> Path:
    writer = DumpWriter.open(folder, make_manifest(shards=1, **changes), tokens_table(words(VOCABULARY), words(VOCABULARY)))
    commit(writer, 0, knowledge)
    return folder


def test_sql_gives_the_teachers_entropy(tmp_path):
    knowledge, expected = sequences_with_entropy()
    store = write(tmp_path / "s", knowledge, dump="known", tail_entropy=True)
    fine = write(store, knowledge, dump="fine", tail_entropy=True, quantisation_step=2.0**-12)
    plain = [{name: values for name, values in arrays.items() if name != "tail_entropy"} for arrays in knowledge]
    write(store, plain, dump="unknown")
    assert not verify(store).damage
    opened = KnowledgeStore.open(fine)
    rows = opened.sql(
        "SELECT dump, candidate_ids, teacher_entropy FROM positions ORDER BY dump, sequence_id, position"
    ).to_pylist()
    found = {dump: [row["teacher_entropy"] for row in rows if row["dump"] == dump] for dump in ("fine", "known", "unknown")}
    has_knowledge = [row["candidate_ids"] is not None for row in rows if row["dump"] == "known"]
    assert [value is not None for value in found["known"]] == has_knowledge
    np.testing.assert_allclose([value for value in found["fine"] if value is not None], expected, atol=1e-3)
    np.testing.assert_allclose([value for value in found["known"] if value is not None], expected, atol=0.1)
    assert set(found["unknown"]) == {None}
    assert opened.choose_targets("teacher_entropy > 1", "fine").masks["fine"].counts().sum() == (expected > 1).sum()


def test_it_is_rounded_by_itself_to_the_nearest_step():
    """What `check` holds against the teacher."""
    [arrays, *_], _ = sequences_with_entropy()
    known = {name: values[arrays["has_knowledge"]] for name, values in arrays.items()}
    steps = exact_steps(known, make_manifest(tail_entropy=True))["tail_entropy"]
    np.testing.assert_allclose(steps, known["tail_entropy"] * 8, rtol=1e-6)


def test_candidates_that_are_the_whole_vocabulary_leave_no_entropy(tmp_path):
    knowledge = random_sequences(1, 2, VOCABULARY, VOCABULARY)
    for arrays in knowledge:
        arrays["tail_entropy"] = np.zeros(len(arrays["token_id"]), np.float32)
    folder = write(tmp_path / "s", knowledge, selection={"name": "top-k", "k": VOCABULARY}, tail_entropy=True)
    assert not verify(folder).damage
    found = KnowledgeStore.open(folder).sql(
        "SELECT teacher_entropy FROM positions WHERE is_target ORDER BY sequence_id, position"
    )
    logprobs = np.concatenate([arrays["candidate_logprobs"][arrays["has_knowledge"]] for arrays in knowledge])
    np.testing.assert_allclose(found["teacher_entropy"], -(np.exp(logprobs) * logprobs).sum(axis=1), atol=0.1)


@pytest.mark.parametrize("value", [-1.0, 2.5])  # a tail of eight tokens has at most ln 8 = 2.08, and half a step
def test_verify_knows_what_an_entropy_can_be(tmp_path, value):
    knowledge, _ = sequences_with_entropy()
    knowledge[0]["tail_entropy"][1] = value
    [complaint] = verify(write(tmp_path / "s", knowledge, tail_entropy=True)).damage
    assert complaint.endswith("tail_entropy is below 0, or above the logarithm of the tail's tokens")
