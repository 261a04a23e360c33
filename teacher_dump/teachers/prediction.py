"""What a teacher on this machine answers for a batch: logits and gradients, one slice of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from teacher_dump.teachers.protocol import Likeliest

if TYPE_CHECKING:
    from teacher_dump.teachers.local import LocalTeacher

# Logits held at once, little beside a batch's: 64 MB in float32 on a CPU, 256 MB on a GPU. Smaller ones do not pay: the head's
# product slows down with fewer rows, and what follows it gains nothing measurable from staying in cache.
SLICE_LOGITS = {"cpu": 2**24, "cuda": 2**26, "mps": 2**26}

# How far below the likeliest token one is that a teacher never gives, in nats: e^-10000 is 0 in float64 too.
IMPOSSIBLE = 1e4


@dataclass
class LocalPrediction:
    """A teacher's prediction for a batch (see `protocol.Prediction`).

    Attributes:
        teacher: whose.
        hidden: the backbone's last hidden states (B, T, H), in the model's dtype; None where logits are whole.
        logits: (B, T, V) in the model's dtype; only where logits are whole.
        traced: the input embeddings (B, T, E), and the same hidden states or logits as a function of them, whose gradients can
            be computed once; None where they were not asked for.
        states: hidden states (B, T, H) in the model's dtype, by the layer that was asked for.
    """

    teacher: LocalTeacher
    hidden: torch.Tensor | None
    logits: torch.Tensor | None
    traced: tuple[torch.Tensor, torch.Tensor] | None = None
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def layer_states(self, layer: int) -> torch.Tensor:
        """See `protocol.Prediction`."""
        return self.states[layer]

    def logit_slices(self, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The logits at (rows[i], positions[i]), int64 (N,) each, slice by slice.

        Yields:
            which of the N, and their logits, float32 (n, V), on the teacher's device. They may be changed in place.
        """
        with torch.inference_mode():
            for part in self._slices(len(rows)):
                chosen = self._states[self._places(rows[part], positions[part])]
                logits = chosen if self.hidden is None else self.teacher.model.get_output_embeddings()(chosen)
                yield part, with_finite_padding(logits.to(self.teacher.device).float(), self.teacher.impossible_tokens)

    def likeliest(self, rows: np.ndarray, positions: np.ndarray) -> Likeliest:
        """Never asked for, where logits are whole."""
        raise NotImplementedError

    def drop(self) -> None:
        """All is there already."""

    def input_gradients(
        self, rows: torch.Tensor, positions: torch.Tensor, slopes: Callable[[slice, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `protocol.Prediction`. The logits are made a slice at a time here too: the gradient at the hidden states is put
        together of those of the slices, and taken back to the embeddings in one pass."""
        assert self.traced is not None
        (embeddings, outputs), gradient = self.traced, torch.zeros_like(self._states)
        self.traced = None  # what is kept for it is freed by using it
        for part in self._slices(len(rows)):
            places = self._places(rows[part], positions[part])
            chosen = self._states[places].requires_grad_(self.hidden is not None)
            with torch.enable_grad():
                logits = chosen if self.hidden is None else self.teacher.model.get_output_embeddings()(chosen)
            slope = slopes(
                part, with_finite_padding(logits.detach().to(self.teacher.device).float(), self.teacher.impossible_tokens)
            ).to(logits)
            gradient[places] = slope if self.hidden is None else torch.autograd.grad(logits, chosen, slope)[0]
        [gradients] = torch.autograd.grad(outputs, embeddings, gradient)
        return embeddings.detach(), gradients

    @property
    def _states(self) -> torch.Tensor:
        """What is there of all positions: (B, T, H), or (B, T, V) where logits are whole."""
        states = self.logits if self.hidden is None else self.hidden
        assert states is not None
        return states

    def _slices(self, count: int) -> Iterator[slice]:
        """Slices of so many positions whose logits are held at once."""
        size = max(1, SLICE_LOGITS[self.teacher.device.type] // self.teacher.vocabulary_size)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _places(self, rows: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some positions, on the device of their states."""
        return rows.to(self._states.device), positions.to(self._states.device)


def with_finite_padding(logits: torch.Tensor, impossible_tokens: np.ndarray) -> torch.Tensor:
    """Give tokens that are never given, whose logits are −inf, ones so low that their probability is 0 all the same: sums of
    products and checks for what is not finite then need to know nothing of them. In place.

    Args:
        logits: float32 (n, V).
        impossible_tokens: int64 (m,).
    """
    ids = torch.from_numpy(impossible_tokens).to(logits.device)
    if len(ids):
        padding = logits[:, ids]
        logits[:, ids] = torch.where(padding.isneginf(), logits.amax(dim=1, keepdim=True) - IMPOSSIBLE, padding)
    return logits
