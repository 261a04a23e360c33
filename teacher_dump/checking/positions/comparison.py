"""What was kept of some sequences, held against what the teacher says of them now."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.columns import padded_lists
from knowledge_store.kinds.positions import damage, positions_of
from knowledge_store.reporter import Reporter
from teacher_dump.checking.positions.likeliest import compare_likeliest
from teacher_dump.checking.positions.steps import moved_steps
from teacher_dump.configuration import TeacherOptions
from teacher_dump.dumping.batches import batch_arrays, enough_memory
from teacher_dump.extraction.sampling import precise, starts
from teacher_dump.teachers.protocol import Ability, Prediction, Teacher


@dataclass(frozen=True)
class KeptSequence:
    """One sequence as it was kept: L tokens, N of them with knowledge, at `places`.

    Attributes:
        number: its sequence_id.
        token_ids: int64 (L,). places: int64 (N,).
        rows: the N rows of `positions`, sound in themselves.
    """

    number: int
    token_ids: np.ndarray
    places: np.ndarray
    rows: pa.Table


def read_sequences(store: KnowledgeStore, manifest: Manifest, ordinals: list[int]) -> tuple[list[KeptSequence], list[str]]:
    """The sequences that can be read, and a sentence for each that cannot."""
    kept, unreadable = [], []
    for ordinal in ordinals:
        try:
            rows, stated = store.stored(ordinal, "positions", manifest.dump)
        except DamageError as error:
            unreadable.append(str(error))
            continue
        number, token_ids = rows["sequence_id"][0].as_py(), rows["token_id"].to_numpy().astype(np.int64)
        longest = manifest.plan["max_length"]
        if len(token_ids) > longest:  # a batch has room for so many, and may take all memory there is otherwise
            unreadable.append(f"sequence {number}: it has {len(token_ids):,} tokens, and the dump's longest have {longest:,}")
            continue
        complaint = next(damage(rows, manifest), None)
        if token_hash(token_ids) != stated:
            complaint = "its token ids do not match the hash that was kept of them"
        if complaint:
            unreadable.append(f"sequence {number}: {complaint}")
            continue
        known = rows["candidate_ids"].is_valid()
        kept.append(KeptSequence(number, token_ids, np.flatnonzero(known.to_numpy()), rows.filter(known)))
    return kept, unreadable


def _arrays(rows: pa.Table) -> Arrays:
    """What was kept of N positions.

    Returns:
        token_id (N,), candidate_ids (N, K) (−1: none) and, float64, token_logprob (N,), candidate_logprobs (N, K) (−inf: none),
        tail_logprob (N,); where there are any tail_logsumexp (N,), tail_entropy (N,) and tail_ids (N, M) (−1: none). Ids are
        int64.
    """
    arrays = {
        "token_id": rows["token_id"].to_numpy().astype(np.int64),
        "candidate_ids": padded_lists(rows["candidate_ids"], -1, np.int64)[0],
        "candidate_logprobs": padded_lists(rows["candidate_logprobs"], -np.inf, np.float64)[0],
    }
    for name in ("token_logprob", "tail_logprob", "tail_logsumexp", "tail_entropy"):
        if name in rows.column_names:
            arrays[name] = rows[name].fill_null(np.nan).to_numpy().astype(np.float64)
    if "tail_ids" in rows.column_names:
        arrays["tail_ids"] = padded_lists(rows["tail_ids"], -1, np.int64)[0]
    return arrays


def ask(
    manifest: Manifest, teacher: Teacher, kept: list[KeptSequence], options: TeacherOptions, reporter: Reporter
) -> list[Arrays]:
    """For each sequence what `_compare` finds of its N positions.

    Each is asked by itself, so that what a dump's batches did to it shows.
    """
    lengths = [len(sequence.token_ids) for sequence in kept]
    compared: list[Arrays] = [{} for _ in kept]
    likeliest = min(positions_of(manifest).selection.candidates, teacher.vocabulary_size)
    asked: deque[tuple[int, Prediction]] = deque()
    order = sorted(range(len(kept)), key=lambda number: -lengths[number])  # too little memory shows at once
    try:
        with reporter.progress("asking the teacher again", max(sum(lengths), 1), "positions") as advance:
            for number, index in enumerate(order):
                with enough_memory(options, [kept[index].token_ids]):
                    asked.append((index, teacher.predict(*batch_arrays([kept[index].token_ids]), likeliest=likeliest)))
                    while len(asked) > teacher.ahead or (asked and number == len(order) - 1):
                        index, prediction = asked.popleft()
                        compared[index] = _read(manifest, prediction, kept[index])
                        advance(lengths[index])
    finally:
        for _, prediction in asked:
            prediction.drop()
    return compared


def _read(manifest: Manifest, prediction: Prediction, sequence: KeptSequence) -> Arrays:
    rule, teacher = positions_of(manifest).selection, prediction.teacher
    kept = _arrays(sequence.rows)
    if Ability.DISTRIBUTIONS not in teacher.abilities:
        rows = np.zeros_like(sequence.places)
        return compare_likeliest(prediction.likeliest(rows, sequence.places - 1), kept, manifest)
    if rule.draw_weight:
        kept["begin"] = starts(sequence.number, len(sequence.token_ids), rule.draw_seed)[sequence.places]
    before = torch.from_numpy(sequence.places - 1).to(teacher.device)
    parts = [
        _compare(precise(logits), {name: values[part] for name, values in kept.items()}, manifest)
        for part, logits in prediction.logit_slices(torch.zeros_like(before), before)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _compare(logits: Tensor, kept: Arrays, manifest: Manifest) -> Arrays:
    """Hold kept values against logits, float64 (n, V).

    Args:
        kept: what `_arrays` gives of n positions, and where there are draws `begin` (n,), see `sampling.starts`.

    Returns:
        for each quantity, "NAME off" (nats, or for draws a share of the tail; NaN where there is no value) and, of rounded
        ones, "NAME moved" (from step to step, up or down, in nats), (n,) or (n, K) each; where a
        selection has the likeliest token, "changed" (n,), 1 or 0.
    """
    if not logits.isfinite().all():
        raise InputError("the teacher's logits are NaN or infinite: check its weights, or ask it with --dtype float32")
    parameters = positions_of(manifest)
    step, rule, temperature = parameters.quantisation_step, parameters.selection, parameters.temperature

    def on_device(name: str) -> Tensor:
        return torch.from_numpy(kept[name]).to(logits.device)

    differences: dict[str, Tensor] = {}
    logprobs = torch.log_softmax(logits, dim=1)
    ids = on_device("candidate_ids")
    present = ids >= 0
    outside = logprobs.clone()
    row, rank = present.nonzero(as_tuple=True)
    outside[row, ids[row, rank]] = -torch.inf
    candidates = logprobs.gather(1, ids.clamp(min=0))
    answers = {
        "token_logprob": logprobs.gather(1, on_device("token_id")[:, None])[:, 0],
        "candidate_logprobs": candidates.masked_fill(~present, -torch.inf),
        "tail_logprob": torch.logsumexp(outside, dim=1),
    }
    last, best = candidates.masked_fill(~present, torch.inf), outside.amax(dim=1)
    lowest = pad(last, (0, 1), value=torch.inf).amin(dim=1)
    if rule.name == "threshold":
        limit = math.log(rule.draw_weight)
        differences["selection off"] = torch.maximum(best - limit, limit - lowest).clamp(min=0)
    else:
        # Both may be off, in opposite directions.
        differences["selection off"] = ((best - lowest) / 2).clamp(min=0)
    if rule.name == "top-p":
        total = torch.exp(answers["candidate_logprobs"]).sum(dim=1)
        full = present.sum(dim=1) >= min(rule.candidates, logits.shape[1])
        too_few = torch.where(full, 0.0, rule.p - total)
        too_many = total - torch.exp(lowest) - rule.p
        differences["selection off"] = differences["selection off"].maximum(too_few).maximum(too_many)
    if rule.name != "threshold":
        differences["changed"] = (logprobs.argmax(dim=1) != ids[:, 0]).double()
    if temperature:
        answers["tail_logsumexp"] = torch.logsumexp(outside / temperature, dim=1)
    if parameters.tail_entropy:
        answers["tail_entropy"] = torch.special.entr(torch.softmax(outside, dim=1)).nansum(dim=1)
    if rule.draw_weight:
        weights, drawn, begin = torch.exp(outside), on_device("tail_ids"), on_device("begin")
        spacing = torch.full_like(begin, rule.draw_weight)
        # Noise that moves the whole tail moves the points in it, by what rounding does not explain.
        larger = (answers["tail_logprob"] - on_device("tail_logprob")).nan_to_num(0)
        larger = torch.sign(larger) * (larger.abs() - step / 2).clamp(min=0)
        distances = (_beside(weights, drawn, begin, each) for each in (spacing, spacing * torch.exp(larger)))
        differences["draws off"] = torch.minimum(*distances)

    compared = moved_steps({name: values.cpu().numpy() for name, values in answers.items()}, kept, manifest)
    return {**compared, **{name: values.cpu().numpy() for name, values in differences.items()}}


def _beside(weights: Tensor, drawn: Tensor, begin: Tensor, spacing: Tensor) -> Tensor:
    """How far draws lie beside their points, as a share of the tail.

    Args:
        weights: the tail's probabilities, float64 (n, V). drawn: int64 (n, M), ascending, −1 behind the last.
        begin, spacing: of the points (begin + i) · spacing, (n,) each.

    Returns:
        (n, M + 1): of each draw, 0 where the running sum passes its point within its token, and behind the last one how far the
        sum reaches beyond the next point, which should then have been drawn; NaN elsewhere.
    """
    count = (drawn >= 0).sum(dim=1, keepdim=True)
    drawn = pad(drawn, (0, 1), value=-1)
    numbers = torch.arange(drawn.shape[1], device=drawn.device)
    points = (begin[:, None] + numbers) * spacing[:, None]
    sums = weights.cumsum(dim=1)
    end = sums.gather(1, drawn.clamp(min=0))
    start = end - weights.gather(1, drawn.clamp(min=0))
    whole = sums[:, -1:]
    of_draw = torch.maximum(start - points, points - end).clamp(min=0) / whole.clamp(min=torch.finfo(torch.float64).tiny)
    missing = ((whole - points) / whole).nan_to_num(0.0).clamp(min=0)
    return torch.where(numbers < count, of_draw, torch.where((numbers == count) & (missing > 0), missing, torch.nan))
