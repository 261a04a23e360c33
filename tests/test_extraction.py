"""The likeliest tokens, and exactly what they leave over."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import story_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import PositionsParameters
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump import DumpConfig, dump, estimate
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.extraction import EXTRACTORS, ExtractionBatch, check_needs
from teacher_dump.extraction.distributions import UnsoundLogits, extract_positions, knowledge_of
from teacher_dump.teachers import local as teacher_module
from teacher_dump.teachers.local import LocalPrediction
from teacher_dump.teachers.protocol import Ability

# Float32's rounding of log-probabilities as large as 160 nats, three operations deep.
TOLERANCE = 1e-4


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@given(st.data())
def test_against_float64(data):
    vocabulary = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, vocabulary))
    values = st.floats(-80, 80, width=32)
    logits = data.draw(arrays(np.float32, (3, vocabulary), elements=values))
    tokens = np.array([0, vocabulary // 2, vocabulary - 1])
    found = knowledge_of(torch.from_numpy(logits.copy()), torch.from_numpy(tokens), Selection("top-k", k))
    token_logprob, ids, logprobs, tail = (each.numpy() for each in found.values())
    expected = log_softmax(logits)
    rows = np.arange(3)
    np.testing.assert_allclose(token_logprob, expected[rows, tokens], atol=TOLERANCE)
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, ids, 1), atol=TOLERANCE)
    np.testing.assert_allclose(logprobs, -np.sort(-expected, axis=1)[:, :k], atol=TOLERANCE)
    assert (np.diff(logprobs, axis=1) <= 0).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    rest = expected.copy()
    np.put_along_axis(rest, ids, -np.inf, 1)
    left_over = np.logaddexp.reduce(rest, axis=1)
    assert (np.isneginf(tail) == (k == vocabulary)).all()
    np.testing.assert_allclose(tail[np.isfinite(tail)], left_over[np.isfinite(tail)], atol=TOLERANCE)


@pytest.mark.parametrize("vocabulary", [2048, 3001])
@pytest.mark.parametrize("selection", [Selection("top-k", 5), Selection("top-p", 6, p=0.9), Selection.threshold(0.04)])
def test_against_float64_over_many_blocks(vocabulary, selection):
    logits = np.random.default_rng(vocabulary).normal(0, 4, (40, vocabulary)).astype(np.float32)
    tokens = np.arange(40)
    found = knowledge_of(torch.from_numpy(logits.copy()), torch.from_numpy(tokens), selection, None, 1.5)
    expected = log_softmax(logits)
    ids, logprobs = found["candidate_ids"].numpy(), found["candidate_logprobs"].numpy()
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=1)[:, : ids.shape[1]])
    kept = np.isfinite(logprobs)
    assert kept.all() or selection.name != "top-k"
    np.testing.assert_allclose(logprobs[kept], np.take_along_axis(expected, ids, 1)[kept], atol=TOLERANCE)
    rest = expected.copy()
    np.put_along_axis(rest, ids, np.where(kept, -np.inf, np.take_along_axis(rest, ids, 1)), 1)
    np.testing.assert_allclose(found["tail_logprob"], np.logaddexp.reduce(rest, axis=1), atol=TOLERANCE)
    np.testing.assert_allclose(found["tail_logsumexp"], np.logaddexp.reduce(rest / 1.5, axis=1), atol=TOLERANCE)
    np.testing.assert_allclose(found["token_logprob"], expected[tokens, tokens], atol=TOLERANCE)


def test_a_tail_that_one_minus_the_sum_would_lose_is_kept():
    logits = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    found = knowledge_of(logits, torch.tensor([0]), Selection("top-k", 1))
    assert found["candidate_logprobs"].item() == 0.0  # one minus this is nothing
    assert found["tail_logprob"].item() == pytest.approx(-60 + np.log(3), abs=1e-5)


# --- batches ------------------------------------------------------------------------------------------------------------


def sequence(number: int, length: int, first_target: int, generator) -> TokenSequence:
    tokens = generator.integers(0, 17, length)
    return TokenSequence(Document(number, 0, number + 1, 0, 0), 0, tokens, np.arange(length) >= max(first_target, 1))


class Given:
    """A teacher whose logits are given."""

    device = torch.device("cpu")
    vocabulary_size = 17
    impossible_tokens = np.zeros(0, np.int64)
    abilities = frozenset({Ability.DISTRIBUTIONS})


def batch_of(sequences, logits: torch.Tensor, **arguments) -> ExtractionBatch:
    parameters = PositionsParameters(**{"selection": Selection("top-k", 3), **arguments})
    return ExtractionBatch(sequences, LocalPrediction(Given(), None, logits), parameters)


@pytest.fixture
def sequences():
    generator = np.random.default_rng(0)
    return [
        sequence(number, length, first, generator) for number, (length, first) in enumerate([(9, 1), (2, 1), (6, 4), (5, 9)])
    ]


@pytest.mark.parametrize("keep_context", [False, True])
@pytest.mark.parametrize("slice_positions", [1, 3, 1000])
def test_each_position_holds_the_prediction_of_its_own_token(sequences, keep_context, slice_positions, monkeypatch):
    monkeypatch.setitem(teacher_module.SLICE_LOGITS, "cpu", slice_positions * Given.vocabulary_size)
    logits = torch.randn(4, 9, 17, generator=torch.Generator().manual_seed(0)) * 4
    found = extract_positions(batch_of(sequences, logits.clone(), keep_context=keep_context))
    for row, (each, arrays_) in enumerate(zip(sequences, found, strict=True)):
        length = len(each.token_ids)
        kept = np.arange(length) > 0 if keep_context else each.is_target
        assert {name: array.shape[0] for name, array in arrays_.items()} == dict.fromkeys(arrays_, length)
        assert arrays_["has_knowledge"].tolist() == kept.tolist()
        assert arrays_["token_id"].tolist() == each.token_ids.tolist()
        assert arrays_["candidate_ids"].dtype == arrays_["token_id"].dtype == np.uint32
        assert {arrays_[name].dtype for name in ("token_logprob", "candidate_logprobs", "tail_logprob")} == {
            np.dtype(np.float32)
        }
        expected = log_softmax(logits[row].numpy())
        for position in np.flatnonzero(kept):
            before = expected[position - 1]
            assert arrays_["token_logprob"][position] == pytest.approx(before[each.token_ids[position]], abs=1e-5)
            assert arrays_["candidate_ids"][position].tolist() == np.argsort(-before)[:3].tolist()


def test_a_batch_without_targets_has_no_knowledge_and_the_right_shapes(sequences):
    found = extract_positions(batch_of([sequences[3]], torch.randn(1, 5, 17)))
    assert not found[0]["has_knowledge"].any()
    assert found[0]["candidate_ids"].shape == found[0]["candidate_logprobs"].shape == (5, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("selection", [Selection("top-k", 3), Selection("top-p", 3, p=0.9), Selection.threshold(0.1)])
def test_a_logit_that_is_no_number_names_its_sequence(sequences, value, selection):
    logits = torch.randn(4, 9, 17)
    logits[2, 4, 5] = value  # predicts position 5 of the third sequence
    with pytest.raises(UnsoundLogits, match=r"NaN or infinite in sequence 131072 \(row 3 of corpus file 1, window 0\)"):
        extract_positions(batch_of(sequences, logits, selection=selection))


def test_what_is_not_kept_may_be_anything(sequences):
    logits = torch.randn(4, 9, 17)
    logits[2, :3] = torch.nan  # a prompt's predictions
    logits[1, 2:] = torch.nan  # padding
    assert len(extract_positions(batch_of(sequences, logits))) == 4


# --- what an extractor needs --------------------------------------------------------------------------------------------


class Server:
    """A teacher behind a server, that gives the likeliest tokens alone."""

    description: ClassVar = {"name": "served"}
    abilities = frozenset({Ability.LIKELIEST, Ability.TEXT})


def test_what_a_teacher_cannot_give_is_refused_by_name():
    with pytest.raises(InputError, match="kind 'vectors' needs hidden states, which the teacher 'served' cannot give"):
        check_needs(("positions", "vectors"), Server())


def test_what_a_teacher_cannot_give_is_refused_before_anything_is_read_or_made(monkeypatch, tmp_path, loaded_teacher):
    asked = replace(EXTRACTORS["positions"], needs=frozenset({Ability.DISTRIBUTIONS, Ability.TEXT}))
    monkeypatch.setitem(EXTRACTORS, "positions", asked)
    monkeypatch.setattr(type(loaded_teacher), "abilities", frozenset({Ability.DISTRIBUTIONS}))
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(3))
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=40)
    for call in (dump, estimate):
        with pytest.raises(InputError, match=r"needs generated text, which the teacher 'tiny' cannot give"):
            call(config, teacher=loaded_teacher)
    assert list(tmp_path.iterdir()) == [corpus]
