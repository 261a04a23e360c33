"""Hidden states: the student's at the positions where a dump keeps the teacher's are to be those (FitNets, Romero et al. 2015,
arXiv 1412.6550; DistilBERT, Sanh et al. 2019, arXiv 1910.01108; TinyBERT, Jiao et al. 2020, arXiv 1909.10351).

    loss = (1 − λ) · the run's loss + λ · mean over the kept positions of the mean over layers of

        mse      ‖f(s) − t‖² / W    W the teacher's width
        cosine   1 − cos(f(s), t)

s is a layer's state of the student, t the teacher's, and f a linear map that is learnt with the student (a `Projector`), or
nothing where both are of one width. The mean is over all positions of a step, on all processes.

A student is run once for both losses. What its forward pass gives is put into its outputs by a hook on the model itself, so
that whatever wraps the model sees the maps used where it sees its weights used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from student_train.losses.sliced import unwrapped
from student_train.losses.targets import Batch


class Projector(nn.ModuleList):
    """A linear map for each layer, from a student's width to a teacher's: the identity where they are the same, otherwise one
    that keeps lengths and angles as far as that goes, turned at random by a seed."""

    def __init__(self, layers: int, student_width: int, teacher_width: int, seed: int) -> None:
        generator, maps = torch.Generator().manual_seed(seed), []
        for _ in range(layers):
            linear = nn.utils.skip_init(nn.Linear, student_width, teacher_width)
            if student_width == teacher_width:
                nn.init.eye_(linear.weight)
            else:
                nn.init.orthogonal_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
            maps.append(linear)
        super().__init__(maps)


def kept_positions(batch: Batch) -> Tensor:
    """Where a batch has hidden states of the teacher that count, bool (B, T)."""
    kept: Tensor = batch["has_hidden"] & (batch["sequence_id"] >= 0).unsqueeze(-1)
    return kept


@contextmanager
def keeping_states(
    model: nn.Module, batch: Batch, layers: Sequence[int], projector: Projector | None = None
) -> Iterator[list[Tensor]]:
    """Within it, one forward pass of a model on a batch's text fills the list that is given.

    Args:
        model: a causal language model of transformers, or a wrapper of one; not compiled.
        batch: with `hidden`, `has_hidden` and `sequence_id`.
        layers: of the model, as transformers counts hidden states.
        projector: what is made of the states of each.

    Yields:
        a list; after the pass it has for each layer the states at the N kept positions, (N, W), float32 (float64 of a model in
        that).
    """
    inner, kept = unwrapped(model), kept_positions(batch)
    found: list[Tensor] = []

    def ask(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {**named, "output_hidden_states": True}

    def choose(_: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> Any:
        states = [outputs.hidden_states[layer][kept] for layer in layers]
        states = [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in states]
        if projector is not None:
            with torch.autocast(kept.device.type, enabled=False):
                states = [linear(rows) for linear, rows in zip(projector, states, strict=True)]
        found.extend(states)
        outputs.hidden_states = tuple(states)
        return outputs

    handles = [inner.register_forward_pre_hook(ask, with_kwargs=True), inner.register_forward_hook(choose)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def state_distances(states: Sequence[Tensor], batch: Batch, measure: str) -> Tensor:
    """How far a student's hidden states are from the teacher's, (N,), the mean over the layers.

    Args:
        states: as `keeping_states` gives them, (N, W) each, W the teacher's width.
        batch: the same, on their device.
        measure: "mse" or "cosine"; see the head of this module.
    """
    student = torch.stack(tuple(states), dim=1)
    teacher = batch["hidden"][kept_positions(batch)].to(student.dtype).reshape(student.shape)
    if measure == "mse":
        return (student - teacher).square().mean(dim=(1, 2))
    return 1 - cosine_similarity(student, teacher, dim=2).mean(dim=1)
