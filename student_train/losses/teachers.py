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

from student_train.losses.targets import Batch, Targets, targets_of

WEIGHTS = "teacher_weights"
SEPARATOR = "/"

Share = Callable[[Tensor, slice], Tensor]


def teachers_of(batch: Batch) -> list[Batch]:
    """A batch of several teachers as one batch for each, in the order in which they were named; that of a single one as it is.

    In the batch, the first teacher's arrays have names of their own; of the m-th after it, those that hold what a teacher knows
    are called `m/ARRAY`. The text and its targets are the same for all. `teacher_weights` (B, M), whose rows sum to one, is
    left out.
    """
    if WEIGHTS not in batch:
        return [batch]
    shared = {name: value for name, value in batch.items() if SEPARATOR not in name and name != WEIGHTS}
    further: list[dict[str, Tensor]] = [{} for _ in range(batch[WEIGHTS].shape[1] - 1)]
    for name, value in batch.items():
        teacher, separator, array = name.partition(SEPARATOR)
        if separator:
            further[int(teacher) - 1][array] = value
    return [shared, *(shared | knowledge for knowledge in further)]


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
