"""Metrics with answers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from knowledge_store.calibration.expected_calibration_error import (
    adaptive_calibration_error,
    equal_count_bins,
    expected_calibration_error,
    reliability,
)
from knowledge_store.calibration.temperature import fit_temperature
from student_train.evaluation.bootstrap import bootstrap_calibration_error, bootstrap_interval, calibration_gaps
from student_train.evaluation.comparison import Difference, calibration_difference, mean_difference
from student_train.evaluation.metrics import (
    FullVocabularyCalibration,
    brier,
    brier_from_sums,
    describe_scores,
    full_vocabulary_calibration_error,
    negative_log_likelihood,
    softmax,
)

ANSWERS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])),
        arrays(np.bool_, n),
    )
)


# ---- calibration error


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([1, 1, 1, 0, 1, 0])
    # Bin (0.9, 1.0]: |3/4 − 0.95| = 0.2, four of six; bin (0.5, 0.6]: |1/2 − 0.55| = 0.05, two of six.
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)


def test_perfect_and_hopeless():
    for error in (expected_calibration_error, adaptive_calibration_error):
        assert error(np.ones(5), np.ones(5)) == 0
        assert error(np.ones(5), np.zeros(5)) == 1
        assert error(np.empty(0), np.empty(0)) == 0
        generator = np.random.default_rng(0)
        confidence = generator.uniform(size=200_000)
        assert error(confidence, generator.uniform(size=200_000) < confidence, 15) < 0.01


def test_edges_belong_to_the_bin_below():
    found = reliability(np.array([0.0, 0.1, 0.10001, 1.0]), np.array([1, 0, 0, 1]), 10)
    assert found.counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found.accuracy[0] == 0.5
    assert found.confidence[0] == pytest.approx(0.05)


@pytest.mark.parametrize("confidence", [[0.5], [1.5, 0.5], [float("nan"), 0.5]])
def test_confidences_that_are_none(confidence):
    for error in (expected_calibration_error, adaptive_calibration_error):
        with pytest.raises(ValueError, match="confidence"):
            error(np.array(confidence), np.array([1, 0]))


def test_bins_of_equal_counts_by_hand():
    confidence = np.array([0.91, 0.92, 0.93, 0.99])
    correct = np.array([1, 0, 1, 1])
    # Two bins of two: |1/2 − 0.915| and |1 − 0.96|; equal width puts all four into one: |3/4 − 0.9375|.
    assert adaptive_calibration_error(confidence, correct, 2) == pytest.approx((0.415 + 0.04) / 2)
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx(0.1875)


def test_ties_stay_together():
    confidence = np.array([0.2, 0.6, 0.6, 0.6, 0.6, 0.9])
    # Ranks 1 to 4 are all 2.5, in the second of three bins.
    assert equal_count_bins(confidence, 3).tolist() == [0, 1, 1, 1, 1, 2]
    correct = np.array([0, 1, 1, 0, 0, 1])
    assert adaptive_calibration_error(confidence, correct, 3) == pytest.approx((0.2 + 4 * 0.1 + 0.1) / 6)


@given(ANSWERS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_bins_do_not_depend_on_the_order(answers, bins, random):
    confidence, correct = answers
    index = equal_count_bins(confidence, bins)
    for value in np.unique(confidence):
        assert len(set(index[confidence == value])) == 1
    if len(np.unique(confidence)) == len(confidence):
        sizes = np.bincount(index, minlength=bins)
        assert sizes.max() - sizes.min() <= 1
    order = random.sample(range(len(confidence)), len(confidence))
    error = adaptive_calibration_error(confidence, correct, bins)
    assert adaptive_calibration_error(confidence[order], correct[order], bins) == pytest.approx(error, abs=1e-12)
    assert 0 <= error <= 1


@given(ANSWERS)
def test_one_bin_is_the_gap_of_the_means(answers):
    confidence, correct = answers
    gap = abs(confidence.mean() - correct.mean())
    assert expected_calibration_error(confidence, correct, 1) == pytest.approx(gap, abs=1e-12)
    assert adaptive_calibration_error(confidence, correct, 1) == pytest.approx(gap, abs=1e-12)
    assert expected_calibration_error(confidence, correct, 15) >= gap - 1e-12  # finer bins hide less


# ---- the full vocabulary


def test_full_vocabulary_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    # Two bins. Above ½: 0.7 and 0.6, one came true: |1 − 1.3|. Below: 0.2, 0.1, 0.3, 0.1, one came true: |1 − 0.7|.
    assert full_vocabulary_calibration_error(probabilities, np.array([0, 1]), 2) == pytest.approx((0.3 + 0.3) / 2)
    assert full_vocabulary_calibration_error(np.eye(3), np.array([0, 1, 2])) == 0
    assert full_vocabulary_calibration_error(np.eye(3), np.array([1, 2, 0])) == 2  # sure of one, denied the other
    assert FullVocabularyCalibration().error == 0


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(2, 40),
    st.sampled_from([1, 2, 10, 15]),
    st.sampled_from([0.3, 3, 30]),
)
def test_slices_and_tensors_make_no_difference(seed, positions, vocabulary, bins, scale):
    generator = np.random.default_rng(seed)
    probabilities = softmax(generator.normal(0, scale, (positions, vocabulary)))
    token_ids = generator.integers(0, vocabulary, positions)
    # The plain way: every probability in a list of predictions.
    came = np.zeros_like(probabilities)
    came[np.arange(positions), token_ids] = 1
    plain = expected_calibration_error(probabilities.reshape(-1), came.reshape(-1), bins) * vocabulary
    assert full_vocabulary_calibration_error(probabilities, token_ids, bins) == pytest.approx(plain, abs=1e-9)
    pooled = FullVocabularyCalibration(bins)
    for start in range(0, positions, 7):
        part = slice(start, start + 7)
        pooled.add(torch.from_numpy(probabilities[part]), torch.from_numpy(token_ids[part]))
    pooled.add(torch.empty(0, vocabulary), torch.empty(0, dtype=torch.int64))
    assert pooled.error == pytest.approx(plain, abs=1e-9)
    assert pooled.predictions.sum() == positions * vocabulary


def test_a_calibrated_vocabulary_has_little_error():
    generator = np.random.default_rng(0)
    probabilities = softmax(generator.normal(0, 2, (20_000, 12)))
    token_ids = (probabilities.cumsum(axis=1) > generator.uniform(size=(20_000, 1))).argmax(axis=1)
    assert full_vocabulary_calibration_error(probabilities, token_ids) < 0.03
    assert full_vocabulary_calibration_error(softmax(4 * np.log(probabilities)), token_ids) > 0.3


# ---- proper scores


def test_scores_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    assert negative_log_likelihood(logits, np.array([0, 2])) == pytest.approx([-math.log(0.7), -math.log(0.1)])
    # At temperature ½ probabilities are squared: 0.49 : 0.04 : 0.01.
    assert negative_log_likelihood(logits, np.array([0, 1]), 0.5)[0] == pytest.approx(-math.log(0.49 / 0.54))
    assert brier(np.exp(logits), np.array([0, 2])) == pytest.approx([0.3**2 + 0.2**2 + 0.1**2, 0.6**2 + 0.3**2 + 0.9**2])
    assert brier_from_sums(np.array([0.54]), np.array([0.7])) == pytest.approx([0.14])
    assert brier(np.array([[0.0, 1.0]]), np.array([0])) == pytest.approx([2])


def test_classes_that_are_none():
    """Rows with fewer classes are filled up with −inf."""
    assert negative_log_likelihood(np.array([[1.0, 1.0, -np.inf]]), np.array([1])) == pytest.approx([math.log(2)])
    assert softmax(np.array([0.0, 0.0, -np.inf])).tolist() == [0.5, 0.5, 0]


def test_scores_survive_large_logits():
    logits = np.array([[1e4, 0.0]])
    assert negative_log_likelihood(logits, np.array([1])) == pytest.approx([1e4])


# ---- bootstrap


def test_the_interval_of_a_mean():
    values = np.random.default_rng(1).normal(3, 2, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    inner = bootstrap_interval(values, level=0.5)
    assert low < inner[0] < inner[1] < high
    assert bootstrap_interval(np.full(10, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("size", [0, 1, 9])
def test_too_few_tell_no_interval(size):
    """A single sequence of many values would otherwise claim to be certain."""
    assert all(map(math.isnan, bootstrap_interval(np.full(size, 0.25))))
    assert all(map(math.isnan, bootstrap_interval(np.arange(90.0), groups=np.arange(90) % max(size, 1))))
    assert describe_scores({"nll": np.full(size + 1, 2.0)})["intervals"] == ({} if size < 9 else {"nll": [2.0, 2.0]})


def test_pairs_cancel_what_they_share():
    generator = np.random.default_rng(2)
    hardness = generator.normal(0, 5, 500)
    one, other = hardness + generator.normal(0.5, 0.1, 500), hardness + generator.normal(0, 0.1, 500)
    difference = mean_difference(one, other, np.ones(500))
    assert difference.value == pytest.approx((one - other).mean()) and difference.clear
    assert 0.45 < difference.low < difference.value < difference.high < 0.55


def test_groups_are_drawn_whole():
    """Ten copies of each value tell no more than one: the interval stays as wide; taken apart, it would shrink to a third."""
    values = np.random.default_rng(3).normal(0, 1, 200)
    alone = bootstrap_interval(values)
    copies, groups = np.repeat(values, 10), np.repeat(np.arange(200), 10)
    assert bootstrap_interval(copies, groups=groups) == pytest.approx(alone)
    apart = bootstrap_interval(copies)
    assert (apart[1] - apart[0]) < 0.4 * (alone[1] - alone[0])


def test_groups_of_uneven_size_keep_their_weight():
    # Ten groups, each of zeros or of three times as many ones.
    values = np.array([0.0] * 5 + [1.0] * 15)
    groups = np.array(list("abcde") + [name for name in "fghij" for _ in range(3)])
    assert bootstrap_interval(values, groups=groups, level=1.0, resamples=50_000) == (0, 1)
    assert bootstrap_interval(values, groups=groups, level=0.01) == (0.75, 0.75)


@settings(max_examples=25)
@given(ANSWERS.filter(lambda answers: len(answers[0]) >= 10), st.sampled_from([1, 10, 15]), st.booleans())
def test_the_interval_of_a_calibration_error(answers, bins, adaptive):
    """Against the error of each resample, computed one by one."""
    confidence, correct = answers
    size = len(confidence)
    index = np.random.default_rng(5).integers(0, size, (30, size))
    bin_of = equal_count_bins(confidence, bins)
    errors = []
    for drawn in index:
        if adaptive:
            gaps = np.bincount(bin_of[drawn], weights=correct[drawn] - confidence[drawn])
            errors.append(np.abs(gaps).sum() / size)
        else:
            errors.append(expected_calibration_error(confidence[drawn], correct[drawn], bins))
    found = bootstrap_calibration_error(confidence, correct, bins, adaptive=adaptive, resamples=30, seed=5)
    assert found == pytest.approx(tuple(np.quantile(errors, [0.025, 0.975])), abs=1e-9)


def test_the_difference_of_two_calibration_errors():
    generator = np.random.default_rng(4)
    honest = generator.uniform(0.5, 1, 3000)
    correct = generator.uniform(size=3000) < honest
    boastful = np.minimum(honest + 0.15, 1)
    one, other = (calibration_gaps(confidence, correct, 15) for confidence in (boastful, honest))
    difference = calibration_difference(one, other, np.ones(3000))
    gap = expected_calibration_error(boastful, correct) - expected_calibration_error(honest, correct)
    assert difference.value == pytest.approx(gap)
    assert 0.05 < difference.low < gap < difference.high < 0.16
    assert calibration_difference(other, other, np.ones(3000)) == Difference(0, 0, 0)


def test_many_values_are_resampled_piece_by_piece(monkeypatch):
    values = np.random.default_rng(6).normal(size=300)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("student_train.evaluation.bootstrap.MAX_RANDOM_NUMBERS", 1000)
    assert bootstrap_interval(values) == pytest.approx(whole)


# ---- temperature


@settings(max_examples=20)
@given(st.floats(0.2, 6), st.integers(0, 1000))
def test_a_known_temperature_is_found(temperature, seed):
    """Labels that follow softmax(logits) exactly (as weights): logits times T have their best temperature at T."""
    logits = np.random.default_rng(seed).normal(0, 2, (40, 5))
    truth = softmax(logits)
    labels = np.tile(np.arange(5), (40, 1))

    def nll(at: float) -> float:
        scores = [negative_log_likelihood(temperature * logits, labels[:, column], at) for column in range(5)]
        return float((truth * np.stack(scores, axis=1)).sum(axis=1).mean())

    fitted = fit_temperature(nll)
    assert fitted.temperature == pytest.approx(temperature, rel=2e-3)
    assert fitted.nll == pytest.approx(-(truth * np.log(truth)).sum(axis=1).mean(), abs=1e-6)
    assert fitted.nll_before == pytest.approx(nll(1.0))
    assert not fitted.at_edge


def test_a_temperature_beyond_the_range_is_said_so():
    logits = np.array([[2.0, 0.0], [1.0, 0.0]])
    always = fit_temperature(lambda t: float(negative_log_likelihood(logits, np.array([0, 0]), t).mean()))
    assert always.at_edge and always.temperature == pytest.approx(1 / 20, rel=1e-3)
    never = fit_temperature(lambda t: float(negative_log_likelihood(logits, np.array([1, 1]), t).mean()), highest=8.0)
    assert never.at_edge and never.temperature == pytest.approx(8, rel=1e-3)
