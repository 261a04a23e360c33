"""The figures on multiple-choice questions, declared: `multiple_choice` measures them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from student_train.evaluation.bootstrap import calibration_gaps
from student_train.evaluation.comparison import Difference, calibration_difference, mean_difference
from student_train.evaluation.figures import Figures, Measurement, Metric, Row, calibration_errors
from student_train.training.run_folder import Record

MIN_QUESTIONS = 200  # to fit a temperature on
SAMPLE = ("sha256", "answer_as", "shared_first_token")  # alike in results on the same questions

METRICS = (
    Metric("accuracy", "Accuracy", "of the chosen option", ".1%", lowest=False),
    Metric("nll", "NLL", "nats per question", ".3f"),
    Metric("brier", "Brier", "0 to 2", ".3f"),
    *calibration_errors(".1%"),
)
# The confidences of `multiple_choice`: what `evaluate` calls each, and its heading in the report.
CONFIDENCES = {
    "first_token": ("first token", "First token: the full-vocabulary probability of the option's first token"),
    "options": ("over the options", "Over the options: the same, made to sum to one over the options"),
    "sequence": ("whole sequence", "Whole sequence: each option's likelihood, made to sum to one over the options"),
}


def _confidences(record: Record) -> list[str]:
    """Those that are shown, the one to judge by first."""
    names = [name for name in CONFIDENCES if name in record]
    if record["questions"]["shared_first_token"]:
        return sorted(names, key=lambda name: name != "sequence")
    # The likelihood of a letter, which is one token, is that of the first token over the options.
    return [name for name in names if name != "sequence" or record["questions"]["answer_as"] != "letter"]


def _rows(record: Record) -> list[Row]:
    rows = []
    for name in _confidences(record):
        label, heading = CONFIDENCES[name]
        for part in (record, record.get("post_hoc", {})):
            if name in part:
                figures = part[name]
                rows.append(Row(label, figures, figures["answers"], figures.get("temperature"), group=heading))
    return rows


def _words(measurement: Measurement) -> str:
    asked = measurement.record["questions"]
    options = " or ".join(f"{number:,}" for number in asked["options"])
    words = f"Each has {options} options and is answered by {asked['answer_as']}."
    if asked["shared_first_token"]:
        return (
            f"{words} The options of {asked['shared_first_token']:,} questions share their first token, which says nothing of"
            " them: the first token and the options are measured on the others, and the whole sequence is what to judge by."
        )
    if asked["answer_as"] == "letter" and "sequence" in measurement.record:
        return f"{words} A letter is one token: the likelihood of the whole sequence is that of the first token over options."
    return words


def _remarks(measurement: Measurement) -> Iterator[str]:
    clashing = measurement.record["questions"]["shared_first_token"]
    if clashing:
        yield (
            f"{clashing:,} of the questions have options that share their first token, which says nothing of them: judge by the"
            " whole sequence."
        )
    if any(row.figures.get("at_edge") for row in measurement.rows):
        yield "A fitted temperature is at the edge of its range: the best one lies beyond it, or does not exist."
    fitted_on = measurement.record.get("post_hoc", {}).get("questions", MIN_QUESTIONS)
    if fitted_on < MIN_QUESTIONS:
        yield f"The temperature is fitted on {fitted_on:,} questions, which are few: use {MIN_QUESTIONS} or more."


def _differences(one: Record, other: Record) -> dict[str, Difference]:
    """Of what is kept of each question. The values are those of the rounded numbers of a result."""
    counts = np.ones(len(one["nll"]))
    columns = (("nll", "nll"), ("accuracy", "correct"), ("brier", "brier"))
    result = {name: mean_difference(one[column], other[column], counts) for name, column in columns}
    for bins in (10, 15):
        first, second = (
            calibration_gaps(np.array(kept["confidence"]), np.array(kept["correct"]), bins) for kept in (one, other)
        )
        result[f"ece_{bins}"] = calibration_difference(first, second, counts)
    return result


QUESTION_FIGURES = Figures(
    title="Questions",
    metrics=METRICS,
    rows=_rows,
    counted="questions",
    count=lambda measurement: measurement.record["questions"]["count"],
    resampled="questions",
    sample=lambda measurement: [
        measurement.record["questions"][name] for name in ("sha256", "answer_as", "shared_first_token")
    ],
    differences=_differences,
    words=_words,
    remarks=_remarks,
)
