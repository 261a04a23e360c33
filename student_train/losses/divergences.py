"""Losses over kept knowledge: plain functions from a student's logits and what the store holds to nats per position.

The store keeps, per position, the teacher's likeliest tokens S with their log-probabilities, the log of the probability
outside them, the tail, and maybe some tokens drawn from that tail. What a loss does with the tail decides what the student
learns about everything that was not kept, so each function says it in its docstring. With m = q(S) the teacher's mass on S
and P = p(S) the student's, the full divergence of the teacher q and the student p falls apart as

    KL(q‖p) = KL_Bernoulli(m‖P) + m · KL(q_S‖p_S) + (1 − m) · KL(q_tail‖p_tail)

* candidates and a bucket: the tail is one more symbol. The forward divergence has its first two terms exactly. Every
  f-divergence (all below but `adaptive_kl`) is then a lower bound of the full one, since merging symbols never adds to
  it, and equals it when the candidates are the whole vocabulary.
* candidates and draws: tokens drawn from the tail with replacement, each standing for an equal share of its mass. The
  forward divergence is linear in q apart from a constant, so its gradient over the draws is, on average, exactly that of
  the full one: `forward_kl`, the default. The other divergences have no such estimate: each puts q(j) of the drawn token
  through a function that is not linear, and of a draw only its id and count are kept. They use the bucket.
* candidates alone: `conditional_kl` keeps the middle term, `first` a re-calibrated form of it, `top_k_renormalised` and
  `label_smoothing` trade the first term for −log P.

No function holds a (N, V) log-softmax: each needs one log-sum-exp over the vocabulary, or over what the candidates leave
of it, and some logits by their ids, which `_read` gives at the cost of one array of the logits' size. Logits of 16 bits are
computed in float32, float64 stays. Everything is summed in log-space; gradients are finite wherever the logits are.
`slices` computes any of them with the head itself a slice of positions at a time.

Adding a loss is one function and one line in `LOSSES`. There are two shapes:

* one loss per target position: `f(logits (N, V), targets, **options) -> (N,)`, as everything in this file. The trainer
  pairs logits with positions, gives it a slice of them at a time, sums, and divides by the number of targets of the step.
* anything else: `f(outputs, batch, **options)` with `whole_batch=True`. `outputs` are the student's own (`.logits`
  (B, T, V), `.hidden_states` when the entry says `hidden_states=True`), `batch` is everything the store gave for these
  sequences, so a kind of knowledge that adds `batch["vector"]` (B, D) is at hand. It returns one loss per target
  (`unit="target"`), in the order of `batch["is_target"].nonzero()`, or one per sequence (`unit="sequence"`, shape
  (B,); rows of padding are left out by the trainer).

An entry names the kinds of knowledge and the batch columns it needs; training checks both before it starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Batch = Mapping[str, Tensor]
EMPTY = float("-inf")
# Nats. Stands for the −inf of a symbol that one side rules out and the other does not: a number instead of ∞.
RULED_OUT = -100.0
TAILS = ("auto", "draws", "bucket")


class Targets(NamedTuple):
    """What the teacher said at N positions that count. Log-probabilities are nats, at temperature 1.

    Candidates are likeliest first; a row with fewer than K of them is filled up with a log-probability of −inf. K may be
    0. `exp(candidate_logprobs).sum(-1) + exp(tail_logprob)` is one. Draws are there when the dump keeps them; a row with
    fewer than M different ones is filled up with a weight of 0.
    """

    token_ids: Tensor  # (N,) int64, the token that stands here
    token_logprob: Tensor  # (N,) float, the teacher's log-probability of it
    candidate_ids: Tensor  # (N, K) int64
    candidate_logprobs: Tensor  # (N, K) float
    tail_logprob: Tensor  # (N,) float, −inf when the candidates are the whole vocabulary
    draw_ids: Tensor | None = None  # (N, M) int64, different tokens outside the candidates
    draw_weights: Tensor | None = None  # (N, M) float, the probability each stands for; a row sums to the tail
    tail_logsumexp: Tensor | None = None  # (N,) float, the tail at the dump's own temperature T: log Σ p^(1/T) over it

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
            within `models.head_at`.
        batch: columns as `DistillationDataset` yields them; `is_target` (B, T) picks the positions.
        recalibrate: what to make of the teacher's targets before anything else, such as `recalibration.recalibrated`.

    Returns:
        logits (N, V) at the predicting positions, and their `Targets`, both in row-major order of `is_target`.
        Candidates that the student's head has no row for (a teacher's head padded further) are moved to the tail. Draws
        that it has no row for are left out, and the position's others stand for the whole tail that they came from.
    """
    targets = targets_of(batch, logits.shape[-1], recalibrate)
    whole = logits.shape[:2] == batch["is_target"].shape
    return (logits[:, :-1][batch["is_target"][:, 1:].bool()] if whole else logits[0]), targets


def targets_of(batch: Batch, rows: int, recalibrate: Callable[[Targets], Targets] | None = None) -> Targets:
    """The `Targets` of `select_targets` alone, for a student whose head has `rows` rows."""
    chosen = batch["is_target"][:, 1:].bool()
    tail = batch["tail_logprob"][:, 1:][chosen]
    draw_ids = draw_weights = None
    if "tail_ids" in batch:
        draw_ids, counts = batch["tail_ids"][:, 1:][chosen], batch["tail_counts"][:, 1:][chosen]
        counts = torch.where(draw_ids < rows, counts, 0)
        draw_ids = torch.where(draw_ids < rows, draw_ids, 0)
        share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        draw_weights = (torch.exp(tail).unsqueeze(-1) * share).to(tail.dtype)
    targets = Targets(
        token_ids=batch["input_ids"][:, 1:][chosen],
        token_logprob=batch["token_logprob"][:, 1:][chosen],
        candidate_ids=batch["candidate_ids"][:, 1:][chosen],
        candidate_logprobs=batch["candidate_logprobs"][:, 1:][chosen],
        tail_logprob=tail,
        draw_ids=draw_ids,
        draw_weights=draw_weights,
        tail_logsumexp=batch["tail_logsumexp"][:, 1:][chosen] if "tail_logsumexp" in batch else None,
    )
    if recalibrate is not None:
        targets = recalibrate(targets)
    outside = targets.candidate_ids >= rows
    moved = torch.where(outside, targets.candidate_logprobs, EMPTY)
    return targets._replace(
        candidate_ids=torch.where(outside, 0, targets.candidate_ids),
        candidate_logprobs=torch.where(outside, EMPTY, targets.candidate_logprobs),
        tail_logprob=torch.logsumexp(torch.cat([moved, targets.tail_logprob.unsqueeze(-1)], dim=-1), dim=-1),
        tail_logsumexp=None,  # of the candidates as they were
    )


def predicting(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 (N,) each, of the positions that predict a target, in the order of `select_targets`."""
    rows, columns = batch["is_target"][:, 1:].bool().nonzero(as_tuple=True)
    return rows, columns


def cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """−log p(token): plain fine-tuning on the text. Uses nothing of the teacher's.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.

    Returns:
        (N,) nats, float32 (float64 for float64 logits).
    """
    total, token = _read(_widened(logits), targets.token_ids.unsqueeze(-1))
    return (total - token).squeeze(-1)


def forward_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0, tail: str = "auto") -> Tensor:
    """KL(teacher ‖ student), Σ q ln(q / p): covers everything that the teacher finds possible.

    The tail, as `draws`: Σ_S q ln(q / p) + t ln t − Σ_draws w ln p, where t = Σ w is the tail's mass. On average over
    the draws the gradient is that of the full divergence (of what is stored: log-probabilities are rounded there), and the
    value is the full divergence plus t · H(q_tail), the teacher's own uncertainty inside its tail, which no student changes.

    The tail, as `bucket`: one more symbol. The student is told exactly how much probability lies outside the candidates
    and nothing about how it is shared out there. The student's is the log-sum-exp of its other logits, never
    log(1 − Σ); an empty tail contributes 0, with finite gradients.

    Temperature: both sides become distributions over K + 1 symbols at temperature 1 and are then tempered as
    softmax(log p / T); the result is multiplied by T² so that gradients keep their size beside cross-entropy (Hinton
    et al. 2015, arXiv 1503.02531). That is the true tempered divergence only when the candidates are the whole
    vocabulary: otherwise the true one needs the tail's mass at T, which cannot be computed from the tail's mass at 1.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        temperature: above 0.
        tail: "draws" or "bucket"; "auto" takes the draws when there are some and the temperature is 1, which is what
            they were drawn at.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0 (but for draws that
        the student's head has no row for).

    Raises:
        ValueError: `tail` is something else, or draws are asked for that are not there or at another temperature.
    """
    if tail not in TAILS:
        raise ValueError(f"tail is one of {', '.join(TAILS)}, not {tail!r}")
    if tail == "draws" and targets.draw_ids is None:
        raise ValueError("these targets have no draws from the tail")
    if tail == "draws" and temperature != 1.0:
        raise ValueError(f"draws from the tail serve temperature 1, not {temperature}")
    if tail == "bucket" or targets.draw_ids is None or targets.draw_weights is None or temperature != 1.0:
        return temperature**2 * _divergence(*_bucketed(logits, targets, temperature))
    logits = _widened(logits)
    ids, _ = _candidates(targets)
    total, values = _read(logits, torch.cat([ids, targets.draw_ids], dim=-1))
    student = values - total
    weights = targets.draw_weights.to(logits.dtype)
    drawn = (weights * student[:, ids.shape[-1] :]).sum(dim=-1)
    mass = weights.sum(dim=-1)
    kept = _divergence(targets.candidate_logprobs.to(logits.dtype), student[:, : ids.shape[-1]])
    return kept + torch.xlogy(mass, mass) - drawn


def reverse_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher), Σ p ln(p / q): seeks what the teacher finds likeliest (Gu et al. 2024, arXiv 2306.08543).

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln q of each token
    that the student finds possible.

    Temperature: as in `forward_kl` with a bucket, times T². A tail that the teacher gives nothing counts as e⁻¹⁰⁰, so that
    a student that gives it something meets a large number instead of ∞.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        temperature: above 0.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    teacher, student = _bucketed(logits, targets, temperature)
    return temperature**2 * _divergence(student, teacher)


def jensen_shannon(logits: Tensor, targets: Targets, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """β · KL(teacher ‖ m) + (1 − β) · KL(student ‖ m), m = β · teacher + (1 − β) · student (Agarwal et al. 2024, GKD,
    arXiv 2306.13649). Bounded by ln 2.

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln of each token's
    mixture.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        beta: the teacher's share of the mixture, between 0 and 1; towards 0 the gradient leans to the forward
            divergence's direction, towards 1 to the reverse one's.
        temperature: as in `forward_kl` with a bucket, times T².

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    teacher, student = _bucketed(logits, targets, temperature)
    mixture = _mixture(teacher, student, beta)
    return temperature**2 * (beta * _divergence(teacher, mixture) + (1 - beta) * _divergence(student, mixture))


def total_variation(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """½ Σ |q − p|, the most by which the two disagree on any event (Wen et al. 2023, arXiv 2307.15190).

    The tail: one more symbol; a lower bound of the full distance. No estimate from draws: |q − p| needs q of each token.

    Temperature: as in `forward_kl` with a bucket, but times T: this gradient shrinks with 1 / T, not 1 / T².

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        temperature: above 0.

    Returns:
        (N,) a share of probability, float32 (float64 for float64 logits), in [0, 1] at temperature 1.
    """
    teacher, student = _bucketed(logits, targets, temperature)
    return temperature * 0.5 * (torch.exp(teacher) - torch.exp(student)).abs().sum(dim=-1)


def skewed_kl(logits: Tensor, targets: Targets, *, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ λ · teacher + (1 − λ) · student): forward, with bounded gradients (Ko et al. 2024, DistiLLM,
    arXiv 2402.03898). At most −ln λ.

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln of each token's
    mixture.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        skew: λ, between 0 and 1.
        temperature: as in `forward_kl` with a bucket, times T².

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    teacher, student = _bucketed(logits, targets, temperature)
    return temperature**2 * _divergence(teacher, _mixture(teacher, student, skew))


def skewed_reverse_kl(logits: Tensor, targets: Targets, *, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ (1 − λ) · teacher + λ · student): reverse, with bounded gradients (Ko et al. 2024, DistiLLM,
    arXiv 2402.03898). At most −ln λ.

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln of each token's
    mixture.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        skew: λ, between 0 and 1.
        temperature: as in `forward_kl` with a bucket, times T².

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    teacher, student = _bucketed(logits, targets, temperature)
    return temperature**2 * _divergence(student, _mixture(student, teacher, skew))


def adaptive_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """(g_head · KL(teacher ‖ student) + g_rest · KL(student ‖ teacher)) / (g_head + g_rest), where g is Σ |q − p| over the
    head, the fewest likeliest tokens on which q reaches ½, and over the rest (Wu et al. 2024, arXiv 2404.02657).

    No gradient flows through the weights. The tail: one more symbol, which belongs to the rest also where the candidates
    do not reach ½, since its tokens are less likely than all of them. No bound of the full value, whose weights may
    differ; equal to it when the candidates are the whole vocabulary. No estimate from draws, as for the reverse divergence.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        temperature: as in `forward_kl` with a bucket, times T².

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    teacher, student = _bucketed(logits, targets, temperature)
    q = torch.exp(teacher)
    gap = (q - torch.exp(student.detach())).abs()
    head = q.cumsum(dim=-1) - q < 0.5  # what came before does not reach it yet
    head[:, -1] = False
    on_head, on_all = (gap * head).sum(dim=-1), gap.sum(dim=-1)
    share = on_head / on_all.clamp(min=torch.finfo(gap.dtype).tiny)
    return temperature**2 * (share * _divergence(teacher, student) + (1 - share) * _divergence(student, teacher))


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
    total, values = _read(logits, ids)
    student = torch.exp(values - total)
    teacher = torch.exp(targets.candidate_logprobs.to(logits.dtype))
    return _divergence(_renormalised(teacher / c, kept), _renormalised(student / c, kept))


def conditional_kl(logits: Tensor, targets: Targets) -> Tensor:
    """KL(q_S ‖ p_S), both sides made to sum to one over the candidates: FIRST's matching without its re-calibration
    (Shum et al. 2024, arXiv 2408.12168), the middle term of the full divergence without its factor m.

    The tail: ignored on both sides, so any mass there is as good as any other; see `first`.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    logits = _widened(logits)
    ids, kept = _candidates(targets)
    teacher = _renormalised(targets.candidate_logprobs.to(logits.dtype), kept)
    return _divergence(teacher, _renormalised(logits.gather(-1, ids), kept))


def label_smoothing(logits: Tensor, targets: Targets, *, smoothing: float = 0.1) -> Tensor:
    """KL(smoothed candidates ‖ student over the whole vocabulary): a baseline of FIRST (Shum et al. 2024,
    arXiv 2408.12168).

    The teacher's candidates are made to sum to one; the likeliest then gives up `smoothing` (all it has, if that is
    less), in equal shares to the other candidates. This may swap the teacher's top two tokens, which a temperature cannot.
    A single candidate keeps everything.

    The tail: as in `top_k_renormalised`, the teacher is taken to give it nothing, and the student is driven to do the same.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.
        smoothing: probability, in [0, 1).

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    logits = _widened(logits)
    ids, kept = _candidates(targets)
    total, values = _read(logits, ids)
    teacher = torch.exp(_renormalised(targets.candidate_logprobs.to(logits.dtype), kept))
    others = kept.sum(dim=-1, keepdim=True) - 1
    likeliest = (kept.cumsum(dim=-1) == 1) & kept
    given = torch.where(likeliest & (others > 0), teacher.clamp(max=smoothing), 0.0).sum(dim=-1, keepdim=True)
    smoothed = torch.where(likeliest, teacher - given, teacher + given / others.clamp(min=1))
    return _divergence(torch.log(torch.where(kept, smoothed, 0.0)), values - total)


def residual_to_gold(logits: Tensor, targets: Targets) -> Tensor:
    """KL over the candidates and the token that stands here, against the student over the whole vocabulary (a baseline of
    Sparse Logit Sampling, ACL 2025, arXiv 2503.16870).

    The tail: its whole mass is given to the token that stands here, on top of its own where it is a candidate. The
    student learns the candidates exactly and is told nothing of the tail's other tokens; the target is the teacher's
    only on average, and only if the text is what the teacher would have said.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0.
    """
    logits = _widened(logits)
    ids, kept = _candidates(targets)
    gold, tail = targets.token_ids.unsqueeze(-1), targets.tail_logprob.unsqueeze(-1)
    found = kept & (ids == gold)
    logprobs = torch.where(found, torch.logaddexp(targets.candidate_logprobs, tail), targets.candidate_logprobs)
    teacher = torch.cat([logprobs, tail.masked_fill(found.any(dim=-1, keepdim=True), EMPTY)], dim=-1).to(logits.dtype)
    total, values = _read(logits, torch.cat([ids, gold], dim=-1))
    return _divergence(teacher, values - total)


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
    ids, kept = _candidates(targets)
    total, values = _read(logits, ids)
    teacher = _renormalised(targets.candidate_logprobs.to(logits.dtype) / temperature, kept)
    return temperature**2 * _divergence(teacher, values - total)


def _widened(logits: Tensor) -> Tensor:
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


def _read(logits: Tensor, ids: Tensor, hide: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the vocabulary, (N, 1), of logits (N, V), and the logits (N, K) of some ids (N, K).

    Rows where `hide` (N, 1) is true leave their ids out of the sum.
    """
    return _Reading.apply(logits, ids, hide)


def _candidates(targets: Targets) -> tuple[Tensor, Tensor]:
    """Candidate ids (N, K) safe to gather and scatter with, and which of them are real (N, K).

    A filler repeats a real candidate of its row, so that scattering over it hits no other token.
    """
    kept = targets.candidate_logprobs > EMPTY
    if not kept.shape[-1]:
        return targets.candidate_ids, kept
    real = targets.candidate_ids.gather(-1, kept.long().argmax(dim=-1, keepdim=True))
    return torch.where(kept, targets.candidate_ids, real), kept


def _bucketed(logits: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over K candidates and everything else as one more symbol: (N, K + 1) each.

    At a temperature other than 1 both are tempered as distributions over these symbols.
    """
    logits = _widened(logits)
    ids, kept = _candidates(targets)
    nothing_else = kept.sum(dim=-1, keepdim=True) == logits.shape[-1]
    # A row without candidates has nothing but a tail: its fillers hide no token.
    rest, values = _read(logits, ids, hide=kept.any(dim=-1, keepdim=True) & ~nothing_else)
    symbols = torch.cat([values.masked_fill(~kept, EMPTY), rest.masked_fill(nothing_else, EMPTY)], dim=-1)
    student = torch.log_softmax(symbols, dim=-1)
    teacher = torch.cat([targets.candidate_logprobs, targets.tail_logprob.unsqueeze(-1)], dim=-1).to(logits.dtype)
    if temperature != 1.0:
        student = torch.log_softmax(student / temperature, dim=-1)
        teacher = torch.log_softmax(teacher / temperature, dim=-1)
    return teacher, student


def _renormalised(scores: Tensor, kept: Tensor) -> Tensor:
    """Log-softmax over the symbols that are kept; the others, and so a row with none, are −inf."""
    none = ~kept.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~kept, EMPTY).masked_fill(none, 0.0)
    return torch.log_softmax(scores, dim=-1).masked_fill(none, EMPTY)


def _mixture(one: Tensor, other: Tensor, share: float) -> Tensor:
    """ln(share · exp(one) + (1 − share) · exp(other)); a symbol that both rule out stays −inf and meets no gradient."""
    neither = (one == EMPTY) & (other == EMPTY)
    one, other = one.masked_fill(neither, 0.0), other.masked_fill(neither, 0.0)
    return torch.logaddexp(one + math.log(share), other + math.log1p(-share)).masked_fill(neither, EMPTY)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """Σ exp(one) · (one − other) over the last dimension of two arrays of log-probabilities.

    Symbols that the first rules out contribute 0 and meet no gradient; those that only the second rules out count with
    `RULED_OUT`.
    """
    other = torch.where(other > EMPTY, other, RULED_OUT)
    return (torch.exp(one) * torch.where(one > EMPTY, one - other, 0.0)).sum(dim=-1)


@dataclass(frozen=True)
class Loss:
    """One entry of `LOSSES`: a function and what it needs. See the head of this module for the two shapes.

    `takes_draws` says that the function can use draws from the tail, and so a dump that has no candidates.
    """

    function: Callable[..., Tensor]
    kinds: tuple[str, ...] = ("positions",)
    columns: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    whole_batch: bool = False
    unit: Literal["target", "sequence"] = "target"
    hidden_states: bool = False
    takes_draws: bool = False


_CANDIDATES = ("candidate_ids", "candidate_logprobs")
_ALL = (*_CANDIDATES, "tail_logprob")

LOSSES: dict[str, Loss] = {
    "forward-kl": Loss(forward_kl, columns=_ALL, options=("temperature", "tail"), takes_draws=True),
    "reverse-kl": Loss(reverse_kl, columns=_ALL, options=("temperature",)),
    "jensen-shannon": Loss(jensen_shannon, columns=_ALL, options=("temperature", "beta")),
    "total-variation": Loss(total_variation, columns=_ALL, options=("temperature",)),
    "skewed-kl": Loss(skewed_kl, columns=_ALL, options=("temperature", "skew")),
    "skewed-reverse-kl": Loss(skewed_reverse_kl, columns=_ALL, options=("temperature", "skew")),
    "adaptive-kl": Loss(adaptive_kl, columns=_ALL, options=("temperature",)),
    "first": Loss(first, columns=_CANDIDATES, options=("c",)),
    "conditional-kl": Loss(conditional_kl, columns=_CANDIDATES),
    "label-smoothing": Loss(label_smoothing, columns=_CANDIDATES, options=("smoothing",)),
    "residual-to-gold": Loss(residual_to_gold, columns=_ALL),
    "top-k-renormalised": Loss(top_k_renormalised, columns=_CANDIDATES, options=("temperature",)),
    "ce": Loss(cross_entropy),
}


def units(batch: Batch) -> dict[str, Tensor]:
    """How many of each unit a batch holds (scalars, int64): what a sum of losses is divided by."""
    return {"target": batch["is_target"][:, 1:].sum(), "sequence": (batch["sequence_id"] >= 0).sum()}


def per_target(
    loss: Loss, *, ce_weight: float = 0.0, options: Mapping[str, float | str] | None = None
) -> Callable[[Tensor, Targets], Tensor]:
    """A loss that is not of whole batches, with its options and its share of cross-entropy, as one function of logits
    (N, V) and their targets to (N,) nats: (1 − ce_weight) · distillation + ce_weight · cross-entropy."""

    def mixed(logits: Tensor, targets: Targets) -> Tensor:
        values = loss.function(logits, targets, **(options or {}))
        return (1 - ce_weight) * values + ce_weight * cross_entropy(logits, targets) if ce_weight else values

    return mixed


def step_loss(
    loss: Loss,
    outputs: Any,
    batch: Batch,
    counts: Mapping[str, Tensor | int],
    *,
    ce_weight: float = 0.0,
    options: Mapping[str, float | str] | None = None,
    recalibrate: Callable[[Targets], Targets] | None = None,
) -> Tensor:
    """This batch's share of a step's loss: (1 − ce_weight) · distillation + ce_weight · cross-entropy.

    Args:
        loss: an entry of `LOSSES`.
        outputs: the student's, with `.logits` as `select_targets` takes them.
        batch: the same sequences, as `DistillationDataset` yields them.
        counts: number of targets and of sequences in the whole step, over all its batches and ranks. Shares of the
            same step then add up to exactly the mean that one big batch would have.
        ce_weight: in [0, 1].
        options: keyword arguments of the loss's function, such as `{"temperature": 2.0}`.
        recalibrate: see `select_targets`; a loss of whole batches is given what the store holds, as it is.

    Returns:
        A scalar, nats.
    """
    logits, targets = select_targets(outputs.logits, batch, recalibrate)

    def mean(values: Tensor, unit: str) -> Tensor:
        return values.sum() / torch.as_tensor(counts[unit], device=values.device).clamp(min=1)

    if not loss.whole_batch:
        return mean(per_target(loss, ce_weight=ce_weight, options=options)(logits, targets), "target")
    values = loss.function(outputs, batch, **(options or {}))
    if loss.unit == "sequence":
        values = values[batch["sequence_id"] >= 0]
    result = mean(values, loss.unit)
    if ce_weight:
        result = (1 - ce_weight) * result + ce_weight * mean(cross_entropy(logits, targets), "target")
    return result
