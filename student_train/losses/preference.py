"""Preferences: of the answers to one prompt the better ones are to become likelier than the worse (DPO, RRHF, PRO).

A batch holds groups, all answers to a prompt each, as `KnowledgeStore.batches(groups=True)` gives them: `group` (R,) says of
each of its R rows which group it is of, −1 for padding, and `score` (R,) how good the answer is. In a group only the order of
its scores counts, and in PRO their differences; the first of equal scores is the best, the last the worst.

Every function here gives one loss for each group, (G,) nats in the order of their numbers. It depends on nothing outside the
group, so that the mean over a step's groups is the same however these are cut into batches. An answer's log-probability is the
sum over its targets, ln p(y) = Σ_t ln p(y_t | x, y_<t); with a length |y| of so many targets, ℓ(y) = ln p(y) / |y|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from student_train.losses.divergences import token_nll
from student_train.losses.targets import Batch, predicting, predicting_logits, target_tokens

BETA = 0.1  # of DPO
PRO_SFT_WEIGHT = 0.05


@dataclass(frozen=True)
class TargetLogprobs:
    """What these losses need of a student's outputs; they take outputs with `.logits` (R, T, V) too.

    Attributes:
        logprobs: of the tokens at the batch's targets, (N,) nats, as `sliced.target_logprobs` gives them.
    """

    logprobs: Tensor


def answer_logprobs(outputs: Any, batch: Batch) -> Tensor:
    """ln p(y) of each row, (R,) nats, 0 for padding: float32 (float64 of float64 logits).

    Args:
        outputs: the student's, `TargetLogprobs` or with `.logits` as `targets.select_targets` takes them.
        batch: the same rows.
    """
    if isinstance(outputs, TargetLogprobs):
        logprobs = outputs.logprobs
    else:
        logprobs = -token_nll(predicting_logits(outputs.logits, batch), target_tokens(batch))
    rows, _ = predicting(batch)
    return logprobs.new_zeros(len(batch["is_target"])).index_add(0, rows, logprobs)


def normalised_logprobs(outputs: Any, batch: Batch) -> Tensor:
    """ℓ(y) of each row, (R,) nats a token: what RRHF and PRO rank answers by."""
    return answer_logprobs(outputs, batch) / _lengths(batch)


def implicit_rewards(outputs: Any, batch: Batch, *, beta: float = BETA) -> Tensor:
    """β · (ln p(y) − ln p_reference(y)) of each row, (R,): the reward that DPO's student stands for, but for a term of the
    prompt. `batch["reference_logprob"]` (R,) is the reference's."""
    if "reference_logprob" not in batch:
        raise ValueError("this batch has no reference_logprob: read it with prepare=preferences(store, dump, reference=…)")
    return beta * (answer_logprobs(outputs, batch) - batch["reference_logprob"])


def dpo(outputs: Any, batch: Batch, *, beta: float = BETA) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290):

        −ln σ(β · [(ln p(y_w) − ln p_reference(y_w)) − (ln p(y_l) − ln p_reference(y_l))])

    Of a group with more than two answers, w is the one with the highest score and l the one with the lowest.

    Args:
        outputs: see `answer_logprobs`.
        batch: with `group`, `score` and `reference_logprob`, (R,) each.
        beta: how strongly the student is held to the reference: the smaller, the further it may go.

    Returns:
        (G,) nats.
    """
    return softplus(-margins(implicit_rewards(outputs, batch, beta=beta), batch)).to(_dtype(outputs))


def rrhf(outputs: Any, batch: Batch) -> Tensor:
    """Rank responses to align language models with human feedback (Yuan et al. 2023, arXiv 2304.05302):

        Σ over pairs with score_i < score_j of max(0, ℓ(y_i) − ℓ(y_j))  −  ln p(y_best)

    As in the paper, the second term, which is cross-entropy of the best answer, is a sum over its tokens and not their mean, so
    that it weighs by its length; the authors' program takes its mean over the padded row, and a weight before the first.

    Args:
        outputs: see `answer_logprobs`.
        batch: with `group` and `score`, (R,) each.

    Returns:
        (G,) nats.
    """
    logprobs = answer_logprobs(outputs, batch)
    lengthwise = logprobs / _lengths(batch)
    worse, best, _ = _ranking(batch)
    hinges = (lengthwise[None, :] - lengthwise[:, None]).clamp(min=0).masked_fill(~worse, 0).sum(dim=1)
    return _of_groups(hinges - logprobs.where(best, 0), batch)


def pro(outputs: Any, batch: Batch) -> Tensor:
    """Preference ranking optimisation (Song et al. 2023, arXiv 2306.17492), answers in descending order of their scores s:

        −Σ_k ln [ e^(ℓ(y_k) / T_kk) / (e^(ℓ(y_k) / T_kk) + Σ_{i worse than k} e^(ℓ(y_i) / T_ki)) ]
        −  0.05 · (n − 1)² · ln p(y_best)

    with the temperatures T_ki = 1 / (s_k − s_i) and T_kk = min_i T_ki, n answers in the group. Scores of another scale make
    another loss. The weight of the second term, and that it is a sum over tokens, are the authors'. Answers of equal scores are
    not set against each other (in the authors' program, whose ranking has one after the other, each such pair adds e⁰).

    Args:
        outputs: see `answer_logprobs`.
        batch: with `group` and `score`, (R,) each.

    Returns:
        (G,) nats.
    """
    logprobs = answer_logprobs(outputs, batch)
    lengthwise = logprobs / _lengths(batch)
    worse, best, scores = _ranking(batch)
    apart = (scores[:, None] - scores[None, :]).masked_fill(~worse, 0).to(lengthwise.dtype)
    own = lengthwise * apart.amax(dim=1)
    others = (lengthwise[None, :] * apart).masked_fill(~worse, float("-inf"))
    ranking = torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own
    weight = PRO_SFT_WEIGHT * (_same(batch).sum(dim=1) - 1).to(logprobs.dtype).square()
    return _of_groups(ranking - weight * logprobs.where(best, 0), batch)


def margins(rewards: Tensor, batch: Batch) -> Tensor:
    """By how much the reward of each group's best answer is above that of its worst, (G,); rewards are (R,)."""
    best, worst = _first_and_last(_scores(batch), _same(batch))
    return _of_groups(rewards.where(best, 0) - rewards.where(worst, 0), batch)


def group_count(batch: Batch) -> Tensor:
    """How many groups a batch holds (a scalar, int64); 0 where it holds none, or is not of groups."""
    if "group" not in batch:
        return torch.zeros_like(batch["sequence_id"].sum())
    return batch["group"].max() + 1


def _dtype(outputs: Any) -> torch.dtype:
    values = outputs.logprobs if isinstance(outputs, TargetLogprobs) else outputs.logits
    return torch.promote_types(values.dtype, torch.float32)


def _lengths(batch: Batch) -> Tensor:
    """|y| of each row, int64 (R,); 1 for padding."""
    return batch["is_target"][:, 1:].sum(dim=1).clamp(min=1)


def _same(batch: Batch) -> Tensor:
    """Which rows are of one group, bool (R, R)."""
    group = batch["group"]
    return (group[:, None] == group[None, :]) & (group >= 0)[:, None]


def _ranking(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, which (R, R) are worse answers of its group, and whether it is the best there, (R,); and the scores, float64
    (R,) (ValueError: one is not known)."""
    scores, same = _scores(batch), _same(batch)
    worse = same & (scores[None, :] < scores[:, None])
    best, _ = _first_and_last(scores, same)
    return worse, best, scores


def _first_and_last(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows (R,) are the best and the worst of those of the same group (R, R)."""
    places = torch.arange(len(scores), device=scores.device)
    earlier = places[None, :] < places[:, None]
    equal = scores[None, :] == scores[:, None]
    above = same & ((scores[None, :] > scores[:, None]) | (equal & earlier))
    below = same & ((scores[None, :] < scores[:, None]) | (equal & earlier.T))
    real = same.any(dim=1)
    return real & ~above.any(dim=1), real & ~below.any(dim=1)


def _scores(batch: Batch) -> Tensor:
    """The scores, float64 (R,), 0 for padding (ValueError: one is not known)."""
    scores = torch.where(batch["group"] >= 0, batch["score"], 0.0)
    if torch.isnan(scores).any():
        raise ValueError("an answer of this batch has no score: take those under a dump (`scores`), or a corpus with scores")
    return scores


def _of_groups(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the rows of each group, (R,) to (G,)."""
    group, count = batch["group"], int(group_count(batch))
    index = torch.where(group < 0, count, group)
    return values.new_zeros(count + 1).index_add(0, index, values)[:count]
