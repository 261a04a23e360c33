"""Kinds of knowledge shaped like those to come, and knowledge of them made of random numbers: for the contract of kinds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from stores import DRAW_WEIGHT, drawn_sequences, knowledge_of, random_sequences, with_draws

from knowledge_store import KINDS, Field, Kind, KnowledgeStore
from knowledge_store.format.parquet import TEXT
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.field import PLAIN, SPLIT
from knowledge_store.kinds.hidden import HIDDEN as HIDDEN_STATES
from knowledge_store.kinds.positions import POSITIONS
from knowledge_store.kinds.positions.selection import Selection
from knowledge_store.kinds.saliency import MAX_STEPS, SALIENCY
from knowledge_store.kinds.vectors import VECTORS

HIDDEN = 576
WIDTH = 50


@dataclass(frozen=True)
class LayerParameters:
    """Of hidden states: which layer they are of."""

    layer: int = 0

    def to_record(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"layer": self.layer}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> LayerParameters:
        """ValueError: it is none."""
        if record.keys() != {"layer"} or not isinstance(record["layer"], int):
            raise ValueError("it names no layer")
        return cls(record["layer"])


def shares(table: pa.Table, sequences: pa.Table, manifest: Any) -> Iterator[str]:
    """An invariant: scores lie between 0 and 1."""
    values = table["rationale_scores"].combine_chunks().flatten().to_numpy()
    if ((values < 0) | (values > 1)).any():
        yield "a score is not between 0 and 1"


def finite(table: pa.Table, sequences: pa.Table, manifest: Any) -> Iterator[str]:
    """An invariant: there is no infinity."""
    if not np.isfinite(table["state"].combine_chunks().flatten().to_numpy()).all():
        yield "a state is not finite"


def not_empty(table: pa.Table, sequences: pa.Table, manifest: Any) -> Iterator[str]:
    """An invariant: a completion is not empty."""
    if "" in table["completion"].to_pylist():
        yield "a completion is empty"


def differing(table: pa.Table, sequences: pa.Table, manifest: Any) -> Iterator[str]:
    """An invariant: both texts of a pair are not the same."""
    if any(one == other for one, other in zip(table["chosen"].to_pylist(), table["rejected"].to_pylist(), strict=True)):
        yield "both texts of a pair are the same"


def explanations(per: str) -> Kind:
    """Tokens that explain, each with a score: ragged, per position or per sequence."""
    return Kind(
        name="explanations",
        per=per,  # type: ignore[arg-type]
        fields=lambda manifest: (
            Field("rationale_ids", pa.uint32(), "ragged", padding=7, encoding=PLAIN),
            Field("rationale_scores", pa.float32(), "ragged", padding=-1.0, encoding=SPLIT),
        ),
        statistics={"scores": None, "mean_score": "scores"},
        measure=lambda table, manifest: scores(table),
        checks=shares,
        relations={
            "explained": "SELECT {dump} AS dump, sequence_id, unnest(rationale_ids) AS token_id FROM {rows}",
            "described": "SELECT {dump} AS dump, {'ids': rationale_ids, 'inner': {'x': 1}} AS pair, '{x}' AS text FROM {rows}",
        },
        lines=lambda manifest, totals: [("scores of explanations", f"{totals.count('scores')}")],
    )


def scores(table: pa.Table) -> dict[str, float]:
    """Statistics of explanations."""
    values = table["rationale_scores"].combine_chunks().flatten().to_numpy()
    return {"scores": len(values), "mean_score": float(values.mean(dtype=np.float64)) if len(values) else 0.0}


STATES = Kind(
    name="states",
    per="position",
    fields=lambda manifest: (Field("state", pa.float16(), HIDDEN, padding=-1, encoding=SPLIT, level=1, infinite=True),),
    parameters=LayerParameters,
    checks=finite,
)

COMPLETIONS = Kind(
    name="completions",
    per="item",
    fields=lambda manifest: (
        Field("completion", pa.string(), encoding=TEXT),
        Field("score", pa.float64(), nullable=True, padding=-2.5),
        Field("words", pa.string(), "ragged"),
        Field("token_ids", pa.int64(), "ragged", padding=-5),
    ),
    checks=not_empty,
    statistics={"mean_length": "rows"},
    measure=lambda table, manifest: {"mean_length": float(np.mean([len(each) for each in table["completion"].to_pylist()]))},
)


def notes(per: str) -> Kind:
    """Vectors and words of a fixed width that stand at some rows and are null at others. A sequence's fill a row group."""
    return Kind(
        name="notes",
        per=per,  # type: ignore[arg-type]
        fields=lambda manifest: (
            Field("vector", pa.float32(), WIDTH, nullable=True, padding=-3.5),
            Field("count", pa.int16(), WIDTH, nullable=True, padding=-7),
            Field("pair", pa.string(), 2, nullable=True),
        ),
        checks=positive,
    )


def positive(table: pa.Table, sequences: pa.Table, manifest: Any) -> Iterator[str]:
    """An invariant: a count is not below 0."""
    values = table["count"].combine_chunks().flatten().to_numpy()
    if (values < 0).any():
        yield "a count is below 0"


PREFERENCES = Kind(
    name="preferences",
    per="sequence",
    fields=lambda manifest: (
        Field("chosen", pa.string(), encoding=TEXT),
        Field("rejected", pa.string(), nullable=True, encoding=TEXT),
        Field("margin", pa.float64()),
    ),
    checks=differing,
)


def rationale_rows(random: np.random.Generator, count: int) -> Arrays:
    """Explanations of so many rows, 0 to 6 tokens each."""
    lengths = random.integers(0, 7, count)
    return {
        "rationale_ids": [random.integers(0, 11, length) for length in lengths],
        "rationale_scores": [random.random(length).astype(np.float32) for length in lengths],
    }


def state_rows(random: np.random.Generator, count: int) -> Arrays:
    """Hidden states of so many positions."""
    return {"state": random.normal(0, 2, (count, HIDDEN)).astype(np.float16)}


def completion_rows(random: np.random.Generator, count: int) -> Arrays:
    """0 to 3 completions, whatever the count."""
    items = int(random.integers(0, 4))
    words = [[f"w{word}" for word in random.integers(0, 9, random.integers(1, 5))] for _ in range(items)]
    return {
        "completion": [" ".join(each) + " ☃" for each in words],
        "score": np.ma.masked_array(random.random(items), np.arange(items) == 1),
        "words": words,
        "token_ids": [np.arange(len(each)) for each in words],
    }


def note_rows(random: np.random.Generator, count: int) -> Arrays:
    """Notes of so many rows; every second sequence has none at all, another is null in its first row."""
    absent = np.zeros(count, bool)
    absent[: count if random.random() < 0.5 else 1] = True
    masked = np.repeat(absent[:, None], WIDTH, axis=1)
    return {
        "vector": np.ma.masked_array(random.normal(0, 2, (count, WIDTH)).astype(np.float32), masked),
        "count": np.ma.masked_array(random.integers(0, 99, (count, WIDTH)).astype(np.int16), masked),
        "pair": [None if null else ["yes", f"no {row}"] for row, null in enumerate(absent)],
    }


def lower_a_count(arrays: Arrays) -> None:
    """A count falls below 0, where there is one."""
    if len(arrays["count"]):
        arrays["count"][-1] = -1


def preference_rows(random: np.random.Generator, count: int) -> Arrays:
    """One pair."""
    number = int(random.integers(0, 10**6))
    return {"chosen": [f"yes {number}\n"], "rejected": [None if number % 3 == 0 else "no"], "margin": random.random(1)}


@dataclass(frozen=True)
class Case:
    """A kind to hold to the contract.

    Attributes:
        kind: the kind.
        parameters: their record; for positions what `make_manifest` takes.
        rows: a sequence's arrays, from a generator and the number of its tokens; None for positions, whose arrays the
            sequences are made of.
        break_invariant: alters the arrays of one sequence so that they break what `checks` asks; says so in `complaint`.
        sequences: of a shard, from its seed.
    """

    kind: Kind
    complaint: str
    break_invariant: Callable[[Arrays], None]
    rows: Callable[[np.random.Generator, int], Arrays] | None = None
    parameters: dict[str, Any] | None = None
    sequences: Callable[[int, int], list[Arrays]] = random_sequences


def alter(name: str, value: Any) -> Callable[[Arrays], None]:
    """Set the first row of an array that has one."""

    def change(arrays: Arrays) -> None:
        if len(arrays[name]):
            arrays[name][0] = value

    return change


def prefer_the_same(arrays: Arrays) -> None:
    """Both texts of a pair become one."""
    arrays["rejected"] = arrays["chosen"]


def lose_a_target(arrays: Arrays) -> None:
    """The number of targets is no longer that of `sequences`."""
    arrays["is_target"][-1] = False


def nucleus(seed: int, count: int) -> list[Arrays]:
    """Of top-p 0.5, at most 3 candidates, with draws and the entropy of tails."""
    found = random_sequences(seed, count)
    for arrays in found:
        likely = np.exp(arrays["candidate_logprobs"].astype(np.float64))
        dropped = likely.cumsum(axis=1) - likely >= 0.5
        tail = np.exp(arrays["tail_logprob"].astype(np.float64)) + np.where(dropped, likely, 0).sum(axis=1)
        arrays["tail_logprob"] = np.log(tail).astype(np.float32)
        arrays["candidate_logprobs"][dropped] = -np.inf
        arrays["tail_entropy"] = np.minimum(-arrays["tail_logprob"], 1)
    return [with_draws(arrays) for arrays in found]


def above(seed: int, count: int) -> list[Arrays]:
    """Of a threshold of 0.4: at most positions no candidate."""
    found = random_sequences(seed, count, k=2)
    for arrays in found:
        likely = np.exp(arrays["candidate_logprobs"].astype(np.float64))
        dropped = likely < 0.4
        tail = np.exp(arrays["tail_logprob"].astype(np.float64)) + np.where(dropped, likely, 0).sum(axis=1)
        arrays["tail_logprob"] = np.log(tail).astype(np.float32)
        arrays["candidate_logprobs"][dropped] = -np.inf
    return [with_draws(arrays, weight=0.4) for arrays in found]


def answered(count: int) -> np.ndarray:
    """Targets of a sequence with so many tokens, bool (count,): its second half, without the last of four or more."""
    places = np.arange(count)
    return (places >= count // 2) & (places < count - (count > 3))


def answers(seed: int, count: int) -> list[Arrays]:
    """Sequences with a context, whose targets are `answered`."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 10, count).tolist()
    return [
        knowledge_of(random.integers(0, 11, length), random.normal(0, 2, (length, 11)), 3, answered(length))
        for length in lengths
    ]


def saliency_rows(random: np.random.Generator, count: int) -> Arrays:
    """Shares of the context before the last target, as they are kept; now and then there are none."""
    context = ~answered(count) & (np.arange(count) < np.flatnonzero(answered(count))[-1])
    steps = np.where(context, random.integers(0, MAX_STEPS, count), 0) * (random.random() < 0.9)
    if steps.any():
        steps[steps.argmax()] = MAX_STEPS
    step_share = np.float32(1 / steps.sum()) if steps.any() else np.float32(0)
    return {"share": np.ma.masked_array((steps * np.float64(step_share)).astype(np.float32), ~context)}


def share_at_a_target(arrays: Arrays) -> None:
    """Something stands where the last target is."""
    arrays["share"][-1] = 1.0


def quantised(random: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Rows of numbers that 8 bits keep to the last digit: whole steps of powers of two."""
    steps = random.integers(-127, 128, (count, width))
    steps[:, ::64] = 127
    return (steps * 2.0 ** random.integers(-4, 5, (count, 1))).astype(np.float32)


def vector_rows(random: np.random.Generator, count: int) -> Arrays:
    """One vector; a width that is no multiple of a group's."""
    return {"vector": quantised(random, 1, 70)}


def lose_the_vector(arrays: Arrays) -> None:
    """A sequence with targets has none."""
    arrays["vector"] = [None]


def hidden_rows(random: np.random.Generator, count: int) -> Arrays:
    """States of two layers of 70 values before each target, which both precisions keep to the last digit."""
    before = np.append(answered(count)[1:], False)
    states = quantised(random, 2 * count, 70).reshape(count, 140)
    return {"hidden": [state if here else None for state, here in zip(states, before, strict=True)]}


def lose_a_state(arrays: Arrays) -> None:
    """A target is predicted from nothing that is kept."""
    arrays["hidden"] = [None] * len(arrays["hidden"])


TARGETS = "sequence 0 does not have"
CASES = {
    "positions": Case(POSITIONS, TARGETS, lose_a_target, parameters={}),
    "positions, drawn and tempered": Case(
        POSITIONS,
        TARGETS,
        lose_a_target,
        parameters={
            "selection": Selection("top-k", 3, DRAW_WEIGHT).to_record(),
            "calibration": {"temperature": 2.0, "sha256": "00"},
            "quantisation_step": 0.25,
        },
        sequences=drawn_sequences,
    ),
    "positions, top-p": Case(
        POSITIONS,
        TARGETS,
        lose_a_target,
        parameters={"selection": Selection("top-p", 3, DRAW_WEIGHT, p=0.5).to_record(), "tail_entropy": True},
        sequences=nucleus,
    ),
    "positions, threshold": Case(
        POSITIONS,
        TARGETS,
        lose_a_target,
        parameters={"selection": Selection.threshold(0.4).to_record()},
        sequences=above,
    ),
    "saliency": Case(
        SALIENCY,
        "a share behind its last target",
        share_at_a_target,
        saliency_rows,
        {"method": "gradient-norm", "of": "gold"},
        answers,
    ),
    "vectors": Case(
        VECTORS,
        "has no vector",
        lose_the_vector,
        vector_rows,
        {"layer": -1, "pooling": "mean", "over": "targets"},
        answers,
    ),
    **{
        f"hidden, {precision}": Case(
            HIDDEN_STATES,
            "hidden states where its targets are predicted from",
            lose_a_state,
            hidden_rows,
            {"layers": [0, -1], "where": "targets", "every": 1, "precision": precision},
            answers,
        )
        for precision in ("int8", "float16")
    },
    "explanations of positions": Case(
        explanations("position"), "a score is not between", alter("rationale_scores", [2.0]), rationale_rows
    ),
    "explanations of sequences": Case(
        explanations("sequence"),
        "a score is not between",
        alter("rationale_scores", [2.0]),
        lambda random, count: rationale_rows(random, 1),
    ),
    "states": Case(STATES, "a state is not finite", alter("state", np.inf), state_rows, {"layer": 3}),
    "completions": Case(COMPLETIONS, "a completion is empty", alter("completion", ""), completion_rows),
    "notes of positions": Case(notes("position"), "a count is below 0", lower_a_count, note_rows),
    "notes of items": Case(
        notes("item"), "a count is below 0", lower_a_count, lambda random, count: note_rows(random, int(random.integers(0, 4)))
    ),
    "preferences": Case(PREFERENCES, "both texts", prefer_the_same, preference_rows),
}  # fmt: skip


def fingerprint(opened: KnowledgeStore) -> str:
    """A hash of all that batches have."""
    found = hashlib.sha256()
    for batch in opened.batches(batch_size=3, seed=4):
        for name, array in batch.items():
            found.update(name.encode())
            found.update(repr(array).encode() if isinstance(array, list) else array.tobytes() + str(array.shape).encode())
    return found.hexdigest()


def print_fingerprint(name: str, store: str) -> None:
    """Print that of a store of the case `name`."""
    kind = CASES[name].kind
    KINDS[kind.name] = kind
    print(fingerprint(KnowledgeStore.open(store)), flush=True)
