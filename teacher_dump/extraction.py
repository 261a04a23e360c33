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
from knowledge_store.sequences import sequence_id
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
    lengths = np.array([len(sequence.token_ids) for sequence in batch.sequences])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    token_ids = np.concatenate([sequence.token_ids for sequence in batch.sequences])
    is_target = np.concatenate([sequence.is_target for sequence in batch.sequences])
    kept = positions > 0 if batch.keep_context else is_target
    found = _ask(batch, rows[kept], positions[kept], token_ids[kept])
    arrays: Arrays = {"token_id": token_ids.astype(np.uint32), "is_target": is_target, "has_knowledge": kept}
    for name, values in found.items():
        arrays[name] = np.zeros((len(kept), *values.shape[1:]), values.dtype)
        arrays[name][kept] = values
    ends = np.cumsum(lengths)
    return [
        {name: array[end - length : end] for name, array in arrays.items()}
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def _ask(batch: ExtractionBatch, rows: np.ndarray, positions: np.ndarray, token_ids: np.ndarray) -> Arrays:
    """What the teacher predicts of the N tokens at (rows[i], positions[i]), int64 (N,) each; no position is 0."""
    device = batch.prediction.teacher.device
    places, before, tokens = (torch.from_numpy(each).to(device) for each in (rows, positions - 1, token_ids))
    sound: list[torch.Tensor] = []
    results: list[tuple[torch.Tensor, ...]] = []
    for part, logits in batch.prediction.logit_slices(places, before):
        # The extremes are NaN where anything is.
        sound.append(logits.amin(dim=1).isfinite() & logits.amax(dim=1).isfinite())
        results.append(top_k_knowledge(logits, tokens[part], batch.top_k))
    if not results:
        wide = (0, batch.top_k)
        return {
            "token_logprob": np.empty(0, np.float32),
            "candidate_ids": np.empty(wide, np.uint32),
            "candidate_logprobs": np.empty(wide, np.float32),
            "tail_logprob": np.empty(0, np.float32),
        }
    unsound = ~torch.cat(sound).cpu().numpy()
    if unsound.any():
        raise UnsoundLogits(
            f"the teacher's logits are NaN or infinite in {_place(batch.sequences[rows[unsound][0]])}:"
            " nothing of its shard was written. Check the teacher's weights; if its dtype is a short one,"
            " dump under another --name with --dtype float32"
        )
    token_logprob, ids, logprobs, tail = (torch.cat(each).cpu().numpy() for each in zip(*results, strict=True))
    return {
        "token_logprob": token_logprob,
        "candidate_ids": ids.astype(np.uint32),
        "candidate_logprobs": logprobs,
        "tail_logprob": tail,
    }


def _place(sequence: TokenSequence) -> str:
    document = sequence.document
    number = sequence_id(document.number, sequence.window)
    return f"sequence {number} (row {document.row} of corpus file {document.file + 1}, window {sequence.window})"


EXTRACTORS: dict[str, Extractor] = {
    "positions": extract_positions,
}
