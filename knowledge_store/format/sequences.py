"""The `sequences` table, one row per sequence, and the `tokens` table, one row per token of the vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError, StoreError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import COUNTING, TEXT, Columns

# A sequence's id is its document and, in the low bits, its place among the document's windows. A worker knows the ids of
# its sequences from the plan alone, without tokenising what comes before.
WINDOW_BITS = 16

SEQUENCE_COLUMNS: dict[str, pa.DataType] = {
    "sequence_id": pa.int64(),
    "document": pa.int64(),
    "file": pa.string(),
    "row": pa.int64(),
    "part": pa.int32(),
    "window": pa.int32(),
    "length": pa.int32(),
    "targets": pa.int32(),
    "truncated": pa.bool_(),
    "token_hash": pa.uint64(),
}

SCORE = "score"  # the column that a dump of groups has after these

CORPUS_TYPES: dict[str, pa.DataType] = {
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
}

SEQUENCES_COLUMNS = Columns({"sequence_id": COUNTING}, identifying=("sequence_id", "token_hash"))
POSITIONS_STATISTIC = "sequences.positions"  # of a shard: how many tokens its sequences have together
TRUNCATED_STATISTIC = "sequences.truncated"  # of a shard: how many of its sequences were truncated

TOKENS_SCHEMA = pa.schema([("token_id", pa.uint32()), ("text", pa.string()), ("token", pa.string())])
TOKENS_COLUMNS = Columns({"token_id": COUNTING, "text": TEXT, "token": TEXT}, identifying=("token_id",))


def sequence_id(document: int, window: int) -> int:
    """The id of a document's window (both counted from 0)."""
    return document << WINDOW_BITS | window


def split_sequence_id(number: int) -> tuple[int, int]:
    """The document and the window of a sequence's id."""
    return number >> WINDOW_BITS, number & (1 << WINDOW_BITS) - 1


def sequences_statistics(sequences: pa.Table) -> dict[str, float]:
    """What a commit record says of a shard's `sequences`."""
    return {
        POSITIONS_STATISTIC: int(sequences["length"].to_numpy().sum(dtype=np.int64)),
        TRUNCATED_STATISTIC: int(sequences["truncated"].to_numpy().sum()),
    }


def token_hash(token_ids: np.ndarray) -> int:
    """First 8 bytes, little-endian, of the SHA-256 of the token ids as little-endian uint32."""
    return int.from_bytes(hashlib.sha256(np.asarray(token_ids, dtype="<u4").tobytes()).digest()[:8], "little")


def corpus_column(name: str, groups: bool = False) -> str:
    """The name under which a corpus's own column is stored: its own, unless the store uses that name itself. No two names
    become one: `length` is stored as `corpus_length`, and `corpus_length` as `corpus_corpus_length`. A dump of groups uses the
    name `score` itself."""
    plain = name.lower()  # SQL does not tell `Dump` from `dump`
    while plain.startswith("corpus_"):
        plain = plain.removeprefix("corpus_")
    return f"corpus_{name}" if plain in SEQUENCE_COLUMNS or plain == "dump" or (groups and plain == SCORE) else name


def stored_columns(names: Iterable[str], groups: bool = False) -> dict[str, str]:
    """Each of a corpus's own columns → the name under which it is stored (see `corpus_column`). SQL does not tell `Source` from
    `source`: of names that differ in case alone, the second in order is stored as `source_2`."""
    stored: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names):
        plain = unique = corpus_column(name, groups)
        number = 1
        while unique.lower() in taken:
            number += 1
            unique = f"{plain}_{number}"
        taken.add(unique.lower())
        stored[name] = unique
    return stored


def sequences_schema(manifest: Manifest) -> pa.Schema:
    """The schema of a dump's `sequences` table: the store's columns, of groups `score` too, then the corpus's own.

    Raises:
        StoreError: a column's type is unknown.
    """
    unknown = sorted(set(manifest.derived["columns"].values()) - CORPUS_TYPES.keys())
    if unknown:
        raise StoreError(f"dump {manifest.dump!r} has columns of unknown type: {', '.join(unknown)}")
    stored = stored_columns(manifest.derived["columns"], manifest.has_groups)
    corpus_columns = {stored[name]: CORPUS_TYPES[kind] for name, kind in manifest.derived["columns"].items()}
    score = {SCORE: pa.float64()} if manifest.has_groups else {}
    return pa.schema(list({**SEQUENCE_COLUMNS, **score, **corpus_columns}.items()))


def sequences_table(rows: list[dict[str, Any]], manifest: Manifest) -> pa.Table:
    """A `sequences` table of the given rows, whose keys are the names of stored columns (missing corpus columns are null).

    Raises:
        InputError: a row has a value for a column that the manifest does not name.
    """
    schema = sequences_schema(manifest)
    unknown = sorted({name for row in rows for name in row} - set(schema.names))
    if unknown:
        raise InputError(f"a sequence has a column {unknown[0]!r}, which the manifest of the dump does not name")
    return pa.Table.from_pylist(rows, schema=schema)


def tokens_table(texts: list[str | None], tokens: list[str | None]) -> pa.Table:
    """A `tokens` table: for each token id, its text as a person reads it and the tokenizer's own name for it."""
    ids = pa.array(np.arange(len(texts), dtype=np.uint32))
    return pa.table([ids, pa.array(texts, pa.string()), pa.array(tokens, pa.string())], schema=TOKENS_SCHEMA)
