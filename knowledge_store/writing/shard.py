"""A shard on its way to its files: a row group at a time, rounded and packed once, and measured as it will be read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import InputError
from knowledge_store.format.layout import SEQUENCES
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import Columns
from knowledge_store.format.sequences import SEQUENCES_COLUMNS, sequences_schema, sequences_statistics, sequences_table
from knowledge_store.kinds import KINDS, Arrays, Kind, joined
from knowledge_store.kinds.columns import check_lists, is_list
from knowledge_store.kinds.field import KEYS
from knowledge_store.kinds.statistics import added, measured, qualified
from knowledge_store.writing.row_groups import group_sizes

ENCODED_ROWS = 2**16


@dataclass(frozen=True)
class Shard:
    """All there is to publish of a shard.

    Attributes:
        number: in the plan.
        first_document, documents: what part of the plan it covers.
        sequences: rows of the `sequences` table, in order.
        knowledge: for each kind, what was taken of each sequence, in order: arrays of one entry a row (see the kind's `pack`).
        skipped: rows of the corpus that were skipped: {"file", "row", "reason"}, and "detail" where there is more to say.
        made_by: versions, device, host, times.
    """

    number: int
    first_document: int
    documents: int
    sequences: list[dict[str, Any]]
    knowledge: dict[str, list[Arrays]]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTable:
    """A table of a shard as it goes into its file.

    Attributes:
        schema: of each row group.
        row_groups: none where there are no rows.
        columns: how they are stored.
    """

    schema: pa.Schema
    row_groups: list[pa.Table]
    columns: Columns


def pack_shard(shard: Shard, manifest: Manifest) -> tuple[dict[str, StoredTable], dict[str, float]]:
    """The tables of a shard as they are stored, and its statistics.

    Raises:
        InputError: the knowledge is not made of finite numbers, or not what its kinds declare.
    """
    sequences = sequences_table(shard.sequences, manifest)
    tables = {
        SEQUENCES: StoredTable(sequences_schema(manifest), [sequences] if len(sequences) else [], SEQUENCES_COLUMNS),
    }
    statistics: dict[str, float] = sequences_statistics(sequences)
    for name in manifest.kinds:
        kind = KINDS[name]
        row_groups, parts = [], []
        try:
            for stored, numbers in _row_groups(kind, shard, manifest):
                row_groups.append(stored)
                parts.append(numbers)
        except InputError as error:
            raise InputError(f"knowledge of kind {name!r} of shard {shard.number} of {manifest.dump!r}: {error}") from None
        tables[name] = StoredTable(kind.stored_schema(manifest), row_groups, kind.columns(manifest))
        statistics |= qualified(kind, added(kind, parts))
    return tables, statistics


def _row_groups(kind: Kind, shard: Shard, manifest: Manifest) -> Iterator[tuple[pa.Table, dict[str, float]]]:
    """The row groups of a kind, and the statistics of each."""
    knowledge = shard.knowledge.get(kind.name, [])
    if len(knowledge) != len(shard.sequences):
        raise InputError(f"it is of {len(knowledge):,} sequences, and there are {len(shard.sequences):,}")
    ids = np.array([row["sequence_id"] for row in shard.sequences], np.int64)
    takes = kind.takes(manifest)
    counts = np.array(
        [_row_count(kind, takes, arrays, row) for arrays, row in zip(knowledge, shard.sequences, strict=True)], np.int64
    )

    def packed(start: int, end: int) -> pa.Table:
        """The rows of some sequences."""
        fillers = kind.arrays(manifest) if kind.codec else {}
        return kind.pack(_keys(kind, ids[start:end], counts[start:end]), joined(knowledge[start:end], fillers), manifest)

    # Where the lists of a row group decide how large it is, they are encoded before, many sequences at once.
    tables = [] if kind.row_bytes else [packed(start, end) for start, end in pairwise(_stretches(counts))]
    encoded = pa.concat_tables(tables) if tables else None
    first_row = np.concatenate([[0], np.cumsum(counts)])
    wholes = _wholes(shard, manifest)
    sizes = group_sizes(kind, tables, np.diff(first_row[wholes]), manifest)
    for start, end in pairwise(wholes[np.cumsum([0, *sizes])].tolist()):
        rows = int(first_row[end] - first_row[start])
        if rows:
            stored = packed(start, end) if encoded is None else encoded.slice(first_row[start], rows).combine_chunks()
            yield stored, _measured(kind, stored, manifest)


def _wholes(shard: Shard, manifest: Manifest) -> np.ndarray:
    """The first sequence of what a row group holds whole, a sequence or a group of them, and the end."""
    if not manifest.has_groups:
        return np.arange(len(shard.sequences) + 1)
    documents = np.array([row["document"] for row in shard.sequences], np.int64)
    return np.append(np.flatnonzero(np.diff(documents, prepend=-1)), len(documents))


def _stretches(counts: np.ndarray) -> list[int]:
    """Where to cut sequences of so many rows, so that not many more than ENCODED_ROWS are encoded at once."""
    part = (np.cumsum(counts) - counts) // ENCODED_ROWS
    return [*np.flatnonzero(np.diff(part, prepend=-1)).tolist(), len(counts)]


def _row_count(kind: Kind, takes: Collection[str], arrays: Arrays, sequence: dict[str, Any]) -> int:
    """How many rows of a kind a sequence has (InputError: its arrays are not those that the kind takes, each of so many)."""
    for name in takes:
        if name not in arrays:
            raise InputError(f"there is no array {name!r}: the extractor leaves it out")
    for name, rows in arrays.items():
        if name not in takes:
            raise InputError(f"no field declares the array {name!r}: declare a field of that name, or leave the array out")
        if not is_list(rows):
            raise InputError(f"of sequence {sequence['sequence_id']} the array {name!r} is one value, {rows!r}: give one a row")
    lengths = {len(rows) for rows in arrays.values()}
    expected = {"position": sequence["length"], "sequence": 1, "item": next(iter(lengths), 0)}[kind.per]
    if lengths != {expected}:
        given = " and ".join(f"{length:,}" for length in sorted(lengths)) or "no"
        raise InputError(f"of sequence {sequence['sequence_id']} it has {given} rows, and {expected:,} belong there")
    return expected


def _keys(kind: Kind, ids: np.ndarray, counts: np.ndarray) -> pa.Table:
    columns = [pa.array(np.repeat(ids, counts))]
    if kind.per != "sequence":
        columns.append(pa.array((np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)))
    return pa.table(columns, schema=pa.schema([field.column for field in KEYS[kind.per]]))


def _measured(kind: Kind, stored: pa.Table, manifest: Manifest) -> dict[str, float]:
    """The statistics of a row group, and that it can be read again (InputError)."""
    numbers: dict[str, float] = {}
    sound = not has_nan(stored)
    if sound:
        try:
            table = kind.unpack(stored, manifest)
            numbers = measured(kind, table, manifest)
        except ValueError:  # what it is made of is infinite
            sound = False
    if not sound or not np.isfinite(list(numbers.values())).all():
        raise InputError("it is NaN or infinite: nothing is written")
    try:
        check_lists(table)
    except ValueError as error:
        raise InputError(f"a row group could not be read again: {error}; give a smaller --max-length") from None
    return numbers


def has_nan(table: pa.Table) -> bool:
    """Whether some number of a table is NaN, which means nothing in any kind of knowledge."""
    columns = [pc.list_flatten(column) if pa.types.is_list(column.type) else column for column in table.columns]
    return any(pc.any(pc.is_nan(column)).as_py() for column in columns if pa.types.is_floating(column.type))
