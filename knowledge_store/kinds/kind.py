"""What a kind of knowledge has to say about itself, and the defaults that most kinds need no more than."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest

Arrays = dict[str, np.ndarray]

MAX_PADDED = 2**27  # values of a padded row group, 1 GiB


def list_offsets(lengths: np.ndarray) -> pa.Array:
    """Where each list of an Arrow list array begins and ends, from the lists' lengths.

    Raises:
        InputError: more values than one array can hold.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(ends) and ends[-1] >= 2**31:
        raise InputError("a row group would hold 2^31 values or more: keep fewer candidates, or give a smaller maximum length")
    return pa.array(np.concatenate([[0], ends]).astype(np.int32))


def encode_columns(keys: pa.Table, arrays: Arrays, schema: pa.Schema) -> pa.Table:
    """Arrow table of `keys` and of arrays with one entry, a number or a vector, per row."""
    columns = []
    for column in schema:
        if column.name in keys.column_names:
            columns.append(keys[column.name].cast(column.type))
            continue
        array = arrays[column.name]
        if array.ndim == 1:
            columns.append(pa.array(array, column.type))
        else:
            offsets = list_offsets(np.full(len(array), array.shape[1]))
            values = pa.array(array.reshape(-1), column.type.value_type)
            columns.append(pa.ListArray.from_arrays(offsets, values).cast(column.type))
    return pa.table(columns, schema=schema)


def decode_columns(table: pa.Table) -> Arrays:
    """The reverse of `encode_columns`: numpy arrays with one entry per row, keys left out."""
    arrays = {}
    for name in table.column_names:
        if name in ("sequence_id", "position"):
            continue
        column = table[name]
        if pa.types.is_list(column.type):
            values = pc.list_flatten(column).to_numpy()
            arrays[name] = values.reshape(len(column), len(values) // max(len(column), 1))
        else:
            arrays[name] = column.to_numpy()
    return arrays


def no_statistics(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """For kinds whose shards need no statistics."""
    return {}


def check_lists(table: pa.Table) -> None:
    """Make sure that `padded_lists` can be made of a table's columns: of one long list among many short ones it would take all
    memory there is.

    Raises:
        ValueError: they cannot; says why.
    """
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_list(column.type):
            longest = pc.max(pc.list_value_length(column)).as_py() or 0
            values = pc.list_flatten(column)
            if longest * len(column) > max(MAX_PADDED, 4 * len(values)):
                raise ValueError(f"a list of {longest:,} values stands among lists of few")
            if values.null_count:
                raise ValueError(f"{name} has a null among its values")


def padded_lists(column: pa.ChunkedArray, fill: float, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Lists of up to K values as (N, K), and their lengths (N,); null counts as empty."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    width = int(lengths.max(initial=0))
    padded: np.ndarray = np.full((len(column), width), fill, dtype=dtype)
    padded[np.arange(width) < lengths[:, None]] = pc.list_flatten(column).to_numpy()
    return padded, lengths


def no_damage(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    """For kinds with no invariants beyond their keys and schema."""
    return iter(())


class Parameters(Protocol):
    """What decides what a kind's table holds, beside what the dump was made from: kept in the manifest under the kind's name,
    as part of the dump's identity."""

    def to_record(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        ...

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The parameters of a record. ValueError: it is none."""
        ...


@dataclass(frozen=True)
class NoParameters:
    """For kinds of which there is one sort."""

    def to_record(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> NoParameters:
        """Of an empty record. ValueError: it is not empty."""
        if record:
            raise ValueError(f"there is a parameter {min(record)!r}, and this kind has none")
        return cls()


@dataclass(frozen=True)
class Packing:
    """How a kind's table stands on disk, where that is not as it is used.

    Attributes:
        schema: the stored columns, from those of the table.
        pack: the table, to the one to store.
        unpack: the reverse, exactly, given the columns; ValueError where what is stored stands for no table.
        view: `unpack` as SQL, given the columns; `{rows}` stands for the stored table.
        sources: the stored columns that a column is made of; one that is not named is stored as it is.
    """

    schema: Callable[[pa.Schema], pa.Schema]
    pack: Callable[[pa.Table, Manifest], pa.Table]
    unpack: Callable[[pa.Table, pa.Schema, Manifest], pa.Table]
    view: Callable[[pa.Schema, Manifest], str]
    sources: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Kind:
    """One kind of knowledge.

    Attributes:
        name: of its table, its folder and its SQL relation.
        per: whether a row stands for a position or for a sequence. The first column is `sequence_id`, the second, for a kind
            per position, is `position`; each sequence has all its rows, in order.
        schema: the table's Arrow schema in a given dump.
        decode: the table, or a slice of it, to the arrays a batch is made of, one entry per row.
        padding: for each array of a kind per position, the value on padding (0 when left out).
        statistics: named numbers over one shard's table; a name that begins with "mean_" is a mean over `predictions` or, where
            the kind has none, over rows.
        damage: sentences that say what is wrong with a table, none when it is sound.
        relations: SQL of the relations it offers, by name; one that is just the table is added by itself. `{rows}` stands for
            the table, `{dump}` for the dump's name as a literal, `{texts}` for a one-row relation whose column `list` holds the
            text of each token id.
        parameters: the dataclass of what the manifest says of it, with `to_record` and `from_record`.
        encode: the extractor's arrays, one entry per row, to the table; None when each array is a column as it is.
        packing: how it is stored; None as it is.
    """

    name: str
    per: Literal["position", "sequence"]
    schema: Callable[[Manifest], pa.Schema]
    decode: Callable[[pa.Table], Arrays] = decode_columns
    padding: dict[str, Any] = field(default_factory=dict)
    statistics: Callable[[pa.Table, Manifest], dict[str, float]] = no_statistics
    damage: Callable[[pa.Table, Manifest], Iterator[str]] = no_damage
    relations: dict[str, str] = field(default_factory=dict)
    parameters: type[Parameters] = NoParameters
    encode: Callable[[pa.Table, Arrays, Manifest], pa.Table] | None = None
    packing: Packing | None = None

    def table(self, keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
        """The table, from its key columns and the extractor's arrays."""
        if self.encode is None:
            return encode_columns(keys, arrays, self.schema(manifest))
        return self.encode(keys, arrays, manifest)

    def stored_schema(self, manifest: Manifest) -> pa.Schema:
        """The columns of its Parquet files."""
        return self.packing.schema(self.schema(manifest)) if self.packing else self.schema(manifest)

    def stored_columns(self, columns: Collection[str], manifest: Manifest) -> frozenset[str]:
        """The columns of its Parquet files that some of the table's are made of."""
        sources = self.packing.sources if self.packing else {}
        return frozenset(stored for column in columns for stored in sources.get(column, (column,)))

    def pack(self, table: pa.Table, manifest: Manifest) -> pa.Table:
        """What to store of a table."""
        return self.packing.pack(table, manifest) if self.packing else table

    def unpack(self, stored: pa.Table, manifest: Manifest) -> pa.Table:
        """The table, or a slice of it, that was stored. ValueError: what is stored stands for none."""
        return self.packing.unpack(stored, self.schema(manifest), manifest) if self.packing else stored

    def view(self, manifest: Manifest) -> str | None:
        """SQL of the table over `{rows}`, the stored one; None where they are the same."""
        return self.packing.view(self.schema(manifest), manifest) if self.packing else None
