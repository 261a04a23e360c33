"""What makes a model's confidences right after training, fitted on questions that it is not measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from knowledge_store.calibration.temperature import fit_temperature
from student_train.evaluation.metrics import negative_log_likelihood, softmax


@dataclass(frozen=True)
class Calibrator:
    """What turns the likelihoods of options (N, C), in nats, into confidences (N,); no answer changes.

    Attributes:
        confidence: the function.
        temperature: where it is one, so that the other options have probabilities too.
    """

    confidence: Callable[[np.ndarray], np.ndarray]
    temperature: float | None = None


def fit_calibrators(values: np.ndarray, answers: np.ndarray) -> dict[str, Calibrator]:
    """By name, calibrators fitted on likelihoods (N, C), in nats, of questions whose right options are `answers` (N,)."""
    confidence, correct = softmax(values).max(axis=1), values.argmax(axis=1) == answers
    temperature = fit_temperature(lambda each: float(negative_log_likelihood(values, answers, each).mean())).temperature
    slope, offset = platt(logit(confidence), correct)
    edges, heights = isotonic(confidence, correct)
    return {
        "none": Calibrator(lambda found: softmax(found).max(axis=1), 1.0),
        "temperature": Calibrator(lambda found: softmax(found, temperature).max(axis=1), temperature),
        "Platt": Calibrator(lambda found: 1 / (1 + np.exp(-(slope * logit(softmax(found).max(axis=1)) + offset)))),
        "isotonic": Calibrator(lambda found: np.interp(softmax(found).max(axis=1), edges, heights)),
    }


def logit(probabilities: np.ndarray) -> np.ndarray:
    """log p / (1 − p), of what is a float32's rounding away from 0 and 1 at least."""
    inside = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return np.log(inside / (1 - inside))


def platt(values: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic function that is likeliest (Platt 1999, with its targets that are not quite 0 and 1), by
    Newton's method."""
    right = correct.sum()
    targets = np.where(correct, (right + 1) / (right + 2), 1 / (len(correct) - right + 2))
    columns, weights = np.stack([values, np.ones(len(values))], axis=1), np.zeros(2)
    for _ in range(100):
        probability = 1 / (1 + np.exp(-columns @ weights))
        curvature = columns.T @ (columns * (probability * (1 - probability))[:, None]) + 1e-6 * np.eye(2)
        step = np.linalg.solve(curvature, columns.T @ (targets - probability))
        weights = weights + step * min(1.0, 5 / np.abs(step).max(initial=1e-12))
    return float(weights[0]), float(weights[1])


def isotonic(values: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rising step function of least squares, by pooling adjacent violators: the values, each once, and the heights."""
    edges, place = np.unique(values, return_inverse=True)
    pools: list[tuple[float, int, int]] = []  # how many are right, of how many, at how many values
    for right, count in zip(np.bincount(place, correct), np.bincount(place), strict=True):
        pools.append((right, count, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            last, before = pools.pop(), pools.pop()
            pools.append((last[0] + before[0], last[1] + before[1], last[2] + before[2]))
    return edges, np.repeat([right / count for right, count, _ in pools], [width for _, _, width in pools])
