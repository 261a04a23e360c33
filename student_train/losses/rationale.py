"""The second task of a step: the student writes the rationale of each sequence (distilling step-by-step, arXiv 2305.02301).

    loss = (1 − λ) · mean over the label's tokens + λ · mean over the rationale's tokens

Each mean is over its own count in the whole step, over all batches and ranks. The label's may be any loss; the rationale's is
cross-entropy.
"""

from __future__ import annotations

from torch import Tensor, nn

from student_train.losses.divergences import token_nll
from student_train.losses.sliced import Share, sum_over_slices
from student_train.losses.targets import Batch, target_tokens

# Arrays of a batch: the token ids of the second input (B, L), −1 where a row has ended; and which of them count.
IDS, COUNTED = "rationale_ids", "rationale_is_target"


def rationale_count(batch: Batch) -> Tensor:
    """How many tokens of rationales a batch holds (a scalar, int64)."""
    return batch[COUNTED][:, 1:].sum()


def rationale_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The negative log-likelihood of a batch's rationales, nats, summed over their tokens; runs the model on the second input.

    Args:
        model: as of `sliced_loss`.
        batch: with `rationale_ids` and `rationale_is_target`, on the model's device.
    """
    mask = (batch[IDS] >= 0).long()
    mask[:, :1] = 1  # no model divides by an empty softmax
    second = {"input_ids": batch[IDS].clamp(min=0), "attention_mask": mask, "is_target": batch[COUNTED]}
    tokens = target_tokens(second)

    def prepare(vocabulary_size: int) -> Share:
        return lambda logits, rows: token_nll(logits, tokens[rows]).sum()

    return sum_over_slices(model, second, prepare)
