"""Two models on the same questions or the same text: by how much they differ, with 95% bootstrap intervals.

Both are resampled alike, whole questions or whole sequences at a time, so what is hard for both cancels out: two models can
differ clearly although their own intervals overlap. It reads the records that `evaluate` leaves, and needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from student_train.evaluation.bootstrap import (
    bootstrap,
    bootstrap_calibration_error,
    bootstrap_interval,
    gap_error,
    gap_error_difference,
    mean_of_sums,
)

SCORES = ("nll", "kl_lower_bound", "top_1_agreement", "accuracy", "brier")


@dataclass(frozen=True)
class Difference:
    """How much more one model has of something than another, and the interval that it lies in."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results of `evaluate` are of the same questions, answered alike, or of the same sequences."""
    if "questions" in one and "questions" in other:
        same = ("sha256", "answer_as", "shared_first_token")
        return all(one["questions"].get(name) == other["questions"].get(name) for name in same)
    if "dump" in one and "dump" in other:
        targets = [side["figures"].get("positions", {}).get("per_sequence", {}).get("targets") for side in (one, other)]
        return one["dump"]["name"] == other["dump"]["name"] and targets[0] == targets[1]
    return False


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Difference]:
    """`one` less `other`, for each figure that both have.

    Args:
        one, other: what a result keeps of each question (`answers` of a confidence) or of each sequence (`per_sequence`),
            of results that are `comparable`.

    Returns:
        By the names of figures: nll, accuracy, brier, ece_15; on questions ece_10 too, on sequences kl_lower_bound and
        top_1_agreement. The values are those of the rounded numbers that a result keeps.
    """
    return _of_sequences(one, other) if "targets" in one else _of_questions(one, other)


def _of_questions(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Difference]:
    result = {}
    for name, column in (("nll", "nll"), ("accuracy", "correct"), ("brier", "brier")):
        values, others = np.array(one[column], np.float64), np.array(other[column], np.float64)
        result[name] = Difference(float((values - others).mean()), *bootstrap_interval(values, others))
    first, second = ((np.array(side["confidence"]), np.array(side["correct"])) for side in (one, other))
    for bins in (10, 15):
        value = expected_calibration_error(*first, bins) - expected_calibration_error(*second, bins)
        result[f"ece_{bins}"] = Difference(value, *bootstrap_calibration_error(*first, bins, second))
    return result


def _of_sequences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Difference]:
    counts = np.array(one["targets"], np.float64)
    result = {}
    for name in SCORES:
        if name in one and name in other:
            sums = (np.array(one[name]) - np.array(other[name]))[:, None]
            result[name] = Difference(float(sums.sum() / counts.sum()), *bootstrap(sums, counts, mean_of_sums))
    gaps = np.concatenate([np.array(side["gaps_15"]) for side in (one, other)], axis=1)
    total = counts.sum(keepdims=True)
    first, second = (float(gap_error(part.sum(axis=0, keepdims=True), total)[0]) for part in np.split(gaps, 2, axis=1))
    result["ece_15"] = Difference(first - second, *bootstrap(gaps, counts, gap_error_difference))
    return result
