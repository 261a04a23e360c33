"""The sections on training: what the dumps took on disk, and the learning curves."""

from __future__ import annotations

import html

from student_train.evaluation.figures import Curve
from student_train.evaluation.kinds import FIGURES
from student_train.report import charts
from student_train.report.runs import Run, dumps_of, listed
from student_train.training.run_folder import Record

TEXT_CURVE = Curve("eval_nll", "Loss on the text", "nats per token")
RATIONALE_CURVE = Curve("eval_rationale", "Loss on the rationales", "nats per token")
ACCURACY_CURVE = Curve("eval_accuracy", "Groups in order", "share whose best answer has a higher reward than the worst")
MARGIN_CURVE = Curve("eval_margin", "Margin", "reward of the best answer less that of the worst")
HIDDEN_CURVE = Curve("eval_hidden", "Distance of the hidden states", "as --hidden-loss measures it")


def costs(runs: list[Run]) -> str:
    """What each run learned from, in bytes."""
    trained = [(index, run) for index, run in enumerate(runs) if run.run]
    if not trained:
        return ""
    rows = []
    words: dict[str, None] = {}
    for index, run in trained:
        for dump in dumps_of(run.run):
            size, positions, read = (dump.get(name) for name in ("bytes", "positions", "bytes_read"))
            whole = 0
            for kind, facts in dump.get("kinds", {}).items():
                if kind in FIGURES and (whole_bytes := facts.get(FIGURES[kind].whole_bytes)):
                    whole += whole_bytes
                    words[FIGURES[kind].whole_words] = None
            per_position = f"{size / positions:.1f}" if size and positions else "–"
            used = f"<small>{read / positions:.1f} of what its loss reads</small>" if read and positions else ""
            on_disk = f"{size / 1e6:,.2f} MB" if size else "–"
            ratio = f"{whole / size:,.0f}×" if whole and size else "–"
            rows.append(
                f"<tr><th>{charts.swatch(index)}{html.escape(run.name)}</th>"
                f"<td>{html.escape(str(dump.get('name', '–')))}<small>{html.escape(knowledge(dump))}</small></td>"
                f"<td>{per_position}{used}</td><td>{on_disk}</td><td>{ratio}</td></tr>"
            )
    body = "\n".join(rows)
    return f"""
<section>
<h2>What it cost</h2>
<p>The dumps that each run learned from, as they lie on disk, everything in them but the vocabulary. Beside it, how much more
their knowledge would take if all of it were kept. {html.escape(" ".join(words))} In small type, what is left without the
columns that the run's loss has no use for.</p>
<div class="scroll"><table><thead><tr><th></th><th>Dump<small>its knowledge</small></th><th>Bytes<small>a position</small></th>
<th>On disk</th><th>Kept whole<small>as many times that</small></th></tr></thead><tbody>{body}</tbody></table></div>
</section>"""


def knowledge(dump: Record) -> str:
    """The kinds of knowledge of a dump, each with what it states in words: "positions: top-k 32"."""
    kinds = []
    for kind, facts in dump.get("kinds", {}).items():
        words = [fact for fact in facts.values() if isinstance(fact, str)]
        kinds.append(f"{kind}: {', '.join(words)}" if words else kind)
    return "; ".join(kinds)


def learning(runs: list[Run]) -> str:
    curves = [(index, run, run.history.get("entries", [])) for index, run in enumerate(runs)]
    declared = [*(curve for figures in FIGURES.values() for curve in figures.curves), TEXT_CURVE, RATIONALE_CURVE, HIDDEN_CURVE]
    declared += [ACCURACY_CURVE, MARGIN_CURVE]
    shown = [curve for curve in declared if any(curve.name in entry for _, _, entries in curves for entry in entries)]
    words = "Measured during training, on documents of the training dumps that were kept out of it."
    if not shown:
        shown = [Curve("loss", "Training loss", "the run's own objective, nats per target")]
        words = "No documents were kept out of training, so this is each run's own training loss."
        if not any("loss" in entry for _, _, entries in curves for entry in entries):
            words = "None of these folders has a history of training."
            return f'<section><h2>Learning curves</h2><p class="missing">{words}</p></section>'
    drawn = [
        (
            curve.title,
            curve.unit,
            [
                charts.Curve(
                    charts.colour(index), [(entry["step"], entry[curve.name]) for entry in entries if curve.name in entry]
                )
                for index, _, entries in curves
            ],
        )
        for curve in shown
    ]
    without = [run.name for _, run, entries in curves if not any(shown[0].name in entry for entry in entries)]
    warnings = [f"No curve for {listed(without)}."] if without else []
    if (
        len({frozenset(str(dump["name"]) for dump in dumps_of(run.run)) for _, run, entries in curves if entries and run.run})
        > 1
    ):
        warnings.append("These runs read other dumps, so the documents that were kept out of them are not the same.")
    trained = [(index, run.name) for index, run, entries in curves if entries]
    legend = "".join(f"<li>{charts.swatch(index)}{html.escape(name)}</li>" for index, name in trained)
    return f"""
<section>
<h2>Learning curves</h2>
<p>{words}</p>
<ul class="legend">{legend}</ul>
{charts.learning_curves(drawn, "Learning curves of " + ", ".join(name for _, name in trained))}
{"".join(f'<p class="missing">{warning}</p>' for warning in warnings)}
</section>"""
