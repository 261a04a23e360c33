"""Tables of figures: a row for each model, the best marked; and of paired differences from the first."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from student_train.evaluation.comparison import Difference, comparable, differences
from student_train.report import charts
from student_train.training.run_folder import Record


@dataclass(frozen=True)
class Side:
    """A row of a table: the answers of a run, of a run at a temperature, or of the teacher."""

    name: str
    index: int | None  # of the run; None: the teacher
    figures: Record
    kept: Record | None  # of each question or sequence
    result: Record
    temperature: float | None = None

    @property
    def label(self) -> str:
        """The row's name."""
        return self.name if self.temperature is None else f"{self.name} at T = {self.temperature:.3g}"


@dataclass(frozen=True)
class Metric:
    """A column of a table."""

    name: str
    title: str
    note: str
    form: str
    lowest: bool = True

    def shown(self, value: float | None) -> str:
        """The number as it is printed."""
        return "–" if value is None else format(value, self.form)


def table(groups: Sequence[tuple[str, list[Side]]], metrics: list[Metric]) -> str:
    """A row for each side with its figures and their intervals; the best of each group is marked, the teacher aside."""
    sides = [side for _, group in groups for side in group]
    metrics = [metric for metric in metrics if any(metric.name in side.figures for side in sides)]
    head = "".join(f"<th>{metric.title}<small>{metric.note}</small></th>" for metric in metrics)
    rows = []
    for title, group in groups:
        if title:
            rows.append(f'<tr class="group"><th colspan="{len(metrics) + 1}">{title}</th></tr>')
        best = {metric.name: _best(group, metric) for metric in metrics}
        for side in group:
            cells = "".join(_cell(side, metric, best[metric.name]) for metric in metrics)
            about = "<small>from the store</small>" if side.index is None else ""
            rows.append(f"<tr{_kind(side)}><th>{charts.swatch(side.index)}{html.escape(side.label)}{about}</th>{cells}</tr>")
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _kind(side: Side) -> str:
    return ' class="teacher"' if side.index is None else ' class="scaled"' if side.temperature is not None else ""


def _best(sides: list[Side], metric: Metric) -> str | None:
    """The best figure as it is printed, so that what looks alike is marked alike; None when nothing is to be chosen from."""
    values = [side.figures[metric.name] for side in sides if side.index is not None and metric.name in side.figures]
    return metric.shown((min if metric.lowest else max)(values)) if len(values) > 1 else None


def _cell(side: Side, metric: Metric, best: str | None) -> str:
    shown = metric.shown(side.figures.get(metric.name))
    interval = side.figures.get("intervals", {}).get(metric.name)
    ends = f"<small>{'–'.join(metric.shown(end).removesuffix('%') for end in interval)}</small>" if interval else ""
    marked = ' class="best"' if side.index is not None and shown == best else ""
    return f"<td{marked}>{shown}{ends}</td>"


def compared(groups: Sequence[tuple[str, list[Side]]], metrics: list[Metric]) -> str:
    """Paired differences from the first run, and from the first run at its temperature."""
    tables = []
    for _, sides in groups:
        first = [side for side in sides if sides and side.index == sides[0].index]
        for reference in first:
            rows = []
            for side in sides:
                if side is reference or side.kept is None or reference.kept is None:
                    continue
                if comparable(side.result, reference.result) and _count(side.kept) == _count(reference.kept):
                    rows.append((side, differences(side.kept, reference.kept)))
            if rows:
                tables.append(_difference_table(reference, rows, metrics))
    if not tables:
        return ""
    words = (
        "Differences on the same questions or sequences, both resampled alike, with the interval of the difference. Coloured"
        ' where the interval leaves out zero: <b class="better">better</b>, <b class="worse">worse</b>. pp: percentage points.'
    )
    return f"<h3>Is the difference more than chance?</h3><p>{words}</p>{''.join(tables)}"


def _count(kept: Record) -> int:
    """Of how many sequences or questions a result keeps something."""
    return len(kept["targets"] if "targets" in kept else kept["nll"])


def _difference_table(reference: Side, rows: list[tuple[Side, dict[str, Difference]]], metrics: list[Metric]) -> str:
    metrics = [metric for metric in metrics if any(metric.name in of_side for _, of_side in rows)]
    head = "".join(f"<th>{metric.title}<small>{metric.note}</small></th>" for metric in metrics)
    body = "\n".join(
        f"<tr{_kind(side)}><th>{charts.swatch(side.index)}{html.escape(side.label)}</th>"
        + "".join(_difference_cell(of_side.get(metric.name), metric) for metric in metrics)
        + "</tr>"
        for side, of_side in rows
    )
    title = f"against {charts.swatch(reference.index)}{html.escape(reference.label)}"
    return (
        f'<div class="scroll"><table class="differences"><thead><tr><th>{title}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


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
