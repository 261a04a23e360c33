"""What a kind of knowledge has to say about itself. Everything else in the project goes by that alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar

import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import Columns
from knowledge_store.kinds.columns import Arrays, decode_columns, encode_columns
from knowledge_store.kinds.field import KEYS, Field

_NAME = re.compile("[a-z][a-z0-9_]{0,63}")
_PLACES = re.compile(r"\{(?:(rows|dump|texts)|rows of ([a-z][a-z0-9_]*))\}")
ROWS = "rows"  # the statistic that every kind has


def filled(sql: str, rows_of: Callable[[str], str] | None = None, **names: str) -> str:
    """SQL of a kind with what `{rows}`, `{dump}` and `{texts}` stand for, and `{rows of KIND}`, which `rows_of` says.

    Other braces are SQL's: `{'a': x}` is a struct.
    """
    return _PLACES.sub(lambda place: rows_of(place[2]) if rows_of and place[2] else names[place[1]], sql)


class Parameters(Protocol):
    """What decides what a kind's table holds, beside what the dump was made from: kept in the manifest under the kind's name,
    as part of the dump's identity."""

    def to_record(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        ...

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The parameters of a record. ValueError: it cannot be used."""
        ...


P = TypeVar("P", bound=Parameters)


def parameters_of(manifest: Manifest, kind: str, parameters: type[P]) -> P:
    """The parameters that a dump keeps of a kind.

    Raises:
        InputError: it holds none.
    """
    check_held(manifest, kind)
    return parameters.from_record(manifest.kinds[kind])


def check_held(manifest: Manifest, kind: str) -> None:
    """Make sure that a dump holds a kind of knowledge.

    Raises:
        InputError: it does not; names what it has.
    """
    if kind not in manifest.kinds:
        raise InputError(
            f"dump {manifest.dump!r} holds no knowledge of kind {kind!r}: it has {', '.join(manifest.kinds)}; name another,"
            " or make one with `teacher-dump run --kind`"
        )


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
class Totals:
    """What is known of a kind's committed rows without opening a shard.

    Attributes:
        statistics: of the kind, over all shards; None where no shard has it.
        bytes: of the dump on disk, without its vocabulary.
    """

    statistics: Mapping[str, float | None]
    bytes: int

    def count(self, name: str) -> int:
        """A total, 0 before the first shard."""
        return int(self.statistics.get(name) or 0)


@dataclass(frozen=True)
class Codec:
    """How a kind's rows stand on disk, where that is not as its fields say, and what a batch has of them.

    Attributes:
        takes: the names of the arrays that `pack` takes.
        stored: the columns of its Parquet files, keys left out.
        pack: key columns and an extractor's arrays to the stored table, by row group.
        unpack: a stored table, or a slice of it, to the table; ValueError where what is stored stands for none.
        view: `unpack` as SQL; `{rows}` stands for the stored table.
        sources: the stored columns that a column is made of; one that is not named is stored as it is.
        decode: the table to the arrays of a batch, one entry a row.
        arrays: the names of these arrays, and what stands in a batch where there is no value.
    """

    takes: Callable[[Manifest], tuple[str, ...]]
    stored: Callable[[Manifest], tuple[Field, ...]]
    pack: Callable[[pa.Table, Arrays, Manifest], pa.Table]
    unpack: Callable[[pa.Table, Manifest], pa.Table]
    view: Callable[[Manifest], str]
    sources: Mapping[str, tuple[str, ...]]
    decode: Callable[[pa.Table, Manifest], Arrays]
    arrays: Callable[[Manifest], dict[str, Any]]


@dataclass(frozen=True)
class Repeated:
    """What a kind has several of in each row, for conditions on its rows: one that names such a column is met by a row where it
    is met by any of what the row has.

    Attributes:
        columns: the names that stand for one of these, in small letters.
        rows: SQL over `{rows}`, the relation of the kind's name: its rows, once for each, with these columns too.
    """

    columns: tuple[str, ...]
    rows: str


def no_measures(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """For kinds that are not measured."""
    return {}


def no_checks(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> Iterator[str]:
    """For kinds with no invariants beyond their keys and fields."""
    return iter(())


def no_lines(manifest: Manifest, totals: Totals) -> list[tuple[str, str]]:
    """For kinds of which there is nothing more to tell."""
    return []


def no_comparison(one: Manifest, other: Manifest) -> dict[str, str]:
    """For kinds whose parameters' names and values say enough."""
    return {}


def no_facts(manifest: Manifest, totals: Totals) -> dict[str, str | float | int | None]:
    """For kinds of which there is nothing more to tell."""
    return {}


@dataclass(frozen=True)
class Kind:
    """One kind of knowledge.

    Attributes:
        name: of its table, its folder and its SQL relation.
        per: what a row stands for: a position, a sequence, or an item, of which a sequence has any number. Its key columns are
            `sequence_id` and, for the first and last, `position` or `item`, which count from 0 in each sequence.
        fields: its other columns, in a given dump.
        parameters: the dataclass of what the manifest keeps under its name.
        codec: how rows are stored; None as the fields say.
        row_bytes: of a decoded row, by which row groups are cut; None computes it from the fields, where there is no codec.
        statistics: names of numbers over a shard's rows. A total has None; a mean has the name of the total it is a mean over
            ("rows" is one of every kind). Commit records, SQL and `info` have them as "KIND.NAME".
        measure: those numbers, of some of a shard's rows.
        checks: given the rows of some whole sequences, these sequences' rows of `sequences`, and the manifest, sentences that
            say what is wrong; none when all is sound. `verify` calls it for each row group.
        relations: SQL of the relations it offers, by name, which may differ from dump to dump; one that is just the table is
            added by itself. `{rows}` stands for the table, `{rows of KIND}` for that of another kind that the dump holds,
            `{dump}` for the dump's name as a literal, `{texts}` for a one-row relation whose column `list` holds the text of
            each token id.
        lines: what `info` tells of it: label and value.
        comparison: sentences on what the parameters of two dumps differ in, by the parameter; any other difference is said by
            the parameter's name and both values.
        facts: what the relation `dumps` has of it besides the statistics: columns "KIND.NAME".
        of_text: the arrays of a batch that say what the teacher read, the same for every teacher of a corpus. The others are
            what it knows.
        target: the column, and the array of a batch, of bool, that says which rows count for training; None where all do.
        repeated: what conditions on its rows may name besides its columns; None for nothing.
        show: header and rows of a table that shows a sequence to a person, given its arrays and the text of a token id.
    """

    name: str
    per: Literal["position", "sequence", "item"]
    fields: Callable[[Manifest], tuple[Field, ...]]
    parameters: type[Parameters] = NoParameters
    codec: Codec | None = None
    row_bytes: Callable[[Manifest], int] | None = None
    statistics: Mapping[str, str | None] = field(default_factory=dict)
    measure: Callable[[pa.Table, Manifest], dict[str, float]] = no_measures
    checks: Callable[[pa.Table, pa.Table, Manifest], Iterator[str]] = no_checks
    relations: Mapping[str, str | Callable[[Manifest], str]] = field(default_factory=dict)
    lines: Callable[[Manifest, Totals], list[tuple[str, str]]] = no_lines
    comparison: Callable[[Manifest, Manifest], dict[str, str]] = no_comparison
    facts: Callable[[Manifest, Totals], dict[str, str | float | int | None]] = no_facts
    of_text: tuple[str, ...] = ()
    target: str | None = None
    repeated: Repeated | None = None
    show: Callable[[Arrays, Callable[[int], str]], tuple[list[str], list[list[str]]]] | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *self.statistics):
            if not _NAME.fullmatch(name):
                raise InputError(f"{name!r} names no kind or statistic: use small letters, digits and '_'")
        if ROWS in self.statistics or any(of not in (None, ROWS, *self.statistics) for of in self.statistics.values()):
            raise InputError(
                f"the kind {self.name!r} declares a mean over a total that it does not declare, or {ROWS!r} itself"
            )
        if self.codec and not self.row_bytes:
            raise InputError(f"the kind {self.name!r} has a codec and does not say what a row takes: declare its row_bytes")

    def _stored(self, manifest: Manifest) -> tuple[Field, ...]:
        return (*KEYS[self.per], *(self.codec.stored(manifest) if self.codec else self.fields(manifest)))

    def schema(self, manifest: Manifest) -> pa.Schema:
        """The columns of its table."""
        return pa.schema([field.column for field in (*KEYS[self.per], *self.fields(manifest))])

    def stored_schema(self, manifest: Manifest) -> pa.Schema:
        """The columns of its Parquet files."""
        return pa.schema([field.column for field in self._stored(manifest)])

    def stored_columns(self, columns: Collection[str], manifest: Manifest) -> frozenset[str]:
        """The columns of its Parquet files that some of the table's are made of."""
        sources = self.codec.sources if self.codec else {}
        return frozenset(stored for column in columns for stored in sources.get(column, (column,)))

    def columns(self, manifest: Manifest) -> Columns:
        """How its Parquet files store their columns."""
        stored = self._stored(manifest)
        return Columns(
            {field.path: field.encoding for field in stored if field.encoding},
            {field.path: field.level for field in stored},
            tuple(field.name for field in stored if field.identifying),
        )

    def arrays(self, manifest: Manifest) -> dict[str, Any]:
        """The names of its arrays in a batch, and what stands there where there is no value (text: None)."""
        if self.codec:
            return self.codec.arrays(manifest)
        return {field.name: None if field.is_text else field.padding for field in self.fields(manifest)}

    def takes(self, manifest: Manifest) -> tuple[str, ...]:
        """The names of the arrays that an extractor gives of it."""
        return self.codec.takes(manifest) if self.codec else tuple(field.name for field in self.fields(manifest))

    def has_text(self, manifest: Manifest) -> bool:
        """Whether some of its arrays are lists of str: then it never enters the decoded cache."""
        return self.codec is None and any(field.is_text for field in self.fields(manifest))

    def pack(self, keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
        """What to store of a row group.

        Args:
            keys: the key columns.
            arrays: an extractor's, one entry a row (see `columns.encode_columns`, or the kind's codec).
            manifest: of the dump.

        Raises:
            InputError: the arrays are not what the kind declares.
        """
        if self.codec:
            return self.codec.pack(keys, arrays, manifest)
        return encode_columns(keys, arrays, self.fields(manifest))

    def unpack(self, stored: pa.Table, manifest: Manifest) -> pa.Table:
        """The table, or a slice of it, that was stored. ValueError: what is stored stands for none."""
        return self.codec.unpack(stored, manifest) if self.codec else stored

    def decode(self, table: pa.Table, manifest: Manifest) -> Arrays:
        """The arrays of a batch that a table, or a slice of it, stands for; one entry a row. ValueError: it stands for none."""
        return self.codec.decode(table, manifest) if self.codec else decode_columns(table, self.fields(manifest))

    def relation(self, name: str, manifest: Manifest) -> str | None:
        """SQL of one of its relations in a dump; None of the one that is just the table."""
        sql = self.relations.get(name)
        return sql(manifest) if callable(sql) else sql

    def view(self, manifest: Manifest) -> str | None:
        """SQL of the table over `{rows}`, the stored one; None where they are the same."""
        return self.codec.view(manifest) if self.codec else None
