"""Proper scores, Full-ECE, and everything there is to say of a model's answers, for JSON. In numpy.

Calibration error is in `knowledge_store.calibration`, since teachers are measured by it too; intervals are in `bootstrap`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from knowledge_store.calibration.expected_calibration_error import (
    adaptive_calibration_error,
    equal_width_bins,
    expected_calibration_error,
    reliability,
)
from knowledge_store.errors import InputError
from student_train.evaluation.bootstrap import (
    MIN_GROUPS,
    Interval,
    bootstrap_calibration_error,
    bootstrap_interval,
)

BINS = (10, 15)  # of calibration errors; the second is that of reliability diagrams too


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


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """−log softmax(logits / temperature)[label]: (N, C) and (N,) to (N,) nats; a logit of −inf stands for no class."""
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
    """softmax(logits / temperature) over the last axis, float64; a logit of −inf stands for no class."""
    scaled = np.asarray(logits, np.float64) / temperature
    return np.exp(scaled - log_sum_exp(scaled)[..., None])


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log Σ exp over the last axis, which has at least one finite value; float64."""
    values = np.asarray(values, np.float64)
    highest = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - highest).sum(axis=-1)) + highest[..., 0]


def describe_scores(scores: dict[str, np.ndarray], groups: np.ndarray | None = None) -> dict[str, Any]:
    """The mean of each of some (N,) scores, and `intervals`, their 95% bootstrap intervals where these are known."""
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in scores.items()}
    return {
        **means,
        "intervals": known_intervals({name: bootstrap_interval(values, groups=groups) for name, values in scores.items()}),
    }


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """The standard error of a mean over values that were sampled in groups, as positions are in sequences.

    From their sums (G,) over groups of `counts` (G,) values each, it is that of a ratio (Cochran 1977, Sampling Techniques,
    section 6.4): √(G / (G − 1) Σ (sum − count · mean)²) / Σ count.

    None for fewer groups than `bootstrap.MIN_GROUPS`, from which it is not known.
    """
    if len(sums) < MIN_GROUPS:
        return None
    apart = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (apart**2).sum()) / counts.sum())


def known_intervals(intervals: dict[str, Interval]) -> dict[str, list[float]]:
    """Intervals by name, for JSON, without those that are not known."""
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
        `intervals`, the 95% bootstrap interval of each of these by its name, where it is known; `reliability` of 15 bins.
    """
    figures = describe_scores({**scores, "accuracy": np.asarray(correct, np.float64)}, groups)
    intervals: dict[str, Interval] = {}
    for bins in BINS:
        figures[f"ece_{bins}"] = expected_calibration_error(confidence, correct, bins)
        intervals[f"ece_{bins}"] = bootstrap_calibration_error(confidence, correct, bins, groups=groups)
    figures["adaptive_ece"] = adaptive_calibration_error(confidence, correct, max(BINS))
    intervals["adaptive_ece"] = bootstrap_calibration_error(confidence, correct, max(BINS), adaptive=True, groups=groups)
    figures["intervals"] |= known_intervals(intervals)
    figures["reliability"] = reliability(confidence, correct, max(BINS)).as_dict()
    return figures


def check_finite(*scores: np.ndarray) -> None:
    """Refuse scores of a model, of any shape, that are not finite: no figure could be made of them (InputError)."""
    for values in scores:
        spoilt = values[~np.isfinite(values)]
        if len(spoilt):
            raise InputError(
                f"the model gives no probabilities that can be measured: a log-probability is {float(spoilt[0])}. Its training"
                " diverged or its weights are damaged; evaluate another model, or an earlier checkpoint of it"
            )


def rounded(values: np.ndarray) -> list[Any]:
    """Numbers, or rows of them, with five significant digits, for JSON."""
    return [rounded(value) if isinstance(value, np.ndarray) else float(f"{value:.5g}") for value in values]
