"""The loss of an optimiser step: which inputs the student runs on, how many units a batch holds, and its share of the step.

A step may consist of several batches on several ranks. Each adds its sum divided by the number of units in the whole step, so
that the shares add up to exactly the mean that one big batch would have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student_train.losses.divergences import cross_entropy, token_nll
from student_train.losses.preference import TargetLogprobs, group_count
from student_train.losses.rationale import IDS
from student_train.losses.sliced import target_logprobs
from student_train.losses.table import TEXT, Loss
from student_train.losses.targets import Batch, Targets, predicting_logits, target_tokens
from student_train.losses.teachers import weighted_loss


def units(batch: Batch) -> dict[str, Tensor]:
    """How many of each unit a batch holds (scalars, int64): what a sum of losses is divided by."""
    sequences = (batch["sequence_id"] >= 0).sum()
    targets = batch["is_target"][:, 1:].sum() if "is_target" in batch else torch.zeros_like(sequences)
    return {"target": targets, "sequence": sequences, "group": group_count(batch)}


def run_student(model: nn.Module, loss: Loss, batch: Batch, *, logits: bool = True) -> list[Any]:
    """The student's outputs on each of a loss's inputs, one forward pass for each. Those of a loss of groups can do without the
    logits."""
    if loss.unit == "group" and not logits:
        return [TargetLogprobs(target_logprobs(model, batch))]
    states = {"output_hidden_states": True} if loss.hidden_states else {}
    return [model(**model_inputs(batch, name), use_cache=False, **states) for name in loss.inputs]


def model_inputs(batch: Batch, name: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 (B, L) each, of one token array of a batch (see `Loss.inputs`).

    A row without a token attends to its first place, so that no model divides by an empty softmax.
    """
    if name in TEXT:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask = (batch[name] >= 0).long()
    mask[:, :1] = 1
    return {"input_ids": batch[name].clamp(min=0).long(), "attention_mask": mask}


def token_count(loss: Loss, batch: Batch) -> int:
    """How many tokens of a batch the student runs on, padding left out."""
    rows = batch["sequence_id"] >= 0
    second = (IDS,) if IDS in batch else ()  # the input of a second task
    return sum(int(model_inputs(batch, name)["attention_mask"][rows].sum()) for name in (*loss.inputs, *second))


def per_target(
    loss: Loss, *, ce_weight: float = 0.0, options: Mapping[str, float | str] | None = None
) -> Callable[[Tensor, Targets], Tensor]:
    """A loss that is not of whole batches, with its options and its share of cross-entropy, as one function of logits
    (N, V) and their targets to (N,) nats: (1 − ce_weight) · distillation + ce_weight · cross-entropy."""

    def mixed(logits: Tensor, targets: Targets) -> Tensor:
        values: Tensor = loss.function(logits, targets, **(options or {}))
        return (1 - ce_weight) * values + ce_weight * cross_entropy(logits, targets) if ce_weight else values

    return mixed


def step_loss(
    loss: Loss,
    outputs: Sequence[Any],
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
        outputs: the student's, one for each of the loss's inputs; that of the text with `.logits` as `select_targets` takes
            them.
        batch: the same sequences, as `DistillationDataset` yields them.
        counts: number of targets, sequences and groups in the whole step, over all its batches and ranks.
        ce_weight: in [0, 1]; above 0 only for a loss that runs on the text.
        options: keyword arguments of the loss's function, such as `{"temperature": 2.0}`.
        recalibrate: see `select_targets`; a loss of whole batches is given what the store holds, as it is.

    Returns:
        A scalar, nats.
    """

    def mean(values: Tensor, unit: str) -> Tensor:
        return values.sum() / torch.as_tensor(counts[unit], device=values.device).clamp(min=1)

    if not loss.whole_batch:
        logits = predicting_logits(outputs[0].logits, batch)
        function = per_target(loss, ce_weight=ce_weight, options=options)
        values = weighted_loss(function, batch, logits.shape[-1], recalibrate)(logits, slice(0, len(logits)))
        return mean(values, "target")
    values = loss.function(*outputs, batch, **(options or {}))
    if loss.unit == "sequence":
        values = values[batch["sequence_id"] >= 0]
    result = mean(values, loss.unit)
    if ce_weight:
        logits = predicting_logits(outputs[loss.inputs.index("input_ids")].logits, batch)
        result = (1 - ce_weight) * result + ce_weight * mean(token_nll(logits, target_tokens(batch)), "target")
    return result
