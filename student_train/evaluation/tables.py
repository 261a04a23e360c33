"""The result of an evaluation as tables for a terminal, and what has to be said beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from student_train.evaluation.figures import Figures, Metric, Row, intervals_shown, remarks_once
from student_train.evaluation.kinds import measurements
from student_train.training.run_folder import Record

CAPTION = "In brackets: where 95 of 100 resamples of the {} lie (bootstrap)."


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


def remarks(result: Record) -> Iterator[str]:
    """Sentences on what to be careful about."""
    for measurement in measurements(result):
        yield from measurement.figures.remarks(measurement)


def _table(title: str, figures: Figures, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", caption=_caption(figures, rows))
    table.add_column("")
    for row in rows:
        table.add_column(row.label, justify="right")
    if rows and all(row.temperature is not None for row in rows):
        table.add_row("T", *(f"{row.temperature:.3f}" for row in rows))
    for metric in figures.metrics:
        if any(metric.name in row.figures for row in rows):
            label = f"{metric.title} ({metric.note})" if metric.note else metric.title
            table.add_row(label, *(_with_interval(row, metric) for row in rows))
    return table


def _caption(figures: Figures, rows: Sequence[Row]) -> str | None:
    """What the brackets are; None where there are none."""
    metrics = intervals_shown(figures.metrics, rows)
    remarks = remarks_once(metric.interval_remark for metric in metrics)
    return " ".join([CAPTION.format(figures.resampled), *remarks]) if metrics else None


def _with_interval(row: Row, metric: Metric) -> str:
    """A figure and the interval it lies in."""
    value = metric.shown(row.figures.get(metric.name))
    interval = row.figures.get("intervals", {}).get(metric.name)
    if interval is None:
        return value
    low, high = (metric.shown(end).removesuffix("%") for end in interval)
    return f"{value}\n[{low}, {high}]"
