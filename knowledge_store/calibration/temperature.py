"""Fitting a temperature T: the logits of an over-confident model are divided by it (Guo et al. 2017, arXiv 1706.04599).

log Σ exp(z/T) − z_label/T is convex in 1/T, so there is one best temperature. Two ways lead to it: `fit_temperature` where the
loss can be asked for at any T, and `root_of_slopes` where each look at the logits is a pass of the model, so that one pass
collects the slopes at all temperatures of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Temperatures are looked for between 1/RANGE and RANGE.
RANGE = 20.0
_GOLDEN = (math.sqrt(5) - 1) / 2


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
    """The temperature that minimises a negative log-likelihood: a golden-section search over 1/T, to a ten thousandth of T.

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


def root_of_slopes(temperatures: np.ndarray, slopes: np.ndarray) -> tuple[float, bool]:
    """Where the slope of a convex function of 1 / T passes zero.

    Args:
        temperatures: float64 (M,), ascending, M at least 4.
        slopes: float64 (M,), of the derivative with respect to 1 / T: descending.

    Returns:
        the temperature, from the cubic in log T through the four slopes around it, and False; or the first or last
        temperature and True, when the slope does not pass zero between them.
    """
    if slopes[0] <= 0 or slopes[-1] >= 0:
        return float(temperatures[0 if slopes[0] <= 0 else -1]), True
    below = int(np.flatnonzero(slopes > 0)[-1])
    first = min(max(below - 1, 0), len(temperatures) - 4)
    places = np.log(temperatures)
    # Scaled, so that the system is well conditioned; the cubic then passes through all four.
    scale = np.abs(slopes[first : first + 4]).max()
    cubic = np.polynomial.Polynomial.fit(places[first : first + 4], slopes[first : first + 4] / scale, 3)
    low, high = places[below], places[below + 1]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cubic(middle) > 0 else (low, middle)
    return math.exp(low), False
