"""Is a model as sure as it is right? Reliability bins and expected calibration error, plain numpy.

Confidence is the probability of the likeliest token over the full vocabulary, and an answer is correct when that token
is the one that stands in the text. Calibration error alone is no proper score (a model that always says the base rate
has none), so read it beside the negative log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reliability:
    """Equal-width bins of confidence over (0, 1]; means are 0 in an empty bin."""

    counts: np.ndarray  # (bins,) int64
    confidence: np.ndarray  # (bins,) float64, mean confidence of the answers in the bin
    accuracy: np.ndarray  # (bins,) float64, share of them that are correct

    @property
    def error(self) -> float:
        """Expected calibration error Σ |B|/n · |accuracy − confidence| (Naeini et al. 2015), in [0, 1]."""
        total = self.counts.sum()
        if total == 0:
            return 0.0
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / total)

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
    confidence = np.asarray(confidence, dtype=np.float64)
    correct = np.asarray(correct, dtype=np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape} must be two lists of one length")
    # Rounding in float32 can leave a certain answer a hair above one.
    if confidence.size and not (confidence.min() >= 0 and confidence.max() <= 1 + 1e-6):
        raise ValueError("confidences are probabilities and must lie in [0, 1]")
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    filled = np.maximum(counts, 1)
    return Reliability(
        counts=counts,
        confidence=np.bincount(index, weights=confidence, minlength=bins) / filled,
        accuracy=np.bincount(index, weights=correct, minlength=bins) / filled,
    )


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Σ |B|/n · |accuracy − confidence| over equal-width bins (see `Reliability.error`)."""
    return reliability(confidence, correct, bins).error
