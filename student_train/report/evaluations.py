"""The sections of evaluations: one for each set of figures in each evaluation, over all runs that have it."""

from __future__ import annotations

import html

from student_train.evaluation.figures import Measurement, intervals_shown, remarks_once
from student_train.evaluation.kinds import measurements
from student_train.report import charts
from student_train.report.runs import Run, listed, listed_numbers
from student_train.report.tables import Side, compared, table

_INTERVALS = "In small type, where 95 of 100 resamples of the {units} lie (percentile bootstrap)."
_BEST = "Best in each column in bold."
_TEMPERATURE = (
    "Rows at a temperature T are the control for every claim of better calibration: the same student, its logits divided after"
    " training by a T that was fitted on other data."
)
_DIAGRAMS = (
    "Answers are sorted by their confidence. A bar shows how often the answers of a bin were right; on the diagonal, a model is"
    ' right exactly as often as it says. <i style="background: var(--over)"></i>what it claims beyond that,'
    ' <i style="background: var(--under)"></i>what it could have claimed. Pale bars hold fewer than ten answers; the small'
    " bars beneath show where the answers are."
)


def sections(runs: list[Run]) -> list[str]:
    """The sections of all evaluations, in the order in which runs have them, and one that says which runs have none."""
    places = dict.fromkeys(
        (measurement.name, name)
        for run in runs
        for name, result in run.evaluations.items()
        for measurement in measurements(result)
    )
    parts = [_section(runs, kind, name) for kind, name in places]
    unmeasured = [run.name for run in runs if not run.evaluations]
    if unmeasured:
        parts.append(
            f'<section><p class="missing">Not evaluated: {listed(unmeasured)}.'
            " <code>student-train evaluate</code> measures a model on a held-out dump, or on questions.</p></section>"
        )
    return parts


def _section(runs: list[Run], kind: str, name: str) -> str:
    """One set of figures, of one evaluation, over all runs that have it."""
    measured = [
        (index, run, measurement)
        for index, run in enumerate(runs)
        if name in run.evaluations
        for measurement in measurements(run.evaluations[name])
        if measurement.name == kind
    ]
    first = measured[0][2]
    largest = max((measurement for *_, measurement in measured), key=lambda measurement: measurement.count)
    figures, groups = first.figures, _groups(measured, largest)
    sides = [side for group in groups.values() for side in group]

    counts = listed_numbers({measurement.count for *_, measurement in measured})
    lead = f"{counts} {figures.counted} of <b>{html.escape(first.source)}</b>. {html.escape(figures.words(first))}"
    warnings = []
    if not all(measurement.comparable(first) for *_, measurement in measured):
        warnings.append("These were not measured on the same questions or sequences; do not compare them.")
    missing = [run.name for run in runs if run.evaluations and run.name not in {other.name for _, other, _ in measured}]
    if missing:
        warnings.append(f"Not measured here: {listed(missing)}.")
    bounded = intervals_shown(figures.metrics, [side.row for side in sides])
    remarks = [
        *([_INTERVALS.format(units=figures.resampled)] if bounded else []),
        *remarks_once(metric.interval_remark for metric in bounded),
        _BEST,
        *remarks_once(metric.remark for metric in figures.metrics if any(metric.name in side.figures for side in sides)),
        *([_TEMPERATURE] if any(side.temperature is not None for side in sides) else []),
    ]
    return "\n".join(
        [
            "<section>",
            f"<h2>{html.escape(figures.title)}: {html.escape(name)}</h2><p>{lead.rstrip()}</p>",
            *(f'<p class="missing">{warning}</p>' for warning in warnings),
            table(groups, figures.metrics),
            f'<p class="note">{" ".join(remarks)}</p>',
            compared(next(iter(groups.values()), []), figures.metrics),
            *_diagrams(groups, figures.confidence, f"{kind} {name}"),
            *_charts(largest, f"charts of {kind} {name}"),
            "</section>",
        ]
    )


def _charts(measurement: Measurement, place: str) -> list[str]:
    """What the figures draw of themselves."""
    return [
        f"<h3>{html.escape(chart.title)}</h3><p>{html.escape(chart.words)}</p>"
        + charts.bar_charts(chart.panels, chart.description, f"{place} {number}")
        for number, chart in enumerate(measurement.figures.charts(measurement))
    ]


def _groups(measured: list[tuple[int, Run, Measurement]], largest: Measurement) -> dict[str, list[Side]]:
    """The rows of a table by their heading: those of all runs, then the teacher's, of the largest sample."""
    groups: dict[str, list[Side]] = {}
    for index, run, measurement in measured:
        for row in measurement.rows:
            if not row.teacher:
                groups.setdefault(row.group, []).append(Side(run.name, index, row, measurement))
    for row in largest.rows:
        if row.teacher:
            groups.setdefault(row.group, []).append(Side("teacher", None, row, largest))
    return groups


def _diagrams(groups: dict[str, list[Side]], confidence: str, place: str) -> list[str]:
    """Reliability diagrams of the rows that have what is drawn."""
    parts = []
    for title, group in groups.items():
        panels = [
            charts.Panel(
                side.name,
                charts.TEACHER if side.index is None else charts.colour(side.index),
                side.figures,
                side.temperature,
            )
            for side in group
            if "reliability" in side.figures
        ]
        if panels:
            heading = f"<h4>{html.escape(title, quote=False)}</h4>" if title else ""
            parts.append(heading + charts.reliability_row(panels, f"{place} {title}"))
    if not parts:
        return []
    words = f"{_DIAGRAMS} {html.escape(confidence)}".rstrip()
    return [f"<h3>Is the confidence deserved?</h3><p>{words}</p>", *parts]
