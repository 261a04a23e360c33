"""Runs side by side on one HTML page: a table, three kinds of picture, and where it all came from.

The page is one file with everything in it: no scripts, no links to follow, pictures as inline SVG. Colours are CSS
variables, in the pictures too, so the page reads well on light and on dark screens and on paper. It reads the JSON that
`run` and `evaluate` leave beside a model, needs no torch, and says so where a piece is missing.
"""

from __future__ import annotations

import html
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from knowledge_store.errors import InputError
from knowledge_store.progress import duration

Record = dict[str, Any]

# Colours that stand for CSS variables until the picture is put into the page.
_INK, _FAINT, _GRID = "#010101", "#020202", "#030303"
_SERIES = [f"#0400{index:02x}" for index in range(1, 7)]
_TEACHER = "#050505"
_VARIABLES = {_INK: "ink", _FAINT: "faint", _GRID: "grid", _TEACHER: "teacher"} | {
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


@dataclass(frozen=True)
class _Run:
    """What a folder holds: any of the three may be empty."""

    name: str
    run: Record
    history: Record
    evaluations: dict[str, Record]  # by dump


@dataclass(frozen=True)
class _Metric:
    """A column of the table."""

    title: str
    note: str
    value: Callable[[Record], float | None]
    shown: str
    lowest: bool


def _student(name: str) -> Callable[[Record], float | None]:
    return lambda result: result["student"].get(name)


_METRICS = [
    _Metric("Held-out loss", "nats per token", _student("nll"), ".3f", True),
    _Metric("KL to the teacher", "nats per token, lower bound", _student("kl_lower_bound"), ".3f", True),
    _Metric("Top-1 agreement", "with the teacher", _student("top_1_agreement"), ".1%", False),
    _Metric("Accuracy", "top-1, on the text", _student("accuracy"), ".1%", False),
    _Metric("Calibration error", "ECE, 15 bins", _student("ece_15"), ".2%", True),
]


def write_report(runs: Iterable[str | Path], output: str | Path) -> Path:
    """Write the page.

    Args:
        runs: folders that `run` or `evaluate` wrote into, in the order in which they are to be shown.
        output: the file to write.

    Returns:
        `output`.

    Raises:
        InputError: a folder does not exist or holds neither a run nor an evaluation, or `output` cannot be written.
    """
    folders = [Path(run) for run in runs]
    found = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    output = Path(output)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file, such as {output / 'report.html'}")
    with matplotlib.rc_context(_STYLE):
        page = _page(found)
    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    return output


def _names(folders: list[Path]) -> list[str]:
    """Folder names; longer where two are alike."""
    plain = [folder.resolve().name for folder in folders]
    return [
        name if plain.count(name) == 1 else "/".join(folder.resolve().parts[-2:])
        for name, folder in zip(plain, folders, strict=True)
    ]


def _read(folder: Path, name: str) -> _Run:
    if not folder.is_dir():
        raise InputError(f"there is no run at {folder}")
    evaluations = {path.stem: _json(path) for path in sorted(folder.glob("evaluations/*.json"))}
    run = _Run(name, _json(folder / "run.json"), _json(folder / "history.json"), evaluations)
    if not (run.run or run.history or run.evaluations):
        raise InputError(
            f"{folder} holds neither a training run nor an evaluation: `student-train evaluate {folder}` makes one"
        )
    return run


def _json(path: Path) -> Record:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


# ---- the page


def _page(runs: list[_Run]) -> str:
    dumps = list(dict.fromkeys(dump for run in runs for dump in run.evaluations))
    sections = [_evaluated(runs, dump) for dump in dumps]
    unmeasured = [run.name for run in runs if not run.evaluations]
    if unmeasured:
        names = _listed(unmeasured)
        sections.append(
            f'<section><p class="missing">Not evaluated: {names}.'
            " <code>student-train evaluate</code> measures a model on a held-out dump.</p></section>"
        )
    sections.append(_learning(runs))
    teachers = {run.evaluations[dump]["dump"]["teacher"] for run in runs for dump in run.evaluations}
    teachers |= {run.run["dump"]["teacher"] for run in runs if "dump" in run.run}
    count = f"{len(runs)} student" + ("s" if len(runs) != 1 else "")
    lead = f"{count} of {_listed(sorted(teachers))}" if teachers else count
    return _TEMPLATE.format(
        style=_CSS, lead=lead, sections="\n".join(part for part in sections if part), provenance=_provenance(runs)
    )


def _evaluated(runs: list[_Run], dump: str) -> str:
    measured = [(index, run, run.evaluations[dump]) for index, run in enumerate(runs) if dump in run.evaluations]
    results = [result for _, _, result in measured]
    positions = {result["positions"] for result in results}
    about = f"{_listed_numbers(positions)} target positions of the dump <b>{html.escape(dump)}</b>"
    warning = ""
    if len(positions) > 1:
        warning = '<p class="missing">These were measured on different numbers of positions; do not compare them.</p>'
    largest = max(results, key=lambda result: result["positions"])
    return f"""
<section>
<h2>On held-out text</h2>
<p>Measured on {about}. Best student in each column in bold. {_SMALL_PRINT}</p>
{warning}
{_table(measured, largest["teacher"])}
</section>
<section>
<h2>Is the confidence deserved?</h2>
<p>Predictions are sorted by the probability of the likeliest token. Bars show how often that token was right; on the
diagonal, a model is right exactly as often as it says. Below it, it claims too much. Bars beneath count predictions.</p>
{_reliability(measured, largest["teacher"])}
</section>
<section>
<h2>What the store kept of the teacher</h2>
<p>{_coverage_words(largest)}</p>
{_coverage(largest)}
</section>"""


_SMALL_PRINT = (
    "KL is over the kept candidates and their tail as one more symbol: the true divergence is at least that."
    " Calibration error can be small for a poor model; read it beside the loss."
)


def _table(measured: list[tuple[int, _Run, Record]], teacher: Record) -> str:
    columns = []
    for metric in _METRICS:
        values = [metric.value(result) for _, _, result in measured]
        known = [round(value, 6) for value in values if value is not None]
        best = (min if metric.lowest else max)(known) if len(known) > 1 else None
        columns.append([(value, best is not None and value is not None and round(value, 6) == best) for value in values])
    head = "".join(f"<th>{metric.title}<small>{metric.note}</small></th>" for metric in _METRICS)
    rows = []
    for row, (index, run, _) in enumerate(measured):
        cells = "".join(
            f'<td class="best">{_number(*cell)}</td>' if cell[1] else f"<td>{_number(*cell)}</td>"
            for cell in (
                (column[row][0], column[row][1], metric.shown) for metric, column in zip(_METRICS, columns, strict=True)
            )
        )
        swatch = f'<i style="background: var(--series-{index % len(_SERIES) + 1})"></i>'
        rows.append(
            f"<tr><th>{swatch}{html.escape(run.name)}<small>{_described(run)}</small></th>{cells}<td>{_trained(run)}</td></tr>"
        )
    own = {"Held-out loss": "nll", "Accuracy": "accuracy", "Calibration error": "ece_15"}
    cells = "".join(
        f"<td>{_number(teacher.get(own[metric.title]) if metric.title in own else None, False, metric.shown)}</td>"
        for metric in _METRICS
    )
    rows.append(
        f'<tr class="teacher"><th><i style="background: var(--teacher)"></i>teacher'
        f"<small>from the store</small></th>{cells}<td>–</td></tr>"
    )
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}<th>Training<small>wall clock</small></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _number(value: float | None, best: bool, shown: str) -> str:
    return "–" if value is None else format(value, shown)


def _described(run: _Run) -> str:
    config = run.run.get("config", {})
    if not config:
        return "no training run here"
    words = [str(config["loss"])]
    if config["loss"] != "ce" and config["ce_weight"]:
        words.append(f"{config['ce_weight']:g} cross-entropy")
    if config["temperature"] != 1:
        words.append(f"temperature {config['temperature']:g}")
    if config["loss"] == "first":
        words.append(f"c {config['first_c']:g}")
    return html.escape(", ".join(words))


def _trained(run: _Run) -> str:
    if not run.history:
        return "–"
    time = duration(run.history.get("seconds", 0.0))
    return time if run.history.get("finished") else f"{time}, not finished"


def _coverage_words(result: Record) -> str:
    coverage = result["coverage"]
    means = coverage["mean_by_rank"]
    return (
        f"The {len(means)} likeliest tokens hold {means[-1]:.1%} of the teacher's probability on average, the likeliest"
        f" alone {means[0]:.1%}. What is left over is kept as one number, the tail."
    )


def _learning(runs: list[_Run]) -> str:
    curves = [(index, run, run.history.get("entries", [])) for index, run in enumerate(runs)]
    panels = [
        ("eval_kl", "KL to the teacher", "nats per token, lower bound"),
        ("eval_nll", "Loss on the text", "nats per token"),
    ]
    shown = [panel for panel in panels if any(panel[0] in entry for _, _, entries in curves for entry in entries)]
    words = "Measured during training, on documents of the training dump that were kept out of it."
    if not shown:
        shown = [("loss", "Training loss", "each run's own loss, nats per target")]
        words = "No documents were kept out of training, so this is each run's own training loss."
        if not any("loss" in entry for _, _, entries in curves for entry in entries):
            words = "None of these folders has a history of training."
            return f'<section><h2>Learning curves</h2><p class="missing">{words}</p></section>'
    figure = Figure(figsize=(9.85, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (name, title, unit) in zip(axes, shown, strict=True):
        for index, _, entries in curves:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                steps, values = zip(*points, strict=True)
                marker = "o" if len(points) < 40 else ""
                axis.plot(steps, values, color=_colour(index), linewidth=2, marker=marker, markersize=3.5)
        axis.set_title(title)
        axis.set_xlabel("optimiser step")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    without = [run.name for _, run, entries in curves if not any(shown[0][0] in entry for entry in entries)]
    missing = f'<p class="missing">No curve for {_listed(without)}.</p>' if without else ""
    alt = "Learning curves of " + ", ".join(run.name for _, run, entries in curves if entries)
    return f"""
<section>
<h2>Learning curves</h2>
<p>{words}</p>
{_legend((index, run.name) for index, run, entries in curves if entries)}
{_svg(figure, alt)}
{missing}
</section>"""


# ---- pictures


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _legend(names: Iterable[tuple[int, str]]) -> str:
    items = "".join(
        f'<li><i style="background: var(--series-{index % len(_SERIES) + 1})"></i>{html.escape(name)}</li>'
        for index, name in names
    )
    return f'<ul class="legend">{items}</ul>'


def _reliability(measured: list[tuple[int, _Run, Record]], teacher: Record) -> str:
    panels = [(run.name, _colour(index), result["student"]) for index, run, result in measured]
    panels.append(("teacher", _TEACHER, teacher))
    pictures = []
    for name, colour, side in panels:
        figure = Figure(figsize=(3.2, 3.9), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
        _reliability_panel(above, below, name, colour, side)
        pictures.append(_svg(figure, f"Reliability diagram of {name}: calibration error {side['ece_15']:.2%}"))
    return f'<div class="row">{"".join(pictures)}</div>'


def _reliability_panel(above: Axes, below: Axes, name: str, colour: str, side: Record) -> None:
    counts = np.array(side["reliability"]["counts"])
    bins = len(counts)
    centres = (np.arange(bins) + 0.5) / bins
    width = 0.86 / bins
    filled = counts > 0
    above.bar(centres[filled], np.array(side["reliability"]["accuracy"])[filled], width, color=colour, linewidth=0)
    above.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    above.set_title(_clipped(name))
    above.text(0.03, 0.95, f"ECE {side['ece_15']:.2%}", transform=above.transAxes, va="top", color=_FAINT, fontsize=10)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="how often right")
    below.bar(centres, counts, width, color=colour, alpha=0.55, linewidth=0)
    below.set(xlabel="how sure", ylabel="count")
    for axis in (above.xaxis, above.yaxis, below.xaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    below.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")


def _coverage(result: Record) -> str:
    coverage = result["coverage"]
    figure = Figure(figsize=(9.85, 3.2), layout="constrained")
    spread, ranks = figure.subplots(1, 2, width_ratios=[2, 1])
    edges = np.array(coverage["histogram"]["edges"])
    counts = np.array(coverage["histogram"]["counts"])
    means = coverage["mean_by_rank"]
    spread.bar(edges[:-1], counts / counts.sum(), np.diff(edges) * 0.9, align="edge", color=_TEACHER, linewidth=0)
    spread.axvline(means[-1], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    left = means[-1] > 0.5
    spread.annotate(
        f"mean {means[-1]:.1%}",
        (means[-1], 1),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, -4),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=10,
    )
    spread.set_title("How much the candidates hold, by position")
    spread.set(xlim=(0, 1), xlabel=f"probability of the {len(means)} candidates together", ylabel="share of positions")
    for axis in (spread.xaxis, spread.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    ranks.bar(range(1, len(means) + 1), means, 0.7, color=_TEACHER, linewidth=0)
    if len(means) <= 8:
        for rank, mean in enumerate(means, 1):
            ranks.annotate(
                f"{mean:.0%}", (rank, mean), (0, 2), textcoords="offset points", ha="center", fontsize=9, color=_FAINT
            )
    ranks.set_title("Mean, by how many are kept")
    ranks.set(ylim=(0, 1.05), xlabel="candidates kept")
    ranks.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ranks.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _svg(figure, f"Coverage: {len(means)} candidates hold {means[-1]:.1%} on average")


def _clipped(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:25]}…"


def _svg(figure: Figure, description: str) -> str:
    """A figure as inline SVG in the page's colours, named for those who cannot see it."""
    buffer = io.StringIO()
    # Ids inside a picture are hashed with this salt: no two pictures of a page share one, and a page is reproducible.
    with matplotlib.rc_context({"svg.hashsalt": description}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns:xlink|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="width: \2pt"', text, count=1)
    text = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    text = re.sub(r"font: bold ([\d.]+px) [^;\"]*", r"font: 600 \1 var(--sans)", text)
    label = html.escape(description, quote=True)
    return f'<figure role="img" aria-label="{label}">{text}</figure>'


# ---- where it came from


def _provenance(runs: list[_Run]) -> str:
    dumps: dict[str, Record] = {}
    for run in runs:
        for record in (run.run, *run.evaluations.values()):
            if "dump" in record:
                dumps[record["dump"]["name"]] = record["dump"]
    stored = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(dump['teacher']))}</td><td>{dump['sequences']:,}</td>"
        f"<td>{dump['positions']:,}</td><td>{_bytes(dump)}</td><td>{dump['top_k']}</td>"
        f"<td>{dump['quantisation_step']:g}</td><td>{dump['vocabulary_size']:,}</td></tr>"
        for name, dump in dumps.items()
    )
    store_table = (
        '<div class="scroll"><table class="small"><thead><tr><th>Dump</th><th>Teacher</th><th>Sequences</th><th>Positions'
        "</th><th>Size</th><th>Candidates</th><th>Step, nats</th><th>Vocabulary</th></tr></thead>"
        f"<tbody>{stored}</tbody></table></div>"
        if stored
        else ""
    )
    return store_table + "".join(_run_details(run) for run in runs)


def _bytes(dump: Record) -> str:
    size = dump.get("bytes")
    if not size:
        return "–"
    return f"{size / 1e6:,.2f} MB ({size / max(dump['positions'], 1):.1f} bytes a position)"


def _run_details(run: _Run) -> str:
    facts: Record = {}
    if run.run:
        facts |= {name: value for name, value in run.run["config"].items() if value is not None}
        facts["parameters"] = f"{run.run['parameters']:,}"
        facts["sequences"] = ", ".join(f"{count:,} {side}" for side, count in run.run["sequences"].items())
        facts["processes"] = run.run["world_size"]
    elif run.evaluations:
        facts["parameters"] = f"{next(iter(run.evaluations.values()))['parameters']:,}"
    for dump, result in run.evaluations.items():
        facts[f"evaluated on {dump}"] = f"{result['positions']:,} positions in {duration(result['seconds'])}"
    sources = [record["versions"] for record in (run.run, *run.evaluations.values()) if "versions" in record]
    if sources:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in sources[0].items())
    items = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()
    )
    return f"<details><summary>{html.escape(run.name)}</summary><dl>{items}</dl></details>"


def _listed(names: list[str]) -> str:
    marked = [f"<b>{html.escape(name)}</b>" for name in names]
    return marked[0] if len(marked) == 1 else f"{', '.join(marked[:-1])} and {marked[-1]}"


def _listed_numbers(numbers: Iterable[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(numbers))


_CSS = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2126; --faint: #646c76; --grid: #e4e4e0; --good: #0b6b4f;
  --mark: #e6f3ee; --teacher: #8a8f98;
  --series-1: #2f6bd0; --series-2: #d9722b; --series-3: #14866d; --series-4: #8e4ec6; --series-5: #c2375b;
  --series-6: #8a7500;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e9ebee; --faint: #9ba4af; --grid: #31373f; --good: #7fd8b8;
    --mark: #17342b; --teacher: #7d8590;
    --series-1: #6ea3f5; --series-2: #f09a5c; --series-3: #4cc2a3; --series-4: #bd8cf0; --series-5: #f07896;
    --series-6: #d2bb4a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1060px; margin: 0 auto; padding: 56px 24px 72px; }
header { margin-bottom: 36px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 8px; }
header p { font-size: 18px; color: var(--faint); margin: 0; }
header b { color: var(--ink); }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 14px; padding: 26px 30px 24px;
  margin-bottom: 22px; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 0 0 6px; }
section > p { max-width: 76ch; color: var(--faint); margin: 0 0 18px; font-size: 15px; }
section > p b { color: var(--ink); font-weight: 600; }
p.missing { border-left: 3px solid var(--series-2); padding-left: 12px; margin: 12px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 11px 12px; border-bottom: 1px solid var(--grid); vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
thead th { font-size: 14px; font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
small { display: block; font-size: 12px; font-weight: 400; color: var(--faint); }
td.best { font-weight: 700; color: var(--good); background: var(--mark); }
tr.teacher th, tr.teacher td { color: var(--faint); }
i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
figure { margin: 0; }
figure svg { max-width: 100%; height: auto; display: block; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 18px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 10px; padding: 0;
  font-size: 14px; }
.small { font-size: 13px; margin-bottom: 14px; }
.small th, .small td { padding: 7px 10px; }
details { font-size: 13px; border-top: 1px solid var(--grid); padding: 9px 0; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 10px 0 4px; }
dt { color: var(--faint); }
dd { margin: 0; white-space: normal; overflow-wrap: anywhere; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { section { break-inside: avoid; border: 0; padding: 0; } details { display: block; } }
@media (max-width: 640px) { main { padding: 28px 14px 40px; } section { padding: 18px 16px; } h1 { font-size: 27px; } }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Students compared</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Students compared</h1>
<p>{lead}</p>
</header>
{sections}
<section>
<h2>Where this comes from</h2>
<p>What the store holds, and how each run was made.</p>
{provenance}
</section>
</main>
</body>
</html>
"""
