"""A model's head: asked at some positions only, or replaced by a computation of our own where nothing follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.losses.targets import check_length


@contextmanager
def head_at(model: PreTrainedModel, rows: Tensor, columns: Tensor, length: int) -> Iterator[None]:
    """Within it, the model's head computes the logits of some positions only, and its `.logits` are (1, N, V).

    The head is the largest product of a small model, and most positions of a prompt with its answer need none. What a model
    does to its logits after the head stays done, and the forward pass is still the wrapped module's own.

    Args:
        model: a causal language model; within a wrapper, the model that is wrapped.
        rows, columns: int64 (N,) each, which positions.
        length: how many positions a row of the model's input has.

    Raises:
        InputError: in the forward pass, where the head is given other positions than those (see `targets.check_length`).
    """

    def choose(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        check_length(inputs[0].shape[1], length)
        return (inputs[0][rows, columns].unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are what a linear head gives, and nothing is done to them afterwards.

    Looked up once for a model, by a pass over two tokens in which the head is replaced: what comes out must be the very
    object that went in. A model that is to be wrapped is best looked at before.
    """
    head: nn.Module = model.get_output_embeddings()
    # Quantised, adapted, offloaded or hooked heads are more than their weight.
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return False
    if model not in _plain:
        _plain[model] = _passes_untouched(model, head)
    return _plain[model]


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _passes_untouched(model: nn.Module, head: nn.Linear) -> bool:
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=head.weight.device)
    shapes = []

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(hidden.shape)
        return torch.zeros((), dtype=torch.float32, device=hidden.device)

    devices = [head.weight.device] if head.weight.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), in_place_of_head(head, compute) as results:
        try:
            outputs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        except Exception:  # it does something with its logits that a number without dimensions does not allow
            return False
    return shapes == [(1, 2, head.in_features)] and untouched(outputs, results)


def untouched(outputs: Any, results: list[tuple[Tensor, int]]) -> bool:
    """Whether the head was called once, and its result came through as it was. Under a wrapper for mixed precision too,
    which copies outputs of 16 bits alone, and under DDP that looks for unused parameters, which copies all of them."""
    logits = getattr(outputs, "logits", None)
    if len(results) != 1 or not isinstance(logits, Tensor):
        return False
    copied = type(logits.grad_fn).__name__ == "_DDPSinkBackward" and logits.shape == results[0][0].shape
    return copied or (logits is results[0][0] and _version(logits) == results[0][1])


def _version(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def in_place_of_head(
    head: nn.Linear, compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Iterator[list[tuple[Tensor, int]]]:
    """Within it, the head gives what `compute` makes of its input, weight and bias; all of it is collected, with its
    version."""
    results: list[tuple[Tensor, int]] = []

    def forward(hidden: Tensor) -> Tensor:
        result = compute(hidden, head.weight, head.bias)
        results.append((result, _version(result)))
        return result

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield results
    finally:
        del head.forward
