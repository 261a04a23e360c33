"""How far hidden states, pooled or not, are from those of now: the mean of ‖kept − asked‖ / ‖asked‖ over a sequence's states.

A pooled vector is one state. Rounding to 8 bits is in what was kept and in what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from knowledge_store.kinds import Arrays
from teacher_dump.checking.distances.distance import Distance, Limits


def between(kept: Arrays, asked: Arrays) -> float:
    """The mean distance, as a share of the norm. ValueError: the states are of another shape."""
    one, other = (_states(arrays) for arrays in (kept, asked))
    if one.shape != other.shape:
        raise ValueError("its states are of another shape than the teacher's")
    norms, distances = np.linalg.norm(other, axis=1), np.linalg.norm(one - other, axis=1)
    shares = distances[norms > 0] / norms[norms > 0]
    return float(shares.mean()) if len(shares) else float(distances.any())


def _states(arrays: Arrays) -> np.ndarray:
    """The states among a kind's arrays, float64 (N, W): the one that has several values a row."""
    [states] = [array for array in arrays.values() if array.ndim == 2]
    return states.astype(np.float64)


def difference(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why the hidden states of two teachers cannot even be compared."""
    for name, words in (("hidden_size", "hidden states of {:,} values"), ("layers", "{:,} layers")):
        if kept.get(name) != now.get(name) and kept.get(name) is not None and now.get(name) is not None:
            return f"the dump's teacher has {words.format(kept[name])}, and this one {words.format(now[name])}"
    return None


STATES = Distance(
    "hidden states", "its states are {} of their norm off", Limits(0.01, 0.03), Limits(0.25, 0.6), between, difference
)
