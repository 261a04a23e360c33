"""The whole KL to a teacher from candidates, draws and the tail's entropy: unbiased, and how much rounding adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from targets import kept, log_softmax

from knowledge_store.kinds.positions.packing import logprobs_of, steps_of
from student_train.evaluation.metrics import standard_error
from student_train.losses.full_kl import full_kl, knows_full_kl, rounding_floor

VOCABULARY, K = 23, 5


@pytest.fixture
def case():
    """A teacher's log-probabilities and a student's logits (N, V), float64."""
    random = np.random.default_rng(0)
    return log_softmax(random.normal(size=(4, VOCABULARY)) * 3), random.normal(size=(4, VOCABULARY)) * 3


def known(teacher: np.ndarray, k: int = K):
    """What a store keeps of each position, unrounded, without draws; its tail's probabilities (N, V)."""
    targets = kept(teacher, k)
    tail = np.exp(teacher)
    np.put_along_axis(tail, targets.candidate_ids.numpy(), 0, axis=1)
    means = (tail * teacher).sum(axis=1) / np.maximum(tail.sum(axis=1), 1e-300)
    return targets._replace(tail_mean_logprob=torch.from_numpy(means)), tail


@pytest.mark.parametrize("weight", [None, 0.05])  # the tail itself, drawn once; or so much each, as often as it takes
def test_the_estimate_is_the_divergence_on_average_over_the_draws(case, weight):
    teacher, student = case
    expected = (np.exp(teacher) * (teacher - log_softmax(student))).sum(axis=1)
    targets, tail = known(teacher)
    means = []
    for row in range(len(teacher)):
        # Every token of the vocabulary as the only draw of a position; those of the tail come q / weight times on average.
        one = [None if column is None else column[[row] * VOCABULARY] for column in targets]
        each = torch.full((VOCABULARY, 1), weight or tail[row].sum(), dtype=torch.float64)
        drawn = type(targets)._make(one)._replace(draw_ids=torch.arange(VOCABULARY)[:, None], draw_weights=each)
        logits = torch.from_numpy(student[[row] * VOCABULARY])
        nothing = full_kl(logits, drawn._replace(draw_weights=0 * each)).estimate.numpy()
        means.append(nothing[0] + (tail[row] / each[:, 0].numpy() * (full_kl(logits, drawn).estimate.numpy() - nothing)).sum())
    np.testing.assert_allclose(means, expected, rtol=1e-9)


def test_the_variance_is_that_of_draws_each_by_itself(case):
    teacher, student = case
    targets, tail = known(teacher)
    weight, repeats = 0.02, 4000
    rows = np.repeat(np.arange(4), repeats)
    counts = np.random.default_rng(1).poisson(tail[rows] / weight)
    drawn = (
        type(targets)
        ._make(None if column is None else column[rows] for column in targets)
        ._replace(
            draw_ids=torch.arange(VOCABULARY).repeat(len(rows), 6),
            draw_weights=torch.from_numpy(np.concatenate([weight * (counts > n) for n in range(6)], axis=1)),
        )
    )
    estimates, variances = (values.reshape(4, -1).numpy() for values in full_kl(torch.from_numpy(student[rows]), drawn))
    np.testing.assert_allclose(variances.mean(axis=1), estimates.var(axis=1), rtol=0.15)


def test_what_is_not_known_is_refused(case):
    targets, _ = known(case[0])
    assert not knows_full_kl(targets)
    with pytest.raises(ValueError, match="no draws"):
        full_kl(torch.from_numpy(case[1]), targets)


@pytest.mark.parametrize("k", [1, 5])
def test_the_floor_is_what_rounding_makes_on_average(k):
    random = np.random.default_rng(2)
    exact = log_softmax(random.normal(size=(4000, VOCABULARY)) * 2)
    targets = kept(exact, k)
    candidates, tail = targets.candidate_logprobs.numpy(), targets.tail_logprob.numpy()
    below, tail_steps = steps_of(candidates, tail, 1 / 8)
    rounded, rounded_tail = logprobs_of(list(below.T), tail_steps, 1 / 8)
    divergence = (np.exp(rounded) * (rounded - candidates)).sum(axis=1) + np.exp(rounded_tail) * (rounded_tail - tail)
    stored = targets._replace(candidate_logprobs=torch.from_numpy(rounded), tail_logprob=torch.from_numpy(rounded_tail))
    np.testing.assert_allclose(rounding_floor(stored, 1 / 8).mean(), divergence.mean(), rtol=0.05)


def test_a_standard_error_is_of_groups():
    means, counts = np.arange(12.0), np.full(12, 3.0)
    np.testing.assert_allclose(standard_error(means * counts, counts), means.std(ddof=1) / np.sqrt(12))
    assert standard_error(means[:6], counts[:6]) is None
