"""The report's pictures: matplotlib figures as inline SVG, in colours that the page decides.

Colours are CSS variables inside the pictures too, so a page reads well on light and on dark screens and on paper.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from student_train.evaluation.figures import Bars

# Colours that stand for CSS variables until the picture is put into the page.
_INK, _FAINT, _GRID, _OVER, _UNDER = "#010101", "#020202", "#030303", "#060606", "#070707"
_SERIES = [f"#0400{index:02x}" for index in range(1, 7)]
TEACHER = "#050505"
_VARIABLES = {_INK: "ink", _FAINT: "faint", _GRID: "grid", TEACHER: "teacher", _OVER: "over", _UNDER: "under"} | {
    colour: f"series-{index}" for index, colour in enumerate(_SERIES, 1)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
# A bin of fewer answers says little of its accuracy, and is drawn pale.
FEW = 10


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside have the report's looks."""
    with matplotlib.rc_context(_STYLE):
        yield


def colour(index: int) -> str:
    """The colour of the run in that place."""
    return _SERIES[index % len(_SERIES)]


def swatch(index: int | None) -> str:
    """A square of a run's colour, or of the teacher's (None)."""
    variable = "teacher" if index is None else f"series-{index % len(_SERIES) + 1}"
    return f'<i style="background: var(--{variable})"></i>'


@dataclass(frozen=True)
class Panel:
    """One reliability diagram.

    Attributes:
        title: whose answers.
        colour: of the bars.
        figures: `reliability`, `ece_15` and `nll` of these answers.
        temperature: when they are a model's at a post-hoc temperature, that; its bars are outlines.
    """

    title: str
    colour: str
    figures: dict[str, Any]
    temperature: float | None = None


def reliability_row(panels: Sequence[Panel], place: str) -> str:
    """Reliability diagrams side by side, all with the same axes: accuracy by confidence above, share of answers below.

    `place` is unlike that of anything else in the page.
    """
    # Four or five to a row, whichever leaves fewer places empty.
    columns = min((5, 4), key=lambda number: -len(panels) % number)
    highest = max(max(_shares(panel)) for panel in panels)
    pictures = []
    for number, panel in enumerate(panels):
        figure = Figure(figsize=(3.2, 3.9) if columns == 4 else (2.7, 3.4))
        # Margins of our own: the axes lie in the same place in every panel.
        figure.subplots_adjust(left=0.21 if columns == 4 else 0.25, right=0.925, top=0.94, bottom=0.135, hspace=0.1)
        above, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
        _reliability(above, below, panel, highest)
        for axes in (above, below):
            axes.yaxis.set_label_coords(-0.22 if columns == 4 else -0.28, 0.5)
        above.set_title(_clipped(panel.title, 24 if columns == 4 else 19), parse_math=False)
        scaled = "" if panel.temperature is None else f" at T = {panel.temperature:.3g}"
        description = f"Reliability diagram of {panel.title}{scaled}: calibration error {panel.figures['ece_15']:.2%}"
        pictures.append(svg(figure, description, f"{place} {number}"))
    return f'<div class="row" style="--columns: {columns}">{"".join(pictures)}</div>'


def _shares(panel: Panel) -> np.ndarray:
    counts = np.array(panel.figures["reliability"]["counts"], np.float64)
    return counts / max(counts.sum(), 1)


def _reliability(above: Axes, below: Axes, panel: Panel, highest: float) -> None:
    columns = {name: np.array(values) for name, values in panel.figures["reliability"].items()}
    count = len(columns["counts"])
    centres = (np.arange(count) + 0.5) / count
    width = 0.9 / count
    scaled = panel.temperature is not None
    face = {"facecolor": "none", "edgecolor": panel.colour, "linewidth": 1.4} if scaled else {"color": panel.colour}
    for few in (False, True):
        filled = (columns["counts"] > 0) & ((columns["counts"] < FEW) == few)
        if not filled.any():
            continue
        accuracy, confidence = columns["accuracy"][filled], columns["confidence"][filled]
        both = np.minimum(accuracy, confidence)
        above.bar(centres[filled], both, width, alpha=0.3 if few else 1.0, **face)
        for shade, gap in ((_OVER, confidence - both), (_UNDER, accuracy - both)):
            above.bar(centres[filled], gap, width, bottom=both, color=shade, alpha=0.18 if few else 0.5, linewidth=0)
    above.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    words = f"ECE {panel.figures['ece_15']:.1%}\nNLL {panel.figures['nll']:.2f}"
    words += f"\nT = {panel.temperature:.3g}" if scaled else ""
    above.text(0.03, 0.97, words, transform=above.transAxes, va="top", color=_FAINT, fontsize=10, linespacing=1.4)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="how often right")
    below.bar(centres, _shares(panel), width, **face, alpha=1.0 if scaled else 0.55)
    below.set(xlabel="how sure", ylabel="share", ylim=(0, 1.05 * highest))
    above.tick_params(labelbottom=False)
    for axis in (above.xaxis, above.yaxis, below.xaxis, below.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.xaxis.set_major_locator(MaxNLocator(2))
    below.yaxis.set_major_locator(MaxNLocator(2, prune="lower"))


@dataclass(frozen=True)
class Curve:
    """What a run measured as it went: `points` are (step, value)."""

    colour: str
    points: list[tuple[float, float]]


def learning_curves(panels: Sequence[tuple[str, str, Sequence[Curve]]], description: str) -> str:
    """Panels of (title, unit, curves), side by side."""
    figure = Figure(figsize=(11.1, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, unit, curves) in zip(axes, panels, strict=True):
        for curve in curves:
            if curve.points:
                steps, values = zip(*curve.points, strict=True)
                marker = "o" if len(steps) < 40 else ""
                axis.plot(steps, values, color=curve.colour, linewidth=2, marker=marker, markersize=3.5)
        axis.set_title(title)
        axis.set_xlabel("optimiser step")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _wide(svg(figure, description, "learning curves"))


def bar_charts(panels: Sequence[Bars], description: str, place: str) -> str:
    """Bar charts side by side, the first the widest."""
    figure = Figure(figsize=(11.1, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[2, *[1] * (len(panels) - 1)])[0]
    for axis, bars in zip(axes, panels, strict=True):
        edges = np.array(bars.edges)
        centres, widths = (edges[:-1] + edges[1:]) / 2, np.diff(edges) * 0.9
        axis.bar(centres, bars.heights, widths, color=TEACHER, linewidth=0)
        if len(centres) <= 8:
            for centre, height in zip(centres, bars.heights, strict=True):
                text = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": _FAINT}
                axis.annotate(f"{height:.0%}", (centre, height), (0, 2), **text)
        if bars.mean is not None:
            _mark(axis, bars.mean, edges)
        axis.set_title(bars.title)
        axis.set(xlim=(edges[0], edges[-1]), ylim=(0, bars.highest), xlabel=bars.label, ylabel=bars.unit)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if edges[0] == 0:
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return _wide(svg(figure, description, place))


def _mark(axis: Axes, mean: float, edges: np.ndarray) -> None:
    """A line at a mean, with its number on the side that has more room."""
    axis.axvline(mean, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    left = mean > (edges[0] + edges[-1]) / 2
    axis.annotate(
        f"mean {mean:.1%}",
        (mean, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, -4),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=10,
    )


def _wide(picture: str) -> str:
    """A picture as wide as the page, in a box of its own to scroll where the page is narrow."""
    return f'<div class="scroll">{picture}</div>'


def _clipped(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def svg(figure: Figure, description: str, place: str) -> str:
    """A figure as inline SVG in the page's colours, named for those who cannot see it.

    Args:
        figure: made inside `style`.
        description: in words.
        place: in the page, unlike that of any other picture: ids inside the picture are hashed with it, so that no two
            pictures share one and a page is reproducible.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": place}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns:xlink|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="width: \2pt"', text, count=1)
    text = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    text = re.sub(r"font: bold ([\d.]+px) [^;\"]*", r"font: 600 \1 var(--sans)", text)
    label = html.escape(description, quote=True)
    return f'<figure role="img" aria-label="{label}">{text}</figure>'
