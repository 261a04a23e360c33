"""Permutations of 0 … count − 1 that take no memory: any place of one is computed from its key and the place alone.

A Feistel network over the pairs (l, r) of a grid that is just large enough (Black and Rogaway, CT-RSA 2002): each round adds to
one half a hash of the other, which can be taken back, so the whole is a bijection; what falls outside 0 … count − 1 goes
through it again until it does not. The hash is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014). numpy's own
generators promise no stream across versions, and a run that resumes after an upgrade must resume in the order it began.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

ROUNDS = 16  # with fewer the orders of five or six items are not equally likely
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64 - 1


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def _round_keys(key: tuple[int, ...]) -> list[np.uint64]:
    state = 0
    for part in key:
        state = _mix(((state ^ (int(part) & _WORD)) + _INCREMENT) & _WORD)
    return [np.uint64(_mix((state + number * _INCREMENT) & _WORD)) for number in range(1, ROUNDS + 1)]


def _hashed(words: np.ndarray, key: np.uint64, count: int) -> np.ndarray:
    """A number below `count` (at most 2^32) for each word."""
    words = words ^ key
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return (words >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)


def permuted(places: np.ndarray, count: int, *key: int) -> np.ndarray:
    """What stands at some places of a permutation of 0 … count − 1.

    Args:
        places: int64, each at least 0 and below `count`.
        count: at most 2^63.
        key: integers of any size, taken modulo 2^64, which decide the permutation.

    Returns:
        int64, of the same shape.
    """
    result = places.astype(np.uint64)
    if not result.size:
        return result.astype(np.int64)
    left = isqrt(count - 1) + 1 if count > 1 else 1
    right = -(-count // left)
    keys = _round_keys(key)
    beyond = np.ones(result.shape, bool)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        while beyond.any():
            result[beyond] = _rounds(result[beyond], left, right, keys)
            beyond = result >= count
    return result.astype(np.int64)


def _rounds(words: np.ndarray, left: int, right: int, keys: list[np.uint64]) -> np.ndarray:
    """The network over the numbers l · right + r, l < left and r < right."""
    halves, sizes = list(np.divmod(words, np.uint64(right))), (left, right)
    for number, key in enumerate(keys):
        changed = number % 2
        size = np.uint64(sizes[changed])
        total = halves[changed] + _hashed(halves[1 - changed], key, sizes[changed])
        halves[changed] = np.where(total >= size, total - size, total)
    return halves[0] * np.uint64(right) + halves[1]
