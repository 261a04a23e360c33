"""The first kind of knowledge: what the teacher predicted at each position, as its likeliest tokens and the tail they leave.

Position t describes the prediction *of* token t, made from the tokens before it. Log-probabilities are natural logs over the
full vocabulary at temperature 1, rounded in steps as `packing` says. The tail is a rounded value of its own: derived from
rounded candidates instead, it would carry twenty times the error.

In a batch of B sequences of at most T positions with at most K candidates these are

    input_ids           (B, T)    int64    0 on padding, which is on the right
    is_target           (B, T)    bool     counts for training
    has_knowledge       (B, T)    bool     what the teacher predicted here is kept
    token_logprob       (B, T)    float32  the teacher's log-probability (nats) of the token that stands here
    candidate_ids       (B, T, K) int64    likeliest first; 0 where there are none
    candidate_logprobs  (B, T, K) float32  −inf where there are none; with the tail they sum to one
    tail_logprob        (B, T)    float32  log of the probability outside the candidates

so pair position t with a model's output at t − 1. Without knowledge (position 0, context, padding) all mass is in the tail.

A selection with draws adds

    tail_ids            (B, T, M) int64    drawn from outside the candidates, a token as often as it was; −1: no more
    draw_weight         (B, T)    float32  the probability that each of them stands for; 0 without knowledge

A calibrated dump adds `tail_logsumexp`, from which every log-probability at the calibration's temperature T follows: they are
the log-softmax of candidates / T and of this. `tail_entropy` is that of the tail made to sum to one, H = −Σ (q/t) ln (q/t) over
it (nats; t its probability): with it the teacher's entropy is known, and with draws the whole divergence from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.records import check_shape
from knowledge_store.kinds.columns import Arrays, padded_lists
from knowledge_store.kinds.field import PLAIN, SPLIT, Field
from knowledge_store.kinds.kind import Codec, Kind, Totals, parameters_of
from knowledge_store.kinds.positions.display import show
from knowledge_store.kinds.positions.invariants import invariants, tokens_match
from knowledge_store.kinds.positions.packing import (
    NO_MASS,
    NO_TOKEN,
    PACKED,
    PACKED_DRAWS,
    SOURCES,
    in_steps,
    pack_draws,
    pack_predictions,
    predictions_view,
    quantise,
    total_mass,
    unpack_draws,
    unpack_predictions,
)
from knowledge_store.kinds.positions.packing import exact_steps as exact_prediction_steps
from knowledge_store.kinds.positions.relations import EACH_CANDIDATE, RELATIONS, positions_relation
from knowledge_store.kinds.positions.selection import Selection, difference, most_above
from knowledge_store.quantities import byte_size

FIELDS = (
    Field("token_id", pa.uint32(), encoding=PLAIN, identifying=True),  # phrases repeat, which Zstandard finds by itself
    Field("is_target", pa.bool_(), identifying=True),
    Field("token_logprob", pa.float32(), nullable=True),
    Field("candidate_ids", pa.uint32(), "ragged", nullable=True),
    Field("candidate_logprobs", pa.float32(), "ragged", nullable=True, padding=NO_MASS),
    Field("tail_logprob", pa.float32(), nullable=True),
)
DRAWS = (Field("tail_ids", pa.uint32(), "ragged", nullable=True, encoding=PLAIN),)
TEMPERED = (Field("tail_logsumexp", pa.float32(), nullable=True),)
ENTROPY = (Field("tail_entropy", pa.float32(), nullable=True, encoding=SPLIT),)
TAILS = ("exact", "remainder")
AS_THEY_ARE = 2  # of FIELDS, the first so many are stored as they are

MIN_STEP, MAX_STEP = 2.0**-24, 2.0**10  # nats; beyond these nothing can be computed with
MIN_ROW_BYTES = 2048  # of a position, with up to 512 candidates: row groups of 32,768 positions
DENSE_BYTES = 4  # of a log-probability that is not kept: float32
DECODED = (
    *("input_ids", "is_target", "has_knowledge", "token_logprob", "candidate_ids", "candidate_logprobs", "tail_logprob"),
)
MAX_EXCESS = 1e-3  # nats by which a teacher's float32 candidates and tail may miss one together


@dataclass(frozen=True)
class PositionsParameters:
    """What decides what is kept of each prediction.

    Attributes:
        selection: the rule that picks it.
        quantisation_step: nats; what log-probabilities are rounded in.
        calibration: `temperature` at which the tail is kept too, and `sha256` of the calibration; empty for none.
        keep_context: whether predictions of context positions (prompts) are kept too.
        tail_entropy: whether the entropy of the tail is kept.
        tail: one of TAILS: `exact`, or `remainder` where nobody said it, and it is what candidates leave of one (`remainder`).
        unknown_tokens: whether the log-probability of a token that is no candidate may be unknown: then it is null.
    """

    selection: Selection = field(default_factory=Selection)
    quantisation_step: float = 1 / 8
    calibration: dict[str, Any] = field(default_factory=dict)
    keep_context: bool = False
    tail_entropy: bool = False
    tail: str = "exact"
    unknown_tokens: bool = False

    @property
    def temperature(self) -> float | None:
        """The temperature, other than 1, at which the tail is kept too."""
        return self.calibration.get("temperature")

    def to_record(self) -> dict[str, Any]:
        """The parameters as the manifest has them."""
        return {
            "selection": self.selection.to_record(),
            "quantisation_step": self.quantisation_step,
            "calibration": dict(self.calibration),
            "keep_context": self.keep_context,
            "tail_entropy": self.tail_entropy,
            **({"tail": self.tail} if self.tail != TAILS[0] else {}),
            **({"unknown_tokens": True} if self.unknown_tokens else {}),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PositionsParameters:
        """The parameters of a manifest.

        Raises:
            ValueError: they cannot be used.
        """
        switches = {"keep_context": bool, "tail_entropy": bool}
        check_shape(
            record, {"selection": {"name": str}, "quantisation_step": int | float, "calibration": {}, **switches}, "positions"
        )
        step, calibration = record["quantisation_step"], record["calibration"]
        if not MIN_STEP <= step <= MAX_STEP:
            raise ValueError(f"its quantisation step is not between {MIN_STEP} and {MAX_STEP}")
        check_shape(calibration, {"temperature": int | float, "sha256": str} if calibration else {}, "its calibration")
        if not calibration.get("temperature", 1) > 0:
            raise ValueError("its calibration's temperature is not above zero")
        if record.get("tail", TAILS[1]) != TAILS[1] or record.get("unknown_tokens", True) is not True:
            raise ValueError("it says of its tail or of unknown tokens what is not known here")
        rule = Selection.from_record(record["selection"])
        tail, unknown = record.get("tail", TAILS[0]), "unknown_tokens" in record
        if tail != TAILS[0] and (rule.draw_weight or calibration or record["tail_entropy"]):
            raise ValueError(
                "it has draws of a tail, its entropy or a temperature for it, and its tail is what candidates leave"
            )
        return cls(rule, step, calibration, record["keep_context"], record["tail_entropy"], tail, unknown)


def positions_of(manifest: Manifest) -> PositionsParameters:
    """The parameters of a dump's positions.

    Raises:
        InputError: it holds none.
    """
    return parameters_of(manifest, "positions", PositionsParameters)


def knows_tokens(manifest: Manifest) -> bool:
    """Whether a dump says at each position with knowledge how likely the teacher found the token that stands there."""
    return "positions" in manifest.kinds and not positions_of(manifest).unknown_tokens


def knows_likeliest(manifest: Manifest) -> bool:
    """Whether a dump says at each position which token the teacher finds likeliest."""
    return "positions" in manifest.kinds and positions_of(manifest).selection.name != "threshold"


def knows_full_kl(manifest: Manifest) -> bool:
    """Whether a dump says enough of the teacher's tails for the whole KL from it to be estimated: draws, and their entropy."""
    return "positions" in manifest.kinds and {*DRAWS, *ENTROPY} <= {*_more(manifest)}


def _more(manifest: Manifest) -> tuple[Field, ...]:
    """The columns that some dumps have: draws, the tail at a temperature, and its entropy."""
    parameters = positions_of(manifest)
    wanted = {DRAWS: parameters.selection.draw_weight, TEMPERED: parameters.temperature, ENTROPY: parameters.tail_entropy}
    return tuple(field for columns, has in wanted.items() if has for field in columns)


def fields(manifest: Manifest) -> tuple[Field, ...]:
    """The columns of a dump's table: FIELDS, DRAWS where its selection draws, TEMPERED where it is calibrated, and ENTROPY."""
    return (*FIELDS, *_more(manifest))


def stored(manifest: Manifest) -> tuple[Field, ...]:
    """The columns of a dump's files."""
    more = (PACKED_DRAWS if field in DRAWS else field for field in _more(manifest))
    return (*FIELDS[:AS_THEY_ARE], *PACKED, *more)


def takes(manifest: Manifest) -> tuple[str, ...]:
    """The names of the arrays that `pack` takes."""
    return ("has_knowledge", *(field.name for field in fields(manifest)))


def row_bytes(manifest: Manifest) -> int:
    """Bytes of a decoded position, by which row groups are cut: all lists of a row group are padded to the longest."""
    rule = positions_of(manifest).selection
    draws = most_above(rule.draw_weight) + 1 if rule.draw_weight else 0
    return max(MIN_ROW_BYTES, 4 * max(rule.candidates, draws))


def exact_steps(arrays: Arrays, manifest: Manifest) -> Arrays:
    """What `encode` rounds to whole steps, each value by itself: those of what is kept lie within half a step of these.

    Args:
        arrays: of N positions with knowledge, what a teacher says or what was kept of it, as those of `encode`.
        manifest: of the dump; gives step and selection.

    Returns:
        float64, in steps, by the name of the array: token_logprob (N,), candidate_logprobs (N, K) and tail_logprob (N,); where
        they are kept tail_logsumexp (N,) and tail_entropy (N,). NaN where nothing is kept. Candidates count from the first,
        which is NaN, the tail is its log-odds, NaN where there are no candidates, and a token that is a candidate is NaN.
    """
    parameters = positions_of(manifest)
    step = parameters.quantisation_step
    token_steps = in_steps(arrays["token_logprob"], step)
    ids, logprobs, tail = (arrays[name] for name in ("candidate_ids", "candidate_logprobs", "tail_logprob"))
    present = logprobs != NO_MASS
    some = present.any(axis=1)
    steps, tail_steps = np.full(logprobs.shape, np.nan), np.full(len(logprobs), np.nan)
    if some.any():
        steps[some], tail_steps[some] = exact_prediction_steps(logprobs[some], tail[some], step)
    token_steps[((ids == arrays["token_id"][:, None]) & present).any(axis=1)] = np.nan
    present[:, :1] = False
    exact = {"token_logprob": token_steps, "candidate_logprobs": np.where(present, steps, np.nan), "tail_logprob": tail_steps}
    for name in _rounded(parameters):
        exact[name] = in_steps(arrays[name], step)
    return exact


def _rounded(parameters: PositionsParameters) -> list[str]:
    """The columns that are rounded to multiples of the step, and stored as these."""
    return [*(["tail_logsumexp"] if parameters.temperature else []), *(["tail_entropy"] if parameters.tail_entropy else [])]


def pack(keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
    """The stored table of N positions.

    Args:
        keys: sequence_id and position, N rows.
        arrays: token_id (N,), is_target (N,), has_knowledge (N,) and, in nats and meaningful where `has_knowledge`:
            token_logprob (N,) (NaN: unknown, where the parameters allow it), candidate_ids (N, K), candidate_logprobs (N, K)
            (−inf: no candidate), tail_logprob (N,); with draws tail_ids (N, M) (−1: no draw); where they are kept
            tail_logsumexp (N,), tail_entropy (N,).
        manifest: of the dump; gives the quantisation step and the columns.

    Raises:
        InputError: candidates and tail do not sum to one, or a token id does not fit the vocabulary.
    """
    kept, parameters = arrays["has_knowledge"], positions_of(manifest)
    logprobs, tail = arrays["candidate_logprobs"][kept], arrays["tail_logprob"][kept]
    if (np.abs(np.log(total_mass(logprobs, tail))) > MAX_EXCESS).any():
        raise InputError("candidates and tail of a position do not sum to one: the extractor is wrong; nothing is written")
    columns = {
        **dict(zip(keys.column_names, keys.columns, strict=True)),
        "token_id": pa.array(arrays["token_id"], pa.uint32()),
        "is_target": pa.array(arrays["is_target"]),
        **pack_predictions(arrays, parameters.quantisation_step, manifest.vocabulary_size, parameters.unknown_tokens),
    }
    if parameters.selection.draw_weight:
        columns["tail_ids"] = pack_draws(arrays["tail_ids"], kept)
    for name in _rounded(parameters):
        columns[name] = pa.array(quantise(arrays[name], parameters.quantisation_step), mask=~kept)
    schema = POSITIONS.stored_schema(manifest)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def unpack(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The table that a stored one stands for. ValueError: it stands for none."""
    parameters = positions_of(manifest)
    columns = unpack_predictions(table, parameters.quantisation_step, manifest.vocabulary_size, parameters.unknown_tokens)
    if "tail_ids" in table.column_names:
        columns["tail_ids"] = unpack_draws(table["tail_ids"])
    schema = POSITIONS.schema(manifest)
    return pa.table(
        [columns[field.name].cast(field.type) if field.name in columns else table[field.name] for field in schema],
        schema=schema,
    )


def view(manifest: Manifest) -> str:
    """`unpack` as SQL."""
    more = [field.name for field in _more(manifest)]
    return predictions_view(more, positions_of(manifest).quantisation_step, manifest.vocabulary_size)


def decode(table: pa.Table, manifest: Manifest) -> Arrays:
    """Positions as arrays of N rows.

    Returns:
        input_ids int64 (N,), is_target bool (N,), has_knowledge bool (N,), token_logprob float32 (N,), candidate_ids
        int64 (N, K), candidate_logprobs float32 (N, K), tail_logprob float32 (N,). Without knowledge, and where there are no
        candidates, all mass is in the tail. A token_logprob that is unknown is NaN. With draws also tail_ids int64 (N, M) and
        draw_weight float32 (N,); where they are kept tail_logsumexp float32 (N,) and tail_entropy float32 (N,).

    Raises:
        ValueError: what cannot be missing is.
    """
    for name in ("token_id", "is_target"):
        if table[name].null_count:
            raise ValueError(f"{name} is null")
    more = {}
    if "tail_ids" in table.column_names:
        more["tail_ids"], _ = padded_lists(table["tail_ids"], NO_TOKEN, np.int64)
        weight = positions_of(manifest).selection.draw_weight
        more["draw_weight"] = np.where(table["candidate_ids"].is_valid().to_numpy(), weight, 0).astype(np.float32)
    for name in ("tail_logsumexp", "tail_entropy"):
        if name in table.column_names:
            more[name] = table[name].fill_null(0).to_numpy()
    kept = table["candidate_ids"].is_valid().to_numpy()
    token_logprob = table["token_logprob"].fill_null(0).to_numpy()
    unknown = kept & ~table["token_logprob"].is_valid().to_numpy()
    return {
        "input_ids": table["token_id"].to_numpy().astype(np.int64),
        "is_target": table["is_target"].to_numpy(),
        "has_knowledge": kept,
        "token_logprob": np.where(unknown, np.float32(np.nan), token_logprob) if unknown.any() else token_logprob,
        "candidate_ids": padded_lists(table["candidate_ids"], 0, np.int64)[0],
        "candidate_logprobs": padded_lists(table["candidate_logprobs"], NO_MASS, np.float32)[0],
        "tail_logprob": table["tail_logprob"].fill_null(0).to_numpy(),
        **more,
    }


def arrays_of(manifest: Manifest) -> dict[str, float]:
    """The arrays that `decode` gives of a dump's positions, and what stands where there is no position."""
    parameters = positions_of(manifest)
    draws = {"tail_ids": NO_TOKEN, "draw_weight": 0} if parameters.selection.draw_weight else {}
    return {**dict.fromkeys(DECODED, 0), "candidate_logprobs": NO_MASS, **draws, **dict.fromkeys(_rounded(parameters), 0)}


def measure(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """How many positions have knowledge, and over them the mean mass of the candidates, the teacher's mean negative
    log-likelihood (nats per token) where that of each token is known and, where each position has some, how often the first
    of them is the token that stands there."""
    arrays = decode(table, manifest)
    kept = arrays["has_knowledge"]

    def mean(values: np.ndarray) -> float:
        return float(values.mean(dtype=np.float64)) if len(values) else 0.0

    statistics = {
        "predictions": int(kept.sum()),
        "mean_top_k_mass": mean(np.exp(arrays["candidate_logprobs"][kept].astype(np.float64)).sum(axis=1)),
    }
    if knows_tokens(manifest):
        statistics["mean_nll"] = mean(-arrays["token_logprob"][kept])
    if not knows_likeliest(manifest):
        return statistics
    return {**statistics, "mean_top_1_accuracy": mean(arrays["candidate_ids"][kept][:, :1] == arrays["input_ids"][kept, None])}


def damage(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a table of positions, or with a part of one: its invariants, in words."""
    parameters = positions_of(manifest)
    step, unknown = parameters.quantisation_step, parameters.unknown_tokens
    return invariants(table, parameters.selection, step, manifest.vocabulary_size, unknown)


def checks(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the positions of some sequences: whether they are of these sequences, and their invariants."""
    yield from tokens_match(table, sequences)
    yield from damage(table, manifest)


def lines(manifest: Manifest, totals: Totals) -> list[tuple[str, str]]:
    """What `info` tells of a dump's positions."""
    parameters, dense = positions_of(manifest), _dense_bytes(manifest, totals)
    step, context = parameters.quantisation_step, parameters.keep_context
    listed = [("selection", f"{_selection(manifest)}, log-probabilities in steps of {step} nats")]
    which = ", of targets and of context; the means below are over both" if context else ""
    listed.append(("predictions", f"{totals.count('predictions'):,} positions with knowledge{which}"))
    if (mass := totals.statistics.get("mean_top_k_mass")) is not None:
        listed.append(("mass of the candidates", f"{mass:.4f} on average"))
    if (nll := totals.statistics.get("mean_nll")) is not None:
        listed.append(("teacher's own loss", f"{nll:.4f} nats a token (perplexity {math.exp(nll):.2f})"))
    elif not knows_tokens(manifest):
        listed.append(("teacher's own loss", "unknown: tokens that are no candidate have no log-probability"))
    if dense:
        listed.append(("kept whole (float32)", f"{byte_size(dense)}: {dense / totals.bytes:,.0f} times as much"))
    return listed


def comparison(one: Manifest, other: Manifest) -> dict[str, str]:
    """How the selections of two dumps differ, in a sentence."""
    first, second = (positions_of(manifest).selection for manifest in (one, other))
    return {} if first == second else {"selection": difference(one.dump, first, other.dump, second)}


def facts(manifest: Manifest, totals: Totals) -> dict[str, str | float | int | None]:
    """What the relation `dumps` has of them: how they were selected, and what the log-probabilities that were not kept would
    take (predictions × vocabulary × 4 bytes), also for each byte on disk."""
    dense = _dense_bytes(manifest, totals)
    return {
        "selection": _selection(manifest),
        "draw_weight": positions_of(manifest).selection.draw_weight or None,
        "quantisation_step": float(positions_of(manifest).quantisation_step),
        "dense_bytes": dense,
        "ratio": dense / totals.bytes if totals.bytes else None,
    }


def _dense_bytes(manifest: Manifest, totals: Totals) -> int:
    return min(totals.count("predictions") * manifest.vocabulary_size * DENSE_BYTES, 2**63 - 1)


def _selection(manifest: Manifest) -> str:
    kept = positions_of(manifest)
    at = f", tail also at temperature {kept.temperature:g}" if kept.temperature else ""
    rest = ", tail as the remainder" if kept.tail == "remainder" else ""
    return f"{kept.selection}{at}{rest}"


POSITIONS = Kind(
    name="positions",
    per="position",
    fields=fields,
    parameters=PositionsParameters,
    codec=Codec(
        takes=takes,
        stored=stored,
        pack=pack,
        unpack=unpack,
        view=view,
        sources=SOURCES,
        decode=decode,
        arrays=arrays_of,
    ),
    row_bytes=row_bytes,
    statistics={"predictions": None, **dict.fromkeys(("mean_nll", "mean_top_k_mass", "mean_top_1_accuracy"), "predictions")},
    measure=measure,
    checks=checks,
    relations={"positions": lambda manifest: positions_relation(positions_of(manifest).tail_entropy), **RELATIONS},
    target="is_target",
    repeated=EACH_CANDIDATE,
    lines=lines,
    comparison=comparison,
    facts=facts,
    of_text=("input_ids", "is_target"),
    show=show,
)
