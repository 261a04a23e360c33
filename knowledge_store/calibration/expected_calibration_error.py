"""Expected calibration error (ECE): is a model as confident as it is often right? In numpy, for teachers and for students.

*Confidence* is the probability of the answer that a model gives, and that answer is *correct* or not. Calibration error is
no proper score (a model that always says the base rate has none), so read it beside the negative log-likelihood or the
Brier score, which no model improves by saying anything but what it believes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    confidence, correct = checked_answers(confidence, correct)
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
    confidence, correct = checked_answers(confidence, correct)
    return _binned(confidence, correct, equal_count_bins(confidence, bins), bins).error


def equal_width_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence, (N,) int64: i for (i / bins, (i + 1) / bins]."""
    return np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def equal_count_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence, (N,) int64, by its rank; equal ones have the mean of their ranks."""
    _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2  # mean rank, from 0
    return np.minimum(np.floor((middle + 0.5) * bins / max(len(group), 1)).astype(np.int64), bins - 1)[group.reshape(-1)]


def checked_answers(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidences and whether they are correct, as float64 (N,) each (ValueError: they are not two such lists)."""
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
