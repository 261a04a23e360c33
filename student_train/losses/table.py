"""LOSSES: what `--loss` chooses from, and what each entry needs of a dump and of the student. Imports no torch.

A loss has one of two shapes:

* one loss per target position: `f(logits (N, V), targets, **options) -> (N,)`, as every function in `divergences`. The trainer
  pairs logits with positions, gives it a slice of them at a time, sums, and divides by the number of targets of the step.
* anything else, with `whole_batch=True`: `f(*outputs, batch, **options)`. There is one of the student's outputs for each of
  the entry's `inputs` (`.logits` (B, T, V), `.hidden_states` when the entry says `hidden_states=True`), and `batch` is
  everything that the store gave for these sequences, so a kind of knowledge that adds `batch["vector"]` (B, D) is at hand. It
  returns one loss per target (`unit="target"`), in the order of `batch["is_target"].nonzero()`, one per sequence
  (`unit="sequence"`, shape (B,); rows of padding are left out by the trainer), or one per group of answers (`unit="group"`,
  shape (G,), in the order of the numbers in `batch["group"]`). A run of the last reads groups, and gives the function, instead
  of logits, the log-probabilities of the targets, as `preference.TargetLogprobs`.

A new loss is one function and one entry. Training checks that the dump holds what an entry names before it starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from student_train.deferred import deferred

TAILS = ("auto", "draws", "bucket")
TEXT = ("input_ids",)
TEXT_COLUMNS = ("token_id", "is_target")  # of a store's table, from which the text of a batch and its targets are made


@dataclass(frozen=True)
class Loss:
    """One entry of `LOSSES`: a function, and what it needs. The head of this module describes the two shapes of functions.

    Attributes:
        function: the loss.
        kinds: kinds of knowledge that the dump must hold.
        columns: arrays of a batch that the function reads, besides those of its inputs.
        inputs: token arrays of a batch that the student runs on, one forward pass for each. The text itself, "input_ids", has
            the mask "attention_mask"; any other array `NAME` (B, L) of ids holds −1 where a sequence has ended.
        options: keyword arguments of the function that a run sets.
        whole_batch: which shape the function has.
        unit: what a whole-batch function returns one loss for.
        hidden_states: whether the student's hidden states are needed.
        reference: whether a reference's log-probability of each answer is needed, `batch["reference_logprob"]`.
        rewards: of a loss of groups, what it raises of better answers above that of worse, `f(*outputs, batch, **options)` to
            (B,).
        draws: arrays of draws from the tail that the function reads where there are any, at temperature 1. A loss that has some
            can use a dump without candidates.
        recalibrated: arrays that it reads besides where the teacher's targets are re-calibrated; none in a loss that they
            cannot be re-calibrated for.
    """

    function: Callable[..., Any]
    kinds: tuple[str, ...] = ("positions",)
    columns: tuple[str, ...] = ()
    inputs: tuple[str, ...] = TEXT
    options: tuple[str, ...] = ()
    whole_batch: bool = False
    unit: Literal["target", "sequence", "group"] = "target"
    hidden_states: bool = False
    reference: bool = False
    rewards: Callable[..., Any] | None = None
    draws: tuple[str, ...] = ()
    recalibrated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.whole_batch and self.inputs != TEXT:
            raise ValueError("a loss of each target runs on input_ids alone: give whole_batch=True for other inputs")
        if self.unit == "target" and TEXT[0] not in self.inputs:
            raise ValueError("a loss that does not run on input_ids knows no targets: give unit='sequence'")
        if self.unit == "group" and (not self.whole_batch or self.inputs != TEXT):
            raise ValueError("a loss of groups is of whole batches, and runs on input_ids alone")


_function = functools.partial(deferred, "student_train.losses.divergences")
_CANDIDATES = ("candidate_ids", "candidate_logprobs")
_of_candidates = functools.partial(Loss, columns=_CANDIDATES, recalibrated=("tail_logsumexp",))
_divergence = functools.partial(_of_candidates, columns=(*_CANDIDATES, "tail_logprob"))
_relations = functools.partial(deferred, "student_train.losses.relations")
_relation = functools.partial(
    Loss, kinds=("vectors",), columns=("vector",), whole_batch=True, unit="sequence", hidden_states=True
)
_preference = functools.partial(deferred, "student_train.losses.preference")
_of_groups = functools.partial(Loss, whole_batch=True, unit="group")

LOSSES: dict[str, Loss] = {
    "forward-kl": _divergence(_function("forward_kl"), options=("temperature", "tail"), draws=("tail_ids", "draw_weight")),
    "reverse-kl": _divergence(_function("reverse_kl"), options=("temperature",)),
    "jensen-shannon": _divergence(_function("jensen_shannon"), options=("temperature", "beta")),
    "total-variation": _divergence(_function("total_variation"), options=("temperature",)),
    "skewed-kl": _divergence(_function("skewed_kl"), options=("temperature", "skew")),
    "skewed-reverse-kl": _divergence(_function("skewed_reverse_kl"), options=("temperature", "skew")),
    "adaptive-kl": _divergence(_function("adaptive_kl"), options=("temperature",)),
    "first": Loss(_function("first"), columns=_CANDIDATES, options=("c",)),
    "conditional-kl": _of_candidates(_function("conditional_kl")),
    "label-smoothing": _of_candidates(_function("label_smoothing"), options=("smoothing",)),
    "residual-to-gold": _divergence(_function("residual_to_gold")),
    "top-k-renormalised": _of_candidates(_function("top_k_renormalised"), options=("temperature",)),
    "ce": Loss(_function("cross_entropy")),
    "relational-distance": _relation(_relations("relational_distance")),
    "relational-angle": _relation(_relations("relational_angle")),
    "dpo": _of_groups(_preference("dpo"), options=("beta",), reference=True, rewards=_preference("implicit_rewards")),
    "rrhf": _of_groups(_preference("rrhf"), rewards=_preference("normalised_logprobs")),
    "pro": _of_groups(_preference("pro"), rewards=_preference("normalised_logprobs")),
}
