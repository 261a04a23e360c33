"""Losses over kept knowledge: plain functions from a student's logits and what the store holds to nats per position.

The store keeps, per position, the teacher's likeliest tokens S with their log-probabilities and the log of the
probability outside them, the tail. What a loss does with that tail decides what the student learns about everything
that was not kept, so each function says it in its docstring. With m = q(S) the teacher's mass on S and P = p(S) the
student's, the full divergence falls apart as

    KL(q‖p) = KL_Bernoulli(m‖P) + m · KL(q_S‖p_S) + (1 − m) · KL(q_tail‖p_tail)

`forward_kl` keeps the first two terms exactly and is therefore a lower bound of the full one; it is the default.
`top_k_renormalised` trades the first term for −log P, and `first` drops it.

No function holds a (N, V) log-softmax: each needs one log-sum-exp over the vocabulary and a gather (`forward_kl` one
copy of the logits more, for the log-sum-exp of the rest). Logits of 16 bits are computed in float32, float64 stays.

Adding a loss is one function and one line in `LOSSES`. There are two shapes:

* one loss per target position: `f(logits (N, V), targets, **options) -> (N,)`, as everything in this file. The trainer
  pairs logits with positions (`select_targets`), sums, and divides by the number of targets of the whole step.
* anything else: `f(outputs, batch, **options)` with `whole_batch=True`. `outputs` are the student's own (`.logits`
  (B, T, V), `.hidden_states` when the entry says `hidden_states=True`), `batch` is everything the store gave for these
  sequences, so a kind of knowledge that adds `batch["vector"]` (B, D) is at hand. It returns one loss per target
  (`unit="target"`), in the order of `batch["is_target"].nonzero()`, or one per sequence (`unit="sequence"`, shape
  (B,); rows of padding are left out by the trainer).

An entry names the kinds of knowledge and the batch columns it needs; training checks both before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
EMPTY = float("-inf")


class Targets(NamedTuple):
    """What the teacher said at N positions that count. Log-probabilities are nats, at temperature 1.

    Candidates are likeliest first; a row with fewer than K of them is filled up with a log-probability of −inf.
    `exp(candidate_logprobs).sum(-1) + exp(tail_logprob)` is one.
    """

    token_ids: Tensor  # (N,) int64, the token that stands here
    token_logprob: Tensor  # (N,) float, the teacher's log-probability of it
    candidate_ids: Tensor  # (N, K) int64
    candidate_logprobs: Tensor  # (N, K) float
    tail_logprob: Tensor  # (N,) float, −inf when the candidates are the whole vocabulary


def select_targets(logits: Tensor, batch: Batch) -> tuple[Tensor, Targets]:
    """Pair the student's logits with the positions that count.

    Position t of a batch describes the prediction of token t, which the student makes at t − 1: this is the one place
    where the two are shifted against each other.

    Args:
        logits: (B, T, V), any float dtype.
        batch: columns as `DistillationDataset` yields them; `is_target` (B, T) picks the positions.

    Returns:
        logits (N, V) at the predicting positions, and their `Targets`, both in row-major order of `is_target`.
        Candidates that the student's head has no row for (a teacher's head padded further) are moved to the tail.
    """
    chosen = batch["is_target"][:, 1:].bool()
    rows = logits.shape[-1]
    logprobs = batch["candidate_logprobs"][:, 1:][chosen]
    tail = batch["tail_logprob"][:, 1:][chosen]
    ids = batch["candidate_ids"][:, 1:][chosen]
    outside = ids >= rows
    moved = torch.where(outside, logprobs, EMPTY)
    targets = Targets(
        token_ids=batch["input_ids"][:, 1:][chosen],
        token_logprob=batch["token_logprob"][:, 1:][chosen],
        candidate_ids=torch.where(outside, 0, ids),
        candidate_logprobs=torch.where(outside, EMPTY, logprobs),
        tail_logprob=torch.logsumexp(torch.cat([moved, tail.unsqueeze(-1)], dim=-1), dim=-1),
    )
    return logits[:, :-1][chosen], targets


def cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """−log p(token): plain fine-tuning on the text. Uses nothing of the teacher's.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.

    Returns:
        (N,) nats, float32 (float64 for float64 logits).
    """
    logits = _widened(logits)
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets.token_ids.unsqueeze(-1)).squeeze(-1)


def forward_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) over the candidates and the tail as one more symbol.

    The tail: the student is told exactly how much probability lies outside the candidates and nothing about how it is
    shared out there. The result is a lower bound of the full divergence, and equals it when the candidates are the
    whole vocabulary. The student's tail is the log-sum-exp of its other logits, never log(1 − Σ); an empty tail
    contributes 0, with finite gradients.

    Temperature: both sides become distributions over K + 1 symbols at temperature 1 and are then tempered as
    softmax(log p / T); the result is multiplied by T² so that gradients keep their size beside cross-entropy (Hinton
    et al. 2015). That is the true tempered divergence only when the candidates are the whole vocabulary: otherwise
    the true one needs the tail's mass at T, which cannot be computed from the tail's mass at 1.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        temperature: above 0.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    logits = _widened(logits)
    ids, kept = _candidates(targets)
    total = torch.logsumexp(logits, dim=-1, keepdim=True)  # (N, 1)
    rest = torch.logsumexp(logits.scatter(-1, ids, EMPTY), dim=-1, keepdim=True)  # (N, 1)
    student = torch.cat([(logits.gather(-1, ids) - total).masked_fill(~kept, EMPTY), rest - total], dim=-1)
    teacher = torch.cat([targets.candidate_logprobs, targets.tail_logprob.unsqueeze(-1)], dim=-1).to(logits.dtype)
    if temperature != 1.0:
        student = torch.log_softmax(student / temperature, dim=-1)
        teacher = torch.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * _divergence(teacher, student)


def first(logits: Tensor, targets: Targets, *, c: float = 0.28) -> Tensor:
    """FIRST's matching of re-calibrated candidates (Shum et al. 2024, arXiv 2408.12168).

    Both sides take the *probabilities* P of the candidates (full vocabulary), rescale them as P' = softmax(P / c), and
    the loss is KL(P'_teacher ‖ P'_student) over the candidates alone.

    The tail: ignored on both sides, so any mass there is as good as any other. A student that starts from nothing
    wanders off; use it on a fine-tuned student or mixed with cross-entropy.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        c: scale of the probabilities, in (0, 1]; smaller is more certain. For K candidates no probability comes out
            above 1 / (1 + (K − 1) · exp(−1 / c)).

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    logits = _widened(logits)
    ids, kept = _candidates(targets)
    student = torch.exp(logits.gather(-1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True))
    teacher = torch.exp(targets.candidate_logprobs.to(logits.dtype))
    return _divergence(
        torch.log_softmax((teacher / c).masked_fill(~kept, EMPTY), dim=-1),
        torch.log_softmax((student / c).masked_fill(~kept, EMPTY), dim=-1),
    )


def top_k_renormalised(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher's candidates, made to sum to one ‖ student over the whole vocabulary): the naive loss, to compare.

    The tail: the teacher is taken to give it nothing, so the student is driven to give it nothing either. It learns
    q_j / m on the candidates and comes out over-confident, the more so the less mass the candidates hold.

    Temperature: softmax(log q_S / T) against softmax(z / T), times T².

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        temperature: above 0.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0; 0 only for a student without a tail.
    """
    logits = _widened(logits) / temperature
    ids, _ = _candidates(targets)
    student = logits.gather(-1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True)
    teacher = torch.log_softmax(targets.candidate_logprobs.to(logits.dtype) / temperature, dim=-1)
    return temperature**2 * _divergence(teacher, student)


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _candidates(targets: Targets) -> tuple[Tensor, Tensor]:
    """Candidate ids (N, K) safe to gather and scatter with, and which of them are real (N, K).

    A filler repeats a real candidate of its row, so that scattering over it hits no other token.
    """
    kept = targets.candidate_logprobs > EMPTY
    real = targets.candidate_ids.gather(-1, kept.long().argmax(dim=-1, keepdim=True))
    return torch.where(kept, targets.candidate_ids, real), kept


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL over the last dimension of two arrays of log-probabilities; symbols the teacher rules out contribute 0.

    The student's value is replaced before the subtraction, so that a −inf there meets no gradient.
    """
    possible = teacher > EMPTY
    difference = torch.where(possible, teacher, 0.0) - torch.where(possible, student, 0.0)
    return (torch.exp(teacher) * difference).sum(dim=-1)


@dataclass(frozen=True)
class Loss:
    """One entry of `LOSSES`: a function and what it needs. See the head of this module for the two shapes."""

    function: Callable[..., Tensor]
    kinds: tuple[str, ...] = ("positions",)
    columns: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    whole_batch: bool = False
    unit: Literal["target", "sequence"] = "target"
    hidden_states: bool = False


_CANDIDATES = ("candidate_ids", "candidate_logprobs")

LOSSES: dict[str, Loss] = {
    "forward-kl": Loss(forward_kl, columns=(*_CANDIDATES, "tail_logprob"), options=("temperature",)),
    "ce": Loss(cross_entropy),
    "first": Loss(first, columns=_CANDIDATES, options=("c",)),
    "top-k-renormalised": Loss(top_k_renormalised, columns=_CANDIDATES, options=("temperature",)),
}


def units(batch: Batch) -> dict[str, Tensor]:
    """How many of each unit a batch holds (scalars, int64): what a sum of losses is divided by."""
    return {"target": batch["is_target"][:, 1:].sum(), "sequence": (batch["sequence_id"] >= 0).sum()}


def step_loss(
    loss: Loss,
    outputs: Any,
    batch: Batch,
    counts: Mapping[str, Tensor | int],
    *,
    ce_weight: float = 0.0,
    options: Mapping[str, float] | None = None,
) -> Tensor:
    """This batch's share of a step's loss: (1 − ce_weight) · distillation + ce_weight · cross-entropy.

    Args:
        loss: an entry of `LOSSES`.
        outputs: the student's, with `.logits` (B, T, V).
        batch: the same sequences, as `DistillationDataset` yields them.
        counts: number of targets and of sequences in the whole step, over all its batches and ranks. Shares of the
            same step then add up to exactly the mean that one big batch would have.
        ce_weight: in [0, 1].
        options: keyword arguments of the loss's function, such as `{"temperature": 2.0}`.

    Returns:
        A scalar, nats.
    """
    logits, targets = select_targets(outputs.logits, batch)

    def mean(values: Tensor, unit: str) -> Tensor:
        return values.sum() / torch.as_tensor(counts[unit], device=values.device).clamp(min=1)

    if loss.whole_batch:
        values = loss.function(outputs, batch, **(options or {}))
        if loss.unit == "sequence":
            values = values[batch["sequence_id"] >= 0]
    else:
        values = loss.function(logits, targets, **(options or {}))
    result = mean(values, loss.unit)
    if ce_weight:
        result = (1 - ce_weight) * result + ce_weight * mean(cross_entropy(logits, targets), "target")
    return result
