"""The kind `vectors`: one vector a sequence, pooled from a layer's hidden states of its tokens.

A *layer* is counted as transformers counts hidden states: 0 are the embeddings, 1 is what the first layer gives, and −1 is
what the head sees, after the last norm. N, of a model with N layers, is what its last layer gives, before
that norm. The state of a token is what the layer gives at its place, the token itself read.

In a batch of B sequences the vector is

    vector   (B, W)  float32  W is the teacher's width; 0 where a sequence has nothing to pool, and in rows of padding

On disk it is steps and scales (see `quantisation`).
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
from knowledge_store.format.records import check_shape
from knowledge_store.kinds.columns import Arrays, decode_columns, encode_columns
from knowledge_store.kinds.field import SPLIT, Field
from knowledge_store.kinds.kind import Codec, Kind, Totals, parameters_of
from knowledge_store.kinds.quantisation import GROUP, as_lists, from_steps, in_steps, rows_of

POOLINGS = ("mean", "last")
POOLED = ("targets", "all")
UNKNOWN_WIDTH = 4096  # by which row groups are cut where a manifest does not name the teacher's width

VECTOR = Field("vector", pa.float32(), "ragged", nullable=True)
STORED = (
    Field("steps", pa.int8(), "ragged", nullable=True),
    Field("scales", pa.float32(), "ragged", nullable=True, encoding=SPLIT),
)

VIEW = f"""\
SELECT sequence_id, list_transform(steps, lambda n, i: CAST(n AS FLOAT) * scales[(i - 1) // {GROUP} + 1]) AS vector
FROM {{rows}}"""


@dataclass(frozen=True)
class VectorsParameters:
    """What decides what a vector is.

    Attributes:
        layer: whose states; below 0 from the end.
        pooling: one of POOLINGS: the mean of the states, or the last one.
        over: one of POOLED: the states of the targets, or of all tokens but the first. That one, before which nothing stands,
            is in many models some hundred times as large as all others, and says nothing.
    """

    layer: int = -1
    pooling: str = POOLINGS[0]
    over: str = POOLED[0]

    def to_record(self) -> dict[str, Any]:
        """The parameters as the manifest has them."""
        return {"layer": self.layer, "pooling": self.pooling, "over": self.over}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> VectorsParameters:
        """The parameters of a manifest.

        Raises:
            ValueError: they cannot be used.
        """
        check_shape(record, {"layer": int, "pooling": str, "over": str}, "vectors")
        for name, known in (("pooling", POOLINGS), ("over", POOLED)):
            if record[name] not in known:
                raise ValueError(f"its {name}, {record[name]!r}, is not one of {', '.join(known)}")
        return cls(record["layer"], record["pooling"], record["over"])


def vectors_of(manifest: Manifest) -> VectorsParameters:
    """The parameters of a dump's vectors.

    Raises:
        InputError: it holds none.
    """
    return parameters_of(manifest, "vectors", VectorsParameters)


def teacher_width(manifest: Manifest) -> int | None:
    """How many values a hidden state of the teacher has; None where the manifest does not say."""
    width = manifest.teacher.get("hidden_size")
    return width if isinstance(width, int) and width > 0 else None


def fields(manifest: Manifest) -> tuple[Field, ...]:
    """The columns of a dump's table."""
    return (VECTOR,)


def pack(keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
    """The stored table of N sequences.

    Args:
        keys: sequence_id, N rows.
        arrays: vector (N, W) of floats, or a list of arrays (W,) and of None for a sequence that has nothing to pool.
        manifest: of the dump.

    Raises:
        InputError: a value is NaN or infinite, or a vector is of another width than the others.
    """
    # As any column first, which refuses what is no row of numbers.
    vectors = encode_columns(keys, arrays, (VECTOR,))["vector"]
    known = vectors.is_valid().to_numpy()
    try:
        steps, scales = in_steps(rows_of(vectors.drop_null()))
    except ValueError as error:
        raise InputError(f"vectors cannot be kept: {error}; nothing is written") from None
    columns = [*keys.columns, as_lists(steps, known), as_lists(scales, known)]
    return pa.table(columns, schema=VECTORS.stored_schema(manifest))


def unpack(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The table that a stored one stands for. ValueError: it stands for none."""
    known = table["steps"].is_valid().to_numpy()
    if not np.array_equal(known, table["scales"].is_valid().to_numpy()):
        raise ValueError("a vector has steps without scales, or scales without steps")
    vectors = from_steps(rows_of(table["steps"].drop_null()), rows_of(table["scales"].drop_null()))
    return pa.table([table["sequence_id"], as_lists(vectors, known)], schema=VECTORS.schema(manifest))


def decode(table: pa.Table, manifest: Manifest) -> Arrays:
    """Vectors as an array.

    Returns:
        vector float32 (N, W), 0 where there is none.

    Raises:
        ValueError: vectors are of several widths, or numbers are not finite.
    """
    widths = pc.list_value_length(table["vector"].drop_null()).unique()
    if len(widths) > 1:
        raise ValueError("its vectors are of several widths")
    arrays = decode_columns(table, (VECTOR,))
    if not np.isfinite(arrays["vector"]).all():
        raise ValueError("a vector has a value that is not finite")
    return arrays


def checks(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the vectors of some sequences, in words."""
    lengths, width = pc.list_value_length(table["vector"]).to_pylist(), teacher_width(manifest)
    over = vectors_of(manifest).over
    counts = sequences["targets"].to_pylist() if over == POOLED[0] else [n - 1 for n in sequences["length"].to_pylist()]
    for sequence, length, count in zip(sequences["sequence_id"].to_pylist(), lengths, counts, strict=True):
        if (length is None) != (count == 0):
            yield f"sequence {sequence} has {'no' if length is None else 'a'} vector, and {count} tokens to make one of"
        elif length is not None and length != (width or length):
            yield f"the vector of sequence {sequence} has {length} values, and the teacher's states have {width}"


def measure(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """How many vectors there are, and how long they are on average."""
    known = table.filter(table["vector"].is_valid())
    norms = np.linalg.norm(decode(known, manifest)["vector"].astype(np.float64), axis=1)
    return {"vectors": len(norms), **({"mean_norm": float(norms.mean())} if len(norms) else {})}


def layer_name(layer: int) -> str:
    """A layer in words."""
    return f"layer {layer}" if layer >= 0 else "the last layer" if layer == -1 else f"layer {layer} (from the end)"


def lines(manifest: Manifest, totals: Totals) -> list[tuple[str, str]]:
    """What `info` tells of a dump's vectors."""
    kept = vectors_of(manifest)
    states = "state" if kept.pooling == "last" else "states"
    tokens = "the targets" if kept.over == POOLED[0] else "all tokens but the first"
    told = f"{totals.count('vectors'):,}, the {kept.pooling} of the {states} of {tokens} in {layer_name(kept.layer)}"
    width = teacher_width(manifest)
    return [("vectors", f"{told}, {width:,} values each" if width else told)]


def facts(manifest: Manifest, totals: Totals) -> dict[str, str | float | int | None]:
    """What the relation `dumps` has of them: how they were made."""
    return dict(vectors_of(manifest).to_record())


def row_bytes(manifest: Manifest) -> int:
    """Of a decoded row."""
    return 8 + 4 * (teacher_width(manifest) or UNKNOWN_WIDTH)


VECTORS = Kind(
    name="vectors",
    per="sequence",
    fields=fields,
    parameters=VectorsParameters,
    codec=Codec(
        takes=lambda manifest: ("vector",),
        stored=lambda manifest: STORED,
        pack=pack,
        unpack=unpack,
        view=lambda manifest: VIEW,
        sources={"vector": ("steps", "scales")},
        decode=decode,
        arrays=lambda manifest: {"vector": 0.0},
    ),
    row_bytes=row_bytes,
    statistics={"vectors": None, "mean_norm": "vectors"},
    measure=measure,
    checks=checks,
    lines=lines,
    facts=facts,
)
