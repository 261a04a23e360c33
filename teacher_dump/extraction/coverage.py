"""How much of the teacher's probability the candidates of `positions` hold. No torch here."""

from __future__ import annotations

import numpy as np

from knowledge_store.kinds import Arrays
from teacher_dump.extraction.extractor import Total


def candidate_masses(knowledge: list[Arrays]) -> np.ndarray:
    """Probabilities of the candidates of all positions with knowledge, float64 (N, K)."""
    return np.concatenate(
        [np.exp(arrays["candidate_logprobs"][arrays["has_knowledge"]].astype(np.float64)) for arrays in knowledge]
    )


def coverage(knowledge: list[Arrays]) -> Total:
    """The probability that the candidates hold, over all positions with knowledge."""
    masses = candidate_masses(knowledge)
    return float(masses.sum()), len(masses) if masses.shape[1] else 0
