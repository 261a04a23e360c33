"""The tail that candidates leave, where nobody said how large it is: one less the sum of their probabilities.

The teacher's log-probabilities are float32, so the sum is off by some 1e-7, and the remainder, where it is small, by much more
than itself. Of a tail of e⁻⁷ it is off by 5e-4 nats, of e⁻⁹ by 0.003, of e⁻¹¹ by 0.016, below e⁻¹³ by 0.14 and more: below that
it is kept as e⁻¹³. The manifest of a dump with such tails says `tail: remainder`.
"""

from __future__ import annotations

import numpy as np

MIN_LOG_REMAINDER = -13.0  # nats


def remainder(candidate_logprobs: np.ndarray) -> np.ndarray:
    """The tail's log-probability as what candidates leave of one, at least MIN_LOG_REMAINDER.

    Args:
        candidate_logprobs: nats (N, K), −inf for no candidate.

    Returns:
        nats, float64 (N,). Candidates that reach one, or more, leave MIN_LOG_REMAINDER.
    """
    left = 1 - np.exp(candidate_logprobs.astype(np.float64)).sum(axis=1)
    return np.log(np.maximum(left, np.exp(MIN_LOG_REMAINDER)))
