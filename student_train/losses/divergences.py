"""Losses as plain functions `f(logits (N, V), targets, **options) -> (N,)`, nats per position.

Each takes logits of any float dtype and the `Targets` of the same N positions, and returns float32 (float64 for float64 logits)
that is at least 0 but where its docstring says otherwise.

The store keeps, per position, the teacher's likeliest tokens S with their log-probabilities, the log of the probability
outside them, the tail, and maybe some tokens drawn from that tail. What a loss does with the tail decides what the student
learns about everything that was not kept, so each function says it in its docstring. With m = q(S) the teacher's mass on S
and P = p(S) the student's, the full divergence of the teacher q and the student p falls apart as

    KL(q‖p) = KL_Bernoulli(m‖P) + m · KL(q_S‖p_S) + (1 − m) · KL(q_tail‖p_tail)

* candidates and a bucket: the tail is one more symbol. The forward divergence has its first two terms exactly. Every
  f-divergence (all below but `adaptive_kl`) is then a lower bound of the full one, since merging symbols never adds to
  it, and equals it when the candidates are the whole vocabulary.
* candidates and draws: tokens drawn from the tail, each standing for the same probability at every position. The forward
  divergence is linear in q apart from a constant, so its gradient over the draws is, on average, exactly that of
  the full one: `forward_kl`, the default. The other divergences have no such estimate: each puts q(j) of the drawn token
  through a function that is not linear, and of a draw only its id and count are kept. They use the bucket.
* candidates alone: `conditional_kl` keeps the middle term, `first` a re-calibrated form of it, `top_k_renormalised` and
  `label_smoothing` trade the first term for −log P.

No function holds a (N, V) log-softmax: each needs one log-sum-exp over the vocabulary, or over what the candidates leave
of it, and some logits by their ids, which `log_space.read` gives at the cost of one array of the logits' size. Logits of 16
bits are computed in float32, float64 stays. Everything is summed in log-space; gradients are finite wherever the logits are.

`table` lists the losses that a run can choose, `step` makes the loss of a step of them, and `sliced` computes any of them
with the head itself, a slice of positions at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.log_space import bucketed, candidates, divergence, mixture, read, renormalised, widened
from student_train.losses.table import TAILS
from student_train.losses.targets import EMPTY, Targets


def cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """−log p(token): plain fine-tuning on the text. Uses nothing of the teacher's.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions.

    Returns:
        (N,) nats, float32 (float64 for float64 logits).
    """
    return token_nll(logits, targets.token_ids)


def token_nll(logits: Tensor, token_ids: Tensor) -> Tensor:
    """−log p of tokens: logits (N, V) and int64 ids (N,) to (N,) nats."""
    total, token = read(widened(logits), token_ids.unsqueeze(-1))
    return (total - token).squeeze(-1)


def forward_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0, tail: str = "auto") -> Tensor:
    """KL(teacher ‖ student), Σ q ln(q / p): covers everything that the teacher finds possible.

    The tail, as `draws`: Σ_S q ln(q / p) + t ln t − Σ_draws w ln p, where t is the tail's mass. On average over
    the draws the gradient is that of the full divergence (of what is stored: log-probabilities are rounded there), and the
    value is the full divergence plus t · H(q_tail), the teacher's own uncertainty inside its tail, which no student changes.
    What a position's draws stand for together, Σ w, is t on average alone. Its logits z enter as −Σ w z + M · LSE(z), M being
    what candidates and draws stand for together: so the loss is the same wherever all logits are moved by one number, as the
    full divergence is. Made to sum to one position by position, the target would be biased.

    The tail, as `bucket`: one more symbol. The student learns exactly how much probability lies outside the candidates
    and nothing about how it is distributed there. The student's is the log-sum-exp of its other logits, never
    log(1 − Σ); an empty tail contributes 0, with finite gradients.

    Temperature: both sides become distributions over K + 1 symbols at temperature 1 and are then tempered as
    softmax(log p / T); the result is multiplied by T² so that gradients keep their size beside cross-entropy (Hinton
    et al. 2015, arXiv 1503.02531). That is the true tempered divergence only when the candidates are the whole
    vocabulary: otherwise the true one needs the tail's mass at T, which cannot be computed from the tail's mass at 1.

    Args:
        temperature: above 0.
        tail: "draws" or "bucket"; "auto" takes the draws when there are some and the temperature is 1, which is what
            they were drawn at.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0 (with draws, on average over them).

    Raises:
        ValueError: `tail` is something else, or draws are asked for that do not exist, or at another temperature.
    """
    if tail not in TAILS:
        raise ValueError(f"tail is one of {', '.join(TAILS)}, not {tail!r}")
    if tail == "draws" and targets.draw_ids is None:
        raise ValueError("these targets have no draws from the tail")
    if tail == "draws" and temperature != 1.0:
        raise ValueError(f"draws from the tail work at temperature 1 only, not at {temperature}")
    if tail == "bucket" or targets.draw_ids is None or targets.draw_weights is None or temperature != 1.0:
        return temperature**2 * divergence(*bucketed(logits, targets, temperature))
    logits = widened(logits)
    ids, _ = candidates(targets)
    total, values = read(logits, torch.cat([ids, targets.draw_ids], dim=-1))
    student = values - total
    weights = targets.draw_weights.to(logits.dtype)
    drawn = (weights * student[:, ids.shape[-1] :]).sum(dim=-1)
    tail_mass = torch.exp(targets.tail_logprob.to(logits.dtype))
    kept = divergence(targets.candidate_logprobs.to(logits.dtype), student[:, : ids.shape[-1]])
    return kept + torch.xlogy(tail_mass, tail_mass) - drawn


def reverse_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher), Σ p ln(p / q): seeks what the teacher finds likeliest (Gu et al. 2024, arXiv 2306.08543).

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln q of each token
    that the student finds possible.

    Temperature: as in `forward_kl` with a bucket, times T². A tail that the teacher gives nothing counts as e⁻¹⁰⁰, so that
    a student that gives it something meets a large number instead of ∞.

    Args:
        temperature: above 0.
    """
    teacher, student = bucketed(logits, targets, temperature)
    return temperature**2 * divergence(student, teacher)


def jensen_shannon(logits: Tensor, targets: Targets, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """β · KL(teacher ‖ m) + (1 − β) · KL(student ‖ m), m = β · teacher + (1 − β) · student (Agarwal et al. 2024, GKD,
    arXiv 2306.13649). Bounded by ln 2.

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln of each token's
    mixture.

    Args:
        beta: the teacher's share of the mixture, between 0 and 1; towards 0 the gradient leans to the forward
            divergence's direction, towards 1 to the reverse one's.
        temperature: as in `forward_kl` with a bucket, times T².
    """
    teacher, student = bucketed(logits, targets, temperature)
    middle = mixture(teacher, student, beta)
    return temperature**2 * (beta * divergence(teacher, middle) + (1 - beta) * divergence(student, middle))


def total_variation(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """½ Σ |q − p|, the most by which the two disagree on any event (Wen et al. 2023, arXiv 2307.15190).

    The tail: one more symbol; a lower bound of the full distance. No estimate from draws: |q − p| needs q of each token.

    Temperature: as in `forward_kl` with a bucket, but times T: this gradient shrinks with 1 / T, not 1 / T².

    Args:
        temperature: above 0.

    Returns:
        (N,) a share of probability, float32 (float64 for float64 logits), in [0, 1] at temperature 1.
    """
    teacher, student = bucketed(logits, targets, temperature)
    return temperature * 0.5 * (torch.exp(teacher) - torch.exp(student)).abs().sum(dim=-1)


def skewed_kl(logits: Tensor, targets: Targets, *, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ λ · teacher + (1 − λ) · student): forward, with bounded gradients (Ko et al. 2024, DistiLLM,
    arXiv 2402.03898). At most −ln λ.

    The tail: one more symbol; a lower bound of the full divergence. No estimate from draws: it needs ln of each token's
    mixture.

    Args:
        skew: λ, between 0 and 1.
        temperature: as in `forward_kl` with a bucket, times T².
    """
    teacher, student = bucketed(logits, targets, temperature)
    return temperature**2 * divergence(teacher, mixture(teacher, student, skew))


def skewed_reverse_kl(logits: Tensor, targets: Targets, *, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ (1 − λ) · teacher + λ · student): `skewed_kl` the other way round, from the same paper. Its tail, arguments
    and bounds are the same.
    """
    teacher, student = bucketed(logits, targets, temperature)
    return temperature**2 * divergence(student, mixture(student, teacher, skew))


def adaptive_kl(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """(g_head · KL(teacher ‖ student) + g_rest · KL(student ‖ teacher)) / (g_head + g_rest), where g is Σ |q − p| over the
    head, the fewest likeliest tokens on which q reaches ½, and over the rest (Wu et al. 2024, arXiv 2404.02657).

    No gradient flows through the weights. The tail: one more symbol, which belongs to the rest also where the candidates
    do not reach ½, since its tokens are less likely than all of them. No bound of the full value, whose weights may
    differ; equal to it when the candidates are the whole vocabulary. No estimate from draws, as for the reverse divergence.

    Args:
        temperature: as in `forward_kl` with a bucket, times T².
    """
    teacher, student = bucketed(logits, targets, temperature)
    q = torch.exp(teacher)
    gap = (q - torch.exp(student.detach())).abs()
    head = q.cumsum(dim=-1) - q < 0.5  # what came before does not reach it yet
    head[:, -1] = False
    on_head, on_all = (gap * head).sum(dim=-1), gap.sum(dim=-1)
    share = on_head / on_all.clamp(min=torch.finfo(gap.dtype).tiny)
    return temperature**2 * (share * divergence(teacher, student) + (1 - share) * divergence(student, teacher))


def first(logits: Tensor, targets: Targets, *, c: float = 0.28) -> Tensor:
    """FIRST's matching of re-calibrated candidates (Shum et al. 2024, arXiv 2408.12168).

    Both sides take the *probabilities* P of the candidates (full vocabulary), rescale them as P' = softmax(P / c), and
    the loss is KL(P'_teacher ‖ P'_student) over the candidates alone.

    The tail: ignored on both sides, so any mass there is as good as any other. A student that starts from nothing
    wanders off; use it on a fine-tuned student or mixed with cross-entropy.

    Args:
        c: scale of the probabilities, in (0, 1]; smaller is more certain. For K candidates no probability comes out
            above 1 / (1 + (K − 1) · exp(−1 / c)).
    """
    logits = widened(logits)
    ids, kept = candidates(targets)
    total, values = read(logits, ids)
    student = torch.exp(values - total)
    teacher = torch.exp(targets.candidate_logprobs.to(logits.dtype))
    return divergence(renormalised(teacher / c, kept), renormalised(student / c, kept))


def conditional_kl(logits: Tensor, targets: Targets) -> Tensor:
    """KL(q_S ‖ p_S), both sides made to sum to one over the candidates: FIRST's matching without its re-calibration
    (Shum et al. 2024, arXiv 2408.12168), the middle term of the full divergence without its factor m.

    The tail: ignored on both sides, so any mass there is as good as any other; see `first`.
    """
    logits = widened(logits)
    ids, kept = candidates(targets)
    teacher = renormalised(targets.candidate_logprobs.to(logits.dtype), kept)
    return divergence(teacher, renormalised(logits.gather(-1, ids), kept))


def label_smoothing(logits: Tensor, targets: Targets, *, smoothing: float = 0.1) -> Tensor:
    """KL(smoothed candidates ‖ student over the whole vocabulary): a baseline of FIRST (Shum et al. 2024,
    arXiv 2408.12168).

    The teacher's candidates are made to sum to one; the likeliest then gives up `smoothing` (all it has, if that is
    less), in equal shares to the other candidates. This may swap the teacher's top two tokens, which a temperature cannot.
    A single candidate keeps everything.

    The tail: as in `top_k_renormalised`, the teacher is taken to give it nothing, and the student is driven to do the same.

    Args:
        smoothing: probability, in [0, 1).
    """
    logits = widened(logits)
    ids, kept = candidates(targets)
    total, values = read(logits, ids)
    teacher = torch.exp(renormalised(targets.candidate_logprobs.to(logits.dtype), kept))
    others = kept.sum(dim=-1, keepdim=True) - 1
    likeliest = (kept.cumsum(dim=-1) == 1) & kept
    taken = torch.where(likeliest & (others > 0), teacher.clamp(max=smoothing), 0.0).sum(dim=-1, keepdim=True)
    smoothed = torch.where(likeliest, teacher - taken, teacher + taken / others.clamp(min=1))
    return divergence(torch.log(torch.where(kept, smoothed, 0.0)), values - total)


def residual_to_gold(logits: Tensor, targets: Targets) -> Tensor:
    """KL over the candidates and the token that stands here, against the student over the whole vocabulary (a baseline of
    Sparse Logit Sampling, ACL 2025, arXiv 2503.16870).

    The tail: its whole mass is given to the token that stands here, on top of its own where it is a candidate. The
    student learns the candidates exactly and nothing of the tail's other tokens; the target is the teacher's
    only on average, and only if the text is what the teacher would have said.
    """
    logits = widened(logits)
    ids, kept = candidates(targets)
    gold, tail = targets.token_ids.unsqueeze(-1), targets.tail_logprob.unsqueeze(-1)
    is_gold = kept & (ids == gold)
    logprobs = torch.where(is_gold, torch.logaddexp(targets.candidate_logprobs, tail), targets.candidate_logprobs)
    teacher = torch.cat([logprobs, tail.masked_fill(is_gold.any(dim=-1, keepdim=True), EMPTY)], dim=-1).to(logits.dtype)
    total, values = read(logits, torch.cat([ids, gold], dim=-1))
    return divergence(teacher, values - total)


def top_k_renormalised(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher's candidates, made to sum to one ‖ student over the whole vocabulary): the naive loss, to compare.

    The tail: the teacher is taken to give it nothing, so the student is driven to give it nothing either. It learns
    q_j / m on the candidates and comes out over-confident, the more so the less mass the candidates hold.

    Temperature: softmax(log q_S / T) against softmax(z / T), times T².

    Args:
        temperature: above 0.

    Returns:
        (N,) nats, float32 (float64 for float64 logits), at least 0; 0 only for a student without a tail.
    """
    logits = widened(logits) / temperature
    ids, kept = candidates(targets)
    total, values = read(logits, ids)
    teacher = renormalised(targets.candidate_logprobs.to(logits.dtype) / temperature, kept)
    return temperature**2 * divergence(teacher, values - total)
