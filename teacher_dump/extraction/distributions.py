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
from knowledge_store.kinds.positions.selection import Selection, most_above
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.extraction.coverage import candidate_masses
from teacher_dump.extraction.extractor import ExtractionBatch, Total
from teacher_dump.extraction.likeliest import candidates_of, problem_of
from teacher_dump.extraction.sampling import block_sums, draw, exponentials, likeliest, precise, starts
from teacher_dump.teachers.protocol import Ability

SAMPLE_DEPTHS = (1, 5, 16, 50)  # of candidates, whose coverage `estimate` tells
FILLERS = {"candidate_logprobs": -torch.inf, "tail_ids": -1}  # behind the last of a row


class UnsoundLogits(InputError):
    """The teacher's logits are NaN or infinite; the message names the sequence."""


def knowledge_of(
    logits: Tensor,
    token_ids: Tensor,
    selection: Selection,
    begin: Tensor | None = None,
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
        begin: float64 (N,), in [0, 1), where it draws; see `sampling.starts`.
        temperature: one at which the tail is kept too.
        entropy: whether that of the tail is wanted.

    Returns:
        token_logprob (N,), candidate_ids (N, K) int64, candidate_logprobs (N, K), tail_logprob (N,): float32, nats, over the
        full vocabulary at temperature 1; candidates likeliest first, −inf behind the last; the tail is −inf
        when there is none. With `begin` also tail_ids (N, M) int64, −1 behind the last draw. With a temperature T also
        tail_logsumexp (N,) float32: the log of the sum of p^(1/T) over the tail. With entropy also tail_entropy (N,) float32,
        nats: of the tail made to sum to one; 0 where there is none. K and M are no larger than some row needs.
    """
    token_logit = logits.gather(1, token_ids[:, None])[:, 0]
    width = min(selection.candidates, logits.shape[1])
    # One more than the candidates is the likeliest of the tail.
    values, ids = likeliest(logits, min(width + 1, logits.shape[1]))
    candidates, ids = values[:, :width], ids[:, :width]
    if selection.name == "top-k":
        needed = torch.ones_like(candidates, dtype=torch.bool)
    else:
        mass = precise(torch.exp(candidates - torch.logsumexp(logits, dim=1, keepdim=True)))
        threshold = selection.name == "threshold"
        needed = (mass >= selection.draw_weight) if threshold else (mass.cumsum(dim=1) - mass < selection.p)
        needed = needed[:, : int(needed.sum(dim=1).max()) if len(needed) else 0].to(logits.device)
        candidates, ids = candidates[:, : needed.shape[1]], ids[:, : needed.shape[1]]
    logits.scatter_(1, ids, candidates.masked_fill(needed, -torch.inf))
    candidates = candidates.masked_fill(~needed, -torch.inf)
    highest = pad(values, (0, 1), value=-torch.inf).gather(1, needed.sum(dim=1, keepdim=True))
    highest = highest.masked_fill(highest.isneginf(), 0)  # the candidates hold all of it
    logits.sub_(highest)
    if temperature is not None:
        tempered = block_sums(torch.exp(logits / temperature)).sum(dim=1).log()
    weights, weighted_logs = exponentials(logits) if entropy else (logits.exp_(), None)
    sums = block_sums(weights)
    above = precise(highest[:, 0])
    tail = sums.sum(dim=1).log() + above
    total = torch.logaddexp(tail, torch.logsumexp(precise(candidates), dim=1))
    knowledge = {
        "token_logprob": precise(token_logit) - total,
        "candidate_ids": ids,
        "candidate_logprobs": precise(candidates) - total[:, None],
        "tail_logprob": tail - total,
    }
    if weighted_logs is not None:
        # ln Σ w − Σ w ln w / Σ w.
        total_weight = sums.sum(dim=1)
        tail_entropy = torch.where(total_weight > 0, total_weight.log() - weighted_logs / total_weight, 0)
        knowledge["tail_entropy"] = tail_entropy.clamp(min=0)
    if begin is not None:
        spacing = selection.draw_weight * torch.exp(total - above)
        knowledge["tail_ids"] = draw(weights, sums, spacing, begin, most_above(selection.draw_weight) + 1)
    if temperature is not None:
        knowledge["tail_logsumexp"] = tempered + (above - total) / temperature
    return {
        name: values.float().to(logits.device) if values.is_floating_point() else values for name, values in knowledge.items()
    }


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
    if Ability.DISTRIBUTIONS in batch.prediction.teacher.abilities:
        begin = _starts(batch, lengths)
        answers = _ask(batch, rows[kept], positions[kept], token_ids[kept], None if begin is None else begin[kept])
    else:
        answers = _ask_likeliest(batch, rows[kept], positions[kept])
    arrays: Arrays = {"token_id": token_ids.astype(np.uint32), "is_target": is_target, "has_knowledge": kept}
    for name, values in answers.items():
        arrays[name] = np.zeros((len(kept), *values.shape[1:]), values.dtype)
        arrays[name][kept] = values
    ends = np.cumsum(lengths)
    return [
        {name: array[end - length : end] for name, array in arrays.items()}
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def _starts(batch: ExtractionBatch, lengths: np.ndarray) -> np.ndarray | None:
    """Where the draws of all positions of a batch start, float64 (sum of lengths,); None where nothing is drawn."""
    selection = batch.parameters.selection
    if not selection.draw_weight:
        return None
    return np.concatenate(
        [
            starts(number_of(sequence), int(length), selection.draw_seed)
            for sequence, length in zip(batch.sequences, lengths, strict=True)
        ]
    )


def _ask(
    batch: ExtractionBatch, rows: np.ndarray, positions: np.ndarray, token_ids: np.ndarray, begin: np.ndarray | None
) -> Arrays:
    """What the teacher predicts of the N tokens at (rows[i], positions[i]), int64 (N,) each; no position is 0."""
    device, parameters = batch.prediction.teacher.device, batch.parameters
    places, before, tokens = (torch.from_numpy(array).to(device) for array in (rows, positions - 1, token_ids))
    starting = None if begin is None else torch.from_numpy(begin)
    more = parameters.temperature, parameters.tail_entropy
    finite: list[Tensor] = []
    results: list[dict[str, Tensor]] = []
    for part, logits in batch.prediction.logit_slices(places, before):
        lowest = logits.amin(dim=1)
        part_starting = None if starting is None else starting[part]
        results.append(knowledge_of(logits, tokens[part], parameters.selection, part_starting, *more))
        # A logit that is NaN or +inf makes the normaliser so, and with it the token's log-probability.
        finite.append(lowest.isfinite() & results[-1]["token_logprob"].isfinite())
    if not results:
        nothing = torch.zeros((0, batch.prediction.teacher.vocabulary_size))
        tokens = torch.zeros(0, dtype=torch.int64)
        results.append(knowledge_of(nothing, tokens, parameters.selection, starting, *more))
    not_finite = ~torch.cat(finite).cpu().numpy() if finite else np.zeros(0, bool)
    if not_finite.any():
        raise UnsoundLogits(
            f"the teacher's logits are NaN or infinite in {place_of(batch.sequences[rows[not_finite][0]])}:"
            " nothing of its shard was written. Check the teacher's weights; if its dtype is a short one,"
            " dump under another --name with --dtype float32"
        )
    arrays = {name: _stacked([result[name] for result in results], FILLERS.get(name, 0)) for name in results[0]}
    # Half the room until the shard is written.
    narrow = {"candidate_ids": np.uint32, "tail_ids": np.int32}
    return {name: array.astype(narrow.get(name, np.float32)) for name, array in arrays.items()}


def _ask_likeliest(batch: ExtractionBatch, rows: np.ndarray, positions: np.ndarray) -> Arrays:
    """The same of a teacher that gives the likeliest tokens alone (see `likeliest.candidates_of`)."""
    teacher = batch.prediction.teacher
    answers = batch.prediction.likeliest(rows, positions - 1)
    if (problem := problem_of(answers, teacher.vocabulary_size)) is not None:
        number, words = problem
        raise InputError(
            f"the teacher {teacher.description['name']!r} {words} at position {positions[number]} of"
            f" {place_of(batch.sequences[rows[number]])}: nothing of its shard was written. Look at what runs the teacher"
        )
    return candidates_of(answers, batch.parameters.selection, teacher.vocabulary_size)


def _stacked(parts: list[Tensor], fill: float) -> np.ndarray:
    """Rows one after the other, narrower ones filled up."""
    width = max(part.shape[-1] for part in parts)
    if parts[0].dim() == 2:
        parts = [pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
    return torch.cat(parts).cpu().numpy()


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
    if Ability.DISTRIBUTIONS not in batch.prediction.teacher.abilities:
        depths = [depth for depth in depths if depth <= selection.candidates]
    deepest = Selection("top-k", min(depths[-1], vocabulary))
    parameters = replace(batch.parameters, selection=deepest, calibration={}, tail_entropy=False)
    masses = candidate_masses(extract_positions(replace(batch, parameters=parameters)))
    sums = masses.sum(axis=0).cumsum()
    return {f"top-{depth} coverage": (float(sums[min(depth, len(sums)) - 1]), len(masses)) for depth in depths}
