"""The kind `hidden`: hidden states of chosen layers, at the positions that targets are predicted from or at all of them.

Layers are counted as in `vectors`, and the state of a token is what a layer gives at its place, the token itself read: the
state at position t is what token t + 1 is predicted from. States of several layers stand side by side.

In a batch of B sequences of at most T positions, of a teacher of width H and L layers, these are

    hidden      (B, T, L · H)  float32  0 where none is kept, and in padding
    has_hidden  (B, T)         bool     where one is kept

On disk a state is steps and scales, each layer by itself (see `quantisation`), or 16-bit floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import TEXT
from knowledge_store.format.sequences import split_sequence_id
from knowledge_store.kinds.columns import Arrays, encode_columns
from knowledge_store.kinds.field import SPLIT, Field
from knowledge_store.kinds.kind import Codec, Kind, Totals, parameters_of
from knowledge_store.kinds.quantisation import GROUP, as_lists, from_steps, group_count, in_steps, rows_of
from knowledge_store.kinds.vectors import UNKNOWN_WIDTH, layer_name, teacher_width

PLACES = ("targets", "all")
PRECISIONS = ("int8", "float16")
LEVEL = 1  # of the compression: as small as 19, and many times as fast

HIDDEN_STATE = Field("hidden", pa.float32(), "ragged", nullable=True)
IN_STEPS = (
    # Bytes, which are read ten times as fast as lists of small integers.
    Field("steps", pa.binary(), nullable=True, encoding=TEXT, level=LEVEL),
    Field("scales", pa.float32(), "ragged", nullable=True, encoding=SPLIT, level=LEVEL),
)
IN_FLOATS = (Field("floats", pa.float16(), "ragged", nullable=True, encoding=SPLIT, level=LEVEL),)
ZERO = 128  # what a byte of `steps` is for 0

STEPS_VIEW = f"""\
SELECT sequence_id, "position", list_transform(range(octet_length(steps)), lambda i:
           CAST(CAST(CAST(CAST(steps[i + 1:i + 1] AS BIT) AS UTINYINT) AS INTEGER) - {ZERO} AS FLOAT)
           * scales[(i // width) * ((width + {GROUP - 1}) // {GROUP}) + (i % width) // {GROUP} + 1]) AS hidden
FROM (SELECT *, octet_length(steps) // {{layers}} AS width FROM {{rows}})"""
FLOATS_VIEW = 'SELECT sequence_id, "position", CAST(floats AS FLOAT[]) AS hidden FROM {rows}'


@dataclass(frozen=True)
class HiddenParameters:
    """What decides which hidden states are kept, and how.

    Attributes:
        layers: whose states, in this order; below 0 from the end.
        where: one of PLACES: where a target is predicted from (the position before it), or everywhere.
        every: of these positions every so many-th of a sequence, beginning with number (document + window) modulo `every`
        precision: one of PRECISIONS.
    """

    layers: tuple[int, ...] = (-1,)
    where: str = PLACES[0]
    every: int = 1
    precision: str = PRECISIONS[0]

    def to_record(self) -> dict[str, Any]:
        """The parameters as the manifest has them."""
        return {"layers": list(self.layers), "where": self.where, "every": self.every, "precision": self.precision}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> HiddenParameters:
        """The parameters of a manifest.

        Raises:
            ValueError: they cannot be used.
        """
        if record.keys() != {"layers", "where", "every", "precision"}:
            raise ValueError("its parameters are not layers, where, every and precision")
        layers, every = record["layers"], record["every"]
        if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
            raise ValueError("its layers are no list of numbers")
        if type(every) is not int or every < 1:
            raise ValueError(f"its every, {every!r}, is no number above 0")
        for name, known in (("where", PLACES), ("precision", PRECISIONS)):
            if record[name] not in known:
                raise ValueError(f"its {name}, {record[name]!r}, is not one of {', '.join(known)}")
        return cls(tuple(layers), record["where"], every, record["precision"])

    def chosen(self, document: int, window: int, is_target: np.ndarray) -> np.ndarray:
        """The positions of a sequence whose states are kept, int64 (n,), from which of its tokens are targets, bool (T,)."""
        places = np.flatnonzero(is_target) - 1 if self.where == PLACES[0] else np.arange(len(is_target))
        return places[(document + window) % self.every :: self.every]

    def state_bytes(self, width: int) -> int:
        """What a state of a teacher of some width takes before it is compressed."""
        return len(self.layers) * (2 * width if self.precision == "float16" else width + 4 * group_count(width))


def hidden_of(manifest: Manifest) -> HiddenParameters:
    """The parameters of a dump's hidden states.

    Raises:
        InputError: it holds none.
    """
    return parameters_of(manifest, "hidden", HiddenParameters)


def stored(manifest: Manifest) -> tuple[Field, ...]:
    """The columns of a dump's files."""
    return IN_STEPS if hidden_of(manifest).precision == "int8" else IN_FLOATS


def pack(keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
    """The stored table of N positions.

    Args:
        keys: sequence_id and position, N rows.
        arrays: hidden, a list with an array (L · H,) of floats for each position, or None where none is kept.
        manifest: of the dump.

    Raises:
        InputError: a value is NaN, infinite or beyond what the precision holds, or states are of several widths.
    """
    kept = hidden_of(manifest)
    hidden = encode_columns(keys, arrays, (HIDDEN_STATE,))["hidden"]
    known = hidden.is_valid().to_numpy()
    try:
        rows = rows_of(hidden.drop_null())
        layers = _by_layer(rows, kept)
    except ValueError as error:
        raise InputError(f"hidden states cannot be kept: {error}; nothing is written") from None
    if kept.precision == "float16":
        with np.errstate(over="ignore"):
            floats = rows.astype(np.float16)
        if not np.isfinite(floats).all():
            raise InputError(
                f"a hidden state has a value of {np.abs(rows).max():.3g}, beyond what 16-bit floats hold: keep them with"
                " --hidden-precision int8"
            )
        return pa.table([*keys.columns, as_lists(floats, known)], schema=HIDDEN.stored_schema(manifest))
    steps, scales = in_steps(layers)
    places = np.maximum(np.cumsum(known) - 1, 0)
    blobs = pa.array([row.tobytes() for row in (steps.view(np.uint8) ^ ZERO).reshape(rows.shape)], pa.binary())
    blobs = blobs.take(pa.array(places, mask=~known)) if len(blobs) else pa.nulls(len(known), pa.binary())
    scales = scales.reshape(len(rows), len(kept.layers) * scales.shape[1])
    columns = [*keys.columns, blobs, as_lists(scales, known)]
    return pa.table(columns, schema=HIDDEN.stored_schema(manifest))


def _by_layer(rows: np.ndarray, kept: HiddenParameters) -> np.ndarray:
    """Rows (N, L · W) of what each layer has W of, as (N · L, W). ValueError: there are no such parts."""
    count, width = rows.shape
    if width % len(kept.layers):
        raise ValueError(f"{width:,} numbers cannot be those of {len(kept.layers)} layers")
    return rows.reshape(count * len(kept.layers), width // len(kept.layers))


def unpack(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The table that a stored one stands for. ValueError: it stands for none."""
    kept = hidden_of(manifest)
    if kept.precision == "float16":
        known = table["floats"].is_valid().to_numpy()
        rows = rows_of(table["floats"].drop_null()).astype(np.float32)
    else:
        known = table["steps"].is_valid().to_numpy()
        if not np.array_equal(known, table["scales"].is_valid().to_numpy()):
            raise ValueError("a hidden state has steps without scales, or scales without steps")
        blobs = table["steps"].drop_null()
        widths = pc.binary_length(blobs).unique().to_pylist()
        if len(widths) > 1:
            raise ValueError("its hidden states are of several widths")
        raw = np.frombuffer(b"".join(blobs.to_pylist()), np.uint8).reshape(len(blobs), widths[0] if widths else 0)
        steps, scales = (_by_layer(part, kept) for part in ((raw ^ ZERO).view(np.int8), rows_of(table["scales"].drop_null())))
        rows = from_steps(steps, scales).reshape(raw.shape)
    columns = [*table.select(["sequence_id", "position"]).columns, as_lists(rows, known)]
    return pa.table(columns, schema=HIDDEN.schema(manifest))


def view(manifest: Manifest) -> str:
    """`unpack` as SQL."""
    kept = hidden_of(manifest)
    return STEPS_VIEW.replace("{layers}", str(len(kept.layers))) if kept.precision == "int8" else FLOATS_VIEW


def decode(table: pa.Table, manifest: Manifest) -> Arrays:
    """Hidden states as arrays.

    Returns:
        hidden float32 (N, L · H), 0 where none is kept; has_hidden bool (N,).

    Raises:
        ValueError: states are of several widths, or numbers are not finite.
    """
    known = table["hidden"].is_valid().to_numpy()
    rows = rows_of(table["hidden"].drop_null())
    if not np.isfinite(rows).all():
        raise ValueError("a hidden state has a value that is not finite")
    hidden = np.zeros((len(known), rows.shape[1]), np.float32)
    hidden[known] = rows
    return {"hidden": hidden, "has_hidden": known}


def checks(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the hidden states of some sequences, in words."""
    kept, width = hidden_of(manifest), teacher_width(manifest)
    known = table["hidden"].is_valid().to_numpy()
    found = pc.list_value_length(table["hidden"].drop_null()).unique().to_pylist()
    if width and any(length != width * len(kept.layers) for length in found):
        yield f"a hidden state does not have {width:,} values for each of {len(kept.layers)} layers"
    start = 0
    for sequence, length, targets in zip(
        *(sequences[name].to_pylist() for name in ("sequence_id", "length", "targets")), strict=True
    ):
        part, start = known[start : start + length], start + length
        begin = sum(split_sequence_id(sequence)) % kept.every
        if kept.where == PLACES[0]:
            count = len(range(begin, targets, kept.every))
            if part.sum() != count or part[-1:].any():
                yield f"sequence {sequence} has {part.sum()} hidden states where its targets are predicted from, not {count}"
        elif not np.array_equal(np.flatnonzero(part), np.arange(begin, length, kept.every)):
            yield f"sequence {sequence} does not have its hidden states at every {kept.every}. position from {begin}"


def measure(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """At how many positions states are kept."""
    return {"kept": len(table) - table["hidden"].null_count}


def lines(manifest: Manifest, totals: Totals) -> list[tuple[str, str]]:
    """What `info` tells of a dump's hidden states."""
    kept, width = hidden_of(manifest), teacher_width(manifest)
    where = "where targets are predicted from" if kept.where == PLACES[0] else "everywhere"
    where += f", one of {kept.every} of these positions" if kept.every > 1 else ""
    layers = ", ".join(map(layer_name, kept.layers))
    size = f"{width * len(kept.layers):,} values each, " if width else ""
    return [("hidden states", f"{totals.count('kept'):,} of {layers}, {where}; {size}{kept.precision}")]


def facts(manifest: Manifest, totals: Totals) -> dict[str, str | float | int | None]:
    """What the relation `dumps` has of them: which they are."""
    kept = hidden_of(manifest)
    return {**kept.to_record(), "layers": ",".join(map(str, kept.layers))}


def row_bytes(manifest: Manifest) -> int:
    """Of a decoded row."""
    return 16 + 4 * len(hidden_of(manifest).layers) * (teacher_width(manifest) or UNKNOWN_WIDTH)


HIDDEN = Kind(
    name="hidden",
    per="position",
    fields=lambda manifest: (HIDDEN_STATE,),
    parameters=HiddenParameters,
    codec=Codec(
        takes=lambda manifest: ("hidden",),
        stored=stored,
        pack=pack,
        unpack=unpack,
        view=view,
        sources={"hidden": ("steps", "scales", "floats")},
        decode=decode,
        arrays=lambda manifest: {"hidden": 0.0, "has_hidden": False},
    ),
    row_bytes=row_bytes,
    statistics={"kept": None},
    measure=measure,
    checks=checks,
    lines=lines,
    facts=facts,
)
