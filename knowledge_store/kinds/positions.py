"""The first kind of knowledge: what the teacher predicted at each position, as its likeliest tokens and the tail they leave.

Position t describes the prediction *of* token t, made from the tokens before it. Log-probabilities are natural logs over the
full vocabulary at temperature 1, rounded in steps as `packing` says. The tail is a rounded value of its own: derived from
rounded candidates instead, it would carry twenty times the error.

A selection with draws adds `tail_ids` and `tail_counts`: which tokens outside the candidates were drawn, and how often each. A
calibrated dump adds `tail_logsumexp`, from which every log-probability at the calibration's temperature T follows: they are
the log-softmax of candidates / T and of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.records import check_shape
from knowledge_store.kinds import packing
from knowledge_store.kinds.kind import Arrays, Kind, Packing, list_offsets, padded_lists
from knowledge_store.kinds.selection import Selection

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
DRAWS = {"tail_ids": pa.list_(pa.field("element", pa.uint32())), "tail_counts": pa.list_(pa.field("element", pa.uint16()))}
TEMPERED = {"tail_logsumexp": pa.float32()}

NO_MASS = -np.inf
MIN_STEP, MAX_STEP = 2.0**-24, 2.0**10  # nats; beyond these nothing can be computed with
MAX_STEPS = packing.MAX_STEPS
MAX_EXCESS = 1e-3  # nats by which a teacher's float32 candidates and tail may miss one together

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


@dataclass(frozen=True)
class PositionsParameters:
    """What decides what is kept of each prediction.

    Attributes:
        selection: the rule that picks it.
        quantisation_step: nats; what log-probabilities are rounded in.
        calibration: `temperature` at which the tail is kept too, and `sha256` of the calibration; empty for none.
        keep_context: whether predictions of context positions (prompts) are kept too.
    """

    selection: Selection = field(default_factory=Selection)
    quantisation_step: float = 1 / 8
    calibration: dict[str, Any] = field(default_factory=dict)
    keep_context: bool = False

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
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PositionsParameters:
        """The parameters of a manifest.

        Raises:
            ValueError: they are none.
        """
        shape = {"selection": {"name": str}, "quantisation_step": int | float, "calibration": {}, "keep_context": bool}
        check_shape(record, shape, "positions")
        step, calibration = record["quantisation_step"], record["calibration"]
        if not MIN_STEP <= step <= MAX_STEP:
            raise ValueError(f"its quantisation step is not between {MIN_STEP} and {MAX_STEP}")
        check_shape(calibration, {"temperature": int | float, "sha256": str} if calibration else {}, "its calibration")
        if not calibration.get("temperature", 1) > 0:
            raise ValueError("its calibration's temperature is not above zero")
        return cls(Selection.from_record(record["selection"]), step, calibration, record["keep_context"])


def positions_of(manifest: Manifest) -> PositionsParameters:
    """The parameters of a dump's positions.

    Raises:
        InputError: it holds none.
    """
    if "positions" not in manifest.kinds:
        raise InputError(f"dump {manifest.dump!r} holds no knowledge of kind 'positions'")
    return PositionsParameters.from_record(manifest.kinds["positions"])


def schema(manifest: Manifest) -> pa.Schema:
    """The columns of a dump's table: SCHEMA, DRAWS where its selection draws, and TEMPERED where it is calibrated."""
    parameters = positions_of(manifest)
    more = {**(DRAWS if parameters.selection.draws else {}), **(TEMPERED if parameters.temperature else {})}
    return pa.schema([*SCHEMA, *more.items()])


def _in_steps(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Log-probabilities (nats) in steps, what lies more than MAX_STEPS below 0 put there; −inf stays."""
    steps = logprobs.astype(np.float64) / step
    return np.where(np.isneginf(steps), steps, np.maximum(steps, -MAX_STEPS))


def quantise(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Round log-probabilities (nats) to multiples of `step`, as float32; −inf stays, −0 becomes 0.

    What lies more than MAX_STEPS below 0, such as a token whose logit is masked, is put there: its exp is 0 all the same.
    """
    return (np.round(_in_steps(logprobs, step)) * step + 0.0).astype(np.float32)


def exact_steps(arrays: Arrays, manifest: Manifest) -> Arrays:
    """What `encode` rounds to whole steps, each value by itself: those of what is kept lie within half a step of these.

    Args:
        arrays: of N positions with knowledge, what a teacher says or what was kept of it, as those of `encode`.
        manifest: of the dump; gives step and selection.

    Returns:
        float64, in steps, by the name of the array: token_logprob (N,); where there are candidates candidate_logprobs (N, K)
        and tail_logprob (N,); at a temperature tail_logsumexp (N,). NaN where nothing is kept. Candidates count from the first,
        which is NaN, the tail is its log-odds, and a token that is a candidate is NaN.
    """
    parameters = positions_of(manifest)
    step = parameters.quantisation_step
    found = {"token_logprob": _in_steps(arrays["token_logprob"], step)}
    if parameters.selection.candidates:
        ids, logprobs, tail = (arrays[name] for name in ("candidate_ids", "candidate_logprobs", "tail_logprob"))
        there = logprobs != NO_MASS
        steps, tail_steps = packing.exact_steps(logprobs, tail, step)
        among = ((ids == arrays["token_id"][:, None]) & there).any(axis=1)
        found["token_logprob"][among] = np.nan
        there[:, 0] = False
        found |= {"candidate_logprobs": np.where(there, steps, np.nan), "tail_logprob": tail_steps}
    if parameters.temperature:
        found["tail_logsumexp"] = _in_steps(arrays["tail_logsumexp"], step)
    return found


def encode(keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
    """The table of N positions.

    Args:
        keys: sequence_id and position, N rows.
        arrays: token_id (N,), is_target (N,), has_knowledge (N,) and, in nats and meaningful where `has_knowledge`:
            token_logprob (N,), candidate_ids (N, K), candidate_logprobs (N, K) (−inf: no candidate), tail_logprob (N,); with
            draws tail_ids (N, M) and tail_counts (N, M) (0: none); at a temperature tail_logsumexp (N,).
        manifest: of the dump; gives the quantisation step and the columns.

    Raises:
        InputError: candidates and tail do not sum to one.
    """
    kept = arrays["has_knowledge"]
    parameters = positions_of(manifest)
    step, rule = parameters.quantisation_step, parameters.selection
    absent = pa.array(~kept)

    def lists(there: np.ndarray, **values: np.ndarray) -> dict[str, pa.Array]:
        """Of arrays (N, K), the entries that are there, as one list a row."""
        there = there & kept[:, None]
        offsets = list_offsets(there.sum(axis=1))
        return {name: pa.ListArray.from_arrays(offsets, pa.array(each[there]), mask=absent) for name, each in values.items()}

    logprobs, tail = arrays["candidate_logprobs"], arrays["tail_logprob"]
    there, token_logprob = logprobs != NO_MASS, quantise(arrays["token_logprob"], step)
    if rule.candidates and (np.abs(np.log(_total_mass(logprobs[kept], tail[kept]))) > MAX_EXCESS).any():
        raise InputError("candidates and tail of a position do not sum to one: the extractor is wrong; nothing is written")
    logprobs, tail = logprobs.astype(np.float32), tail.astype(np.float32)
    logprobs[kept], tail[kept] = packing.rounded(logprobs[kept], tail[kept], step)
    among = (arrays["candidate_ids"] == arrays["token_id"][:, None]) & there
    token_logprob = np.where(among.any(axis=1), np.where(among, logprobs, 0).sum(axis=1), token_logprob)
    # Where nothing is a candidate there is no tail either: the draws are from the whole distribution.
    no_tail = ~kept if rule.candidates else np.ones_like(kept)
    columns = {
        **lists(there, candidate_ids=arrays["candidate_ids"], candidate_logprobs=logprobs),
        "token_id": pa.array(arrays["token_id"], pa.uint32()),
        "is_target": pa.array(arrays["is_target"]),
        "token_logprob": pa.array(token_logprob, mask=~kept),
        "tail_logprob": pa.array(tail, mask=no_tail),
    }
    if rule.draws:
        counts = arrays["tail_counts"]
        columns |= lists(counts > 0, tail_ids=arrays["tail_ids"], tail_counts=counts)
    if parameters.temperature:
        columns["tail_logsumexp"] = pa.array(quantise(arrays["tail_logsumexp"], step), mask=~kept)
    wanted = schema(manifest)
    return pa.table(
        [keys[each.name] if each.name in keys.column_names else columns[each.name].cast(each.type) for each in wanted],
        schema=wanted,
    )


def _total_mass(candidate_logprobs: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Σ exp(candidates) + exp(tail) for each row, in float64."""
    return np.exp(candidate_logprobs.astype(np.float64)).sum(axis=1) + np.exp(tail_logprob.astype(np.float64))


def decode(table: pa.Table) -> Arrays:
    """Positions as arrays of N rows, with candidates and tail normalised to sum to one (rounding left them near it).

    Returns:
        input_ids int64 (N,), is_target bool (N,), has_knowledge bool (N,), token_logprob float32 (N,), candidate_ids
        int64 (N, K), candidate_logprobs float32 (N, K), tail_logprob float32 (N,). Without knowledge, and where there are no
        candidates, all mass is in the tail. With draws also tail_ids int64 (N, M) and tail_counts int64 (N, M); in a calibrated
        dump tail_logsumexp float32 (N,).

    Raises:
        ValueError: what cannot be missing is, or log-probabilities are none.
    """
    for name in ("token_id", "is_target"):
        if table[name].null_count:
            raise ValueError(f"{name} is null")
    kept = table["candidate_ids"].is_valid().to_numpy()
    candidate_ids, _ = padded_lists(table["candidate_ids"], 0, np.int64)
    candidate_logprobs, _ = padded_lists(table["candidate_logprobs"], NO_MASS, np.float32)
    tail_logprob = table["tail_logprob"].fill_null(0).to_numpy()
    with np.errstate(all="ignore"):
        excess = np.log(_total_mass(candidate_logprobs, tail_logprob))
    if not np.isfinite(excess).all():
        raise ValueError("candidates and tail are no probabilities")
    more = {}
    if "tail_ids" in table.column_names:
        more["tail_ids"], _ = padded_lists(table["tail_ids"], 0, np.int64)
        more["tail_counts"], _ = padded_lists(table["tail_counts"], 0, np.int64)
    if "tail_logsumexp" in table.column_names:
        more["tail_logsumexp"] = table["tail_logsumexp"].fill_null(0).to_numpy()
    return {
        "input_ids": table["token_id"].to_numpy().astype(np.int64),
        "is_target": table["is_target"].to_numpy(),
        "has_knowledge": kept,
        "token_logprob": table["token_logprob"].fill_null(0).to_numpy(),
        "candidate_ids": candidate_ids,
        "candidate_logprobs": (candidate_logprobs - excess[:, None]).astype(np.float32),
        "tail_logprob": (tail_logprob - excess).astype(np.float32),
        **more,
    }


PADDING = {"candidate_logprobs": NO_MASS}


def statistics(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """Over the positions with knowledge: how many, the teacher's mean negative log-likelihood (nats per token) and, where
    there are candidates, their mean mass, and how often the first of them is the token that stands there."""
    arrays = decode(table)
    kept = arrays["has_knowledge"]

    def mean(values: np.ndarray) -> float:
        return float(values.mean(dtype=np.float64)) if len(values) else 0.0

    found = {"predictions": int(kept.sum()), "mean_nll": mean(-arrays["token_logprob"][kept])}
    if not positions_of(manifest).selection.candidates:
        return found
    first = arrays["candidate_ids"][kept][:, :1]
    return {
        **found,
        "mean_top_k_mass": mean(np.exp(arrays["candidate_logprobs"][kept].astype(np.float64)).sum(axis=1)),
        "mean_top_1_accuracy": mean(first == arrays["input_ids"][kept, None]),
    }


def damage(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a table of positions: its invariants, in words."""
    parameters, vocabulary = positions_of(manifest), manifest.vocabulary_size
    rule, step = parameters.selection, parameters.quantisation_step
    kept = table["candidate_ids"].is_valid().to_numpy()
    for name in table.column_names[table.column_names.index("token_logprob") :]:
        there = kept if rule.candidates or name != "tail_logprob" else np.zeros_like(kept)
        if not np.array_equal(table[name].is_valid().to_numpy(), there):
            yield f"{name} is null where candidate_ids is not, or the reverse"
            return
    position = table["position"].to_numpy()
    if kept[position == 0].any():
        yield "position 0, which nothing predicts, has candidates"
    if (table["is_target"].to_numpy() & ~kept).any():
        yield "a target has no candidates"

    ids, id_counts = padded_lists(table["candidate_ids"], -1, np.int64)
    logprobs, logprob_counts = padded_lists(table["candidate_logprobs"], NO_MASS, np.float32)
    width = min(rule.candidates, vocabulary)
    least = min(width, 1) if rule.name == "top-p" else width
    counts = id_counts[kept]
    if (counts < least).any() or (counts > width).any() or (logprob_counts[kept] != counts).any():
        yield f"a position does not have {width if least == width else f'{least} to {width}'} candidates"
        return
    if not rule.candidates:
        # Nothing is kept but the token's own log-probability, and the draws.
        ids, logprobs = np.full((len(kept), 1), -1), np.zeros((len(kept), 1), np.float32)
        counts = np.ones_like(counts)
    ids, logprobs = ids[kept], logprobs[kept]
    filled = np.arange(ids.shape[1]) < counts[:, None]
    token_id = table["token_id"].to_numpy()[kept].astype(np.int64)
    token_logprob = table["token_logprob"].to_numpy()[kept]
    tail = table["tail_logprob"].fill_null(NO_MASS).to_numpy()[kept]

    if (table["token_id"].to_numpy() >= vocabulary).any() or (ids >= vocabulary).any():
        yield f"a token id is not below the vocabulary size, {vocabulary}"
    # Each filler is another number below every id.
    distinct = np.where(filled, ids, -1 - np.arange(ids.shape[1]))
    if (np.diff(np.sort(distinct, axis=1), axis=1) == 0).any():
        yield "a token stands twice among the candidates of one position"
    if not (np.isfinite(logprobs[filled]).all() and np.isfinite(token_logprob).all()) or np.isnan(tail).any():
        yield "a log-probability is not a finite number"
        return
    if ((logprobs[:, 1:] > logprobs[:, :-1]) & filled[:, 1:]).any():
        yield "candidates are not sorted, likeliest first"
    if rule.candidates and (np.isneginf(tail) != (counts == vocabulary)).any():
        yield "the tail is empty although candidates are left out, or the reverse"
    values = np.concatenate([logprobs[filled], token_logprob, tail[np.isfinite(tail)]])
    if (values > 0).any():
        yield "a log-probability is above zero"
    if (np.abs(np.log(_total_mass(logprobs, tail))) > 1e-4).any():  # room for float32
        yield "candidates and tail do not sum to one within the rounding"
    among = ids == token_id[:, None]
    if (np.where(among, logprobs, 0).sum(axis=1)[among.any(axis=1)] != token_logprob[among.any(axis=1)]).any():
        yield "token_logprob is not the log-probability of the candidate it equals"
    if "tail_logsumexp" in table.column_names:
        yield from _tempered_damage(table["tail_logsumexp"].to_numpy()[kept], counts == vocabulary, step)
    if rule.draws:
        yield from _draws_damage(table, kept, distinct, counts == vocabulary, rule.draws, vocabulary)


def _tempered_damage(tail_logsumexp: np.ndarray, whole: np.ndarray, step: float) -> Iterator[str]:
    """What is wrong with the tail at the calibration's temperature; `whole`: the candidates are the whole vocabulary."""
    finite = tail_logsumexp[~whole]
    if not np.isfinite(finite).all() or not np.isneginf(tail_logsumexp[whole]).all():
        yield "tail_logsumexp is not a finite number although there is a tail, or the reverse"
    elif (quantise(finite, step) != finite).any():
        yield f"tail_logsumexp is not a multiple of {step}"


def _draws_damage(
    table: pa.Table, kept: np.ndarray, candidates: np.ndarray, whole: np.ndarray, draws: int, vocabulary: int
) -> Iterator[str]:
    """What is wrong with the draws; candidates (N, K) of the N kept positions, fillers below 0; `whole` as above."""
    drawn, id_counts = padded_lists(table["tail_ids"], -1, np.int64)
    counts, count_counts = padded_lists(table["tail_counts"], 0, np.int64)
    if not np.array_equal(id_counts, count_counts):
        yield "tail_ids and tail_counts do not pair up"
        return
    drawn, counts, id_counts = drawn[kept], counts[kept], id_counts[kept]
    filled = np.arange(drawn.shape[1]) < id_counts[:, None]
    if (drawn >= vocabulary).any():
        yield f"a drawn token's id is not below the vocabulary size, {vocabulary}"
    if (counts[filled] < 1).any() or (counts.sum(axis=1) != np.where(whole, 0, draws)).any():
        yield f"a position does not have {draws} draws"
    if ((drawn[:, 1:] <= drawn[:, :-1]) & filled[:, 1:]).any():
        yield "drawn tokens are not in the order of their ids, each once"
    if any(((drawn == candidate[:, None]) & filled).any() for candidate in candidates.T):
        yield "a drawn token is among the candidates"


def pack(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The stored table of a dump's positions (see `packing.pack`)."""
    return packing.pack(table, positions_of(manifest).quantisation_step, manifest.vocabulary_size)


def unpack(stored: pa.Table, logical: pa.Schema, manifest: Manifest) -> pa.Table:
    """The reverse of `pack` (see `packing.unpack`)."""
    return packing.unpack(stored, logical, positions_of(manifest).quantisation_step, manifest.vocabulary_size)


def view(logical: pa.Schema, manifest: Manifest) -> str:
    """`unpack` as SQL (see `packing.view`)."""
    return packing.view(logical, positions_of(manifest).quantisation_step, manifest.vocabulary_size)


POSITIONS = Kind(
    name="positions",
    per="position",
    schema=schema,
    encode=encode,
    decode=decode,
    padding=PADDING,
    statistics=statistics,
    damage=damage,
    relations=RELATIONS,
    parameters=PositionsParameters,
    packing=Packing(
        schema=packing.packed_schema,
        pack=pack,
        unpack=unpack,
        view=view,
        sources=packing.SOURCES,
    ),
)
