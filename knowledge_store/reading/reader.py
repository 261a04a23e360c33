"""Random access to the sequences of one dump: which shard, which row group, which rows, and their decoded arrays.

A row group is decoded whole. It is kept in memory while it is among the most recently used, within `MEMORY_BYTES`, and in the
cache on disk (`decoded`), which later epochs and other processes read from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.catalogue.index import Index
from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.layout import SEQUENCES, table_file
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import FileRecord, OpenTable, TableFile, open_table, read_row_group, read_table
from knowledge_store.format.records import json_sha256
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.kinds.kind import check_lists
from knowledge_store.reading.cache import DecodedCache
from knowledge_store.storage import Storage

MEMORY_BYTES = 512 * 2**20
OPEN_FILES = 64  # whose footers are kept in memory
SHARDS = 4096  # whose sequences are kept in mind, 16 bytes each and 4 for each kind


def shard_files(storage: Storage, index: Index, dump: str, table: str, schema: pa.Schema) -> dict[int, TableFile]:
    """The committed files of one table of one dump, by shard."""
    files = index.files.filter((pc.field("dump") == dump) & (pc.field("table") == table))
    rows = zip(*(files[name].to_pylist() for name in ("shard", "bytes", "sha256", "footer_sha256", "rows")), strict=True)
    return {
        shard: TableFile(storage, table_file(dump, table, shard), FileRecord(size, sha256, footer_sha256, count, {}), schema)
        for shard, size, sha256, footer_sha256, count in rows
    }


@dataclass(frozen=True)
class RowGroups:
    """Where the sequences of one shard are in one of its files.

    Attributes:
        rows: first row of each row group, and the end.
        first: first sequence of each row group, and the end.
        group: row group of each sequence.
    """

    rows: np.ndarray
    first: np.ndarray
    group: np.ndarray


class DumpReader:
    """The sequences of one dump by ordinal (0 is the first committed sequence).

    Args:
        storage, index, manifest: of the dump.
        cache_size: most bytes of the cache on disk, 0 for none.
    """

    def __init__(self, storage: Storage, index: Index, manifest: Manifest, cache_size: int):
        self.manifest = manifest
        sequence_files = shard_files(storage, index, manifest.dump, SEQUENCES, sequences_schema(manifest))
        self._files = {
            kind: list(shard_files(storage, index, manifest.dump, kind, KINDS[kind].stored_schema(manifest)).values())
            for kind in manifest.kinds
        }
        self._shards = list(sequence_files)
        self._sequence_files = list(sequence_files.values())
        self._first_ordinal = list(accumulate((file.record.rows for file in self._sequence_files), initial=0))
        self._decoded: OrderedDict[tuple[str, int, int], Arrays] = OrderedDict()
        self._decoded_bytes = 0
        self._cache = DecodedCache(manifest, cache_size)
        # Per instance, so that closing a store lets go of its files.
        self._shard = lru_cache(SHARDS)(self._read_shard)
        self._row_groups = lru_cache(SHARDS)(self._read_row_groups)
        self._open = lru_cache(OPEN_FILES)(self._open_table)

    def __len__(self) -> int:
        return self._first_ordinal[-1]

    @cached_property
    def snapshot(self) -> int:
        """A number that stands for the sequences of this dump, in their order: 48 bits of a hash of what it was made from, its
        shards, and how many sequences each has."""
        shards = [[shard, file.record.rows] for shard, file in zip(self._shards, self._sequence_files, strict=True)]
        return int(json_sha256([self.manifest.identity_sha256, shards])[:12], 16)

    def _read_shard(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequence ids, and the first row of each sequence (one more entry than sequences), of the shard at `place`."""
        file = self._sequence_files[place]
        table = read_table(file, ["sequence_id", "length"])
        if not len(table):
            return np.empty(0, np.int64), np.zeros(1, np.int64)
        if any(column.null_count for column in table.columns) or pc.min(table["length"]).as_py() < 1:
            raise DamageError(f"{file.path} is damaged: a sequence has no id or no length")
        return table["sequence_id"].to_numpy(), np.cumsum(np.concatenate([[0], table["length"].to_numpy()]))

    def _open_table(self, kind: str, place: int) -> OpenTable:
        return open_table(self._files[kind][place])

    def _first_rows(self, kind: str, place: int) -> np.ndarray:
        """First row of each sequence in the table of a kind, and the end."""
        _, first_row = self._shard(place)
        return first_row if KINDS[kind].per == "position" else np.arange(len(first_row))

    def _read_row_groups(self, kind: str, place: int) -> RowGroups:
        metadata = self._open(kind, place).metadata
        rows = np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))])
        first_row = self._first_rows(kind, place)
        if first_row[-1] != rows[-1] or not np.isin(rows, first_row).all():
            raise DamageError(f"{self._files[kind][place].path} is damaged: its row groups do not hold its shard's sequences")
        group = np.searchsorted(rows, first_row[:-1], side="right") - 1
        return RowGroups(rows, np.searchsorted(first_row, rows), group.astype(np.int32))

    def _decode(self, kind: str, place: int, group: int) -> Arrays:
        """A row group's arrays, kept in memory and on disk."""
        table = read_row_group(self._open(kind, place), group)
        try:
            unpacked = KINDS[kind].unpack(table, self.manifest)
            check_lists(unpacked)
            arrays = KINDS[kind].decode(unpacked)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError, pa.ArrowException) as error:
            raise DamageError(f"{self._files[kind][place].path} is damaged: {error}") from None
        groups = self._row_groups(kind, place)
        starts = self._first_rows(kind, place)[groups.first[group] : groups.first[group + 1] + 1] - groups.rows[group]
        self._cache.add(self._files[kind][place].record.sha256, group, starts, arrays)
        self._decoded[kind, place, group] = arrays
        self._decoded_bytes += sum(array.nbytes for array in arrays.values())
        while self._decoded_bytes > MEMORY_BYTES and len(self._decoded) > 1:
            _, oldest = self._decoded.popitem(last=False)
            self._decoded_bytes -= sum(array.nbytes for array in oldest.values())
        return arrays

    def _knowledge(self, kind: str, place: int, within: int) -> Arrays:
        """The arrays of one kind of one sequence of a shard."""
        groups = self._row_groups(kind, place)
        group = int(groups.group[within])
        key = (kind, place, group)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            arrays = self._decoded[key]
        else:
            cached = self._cache.read(self._files[kind][place].record.sha256, group, within - int(groups.first[group]))
            if cached is not None:
                return cached
            arrays = self._decode(kind, place, group)
        start, end = self._first_rows(kind, place)[within : within + 2] - groups.rows[group]
        return {name: array[start:end].copy() for name, array in arrays.items()}

    def kept(self, ordinal: int, kind: str) -> tuple[pa.Table, int]:
        """A sequence's rows of a kind per position as they were kept (rounded, not normalised), and its `token_hash`.

        Raises:
            InputError: there is no such sequence.
            DamageError: what was read is not what was published.
        """
        place, within = self._place(ordinal)
        group = int(self._row_groups(kind, place).group[within])
        path = self._files[kind][place].path
        stored = read_row_group(self._open(kind, place), group)
        start, end = self._first_rows(kind, place)[within : within + 2] - self._row_groups(kind, place).rows[group]
        try:
            rows = KINDS[kind].unpack(stored.slice(start, end - start), self.manifest)
            check_lists(rows)
        except ValueError as error:
            raise DamageError(f"{path} is damaged: {error}") from None
        hashes = read_table(self._sequence_files[place], ["token_hash"])
        return rows, hashes["token_hash"][within].as_py()

    def _place(self, ordinal: int) -> tuple[int, int]:
        """The shard that a sequence is in, and its number there (InputError: there is none)."""
        if not 0 <= ordinal < len(self):
            raise InputError(f"dump {self.manifest.dump!r} has no sequence {ordinal}: it has {len(self)}, counted from 0")
        place = bisect_right(self._first_ordinal, ordinal) - 1
        return place, ordinal - self._first_ordinal[place]

    def sequence(self, ordinal: int, kinds: tuple[str, ...]) -> tuple[int, dict[str, Arrays]]:
        """One sequence: its id, and for each kind its decoded arrays (all its rows), which belong to the caller.

        Raises:
            InputError: there is no such sequence.
            DamageError: what was read is not what was published.
        """
        place, within = self._place(ordinal)
        ids, _ = self._shard(place)
        return int(ids[within]), {kind: self._knowledge(kind, place, within) for kind in kinds}


def collate(
    sequences: list[tuple[int, dict[str, Arrays]] | None], kinds: tuple[str, ...], template: dict[str, Arrays]
) -> Arrays:
    """One batch of sequences, padded on the right to the longest.

    Args:
        sequences: from `DumpReader.sequence`; None stands for a padding row (sequence_id −1, no position attended).
        kinds: which kinds to put together; arrays of a kind per position become (B, T, …), others (B, …).
        template: any sequence's knowledge: gives names, types and widths when every row is padding (T is 1 then).
    """
    batch: Arrays = {"sequence_id": np.array([-1 if each is None else each[0] for each in sequences], np.int64)}
    for kind in kinds:
        per_position = KINDS[kind].per == "position"
        for name, example in template[kind].items():
            arrays = [None if each is None else each[1][kind][name] for each in sequences]
            batch[name] = _stack(arrays, example, KINDS[kind].padding.get(name, 0), per_position)
            if per_position and "attention_mask" not in batch:
                lengths = np.array([0 if array is None else len(array) for array in arrays])
                batch["attention_mask"] = np.arange(batch[name].shape[1]) < lengths[:, None]
    return batch


def _stack(arrays: list[np.ndarray | None], example: np.ndarray, padding: object, per_position: bool) -> np.ndarray:
    """Arrays of (rows, …) as one of (B, longest, …), or of (1, …) as one of (B, …); None becomes `padding`."""
    shapes = [array.shape for array in arrays if array is not None] or [example[:1].shape]
    shape = tuple(map(max, zip(*shapes, strict=True)))
    stacked: np.ndarray = np.empty((len(arrays), *(shape if per_position else shape[1:])), dtype=example.dtype)
    for row, array in enumerate(arrays):
        if array is None:
            stacked[row] = padding
        elif not per_position:
            stacked[row] = array[0]
        elif array.shape == shape:
            stacked[row] = array
        else:
            stacked[row] = padding
            stacked[row][tuple(map(slice, array.shape))] = array
    return stacked
