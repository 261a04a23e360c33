"""Predictions as people read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from knowledge_store.kinds.columns import Arrays
from knowledge_store.kinds.positions.packing import NO_MASS, NO_TOKEN


def show(knowledge: Arrays, text: Callable[[int], str]) -> tuple[list[str], list[list[str]]]:
    """A sequence as a person reads it: each token, and what the teacher expected there."""
    rows = []
    for position, token in enumerate(knowledge["input_ids"]):
        row = [str(position), text(token), "", ""]
        if knowledge["has_knowledge"][position]:
            listed = zip(knowledge["candidate_ids"][position], knowledge["candidate_logprobs"][position], strict=True)
            candidates = {candidate: logprob for candidate, logprob in listed if logprob > NO_MASS}
            words = [f"{text(candidate)} {math.exp(logprob):.0%}" for candidate, logprob in candidates.items()]
            others = f"(others {math.exp(knowledge['tail_logprob'][position]):.0%}{_drawn(knowledge, position, text)})"
            # Among the candidates it is normalised with them; elsewhere it is as it was kept.
            logprob = candidates.get(token, knowledge["token_logprob"][position])
            row[2:] = ["?" if math.isnan(logprob) else f"{math.exp(logprob):.1%}", "  ".join([*words, others])]
        rows.append(row)
    return ["position", "token", "probability", "what the teacher expected"], rows


def _drawn(knowledge: Arrays, position: int, text: Callable[[int], str]) -> str:
    """Which tokens were drawn from the tail, and how often each of them that came more than once."""
    if "tail_ids" not in knowledge:
        return ""
    drawn = Counter(knowledge["tail_ids"][position].tolist())
    words = [text(token) + (f" ×{count}" if count > 1 else "") for token, count in drawn.items() if token != NO_TOKEN]
    return f", drawn: {' '.join(words)}" if words else ""
