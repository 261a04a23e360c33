"""Sequences put together into one batch, padded on the right. What depends on the position is what its kind says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from knowledge_store.kinds import KINDS, Arrays, item_mask

SEPARATOR = "/"  # behind the number of a teacher after the first, before what it knows


@dataclass(frozen=True)
class Sequence:
    """One sequence of a batch.

    Attributes:
        sequence_id: its id.
        knowledge: of each kind, its arrays.
        place: of its dump among those that are read.
    """

    sequence_id: int
    knowledge: dict[str, Arrays]
    place: int = 0


def collate(
    sequences: list[Sequence | None],
    kinds: Mapping[str, dict[str, Any]],
    template: dict[str, Arrays],
) -> Arrays:
    """One batch of B sequences, padded to the longest.

    Args:
        sequences: None stands for a padding row (sequence_id and dump −1, no position attended).
        kinds: which kinds to put together, and of each the names of its arrays with their padding (see `Kind.arrays`). Arrays
            of a kind per position become (B, T, …), per sequence (B, …), per item (B, I, …) beside the mask KIND_mask, bool
            (B, I). Text becomes lists: of B str per sequence (None in a padding row), of B lists per position or item. Arrays
            of a kind `m/KIND`, which is a further teacher's, become `m/ARRAY`.
        template: any sequence's knowledge: gives names, types and widths when every row is padding (T is 1 then).
    """
    batch: Arrays = {
        "sequence_id": np.array([-1 if sequence is None else sequence.sequence_id for sequence in sequences], np.int64),
        "dump": np.array([-1 if sequence is None else sequence.place for sequence in sequences], np.int64),
    }
    for name, arrays_of in kinds.items():
        teacher, _, kind_name = name.rpartition(SEPARATOR)
        kind, prefix = KINDS[kind_name], teacher + SEPARATOR if teacher else ""
        knowledge = [None if sequence is None else sequence.knowledge[name] for sequence in sequences]
        for key, padding in arrays_of.items():
            rows = [None if arrays is None else arrays[key] for arrays in knowledge]
            batch[prefix + key] = _together(rows, template[name][key], padding, kind.per == "sequence")
        if kind.per == "item":
            batch[prefix + item_mask(kind_name)] = _mask(knowledge, min_width=0)
        elif kind.per == "position" and "attention_mask" not in batch:
            batch["attention_mask"] = _mask(knowledge, min_width=1)
    return batch


def _mask(knowledge: list[Arrays | None], min_width: int) -> np.ndarray:
    """Which rows each sequence has, bool (B, the most of any, and at least `min_width`)."""
    counts = [0 if arrays is None else len(next(iter(arrays.values()))) for arrays in knowledge]
    mask: np.ndarray = np.arange(max([min_width, *counts])) < np.array(counts)[:, None]
    return mask


def _together(rows: list[Any], example: Any, padding: Any, per_sequence: bool) -> Any:
    """The rows of several sequences as one entry a sequence; None, a padding row, becomes `padding`."""
    if not isinstance(example, np.ndarray):
        if per_sequence:
            return [padding if row is None else row[0] for row in rows]
        return [[] if row is None else list(row) for row in rows]
    if per_sequence:
        rows, example = [None if row is None else row[0] for row in rows], example[0]
        shapes = [row.shape for row in rows if row is not None] or [example.shape]
    else:
        shapes = [row.shape for row in rows if row is not None] or [example[:1].shape]
    shape = tuple(map(max, zip(*shapes, strict=True)))
    stacked: np.ndarray = np.empty((len(rows), *shape), dtype=example.dtype)
    for place, row in enumerate(rows):
        if row is None:
            stacked[place] = padding
        elif row.shape == shape:
            stacked[place] = row
        else:
            stacked[place] = padding
            stacked[place][tuple(map(slice, row.shape))] = row
    return stacked
