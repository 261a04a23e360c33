"""The first kind of knowledge: what the teacher predicted at each position, as its likeliest tokens and the tail they leave.

Position t describes the prediction *of* token t, made from the tokens before it. Log-probabilities are natural logs over the
full vocabulary at temperature 1, rounded to the manifest's step. The tail is stored as its own rounded value: derived from
rounded candidates instead, it would carry twenty times the error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.kinds.kind import Arrays, Kind, list_offsets
from knowledge_store.manifest import Manifest

SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.uint32()),
        ("is_target", pa.bool_()),
        ("token_logprob", pa.float32()),
        ("candidate_ids", pa.list_(pa.field("element", pa.uint32()))),
        ("candidate_logprobs", pa.list_(pa.field("element", pa.float32()))),
        ("tail_logprob", pa.float32()),
    ]
)

NO_MASS = -np.inf

RELATIONS = {
    "positions": """
        SELECT {dump} AS dump, rows.*, texts.list[CAST(rows.token_id AS BIGINT) + 1] AS token_text
        FROM {rows} AS rows, {texts} AS texts""",
    "candidates": """
        SELECT dump, sequence_id, "position", rank, token_id, texts.list[CAST(token_id AS BIGINT) + 1] AS token_text, logprob
        FROM (SELECT {dump} AS dump, sequence_id, "position",
                     CAST(generate_subscripts(candidate_ids, 1) AS INTEGER) AS rank,
                     unnest(candidate_ids) AS token_id,
                     unnest(candidate_logprobs) AS logprob
              FROM {rows}) AS ranked, {texts} AS texts""",
}


def quantise(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Round log-probabilities (nats) to multiples of `step`, as float32; −inf stays, −0 becomes 0."""
    return (np.round(logprobs.astype(np.float64) / step) * step + 0.0).astype(np.float32)


def encode(keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
    """The table of N positions.

    Args:
        keys: sequence_id and position, N rows.
        arrays: token_id (N,), is_target (N,), has_knowledge (N,) and, in nats and meaningful where `has_knowledge`:
            token_logprob (N,), candidate_ids (N, K), candidate_logprobs (N, K), tail_logprob (N,).
        manifest: of the dump; gives the quantisation step.
    """
    kept = arrays["has_knowledge"]
    step = manifest.quantisation_step
    width = arrays["candidate_ids"].shape[1]
    offsets = list_offsets(kept * width)
    absent = pa.array(~kept)
    ids = pa.array(arrays["candidate_ids"][kept].reshape(-1), pa.uint32())
    logprobs = pa.array(quantise(arrays["candidate_logprobs"][kept].reshape(-1), step))
    columns = {
        "token_id": pa.array(arrays["token_id"], pa.uint32()),
        "is_target": pa.array(arrays["is_target"]),
        "token_logprob": pa.array(quantise(arrays["token_logprob"], step), mask=~kept),
        "candidate_ids": pa.ListArray.from_arrays(offsets, ids, mask=absent),
        "candidate_logprobs": pa.ListArray.from_arrays(offsets, logprobs, mask=absent),
        "tail_logprob": pa.array(quantise(arrays["tail_logprob"], step), mask=~kept),
    }
    return pa.table(
        [keys[name] if name in keys.column_names else columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names],
        schema=SCHEMA,
    )


def _padded_lists(column: pa.ChunkedArray, fill: float, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Lists of up to K values as (N, K), and their lengths (N,); null counts as empty."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    width = int(lengths.max(initial=0))
    padded: np.ndarray = np.full((len(column), width), fill, dtype=dtype)
    padded[np.arange(width) < lengths[:, None]] = pc.list_flatten(column).to_numpy()
    return padded, lengths


def _total_mass(candidate_logprobs: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Σ exp(candidates) + exp(tail) for each row, in float64."""
    return np.exp(candidate_logprobs.astype(np.float64)).sum(axis=1) + np.exp(tail_logprob.astype(np.float64))


def decode(table: pa.Table) -> Arrays:
    """Positions as arrays of N rows, with candidates and tail normalised to sum to one (rounding left them near it).

    Returns:
        input_ids int64 (N,), is_target bool (N,), has_knowledge bool (N,), token_logprob float32 (N,), candidate_ids
        int64 (N, K), candidate_logprobs float32 (N, K), tail_logprob float32 (N,). Without knowledge: all mass in the tail.
    """
    kept = table["candidate_ids"].is_valid().to_numpy()
    candidate_ids, _ = _padded_lists(table["candidate_ids"], 0, np.int64)
    candidate_logprobs, _ = _padded_lists(table["candidate_logprobs"], NO_MASS, np.float32)
    tail_logprob = table["tail_logprob"].fill_null(0).to_numpy()
    excess = np.log(_total_mass(candidate_logprobs, tail_logprob))
    return {
        "input_ids": table["token_id"].to_numpy().astype(np.int64),
        "is_target": table["is_target"].to_numpy(),
        "has_knowledge": kept,
        "token_logprob": table["token_logprob"].fill_null(0).to_numpy(),
        "candidate_ids": candidate_ids,
        "candidate_logprobs": (candidate_logprobs - excess[:, None]).astype(np.float32),
        "tail_logprob": (tail_logprob - excess).astype(np.float32),
    }


PADDING = {"candidate_logprobs": NO_MASS}


def statistics(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """Over the positions with knowledge: how many, how many are targets, mean mass of the candidates, the teacher's mean
    negative log-likelihood (nats per token), and how often its first candidate is the token that stands there."""
    arrays = decode(table)
    kept = arrays["has_knowledge"]
    predictions = int(kept.sum())
    if not predictions:
        return {"predictions": 0, "mean_top_k_mass": 0.0, "mean_nll": 0.0, "mean_top_1_accuracy": 0.0}
    mass = np.exp(arrays["candidate_logprobs"][kept].astype(np.float64)).sum(axis=1)
    right = arrays["candidate_ids"][kept, 0] == arrays["input_ids"][kept]
    return {
        "predictions": predictions,
        "mean_top_k_mass": float(mass.mean()),
        "mean_nll": float(-arrays["token_logprob"][kept].astype(np.float64).mean()),
        "mean_top_1_accuracy": float(right.mean()),
    }


def damage(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a table of positions: its invariants, in words."""
    kept = table["candidate_ids"].is_valid().to_numpy()
    for name in ("candidate_logprobs", "token_logprob", "tail_logprob"):
        if not np.array_equal(table[name].is_valid().to_numpy(), kept):
            yield f"{name} is null where candidate_ids is not, or the reverse"
            return
    position = table["position"].to_numpy()
    if kept[position == 0].any():
        yield "position 0, which nothing predicts, has candidates"
    if (table["is_target"].to_numpy() & ~kept).any():
        yield "a target has no candidates"

    ids, id_counts = _padded_lists(table["candidate_ids"], -1, np.int64)
    logprobs, logprob_counts = _padded_lists(table["candidate_logprobs"], NO_MASS, np.float32)
    width = min(manifest.top_k, manifest.vocabulary_size)
    if (id_counts[kept] != width).any() or (logprob_counts[kept] != width).any():
        yield f"a position does not have {width} candidates"
        return
    ids, logprobs = ids[kept], logprobs[kept]
    token_id = table["token_id"].to_numpy()[kept].astype(np.int64)
    token_logprob = table["token_logprob"].to_numpy()[kept]
    tail = table["tail_logprob"].to_numpy()[kept]
    step = manifest.quantisation_step

    if (table["token_id"].to_numpy() >= manifest.vocabulary_size).any() or (ids >= manifest.vocabulary_size).any():
        yield f"a token id is not below the vocabulary size, {manifest.vocabulary_size}"
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        yield "a token stands twice among the candidates of one position"
    if not (np.isfinite(logprobs).all() and np.isfinite(token_logprob).all()) or np.isnan(tail).any():
        yield "a log-probability is not a finite number"
        return
    if (np.diff(logprobs, axis=1) > 0).any():
        yield "candidates are not sorted, likeliest first"
    if (np.isneginf(tail) != (width == manifest.vocabulary_size)).any():
        yield "the tail is empty although candidates are left out, or the reverse"
    values = np.concatenate([logprobs.reshape(-1), token_logprob, tail[np.isfinite(tail)]])
    if (values > 0).any():
        yield "a log-probability is above zero"
    if (quantise(values, step) != values).any():
        yield f"a log-probability is not a multiple of {step}"
    # Rounding moves each probability by a factor of at most exp(step / 2); 1e-4 is room for the teacher's float32.
    if (np.abs(np.log(_total_mass(logprobs, tail))) > step / 2 + 1e-4).any():
        yield "candidates and tail do not sum to one within the rounding"
    among = ids == token_id[:, None]
    if (np.where(among, logprobs, 0).sum(axis=1)[among.any(axis=1)] != token_logprob[among.any(axis=1)]).any():
        yield "token_logprob is not the log-probability of the candidate it equals"


POSITIONS = Kind(
    name="positions",
    per="position",
    schema=lambda manifest: SCHEMA,
    encode=encode,
    decode=decode,
    padding=PADDING,
    statistics=statistics,
    damage=damage,
    relations=RELATIONS,
)
