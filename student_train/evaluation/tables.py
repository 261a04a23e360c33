"""The result of an evaluation, or of several, as tables for a terminal, and what has to be said beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from knowledge_store.errors import InputError
from student_train.evaluation.comparison import Difference
from student_train.evaluation.figures import Figures, Measurement, Metric, Row, intervals_shown, remarks_once
from student_train.evaluation.kinds import measurements
from student_train.training.run_folder import Record

CAPTION = "In brackets: where 95 of 100 resamples of the {} lie (bootstrap)."
PAIRED = "Both are resampled alike."


def tables(result: Record) -> Iterator[Table]:
    """The figures of an evaluation, with their intervals: a column for each row of figures.

    Figures in groups have a second table for those at a post-hoc temperature, of which there is one for each group.
    """
    for measurement in measurements(result):
        figures, rows = measurement.figures, measurement.rows
        title = f"{measurement.count:,} {figures.counted} of {measurement.source}, {result['seconds']:,.0f} s"
        scaled = [row for row in rows if row.group and row.temperature is not None]
        yield _table(title, figures, [row for row in rows if not row.group or row.temperature is None])
        if scaled:
            yield _table("At a post-hoc temperature", figures, scaled)


def compared(results: Mapping[str, Record]) -> Iterator[Table]:
    """Several evaluations side by side, a column for each, and by how much each differs from the first.

    Args:
        results: by what they are called in messages, such as their files.

    Raises:
        InputError: they were not measured on the same sequences or questions.
    """
    names = dict(zip(results, _model_names(results), strict=True))
    first, *others = results
    for measurement in measurements(results[first]):
        measured = {first: measurement}
        for other in others:
            same = [candidate for candidate in measurements(results[other]) if candidate.comparable(measurement)]
            if not same:
                raise InputError(
                    f"{other} and {first} were not measured on the same {measurement.figures.resampled}: evaluate both models"
                    " on one dump or file of questions, with the same --limit"
                )
            measured[other] = same[0]
        for group in dict.fromkeys(row.group for row in measurement.rows):
            yield from _group_tables(group, {names[other]: found for other, found in measured.items()})


def _group_tables(group: str, measured: Mapping[str, Measurement]) -> Iterator[Table]:
    first = next(iter(measured.values()))
    figures = first.figures
    rows = [
        replace(row, label=name if row.temperature is None else f"{name} at T = {row.temperature:.3g}")
        for name, measurement in measured.items()
        for row in measurement.rows
        if row.group == group and not row.teacher
    ]
    teacher = [row for row in first.rows if row.group == group and row.teacher]
    yield _table(f"{first.count:,} {figures.counted} of {first.source}{f': {group}' if group else ''}", figures, rows + teacher)
    kept = {row.label: row.kept for row in rows if row.kept is not None}
    if len(kept) < 2:
        return
    (reference, subtracted), *others = kept.items()
    differences = {label: figures.differences(one, subtracted) for label, one in others}
    known = any(not math.isnan(difference.low) for found in differences.values() for difference in found.values())
    caption = f"{CAPTION.format(figures.resampled)} {PAIRED}" if known else None
    table = Table(title=f"Less {reference}", title_justify="left", caption=caption)
    table.add_column("")
    for label in differences:
        table.add_column(label, justify="right")
    for metric in figures.metrics:
        if any(metric.name in found for found in differences.values()):
            table.add_row(_label(metric), *(_signed(found.get(metric.name), metric) for found in differences.values()))
    yield table


def remarks(result: Record) -> Iterator[str]:
    """Sentences on what to be careful about."""
    for measurement in measurements(result):
        yield from measurement.figures.remarks(measurement)


def _model_names(results: Mapping[str, Record]) -> list[str]:
    """What the models are called: their folder or GGUF file, and where two are alike the results."""
    names = [Path(result["config"].get("gguf_file") or result["model"]).name for result in results.values()]
    return [name if names.count(name) == 1 else place for name, place in zip(names, results, strict=True)]


def _table(title: str, figures: Figures, rows: Sequence[Row]) -> Table:
    metrics = (*figures.metrics, *figures.details)
    table = Table(title=title, title_justify="left", caption=_caption(metrics, figures.resampled, rows))
    table.add_column("")
    for row in rows:
        table.add_column(row.label, justify="right")
    if rows and all(row.temperature is not None for row in rows):
        table.add_row("T", *(f"{row.temperature:.3f}" for row in rows))
    for metric in metrics:
        if any(metric.name in row.figures for row in rows):
            table.add_row(_label(metric), *(_with_interval(row, metric) for row in rows))
    return table


def _label(metric: Metric) -> str:
    return f"{metric.title} ({metric.note})" if metric.note else metric.title


def _caption(metrics: Sequence[Metric], resampled: str, rows: Sequence[Row]) -> str | None:
    """What the brackets are; None where there are none."""
    shown = intervals_shown(metrics, rows)
    remarks = remarks_once(metric.interval_remark for metric in shown)
    return " ".join([CAPTION.format(resampled), *remarks]) if shown else None


def _with_interval(row: Row, metric: Metric) -> str:
    """A figure and the interval it lies in."""
    value = metric.shown(row.figures.get(metric.name))
    interval = row.figures.get("intervals", {}).get(metric.name)
    if interval is None:
        return value
    low, high = (metric.shown(end).removesuffix("%") for end in interval)
    return f"{value}\n[{low}, {high}]"


def _signed(difference: Difference | None, metric: Metric) -> str:
    """A difference and the interval it lies in; of shares in percentage points."""
    if difference is None:
        return "–"
    form = f"+{metric.form.removeprefix('+')}"
    value, low, high = (
        format(number, form).removesuffix("%") for number in (difference.value, difference.low, difference.high)
    )
    value += " pp" if metric.form.endswith("%") else ""
    return value if math.isnan(difference.low) else f"{value}\n[{low}, {high}]"
