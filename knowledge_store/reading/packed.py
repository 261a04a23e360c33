"""Decoded arrays in few bytes, without what pads them: as the decoded cache keeps sequences, and as they are sent.

Integers take as few bytes as they need, and rows that are padded to the widest, as draws are, stand without the padding. A
record has one sequence: the values of its arrays one array after the other, then, of each array whose rows are stored without
padding, how many values each row has. What stands where says the layout, which sequences of one row group share.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from knowledge_store.kinds import Arrays
from knowledge_store.kinds.columns import list_mask

PLAIN = "biuf"  # kinds of number types: what is written is what is read


@dataclass(frozen=True)
class ListLayout:
    """An array (N, K) whose rows are stored without the fillers at their ends, side by side.

    Attributes:
        dtype: of the array.
        width: K.
        filler: what stands behind a row's values.
        counts: dtype of how many values each row has.
        value_bytes: stored bytes of a value.
    """

    dtype: np.dtype
    width: int
    filler: Any
    counts: np.dtype
    value_bytes: int

    def padded(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The rows of a sequence."""
        rows: np.ndarray = np.full((len(counts), self.width), self.filler, self.dtype)
        rows[np.arange(self.width, dtype=counts.dtype) < counts[:, None]] = values
        return rows


@dataclass(frozen=True)
class Layout:
    """What stands where in a record.

    Attributes:
        fields: of each array: name, dtype, dtype as stored, shape of a stored entry (a row, or a value of a list), its bytes.
        lists: those of the arrays that are stored as lists; how many values their rows have stands behind all arrays.
        row_bytes: what a row takes beside the values of lists.
    """

    fields: list[tuple[str, np.dtype, np.dtype, tuple[int, ...], int]]
    lists: dict[str, ListLayout]
    row_bytes: int

    def to_record(self) -> dict[str, Any]:
        """The layout as plain JSON values; fillers are those of the kinds of a dump, and left out."""
        fields = [[name, dtype.str, stored.str, list(shape)] for name, dtype, stored, shape, _ in self.fields]
        return {"fields": fields, "lists": [[name, lists.width, lists.counts.str] for name, lists in self.lists.items()]}

    @cached_property
    def text(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_record(), separators=(",", ":"))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], fillers: Mapping[str, Any]) -> Layout:
        """The layout of plain JSON values.

        Args:
            record: from `to_record`.
            fillers: what pads the rows of arrays, by name.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        fields = []
        for name, dtype, stored, shape in record["fields"]:
            kept, declared = np.dtype(stored), np.dtype(dtype)
            if kept.kind not in PLAIN or declared.kind not in PLAIN or any(size < 0 for size in shape):
                raise ValueError(f"{name} is stored as {kept} {shape}")
            fields.append((name, declared, kept, tuple(shape), kept.itemsize * int(np.prod(shape, dtype=np.int64))))
        types = {name: (dtype, stored) for name, dtype, stored, _, _ in fields}
        lists = {}
        for name, width, counts in record["lists"]:
            dtype, stored = types[name]
            lists[name] = ListLayout(dtype, width, fillers[name], np.dtype(counts), stored.itemsize)
        row_bytes = sum(size for name, *_, size in fields if name not in lists)
        return cls(fields, lists, row_bytes + sum(of_array.counts.itemsize for of_array in lists.values()))

    def arrays(self, record: bytearray | memoryview, rows: int) -> Arrays:
        """The arrays of a record. Those that are stored as they are become views of it.

        Raises:
            ValueError, TypeError: the record is not as long as that.
        """
        counts, entries, at = {}, {}, len(record)
        for name, lists in reversed(self.lists.items()):
            at -= rows * lists.counts.itemsize
            counts[name] = np.ndarray(rows, lists.counts, record, at)
            entries[name] = int(counts[name].sum())
        arrays, at = {}, 0
        for name, dtype, stored, shape, entry_bytes in self.fields:
            count = entries.get(name, rows)
            values: np.ndarray = np.ndarray((count, *shape), stored, record, at)
            arrays[name] = values if dtype == stored else values.astype(dtype)
            at += count * entry_bytes
        for name, lists in self.lists.items():
            arrays[name] = lists.padded(arrays[name], counts[name])
        return arrays


@dataclass(frozen=True)
class Packed:
    """One sequence in few bytes.

    Attributes:
        layout: of the record.
        rows: how many rows each of its arrays has.
        record: its bytes.
        checksum: the CRC-32 that the record had when it was made.
    """

    layout: Layout
    rows: int
    record: bytearray
    checksum: int

    @property
    def sound(self) -> bool:
        """Whether the record is the one that was made."""
        return zlib.crc32(self.record) == self.checksum

    def arrays(self) -> Arrays:
        """Its arrays, which may be changed (raises as `Layout.arrays`)."""
        return self.layout.arrays(self.record, self.rows)


class PackedRows:
    """Arrays of the rows of one or several sequences, made ready to be cut into records.

    Args:
        arrays: of plain number types.
        fillers: what pads the rows of arrays, by name.

    Attributes:
        layout: of the records.
    """

    def __init__(self, arrays: Arrays, fillers: Mapping[str, Any]):
        narrow: Arrays = {}
        self._counts: dict[str, np.ndarray] = {}
        for key, rows in arrays.items():
            lists = _as_lists(rows, fillers[key]) if key in fillers else None
            if lists is None:
                narrow[key] = _narrow(rows)
            else:
                narrow[key], self._counts[key] = lists
        # Wide elements first: every array is aligned then.
        order = sorted(narrow, key=lambda key: -narrow[key].itemsize)
        self._values = {key: narrow[key] for key in order}
        fields = [[key, arrays[key].dtype.str, narrow[key].dtype.str, narrow[key].shape[1:]] for key in order]
        lists_of = [[key, arrays[key].shape[1], counts.dtype.str] for key, counts in self._counts.items()]
        self.layout = Layout.from_record({"fields": fields, "lists": lists_of}, fillers)

    def first_values(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        """Of each array that is stored as lists, first value of each sequence, and the end; by the sequences' first rows."""
        return {key: np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[starts] for key, counts in self._counts.items()}

    def records(self, starts: np.ndarray) -> list[bytes]:
        """The records of sequences, by their first rows and the end."""
        firsts = self.first_values(starts)
        parts = [(values, firsts.get(key, starts)) for key, values in self._values.items()]
        parts += [(counts, starts) for counts in self._counts.values()]
        return [
            b"".join(values[begins[item] : begins[item + 1]].tobytes() for values, begins in parts)
            for item in range(len(starts) - 1)
        ]


def pack(arrays: Arrays, fillers: Mapping[str, Any]) -> Packed:
    """One sequence in few bytes; its arrays, of plain number types, have one entry a row."""
    rows = len(next(iter(arrays.values())))
    packed = PackedRows(arrays, fillers)
    [record] = packed.records(np.array([0, rows]))
    return Packed(packed.layout, rows, bytearray(record), zlib.crc32(record))


def _narrow(array: np.ndarray) -> np.ndarray:
    """Integers in the fewest bytes that hold them; anything else as it is."""
    if array.dtype.kind not in "iu" or not array.size:
        return array
    lowest, highest = int(array.min()), int(array.max())
    return array.astype(np.min_scalar_type(highest if lowest >= 0 else min(lowest, -highest - 1)))


def _as_lists(rows: np.ndarray, filler: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows (N, K) without the fillers at their ends: values side by side, and how many each row has; None: it saves nothing."""
    if rows.ndim != 2 or not rows.size:
        return None
    bits = np.dtype(f"u{rows.itemsize}")  # −0 is not 0
    other = rows.view(bits) != np.full(1, filler, rows.dtype).view(bits)
    if other[:, -1].all():
        return None
    width = rows.shape[1]
    counts = np.where(other.any(axis=1), width - other[:, ::-1].argmax(axis=1), 0).astype(np.min_scalar_type(width))
    values = _narrow(rows[list_mask(counts, width)])
    return (values, counts) if values.nbytes + counts.nbytes < _narrow(rows).nbytes else None
