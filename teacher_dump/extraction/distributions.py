"""What `positions` keeps of each distribution: its likeliest tokens, draws from the others, and exactly what is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from knowledge_store.errors import InputError
from knowledge_store.format.sequences import sequence_id
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.extraction.coverage import candidate_masses
from teacher_dump.extraction.extractor import ExtractionBatch, Total
from teacher_dump.extraction.sampling import (
    block_sums,
    counted,
    draw,
    exponentials,
    independent_points,
    likeliest,
    precise,
    systematic_points,
)

SAMPLE_DEPTHS = (1, 5, 16, 50)  # of candidates, whose coverage `estimate` tells


class UnsoundLogits(InputError):
    """The teacher's logits are NaN or infinite; the message names the sequence."""


def knowledge_of(
    logits: Tensor,
    token_ids: Tensor,
    selection: Selection,
    points: Tensor | None = None,
    temperature: float | None = None,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """What a selection keeps of each distribution, and exactly what it leaves over.

    The tail is the log-sum-exp of all other logits, never log(1 − Σ), which loses everything where the candidates hold nearly
    all of the mass; its sum is made in float32 within blocks of `sampling.BLOCK` tokens and in float64 over the blocks. The
    full normaliser is then tail ⊕ candidates, so that the vocabulary is reduced only once.

    Args:
        logits: float32 (N, V); overwritten.
        token_ids: int64 (N,).
        selection: the rule; at most K = `selection.candidates` candidates.
        points: float64 (N, M), in [0, 1), where it draws; see `sampling`.
        temperature: one at which the tail is kept too.
        entropy: whether that of the tail is wanted.

    Returns:
        token_logprob (N,), candidate_ids (N, K) int64, candidate_logprobs (N, K), tail_logprob (N,): float32, nats, over the
        full vocabulary at temperature 1; candidates likeliest first, −inf behind the last that top-p needs; the tail is −inf
        when there is none. With points also tail_ids and tail_counts (N, M) int64, 0 for no draw. With a temperature T also
        tail_logsumexp (N,) float32: the log of the sum of p^(1/T) over the tail. With entropy also tail_entropy (N,) float32,
        nats: of the tail made to sum to one; 0 where there is none.
    """
    token_logit = logits.gather(1, token_ids[:, None])[:, 0]
    width = min(selection.candidates, logits.shape[1])
    # One more than the candidates is the likeliest of the tail.
    values, ids = likeliest(logits, min(width + 1, logits.shape[1]))
    candidates, ids = values[:, :width], ids[:, :width]
    if selection.name == "top-p":
        mass = precise(torch.exp(candidates - torch.logsumexp(logits, dim=1, keepdim=True)))
        needed = (mass.cumsum(dim=1) - mass < selection.p).to(logits.device)
    else:
        needed = torch.ones_like(candidates, dtype=torch.bool)
    logits.scatter_(1, ids, candidates.masked_fill(needed, -torch.inf))
    candidates = candidates.masked_fill(~needed, -torch.inf)
    highest = pad(values, (0, 1), value=-torch.inf).gather(1, needed.sum(dim=1, keepdim=True))
    whole = highest.isneginf()  # the candidates hold all of it
    highest = highest.masked_fill(whole, 0)
    logits.sub_(highest)
    if temperature is not None:
        tempered = block_sums(torch.exp(logits / temperature)).sum(dim=1).log()
    weights, weighted_logs = exponentials(logits) if entropy else (logits.exp_(), None)
    sums = block_sums(weights)
    tail = (sums.sum(dim=1).log() + precise(highest[:, 0])).float().to(logits.device)
    total = torch.logaddexp(tail, torch.logsumexp(candidates, dim=1)) if selection.candidates else tail
    knowledge = {
        "token_logprob": token_logit - total,
        "candidate_ids": ids,
        "candidate_logprobs": candidates - total[:, None],
        "tail_logprob": tail - total,
    }
    if weighted_logs is not None:
        # ln Σ w − Σ w ln w / Σ w.
        total_weight = sums.sum(dim=1)
        tail_entropy = torch.where(total_weight > 0, total_weight.log() - weighted_logs / total_weight, 0)
        knowledge["tail_entropy"] = tail_entropy.clamp(min=0).float().to(logits.device)
    if points is not None:
        # Something to draw, which then counts for nothing.
        for masses in (weights, sums):
            masses[:, 0].masked_fill_(whole[:, 0].to(masses.device), 1)
        knowledge["tail_ids"], counts = counted(draw(weights, sums, points))
        knowledge["tail_counts"] = counts.masked_fill(whole, 0)
    if temperature is not None:
        knowledge["tail_logsumexp"] = (tempered + precise(highest[:, 0] - total) / temperature).float().to(logits.device)
    return knowledge


def extract_positions(batch: ExtractionBatch) -> list[Arrays]:
    """What the selection keeps of every target position (and context position, where asked for); see `kinds.positions`.

    Raises:
        UnsoundLogits: a logit is NaN or infinite; names the sequence.
    """
    lengths = np.array([len(sequence.token_ids) for sequence in batch.sequences])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    token_ids = np.concatenate([sequence.token_ids for sequence in batch.sequences])
    is_target = np.concatenate([sequence.is_target for sequence in batch.sequences])
    kept = positions > 0 if batch.parameters.keep_context else is_target
    answers = _ask(batch, rows[kept], positions[kept], token_ids[kept], _points(batch, lengths)[kept])
    arrays: Arrays = {"token_id": token_ids.astype(np.uint32), "is_target": is_target, "has_knowledge": kept}
    for name, values in answers.items():
        arrays[name] = np.zeros((len(kept), *values.shape[1:]), values.dtype)
        arrays[name][kept] = values
    ends = np.cumsum(lengths)
    return [
        {name: array[end - length : end] for name, array in arrays.items()}
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def _points(batch: ExtractionBatch, lengths: np.ndarray) -> np.ndarray:
    """The random points of all positions of a batch, float64 (sum of lengths, draws)."""
    selection = batch.parameters.selection
    points = systematic_points if selection.candidates else independent_points
    return np.concatenate(
        [
            points(number_of(sequence), int(length), selection.draws)
            for sequence, length in zip(batch.sequences, lengths, strict=True)
        ]
    )


def _ask(batch: ExtractionBatch, rows: np.ndarray, positions: np.ndarray, token_ids: np.ndarray, points: np.ndarray) -> Arrays:
    """What the teacher predicts of the N tokens at (rows[i], positions[i]), int64 (N,) each; no position is 0."""
    device, parameters = batch.prediction.teacher.device, batch.parameters
    places, before, tokens = (torch.from_numpy(array).to(device) for array in (rows, positions - 1, token_ids))
    drawn = torch.from_numpy(points) if parameters.selection.draws else None
    more = parameters.temperature, parameters.tail_entropy
    finite: list[Tensor] = []
    results: list[dict[str, Tensor]] = []
    for part, logits in batch.prediction.logit_slices(places, before):
        lowest = logits.amin(dim=1)
        part_points = None if drawn is None else drawn[part]
        results.append(knowledge_of(logits, tokens[part], parameters.selection, part_points, *more))
        # A logit that is NaN or +inf makes the normaliser so, and with it the token's log-probability.
        finite.append(lowest.isfinite() & results[-1]["token_logprob"].isfinite())
    if not results:
        nothing = torch.zeros((0, batch.prediction.teacher.vocabulary_size))
        tokens = torch.zeros(0, dtype=torch.int64)
        results.append(knowledge_of(nothing, tokens, parameters.selection, drawn, *more))
    not_finite = ~torch.cat(finite).cpu().numpy() if finite else np.zeros(0, bool)
    if not_finite.any():
        raise UnsoundLogits(
            f"the teacher's logits are NaN or infinite in {place_of(batch.sequences[rows[not_finite][0]])}:"
            " nothing of its shard was written. Check the teacher's weights; if its dtype is a short one,"
            " dump under another --name with --dtype float32"
        )
    arrays = {name: torch.cat([result[name] for result in results]).cpu().numpy() for name in results[0]}
    # Half the room until the shard is written.
    return {name: array.astype(np.uint32) if array.dtype == np.int64 else array for name, array in arrays.items()}


def number_of(sequence: TokenSequence) -> int:
    """The sequence's id."""
    return sequence_id(sequence.document.number, sequence.window)


def place_of(sequence: TokenSequence) -> str:
    """Where a sequence stands, in words."""
    document = sequence.document
    return f"sequence {number_of(sequence)} (row {document.row} of corpus file {document.file + 1}, window {sequence.window})"


def coverage_by_depth(batch: ExtractionBatch) -> dict[str, Total]:
    """The probability that the k likeliest tokens hold, for several k, and for the selection's own where it is top-k."""
    selection, vocabulary = batch.parameters.selection, batch.prediction.teacher.vocabulary_size
    depths = sorted({*SAMPLE_DEPTHS, *([selection.candidates] if selection.name == "top-k" else [])})
    deepest = Selection("top-k", min(depths[-1], vocabulary))
    parameters = replace(batch.parameters, selection=deepest, calibration={}, tail_entropy=False)
    masses = candidate_masses(extract_positions(replace(batch, parameters=parameters)))
    sums = masses.sum(axis=0).cumsum()
    return {f"top-{depth} coverage": (float(sums[min(depth, len(sums)) - 1]), len(masses)) for depth in depths}
