"""The order in which sequences are read: a pure function of (seed, epoch), the same for ever and on every machine.

Each sequence is ranked by a hash of its ordinal, the seed and the epoch. numpy's own generators promise no stream across
versions, and a run that resumes after an upgrade must resume in the order it began. The hash is SplitMix64's finaliser
(Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words, so the keys of one epoch never tie.
"""

from __future__ import annotations

import numpy as np


def _mix(words: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 … count − 1 in the order of (seed, epoch), int64."""
    increment = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        start = _mix(_mix(np.array([int(seed) % 2**64], np.uint64) + increment) + np.uint64(int(epoch) % 2**64) * increment)
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ start), kind="stable")


def batch_items(step: int, rank: int, world_size: int, batch_size: int, consumed: int) -> slice:
    """Which items of the order make batch `step` of `rank`: [(s·W + r)·B, (s·W + r + 1)·B), counted from `consumed`."""
    start = consumed + (step * world_size + rank) * batch_size
    return slice(start, start + batch_size)


def step_count(items: int, world_size: int, batch_size: int) -> int:
    """Steps in which every rank takes a batch until `items` are gone; the last may be short on some ranks."""
    return -(-max(items, 0) // (world_size * batch_size))
