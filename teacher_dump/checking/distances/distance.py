"""What tells how far one kind of knowledge of a sequence is from what a teacher gives now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from knowledge_store.kinds import Arrays


@dataclass(frozen=True)
class Limits:
    """What numeric noise can do: how far it takes a sequence from what was kept.

    Attributes:
        typical: the median sequence. single: any one.
    """

    typical: float
    single: float


def no_difference(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """For kinds that all teachers of one vocabulary can be compared by."""
    return None


@dataclass(frozen=True)
class Distance:
    """How one kind of knowledge is compared.

    Attributes:
        asked_for: what the teacher is asked for.
        words: what a distance says of a sequence; `{}` stands for it, in percent.
        float32: limits where both were asked in float32 or float64. short: where a dtype has 16 bits.
        between: the distance of a sequence's arrays as they were kept and of those of now, both as `Kind.decode` gives them; 0
            where they are the same. ValueError: they are no knowledge of the kind.
        difference: why two teachers cannot even be compared, one sentence, given what manifests say of them.
    """

    asked_for: str
    words: str
    float32: Limits
    short: Limits
    between: Callable[[Arrays, Arrays], float]
    difference: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] = no_difference
