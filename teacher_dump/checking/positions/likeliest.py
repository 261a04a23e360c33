"""What was kept held against a teacher that gives its likeliest tokens alone. No torch here.

A candidate that was kept and is not among these now is less likely than the last of them, and is taken to be as likely: it is
off by that much at least. Draws and the entropy of tails are not compared.
"""

from __future__ import annotations

import numpy as np

from knowledge_store import Manifest
from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import positions_of
from knowledge_store.kinds.positions.remainder import remainder
from teacher_dump.checking.positions.steps import moved_steps
from teacher_dump.extraction.likeliest import problem_of
from teacher_dump.teachers.protocol import Likeliest


def compare_likeliest(answers: Likeliest, kept: Arrays, manifest: Manifest) -> Arrays:
    """Hold kept values against the likeliest tokens at n positions.

    Args:
        answers: the teacher's, at least as many as the dump has candidates at most.
        kept: of the same positions: token_id (n,), candidate_ids (n, K) (−1: none) and log-probabilities.
        manifest: of the dump.

    Returns:
        as that of `comparison.ask`.

    Raises:
        InputError: what the teacher says cannot be used.
    """
    if (problem := problem_of(answers, manifest.vocabulary_size)) is not None:
        raise InputError(f"the teacher {problem[1]}: look at what runs it")
    rule, ids = positions_of(manifest).selection, kept["candidate_ids"]
    present = ids >= 0
    values = np.repeat(answers.logprobs[:, -1:], ids.shape[1], axis=1)
    for rank in range(answers.ids.shape[1]):
        values = np.where(ids == answers.ids[:, rank, None], answers.logprobs[:, rank, None], values)
    values = np.where(ids == answers.token_ids[:, None], answers.token_logprobs[:, None], values)
    candidates = np.where(present, values, -np.inf)
    others = (answers.ids[:, :, None] != ids[:, None, :]).all(axis=2)
    best = np.where(others, answers.logprobs, -np.inf).max(axis=1)
    lowest = np.where(present, values, np.inf).min(axis=1, initial=np.inf)
    if rule.name == "threshold":
        limit = np.log(rule.draw_weight)
        off = np.maximum(best - limit, limit - lowest)
    else:
        off = (best - lowest) / 2
    if rule.name == "top-p":
        total = np.exp(candidates).sum(axis=1)
        full = present.sum(axis=1) >= min(rule.candidates, manifest.vocabulary_size)
        off = np.maximum(off, np.maximum(np.where(full, 0.0, rule.p - total), total - np.exp(lowest) - rule.p))
    tail = np.where(np.isneginf(kept["tail_logprob"]), -np.inf, remainder(candidates))
    now = {"token_logprob": answers.token_logprobs, "candidate_logprobs": candidates, "tail_logprob": tail}
    compared = moved_steps(now, kept, manifest, remainder=True)
    if rule.name != "threshold":
        compared["changed"] = (answers.ids[:, 0] != ids[:, 0]).astype(np.float64)
    return {**compared, "selection off": np.maximum(off, 0)}
