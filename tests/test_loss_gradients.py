"""Gradients of the losses: right, unbiased where they claim to be, and finite at the edges of what floats can hold."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from targets import VOCABULARY, adaptive_share, drawn, in_float32, kept, log_softmax, random_case, random_draws

from student_train.losses.divergences import adaptive_kl, forward_kl, reverse_kl, total_variation
from student_train.losses.table import LOSSES
from student_train.losses.targets import Targets

FUNCTIONS = {name: loss.function for name, loss in LOSSES.items() if not loss.whole_batch}
SMOOTH = [name for name in FUNCTIONS if name != "adaptive-kl"]  # its weights are constants


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in SMOOTH),
        *((name, {"temperature": 2.0}) for name in SMOOTH if "temperature" in LOSSES[name].options),
    ],
)
def test_gradients(name, options, k):
    student, _, targets = random_case(2, rows=2, vocabulary=7, k=k, scale=1.0)
    logits = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: FUNCTIONS[name](values, targets, **options), (logits,))


def test_gradients_with_draws():
    student, _, targets = random_case(3, rows=2)
    targets = random_draws(targets, 1)
    logits = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: forward_kl(values, targets, tail="draws"), (logits,))


def gradient(function, logits: np.ndarray, targets: Targets, **options) -> torch.Tensor:
    """Of each position's loss by its logits (N, V)."""
    values = torch.from_numpy(logits).requires_grad_()
    function(values, targets, **options).sum().backward()
    assert values.grad is not None
    return values.grad


def test_adaptive_weights_are_constants():
    """The gradient is the two divergences' own, mixed by the weights of the definition."""
    student, _, targets = random_case(4, k=5)
    p = np.exp(log_softmax(student))
    others = np.ones_like(p)
    ids = targets.candidate_ids.numpy()
    np.put_along_axis(others, ids, 0, axis=-1)
    p = np.concatenate([np.take_along_axis(p, ids, axis=-1), (p * others).sum(axis=-1, keepdims=True)], axis=-1)
    q = np.exp(torch.cat([targets.candidate_logprobs, targets.tail_logprob[:, None]], dim=-1).numpy())
    share = torch.from_numpy(adaptive_share(q, p))[:, None]
    assert share.min() > 0 and share.max() < 1
    expected = share * gradient(forward_kl, student, targets) + (1 - share) * gradient(reverse_kl, student, targets)
    torch.testing.assert_close(gradient(adaptive_kl, student, targets), expected)


def test_the_full_gradient():
    """Softmax minus target, with the whole vocabulary kept: what the draws have to be on average."""
    student, teacher, _ = random_case(5)
    expected = torch.from_numpy(np.exp(log_softmax(student)) - np.exp(log_softmax(teacher)))
    torch.testing.assert_close(gradient(forward_kl, student, kept(teacher, VOCABULARY)), expected)


@pytest.mark.parametrize("k", [0, 2, 5])
def test_draws_have_the_full_gradient_on_average(k):
    """Every pair of tokens that can be drawn from the tail, weighted with its probability: no bias to the last digit."""
    vocabulary = 7
    student, teacher, _ = random_case(6, rows=1, vocabulary=vocabulary, k=k, scale=1.0)
    probabilities = np.exp(log_softmax(teacher))[0]
    bare = kept(teacher, k)
    tail = np.setdiff1d(np.arange(vocabulary), bare.candidate_ids[0].numpy())
    inside = probabilities[tail] / probabilities[tail].sum()
    pairs = list(product(range(len(tail)), repeat=2))
    ids = np.array([[tail[one], tail[two]] for one, two in pairs])
    weights = np.array([inside[one] * inside[two] for one, two in pairs])
    assert weights.sum() == pytest.approx(1)

    many = Targets(*(None if each is None else each.expand(len(pairs), *each.shape[1:]) for each in bare))
    targets = drawn(many, ids, probabilities[tail].sum() / 2, rows=vocabulary)
    repeated = np.repeat(student, len(pairs), axis=0)
    found = (torch.from_numpy(weights)[:, None] * gradient(forward_kl, repeated, targets, tail="draws")).sum(dim=0)
    full = kept(teacher, vocabulary)
    torch.testing.assert_close(found, gradient(forward_kl, student, full)[0], rtol=1e-12, atol=1e-14)

    mean = (weights * forward_kl(torch.from_numpy(repeated), targets).numpy()).sum()
    uncertainty = -(inside * np.log(inside)).sum() * probabilities[tail].sum()
    assert mean == pytest.approx(forward_kl(torch.from_numpy(student), full).item() + uncertainty)
    # The bucket's gradient is another: this is not true of any loss.
    if k:
        assert (gradient(forward_kl, student, bare) - gradient(forward_kl, student, full)).abs().max() > 1e-3


def with_impossible_tail(targets: Targets) -> Targets:
    return targets._replace(tail_logprob=torch.full_like(targets.tail_logprob, float("-inf")))


def with_fillers(targets: Targets, of: int) -> Targets:
    ids, logprobs = targets.candidate_ids.clone(), targets.candidate_logprobs.clone()
    ids[:, -of:], logprobs[:, -of:] = 0, float("-inf")
    return targets._replace(candidate_ids=ids, candidate_logprobs=logprobs)


TEACHER = np.array([[80.0, -80, 0, 0, 0, 0, 0, 0], [-80.0, 80, 80, -80, 0, 1, 2, 3]])
HARD = {
    "a small tail": kept(TEACHER, 3),
    "no tail": kept(TEACHER, 8),
    "a tail that the teacher rules out": with_impossible_tail(kept(TEACHER, 3)),
    "fillers": with_fillers(kept(TEACHER, 5), 2),
    "fillers alone": with_fillers(kept(TEACHER, 3), 3),
    "no candidates": kept(TEACHER, 0),
    "a tail, but no token for it": kept(TEACHER, 8)._replace(tail_logprob=torch.full((2,), -2.0).double()),
    "draws": drawn(kept(TEACHER, 3), np.array([[4, 5, 5], [0, -1, -1]]), 0.2, rows=8),
    "a tail without draws": drawn(kept(TEACHER, 3), np.full((2, 1), -1), 0.2, rows=8),
}
STUDENTS = {
    "the opposite": -TEACHER,
    "the same": TEACHER,
    "flat": np.zeros_like(TEACHER),
    "flat and large": np.full_like(TEACHER, 80.0),
    "one token": np.where(np.arange(8) == 6, 100.0, 0.0) * np.ones((2, 1)),
    "all but one token": np.where(np.arange(8) == 1, -100.0, 0.0) * np.ones((2, 1)),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_cases_stay_finite(name, case):
    once = in_float32(HARD[case])
    students = np.concatenate(list(STUDENTS.values()))
    targets = Targets(*(None if each is None else torch.cat([each] * len(STUDENTS)) for each in once))
    temperatures = ({}, {"temperature": 0.5}, {"temperature": 2.0}) if "temperature" in LOSSES[name].options else ({},)
    for dtype, options in product((torch.float32, torch.float16, torch.bfloat16), temperatures):
        logits = torch.tensor(students, dtype=dtype, requires_grad=True)
        with torch.autograd.set_detect_anomaly(True):  # refuses a NaN that a mask would hide further on
            loss = FUNCTIONS[name](logits, targets, **options)
            loss.sum().backward()
        assert torch.isfinite(loss).all() and (loss > -1e-4).all()
        assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_a_ruled_out_tail_still_pulls():
    """Where the teacher leaves the tail nothing, the reverse divergence is large, and going down takes mass off it."""
    student = np.log(np.array([[0.4, 0.3, 0.2, 0.1]]))
    targets = with_impossible_tail(kept(np.array([[3.0, 2, -90, -90]]), 2))
    assert reverse_kl(torch.from_numpy(student), targets).item() > 0.3 * 90
    for function in (forward_kl, reverse_kl, total_variation):
        assert (gradient(function, student, targets)[0, 2:] > 0).all()
