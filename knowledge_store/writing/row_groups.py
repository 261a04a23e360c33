"""How many sequences go into each row group of a file: readers take a row group into memory whole."""

from __future__ import annotations

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
        tables: the rows of each sequence; not looked at where the kind says what a row takes.
        counts: how many rows each sequence has.
        manifest: of the dump.
    """
    groups: list[int] = []
    size = rows = text = 0
    widths: dict[str, int] = {}
    for place, count in enumerate(counts.tolist()):
        own_widths, own_text = ({}, 0) if kind.row_bytes else _widths(kind, tables[place], manifest)
        wider = {name: max(width, widths.get(name, 0)) for name, width in own_widths.items()}
        total = (rows + count) * _row_bytes(kind, wider, manifest) + text + own_text
        if size and total > ROW_GROUP_BYTES:
            groups.append(size)
            size = rows = text = 0
            wider = own_widths
        size, rows, text, widths = size + 1, rows + count, text + own_text, wider
    return [*groups, size] if size else groups


def _widths(kind: Kind, table: pa.Table, manifest: Manifest) -> tuple[dict[str, int], int]:
    """The longest row of each ragged field of a sequence, and the bytes of its texts."""
    widths, text = {}, 0
    for each in kind.fields(manifest):
        column = table[each.name]
        if each.is_text:
            values = pc.list_flatten(column) if each.is_list else column
            text += pc.sum(pc.binary_length(values)).as_py() or 0
        elif each.shape == "ragged":
            widths[each.name] = pc.max(pc.list_value_length(column)).as_py() or 0
    return widths, text


def _row_bytes(kind: Kind, widths: dict[str, int], manifest: Manifest) -> int:
    if kind.row_bytes:
        return kind.row_bytes(manifest)
    total = 8
    for each in kind.fields(manifest):
        if not each.is_text:
            width = each.shape if isinstance(each.shape, int) else widths.get(each.name, 1)
            total += width * max(each.type.bit_width // 8, 1)
    return total
