"""The bootstrap: in which interval a mean, a calibration error or a difference of two models lies. In numpy.

What is resampled are groups, such as whole sequences. A statistic of sums over groups is all that a resample needs, so the
sums are computed once and every resample is a weighted sum of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from knowledge_store.calibration.expected_calibration_error import checked_answers, equal_count_bins, equal_width_bins

RESAMPLES = 2000
# Of what is resampled; fewer give an interval that claims to know too much.
MIN_GROUPS = 10
# Random numbers held at a time.
MAX_RANDOM_NUMBERS = 4_000_000

Interval = tuple[float, float]


def bootstrap_interval(
    values: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: (N,) one number for each question or position.
        groups: (N,) what is drawn whole, such as the sequence of each position; None when every value stands alone.
        resamples: how many samples with replacement.
        seed: of the draws.
        level: share of the resampled means that lie inside.

    Returns:
        The lower and the upper end; NaN twice for fewer than `MIN_GROUPS` values or groups.
    """
    sums, sizes = group_sums(values, groups)[:, None], group_sizes(len(values), groups)
    return bootstrap(sums, sizes, mean_of_sums, resamples=resamples, seed=seed, level=level)


def mean_of_sums(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean from resampled sums (R, 1) over (R,) values: (R,)."""
    return sums[:, 0] / counts


def bootstrap_calibration_error(
    confidence: np.ndarray,
    correct: np.ndarray,
    bins: int = 15,
    *,
    adaptive: bool = False,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The same for the expected calibration error.

    The error is a sum of absolute values and comes out higher on resampled answers than on the answers themselves (the
    noise in each bin counts), the more so the fewer there are: with few answers and a small error, the interval can lie
    above the error.

    Args:
        confidence, correct, bins: as in `reliability`.
        adaptive: bins of equal counts, as all answers together have them, in place of bins of equal width.
        groups, resamples, seed, level: as in `bootstrap_interval`.
    """
    gaps = calibration_gaps(confidence, correct, bins, adaptive=adaptive, groups=groups)
    return bootstrap(gaps, group_sizes(len(confidence), groups), gap_error, resamples=resamples, seed=seed, level=level)


def calibration_gaps(
    confidence: np.ndarray, correct: np.ndarray, bins: int, *, adaptive: bool = False, groups: np.ndarray | None = None
) -> np.ndarray:
    """(G, bins): the sum of correct − confidence over the answers of a group in a bin; groups in the order of `np.unique`,
    each answer its own when None. Summed over groups, made absolute, summed over bins and divided by the number of answers,
    it is the expected calibration error, so these sums are all that a bootstrap needs."""
    confidence, correct = checked_answers(confidence, correct)
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
        The lower and the upper end; NaN twice for fewer than `MIN_GROUPS` groups, whose resamples say little of how far
        others would stray.
    """
    size = len(sums)
    if size < MIN_GROUPS:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    statistics = []
    step = max(1, MAX_RANDOM_NUMBERS // size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=rows * size).reshape(rows, size).astype(np.float64)
        statistics.append(statistic(times @ sums, times @ counts))
    low, high = np.quantile(np.concatenate(statistics), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
