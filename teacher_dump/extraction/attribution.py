"""What `saliency` keeps of a batch: how far the log-odds of its targets move with the embedding of each token.

Log-odds and not log-probabilities: a token that the teacher holds for all but impossible, such as an end of sequence it never
learnt, would take over the sum of those, and one that it is sure of would have no gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from knowledge_store.kinds import Arrays
from teacher_dump.extraction.distributions import UnsoundLogits, place_of
from teacher_dump.extraction.extractor import ExtractionBatch


def log_odds_slopes(logits: Tensor, tokens: Tensor) -> Tensor:
    """The gradient of z_y − LSE_{v≠y} z_v with regard to the logits z, row by row: 1 at y, −softmax of the others elsewhere.

    The sum over the others is made with y masked: as log(1 − p) it would be nothing but rounding where p is near 1.

    Args:
        logits: float32 (N, V); overwritten.
        tokens: y, int64 (N,).

    Returns:
        float32 (N, V).
    """
    slopes = torch.softmax(logits.scatter_(1, tokens[:, None], -torch.inf), dim=1).neg_()
    return slopes.scatter_(1, tokens[:, None], 1.0)


def token_saliency(embeddings: Tensor, gradients: Tensor, method: str) -> Tensor:
    """The saliency of each token, float32 (B, T), of embeddings and gradients (B, T, E); see `kinds.saliency`."""
    if method == "input-x-gradient":
        return (embeddings.float() * gradients.float()).sum(dim=2).abs()
    return gradients.float().norm(dim=2)


def extract_saliency(batch: ExtractionBatch) -> list[Arrays]:
    """The saliency of every token of the contexts; see `kinds.saliency`.

    Raises:
        UnsoundLogits: a gradient is NaN or infinite; names the sequence.
    """
    parameters, device = batch.parameters, batch.prediction.teacher.device
    lengths = [len(sequence.token_ids) for sequence in batch.sequences]
    targets = [np.flatnonzero(sequence.is_target) for sequence in batch.sequences]
    rows = torch.from_numpy(np.repeat(np.arange(len(lengths)), [len(places) for places in targets])).to(device)
    before = torch.from_numpy(np.concatenate(targets) - 1).to(device)
    token_ids = [sequence.token_ids[sequence.is_target] for sequence in batch.sequences]
    gold = torch.from_numpy(np.concatenate(token_ids)).to(device)
    embeddings, gradients = batch.prediction.input_gradients(rows, before, _slopes(parameters.of, gold))
    saliency = token_saliency(embeddings, gradients, parameters.method).cpu().numpy()
    extracted = []
    for sequence, places, values, length in zip(batch.sequences, targets, saliency, lengths, strict=True):
        context = ~sequence.is_target & (np.arange(length) < places.max(initial=0))
        if not np.isfinite(values[:length][context]).all():
            raise UnsoundLogits(
                f"the teacher's gradients are NaN or infinite in {place_of(sequence)}: nothing of its shard was written. Check"
                " the teacher's weights; if its dtype is a short one, dump under another --name with --dtype float32"
            )
        arrays: Arrays = {"share": np.ma.masked_array(values[:length], ~context)}
        if "positions" not in batch.kinds:
            arrays |= {"token_id": sequence.token_ids.astype(np.uint32), "is_target": sequence.is_target}
        extracted.append(arrays)
    return extracted


def _slopes(subject: str, gold: Tensor) -> Callable[[slice, Tensor], Tensor]:
    """What `Prediction.input_gradients` takes, for the targets that stand there or the teacher's likeliest tokens."""
    if subject == "teacher":
        return lambda part, logits: log_odds_slopes(logits, logits.argmax(dim=1))
    return lambda part, logits: log_odds_slopes(logits, gold[part])
