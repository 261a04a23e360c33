"""Targets: what a store holds of the teacher at the positions that count, beside the student's logits that predict them.

Here the two are shifted against each other, candidates that the student's head has no row for are moved to the tail, and draws
become weights. `divergences` has the functions of logits and targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from knowledge_store.errors import InputError

Batch = Mapping[str, Tensor]
EMPTY = float("-inf")


class Targets(NamedTuple):
    """What the teacher said at N positions that count. Log-probabilities are nats, at temperature 1.

    Candidates are likeliest first; a row with fewer than K of them is filled up with a log-probability of −inf. K may be
    0. `exp(candidate_logprobs).sum(-1) + exp(tail_logprob)` is one. Draws exist when the dump keeps them; a row with
    fewer than M is filled up with a weight of 0. What a position's draws stand for together is its tail on average.
    """

    token_ids: Tensor  # (N,) int64, the token that stands here
    token_logprob: Tensor  # (N,) float, the teacher's log-probability of it
    candidate_ids: Tensor  # (N, K) int64
    candidate_logprobs: Tensor  # (N, K) float
    tail_logprob: Tensor  # (N,) float, −inf when the candidates are the whole vocabulary
    draw_ids: Tensor | None = None  # (N, M) int64, tokens outside the candidates, each as often as it was drawn
    draw_weights: Tensor | None = None  # (N, M) float, the probability each stands for
    tail_logsumexp: Tensor | None = None  # (N,) float, the tail at the dump's own temperature T: log Σ p^(1/T) over it
    tail_mean_logprob: Tensor | None = None  # (N,) float, the mean of the teacher's log-probability over what is drawn from

    def part(self, rows: slice) -> Targets:
        """Some of the positions."""
        return Targets._make(None if column is None else column[rows] for column in self)


def select_targets(
    logits: Tensor, batch: Batch, recalibrate: Callable[[Targets], Targets] | None = None
) -> tuple[Tensor, Targets]:
    """Pair the student's logits with the positions that count.

    Position t of a batch describes the prediction of token t, which the student makes at t − 1: this is the one place
    where the two are shifted against each other.

    Args:
        logits: (B, T, V), any float dtype; or those at the predicting positions alone, (1, N, V), as a model gives them
            within `head.head_at`.
        batch: columns as `DistillationDataset` yields them; `is_target` (B, T) picks the positions.
        recalibrate: what to make of the teacher's targets before anything else, such as `recalibration.recalibrated`.

    Returns:
        logits (N, V) at the predicting positions, and their `Targets`, both in row-major order of `is_target`.
        Candidates that the student's head has no row for (a teacher's head padded further) are moved to the tail. Draws
        that it has no row for are left out.

    Raises:
        InputError: the logits are of other positions than the batch's.
    """
    return predicting_logits(logits, batch), targets_of(batch, logits.shape[-1], recalibrate)


def predicting_logits(logits: Tensor, batch: Batch) -> Tensor:
    """The logits (N, V) of `select_targets` alone."""
    chosen = batch["is_target"][:, 1:].bool()
    if logits.shape[:2] == batch["is_target"].shape:
        return logits[:, :-1][chosen]
    if logits.shape[:2] != (1, int(chosen.sum())):
        check_length(logits.shape[1], batch["is_target"].shape[1])
    return logits[0]


def check_length(answered: int, length: int) -> None:
    """Refuse a model that answers at other positions than it was given: targets would be learnt at each other's places.

    Args:
        answered: at how many positions of a row it has logits, or states for its head.
        length: how many a row of the batch has.

    Raises:
        InputError: the two differ.
    """
    if answered != length:
        raise InputError(
            f"the model answers at {answered} positions where a row of the batch has {length}, so that targets would be learnt"
            " at the wrong ones: it puts tokens of its own before the text, as prompt tuning and P-tuning do; train a LoRA or"
            " prefix-tuning adapter instead"
        )


def target_tokens(batch: Batch) -> Tensor:
    """The tokens that stand at the targets, int64 (N,), in the order of `select_targets`."""
    return batch["input_ids"][:, 1:][batch["is_target"][:, 1:].bool()]


def targets_of(batch: Batch, vocabulary_size: int, recalibrate: Callable[[Targets], Targets] | None = None) -> Targets:
    """The `Targets` of `select_targets` alone, for a student whose head has logits for `vocabulary_size` tokens.

    Raises:
        ValueError: the batch holds several teachers' knowledge.
    """
    if "teacher_weights" in batch:
        raise ValueError("this batch has several teachers: use sliced_loss, or take it apart with teachers_of")
    chosen = batch["is_target"][:, 1:].bool()
    tail = batch["tail_logprob"][:, 1:][chosen]
    draw_ids = draw_weights = None
    if "tail_ids" in batch:
        draw_ids, weight = batch["tail_ids"][:, 1:][chosen], batch["draw_weight"][:, 1:][chosen].unsqueeze(-1)
        known = (draw_ids >= 0) & (draw_ids < vocabulary_size)
        draw_ids, draw_weights = torch.where(known, draw_ids, 0), torch.where(known, weight, 0.0).to(tail.dtype)
    targets = Targets(
        token_ids=target_tokens(batch),
        token_logprob=batch["token_logprob"][:, 1:][chosen],
        candidate_ids=batch["candidate_ids"][:, 1:][chosen],
        candidate_logprobs=batch["candidate_logprobs"][:, 1:][chosen],
        tail_logprob=tail,
        draw_ids=draw_ids,
        draw_weights=draw_weights,
        tail_logsumexp=batch["tail_logsumexp"][:, 1:][chosen] if "tail_logsumexp" in batch else None,
        tail_mean_logprob=_mean_logprob(tail, batch["tail_entropy"][:, 1:][chosen]) if "tail_entropy" in batch else None,
    )
    if recalibrate is not None:
        targets = recalibrate(targets)
    outside = targets.candidate_ids >= vocabulary_size
    moved = torch.where(outside, targets.candidate_logprobs, EMPTY)
    return targets._replace(
        candidate_ids=torch.where(outside, 0, targets.candidate_ids),
        candidate_logprobs=torch.where(outside, EMPTY, targets.candidate_logprobs),
        tail_logprob=torch.logsumexp(torch.cat([moved, targets.tail_logprob.unsqueeze(-1)], dim=-1), dim=-1),
        tail_logsumexp=None,  # of the candidates as they were
    )


def _mean_logprob(tail_logprob: Tensor, tail_entropy: Tensor) -> Tensor:
    """The mean of ln q over the tail, by q: ln t − H (N,); 0 where the tail is empty."""
    return torch.where(tail_logprob > EMPTY, tail_logprob - tail_entropy, 0.0)


def predicting(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 (N,) each, of the positions that predict a target, in the order of `select_targets`."""
    rows, columns = batch["is_target"][:, 1:].bool().nonzero(as_tuple=True)
    return rows, columns
