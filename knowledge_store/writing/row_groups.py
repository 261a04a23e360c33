"""How many sequences go into each row group of a file: readers take a row group into memory whole."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import Kind

ROW_GROUP_BYTES = 2**26  # decoded


def group_sizes(kind: Kind, tables: list[pa.Table], counts: np.ndarray, manifest: Manifest) -> list[int]:
    """How many sequences go into each row group: whole ones, of about ROW_GROUP_BYTES when they are decoded, which pads all
    lists of a row group to the longest.

    Args:
        kind: the kind.
        tables: the rows of all sequences, in any number of parts; not looked at where the kind says what a row takes.
        counts: how many rows each sequence has; of a dump of groups, each group, of which "sequence" is said here.
        manifest: of the dump.
    """
    fixed, ragged = (kind.row_bytes(manifest), {}) if kind.row_bytes else _row_bytes(kind, manifest)
    texts = _of_sequences(np.add, _text_bytes(kind, tables, manifest), counts)
    longest = [_of_sequences(np.maximum, _lengths(tables, name), counts) for name in ragged]
    groups: list[int] = []
    size = rows = text = 0
    widths = [0] * len(ragged)
    for count, sequence_text, *sequence_widths in zip(counts.tolist(), texts, *longest, strict=True):
        wider = list(map(max, widths, sequence_widths))
        row_bytes = fixed + sum(width * value for width, value in zip(wider, ragged.values(), strict=True))
        if size and (rows + count) * row_bytes + text + sequence_text > ROW_GROUP_BYTES:
            groups.append(size)
            size = rows = text = 0
            wider = sequence_widths
        size, rows, text, widths = size + 1, rows + count, text + sequence_text, wider
    return [*groups, size] if size else groups


def _row_bytes(kind: Kind, manifest: Manifest) -> tuple[int, dict[str, int]]:
    """Bytes of a decoded row without its texts and ragged fields, and of one value of each ragged field."""
    fixed, ragged = 8, {}
    for field in kind.fields(manifest):
        if not field.is_text:
            value = max(field.type.bit_width // 8, 1)
            if field.shape == "ragged":
                ragged[field.name] = value
            else:
                fixed += value * (field.shape if isinstance(field.shape, int) else 1)
    return fixed, ragged


def _lengths(tables: list[pa.Table], name: str) -> np.ndarray:
    """How many values each row has of a ragged field, int64 (N,)."""
    return _joined(pc.list_value_length(table[name]).fill_null(0).to_numpy() for table in tables)


def _text_bytes(kind: Kind, tables: list[pa.Table], manifest: Manifest) -> np.ndarray:
    """How many bytes of text each row has, int64 (N,)."""
    total = np.zeros(sum(map(len, tables)), np.int64)
    for field in kind.fields(manifest):
        if field.is_text:
            total += _joined(_text_lengths(table[field.name]) for table in tables)
    return total


def _text_lengths(column: pa.ChunkedArray) -> np.ndarray:
    if not pa.types.is_list(column.type):
        return np.asarray(pc.binary_length(column).fill_null(0).to_numpy(), np.int64)
    ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy(), dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(pc.binary_length(pc.list_flatten(column)).to_numpy(), dtype=np.int64)])
    return np.diff(before[ends], prepend=0)


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _of_sequences(how: np.ufunc, values: np.ndarray, counts: np.ndarray) -> list[int]:
    """The sum or the largest of the values of each sequence's rows; 0 of no rows."""
    totals = np.zeros(len(counts), np.int64)
    filled = counts > 0
    if len(values) and filled.any():
        totals[filled] = how.reduceat(values, (np.cumsum(counts) - counts)[filled])
    return totals.tolist()
