"""By how much two models differ on the same questions or the same text, with 95% bootstrap intervals. In numpy.

Both are resampled alike, whole questions or whole sequences at a time, so what is hard for both cancels out: two models can
differ clearly although their own intervals overlap. Which figures are compared, and from what, `Figures.differences` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from student_train.evaluation.bootstrap import bootstrap, gap_error_difference, mean_of_sums


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


def mean_difference(one: ArrayLike, other: ArrayLike, counts: np.ndarray) -> Difference:
    """Of two means, from their sums (G,) over groups of `counts` (G,) values each: `one` less `other`."""
    sums = (np.asarray(one, np.float64) - np.asarray(other, np.float64))[:, None]
    return Difference(float(sums.sum() / counts.sum()), *bootstrap(sums, counts, mean_of_sums))


def calibration_difference(one: ArrayLike, other: ArrayLike, counts: np.ndarray) -> Difference:
    """Of two expected calibration errors, from their `bootstrap.calibration_gaps` (G, bins) over the same groups."""
    gaps = np.concatenate([np.asarray(one, np.float64), np.asarray(other, np.float64)], axis=1)
    value = gap_error_difference(gaps.sum(axis=0, keepdims=True), counts.sum(keepdims=True))
    return Difference(float(value[0]), *bootstrap(gaps, counts, gap_error_difference))
