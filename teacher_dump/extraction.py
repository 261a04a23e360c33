"""What is taken from a teacher's prediction, for each kind of knowledge.

An extractor gets one batch and gives, for each of its sequences, the arrays of its kind. To add a kind, write an extractor and
add its line to `EXTRACTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from teacher_dump.teacher import Prediction
from teacher_dump.tokenisation import TokenSequence


@dataclass(frozen=True)
class ExtractionBatch:
    """What an extractor is given.

    Attributes:
        sequences: the B sequences of the batch.
        prediction: the teacher's, for token ids padded on the right; hidden states (B, T, H), logits slice by slice.
        attention_mask: bool (B, T).
        top_k: candidates to keep at a position.
        keep_context: keep knowledge at context positions too.
    """

    sequences: list[TokenSequence]
    prediction: Prediction
    attention_mask: np.ndarray
    top_k: int
    keep_context: bool


Extractor = Callable[[ExtractionBatch], list[Arrays]]


class UnsoundLogits(InputError):
    """The teacher's logits are NaN or infinite; the message names the sequence."""


def top_k_knowledge(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """The likeliest tokens of each distribution, and exactly what they leave over.

    The tail is the log-sum-exp of all other logits, never log(1 − Σ), which loses everything where the candidates hold nearly
    all of the mass. The full normaliser is then tail ⊕ candidates, so the vocabulary is reduced only once.

    Args:
        logits: float32 (N, V); overwritten.
        token_ids: int64 (N,).
        k: candidates, at most V.

    Returns:
        token_logprob (N,), candidate_ids (N, k) int64, candidate_logprobs (N, k), tail_logprob (N,): float32, nats, over the
        full vocabulary; candidates likeliest first; the tail is −inf when k = V.
    """
    token_logit = logits.gather(1, token_ids[:, None])[:, 0]
    candidate_logits, candidate_ids = logits.topk(k, dim=1)
    logits.scatter_(1, candidate_ids, -torch.inf)
    tail = torch.logsumexp(logits, dim=1)
    total = torch.logaddexp(tail, torch.logsumexp(candidate_logits, dim=1))
    return token_logit - total, candidate_ids, candidate_logits - total[:, None], tail - total


def extract_positions(batch: ExtractionBatch) -> list[Arrays]:
    """Top-k knowledge of every target position (and context position, where asked for); see `kinds.positions.encode`.

    Raises:
        UnsoundLogits: a logit is NaN or infinite; names the sequence.
    """
    lengths = [len(sequence.token_ids) for sequence in batch.sequences]
    knowledge: list[Arrays] = []
    for sequence, length in zip(batch.sequences, lengths, strict=True):
        kept = np.arange(length) > 0 if batch.keep_context else sequence.is_target
        knowledge.append(
            {
                "token_id": sequence.token_ids.astype(np.uint32),
                "is_target": sequence.is_target,
                "has_knowledge": kept,
                "token_logprob": np.zeros(length, np.float32),
                "candidate_ids": np.zeros((length, batch.top_k), np.uint32),
                "candidate_logprobs": np.zeros((length, batch.top_k), np.float32),
                "tail_logprob": np.zeros(length, np.float32),
            }
        )
    places = [(row, position) for row, each in enumerate(knowledge) for position in np.flatnonzero(each["has_knowledge"])]
    if not places:
        return knowledge
    device = batch.prediction.teacher.device
    rows, positions = torch.tensor(places, device=device).unbind(1)
    tokens = torch.tensor([int(knowledge[row]["token_id"][position]) for row, position in places], device=device)
    results: list[tuple[torch.Tensor, ...]] = []
    for part, logits in batch.prediction.logit_slices(rows, positions - 1):
        # A finite sum has no NaN and no infinite term; float32 does not overflow over a vocabulary of sane logits.
        unsound = ~torch.isfinite(logits.sum(dim=1, dtype=torch.float64))
        if unsound.any():
            row = int(rows[part][unsound][0])
            raise UnsoundLogits(
                f"the teacher's logits are NaN or infinite in the sequence of {_place(batch.sequences[row])}:"
                " nothing of its shard was written. Try --dtype float32"
            )
        results.append(top_k_knowledge(logits, tokens[part], batch.top_k))
    token_logprob, ids, logprobs, tail = (torch.cat(each).cpu().numpy() for each in zip(*results, strict=True))
    start = 0
    for each in knowledge:
        kept = each["has_knowledge"]
        stop = start + int(kept.sum())
        each["token_logprob"][kept] = token_logprob[start:stop]
        each["candidate_ids"][kept] = ids[start:stop]
        each["candidate_logprobs"][kept] = logprobs[start:stop]
        each["tail_logprob"][kept] = tail[start:stop]
        start = stop
    return knowledge


def _place(sequence: TokenSequence) -> str:
    document = sequence.document
    return f"row {document.row} (document {document.number}, window {sequence.window}) of corpus file {document.file + 1}"


EXTRACTORS: dict[str, Extractor] = {
    "positions": extract_positions,
}
