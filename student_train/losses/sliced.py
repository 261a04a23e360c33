"""The head and the loss together, a slice of positions at a time: the logits (N, V) of a step never exist as a whole.

The head of a small student is most of its work, and its logits most of its memory: four bytes for each position and token of
the vocabulary, several times over with what a loss and its gradient add. Here the logits of a slice are computed, the loss
says how it would have them, and that goes at once into the gradients of the hidden states and of the head's weight, which
is what the backward pass hands on. The work is that of an ordinary step, nothing is computed twice, and the result is the
same to rounding.

Where a loss is no sum over positions, what it asks of each is the log-probability of the token that stands there
(`target_logprobs`): then the backward pass computes the logits of each slice once more.

It happens inside the model's own forward pass, in place of its head, so that whatever wraps the model (mixed precision, data
parallel, sharded weights) sees the head's weight used where it always is. That is right only for a model that does nothing
to its logits after the head. Some cap or scale them; those are found out (`has_plain_head`) and take the longer way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from student_train.losses.divergences import token_nll
from student_train.losses.head import has_plain_head, head_at, in_place_of_head, untouched
from student_train.losses.targets import Batch, Targets, predicting, target_tokens
from student_train.losses.teachers import Share, weighted_loss

# Of the logits of one slice. Each slice adds to the whole gradient of the head's weight, which must not take long beside its
# product: at a vocabulary of 262,144 a step with slices of 64 positions took 1.2 times as long as one with 256.
SLICE_BYTES = 256 * 2**20
ACCELERATOR_SLICE_BYTES = 512 * 2**20

Prepare = Callable[[int], Share]


def sliced_loss(
    model: nn.Module,
    batch: Batch,
    function: Callable[..., Tensor],
    *,
    count: Tensor | int | None = None,
    recalibrate: Callable[[Targets], Targets] | None = None,
    **options: float | str,
) -> Tensor:
    """The model's forward pass and the mean of a loss over a batch's targets, without ever holding all the logits.

    The same, in value and gradients, as `function(*select_targets(model(…).logits, batch), **options).mean()`; of a batch of
    several teachers, the sum of that over them by their weights (see `teachers`). Gradients are computed on the way (none
    within `torch.no_grad()`), and `backward()` can be called once.

    Args:
        model: a causal language model of transformers, or one within a wrapper whose `.module` it is.
        batch: as `DistillationDataset` yields it, on the model's device.
        function: a loss of this package, or any `f(logits (N, V), targets, **options) -> (N,)` that looks at each position by
            itself.
        count: what the sum of the losses is divided by; None for the number of the batch's targets.
        recalibrate: see `select_targets`.
        options: keyword arguments of the function.

    Returns:
        A scalar, nats, float32 (float64 for a model in float64); 0 for a batch without targets.

    Raises:
        InputError: the model puts tokens of its own before the text (see `targets.check_length`).
    """

    def prepare(vocabulary: int) -> Share:
        values = weighted_loss(partial(function, **options), batch, vocabulary, recalibrate)
        return lambda logits, rows: values(logits, rows).sum()

    total = sum_over_slices(model, batch, prepare)
    if count is None:
        count = batch["is_target"][:, 1:].sum()
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def sum_over_slices(model: nn.Module, batch: Batch, prepare: Prepare) -> Tensor:
    """The model's forward pass, and the sum of what each slice of its logits at the predicting positions adds.

    Args:
        model, batch: as in `sliced_loss`.
        prepare: is given the vocabulary size of the head, V, and gives a function of a slice's logits (n, V) and of which
            positions they are of, in the order of `select_targets`. It returns a scalar, or without gradients a tensor of
            any shape, and must not keep the logits, whose memory is used again. Without positions it is called once, with
            none.
    """
    return _at_head(
        model,
        batch,
        slices=lambda hidden, weight, bias: sliced(hidden, weight, bias, prepare(len(weight))),
        whole=lambda logits: prepare(logits.shape[-1])(logits, slice(0, len(logits))),
    )


def target_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """The model's forward pass and its log-probability of the token at each target, without ever holding all the logits.

    The logits of a slice are computed in the forward pass and again in the backward pass; between the two stay the hidden
    states at the targets (N, H).

    Args:
        model, batch: as in `sliced_loss`.

    Returns:
        (N,) nats in the order of `select_targets`, float32 (float64 for a model in float64), with gradients.
    """
    tokens = target_tokens(batch)
    return _at_head(
        model,
        batch,
        slices=lambda hidden, weight, bias: sliced_logprobs(hidden, weight, bias, tokens),
        whole=lambda logits: -token_nll(logits, tokens),
    )


def _at_head(
    model: nn.Module,
    batch: Batch,
    *,
    slices: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    whole: Callable[[Tensor], Tensor],
) -> Tensor:
    """The model's forward pass, and what is made of its head at the predicting positions.

    Args:
        model, batch: as in `sliced_loss`.
        slices: of the hidden states there (N, H), and the head's weight (V, H) and bias, where nothing follows the head.
        whole: of the logits there (N, V), where the model does something to them.
    """
    inner = unwrapped(model)
    rows, columns = predicting(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if not has_plain_head(inner):
        with head_at(inner, rows, columns, batch["input_ids"].shape[1]):
            logits = model(**inputs).logits[0]
        return whole(logits)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return slices(hidden[rows, columns], weight, bias)

    # A compiled model is compiled up to its head: the loss has other shapes in each step.
    compute = torch.compiler.disable(compute) if _compiled(model) else compute
    with in_place_of_head(inner.get_output_embeddings(), compute) as results:
        outputs = model(**inputs)
    if not untouched(outputs, results):
        raise RuntimeError(f"a {type(inner).__name__} changed after its first pass what it does to its logits")
    return outputs.logits


def sliced(hidden: Tensor, weight: Tensor, bias: Tensor | None, share: Share) -> Tensor:
    """Σ over slices of share(hidden[slice] · weightᵀ + bias, slice), with gradients of hidden, weight and bias.

    Under autocast the products are computed in its dtype, as those of any linear layer; the gradient of the weight is
    summed over slices in float32.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        share: as `prepare` of `sum_over_slices` gives it.
    """
    if _needs_gradients(hidden, weight, bias):
        return _Sliced.apply(hidden, weight, bias, share)
    with _exact(hidden) as dtype:
        return _total(share(logits, rows) for rows, logits in _slices(hidden.to(dtype), weight.to(dtype), bias))


def sliced_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """The log-probabilities of tokens, int64 (N,), by the logits hidden · weightᵀ + bias, (N,) nats; see `target_logprobs`."""
    if _needs_gradients(hidden, weight, bias):
        return _SlicedLogprobs.apply(hidden, weight, bias, tokens)
    with _exact(hidden) as dtype:
        return _logprobs(hidden.to(dtype), weight.to(dtype), bias, tokens)


def _needs_gradients(*parts: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


def _logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    return torch.cat([-token_nll(logits, tokens[rows]) for rows, logits in _slices(hidden, weight, bias)])


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, share: Share, needed: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """Σ over slices of a share, and its gradients of hidden, weight and bias, None of what needs none; products in `dtype`."""
    of_hidden, of_weight, of_bias = (
        torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32)) if part is not None and wanted else None
        for part, wanted in zip((hidden, weight, bias), needed, strict=True)
    )

    def shares() -> Iterator[Tensor]:
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        for rows, logits in _slices(inputs, matrix, bias):
            logits = logits.detach().requires_grad_()
            with torch.enable_grad():
                value = share(logits, rows)
            [gradient] = torch.autograd.grad(value, logits)
            if of_hidden is not None:
                of_hidden[rows] = gradient @ matrix
            if of_weight is not None and of_weight.dtype == dtype:
                of_weight.addmm_(gradient.T, inputs[rows])
            elif of_weight is not None:
                of_weight.add_(gradient.T @ inputs[rows])
            if of_bias is not None:
                of_bias.add_(gradient.sum(dim=0))
            yield value.detach()

    return _total(shares()), [of_hidden, of_weight, of_bias]


class _Sliced(torch.autograd.Function):
    """`sliced`, whose forward pass already computes the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, share: Share) -> Tensor:
        with _exact(hidden) as dtype:
            total, gradients = _gradients(hidden, weight, bias, share, ctx.needs_input_grad[:3], dtype)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The ordinary case; asking an accelerator would mean waiting for it.
        one = gradient.device.type == "cpu" and gradient.item() == 1
        results: list[Tensor | None] = []
        for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # In place, which autograd notices: a second pass is refused instead of multiplying twice.
            results.append(None if part is None else (part if one else part.mul_(gradient)).to(dtype))
        return (*results, None)


class _SlicedLogprobs(torch.autograd.Function):
    """`sliced_logprobs`, whose backward pass computes the logits of each slice again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        with _exact(hidden) as dtype:
            result = _logprobs(hidden.to(dtype), weight.to(dtype), bias, tokens)
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.dtype = dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors

        def share(logits: Tensor, rows: slice) -> Tensor:
            return -(gradient[rows] * token_nll(logits, tokens[rows])).sum()

        with torch.autocast(hidden.device.type, enabled=False):
            _, gradients = _gradients(hidden, weight, bias, share, ctx.needs_input_grad[:3], ctx.dtype)
        parts = zip(gradients, (hidden, weight, bias), strict=True)
        return (*(None if part is None else part.to(of.dtype) for part, of in parts), None)


def unwrapped(model: nn.Module) -> Any:
    """The model within wrappers for parallel or compiled execution."""
    while (module := _wrapped(model)) is not None:
        model = module
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The module in a wrapper for parallel (`module`) or compiled (`_orig_mod`) execution; None for one that is no wrapper."""
    inside = (getattr(model, name, None) for name in ("_orig_mod", "module"))
    return next((module for module in inside if isinstance(module, nn.Module)), None)


def _compiled(model: nn.Module | None) -> bool:
    return model is not None and (hasattr(model, "_orig_mod") or _compiled(_wrapped(model)))


@contextmanager
def _exact(hidden: Tensor) -> Iterator[torch.dtype]:
    """Within it there is no autocast; gives the dtype that products would have had, which are cast to it by hand."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        yield dtype


def _slices(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Logits (n, V) of slices of about the same length, in memory that the next slice uses again."""
    limit = SLICE_BYTES if hidden.device.type == "cpu" else ACCELERATOR_SLICE_BYTES
    max_length = max(1, limit // (len(weight) * hidden.element_size()))
    count = max(1, -(-len(hidden) // max_length))
    length = max(1, -(-len(hidden) // count))
    memory = hidden.new_empty(min(length, len(hidden)), len(weight))
    for start in range(0, max(1, len(hidden)), length):
        rows = slice(start, min(start + length, len(hidden)))
        logits = torch.mm(hidden[rows], weight.T, out=memory[: rows.stop - rows.start])
        yield rows, logits if bias is None else logits.add_(bias)


def _total(shares: Iterator[Tensor]) -> Tensor:
    total = next(shares)
    for share in shares:
        total = total + share
    return total
