"""Numbers in 8 bits: groups of GROUP values side by side, each group with a scale of its own.

A value is its steps times its group's scale, and the scale is the group's largest magnitude / 127: what is kept lies within
half a step of what it was. A scale for each group and not for each row, since a few values of a hidden state are many times
as large as the others; and none for each column, since the first position of many models is as much larger than the rest.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.kinds.columns import list_offsets

GROUP = 64
MAX_STEPS = 127


def group_count(width: int) -> int:
    """How many groups rows of so many values have; the last may be shorter."""
    return -(-width // GROUP)


def in_steps(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of finite numbers, float32 (N, W), as steps, int8 (N, W), and their scales, float32 (N, G)."""
    count, width = values.shape
    size = group_count(width)
    padded = np.zeros((count, size * GROUP), np.float32)
    padded[:, :width] = values
    groups = padded.reshape(count, size, GROUP)
    scales = np.abs(groups).max(axis=2, initial=0) / np.float32(MAX_STEPS)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.rint(groups / scales[:, :, None])
    # A scale that is 0, or so small that it has lost its digits, is that of a group that is as good as 0.
    steps = np.clip(np.nan_to_num(steps, nan=0.0), -MAX_STEPS, MAX_STEPS).astype(np.int8)
    return steps.reshape(count, size * GROUP)[:, :width], scales


def from_steps(steps: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What rows of steps (N, W) and scales (N, G) stand for, float32 (N, W).

    Raises:
        ValueError: there are more scales than groups, or fewer.
    """
    width = steps.shape[1]
    if scales.shape[1] != group_count(width):
        raise ValueError(f"{width:,} values have {scales.shape[1]:,} scales, and not one for each {GROUP}")
    return steps.astype(np.float32) * np.repeat(scales, GROUP, axis=1)[:, :width]


def as_lists(rows: np.ndarray, known: np.ndarray) -> pa.ListArray:
    """Rows (n, W) as lists, in the n places of bool (N,) that are known; null in the others."""
    lengths = np.where(known, rows.shape[1], 0)
    mask = None if known.all() else pa.array(~known)
    return pa.ListArray.from_arrays(list_offsets(lengths), pa.array(np.ascontiguousarray(rows).reshape(-1)), mask=mask)


def rows_of(lists: pa.ChunkedArray) -> np.ndarray:
    """Lists of one length, none of them null, as rows (N, W); W is 0 of no lists. ValueError: they are of several lengths."""
    widths = pc.list_value_length(lists).unique().to_pylist()
    if len(widths) > 1:
        raise ValueError(f"there are rows of {min(widths):,} and of {max(widths):,} values, and all of a dump have one width")
    return pc.list_flatten(lists).to_numpy().reshape(len(lists), widths[0] if widths else 0)
