"""Sums in log-space that the losses are made of: of a student's logits over a vocabulary, and of distributions over symbols."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.losses.targets import EMPTY, Targets

# Nats. Stands for the −inf of a symbol that one side rules out and the other does not: a number instead of ∞.
RULED_OUT = -100.0


def widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _Reading(torch.autograd.Function):
    """What a loss reads of logits (N, V): a log-sum-exp over the vocabulary (N, 1), and the logits of some ids (N, K).

    Autograd by itself would make an array of the logits' size for the gradient of each of the two, and more on the way. Here
    the exponentials of the forward pass become the gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, hide: Tensor | None) -> tuple[Tensor, Tensor]:
        values = logits.gather(-1, ids)
        powers, largest = _powers(logits, ids, values, hide)
        sums = powers.sum(dim=-1, keepdim=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, ids, hide, sums)
            ctx.powers = powers
        return largest + torch.log(sums), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor, of_values: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, hide, sums = ctx.saved_tensors
        powers, ctx.powers = ctx.powers, None
        if powers is None:  # the graph was kept for another pass
            powers, _ = _powers(logits, ids, logits.gather(-1, ids), hide)
        share = of_sum / sums.clamp(min=torch.finfo(sums.dtype).tiny)
        return powers.mul_(share).scatter_add_(-1, ids, of_values), None, None


def _powers(logits: Tensor, ids: Tensor, values: Tensor, hide: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(logits − largest) (N, V), 0 for the ids of rows that hide them, and the largest (N, 1) of those that are not."""
    others = logits if hide is None else logits.scatter(-1, ids, values.masked_fill(hide, EMPTY))
    largest = others.amax(dim=-1, keepdim=True)
    largest = torch.where(largest > EMPTY, largest, 0.0)
    shifted = torch.sub(others, largest) if hide is None else others.sub_(largest)
    return shifted.exp_(), largest


def read(logits: Tensor, ids: Tensor, hide: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the vocabulary, (N, 1), of logits (N, V), and the logits (N, K) of some ids (N, K).

    Rows where `hide` (N, 1) is true leave their ids out of the sum.
    """
    return _Reading.apply(logits, ids, hide)


def candidates(targets: Targets) -> tuple[Tensor, Tensor]:
    """Candidate ids (N, K) safe to gather and scatter with, and which of them are real (N, K).

    A filler repeats a real candidate of its row, so that scattering over it hits no other token.
    """
    kept = targets.candidate_logprobs > EMPTY
    if not kept.shape[-1]:
        return targets.candidate_ids, kept
    real = targets.candidate_ids.gather(-1, kept.long().argmax(dim=-1, keepdim=True))
    return torch.where(kept, targets.candidate_ids, real), kept


def bucketed(logits: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over K candidates and everything else as one more symbol: (N, K + 1) each.

    At a temperature other than 1 both are tempered as distributions over these symbols.
    """
    logits = widened(logits)
    ids, kept = candidates(targets)
    nothing_else = kept.sum(dim=-1, keepdim=True) == logits.shape[-1]
    # A row without candidates has nothing but a tail: its fillers hide no token.
    rest, values = read(logits, ids, hide=kept.any(dim=-1, keepdim=True) & ~nothing_else)
    symbols = torch.cat([values.masked_fill(~kept, EMPTY), rest.masked_fill(nothing_else, EMPTY)], dim=-1)
    student = torch.log_softmax(symbols, dim=-1)
    teacher = torch.cat([targets.candidate_logprobs, targets.tail_logprob.unsqueeze(-1)], dim=-1).to(logits.dtype)
    if temperature != 1.0:
        student = torch.log_softmax(student / temperature, dim=-1)
        teacher = torch.log_softmax(teacher / temperature, dim=-1)
    return teacher, student


def renormalised(scores: Tensor, kept: Tensor) -> Tensor:
    """Log-softmax over the symbols that are kept; the others, and so a row with none, are −inf."""
    none = ~kept.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~kept, EMPTY).masked_fill(none, 0.0)
    return torch.log_softmax(scores, dim=-1).masked_fill(none, EMPTY)


def mixture(one: Tensor, other: Tensor, share: float) -> Tensor:
    """ln(share · exp(one) + (1 − share) · exp(other)); a symbol that both rule out stays −inf and meets no gradient."""
    neither = (one == EMPTY) & (other == EMPTY)
    one, other = one.masked_fill(neither, 0.0), other.masked_fill(neither, 0.0)
    return torch.logaddexp(one + math.log(share), other + math.log1p(-share)).masked_fill(neither, EMPTY)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Σ exp(one) · (one − other) over the last dimension of two arrays of log-probabilities.

    Symbols that the first rules out contribute 0 and meet no gradient; those that only the second rules out count with
    `RULED_OUT`.
    """
    other = torch.where(other > EMPTY, other, RULED_OUT)
    return (torch.exp(one) * torch.where(one > EMPTY, one - other, 0.0)).sum(dim=-1)
