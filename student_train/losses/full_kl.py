"""The whole KL(teacher ‖ student) at each position, estimated without bias from candidates, draws and the tail's entropy.

Of the tail a store keeps its probability t, its entropy H and draws, each of which stands for a probability w. Then

    KL = Σ_S q ln(q / p) + Σ_tail q ln q − Σ_tail q ln p
       ≈ Σ_S q ln(q / p) + Σ_draws w (ln t − H − ln p)

since Σ_tail q ln q = t (ln t − H), and Σ_draws w is t on average. Each draw is held against ln t − H, the mean of ln q over the
tail, rather than their sum against t times that: where the number of draws varies, what they stand for together varies with it,
and the two cancel out. Here q is what is kept, rounded: a teacher itself scores the `rounding_floor` at most, on average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from student_train.losses.log_space import candidates, divergence, read, widened
from student_train.losses.targets import Targets


class FullKL(NamedTuple):
    """What `full_kl` finds at N positions.

    Attributes:
        estimate: of KL(teacher ‖ student), (N,) nats: right on average over the draws, and below 0 at some positions.
        draw_variance: of the estimate over the draws, (N,) nats², if each were made by itself. Those of a store are systematic
            and vary less.
    """

    estimate: Tensor
    draw_variance: Tensor


def knows_full_kl(targets: Targets) -> bool:
    """Whether `full_kl` can be estimated: there are draws, and the entropy of what they are from is known."""
    return targets.draw_ids is not None and targets.tail_mean_logprob is not None


def full_kl(logits: Tensor, targets: Targets) -> FullKL:
    """The whole divergence from the teacher at each position: the one function that evaluations and validation take it from.

    Args:
        logits: (N, V), any float dtype.
        targets: of the same N positions. What the student's head has no row for is left out.

    Returns:
        float32 (float64 for float64 logits). Means over positions are to be made of it: that of one position, and so
        percentiles over them, tell mostly of its draws.

    Raises:
        ValueError: there are no draws, or the entropy of what they are from is not known.
    """
    if targets.draw_ids is None or targets.draw_weights is None or targets.tail_mean_logprob is None:
        raise ValueError(
            "these targets have no draws, or not the entropy of their tail: measure a lower bound, forward_kl(…, tail='bucket')"
        )
    logits = widened(logits)
    ids, _ = candidates(targets)
    total, values = read(logits, torch.cat([ids, targets.draw_ids], dim=-1))
    student = values - total
    kept = divergence(targets.candidate_logprobs.to(logits.dtype), student[:, : ids.shape[-1]])
    weights = targets.draw_weights.to(logits.dtype)
    above = targets.tail_mean_logprob.to(logits.dtype).unsqueeze(-1) - student[:, ids.shape[-1] :]
    drawn = torch.where(weights > 0, weights * above, 0.0)
    return FullKL(kept + drawn.sum(dim=-1), drawn.square().sum(dim=-1))


def rounding_floor(targets: Targets, step: float) -> Tensor:
    """KL(what is kept ‖ teacher) that rounding makes at each position, on average: below it no student can be measured.

    What is rounded, how far each candidate lies below the first and the tail's log-odds, is off by anything up to half a step
    either way, so by step² / 12 squared, and to second order a divergence is half the variance of how far the log-probabilities
    are off. With m = 1 − t, and π the candidates' probabilities made to sum to one, that is
    step² / 24 · (t m + m Σ π (1 − π) over all but the first).

    Args:
        targets: of N positions.
        step: the quantisation step, nats.

    Returns:
        (N,) nats.
    """
    tail = torch.exp(targets.tail_logprob)
    mass = 1 - tail
    shares = torch.exp(targets.candidate_logprobs[:, 1:]) / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(-1)
    return step**2 / 24 * mass * (tail + (shares * (1 - shares)).sum(dim=-1))
