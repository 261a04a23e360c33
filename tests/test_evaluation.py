"""Calibration with answers known beforehand, and evaluation against a recomputation from the model's own logits."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.calibration import expected_calibration_error, reliability
from student_train.evaluation import EvaluateConfig, evaluate


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([1, 1, 1, 0, 1, 0])
    # Bin (0.9, 1.0]: |3/4 − 0.95| = 0.2, four of six; bin (0.5, 0.6]: |1/2 − 0.55| = 0.05, two of six.
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)


def test_perfect_and_hopeless():
    assert expected_calibration_error(np.ones(5), np.ones(5)) == 0
    assert expected_calibration_error(np.ones(5), np.zeros(5)) == 1
    assert expected_calibration_error(np.empty(0), np.empty(0)) == 0
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=200_000)
    assert expected_calibration_error(confidence, generator.uniform(size=200_000) < confidence, 15) < 0.01


def test_edges_belong_to_the_bin_below():
    found = reliability(np.array([0.0, 0.1, 0.10001, 1.0]), np.array([1, 0, 0, 1]), 10)
    assert found.counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found.accuracy[0] == 0.5
    assert found.confidence[0] == pytest.approx(0.05)


@pytest.mark.parametrize("confidence", [[0.5], [1.5, 0.5], [float("nan"), 0.5]])
def test_confidences_that_are_none(confidence):
    with pytest.raises(ValueError, match="confidence"):
        reliability(np.array(confidence), np.array([1, 0]))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def result(teacher_folder, store_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "heldout.json"
    found = evaluate(EvaluateConfig(str(teacher_folder), str(store_folder), "heldout", batch_size=3, output=str(output)))
    assert json.loads(output.read_text())["student"] == found["student"]
    return found


def test_against_the_models_own_logits(result, teacher_folder, store_folder):
    """One sequence at a time, without padding, probabilities in float64."""
    store = KnowledgeStore.open(store_folder)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    nll, correct, sure, positions = 0.0, 0, 0.0, 0
    for batch in store.batches("heldout", batch_size=1, shuffle=False):
        length = int(batch["attention_mask"].sum())
        ids = torch.from_numpy(batch["input_ids"][:, :length])
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        for position in np.flatnonzero(batch["is_target"][0]):
            token = int(ids[0, position])
            nll -= float(logprobs[position - 1, token])
            correct += int(logprobs[position - 1].argmax()) == token
            sure += float(logprobs[position - 1].max().exp())
            positions += 1
    assert result["positions"] == positions
    assert result["student"]["nll"] == pytest.approx(nll / positions, abs=1e-4)
    assert result["student"]["accuracy"] == pytest.approx(correct / positions, abs=1e-9)
    bins = result["student"]["reliability"]
    mean = np.dot(bins["counts"], bins["confidence"]) / positions
    assert mean == pytest.approx(sure / positions, abs=1e-4)


def test_the_teacher_agrees_with_what_was_kept_of_it(result):
    """A misalignment by one position would show here: the teacher as its own student differs by rounding only."""
    assert result["student"]["kl_lower_bound"] < 0.01
    assert result["student"]["top_1_agreement"] > 0.9  # rounding makes ties
    assert result["teacher"]["nll"] == pytest.approx(result["student"]["nll"], abs=0.05)
    assert result["student"]["ece_10"] == pytest.approx(result["teacher"]["ece_10"], abs=0.02)


def test_coverage_comes_from_the_store(result, store_folder):
    store = KnowledgeStore.open(store_folder)
    masses = []
    for batch in store.batches("heldout", batch_size=4, shuffle=False):
        masses.extend(1 - np.exp(batch["tail_logprob"][batch["is_target"]].astype(np.float64)))
    coverage = result["coverage"]
    assert len(coverage["mean_by_rank"]) == store.manifest("heldout").top_k
    assert coverage["mean_by_rank"][-1] == pytest.approx(np.mean(masses), abs=1e-5)
    assert sum(coverage["histogram"]["counts"]) == len(masses)


def test_limit_takes_sequences_from_all_over(teacher_folder, store_folder, tmp_path):
    few = evaluate(EvaluateConfig(str(teacher_folder), str(store_folder), "heldout", limit=2, output=str(tmp_path / "e")))
    assert few["sequences"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dump": None}, "dump"),
        ({"dump": "absent"}, "absent"),
        ({"limit": 0}, "--limit"),
        ({"batch_size": 0}, "--batch-size"),
        ({"model": "/no/such/model"}, "no model folder"),
        ({"gguf_file": "absent.gguf"}, "no file absent.gguf"),
    ],
)
def test_bad_input(teacher_folder, store_folder, changed, message):
    settings = {"model": str(teacher_folder), "store": str(store_folder), "dump": "heldout", **changed}
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(**settings))
