"""The kind `positions`: what the teacher predicted at each position. `kind` declares it; the other files are its parts.

A kind with more to it than one file is a folder like this one.
"""

from knowledge_store.kinds.positions.kind import (
    POSITIONS,
    PositionsParameters,
    damage,
    exact_steps,
    knows_full_kl,
    knows_likeliest,
    knows_tokens,
    positions_of,
)
from knowledge_store.kinds.positions.remainder import MIN_LOG_REMAINDER, remainder

__all__ = [
    "MIN_LOG_REMAINDER",
    "POSITIONS",
    "PositionsParameters",
    "damage",
    "exact_steps",
    "knows_full_kl",
    "knows_likeliest",
    "knows_tokens",
    "positions_of",
    "remainder",
]
