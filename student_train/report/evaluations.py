"""The sections of evaluations: on the held-out text of a dump, and on questions."""

from __future__ import annotations

import html

from student_train.evaluation.comparison import comparable
from student_train.report import charts
from student_train.report.runs import Run, listed, listed_numbers
from student_train.report.tables import Metric, Side, compared, table
from student_train.training.run_folder import Record

ON_TEXT = [
    Metric("nll", "Held-out loss", "nats per token", ".3f"),
    Metric("kl_lower_bound", "KL to the teacher", "nats, lower bound", ".3f"),
    Metric("top_1_agreement", "Agreement", "top-1, with the teacher", ".1%", False),
    Metric("accuracy", "Accuracy", "top-1, on the text", ".1%", False),
    Metric("brier", "Brier", "full vocabulary", ".4f"),
    Metric("ece_10", "ECE", "10 bins", ".2%"),
    Metric("ece_15", "ECE", "15 bins", ".2%"),
    Metric("adaptive_ece", "Adaptive ECE", "equal counts", ".2%"),
    Metric("full_ece", "Full-ECE", "every token", ".2%"),
]
ON_QUESTIONS = [
    Metric("accuracy", "Accuracy", "of the chosen option", ".1%", False),
    Metric("nll", "NLL", "nats per question", ".3f"),
    Metric("brier", "Brier", "0 to 2", ".3f"),
    Metric("ece_10", "ECE", "10 bins", ".1%"),
    Metric("ece_15", "ECE", "15 bins", ".1%"),
    Metric("adaptive_ece", "Adaptive ECE", "equal counts", ".1%"),
]


_CONFIDENCES = {
    "first_token": "First token: the full-vocabulary probability of the option's first token",
    "options": "Over the options: the same, made to sum to one over the options",
    "sequence": "Whole sequence: each option's likelihood, made to sum to one over the options",
}


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


def evaluated(runs: list[Run], name: str, on_questions: bool) -> str:
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
        *([f"Not measured here: {listed(missing)}."] if missing else []),
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


def _on_text(measured: list[tuple[int, Run, Record]], name: str) -> list[str]:
    dump = measured[0][2]["dump"]["name"]
    texts = [(index, run, result, result["figures"]["positions"]) for index, run, result in measured]
    largest = max((text for *_, text in texts), key=lambda text: text["positions"])
    sides = []
    for index, run, result, text in texts:
        sides.append(Side(run.name, index, text["student"], text["per_sequence"], result))
        if "post_hoc" in text:
            scaled = text["post_hoc"]
            sides.append(Side(run.name, index, scaled["student"], scaled["per_sequence"], result, scaled["temperature"]))
    teacher = Side("teacher", None, largest["teacher"], None, measured[0][2])
    positions = listed_numbers({text["positions"] for *_, text in texts})
    candidates = " KL is over the kept candidates and their tail as one more symbol: the true one is at least that."
    has_kl = any("kl_lower_bound" in side.figures for side in sides)
    panels = [_panel(side) for side in (*sides, teacher) if "reliability" in side.figures]
    parts = [
        f"<h2>On held-out text: {html.escape(name)}</h2>"
        f"<p>{positions} target positions of the dump <b>{html.escape(dump)}</b>.</p>",
        table([("", [*sides, teacher])], ON_TEXT),
        f'<p class="note">{_INTERVALS.format(units="sequences")}{candidates if has_kl else ""}</p>',
        compared([("", sides)], ON_TEXT),
        f"<h3>Is the confidence deserved?</h3><p>{_DIAGRAMS} The confidence is the probability of the likeliest token.</p>",
        charts.reliability_row(panels, f"text {name}"),
    ]
    if "coverage" in largest:
        parts.append(f"<h3>Top-k coverage of the teacher</h3><p>{_coverage_words(largest['coverage']['mean_by_rank'])}</p>")
        parts.append(charts.coverage(largest["coverage"], f"coverage {name}"))
    return parts


def _coverage_words(means: list[float]) -> str:
    return (
        f"The candidates, {len(means)} at most, hold {means[-1]:.1%} of the teacher's probability on average, the likeliest"
        f" alone {means[0]:.1%}. What is left over is the tail."
    )


def _on_questions(measured: list[tuple[int, Run, Record]], name: str) -> list[str]:
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
    options = listed_numbers(asked["options"])
    control = any(side.temperature is not None for _, sides in groups for side in sides)
    temperature = (
        " Rows at a temperature T are the control for every claim of better calibration: the same student, its logits divided"
        " after training by a T that was fitted on other questions."
    )
    parts = [
        f"<h2>Questions: {html.escape(name)}</h2>"
        f"<p>{asked['count']:,} questions of {options} options, answered by {html.escape(asked['answer_as'])}.{words}</p>",
        table(groups, ON_QUESTIONS),
        f'<p class="note">{_INTERVALS.format(units="questions")}{temperature if control else ""}</p>',
        compared(groups[:1], ON_QUESTIONS),
        f"<h3>Is the confidence deserved?</h3><p>{_DIAGRAMS}</p>",
    ]
    for title, sides in groups:
        row = charts.reliability_row([_panel(side) for side in sides], f"questions {name} {title}")
        parts.append(f"<h4>{title}</h4>{row}")
    return parts


def _question_sides(measured: list[tuple[int, Run, Record]], confidence: str) -> list[Side]:
    sides = []
    for index, run, result in measured:
        for part in (result, result.get("post_hoc", {})):
            if confidence in part:
                figures = part[confidence]
                sides.append(Side(run.name, index, figures, figures["answers"], result, figures.get("temperature")))
    return sides


def _panel(side: Side) -> charts.Panel:
    colour = charts.TEACHER if side.index is None else charts.colour(side.index)
    return charts.Panel(side.name, colour, side.figures, side.temperature)
