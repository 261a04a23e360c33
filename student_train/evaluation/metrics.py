"""Is a model as sure as it is right? Calibration error, proper scores, bootstrap intervals and a temperature, in numpy.

*Confidence* is the probability of the answer that a model gives, and that answer is *correct* or not. Calibration error is
no proper score (a model that always says the base rate has none), so read it beside the negative log-likelihood or the
Brier score, which no model improves by saying anything but what it believes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
# Of what is resampled; fewer give an interval that claims to know too much.
FEWEST_GROUPS = 10
# Random numbers of the bootstrap held at a time.
DRAWS = 4_000_000
# Temperatures are looked for between 1/RANGE and RANGE.
RANGE = 20.0
_GOLDEN = (math.sqrt(5) - 1) / 2

Interval = tuple[float, float]


# ---- calibration error


@dataclass(frozen=True)
class Reliability:
    """Answers in bins of confidence; means are 0 in an empty bin."""

    counts: np.ndarray  # (bins,) int64
    confidence: np.ndarray  # (bins,) float64, mean confidence of the answers in the bin
    accuracy: np.ndarray  # (bins,) float64, share of them that are correct

    @property
    def error(self) -> float:
        """Expected calibration error Σ |B|/n · |accuracy − confidence| (Naeini et al. 2015), in [0, 1]; 0 for no answers."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(self.counts.sum(), 1))

    def as_dict(self) -> dict[str, list[float] | list[int]]:
        """For JSON."""
        return {
            "counts": self.counts.tolist(),
            "confidence": self.confidence.tolist(),
            "accuracy": self.accuracy.tolist(),
        }


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Reliability:
    """Sort answers into equal-width bins of confidence.

    Args:
        confidence: (N,) floats in [0, 1].
        correct: (N,) booleans.
        bins: how many; bin i is (i / bins, (i + 1) / bins], and 0 belongs to the first.

    Raises:
        ValueError: the arrays differ in length, or a confidence lies outside [0, 1].
    """
    confidence, correct = _answers(confidence, correct)
    return _binned(confidence, correct, equal_width_bins(confidence, bins), bins)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Σ |B|/n · |accuracy − confidence| over equal-width bins: (N,) floats and (N,) booleans (see `reliability`)."""
    return reliability(confidence, correct, bins).error


def adaptive_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Σ |B|/n · |accuracy − confidence| over bins that hold as many answers each (Nixon et al. 2019, of the given answer).

    Equal-width bins leave most of the answers of a confident model in one bin; these do not. Answers of one confidence
    stay in one bin, whatever their order, so bins are uneven where many are alike.

    Args:
        confidence: (N,) floats in [0, 1].
        correct: (N,) booleans.
        bins: how many.

    Raises:
        ValueError: the arrays differ in length, or a confidence lies outside [0, 1].
    """
    confidence, correct = _answers(confidence, correct)
    return _binned(confidence, correct, equal_count_bins(confidence, bins), bins).error


def equal_width_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence, (N,) int64: i for (i / bins, (i + 1) / bins]."""
    return np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def equal_count_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence, (N,) int64, by its rank; equal ones have the mean of their ranks."""
    _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2  # mean rank, from 0
    return np.minimum(np.floor((middle + 0.5) * bins / max(len(group), 1)).astype(np.int64), bins - 1)[group.reshape(-1)]


def _answers(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidence = np.asarray(confidence, dtype=np.float64)
    correct = np.asarray(correct, dtype=np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape} must be two lists of one length")
    # Rounding in float32 can leave a certain answer a hair above one.
    if confidence.size and not (confidence.min() >= 0 and confidence.max() <= 1 + 1e-6):
        raise ValueError("confidences are probabilities and must lie in [0, 1]")
    return np.minimum(confidence, 1.0), correct


def _binned(confidence: np.ndarray, correct: np.ndarray, index: np.ndarray, bins: int) -> Reliability:
    counts = np.bincount(index, minlength=bins)
    filled = np.maximum(counts, 1)
    return Reliability(
        counts=counts,
        confidence=np.bincount(index, weights=confidence, minlength=bins) / filled,
        accuracy=np.bincount(index, weights=correct, minlength=bins) / filled,
    )


class FullVocabularyCalibration:
    """Full-ECE (Liu et al. 2024, arXiv 2406.11345): is every token's probability deserved, not the likeliest one's alone?

    Each of the V probabilities of a position is a prediction that its token comes. All N·V of them are pooled into
    equal-width bins, and the error is Σ_m |B_m|/N · |A_m − C_m|, with A_m the share of the bin's predictions that came
    true and C_m their mean probability. N counts positions, so that the error is not divided by the vocabulary; it lies in
    [0, 2]. Give it slice after slice; sums are float64.

    Args:
        bins: how many.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self.positions = 0
        self.predictions = np.zeros(bins, np.int64)
        self.claimed = np.zeros(bins)  # sum of probabilities
        self.came_true = np.zeros(bins)

    def add(self, probabilities: Any, token_ids: Any) -> None:
        """Take in (n, V) probabilities, numpy or torch on any device, and the (n,) ids of the tokens that came."""
        positions, vocabulary = probabilities.shape
        if not positions:
            return
        # No more than `bins` tokens of a position are above the first bin: all the others need no more than their sum.
        values = _float64(probabilities[probabilities > (1 - 1e-6) / self.bins])
        total = float(_float64(probabilities.sum(-1)).sum())
        gold = probabilities[np.arange(positions), token_ids]
        index = equal_width_bins(values, self.bins)
        self.positions += positions
        self.predictions += np.bincount(index, minlength=self.bins)
        self.predictions[0] += positions * vocabulary - len(values)
        self.claimed += np.bincount(index, weights=values, minlength=self.bins)
        self.claimed[0] += total - float(values.sum())
        self.came_true += np.bincount(equal_width_bins(_float64(gold), self.bins), minlength=self.bins)

    @property
    def error(self) -> float:
        """Full-ECE, in [0, 2]; 0 before the first position."""
        return float(np.abs(self.came_true - self.claimed).sum() / max(self.positions, 1))


def full_vocabulary_calibration_error(probabilities: Any, token_ids: Any, bins: int = 15) -> float:
    """Full-ECE of (N, V) probabilities and (N,) token ids held at once (see `FullVocabularyCalibration`)."""
    pooled = FullVocabularyCalibration(bins)
    pooled.add(probabilities, token_ids)
    return pooled.error


def _float64(values: Any) -> np.ndarray:
    """A numpy array or a torch tensor as float64 numpy."""
    if not isinstance(values, np.ndarray):
        values = values.detach().cpu().double().numpy()
    return values.astype(np.float64, copy=False)


# ---- proper scores


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """−log softmax(logits / temperature)[label]: (N, C) and (N,) to (N,) nats; a class of logit −inf is none."""
    scaled = np.asarray(logits, np.float64) / temperature
    return log_sum_exp(scaled) - scaled[np.arange(len(scaled)), labels]


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Brier score over all classes, Σ_c (p_c − [c is the label])² (Brier 1950): (N, C) and (N,) to (N,), in [0, 2]."""
    probabilities = np.asarray(probabilities, np.float64)
    return brier_from_sums((probabilities**2).sum(axis=-1), probabilities[np.arange(len(probabilities)), labels])


def brier_from_sums(squares: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The same from Σ p² (N,) and the label's p (N,), for vocabularies too large to keep: Σ p² − 2 p_label + 1."""
    return np.asarray(squares, np.float64) - 2 * np.asarray(label, np.float64) + 1


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) over the last axis, float64; a class of logit −inf is none."""
    scaled = np.asarray(logits, np.float64) / temperature
    return np.exp(scaled - log_sum_exp(scaled)[..., None])


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log Σ exp over the last axis, which has at least one finite value; float64."""
    values = np.asarray(values, np.float64)
    highest = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - highest).sum(axis=-1)) + highest[..., 0]


# ---- bootstrap


def bootstrap_interval(
    values: np.ndarray,
    other: np.ndarray | None = None,
    *,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron 1979), or of the difference of two means, `values` less `other`.

    Args:
        values: (N,) one number for each question or position.
        other: (N,) of the same ones by another model: both are resampled alike, so what is hard for both cancels out.
        groups: (N,) what is drawn whole, such as the sequence of each position; None when every value stands alone.
        resamples: how many samples with replacement.
        seed: of the draws.
        level: share of the resampled means that lie inside.

    Returns:
        The lower and the upper end; NaN twice for fewer than `FEWEST_GROUPS` values or groups.
    """
    values = np.asarray(values, np.float64)
    if other is not None:
        values = values - np.asarray(other, np.float64)
    sums, sizes = group_sums(values, groups)[:, None], group_sizes(len(values), groups)
    return bootstrap(sums, sizes, mean_of_sums, resamples=resamples, seed=seed, level=level)


def mean_of_sums(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean from resampled sums (R, 1) over (R,) values: (R,)."""
    return sums[:, 0] / counts


def bootstrap_calibration_error(
    confidence: np.ndarray,
    correct: np.ndarray,
    bins: int = 15,
    other: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    adaptive: bool = False,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The same for the expected calibration error, or for how much it differs from that of `other`.

    The error is a sum of absolute values and comes out higher on resampled answers than on the answers themselves (the
    noise in each bin counts), the more so the fewer there are: with few answers and a small error, the interval can lie
    above the error.

    Args:
        confidence, correct, bins: as in `reliability`.
        other: confidence and correct of another model on the same answers.
        adaptive: bins of equal counts, as all answers together have them, in place of bins of equal width.
        groups, resamples, seed, level: as in `bootstrap_interval`.
    """
    runs = [(confidence, correct), *([other] if other else [])]
    gaps = np.concatenate([calibration_gaps(*run, bins, adaptive=adaptive, groups=groups) for run in runs], axis=1)
    statistic = gap_error if other is None else gap_error_difference
    return bootstrap(gaps, group_sizes(len(confidence), groups), statistic, resamples=resamples, seed=seed, level=level)


def calibration_gaps(
    confidence: np.ndarray, correct: np.ndarray, bins: int, *, adaptive: bool = False, groups: np.ndarray | None = None
) -> np.ndarray:
    """(G, bins): the sum of correct − confidence over the answers of a group in a bin; groups in the order of `np.unique`,
    each answer its own when None. Summed over groups, made absolute, summed over bins and divided by the number of answers,
    it is the expected calibration error, so these sums are all that a bootstrap needs."""
    confidence, correct = _answers(confidence, correct)
    index = equal_count_bins(confidence, bins) if adaptive else equal_width_bins(confidence, bins)
    group = _group_index(len(confidence), groups)
    size = int(group.max(initial=-1)) + 1
    sums = np.bincount(group * bins + index, weights=correct - confidence, minlength=size * bins)
    return sums.reshape(size, bins)


def gap_error(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Expected calibration error from sums of `calibration_gaps` (R, bins) over (R,) answers: (R,)."""
    return np.abs(gaps).sum(axis=1) / counts


def gap_error_difference(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """That of the first half of the columns less that of the second: two models, side by side."""
    first, second = np.split(gaps, 2, axis=1)
    return gap_error(first, counts) - gap_error(second, counts)


def _group_index(size: int, groups: np.ndarray | None) -> np.ndarray:
    return np.arange(size) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)


def group_sizes(size: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(G,) float64: how many of `size` values each group has, in the order of `np.unique`."""
    return np.bincount(_group_index(size, groups)).astype(np.float64)


def group_sums(values: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """(G,) float64: sums of (N,) values over groups, in the order of `np.unique`."""
    return np.bincount(_group_index(len(values), groups), weights=np.asarray(values, np.float64))


def bootstrap(
    sums: np.ndarray,
    counts: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of anything that follows from sums over groups, all resamples at once.

    Args:
        sums: (G, S) what is added up, for each group that is drawn whole.
        counts: (G,) how many values each group has.
        statistic: from (R, S) resampled sums and (R,) resampled counts to (R,) numbers.
        resamples, seed, level: as in `bootstrap_interval`.

    Returns:
        The lower and the upper end; NaN twice for fewer than `FEWEST_GROUPS` groups, whose resamples say little of how far
        others would stray.
    """
    size = len(sums)
    if size < FEWEST_GROUPS:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    found = []
    step = max(1, DRAWS // size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=rows * size).reshape(rows, size).astype(np.float64)
        found.append(statistic(times @ sums, times @ counts))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---- all of them


BINS = (10, 15)


def describe_scores(scores: dict[str, np.ndarray], groups: np.ndarray | None = None) -> dict[str, Any]:
    """The mean of each of some (N,) scores, and `intervals`, their 95% bootstrap intervals where these can be told."""
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in scores.items()}
    return {**means, "intervals": _told({name: bootstrap_interval(values, groups=groups) for name, values in scores.items()})}


def _told(intervals: dict[str, Interval]) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in intervals.items() if not math.isnan(interval[0])}


def describe_answers(
    confidence: np.ndarray,
    correct: np.ndarray,
    scores: dict[str, np.ndarray],
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Everything there is to say of a model's answers, for JSON.

    Args:
        confidence: (N,) floats in [0, 1]; correct: (N,) booleans; N at least 1.
        scores: named (N,) scores to average, such as `nll` (nats) and `brier`.
        groups: (N,) what is drawn whole in the bootstrap.

    Returns:
        The mean of each score; accuracy; ece_10 and ece_15 (bins of equal width); adaptive_ece (15 bins of equal counts);
        `intervals`, the 95% bootstrap interval of each of these by its name, where it can be told; `reliability` of 15 bins.
    """
    found = describe_scores({**scores, "accuracy": np.asarray(correct, np.float64)}, groups)
    intervals: dict[str, Interval] = {}
    for bins in BINS:
        found[f"ece_{bins}"] = expected_calibration_error(confidence, correct, bins)
        intervals[f"ece_{bins}"] = bootstrap_calibration_error(confidence, correct, bins, groups=groups)
    most = max(BINS)
    found["adaptive_ece"] = adaptive_calibration_error(confidence, correct, most)
    intervals["adaptive_ece"] = bootstrap_calibration_error(confidence, correct, most, adaptive=True, groups=groups)
    found["intervals"] |= _told(intervals)
    found["reliability"] = reliability(confidence, correct, most).as_dict()
    return found


# ---- temperature


@dataclass(frozen=True)
class FittedTemperature:
    """A temperature that divides logits.

    Attributes:
        temperature: the best one found.
        nll: mean negative log-likelihood there, nats; nll_before: at temperature 1.
        at_edge: whether the search ended at an end of its range, so that the best one lies beyond.
    """

    temperature: float
    nll: float
    nll_before: float
    at_edge: bool


def fit_temperature(nll: Callable[[float], float], lowest: float = 1 / RANGE, highest: float = RANGE) -> FittedTemperature:
    """The temperature that minimises a negative log-likelihood (temperature scaling, Guo et al. 2017).

    log Σ exp(z/T) − z_label/T is convex in 1/T, so a golden-section search over 1/T finds the one minimum, to a ten
    thousandth of T.

    Args:
        nll: from a temperature to the mean negative log-likelihood on held-out answers, nats. For (N, C) logits:
            `lambda t: negative_log_likelihood(logits, labels, t).mean()`.
        lowest, highest: the range, which holds 1.
    """
    low, high = 1 / highest, 1 / lowest
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [nll(1 / inner[0]), nll(1 / inner[1])]
    while high - low > 1e-4 * low:
        if values[0] <= values[1]:
            high = inner[1]
            inner = [high - _GOLDEN * (high - low), inner[0]]
            values = [nll(1 / inner[0]), values[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + _GOLDEN * (high - low)]
            values = [values[1], nll(1 / inner[1])]
    temperature = 2 / (low + high)
    at_edge = temperature < lowest * (1 + 1e-3) or temperature > highest * (1 - 1e-3)
    return FittedTemperature(temperature, nll(temperature), nll(1.0), at_edge)
