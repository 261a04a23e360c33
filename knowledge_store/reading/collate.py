"""Sequences put together into one batch, padded on the right. What depends on the position is what its kind says."""

from __future__ import annotations

from typing import Any

import numpy as np

from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Arrays, item_mask


def collate(
    sequences: list[tuple[int, dict[str, Arrays]] | None],
    kinds: tuple[str, ...],
    template: dict[str, Arrays],
    manifest: Manifest,
) -> Arrays:
    """One batch of B sequences, padded to the longest.

    Args:
        sequences: from `DumpReader.sequence`; None stands for a padding row (sequence_id −1, no position attended).
        kinds: which kinds to put together. Arrays of a kind per position become (B, T, …), per sequence (B, …), per item
            (B, I, …) beside the mask KIND_mask, bool (B, I). Text becomes lists: of B str per sequence (None in a padding row),
            of B lists per position or item.
        template: any sequence's knowledge: gives names, types and widths when every row is padding (T is 1 then).
        manifest: of the dump.
    """
    batch: Arrays = {"sequence_id": np.array([-1 if each is None else each[0] for each in sequences], np.int64)}
    for name in kinds:
        kind = KINDS[name]
        knowledge = [None if each is None else each[1][name] for each in sequences]
        for key, padding in kind.arrays(manifest).items():
            rows = [None if arrays is None else arrays[key] for arrays in knowledge]
            batch[key] = _together(rows, template[name][key], padding, kind.per == "sequence")
        counts = np.array([0 if arrays is None else _row_count(arrays) for arrays in knowledge])
        if kind.per == "item":
            batch[item_mask(name)] = np.arange(counts.max(initial=0)) < counts[:, None]
        elif kind.per == "position" and "attention_mask" not in batch:
            longest = counts.max(initial=0) or 1
            batch["attention_mask"] = np.arange(longest) < counts[:, None]
    return batch


def _row_count(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _together(rows: list[Any], example: Any, padding: Any, per_sequence: bool) -> Any:
    """The rows of several sequences as one entry a sequence; None, a padding row, becomes `padding`."""
    if not isinstance(example, np.ndarray):
        if per_sequence:
            return [padding if each is None else each[0] for each in rows]
        return [[] if each is None else list(each) for each in rows]
    if per_sequence:
        rows, example = [None if each is None else each[0] for each in rows], example[0]
        shapes = [each.shape for each in rows if each is not None] or [example.shape]
    else:
        shapes = [each.shape for each in rows if each is not None] or [example[:1].shape]
    shape = tuple(map(max, zip(*shapes, strict=True)))
    stacked: np.ndarray = np.empty((len(rows), *shape), dtype=example.dtype)
    for place, each in enumerate(rows):
        if each is None:
            stacked[place] = padding
        elif each.shape == shape:
            stacked[place] = each
        else:
            stacked[place] = padding
            stacked[place][tuple(map(slice, each.shape))] = each
    return stacked
