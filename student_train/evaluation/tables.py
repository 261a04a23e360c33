"""The result of an evaluation as tables for a terminal, and what has to be said beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

# To fit a temperature on.
MIN_QUESTIONS = 200

CAPTION = (
    "In brackets: where 95 of 100 resamples of the {} lie (bootstrap). A calibration error comes out higher on a resample,"
    " so it can lie below."
)
ON_TEXT = [
    ("held-out loss (nats per token)", "nll", ".3f"),
    ("KL to the teacher (nats, lower bound)", "kl_lower_bound", ".3f"),
    ("top-1 agreement with the teacher", "top_1_agreement", ".1%"),
    ("top-1 accuracy on the text", "accuracy", ".1%"),
    ("Brier score, full vocabulary", "brier", ".4f"),
    ("ECE, 10 bins", "ece_10", ".2%"),
    ("ECE, 15 bins", "ece_15", ".2%"),
    ("ECE, bins of equal counts", "adaptive_ece", ".2%"),
    ("Full-ECE, the whole vocabulary", "full_ece", ".2%"),
]
ON_QUESTIONS = [
    ("accuracy", "accuracy", ".1%"),
    ("NLL (nats)", "nll", ".3f"),
    ("Brier score", "brier", ".3f"),
    ("ECE, 10 bins", "ece_10", ".1%"),
    ("ECE, 15 bins", "ece_15", ".1%"),
    ("ECE, bins of equal counts", "adaptive_ece", ".1%"),
]
CONFIDENCES = {"first_token": "first token", "options": "over the options", "sequence": "whole sequence"}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The figures of an evaluation, with their intervals."""
    if "questions" in result:
        asked = result["questions"]
        title = f"{asked['count']:,} questions of {asked['name']}, {result['seconds']:,.0f} s"
        yield from _on_questions(title, result)
        yield from _on_questions("At a post-hoc temperature", result.get("post_hoc", {}))
    elif "positions" in result["figures"]:
        yield _on_text(result, result["figures"]["positions"])


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """Sentences on what to be careful about."""
    if "questions" not in result:
        return
    clashing = result["questions"]["shared_first_token"]
    if clashing:
        yield (
            f"{clashing:,} of the questions have options that share their first token, which says nothing of them: judge by the"
            " whole sequence."
        )
    scaled = result.get("post_hoc", {})
    if any(figures.get("at_edge") for figures in scaled.values() if isinstance(figures, dict)):
        yield "A fitted temperature is at the edge of its range: the best one lies beyond it, or does not exist."
    fitted_on = scaled.get("questions", MIN_QUESTIONS)
    if fitted_on < MIN_QUESTIONS:
        yield f"The temperature is fitted on {fitted_on:,} questions, which are few: use {MIN_QUESTIONS} or more."


def _on_text(result: dict[str, Any], figures: dict[str, Any]) -> Table:
    columns = {"student": figures["student"], "teacher": figures["teacher"]}
    if "post_hoc" in figures:
        columns[f"at T = {figures['post_hoc']['temperature']:.3g}"] = figures["post_hoc"]["student"]
    title = f"{figures['positions']:,} positions of {result['dump']['name']}, {result['seconds']:,.0f} s"
    rows = [row for row in ON_TEXT if row[1] in figures["student"]]
    return _table(title, columns, rows, CAPTION.format("sequences"))


def _on_questions(title: str, figures: dict[str, Any]) -> Iterator[Table]:
    columns = {label: figures[name] for name, label in CONFIDENCES.items() if name in figures}
    if columns:
        rows = [*([("T", "temperature", ".3f")] if "post-hoc" in title else []), *ON_QUESTIONS]
        yield _table(title, columns, rows, CAPTION.format("questions"))


def _table(title: str, columns: dict[str, dict[str, Any]], rows: list[tuple[str, str, str]], caption: str) -> Table:
    table = Table(title=title, title_justify="left", caption=caption)
    table.add_column("")
    for label in columns:
        table.add_column(label, justify="right")
    for label, name, form in rows:
        table.add_row(label, *(_with_interval(figures, name, form) for figures in columns.values()))
    return table


def _with_interval(figures: dict[str, Any], name: str, form: str) -> str:
    """A figure and the interval it lies in."""
    if name not in figures:
        return "–"
    value = format(figures[name], form)
    if name not in figures.get("intervals", {}):
        return value
    low, high = (format(end, form).removesuffix("%") for end in figures["intervals"][name])
    return f"{value}\n[{low}, {high}]"
