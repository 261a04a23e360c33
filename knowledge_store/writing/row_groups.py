"""How many sequences go into each row group of a file: readers take a row group into memory whole."""

from __future__ import annotations

import numpy as np

from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import Arrays, Kind

ROW_GROUP_BYTES = 2**26  # decoded


def group_sizes(kind: Kind, knowledge: list[Arrays], counts: np.ndarray, manifest: Manifest) -> list[int]:
    """How many sequences go into each row group: whole ones, of about ROW_GROUP_BYTES when they are decoded, which pads all
    lists of a row group to the longest."""
    groups: list[int] = []
    size = rows = text = 0
    widths: dict[str, int] = {}
    for arrays, count in zip(knowledge, counts.tolist(), strict=True):
        own_widths, own_text = _widths(kind, arrays, manifest)
        wider = {name: max(width, widths.get(name, 0)) for name, width in own_widths.items()}
        total = (rows + count) * _row_bytes(kind, wider, manifest) + text + own_text
        if size and total > ROW_GROUP_BYTES:
            groups.append(size)
            size = rows = text = 0
            wider = own_widths
        size, rows, text, widths = size + 1, rows + count, text + own_text, wider
    return [*groups, size] if size else groups


def _widths(kind: Kind, arrays: Arrays, manifest: Manifest) -> tuple[dict[str, int], int]:
    """The longest row of each ragged field of a sequence, and the characters of its texts."""
    if kind.row_bytes:
        return {}, 0
    widths, text = {}, 0
    for each in kind.fields(manifest):
        rows = arrays.get(each.name, ())
        if each.is_text:
            text += sum(len(row) if isinstance(row, str | bytes) else sum(map(len, row)) for row in rows if row is not None)
        elif each.shape == "ragged":
            widths[each.name] = max((len(row) for row in rows if row is not None), default=0)
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
