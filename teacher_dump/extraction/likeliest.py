"""What `positions` keeps of a teacher that gives its likeliest tokens and no whole distribution: these, and what they leave.

What candidates leave of one is known less well than a log-sum-exp of all other logits (see `kinds.positions.remainder`), so the
manifest says `tail: remainder`. No torch here.
"""

from __future__ import annotations

import numpy as np

from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions.remainder import remainder
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump.teachers.protocol import Likeliest

MAX_SUM = 1.001  # of float32 probabilities


def candidates_of(answers: Likeliest, selection: Selection, vocabulary: int) -> Arrays:
    """What a selection without draws keeps of N distributions whose likeliest tokens are known.

    Args:
        answers: with at least as many of the likeliest tokens as the selection has candidates, or all of the vocabulary.
        selection: top-k or top-p.
        vocabulary: its size.

    Returns:
        token_logprob (N,), candidate_ids (N, K) uint32, candidate_logprobs (N, K), tail_logprob (N,): float32, nats; candidates
        likeliest first, −inf behind the last. They and the tail sum to one; the tail is −inf where they are the whole
        vocabulary.
    """
    width = min(selection.candidates, vocabulary)
    ids, logprobs = answers.ids[:, :width], answers.logprobs[:, :width].copy()
    if selection.name == "top-p":
        mass = np.exp(logprobs)
        needed = mass.cumsum(axis=1) - mass < selection.p
        width = int(needed.sum(axis=1).max(initial=0))
        ids, logprobs = ids[:, :width], np.where(needed, logprobs, -np.inf)[:, :width]
    tail = remainder(logprobs)
    among = ((ids == answers.token_ids[:, None]) & (logprobs > -np.inf)).any(axis=1)
    # What is known of the tail: it is no smaller than a token of it.
    tail = np.where(among, tail, np.maximum(tail, answers.token_logprobs))
    tail[(logprobs > -np.inf).sum(axis=1) == vocabulary] = -np.inf
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(logprobs).sum(axis=1) + np.exp(tail))
    return {
        "token_logprob": (answers.token_logprobs - total).astype(np.float32),
        "candidate_ids": ids.astype(np.uint32),
        "candidate_logprobs": (logprobs - total[:, None]).astype(np.float32),
        "tail_logprob": (tail - total).astype(np.float32),
    }


def problem_of(answers: Likeliest, vocabulary: int) -> tuple[int, str] | None:
    """Which of N answers is the first that cannot be used, and why, in words that follow "the teacher"; None where all can.

    Args:
        answers: to look at.
        vocabulary: its size.
    """
    given = answers.ids >= 0
    among = (answers.ids == answers.token_ids[:, None]).any(axis=1)
    own = np.where(among, -np.inf, answers.token_logprobs)
    with np.errstate(over="ignore"):
        total = np.exp(answers.logprobs).sum(axis=1) + np.exp(own)
    problems = {
        f"gives fewer log-probabilities than the {given.shape[1]} that it was asked for": ~given.all(axis=1),
        f"gives a token beyond its vocabulary, which has {vocabulary:,} by its config.json,": (answers.ids >= vocabulary).any(
            axis=1
        ),
        "gives a log-probability that is no number": np.isnan(total),
        "gives −9999, a probability of 0,": (np.isneginf(answers.logprobs) & given).any(axis=1)
        | np.isneginf(answers.token_logprobs),
        f"gives probabilities that sum to more than {MAX_SUM}": total > MAX_SUM,
    }
    places = [(int(wrong.argmax()), words) for words, wrong in problems.items() if wrong.any()]
    return min(places, default=None)
