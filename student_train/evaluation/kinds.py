"""FIGURES: what is measured of a model on a held-out dump, for each kind of knowledge; and the measuring. Imports no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from student_train.evaluation.figures import KindFigures, Measurement
from student_train.evaluation.position_figures import POSITION_FIGURES
from student_train.evaluation.question_figures import QUESTION_FIGURES
from student_train.training.run_folder import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIGURES: dict[str, KindFigures] = {"positions": POSITION_FIGURES}


def measurements(result: Record) -> list[Measurement]:
    """What a result of `evaluate` says, by each set of figures that is known here."""
    if "questions" in result:
        return [Measurement("questions", QUESTION_FIGURES, result, result)]
    records = result["figures"].items()
    return [Measurement(kind, FIGURES[kind], record, result) for kind, record in records if kind in FIGURES]


def check_figures(store: KnowledgeStore, dump: str) -> None:
    """Refuse a dump that holds no kind of knowledge that a model can be measured by (InputError)."""
    kinds = store.manifest(dump).kinds
    if FIGURES.keys().isdisjoint(kinds):
        raise InputError(
            f"the dump {dump} holds {', '.join(kinds)}, which no figures exist for: evaluate on a dump that holds"
            f" {' or '.join(FIGURES)}"
        )


def evaluated_ordinals(store: KnowledgeStore, dump: str, limit: int | None = None) -> np.ndarray:
    """The ordinals (int64) of the sequences that `measure` reads, the longest first."""
    lengths = store.sequences(dump)["length"].to_numpy()
    ordinals = np.arange(len(lengths))
    if limit is not None and limit < len(lengths):
        ordinals = np.linspace(0, len(lengths) - 1, limit).round().astype(np.int64)
    # Sequences of one length together leave little padding.
    return ordinals[np.argsort(-lengths[ordinals], kind="stable")]


def measure(
    model: PreTrainedModel,
    store: KnowledgeStore,
    dump: str,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    temperature: float | None = None,
    positions_file: Path | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """The figures of `evaluate` for a model in memory, which stays on its device and is put in evaluation mode.

    Args:
        model: a causal language model.
        store: an open store.
        dump: which dump.
        batch_size: sequences in one forward pass.
        limit: measure on this many sequences, spread evenly over the dump; None for all.
        temperature: measure the model a second time with its logits divided by this.
        positions_file: a Parquet file to write, with a row for each position that the model is judged at.
        reporter: hears of progress, and of kinds of knowledge that nothing is measured by.

    Returns:
        sequences (how many), seconds, `figures` (by the name of a kind, what its `measure` returns), and `not_evaluated` (the
        names of the dump's other kinds).

    Raises:
        InputError: the dump holds no kind of knowledge that a model can be measured by, or no target.
    """
    check_figures(store, dump)
    kinds = tuple(store.manifest(dump).kinds)
    unmeasured = [kind for kind in kinds if kind not in FIGURES]
    for kind in unmeasured:
        reporter.note(f"The kind {kind} of the dump {dump} is not evaluated: no figures exist for it.")
    ordinals = evaluated_ordinals(store, dump, limit)
    model.eval()
    started = time.monotonic()
    options: dict[str, Any] = {"batch_size": batch_size, "temperature": temperature, "positions_file": positions_file}
    figures = {
        kind: FIGURES[kind].measure(model, store, dump, ordinals, **options, reporter=reporter)
        for kind in kinds
        if kind in FIGURES
    }
    return {
        "sequences": len(ordinals),
        "seconds": round(time.monotonic() - started, 3),
        "figures": figures,
        "not_evaluated": unmeasured,
    }
