"""What was kept of some sequences, held against what the teacher says of them now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.columns import padded_lists
from knowledge_store.kinds.positions import damage, exact_steps, positions_of
from knowledge_store.reporter import Reporter
from teacher_dump.configuration import TeacherOptions
from teacher_dump.dumping.batches import batch_arrays, enough_memory
from teacher_dump.extraction.sampling import independent_points, precise, systematic_points
from teacher_dump.teachers.protocol import Teacher

ROUNDED = {"token_logprob": "token", "candidate_logprobs": "candidates", "tail_logprob": "tail", "tail_entropy": "tail entropy"}


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


def _arrays(rows: pa.Table, draws: int) -> Arrays:
    """What was kept of N positions.

    Returns:
        token_id (N,), candidate_ids (N, K) (−1: none) and, float64, token_logprob (N,), candidate_logprobs (N, K) (−inf: none),
        tail_logprob (N,) (NaN in random sampling); where there are any tail_logsumexp (N,), tail_entropy (N,) and drawn
        (N, draws): the token of each point, −1 where there is no tail. Ids are int64.
    """
    arrays = {
        "token_id": rows["token_id"].to_numpy().astype(np.int64),
        "candidate_ids": padded_lists(rows["candidate_ids"], -1, np.int64)[0],
        "candidate_logprobs": padded_lists(rows["candidate_logprobs"], -np.inf, np.float64)[0],
    }
    for name in ("token_logprob", "tail_logprob", "tail_logsumexp", "tail_entropy"):
        if name in rows.column_names:
            arrays[name] = rows[name].fill_null(np.nan).to_numpy().astype(np.float64)
    if draws:
        (ids, _), (counts, _) = (padded_lists(rows[name], 0, np.int64) for name in ("tail_ids", "tail_counts"))
        arrays["drawn"] = np.full((len(rows), draws), -1, np.int64)
        arrays["drawn"][counts.any(axis=1)] = np.repeat(ids.ravel(), counts.ravel()).reshape(-1, draws)
    return arrays


def ask(
    manifest: Manifest, teacher: Teacher, kept: list[KeptSequence], options: TeacherOptions, reporter: Reporter
) -> list[Arrays]:
    """For each sequence what `_compare` finds of its N positions.

    Each is asked by itself, so that what a dump's batches did to it shows.
    """
    lengths = [len(sequence.token_ids) for sequence in kept]
    compared: list[Arrays] = [{} for _ in kept]
    with reporter.progress("asking the teacher again", max(sum(lengths), 1), "positions") as advance:
        for index in sorted(range(len(kept)), key=lambda number: -lengths[number]):  # too little memory shows at once
            with enough_memory(options, [kept[index].token_ids]):
                compared[index] = _ask(manifest, teacher, kept[index])
            advance(lengths[index])
    return compared


def _ask(manifest: Manifest, teacher: Teacher, sequence: KeptSequence) -> Arrays:
    rule = positions_of(manifest).selection
    kept = _arrays(sequence.rows, rule.draws)
    if rule.draws:
        points = systematic_points if rule.candidates else independent_points
        kept["points"] = np.sort(points(sequence.number, len(sequence.token_ids), rule.draws)[sequence.places], axis=1)
    prediction = teacher.predict(*batch_arrays([sequence.token_ids]))
    before = torch.from_numpy(sequence.places - 1).to(teacher.device)
    parts = [
        _compare(precise(logits), {name: values[part] for name, values in kept.items()}, manifest)
        for part, logits in prediction.logit_slices(torch.zeros_like(before), before)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _compare(logits: Tensor, kept: Arrays, manifest: Manifest) -> Arrays:
    """Hold kept values against logits, float64 (n, V).

    Args:
        kept: what `_arrays` gives of n positions, and `points` (n, draws) where there are draws.

    Returns:
        for each quantity, "NAME off" (nats, or for draws a share of the tail; NaN where there is no value) and, of rounded
        ones, "NAME moved" (from step to step, up or down, in nats), (n,) or (n, K) each; "changed" (n,), 1 or 0.
    """
    if not logits.isfinite().all():
        raise InputError("the teacher's logits are NaN or infinite: check its weights, or ask it with --dtype float32")
    parameters = positions_of(manifest)
    step, rule, temperature = parameters.quantisation_step, parameters.selection, parameters.temperature

    def on_device(name: str) -> Tensor:
        return torch.from_numpy(kept[name]).to(logits.device)

    differences: dict[str, Tensor] = {}
    outside = logprobs = torch.log_softmax(logits, dim=1)
    answers = {"token_logprob": logprobs.gather(1, on_device("token_id")[:, None])[:, 0]}
    if rule.candidates:
        ids = on_device("candidate_ids")
        present = ids >= 0
        ids = torch.where(present, ids, ids[:, :1])
        candidates = logprobs.gather(1, ids)
        outside = logprobs.scatter(1, ids, -torch.inf)
        answers["candidate_logprobs"] = candidates.masked_fill(~present, -torch.inf)
        answers["tail_logprob"] = torch.logsumexp(outside, dim=1)
        best, last = outside.amax(dim=1), candidates.amin(dim=1)
        # Both may be off, in opposite directions.
        differences["selection off"] = ((best - last) / 2).clamp(min=0)
        if rule.name == "top-p":
            total = torch.exp(answers["candidate_logprobs"]).sum(dim=1)
            full = present.sum(dim=1) >= min(rule.candidates, logits.shape[1])
            too_few = torch.where(full, 0.0, rule.p - total)
            too_many = total - torch.exp(last) - rule.p
            differences["selection off"] = differences["selection off"].maximum(too_few).maximum(too_many)
        differences["changed"] = (logprobs.argmax(dim=1) != ids[:, 0]).double()
    if temperature:
        answers["tail_logsumexp"] = torch.logsumexp(outside / temperature, dim=1)
    if parameters.tail_entropy:
        answers["tail_entropy"] = torch.special.entr(torch.softmax(outside, dim=1)).nansum(dim=1)
    if rule.draws:
        drawn, points = on_device("drawn"), on_device("points")
        weights = torch.softmax(outside, dim=1)
        end = weights.cumsum(dim=1).gather(1, drawn.clamp(min=0))
        begin = end - weights.gather(1, drawn.clamp(min=0))
        beside = torch.maximum(begin - points, points - end).clamp(min=0)
        differences["draws off"] = torch.where(drawn >= 0, beside, torch.nan)

    compared = {}
    now = exact_steps({**kept, **{name: values.cpu().numpy() for name, values in answers.items()}}, manifest)
    for column, was in exact_steps(kept, manifest).items():
        name = f"tail at T={temperature:g}" if column == "tail_logsumexp" else ROUNDED[column]
        with np.errstate(invalid="ignore"):  # a tail that is empty, then and now
            apart, moved = np.abs(was - now[column]), np.round(was) - np.round(now[column])
        same = was == now[column]
        compared[f"{name} off"] = np.where(same, 0, np.maximum(apart - 0.5, 0) * step)
        compared[f"{name} moved"] = np.where(same, 0, moved) * step
    return {**compared, **{name: values.cpu().numpy() for name, values in differences.items()}}
