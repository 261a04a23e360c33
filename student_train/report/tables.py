"""Tables of figures: a row for each model, the best marked; and of paired differences from the first."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from student_train.evaluation.comparison import Difference
from student_train.evaluation.figures import Measurement, Metric, Row
from student_train.report import charts
from student_train.training.run_folder import Record


@dataclass(frozen=True)
class Side:
    """A row of a table: the answers of a run, of a run at a temperature, or of the teacher."""

    name: str
    index: int | None  # of the run; None: the teacher
    row: Row
    measurement: Measurement

    @property
    def figures(self) -> Record:
        """Its numbers."""
        return self.row.figures

    @property
    def temperature(self) -> float | None:
        """The post-hoc temperature, if any."""
        return self.row.temperature

    @property
    def label(self) -> str:
        """The row's name."""
        return self.name if self.temperature is None else f"{self.name} at T = {self.temperature:.3g}"


def table(groups: Mapping[str, Sequence[Side]], metrics: Sequence[Metric]) -> str:
    """A row for each side with its figures and their intervals; the best of each group is marked, the teacher aside.

    Args:
        groups: sides by the heading above them; "" for none.
        metrics: the columns, of which those that no side has are left out.
    """
    sides = [side for group in groups.values() for side in group]
    metrics = [metric for metric in metrics if any(metric.name in side.figures for side in sides)]
    rows = []
    for title, group in groups.items():
        if title:
            rows.append(f'<tr class="group"><th colspan="{len(metrics) + 1}">{html.escape(title, quote=False)}</th></tr>')
        best = {metric.name: _best(group, metric) for metric in metrics}
        for side in group:
            cells = "".join(_cell(side, metric, best[metric.name]) for metric in metrics)
            about = "<small>from the store</small>" if side.index is None else ""
            rows.append(f"<tr{_kind(side)}><th>{charts.swatch(side.index)}{html.escape(side.label)}{about}</th>{cells}</tr>")
    return _table_of("", "", metrics, rows)


def _table_of(style: str, corner: str, metrics: Sequence[Metric], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(metric.title)}<small>{html.escape(metric.note)}</small></th>" for metric in metrics)
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table{style}><thead><tr><th>{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _kind(side: Side) -> str:
    return ' class="teacher"' if side.index is None else ' class="scaled"' if side.temperature is not None else ""


def _best(sides: Sequence[Side], metric: Metric) -> str | None:
    """The best figure as it is printed, so that what looks alike is marked alike; None when nothing is to be chosen from."""
    figures = [side.figures.get(metric.name) for side in sides if side.index is not None]
    values = [value for value in figures if value is not None]  # of few sequences there is no standard error
    return metric.shown((min if metric.lowest else max)(values)) if len(values) > 1 else None


def _cell(side: Side, metric: Metric, best: str | None) -> str:
    shown = metric.shown(side.figures.get(metric.name))
    interval = side.figures.get("intervals", {}).get(metric.name)
    ends = f"<small>{'–'.join(metric.shown(end).removesuffix('%') for end in interval)}</small>" if interval else ""
    marked = ' class="best"' if side.index is not None and shown == best else ""
    return f"<td{marked}>{shown}{ends}</td>"


def compared(sides: Sequence[Side], metrics: Sequence[Metric]) -> str:
    """Paired differences from the first run, and from the first run at its temperature."""
    tables = []
    for reference in sides:
        if reference.index != sides[0].index or reference.row.kept is None:
            continue
        rows = []
        for side in sides:
            if side is not reference and side.row.kept is not None and side.measurement.comparable(reference.measurement):
                rows.append((side, side.measurement.figures.differences(side.row.kept, reference.row.kept)))
        if any(differences for _, differences in rows):
            tables.append(_difference_table(reference, rows, metrics))
    if not tables:
        return ""
    words = (
        "Differences on the same questions or sequences, both resampled alike, with the interval of the difference. Coloured"
        ' where the interval leaves out zero: <b class="better">better</b>, <b class="worse">worse</b>. pp: percentage points.'
    )
    return f"<h3>Is the difference more than chance?</h3><p>{words}</p>{''.join(tables)}"


def _difference_table(reference: Side, rows: Sequence[tuple[Side, dict[str, Difference]]], metrics: Sequence[Metric]) -> str:
    metrics = [metric for metric in metrics if any(metric.name in differences for _, differences in rows)]
    lines = [
        f"<tr{_kind(side)}><th>{charts.swatch(side.index)}{html.escape(side.label)}</th>"
        + "".join(_difference_cell(differences.get(metric.name), metric) for metric in metrics)
        + "</tr>"
        for side, differences in rows
    ]
    corner = f"against {charts.swatch(reference.index)}{html.escape(reference.label)}"
    return _table_of(' class="differences"', corner, metrics, lines)


def _difference_cell(difference: Difference | None, metric: Metric) -> str:
    if difference is None:
        return "<td>–</td>"

    def signed(value: float) -> str:
        text = format(value, f"+{metric.form}").removesuffix("%")
        return text.replace("-", "−")

    kind = ""
    if difference.clear:
        kind = ' class="better"' if (difference.value < 0) == metric.lowest else ' class="worse"'
    unit = " pp" if metric.form.endswith("%") else ""
    ends = "" if math.isnan(difference.low) else f"<small>{signed(difference.low)} to {signed(difference.high)}</small>"
    return f"<td{kind}>{signed(difference.value)}{unit}{ends}</td>"
