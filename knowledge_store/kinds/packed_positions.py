"""How the table of positions stands on disk: whole steps, and what one column tells of another left out.

`positions.schema` is the table that everything else works with. `pack` makes the stored one of it, `unpack` the reverse,
exactly, and VIEW is `unpack` in SQL. A log-probability is stored as steps: how many quantisation steps it lies below 0. Steps
stand as float32, counted from 2²³: there a float's lowest byte counts, and the others hardly ever change. Split byte by byte
that is as small as integers get, and many more readers know this encoding of floats than that of integers.

    token_steps      null where the token is a candidate with the same log-probability
    candidate_ids    side by side, the most significant byte first, in as many bytes each as the vocabulary needs
    gap_steps        of each candidate but the first, how far it lies below the one before: small numbers
    first_steps      of the first, how far it lies from where tail and gaps put it, since all sum to one; zigzag: 0 −1 1 −2 2 …
    tail_steps       null where the tail is empty

`token_id` stays as it is: phrases repeat, which Zstandard finds by itself.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import InputError
from knowledge_store.kinds.kind import list_offsets
from knowledge_store.manifest import Manifest

PACKED = {
    "token_steps": pa.float32(),
    "candidate_ids": pa.binary(),
    "gap_steps": pa.list_(pa.field("element", pa.float32())),
    "first_steps": pa.float32(),
    "tail_steps": pa.float32(),
}

_RANKED = ("gap_steps", "first_steps", "tail_steps")
SOURCES = {
    "token_logprob": ("token_id", "token_steps", "candidate_ids", *_RANKED),
    "candidate_logprobs": _RANKED,
    "tail_logprob": ("first_steps", "tail_steps"),
}

ZERO = 2**23  # what no steps are stored as

# Where the tail holds nearly everything, a rounded tail says little of what is left.
LEAST_REST = 0.01

VIEW = """\
SELECT sequence_id, "position", token_id, is_target,
       CAST(0 - {step} * coalesce(token_steps, steps[list_position(ids, token_id)]) AS FLOAT) AS token_logprob,
       ids AS candidate_ids,
       list_transform(steps, lambda n: CAST(0 - {step} * n AS FLOAT)) AS candidate_logprobs,
       CASE WHEN first_steps IS NOT NULL
            THEN coalesce(CAST(0 - {step} * tail_steps AS FLOAT), CAST('-infinity' AS FLOAT)) END AS tail_logprob{more}
FROM (SELECT *, list_transform(below, lambda n: n + start) AS steps
      FROM (SELECT *, round(ln(list_sum(list_transform(below, lambda n: exp(-{step} * n)))
                               / greatest(1 - coalesce(exp(-{step} * tail_steps), 0), {rest})) / {step})
                      + xor(first_steps >> 1, -(first_steps & 1)) AS start
            FROM (SELECT *, CASE WHEN first_steps IS NOT NULL
                                 THEN list_prepend(0, list_transform(gap_steps, lambda n, i: list_sum(gap_steps[:i])))
                                 WHEN candidate_ids IS NOT NULL THEN [] END AS below,
                         list_transform(range(octet_length(candidate_ids) // {bytes}), lambda i: CAST(
                             CAST(candidate_ids[{bytes} * i + 1:{bytes} * i + {bytes}] AS BIT) AS UINTEGER)) AS ids
                  FROM (SELECT * REPLACE (list_transform(gap_steps, lambda n: CAST(n AS INTEGER) - {zero}) AS gap_steps,
                                          CAST(token_steps AS INTEGER) - {zero} AS token_steps,
                                          CAST(first_steps AS INTEGER) - {zero} AS first_steps,
                                          CAST(tail_steps AS INTEGER) - {zero} AS tail_steps)
                        FROM {rows}))))"""


def id_bytes(manifest: Manifest) -> int:
    """Bytes of a token id in `candidate_ids`: 2, 3 or 4."""
    return next(size for size in (2, 3, 4) if manifest.vocabulary_size <= 256**size)


def packed_schema(logical: pa.Schema) -> pa.Schema:
    """The stored columns of a table with the columns `logical`."""
    before = [column for column in logical if column.name in ("sequence_id", "position", "token_id", "is_target")]
    return pa.schema([*before, *PACKED.items(), *_more(logical)])


def _more(logical: pa.Schema) -> list[pa.Field]:
    """The columns that are stored as they are: draws, and the tail at a temperature."""
    return list(logical)[logical.get_field_index("tail_logprob") + 1 :]


def view(logical: pa.Schema, manifest: Manifest) -> str:
    """SQL that gives the columns `logical`, `{rows}` standing for the stored table."""
    size = id_bytes(manifest)
    more = "".join(f", {column.name}" for column in _more(logical))
    step = repr(float(manifest.quantisation_step))
    return VIEW.format(step=step, rest=LEAST_REST, zero=ZERO, bytes=size, more=more, rows="{rows}")


def _expected_start(below: np.ndarray, firsts: np.ndarray, tail: np.ndarray, step: float) -> np.ndarray:
    """Where the first candidate lies by the others: R = 1 − tail is shared in the proportions exp(−below · step).

    Args:
        below: steps of each candidate below the first of its row, all rows side by side, int64 (M,).
        firsts: where each row begins, int64 (R,), no row empty.
        tail: its probability in each row, float64 (R,).

    Returns:
        steps below 0, int64 (R,).
    """
    if not len(firsts):
        return np.zeros(0, np.int64)
    shares = np.add.reduceat(np.exp(-step * below), firsts)
    return np.round(np.log(shares / np.maximum(1 - tail, LEAST_REST)) / step).astype(np.int64)


def _steps(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Rounded log-probabilities as steps below 0, int64."""
    return np.round(logprobs.astype(np.float64) / -step).astype(np.int64)


def _logprobs(steps: np.ndarray, step: float) -> np.ndarray:
    """The reverse of `_steps`, float32."""
    return (0.0 - step * steps).astype(np.float32)


def _probability(steps: np.ndarray, there: np.ndarray, step: float) -> np.ndarray:
    """exp of minus `steps` where it is there, else 0, float64."""
    return np.where(there, np.exp(-step * np.where(there, steps, 0)), 0.0)


def _stored(steps: np.ndarray, absent: np.ndarray | None = None) -> pa.Array:
    """Steps as they are stored, null where absent."""
    return pa.array((steps + ZERO).astype(np.float32), mask=absent)


def _counted(column: pa.ChunkedArray) -> np.ndarray:
    """Stored steps, int64, 0 for null. ValueError: they are no whole numbers."""
    found = column.fill_null(ZERO).to_numpy()
    whole = np.clip(np.nan_to_num(found), ZERO // 2, 2 * ZERO).astype(np.int64)
    if not np.array_equal(whole, found):
        raise ValueError("steps are no whole numbers")
    return whole - ZERO


def _filled(column: pa.ChunkedArray, fill: float) -> np.ndarray:
    return column.fill_null(fill).to_numpy()


def pack(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The stored table of N positions, from one with the logical columns.

    Raises:
        InputError: a token id does not fit the vocabulary.
    """
    step, size = manifest.quantisation_step, id_bytes(manifest)
    kept = table["candidate_ids"].is_valid().to_numpy()
    counts = pc.list_value_length(table["candidate_ids"]).fill_null(0).to_numpy().astype(np.int64)
    some = counts > 0
    firsts = (np.cumsum(counts) - counts)[some]
    rows = np.repeat(np.arange(len(table)), counts)
    ids = pc.list_flatten(table["candidate_ids"]).to_numpy()
    if len(ids) and ids.max() >= 256**size:
        raise InputError(f"a token id, {ids.max()}, is not below the vocabulary size, {manifest.vocabulary_size}")

    steps = _steps(pc.list_flatten(table["candidate_logprobs"]).to_numpy(), step)
    later = np.ones(len(steps), bool)
    later[firsts] = False
    below = steps - np.repeat(steps[firsts], counts[some])
    tail = _filled(table["tail_logprob"], -np.inf)
    no_tail = np.isneginf(tail)
    tail_steps = _steps(np.where(no_tail, 0, tail), step)
    off = steps[firsts] - _expected_start(below, firsts, _probability(tail_steps, ~no_tail, step)[some], step)
    first_steps = np.zeros(len(table), np.int64)
    first_steps[some] = (off << 1) ^ (off >> 63)
    token_steps = _steps(_filled(table["token_logprob"], 0), step)
    told = np.zeros(len(table), bool)
    told[rows[(ids == table["token_id"].to_numpy()[rows]) & (steps == token_steps[rows])]] = True

    columns = {
        "token_steps": _stored(token_steps, ~kept | told),
        "candidate_ids": _packed_ids(ids, counts, kept, size),
        "gap_steps": pa.ListArray.from_arrays(
            list_offsets(counts - some), _stored(np.diff(steps, prepend=0)[later]), mask=pa.array(~kept)
        ),
        "first_steps": _stored(first_steps, ~some),
        "tail_steps": _stored(tail_steps, no_tail),
    }
    wanted = packed_schema(table.schema)
    return pa.table([columns[each.name] if each.name in columns else table[each.name] for each in wanted], schema=wanted)


def _packed_ids(ids: np.ndarray, counts: np.ndarray, kept: np.ndarray, size: int) -> pa.Array:
    octets = np.ascontiguousarray(ids.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - size :])
    valid = np.packbits(kept, bitorder="little")
    buffers = [pa.py_buffer(valid), list_offsets(counts * size).buffers()[1], pa.py_buffer(octets)]
    return pa.Array.from_buffers(pa.binary(), len(counts), buffers)


def _unpacked_ids(column: pa.ChunkedArray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all rows side by side, uint32 (M,), and how many each row has, int64 (N,)."""
    lengths = pc.binary_length(column).fill_null(0).to_numpy().astype(np.int64)
    parts = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset :][[0, len(chunk)]] if len(chunk) else (0, 0)
        parts.append(np.frombuffer(data if data is not None else b"", np.uint8)[ends[0] : ends[1]])
    octets = np.concatenate([np.zeros(0, np.uint8), *parts])
    if (lengths % size).any() or len(octets) != lengths.sum():
        raise ValueError(f"candidate_ids are not of {size} bytes each")
    words = np.zeros((len(octets) // size, 4), np.uint8)
    words[:, 4 - size :] = octets.reshape(-1, size)
    return words.view(">u4")[:, 0].astype(np.uint32), lengths // size


def unpack(table: pa.Table, logical: pa.Schema, manifest: Manifest) -> pa.Table:
    """The table with the columns `logical` that a stored one stands for.

    Raises:
        ValueError: it stands for none; says why.
    """
    step = manifest.quantisation_step
    kept, has_token, has_tail, has_first, has_gaps = (
        table[name].is_valid().to_numpy() for name in ("candidate_ids", "token_steps", "tail_steps", "first_steps", "gap_steps")
    )
    ids, counts = _unpacked_ids(table["candidate_ids"], id_bytes(manifest))
    some = counts > 0
    if not np.array_equal(has_gaps, kept) or not np.array_equal(
        pc.list_value_length(table["gap_steps"]).fill_null(0).to_numpy(), counts - some
    ):
        raise ValueError("gap_steps and candidate_ids do not pair up")
    if not np.array_equal(has_first, some):
        raise ValueError("first_steps is null although there are candidates, or the reverse")
    if (has_tail & ~some).any():
        raise ValueError("tail_steps is there although there are no candidates")

    firsts = (np.cumsum(counts) - counts)[some]
    later = np.ones(len(ids), bool)
    later[firsts] = False
    gaps = np.zeros(len(ids), np.int64)
    gaps[later] = _counted(pc.list_flatten(table["gap_steps"]))
    total = np.cumsum(gaps)
    below = total - np.repeat(total[firsts], counts[some])
    tail_steps = _counted(table["tail_steps"])
    off = _counted(table["first_steps"])[some]
    start = _expected_start(below, firsts, _probability(tail_steps, has_tail, step)[some], step) + ((off >> 1) ^ -(off & 1))
    logprobs = _logprobs(below + np.repeat(start, counts[some]), step)

    token_logprob = _logprobs(_counted(table["token_steps"]), step)
    rows = np.repeat(np.arange(len(table)), counts)
    untold = kept & ~has_token
    own = np.flatnonzero((ids == table["token_id"].to_numpy()[rows]) & untold[rows])
    token_logprob[rows[own]] = logprobs[own]
    untold[rows[own]] = False
    if untold.any() or (has_token & ~kept).any():
        raise ValueError("token_steps is null although the token is no candidate, or the reverse")

    offsets = list_offsets(counts)
    absent = pa.array(~kept)
    columns = {
        "token_logprob": pa.array(token_logprob, mask=~kept),
        "candidate_ids": pa.ListArray.from_arrays(offsets, pa.array(ids), mask=absent),
        "candidate_logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs), mask=absent),
        "tail_logprob": pa.array(np.where(has_tail, _logprobs(tail_steps, step), np.float32(-np.inf)), mask=~some),
    }
    return pa.table(
        [columns[each.name].cast(each.type) if each.name in columns else table[each.name] for each in logical], schema=logical
    )
