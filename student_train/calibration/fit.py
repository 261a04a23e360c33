"""Fitting what corrects an over-confident teacher, from a store alone: the work of `student-train calibrate`.

Two things can be fitted from what a dump keeps, with no model at hand:

* `first`: c of FIRST's rescaling, softmax(P / c) over the probabilities of the candidates (Shum et al. 2024,
  arXiv 2408.12168), on the paper's grid and by its measure, the expected calibration error with 10 bins.
* `temperature`: T of the K candidates and everything else as one more symbol, softmax(log p / T) over K + 1 symbols, by
  negative log-likelihood. A token outside the candidates keeps its share of what lies there. This is no temperature of the
  whole distribution: that one needs Σ p^(1/T) over the tail, which `teacher-dump run --calibration` keeps.

The labels are the tokens that stand in the text, at the positions that count. What is fitted are the predictions that the kind
`positions` keeps, whose columns are known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store import KnowledgeStore
from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from knowledge_store.calibration.file import Calibration
from knowledge_store.calibration.temperature import fit_temperature
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import corpus_column
from knowledge_store.kinds.positions import POSITIONS, positions_of
from knowledge_store.reporter import SILENT, Reporter
from student_train.calibration.configuration import FIT_METHODS
from student_train.evaluation.bootstrap import Interval, bootstrap_calibration_error, bootstrap_interval
from student_train.evaluation.metrics import brier_from_sums, log_sum_exp

MIN_TARGETS = 200
# More say nothing new about one number; they are spread evenly over the sequences.
MAX_TARGETS = 500_000
COARSE_STEP, FINE_STEP = 0.1, 0.02
BATCH = 64


@dataclass(frozen=True)
class Labelled:
    """N targets whose token is known, over S = K + 1 symbols: the candidates, then everything else.

    Attributes:
        logprobs: float64 (N, S), the teacher's; −inf where there is no candidate.
        symbol: int64 (N,), the token's: its place among the candidates, or K.
        share: float64 (N,), log of the token's share of its symbol: 0 for a candidate, NaN where unknown.
        token_logprob: float64 (N,), NaN where unknown. tail_logsumexp: float64 (N,) at the dump's own temperature, or None.
        sequence: int64 (N,).
    """

    logprobs: np.ndarray
    symbol: np.ndarray
    share: np.ndarray
    token_logprob: np.ndarray
    tail_logsumexp: np.ndarray | None
    sequence: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """Whether the token is among the candidates, (N,)."""
        return self.symbol < self.logprobs.shape[1] - 1

    @property
    def correct(self) -> np.ndarray:
        """Whether the token is the likeliest candidate, (N,)."""
        return self.symbol == 0


@dataclass(frozen=True)
class Outcome:
    """How a distribution does on N labelled targets: nll float64 (M,), with M below N where tokens have no probability;
    confidence and brier float64 (N,); correct bool (N,)."""

    nll: np.ndarray
    confidence: np.ndarray
    brier: np.ndarray
    correct: np.ndarray

    def figures(self) -> dict[str, float]:
        """As a calibration records them."""
        return {
            "nll": float(self.nll.mean()),
            **{f"ece_{bins}": expected_calibration_error(self.confidence, self.correct, bins) for bins in (10, 15)},
            "brier": float(self.brier.mean()),
        }


@dataclass(frozen=True)
class StoreFit:
    """A calibration that was fitted to a dump, and how far it can be trusted.

    Attributes:
        calibration: of method `first` or `bucket-temperature`.
        nll, ece_10: 95 % bootstrap intervals of the figures after it, over sequences; NaN where there are too few of them.
        ceiling: of `first`: no confidence comes out above it, however sure the teacher is.
        dump_temperature, dump_figures: the temperature of the whole distribution that the dump was made for, and its figures;
            None where there is none.
        at_edge: whether the search ended where it began to look.
        sampled: whether the dump has more targets than were used.
    """

    calibration: Calibration
    nll: Interval
    ece_10: Interval
    ceiling: float | None
    dump_temperature: float | None
    dump_figures: dict[str, float] | None
    at_edge: bool
    sampled: bool


def calibrate(
    store: KnowledgeStore,
    dump: str | None = None,
    *,
    method: str = "first",
    split: str | None = None,
    reporter: Reporter = SILENT,
) -> StoreFit:
    """Fit a calibration to a dump's teacher, from what the dump keeps.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        method: one of `FIT_METHODS`.
        split: `COLUMN=VALUE`: fit on the sequences whose column of the table `sequences` has that value; None for all.
        reporter: hears of progress.

    Raises:
        InputError: the dump has no candidates, no such column or value, or no target there.
    """
    if method not in FIT_METHODS:
        raise InputError(f"there is no method {method!r}: choose {' or '.join(FIT_METHODS)}")
    name = store.dump(dump)
    manifest = store.manifest(name)
    kept = positions_of(manifest)
    if not kept.selection.candidates:
        raise InputError(f"the dump {name} has no candidates ({kept.selection}): there is nothing to re-calibrate")
    if method != "first" and kept.unknown_tokens:
        raise InputError(
            f"the method {method} needs the teacher's log-probability of each token, and the dump {name} does not know it of"
            " tokens that are no candidate: fit the method first, or a dump that the teacher itself was asked for"
        )
    table = store.sequences(name)
    ordinals = np.arange(len(table)) if split is None else split_rows(table, name, split)
    labelled, sampled = _labelled(store, name, table, ordinals, reporter)
    fitted: dict[str, Any] = {"dump": name, "corpus": manifest.corpus.get("files", [])}
    if split is not None:
        fitted |= dict(zip(("column", "value"), split.split("=", 1), strict=True))
    facts = {"teacher": manifest.teacher, "tokenizer": manifest.tokenizer, "fitted_on": fitted, "targets": len(labelled.symbol)}
    if method == "first":
        calibration, after, at_edge = _fit_first(labelled, facts)
        groups = labelled.sequence[labelled.covered]
    else:
        calibration, after, at_edge = _fit_bucket(labelled, facts)
        groups = labelled.sequence
    dump_figures = None
    if kept.temperature is not None and labelled.tail_logsumexp is not None:
        dump_figures = at_dump_temperature(labelled, kept.temperature).figures()
    width = labelled.logprobs.shape[1] - 1
    return StoreFit(
        calibration=calibration,
        nll=bootstrap_interval(after.nll, groups=groups),
        ece_10=bootstrap_calibration_error(after.confidence, after.correct, 10, groups=labelled.sequence),
        ceiling=first_ceiling(calibration.c, width) if method == "first" else None,
        dump_temperature=None if dump_figures is None else kept.temperature,
        dump_figures=dump_figures,
        at_edge=at_edge,
        sampled=sampled,
    )


def split_rows(table: pa.Table, dump: str, split: str) -> np.ndarray:
    """Which rows of a dump's `sequences` a split `COLUMN=VALUE` means, int64.

    Raises:
        InputError: it is not shaped so, or there is no such column, or no such value in it.
    """
    column, equals, value = split.partition("=")
    if not (column and equals and value):
        raise InputError(f"--split is {split!r}; it must be COLUMN=VALUE, such as split=calibration")
    name = column if column in table.column_names else corpus_column(column)
    if name not in table.column_names:
        raise InputError(f"the sequences of {dump} have no column {column!r}: they have {', '.join(table.column_names)}")
    values = table[name]
    try:
        scalar = pa.scalar(value).cast(values.type)
    except pa.ArrowInvalid:
        scalar = None
    rows = np.flatnonzero(pc.equal(values, scalar).fill_null(False).to_numpy()) if scalar is not None else np.empty(0, np.int64)
    if not len(rows):
        existing = sorted(map(str, pc.unique(values).drop_null().slice(0, 1000).to_pylist()))
        more = " …" if len(existing) > 8 else ""
        raise InputError(
            f"no sequence of {dump} has {column}={value}: its values are {', '.join(existing[:8]) or 'null'}{more}"
        )
    return rows


def _labelled(
    store: KnowledgeStore, dump: str, table: pa.Table, ordinals: np.ndarray, reporter: Reporter
) -> tuple[Labelled, bool]:
    """The targets of some sequences, and whether there are more of them than are taken."""
    targets = table["targets"].to_numpy()
    ordinals = ordinals[targets[ordinals] > 0]
    total = int(targets[ordinals].sum())
    if not total:
        raise InputError(f"the chosen sequences of {dump} have no target positions to fit a calibration on")
    if total > MAX_TARGETS:
        places = np.linspace(0, len(ordinals) - 1, max(1, len(ordinals) * MAX_TARGETS // total))
        ordinals = ordinals[np.unique(places.round().astype(np.int64))]
    parts: list[dict[str, np.ndarray]] = []
    with reporter.progress("reading the store", int(targets[ordinals].sum()), "targets") as advance:
        for batch in store.batches(dump, BATCH, ordinals=ordinals, shuffle=False, kinds=(POSITIONS.name,)):
            chosen = batch["is_target"]
            names = ("input_ids", "token_logprob", "candidate_ids", "candidate_logprobs", "tail_logprob")
            part = {name: batch[name][chosen] for name in (*names, "tail_logsumexp") if name in batch}
            part["sequence"] = np.repeat(batch["sequence_id"], chosen.sum(axis=1))
            parts.append(part)
            advance(len(part["sequence"]))
    width = max(part["candidate_ids"].shape[1] for part in parts)
    for part in parts:
        missing = ((0, 0), (0, width - part["candidate_ids"].shape[1]))
        part["candidate_ids"] = np.pad(part["candidate_ids"], missing)
        part["candidate_logprobs"] = np.pad(part["candidate_logprobs"], missing, constant_values=-np.inf)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return labelled_targets(columns), total > MAX_TARGETS


def labelled_targets(columns: dict[str, np.ndarray]) -> Labelled:
    """Of N positions' columns as a batch has them (input_ids (N,), candidate_ids (N, K), …) and `sequence` (N,)."""
    candidates = columns["candidate_logprobs"].astype(np.float64)
    tail, token = (columns[name].astype(np.float64) for name in ("tail_logprob", "token_logprob"))
    among = (columns["candidate_ids"] == columns["input_ids"][:, None]) & (candidates > -np.inf)
    covered = among.any(axis=1)
    share = np.zeros(len(tail))
    share[~covered] = np.minimum(token[~covered] - tail[~covered], 0)  # rounding may put it a hair above
    tempered = columns.get("tail_logsumexp")
    return Labelled(
        logprobs=np.concatenate([candidates, tail[:, None]], axis=1),
        symbol=np.where(covered, among.argmax(axis=1), candidates.shape[1]),
        share=share,
        token_logprob=token,
        tail_logsumexp=None if tempered is None else tempered.astype(np.float64),
        sequence=columns["sequence"],
    )


def _outcome(labelled: Labelled, logprobs: np.ndarray, token_logprob: np.ndarray) -> Outcome:
    """Of log-probabilities (N, S) over the symbols, and those of the tokens themselves (N,); Brier over the symbols."""
    probabilities = np.exp(logprobs)
    label = np.take_along_axis(probabilities, labelled.symbol[:, None], axis=1)[:, 0]
    nll = -token_logprob[token_logprob != -np.inf]  # an unknown one keeps its place
    confidence = np.minimum(probabilities[:, :-1].max(axis=1), 1)
    return Outcome(nll, confidence, brier_from_sums((probabilities**2).sum(axis=1), label), labelled.correct)


def at_bucket_temperature(labelled: Labelled, temperature: float) -> Outcome:
    """Candidates and bucket tempered as K + 1 symbols."""
    logprobs = labelled.logprobs / temperature
    logprobs = logprobs - log_sum_exp(logprobs)[:, None]
    return _outcome(labelled, logprobs, np.take_along_axis(logprobs, labelled.symbol[:, None], axis=1)[:, 0] + labelled.share)


def at_dump_temperature(labelled: Labelled, temperature: float) -> Outcome:
    """The whole distribution at the temperature at which the dump keeps `tail_logsumexp`."""
    assert labelled.tail_logsumexp is not None
    scaled = np.concatenate([labelled.logprobs[:, :-1] / temperature, labelled.tail_logsumexp[:, None]], axis=1)
    total = log_sum_exp(scaled)
    logprobs = scaled - total[:, None]
    inside = np.take_along_axis(logprobs, labelled.symbol[:, None], axis=1)[:, 0]
    outside = np.minimum(labelled.token_logprob / temperature - total, inside)
    return _outcome(labelled, logprobs, np.where(labelled.covered, inside, outside))


def at_first_c(labelled: Labelled, c: float) -> Outcome:
    """FIRST's softmax(P / c) over the candidates' probabilities; nothing is left for anything else."""
    kept = labelled.logprobs[:, :-1] > -np.inf
    scores = np.where(kept, np.exp(labelled.logprobs[:, :-1]) / c, -np.inf)
    logprobs = np.concatenate([scores - log_sum_exp(scores)[:, None], np.full((len(scores), 1), -np.inf)], axis=1)
    return _outcome(labelled, logprobs, np.take_along_axis(logprobs, labelled.symbol[:, None], axis=1)[:, 0])


def first_ceiling(c: float, candidates: int) -> float:
    """The highest probability that FIRST's rescaling gives, to a token that the teacher is certain of."""
    return 1 / (1 + (candidates - 1) * math.exp(-1 / c))


def _fit_bucket(labelled: Labelled, facts: dict[str, Any]) -> tuple[Calibration, Outcome, bool]:
    fitted = fit_temperature(lambda temperature: float(at_bucket_temperature(labelled, temperature).nll.mean()))
    temperature = round(fitted.temperature, 4)
    after = at_bucket_temperature(labelled, temperature)
    before = at_bucket_temperature(labelled, 1.0).figures()
    calibration = Calibration(method="bucket-temperature", value=temperature, before=before, after=after.figures(), **facts)
    return calibration, after, fitted.at_edge


def _fit_first(labelled: Labelled, facts: dict[str, Any]) -> tuple[Calibration, Outcome, bool]:
    if not labelled.covered.any():
        raise InputError("none of the tokens is among its candidates: there is nothing to fit c on")
    grid: dict[float, float] = {}

    def best(candidates: list[float]) -> float:
        for c in candidates:
            if c not in grid:
                outcome = at_first_c(labelled, c)
                grid[c] = expected_calibration_error(outcome.confidence, outcome.correct, 10)
        return min(sorted(grid), key=lambda c: grid[c])

    coarse = best([round(COARSE_STEP * step, 2) for step in range(1, 11)])
    fine = (round(coarse + FINE_STEP * step, 2) for step in range(-4, 5))
    c = best([value for value in fine if 0 < value <= 1])
    after = at_first_c(labelled, c)
    plain = at_bucket_temperature(labelled, 1.0)
    before = replace(plain, nll=plain.nll[labelled.covered]).figures()
    calibration = Calibration(
        method="first",
        value=c,
        before=before,
        after=after.figures(),
        uncovered=int((~labelled.covered).sum()),
        grid=tuple(sorted(grid.items())),
        **facts,
    )
    return calibration, after, c in (min(grid), 1.0)
