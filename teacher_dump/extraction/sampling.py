"""The likeliest tokens of a vocabulary, and draws from all: seeded by the sequence alone, all of a slice in one pass.

A draw is the token at which the running sum of the probabilities passes a random point. The sum runs in float64 over blocks of
`BLOCK` tokens, and a block is looked into only where a point falls: one pass over float32 probabilities, whatever the number of
draws, and no rounding that grows with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
PARTS = 8  # of the rows, where something is made beside their logits


def independent_points(sequence: int, length: int, draws: int) -> np.ndarray:
    """Points in [0, 1), float64 (length, draws), each by itself: as random sampling is published.

    They are a function of the sequence's id (a counter-based generator, Philox, with that key), so that a shard is drawn
    the same in any batch, by any worker, after any restart.
    """
    return np.random.Generator(np.random.Philox(key=sequence)).random((length, draws))


def systematic_points(sequence: int, length: int, draws: int) -> np.ndarray:
    """Points in [0, 1), float64 (length, draws), evenly spaced from one random start: (u + i) / draws.

    Each is uniform by itself, so a target made of such draws is as unbiased as one of independent draws; a token of
    probability q is drawn ⌊draws · q⌋ or ⌈draws · q⌉ times, so it varies less. Seeded as `independent_points`.
    """
    return (independent_points(sequence, length, 1) + np.arange(draws)) / draws


def precise(values: Tensor) -> Tensor:
    """In float64; on the CPU where the device has no such numbers."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def block_wise(reduce: Callable[..., Tensor], values: Tensor, fill: float) -> Tensor:
    """A reduction over each block of `BLOCK` tokens (N, blocks), of values (N, V); the last block is filled up with `fill`."""
    whole = values.shape[1] // BLOCK
    reduced = reduce(values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), dim=2)
    rest = values[:, whole * BLOCK :]
    if not rest.shape[1]:
        return reduced
    return torch.cat([reduced, reduce(pad(rest, (0, BLOCK - rest.shape[1]), value=fill), dim=1, keepdim=True)], dim=1)


def _in_blocks(values: Tensor, blocks: Tensor, fill: float) -> Tensor:
    """What some blocks (N, M) of values (N, V) hold, (N, M, BLOCK); past the end of the vocabulary it is `fill`."""
    ids = blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
    last = values.shape[1] - 1
    inside = values.gather(1, ids.clamp(max=last).flatten(1)).view(ids.shape)
    return inside if last % BLOCK == BLOCK - 1 else inside.masked_fill_(ids > last, fill)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, largest first, and their token ids, (N, count) each; which of equal ones is open.

    Only the `count` blocks with the largest maxima can hold them: reading the logits once for the maxima is several times as
    fast as ranking them all.

    Args:
        logits: float32 (N, V).
        count: at most V.
    """
    if count * BLOCK >= logits.shape[1]:
        values, ids = logits.topk(count, dim=1)
        return values, ids
    blocks = block_wise(torch.amax, logits, -torch.inf).topk(count, dim=1).indices
    values, at = _in_blocks(logits, blocks, -torch.inf).flatten(1).topk(count, dim=1)
    ids = blocks.gather(1, at // BLOCK) * BLOCK + at % BLOCK
    # Past the end of the vocabulary are only places that no finite logit loses to.
    return values, ids.clamp_(max=logits.shape[1] - 1)


def block_sums(weights: Tensor) -> Tensor:
    """The sum of each block of `BLOCK` tokens, `precise` (N, blocks), of weights float32 (N, V)."""
    # Float32 within a block: torch's own float64 sum of float32 takes thirty times as long, and as the exponentials themselves.
    return precise(block_wise(torch.sum, weights, 0))


def exponentials(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Weights w of their logs, float32 (N, V), which they replace, and Σ w ln w of each row, `precise` (N,).

    Some rows at a time: a second array as large as the logits takes a CPU longer to get than to fill.
    """
    sums = []
    for part in logs.split(max(1, len(logs) // PARTS)):
        weights = torch.exp(part)
        # What weighs nothing adds nothing, however far down it is.
        sums.append(block_sums(part.clamp_(min=torch.finfo(part.dtype).min).mul_(weights)).sum(dim=1))
        part.copy_(weights)
    return logs, torch.cat(sums)


def draw(weights: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    """Draw tokens in proportion to weights.

    Args:
        weights: float32 (N, V), at least 0; each row has one above 0.
        sums: their `block_sums`.
        points: float64 (N, M), in [0, 1), on the CPU or where the weights are.

    Returns:
        int64 (N, M): token ids, none of weight 0; ascending where the points are.
    """
    points = points.to(sums.device)
    if points.shape[1] * BLOCK >= weights.shape[1]:
        # So many points that to look into their blocks is more than to look at every token.
        return _passed(precise(weights).cumsum(dim=1), points).to(weights.device)
    ends = sums.cumsum(dim=1)
    block = _passed(ends, points)
    within = points * ends[:, -1:] - (ends - sums).gather(1, block)
    inside = precise(_in_blocks(weights, block.to(weights.device), 0)).cumsum(dim=2)
    highest = torch.nextafter(inside[:, :, -1], torch.zeros((), dtype=torch.float64, device=inside.device))
    within = within.clamp(min=0).minimum(highest)
    return (block * BLOCK + (inside <= within[:, :, None]).sum(dim=2)).to(weights.device)


def _passed(ends: Tensor, points: Tensor) -> Tensor:
    """Where running sums, float64 (N, V), pass points (N, M), given as shares of the whole: int64 (N, M)."""
    at = points * ends[:, -1:]
    # The last that adds anything: rounding may put a point on the very end of the sum.
    last = (ends < ends[:, -1:]).sum(dim=1, keepdim=True)
    return torch.searchsorted(ends, at, right=True).minimum(last)


def counted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Drawn tokens (N, M) as ids in ascending order (N, M), and how often each was drawn (N, M); 0 for one named before."""
    ids = tokens.sort(dim=1).values
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = new.cumsum(dim=1) - 1
    sizes = torch.zeros_like(ids).scatter_add_(1, group, torch.ones_like(ids))
    return ids, torch.where(new, sizes.gather(1, group), 0)
