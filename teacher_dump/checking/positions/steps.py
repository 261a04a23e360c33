"""How far rounded values moved: in nats beyond rounding, and from step to step. No torch here."""

from __future__ import annotations

import numpy as np

from knowledge_store import Manifest
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import exact_steps, positions_of

ROUNDED = {"token_logprob": "token", "candidate_logprobs": "candidates", "tail_logprob": "tail", "tail_entropy": "tail entropy"}
SOUND_REMAINDER = -9.0  # nats: a tail above this is known to 0.003 nats as a remainder, and one below by ever less


def moved_steps(answers: Arrays, kept: Arrays, manifest: Manifest, remainder: bool = False) -> Arrays:
    """Hold values that were kept against what is said now.

    Args:
        answers: of a teacher now, float64, by the names of what was kept; what it does not say is not compared.
        kept: what was kept of n positions.
        manifest: of the dump.
        remainder: whether the tails of the answers are remainders. Where they are, or those of the dump, small ones are
            compared as SOUND_REMAINDER.

    Returns:
        "NAME off" (nats beyond rounding; NaN where there is no value) and "NAME moved" (nats, in whole steps) of each quantity.
    """
    parameters = positions_of(manifest)
    step, temperature = parameters.quantisation_step, parameters.temperature
    if remainder or parameters.tail == "remainder":
        kept = {**kept, "tail_logprob": _sound(kept["tail_logprob"])}
        answers = {**answers, "tail_logprob": _sound(answers["tail_logprob"])}
    compared = {}
    now = exact_steps({**kept, **answers}, manifest)
    for column, was in exact_steps(kept, manifest).items():
        if column not in answers:
            continue
        name = f"tail at T={temperature:g}" if column == "tail_logsumexp" else ROUNDED[column]
        with np.errstate(invalid="ignore"):  # a tail that is empty, then and now
            apart, moved = np.abs(was - now[column]), np.round(was) - np.round(now[column])
        same = was == now[column]
        compared[f"{name} off"] = np.where(same, 0, np.maximum(apart - 0.5, 0) * step)
        compared[f"{name} moved"] = np.where(same, 0, moved) * step
    return compared


def _sound(tail: np.ndarray) -> np.ndarray:
    """Tails, small ones as SOUND_REMAINDER; an empty one stays."""
    return np.where(np.isneginf(tail), tail, np.maximum(tail, SOUND_REMAINDER))
