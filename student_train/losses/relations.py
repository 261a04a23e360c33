"""Relations between sequences: the student's vectors are to lie to each other as the teacher's do (Park et al. 2019, Relational
Knowledge Distillation, arXiv 1904.05068). Experimental.

The teacher's vectors are those of the kind `vectors`, and the student's the means of its last hidden states over the targets.
Both are compared within themselves alone, so their widths need not be the same. The relations are those of one batch: another
batch size, or another number of processes, makes another loss and another gradient. Sequences of which the store keeps no
vector count for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from student_train.losses.targets import Batch

SMALLEST = 1e-12  # below which a squared distance counts as none


def mean_states(states: Tensor, is_target: Tensor) -> Tensor:
    """The mean of hidden states (B, T, H) over the targets, bool (B, T): float32 (B, H), 0 where there are none."""
    weights = is_target.to(torch.float32)
    sums = torch.einsum("bt,bth->bh", weights, states.float())
    return sums / weights.sum(dim=1, keepdim=True).clamp(min=1)


def relational_distance(outputs: Any, batch: Batch) -> Tensor:
    """Distances between the vectors of a batch's sequences, each as a share of their mean: Huber loss of student against
    teacher, for each sequence the mean over the others, (B,)."""
    student, teacher, known = _vectors(outputs, batch)
    pairs = known[:, None] & known[None, :] & ~torch.eye(len(known), dtype=torch.bool, device=known.device)
    losses = smooth_l1_loss(_distances(student, pairs), _distances(teacher, pairs), reduction="none") * pairs
    return losses.sum(dim=1) / pairs.sum(dim=1).clamp(min=1)


def relational_angle(outputs: Any, batch: Batch) -> Tensor:
    """Cosines of the angles at each sequence between the directions to two others: Huber loss of student against teacher, for
    each sequence the mean over all pairs of others, (B,)."""
    student, teacher, known = _vectors(outputs, batch)
    apart = ~torch.eye(len(known), dtype=torch.bool, device=known.device)
    pairs = known[:, None] & known[None, :] & apart
    triples = pairs[:, :, None] & pairs[:, None, :] & apart[None]
    losses = smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none") * triples
    return losses.sum(dim=(1, 2)) / triples.sum(dim=(1, 2)).clamp(min=1)


def _vectors(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The student's vectors float32 (B, H), the teacher's (B, W), and which sequences have both, bool (B,)."""
    student = mean_states(outputs.hidden_states[-1], batch["is_target"])
    teacher = batch["vector"].float()
    return student, teacher, (batch["sequence_id"] >= 0) & (teacher != 0).any(dim=1) & batch["is_target"].any(dim=1)


def _distances(vectors: Tensor, pairs: Tensor) -> Tensor:
    """Distances (B, B), as a share of the mean over some pairs."""
    squares = (vectors[:, None] - vectors[None, :]).square().sum(dim=2)
    # The square root has no slope at 0, where a sequence meets itself or its twin.
    distances = squares.clamp(min=SMALLEST).sqrt().masked_fill(squares < SMALLEST, 0)
    mean = (distances * pairs).sum() / pairs.sum().clamp(min=1)
    return distances / mean.clamp(min=SMALLEST)


def _cosines(vectors: Tensor) -> Tensor:
    """At each sequence the cosines between the directions to all others, (B, B, B)."""
    directions = normalize(vectors[None, :] - vectors[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
