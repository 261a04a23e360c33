"""Runs side by side on one HTML page: tables with intervals, reliability diagrams, differences, costs, and where it came from.

The page is one file with everything in it: no scripts, no links to follow, pictures as inline SVG. It reads the JSON that
`run` and `evaluate` leave beside a model, needs no torch, and says so where a piece is missing.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.terminal.progress import duration
from student_train.evaluation.comparison import Difference, comparable, differences
from student_train.evaluation.results import Record, printable, read_evaluation, read_history, read_run
from student_train.report import charts
from student_train.report.page import FRAME, STYLE


@dataclass(frozen=True)
class _Run:
    """What a folder holds: any of the three may be empty."""

    name: str
    run: Record
    history: Record
    evaluations: dict[str, Record]  # by the file's name


@dataclass(frozen=True)
class _Side:
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
class _Metric:
    """A column of a table."""

    name: str
    title: str
    note: str
    form: str
    lowest: bool = True

    def shown(self, value: float | None) -> str:
        """The number as it is printed."""
        return "–" if value is None else format(value, self.form)


_ON_TEXT = [
    _Metric("nll", "Held-out loss", "nats per token", ".3f"),
    _Metric("kl_lower_bound", "KL to the teacher", "nats, lower bound", ".3f"),
    _Metric("top_1_agreement", "Agreement", "top-1, with the teacher", ".1%", False),
    _Metric("accuracy", "Accuracy", "top-1, on the text", ".1%", False),
    _Metric("brier", "Brier", "full vocabulary", ".4f"),
    _Metric("ece_10", "ECE", "10 bins", ".2%"),
    _Metric("ece_15", "ECE", "15 bins", ".2%"),
    _Metric("adaptive_ece", "Adaptive ECE", "equal counts", ".2%"),
    _Metric("full_ece", "Full-ECE", "every token", ".2%"),
]
_ON_QUESTIONS = [
    _Metric("accuracy", "Accuracy", "of the chosen option", ".1%", False),
    _Metric("nll", "NLL", "nats per question", ".3f"),
    _Metric("brier", "Brier", "0 to 2", ".3f"),
    _Metric("ece_10", "ECE", "10 bins", ".1%"),
    _Metric("ece_15", "ECE", "15 bins", ".1%"),
    _Metric("adaptive_ece", "Adaptive ECE", "equal counts", ".1%"),
]
_CONFIDENCES = {
    "first_token": "First token: the full-vocabulary probability of the option's first token",
    "options": "Over the options: the same, made to sum to one over the options",
    "sequence": "Whole sequence: each option's likelihood, made to sum to one over the options",
}


def write_report(runs: Iterable[str | Path], output: str | Path) -> Path:
    """Write the page.

    Args:
        runs: folders that `run` or `evaluate` wrote into, in the order in which they are to be shown; all others are
            compared with the first.
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
    with charts.style():
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
    evaluations = {printable(path.stem): read_evaluation(path) for path in sorted(folder.glob("evaluations/*.json"))}
    run = _Run(printable(name), read_run(folder), read_history(folder), evaluations)
    if not (run.run or run.history or run.evaluations):
        raise InputError(
            f"{folder} holds neither a training run nor an evaluation: `student-train evaluate {folder}` makes one"
        )
    return run


# ---- the page


def _page(runs: list[_Run]) -> str:
    places = dict.fromkeys(("questions" in result, name) for run in runs for name, result in run.evaluations.items())
    sections = [_evaluated(runs, name, on_questions) for on_questions, name in places]
    unmeasured = [run.name for run in runs if not run.evaluations]
    if unmeasured:
        names = _listed(unmeasured)
        sections.append(
            f'<section><p class="missing">Not evaluated: {names}.'
            " <code>student-train evaluate</code> measures a model on a held-out dump, or on questions.</p></section>"
        )
    sections += [_costs(runs), _learning(runs)]
    teachers = {str(record["dump"]["teacher"]) for run in runs for record in _records(run) if "dump" in record}
    count = f"{len(runs)} student" + ("s" if len(runs) != 1 else "")
    lead = f"{count} of {_listed(sorted(teachers))}" if teachers else count
    return FRAME.format(
        style=STYLE, lead=lead, sections="\n".join(part for part in sections if part), provenance=_provenance(runs)
    )


def _records(run: _Run) -> list[Record]:
    return [run.run, *run.evaluations.values()]


def _evaluated(runs: list[_Run], name: str, on_questions: bool) -> str:
    """The section of one evaluation, over all runs that have it."""
    measured = [
        (index, run, run.evaluations[name])
        for index, run in enumerate(runs)
        if name in run.evaluations and ("questions" in run.evaluations[name]) == on_questions
    ]
    results = [result for _, _, result in measured]
    parts = _on_questions(measured, name) if on_questions else _on_text(measured, name)
    alike = all(comparable(result, results[0]) for result in results[1:])
    missing = [run.name for run in runs if name not in run.evaluations and run.evaluations]
    warnings = [
        *([] if alike else ["These were not measured on the same questions or sequences; do not compare them."]),
        *([f"Not measured here: {_listed(missing)}."] if missing else []),
    ]
    return "\n".join(
        [
            "<section>",
            parts[0],
            *(f'<p class="missing">{warning}</p>' for warning in warnings),
            *parts[1:],
            "</section>",
        ]
    )


_INTERVALS = (
    "In small type, where 95 of 100 resamples of the {units} lie (percentile bootstrap); a calibration error sums absolute"
    " values and comes out higher on a resample, so it can lie below. Best in each column in bold. Calibration error can be"
    " small for a poor model: read it beside the loss, which no model gains by pretending."
)
_DIAGRAMS = (
    "Answers are sorted by their confidence. A bar shows how often the answers of a bin were right; on the diagonal, a model is"
    ' right exactly as often as it says. <i style="background: var(--over)"></i>what it claims beyond that,'
    ' <i style="background: var(--under)"></i>what it could have claimed. Pale bars hold fewer than ten answers; the small'
    " bars beneath show where the answers are."
)


def _on_text(measured: list[tuple[int, _Run, Record]], name: str) -> list[str]:
    largest = max((result for _, _, result in measured), key=lambda result: result["positions"])
    sides = []
    for index, run, result in measured:
        sides.append(_Side(run.name, index, result["student"], result.get("per_sequence"), result))
        if "post_hoc" in result:
            scaled = result["post_hoc"]
            kept, temperature = scaled["per_sequence"], scaled["temperature"]
            sides.append(_Side(run.name, index, scaled["student"], kept, result, temperature))
    teacher = _Side("teacher", None, largest["teacher"], None, largest)
    positions = _listed_numbers({result["positions"] for _, _, result in measured})
    candidates = " KL is over the kept candidates and their tail as one more symbol: the true one is at least that."
    has_kl = any("kl_lower_bound" in side.figures for side in sides)
    panels = [_panel(side) for side in (*sides, teacher) if "reliability" in side.figures]
    parts = [
        f"<h2>On held-out text: {html.escape(name)}</h2>"
        f"<p>{positions} target positions of the dump <b>{html.escape(largest['dump']['name'])}</b>.</p>",
        _table([("", [*sides, teacher])], _ON_TEXT),
        f'<p class="note">{_INTERVALS.format(units="sequences")}{candidates if has_kl else ""}</p>',
        _compared([("", sides)], _ON_TEXT),
        f"<h3>Is the confidence deserved?</h3><p>{_DIAGRAMS} The confidence is the probability of the likeliest token.</p>",
        charts.reliability_row(panels, f"text {name}"),
    ]
    if "coverage" in largest:
        parts.append(f"<h3>What the store kept of the teacher</h3><p>{_coverage_words(largest)}</p>")
        parts.append(charts.coverage(largest["coverage"], f"coverage {name}"))
    return parts


def _on_questions(measured: list[tuple[int, _Run, Record]], name: str) -> list[str]:
    first = measured[0][2]
    asked = first["questions"]
    shown = [confidence for confidence in _CONFIDENCES if any(confidence in result for _, _, result in measured)]
    words = ""
    if asked["shared_first_token"]:
        words = (
            f" The options of {asked['shared_first_token']:,} questions share their first token, which says nothing of them:"
            " the first token and the options are measured on the others, and the whole sequence is what to judge by."
        )
        shown.sort(key=lambda confidence: confidence != "sequence")
    elif asked["answer_as"] == "letter" and len(shown) > 1:
        shown = [confidence for confidence in shown if confidence != "sequence"]
        words = " A letter is one token, so the likelihood of the whole sequence is that of the first token over the options."
    groups = [(_CONFIDENCES[confidence], _question_sides(measured, confidence)) for confidence in shown]
    options = _listed_numbers(asked["options"])
    control = any(side.temperature is not None for _, sides in groups for side in sides)
    temperature = (
        " Rows at a temperature T are the control for every claim of better calibration: the same student, its logits divided"
        " after training by a T that was fitted on other questions."
    )
    parts = [
        f"<h2>Questions: {html.escape(name)}</h2>"
        f"<p>{asked['count']:,} questions of {options} options, answered by {html.escape(asked['answer_as'])}.{words}</p>",
        _table(groups, _ON_QUESTIONS),
        f'<p class="note">{_INTERVALS.format(units="questions")}{temperature if control else ""}</p>',
        _compared(groups[:1], _ON_QUESTIONS),
        f"<h3>Is the confidence deserved?</h3><p>{_DIAGRAMS}</p>",
    ]
    for title, sides in groups:
        row = charts.reliability_row([_panel(side) for side in sides], f"questions {name} {title}")
        parts.append(f"<h4>{title}</h4>{row}")
    return parts


def _question_sides(measured: list[tuple[int, _Run, Record]], confidence: str) -> list[_Side]:
    sides = []
    for index, run, result in measured:
        for found in (result, result.get("post_hoc", {})):
            if confidence in found:
                figures = found[confidence]
                sides.append(_Side(run.name, index, figures, figures["answers"], result, figures.get("temperature")))
    return sides


def _panel(side: _Side) -> charts.Panel:
    colour = charts.TEACHER if side.index is None else charts.colour(side.index)
    return charts.Panel(side.name, colour, side.figures, side.temperature)


# ---- tables


def _table(groups: Sequence[tuple[str, list[_Side]]], metrics: list[_Metric]) -> str:
    """A row for each side with its figures and their intervals; the best of each group is marked, the teacher aside."""
    sides = [side for _, each in groups for side in each]
    metrics = [metric for metric in metrics if any(metric.name in side.figures for side in sides)]
    head = "".join(f"<th>{metric.title}<small>{metric.note}</small></th>" for metric in metrics)
    rows = []
    for title, each in groups:
        if title:
            rows.append(f'<tr class="group"><th colspan="{len(metrics) + 1}">{title}</th></tr>')
        best = {metric.name: _best(each, metric) for metric in metrics}
        for side in each:
            cells = "".join(_cell(side, metric, best[metric.name]) for metric in metrics)
            about = "<small>from the store</small>" if side.index is None else ""
            rows.append(f"<tr{_kind(side)}><th>{charts.swatch(side.index)}{html.escape(side.label)}{about}</th>{cells}</tr>")
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _kind(side: _Side) -> str:
    return ' class="teacher"' if side.index is None else ' class="scaled"' if side.temperature is not None else ""


def _best(sides: list[_Side], metric: _Metric) -> str | None:
    """The best figure as it is printed, so that what looks alike is marked alike; None when nothing is to be chosen from."""
    values = [side.figures[metric.name] for side in sides if side.index is not None and metric.name in side.figures]
    return metric.shown((min if metric.lowest else max)(values)) if len(values) > 1 else None


def _cell(side: _Side, metric: _Metric, best: str | None) -> str:
    shown = metric.shown(side.figures.get(metric.name))
    interval = side.figures.get("intervals", {}).get(metric.name)
    ends = f"<small>{'–'.join(metric.shown(end).removesuffix('%') for end in interval)}</small>" if interval else ""
    marked = ' class="best"' if side.index is not None and shown == best else ""
    return f"<td{marked}>{shown}{ends}</td>"


def _compared(groups: Sequence[tuple[str, list[_Side]]], metrics: list[_Metric]) -> str:
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


def _difference_table(reference: _Side, rows: list[tuple[_Side, dict[str, Difference]]], metrics: list[_Metric]) -> str:
    metrics = [metric for metric in metrics if any(metric.name in found for _, found in rows)]
    head = "".join(f"<th>{metric.title}<small>{metric.note}</small></th>" for metric in metrics)
    body = "\n".join(
        f"<tr{_kind(side)}><th>{charts.swatch(side.index)}{html.escape(side.label)}</th>"
        + "".join(_difference_cell(found.get(metric.name), metric) for metric in metrics)
        + "</tr>"
        for side, found in rows
    )
    title = f"against {charts.swatch(reference.index)}{html.escape(reference.label)}"
    return (
        f'<div class="scroll"><table class="differences"><thead><tr><th>{title}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _difference_cell(found: Difference | None, metric: _Metric) -> str:
    if found is None:
        return "<td>–</td>"

    def signed(value: float) -> str:
        text = format(value, f"+{metric.form}").removesuffix("%")
        return text.replace("-", "−")

    kind = ""
    if found.clear:
        kind = ' class="better"' if (found.value < 0) == metric.lowest else ' class="worse"'
    unit = " pp" if metric.form.endswith("%") else ""
    ends = "" if math.isnan(found.low) else f"<small>{signed(found.low)} to {signed(found.high)}</small>"
    return f"<td{kind}>{signed(found.value)}{unit}{ends}</td>"


# ---- costs


def _costs(runs: list[_Run]) -> str:
    """What each run learned from, in bytes, and how long it took."""
    trained = [(index, run) for index, run in enumerate(runs) if run.run or run.history]
    if not trained:
        return ""
    rows = []
    for index, run in trained:
        dump = run.run.get("dump", {})
        positions = dump.get("positions")
        each = f"{dump['bytes'] / positions:.1f}" if dump.get("bytes") and positions else "–"
        size = f"{dump['bytes'] / 1e6:,.2f} MB" if dump.get("bytes") else "–"
        dense = dump.get("targets", 0) * dump.get("vocabulary_size", 0) * 4
        ratio = f"{dense / dump['bytes']:,.0f}×" if dense and dump.get("bytes") else "–"
        parameters = f"{run.run['parameters']:,}" if "parameters" in run.run else "–"
        read = dump.get("bytes_read")
        used = f"<small>{read / positions:.1f} of what its loss reads</small>" if read and positions else ""
        rows.append(
            f"<tr><th>{charts.swatch(index)}{html.escape(run.name)}<small>{_described(run)}</small></th>"
            f"<td>{html.escape(str(dump.get('name', '–')))}<small>{html.escape(_selection(dump))}</small></td>"
            f"<td>{each}{used}</td><td>{size}</td><td>{ratio}</td><td>{parameters}</td><td>{_trained(run)}</td></tr>"
        )
    body = "\n".join(rows)
    return f"""
<section>
<h2>What it cost</h2>
<p>The dump that each run learned from, as it lies on disk, everything in it but the vocabulary. Beside it, how much larger the
teacher's whole distributions would be: targets × vocabulary × 4 bytes. In small type, what is left without the columns that the
run's loss has no use for.</p>
<div class="scroll"><table><thead><tr><th></th><th>Dump<small>selection</small></th><th>Bytes<small>a position</small></th>
<th>On disk</th><th>Dense<small>as many times that</small></th><th>Parameters<small>of the student</small></th>
<th>Training<small>wall clock</small></th></tr></thead><tbody>{body}</tbody></table></div>
</section>"""


def _selection(dump: Record) -> str:
    if "selection" in dump:
        return str(dump["selection"])
    return f"top-k {dump['top_k']}" if "top_k" in dump else ""


# Options of a run that are worth a word where they matter: the field, the loss that takes it (None: any), and its word.
_OPTIONS = [
    ("first_c", "first", "c"),
    ("beta", "jensen-shannon", "β"),
    ("skew", "skewed-kl", "λ"),
    ("skew", "skewed-reverse-kl", "λ"),
    ("smoothing", "label-smoothing", "smoothing"),
]


def _described(run: _Run) -> str:
    config = run.run.get("config", {})
    if not config:
        return "no training run here"
    words = [str(config["loss"])]
    if config["loss"] != "ce" and config["ce_weight"]:
        words.append(f"{config['ce_weight']:g} cross-entropy")
    if config["temperature"] != 1:
        words.append(f"temperature {config['temperature']:g}")
    words += [f"{word} {config[field]:g}" for field, loss, word in _OPTIONS if config["loss"] == loss and field in config]
    if config.get("tail", "auto") != "auto":
        words.append(f"tail as {config['tail']}")
    if config.get("calibration"):
        words.append("re-calibrated")
    return html.escape(", ".join(words))


def _trained(run: _Run) -> str:
    if not run.history:
        return "–"
    time = duration(run.history.get("seconds", 0.0))
    return time if run.history.get("finished") else f"{time}, not finished"


def _coverage_words(result: Record) -> str:
    means = result["coverage"]["mean_by_rank"]
    return (
        f"The candidates, {len(means)} at most, hold {means[-1]:.1%} of the teacher's probability on average, the likeliest"
        f" alone {means[0]:.1%}. What is left over is the tail."
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
    drawn = [
        (
            title,
            unit,
            [
                charts.Curve(charts.colour(index), [(entry["step"], entry[name]) for entry in entries if name in entry])
                for index, _, entries in curves
            ],
        )
        for name, title, unit in shown
    ]
    without = [run.name for _, run, entries in curves if not any(shown[0][0] in entry for entry in entries)]
    missing = f'<p class="missing">No curve for {_listed(without)}.</p>' if without else ""
    trained = [(index, run.name) for index, run, entries in curves if entries]
    legend = "".join(f"<li>{charts.swatch(index)}{html.escape(name)}</li>" for index, name in trained)
    return f"""
<section>
<h2>Learning curves</h2>
<p>{words}</p>
<ul class="legend">{legend}</ul>
{charts.learning_curves(drawn, "Learning curves of " + ", ".join(name for _, name in trained))}
{missing}
</section>"""


# ---- where it came from


def _provenance(runs: list[_Run]) -> str:
    dumps: dict[str, Record] = {}
    for run in runs:
        for record in _records(run):
            if "dump" in record:
                dumps[record["dump"]["name"]] = record["dump"]
    stored = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(dump['teacher']))}</td><td>{dump['sequences']:,}</td>"
        f"<td>{dump['positions']:,}</td><td>{_bytes(dump)}</td><td>{html.escape(_selection(dump))}</td>"
        f"<td>{dump['quantisation_step']:g}</td><td>{dump['vocabulary_size']:,}</td></tr>"
        for name, dump in dumps.items()
    )
    store_table = (
        '<div class="scroll"><table class="small"><thead><tr><th>Dump</th><th>Teacher</th><th>Sequences</th><th>Positions'
        "</th><th>Size</th><th>Selection</th><th>Step, nats</th><th>Vocabulary</th></tr></thead>"
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
    for name, result in run.evaluations.items():
        size = f"{result['questions']['count']:,} questions" if "questions" in result else f"{result['positions']:,} positions"
        facts[f"evaluated on {name}"] = f"{size} in {duration(result['seconds'])}"
        if "post_hoc" in result:
            facts[f"temperature for {name}"] = f"from {result['post_hoc']['file']}"
    sources = [record["versions"] for record in _records(run) if "versions" in record]
    if sources:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in sources[0].items())
    items = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()
    )
    return f"<details><summary>{html.escape(run.name)}</summary><dl>{items}</dl></details>"


def _listed(names: Sequence[str]) -> str:
    marked = [f"<b>{html.escape(name)}</b>" for name in names]
    return marked[0] if len(marked) == 1 else f"{', '.join(marked[:-1])} and {marked[-1]}"


def _listed_numbers(numbers: Iterable[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(numbers))
