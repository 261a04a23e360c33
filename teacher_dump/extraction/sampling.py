"""The likeliest tokens of a vocabulary, and draws from all: seeded by the sequence alone, all of a slice in one pass.

A draw is the token at which the running sum of the probabilities passes a point, and a position's points lie evenly spaced from
one random start. The sum runs in float64 over blocks of `BLOCK` tokens, and a block is looked into only where a point falls:
one pass over float32 probabilities, whatever the number of draws, and no rounding that grows with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
PARTS = 8  # of the rows, where something is made beside their logits


def starts(sequence: int, length: int, seed: int) -> np.ndarray:
    """Where the draws of each position of a sequence start, as a share of the space between two: float64 (length,) in [0, 1).

    A function of the sequence's id and the draw seed (a counter-based generator, Philox, with both as its key), so that a shard
    is drawn the same in any batch, by any worker, after any restart, and with another seed by itself.
    """
    return np.random.Generator(np.random.Philox(key=np.array([sequence, seed], np.uint64))).random(length)


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


def draw(weights: Tensor, sums: Tensor, spacing: Tensor, begin: Tensor, most: int) -> Tensor:
    """Draw tokens at points (begin + i) · spacing of the running sum of weights, i = 0, 1, … as far as the sum reaches.

    Where `begin` is uniform on [0, 1), a token of weight w is drawn w / spacing times on average, ⌊w / spacing⌋ or
    ⌈w / spacing⌉ times.

    Args:
        weights: float32 (N, V), at least 0.
        sums: their `block_sums`.
        spacing: float64 (N,), above 0, where the sums are.
        begin: float64 (N,), in [0, 1).
        most: no row has more points than that.

    Returns:
        int64 (N, M): token ids in ascending order, none of weight 0, a token as often as it was drawn; −1 behind the last. M is
        the largest number of any row.
    """
    begin = begin.to(sums.device)
    dense = most * BLOCK >= weights.shape[1]  # to look into the blocks of so many points is more than to look at every token
    ends = (precise(weights) if dense else sums).cumsum(dim=1)
    counts = (ends[:, -1] / spacing - begin).ceil().nan_to_num(0, 0, 0).clamp(0, most).long()
    numbers = torch.arange(int(counts.max()) if len(counts) else 0, device=sums.device)
    drawn = numbers < counts[:, None]
    points = (begin[:, None] + numbers) * spacing[:, None]
    # The last that adds anything: rounding may put a point on the very end of the sum.
    last = (ends < ends[:, -1:]).sum(dim=1, keepdim=True)
    places = torch.searchsorted(ends, points, right=True).minimum(last)
    if dense:
        return places.masked_fill(~drawn, -1).to(weights.device)
    row, number = drawn.nonzero(as_tuple=True)
    block = places[row, number]
    within = points[row, number] - (ends - sums)[row, block]
    inside = precise(_of_block(weights, row.to(weights.device), block.to(weights.device))).cumsum(dim=1)
    highest = torch.nextafter(inside[:, -1], torch.zeros((), dtype=torch.float64, device=inside.device))
    within = within.clamp(min=0).minimum(highest)
    ids = places.new_full(drawn.shape, -1)
    ids[row, number] = block * BLOCK + (inside <= within[:, None]).sum(dim=1)
    return ids.to(weights.device)


def _of_block(values: Tensor, rows: Tensor, blocks: Tensor) -> Tensor:
    """What P blocks of values (N, V) hold, each of one row, (P, BLOCK); past the end of the vocabulary it is 0."""
    ids = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
    inside = values[rows[:, None], ids.clamp(max=values.shape[1] - 1)]
    return inside if values.shape[1] % BLOCK == 0 else inside.masked_fill_(ids >= values.shape[1], 0)
