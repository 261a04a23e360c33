"""Random access to the sequences of one dump: which shard, which row group, which rows, and their decoded arrays.

A row group is decoded whole. It is kept in memory while it is among the most recently used, within a size or as many as `keep`
asks for, and in the cache on disk (`cache`), which later epochs and other processes read from.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.integrity import TableFile
from knowledge_store.format.layout import SEQUENCES
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import OpenTable, open_table, read_row_group, read_table
from knowledge_store.format.records import json_sha256
from knowledge_store.format.sequences import SCORE, WINDOW_BITS, sequences_schema
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.kinds.columns import check_lists, row_counts
from knowledge_store.reading.ahead import BATCHES, GROUPS, Key, ReadAhead
from knowledge_store.reading.cache import DecodedCache
from knowledge_store.reading.packed import Packed

MEMORY_BYTES = 512 * 2**20
FOOTERS = 8  # that are read at once
OPEN_FILES = 512  # whose footers are kept in memory
SHARDS = 4096  # whose sequences are kept in mind, 16 bytes each and 4 for each kind


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
        dumps: of the store.
        name: of the dump.
        cache_size: most bytes of the cache on disk, 0 for none.
        memory: bytes of decoded row groups that are kept, but for one, or as many as `keep` asks for.

    Attributes:
        ahead: how many batches after the one that is read `sequences` is to be told of.
    """

    ahead: int

    def __init__(self, dumps: Dumps, name: str, cache_size: int, memory: int = MEMORY_BYTES):
        self.manifest = manifest = dumps.manifests[name]
        sequence_files = dumps.files(manifest, SEQUENCES, sequences_schema(manifest))
        self._files = {
            kind: list(dumps.files(manifest, kind, KINDS[kind].stored_schema(manifest)).values()) for kind in manifest.kinds
        }
        self._shards = list(sequence_files)
        self._sequence_files = list(sequence_files.values())
        self._first_ordinal = list(accumulate((file.record.rows for file in self._sequence_files), initial=0))
        self._decoded: OrderedDict[tuple[str, int, int], Arrays] = OrderedDict()
        self._decoded_bytes = 0
        self._memory = memory
        self._least_groups = 1
        self._cache = DecodedCache(manifest, cache_size)
        # Per instance, so that closing a store lets go of its files.
        self._shard = lru_cache(SHARDS)(self._read_shard)
        self._row_groups = lru_cache(SHARDS)(self._read_row_groups)
        self._first_rows = lru_cache(SHARDS)(self._read_first_rows)
        self._open = lru_cache(OPEN_FILES)(self._open_table)
        far = dumps.storage.at_once > 1
        self._concurrently = dumps.storage.at_once if far else FOOTERS
        self._ahead = ReadAhead(self._find_sequences, self._read_stored) if far else None
        self.ahead = BATCHES if far else 0
        # Of batches that come, by their kinds and ordinals: what is to be read for them.
        self._looked: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Key]] = {}

    def __len__(self) -> int:
        return self._first_ordinal[-1]

    def keep(self, groups: int) -> None:
        """Keep at least so many row groups in memory, whatever they take."""
        self._least_groups = max(self._least_groups, groups)

    @cached_property
    def row_groups(self) -> np.ndarray:
        """First ordinal of each row group, of the first kind per position or else the first kind, and the end, int64."""
        kinds = list(self.manifest.kinds)
        kind = next((kind for kind in kinds if KINDS[kind].per == "position"), kinds[0])
        with ThreadPoolExecutor(self._concurrently) as pool:
            firsts = list(pool.map(lambda place: self._row_groups(kind, place).first, range(len(self._shards))))
        starts = [first[:-1] + start for first, start in zip(firsts, self._first_ordinal, strict=False)]
        return np.concatenate([*starts, [len(self)]]).astype(np.int64)

    @cached_property
    def scored_documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a dump of groups: the document of each sequence, int64 (N,), and its score, float64 (N,), NaN for none."""

        def read(file: TableFile) -> tuple[np.ndarray, np.ndarray]:
            table = read_table(file, ["sequence_id", SCORE])
            scores = table[SCORE].to_numpy()
            return table["sequence_id"].to_numpy() >> WINDOW_BITS, scores.astype(np.float64)

        with ThreadPoolExecutor(self._concurrently) as pool:
            parts = list(pool.map(read, self._sequence_files))
        documents, scores = zip(*parts, strict=True)
        return np.concatenate(documents), np.concatenate(scores)

    @property
    def shards(self) -> list[int]:
        """The numbers of the committed shards, ascending."""
        return self._shards

    def identities(self, shard: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The ordinal of a shard's first sequence, and the ids (int64) and token hashes (uint64) of its sequences: none, of a
        shard that is not committed."""
        place = bisect_left(self._shards, shard)
        if self._shards[place : place + 1] != [shard]:
            return 0, np.empty(0, np.int64), np.empty(0, np.uint64)
        table = read_table(self._sequence_files[place], ["sequence_id", "token_hash"])
        return self._first_ordinal[place], table["sequence_id"].to_numpy(), table["token_hash"].to_numpy()

    @property
    def manifests(self) -> list[Manifest]:
        """Of the dump, alone."""
        return [self.manifest]

    @property
    def snapshots(self) -> dict[str, int]:
        """`snapshot` by the dump's name."""
        return {self.manifest.dump: self.snapshot}

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

    def _read_first_rows(self, kind: str, place: int) -> np.ndarray:
        """First row of each sequence in the table of a kind, and the end."""
        ids, first_row = self._shard(place)
        if KINDS[kind].per == "position":
            return first_row
        if KINDS[kind].per == "sequence":
            return np.arange(len(first_row))
        rows = read_table(self._files[kind][place], ["sequence_id"])["sequence_id"].to_numpy()
        return np.cumsum([0, *row_counts(rows, ids)])

    def _read_row_groups(self, kind: str, place: int) -> RowGroups:
        metadata = self._open(kind, place).metadata
        rows = np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))])
        first_row = self._first_rows(kind, place)
        if first_row[-1] != rows[-1] or not np.isin(rows, first_row).all():
            raise DamageError(f"{self._files[kind][place].path} is damaged: its row groups do not hold its shard's sequences")
        # A sequence without items is in the group of those after it, the last ones in that of those before them.
        first, group = np.searchsorted(first_row, rows), np.searchsorted(rows, first_row[:-1], side="right") - 1
        if len(rows) == 1:  # no items at all
            return RowGroups(rows, np.array([0, len(group)]), np.zeros(len(group), np.int32))
        first[-1] = len(group)
        return RowGroups(rows, first, np.minimum(group, len(rows) - 2).astype(np.int32))

    def _stored(self, kind: str, place: int, group: int) -> pa.Table:
        """A row group as it is stored; of a file that has none, no rows."""
        coming = None if self._ahead is None else self._ahead.take((kind, place, group))
        return self._read_stored((kind, place, group)) if coming is None else coming

    def _read_stored(self, key: Key) -> pa.Table:
        """The same, read now, by whatever thread."""
        kind, place, group = key
        table = self._open(kind, place)
        return read_row_group(table.again(), group) if table.num_row_groups else table.file.schema.empty_table()

    def _find_sequences(self, place: int) -> None:
        """Read where the sequences of a shard are in its files."""
        for kind in self.manifest.kinds:
            self._row_groups(kind, place)

    def _look_ahead(self, ahead: ReadAhead, kinds: tuple[str, ...], batches: Sequence[Sequence[int]]) -> None:
        """Have the row groups on the way that some batches need, the first of which is waited for."""
        window = [(kinds, tuple(ordinals)) for ordinals in batches]
        self._looked = {batch: self._looked[batch] for batch in window if batch in self._looked}
        new = [batch for batch in window if batch not in self._looked]
        for place in {self._place(ordinal)[0] for _, ordinals in new for ordinal in ordinals}:
            ahead.found(place)
        wanted: dict[Key, None] = {}
        for batch in window:
            if batch not in self._looked and (missing := self._missing(ahead, *batch, wait=batch == window[0])) is not None:
                self._looked[batch] = missing
            wanted |= {key: None for key in self._looked.get(batch, ()) if key not in self._decoded and not self._holds(key)}
            if len(wanted) >= GROUPS:
                break
        ahead.begin(list(wanted)[:GROUPS])

    def _missing(self, ahead: ReadAhead, kinds: tuple[str, ...], ordinals: tuple[int, ...], wait: bool) -> list[Key] | None:
        """The row groups of a batch that the cache on disk does not hold; None while it is not known which they are."""
        places = list(map(self._place, ordinals))
        if not all(ahead.found(place, wait=wait) for place in dict.fromkeys(place for place, _ in places)):
            return None
        groups = ((kind, place, int(self._row_groups(kind, place).group[within])) for place, within in places for kind in kinds)
        return [key for key in dict.fromkeys(groups) if not self._holds(key)]

    def _holds(self, key: Key) -> bool:
        """Whether the cache on disk seems to hold a row group."""
        kind, place, group = key
        return self._cache.holds(self._files[kind][place].record.sha256, group)

    def _decode(self, kind: str, place: int, group: int) -> Arrays:
        """A row group's arrays, kept in memory and on disk."""
        described, groups = KINDS[kind], self._row_groups(kind, place)
        table = self._stored(kind, place, group)
        try:
            unpacked = described.unpack(table, self.manifest)
            check_lists(unpacked)
            arrays = described.decode(unpacked, self.manifest)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError, pa.ArrowException) as error:
            raise DamageError(f"{self._files[kind][place].path} is damaged: {error}") from None
        if len(table) and not described.has_text(self.manifest):
            starts = self._first_rows(kind, place)[groups.first[group] : groups.first[group + 1] + 1] - groups.rows[group]
            self._cache.add(self._files[kind][place].record.sha256, group, starts, arrays)
        self._decoded[kind, place, group] = arrays
        self._decoded_bytes += _size(arrays)
        while self._decoded_bytes > self._memory and len(self._decoded) > self._least_groups:
            _, oldest = self._decoded.popitem(last=False)
            self._decoded_bytes -= _size(oldest)
        return arrays

    def _cached(self, kind: str, place: int, within: int) -> Packed | None:
        """The same of the cache on disk, or None."""
        groups = self._row_groups(kind, place)
        group = int(groups.group[within])
        return self._cache.read(self._files[kind][place].record.sha256, group, within - int(groups.first[group]))

    def _knowledge(self, kind: str, place: int, within: int) -> Arrays:
        """The arrays of one kind of one sequence of a shard, which may be parts of a row group's."""
        groups = self._row_groups(kind, place)
        group = int(groups.group[within])
        key = (kind, place, group)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            arrays = self._decoded[key]
        else:
            cached = self._cached(kind, place, within)
            if cached is not None:
                return cached.arrays()
            arrays = self._decode(kind, place, group)
        start, end = self._first_rows(kind, place)[within : within + 2] - groups.rows[group]
        return {name: array[start:end] for name, array in arrays.items()}

    def stored(self, ordinal: int, kind: str) -> tuple[pa.Table, int]:
        """A sequence's rows of a kind as they were kept (positions: rounded, not normalised), and its `token_hash`.

        Raises:
            InputError: there is no such sequence.
            DamageError: what was read is not what was published.
        """
        place, within = self._place(ordinal)
        groups = self._row_groups(kind, place)
        group = int(groups.group[within])
        path = self._files[kind][place].path
        stored = self._stored(kind, place, group)
        start, end = self._first_rows(kind, place)[within : within + 2] - groups.rows[group]
        try:
            rows = KINDS[kind].unpack(stored.slice(start, end - start), self.manifest)
            check_lists(rows)
        except ValueError as error:
            raise DamageError(f"{path} is damaged: {error}") from None
        hashes = read_table(self._sequence_files[place], ["token_hash"])
        return rows, hashes["token_hash"][within].as_py()

    def lengths(self, ordinals: np.ndarray) -> np.ndarray:
        """How many tokens some sequences have (ordinals of this dump and result int64)."""
        places = np.searchsorted(self._first_ordinal, ordinals, side="right") - 1
        result = np.empty(len(ordinals), np.int64)
        for place in np.unique(places).tolist():
            where = np.flatnonzero(places == place)
            _, first_row = self._shard(place)
            within = ordinals[where] - self._first_ordinal[place]
            result[where] = first_row[within + 1] - first_row[within]
        return result

    def _place(self, ordinal: int) -> tuple[int, int]:
        """The shard that a sequence is in, and its number there (InputError: there is no such sequence)."""
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
        [(sequence_id, knowledge)] = self._sequences([ordinal], kinds)
        return sequence_id, {kind: {name: array.copy() for name, array in arrays.items()} for kind, arrays in knowledge.items()}

    def _sequences(self, ordinals: Sequence[int], kinds: tuple[str, ...]) -> list[tuple[int, dict[str, Arrays]]]:
        found = []
        for place, within in map(self._place, ordinals):
            ids, _ = self._shard(place)
            found.append((int(ids[within]), {kind: self._knowledge(kind, place, within) for kind in kinds}))
        return found

    def sequences(
        self, ordinals: Sequence[int], kinds: tuple[str, ...], upcoming: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, dict[str, Arrays]]]:
        """The sequences of a batch, each as of `sequence`, but their arrays are not to be changed: they may be parts of what is
        kept in memory. `upcoming` are those of the batches that are likely to be asked for next, `ahead` at most."""
        if self._ahead is not None:
            self._look_ahead(self._ahead, kinds, [ordinals, *upcoming])
        return self._sequences(ordinals, kinds)

    def packed(self, ordinal: int, kinds: tuple[str, ...]) -> tuple[int, dict[str, Packed | Arrays]]:
        """As `sequence`, but what the cache on disk has stays packed."""
        place, within = self._place(ordinal)
        ids, _ = self._shard(place)
        known = {kind: self._cached(kind, place, within) or self._knowledge(kind, place, within) for kind in kinds}
        return int(ids[within]), known


def _size(arrays: Arrays) -> int:
    """About how many bytes decoded rows take in memory."""
    return sum(array.nbytes if isinstance(array, np.ndarray) else len(str(array)) for array in arrays.values())
