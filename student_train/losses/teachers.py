"""Several teachers of one corpus: a batch that holds what each of them said, and a loss that is the weighted sum over them.

The mixture of the teachers is q = Σ w_m q_m. Forward KL is linear in q but for a term that no student changes,

    KL(q‖p) = Σ w_m KL(q_m‖p) − Σ w_m KL(q_m‖q),

so the weighted sum of the teachers' forward KLs has exactly the gradient of that of their mixture, each with its own
candidates and draws, whose estimates stay unbiased. No other divergence here is linear in q: there the sum is the mean
divergence from the teachers, which is not that from their mixture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from knowledge_store.kinds import KINDS
from knowledge_store.reading.collate import SEPARATOR
from student_train.losses.targets import Batch, Targets, targets_of

WEIGHTS = "teacher_weights"
OF_EVERY_KIND = ("sequence_id", "attention_mask", "labels")

# From a slice's logits (n, V), and which of the N positions they are of, to what they add to the result.
Share = Callable[[Tensor, slice], Tensor]


def teachers_of(batch: Batch) -> list[Batch]:
    """A batch of several teachers as one batch for each, in the order in which they were named; that of a single one as it is.

    In the batch, the first teacher's arrays have names of their own; of the m-th after it, those that hold what a teacher knows
    are called `m/ARRAY`. The text and its targets are the same for all. What some of the teachers do not keep is left out of
    all, and so is `teacher_weights` (B, M), whose rows sum to one.
    """
    if WEIGHTS not in batch:
        return [batch]
    of_text = {*OF_EVERY_KIND, *(name for kind in KINDS.values() for name in kind.of_text)}
    text = {name: value for name, value in batch.items() if name in of_text}
    known: list[dict[str, Tensor]] = [{} for _ in range(batch[WEIGHTS].shape[1])]
    for name, value in batch.items():
        teacher, separator, array = name.rpartition(SEPARATOR)
        if name not in of_text and name != WEIGHTS:
            known[int(teacher) if separator else 0][array] = value
    common = set(known[0]).intersection(*known)
    return [text | {name: value for name, value in arrays.items() if name in common} for arrays in known]


def weighted_loss(
    function: Callable[[Tensor, Targets], Tensor],
    batch: Batch,
    vocabulary_size: int,
    recalibrate: Callable[[Targets], Targets] | None = None,
) -> Share:
    """A loss as a function of a slice of the logits at a batch's targets, summed over the teachers by their weights.

    Args:
        function: from logits (n, V) and the targets of the same positions to (n,).
        batch: as `DistillationDataset` yields it.
        vocabulary_size: of the student's head, V.
        recalibrate: see `targets.select_targets`.

    Returns:
        from logits (n, V), and which of the N positions they are of in the order of `select_targets`, to (n,).
    """
    targets = [targets_of(knowledge, vocabulary_size, recalibrate) for knowledge in teachers_of(batch)]
    if len(targets) == 1:
        return lambda logits, rows: function(logits, targets[0].part(rows))
    is_target = batch["is_target"][:, 1:].bool()
    weights = batch[WEIGHTS].unsqueeze(1).expand(-1, is_target.shape[1], -1)[is_target]

    def values(logits: Tensor, rows: slice) -> Tensor:
        each = torch.stack([function(logits, known.part(rows)) for known in targets], dim=-1)
        return (weights[rows].to(each.dtype) * each).sum(dim=-1)

    return values
