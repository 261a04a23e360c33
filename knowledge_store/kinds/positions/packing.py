"""How a prediction is rounded, and how the table of positions stands on disk: whole steps, and nothing said twice.

`kind.FIELDS` are the columns that everything else works with. `pack_predictions` makes the stored columns of what an
extractor gives, `unpack_predictions` makes the table of those, and VIEW is the same in SQL. What is rounded is not each
log-probability but what follows it freely:

    token_steps      steps of the token's log-probability below 0; null where the token is a candidate
    candidate_ids    side by side, the most significant byte first, in as many bytes each as the vocabulary needs
    gap_steps        of each candidate but the first, steps below the one before
    tail_steps       steps of the tail's log-odds, ln(t / (1 − t)), below MAX_LOG_ODDS; ∞ where the tail is empty,
                     and none where there are no candidates
    tail_ids         the drawn tokens' ids, as steps are stored: theirs too differ in their lower bytes alone

Candidates and tail sum to one, which gives the first candidate for nothing and without an error of its own. Log-odds are even
where the tail holds nearly everything and its logarithm says nothing of the rest. Together the mean KL is a third less than
with each log-probability rounded by itself, in the same bytes.

Steps stand as float32, counted from 2²³: there a float's lowest byte counts, and the others hardly ever change. Split byte by
byte that is as small as integers get, and many more readers know this encoding of floats than that of integers. `token_id`
stays as it is: phrases repeat, which Zstandard finds by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import InputError
from knowledge_store.format.parquet import TEXT
from knowledge_store.kinds.columns import Arrays, list_mask, list_offsets
from knowledge_store.kinds.field import SPLIT, Field

PACKED = (
    Field("token_steps", pa.float32(), nullable=True, encoding=SPLIT),
    Field("candidate_ids", pa.binary(), nullable=True, encoding=TEXT),
    Field("gap_steps", pa.float32(), "ragged", nullable=True, encoding=SPLIT),
    Field("tail_steps", pa.float32(), nullable=True, encoding=SPLIT),
)
PACKED_DRAWS = Field("tail_ids", pa.float32(), "ragged", nullable=True, encoding=SPLIT)
SOURCES = {
    "token_logprob": ("token_id", "token_steps", "candidate_ids", "gap_steps", "tail_steps"),
    "candidate_logprobs": ("gap_steps", "tail_steps"),
    "tail_logprob": ("tail_steps",),
}

ZERO = 2**23  # what no steps are stored as
MAX_STEPS = 2**22  # further down every exp is 0
MAX_LOG_ODDS = 16  # nats: candidates that hold less than 1e-7 together are kept as holding that
NO_MASS = -np.inf
NO_TOKEN = -1  # behind the last draw

VIEW = """\
SELECT sequence_id, "position", token_id, is_target,
       CAST(CASE WHEN token_steps IS NULL THEN logprobs[list_position(ids, token_id)]
                 ELSE 0 - {step} * (CAST(token_steps AS DOUBLE) - {zero}) END AS FLOAT) AS token_logprob,
       ids AS candidate_ids,
       list_transform(logprobs, lambda x: CAST(x AS FLOAT)) AS candidate_logprobs,
       CAST(least(odds, 0) - ln(1 + exp(-abs(odds))) AS FLOAT) AS tail_logprob{more}
FROM (SELECT *, list_transform(below, lambda n: least(-odds, 0) - ln(1 + exp(-abs(odds))) - spread - {step} * n) AS logprobs
      FROM (SELECT *, ln(list_sum(list_transform(below, lambda n: exp(-{step} * n)))) AS spread
            FROM (SELECT *, {most} - {step} * (CAST(tail_steps AS DOUBLE) - {zero}) AS odds,
                         CASE WHEN octet_length(candidate_ids) > 0
                              THEN list_prepend(0, list_transform(gap_steps, lambda n, i: list_sum(gap_steps[:i]) - {zero} * i))
                              WHEN candidate_ids IS NOT NULL THEN [] END AS below,
                         list_transform(range(octet_length(candidate_ids) // {bytes}), lambda i: CAST(
                             CAST(candidate_ids[{bytes} * i + 1:{bytes} * i + {bytes}] AS BIT) AS UINTEGER)) AS ids
                  FROM {rows})))"""


def id_bytes(vocabulary: int) -> int:
    """Bytes of a token id in `candidate_ids`: 2, 3 or 4."""
    return next(size for size in (2, 3, 4) if vocabulary <= 256**size)


def predictions_view(more: Sequence[str], step: float, vocabulary: int) -> str:
    """SQL that gives the table, `{rows}` standing for the stored one; `more` are its other columns, all but draws stored as
    they are."""
    draws = f"list_transform(tail_ids, lambda n: CAST(n - {ZERO} AS UINTEGER)) AS tail_ids"
    literals = {"step": repr(float(step)), "zero": ZERO, "most": MAX_LOG_ODDS, "bytes": id_bytes(vocabulary)}
    return VIEW.format(
        **literals, more="".join(f", {draws if name == PACKED_DRAWS.name else name}" for name in more), rows="{rows}"
    )


def _sum_of_exp(exponents: np.ndarray) -> np.ndarray:
    """Σ exp over the columns (N, K), one after the other: further columns of −∞ change nothing, not even the last digit."""
    total = np.zeros(len(exponents))
    for column in exponents.T:
        total += np.exp(column)
    return total


def logprobs_of(below: Sequence[np.ndarray], tail_steps: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities that sum to one.

    Args:
        below: of each rank, steps of the candidates below the first of their positions, float64 (N,), ∞ for no candidate.
            Arrays of one rank fit the processor's cache, where arrays of all do not.
        tail_steps: as stored but counted from 0, float64 (N,).
        step: nats.

    Returns:
        candidates (N, K) and tail (N,), float32, nats.
    """
    odds = MAX_LOG_ODDS - step * tail_steps
    both = np.log(1 + np.exp(-np.abs(odds)))
    first = np.minimum(-odds, 0) - both - np.log(sum(np.exp(-step * steps) for steps in below))
    candidates = np.empty((len(odds), len(below)), np.float32)
    for rank, steps in enumerate(below):
        candidates[:, rank] = first - step * steps
    return candidates, (np.minimum(odds, 0) - both).astype(np.float32)


def exact_steps(candidates: np.ndarray, tail: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """What `steps_of` rounds, each by itself, to the nearest whole number.

    Args:
        candidates: nats, (N, K), −∞ for no candidate, but not for the first; what is kept is likeliest first.
        tail: nats, (N,); −∞ where it is empty.

    Returns:
        the arguments of `logprobs_of` before they are rounded, within the bounds of what is kept.
    """
    wide = candidates.astype(np.float64)
    first = wide[:, :1]
    below = (first - wide) / step
    odds = tail.astype(np.float64) - first[:, 0] - np.log(_sum_of_exp(wide - first))
    tail_steps = np.maximum((MAX_LOG_ODDS - odds) / step, 0)
    return (
        np.where(np.isposinf(below), below, np.minimum(below, MAX_STEPS)),
        np.where(np.isposinf(tail_steps), tail_steps, np.minimum(tail_steps, MAX_STEPS)),
    )


def steps_of(candidates: np.ndarray, tail: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The nearest steps to log-probabilities, which need not sum to one exactly: the arguments of `logprobs_of`.

    Arguments as those of `exact_steps`.
    """
    below, tail_steps = exact_steps(candidates, tail, step)
    return np.round(below), np.round(tail_steps)


def in_steps(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Log-probabilities (nats) in steps, what lies more than MAX_STEPS below 0 put there; −inf stays."""
    steps = logprobs.astype(np.float64) / step
    return np.where(np.isneginf(steps), steps, np.maximum(steps, -MAX_STEPS))


def quantise(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Round log-probabilities (nats) to multiples of `step`, as float32; −inf stays, −0 becomes 0.

    What lies more than MAX_STEPS below 0, such as a token whose logit is masked, is put there: its exp is 0 all the same.
    """
    return (np.round(in_steps(logprobs, step)) * step + 0.0).astype(np.float32)


def total_mass(candidate_logprobs: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Σ exp(candidates) + exp(tail) for each row, in float64."""
    return np.exp(candidate_logprobs.astype(np.float64)).sum(axis=1) + np.exp(tail_logprob.astype(np.float64))


def _stored(steps: np.ndarray, absent: np.ndarray | None = None) -> pa.Array:
    """Steps as they are stored, null where absent."""
    return pa.array((steps + ZERO).astype(np.float32), mask=absent)


def _counted(column: pa.ChunkedArray) -> np.ndarray:
    """Stored steps counted from 0, float32, which holds them exactly; 0 for null. ValueError: they are no whole numbers."""
    stored = column.fill_null(ZERO).to_numpy()
    known = (stored >= ZERO - MAX_STEPS) & ((stored <= ZERO + MAX_STEPS) | (stored == np.inf)) & (stored == np.rint(stored))
    if not known.all():
        raise ValueError("steps are no whole numbers")
    return stored - np.float32(ZERO)


def pack_predictions(arrays: Arrays, step: float, vocabulary: int, unknown: bool = False) -> dict[str, pa.Array]:
    """The stored columns PACKED of N positions.

    Args:
        arrays: token_id (N,), has_knowledge (N,) and, in nats and meaningful where `has_knowledge`: token_logprob (N,),
            candidate_ids (N, K), candidate_logprobs (N, K) (−inf: no candidate), tail_logprob (N,).
        step: nats.
        vocabulary: its size.
        unknown: whether a token_logprob may be NaN, which stands for one that nobody knows.

    Raises:
        InputError: a token id does not fit the vocabulary.
    """
    size = id_bytes(vocabulary)
    kept, token_id, logprobs = arrays["has_knowledge"], arrays["token_id"], arrays["candidate_logprobs"]
    present = (logprobs != NO_MASS) & kept[:, None]
    counts = present.sum(axis=1)
    some = counts > 0
    ids = arrays["candidate_ids"][present]
    if len(ids) and ids.max() >= 256**size:
        raise InputError(f"a token id, {ids.max()}, is far above the vocabulary size, {vocabulary}")
    below, tail_steps = np.zeros(logprobs.shape), np.zeros(len(kept))
    if some.any():
        below[some], tail_steps[some] = steps_of(logprobs[some], arrays["tail_logprob"][some], step)
    among = ((arrays["candidate_ids"] == token_id[:, None]) & present).any(axis=1)
    later = np.arange(1, logprobs.shape[1]) < counts[:, None]
    gaps = below[:, 1:][later] - below[:, :-1][later]
    no_steps = ~kept | among
    if unknown:
        no_steps |= np.isnan(arrays["token_logprob"])
    return {
        "token_steps": _stored(np.round(-in_steps(arrays["token_logprob"], step)), no_steps),
        "candidate_ids": packed_ids(ids, counts, kept, size),
        "gap_steps": pa.ListArray.from_arrays(
            list_offsets(counts - some), _stored(gaps), type=PACKED[2].column.type, mask=pa.array(~kept)
        ),
        "tail_steps": _stored(tail_steps, ~kept),
    }


def pack_draws(ids: np.ndarray, kept: np.ndarray) -> pa.Array:
    """The stored column PACKED_DRAWS of token ids (N, M), NO_TOKEN behind the last of a row; null where not kept, bool (N,).

    Raises:
        InputError: an id is above MAX_STEPS, up to which the column holds them.
    """
    drawn = (ids != NO_TOKEN) & kept[:, None]
    if (highest := ids[drawn].max(initial=0)) > MAX_STEPS:
        raise InputError(
            f"a drawn token's id, {highest}, is above {MAX_STEPS}: dump with --draw-weight 0, which keeps no draws"
        )
    values = _stored(ids[drawn].astype(np.float64))
    offsets = list_offsets(drawn.sum(axis=1))
    return pa.ListArray.from_arrays(offsets, values, type=PACKED_DRAWS.column.type, mask=pa.array(~kept))


def unpack_draws(column: pa.ChunkedArray) -> pa.Array:
    """The token ids, lists of uint32, that the stored column PACKED_DRAWS stands for. ValueError: it stands for none."""
    stored = pc.list_flatten(column)
    ids = _counted(stored)
    if stored.null_count or not ((ids >= 0) & (ids <= MAX_STEPS)).all():
        raise ValueError("tail_ids has something that is no token id")
    counts = pc.list_value_length(column).fill_null(0).to_numpy()
    absent = pa.array(column.is_null().to_numpy())
    return pa.ListArray.from_arrays(list_offsets(counts), pa.array(ids.astype(np.uint32)), mask=absent)


def packed_ids(ids: np.ndarray, counts: np.ndarray, kept: np.ndarray, size: int) -> pa.Array:
    """Token ids of all rows side by side (M,) as byte strings of `size` bytes an id, null where not kept.

    Args:
        counts: how many ids each row has, (N,).
        kept: bool (N,).
    """
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
    ids = np.zeros(len(octets) // size, np.uint32)
    for place in range(size):
        ids = ids << 8 | octets[place::size]
    return ids, lengths // size


def unpack_predictions(table: pa.Table, step: float, vocabulary: int, unknown: bool = False) -> dict[str, pa.Array]:
    """The columns that PACKED stands for in a stored table; `unknown`: the log-probability of tokens may be.

    Raises:
        ValueError: it stands for none; says why.
    """
    kept, has_token, has_tail, has_gaps = (
        table[name].is_valid().to_numpy() for name in ("candidate_ids", "token_steps", "tail_steps", "gap_steps")
    )
    ids, counts = _unpacked_ids(table["candidate_ids"], id_bytes(vocabulary))
    some = counts > 0
    gap_counts = pc.list_value_length(table["gap_steps"]).fill_null(0).to_numpy()
    if not np.array_equal(has_gaps, kept) or not np.array_equal(gap_counts, counts - some):
        raise ValueError("gap_steps and candidate_ids do not pair up")
    if pc.list_flatten(table["gap_steps"]).null_count:
        raise ValueError("gap_steps has a null among its values")
    if not np.array_equal(has_tail, kept):
        raise ValueError("tail_steps is null although there is knowledge, or the reverse")

    tail_steps = _counted(table["tail_steps"]).astype(np.float64)
    if (tail_steps < 0).any():
        raise ValueError("tail_steps is below 0")
    if tail_steps[kept & ~some].any():
        raise ValueError("tail_steps is not 0 although there are no candidates")

    gaps, first_gap = _counted(pc.list_flatten(table["gap_steps"])), np.cumsum(gap_counts) - gap_counts
    below = [np.zeros(len(table))]  # where there is no candidate, of one that is left out below
    for rank in range(1, counts.max(initial=0)):
        gap = gaps.take(first_gap + (rank - 1), mode="clip")
        below.append(np.where(counts > rank, below[-1] + gap, np.inf))
    with np.errstate(over="ignore"):
        candidates, tail = logprobs_of(below, tail_steps, step)
    if not np.isfinite(candidates[:, 0]).all():
        raise ValueError("the probabilities of candidates and tail do not have a finite sum")
    logprobs = candidates[list_mask(counts, len(below))]

    token_logprob = (0.0 - step * _counted(table["token_steps"]).astype(np.float64)).astype(np.float32)
    among = np.zeros(len(table), bool)
    first_id, token_id = np.cumsum(counts) - counts, table["token_id"].to_numpy()
    for rank in range(counts.max(initial=0)):
        found = np.flatnonzero((ids.take(first_id + rank, mode="clip") == token_id) & (counts > rank))
        token_logprob[found] = candidates[found, rank]
        among[found] = True
    unsaid = kept & ~among & ~has_token
    if (has_token & ~(kept & ~among)).any() or (unsaid.any() and not unknown):
        raise ValueError("token_steps is null although the token is no candidate, or the reverse")

    offsets = list_offsets(counts)
    absent = pa.array(~kept)
    return {
        "token_logprob": pa.array(token_logprob, mask=~kept | unsaid),
        "candidate_ids": pa.ListArray.from_arrays(offsets, pa.array(ids), mask=absent),
        "candidate_logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs), mask=absent),
        "tail_logprob": pa.array(tail, mask=~kept),
    }
