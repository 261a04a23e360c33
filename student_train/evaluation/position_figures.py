"""The figures of the kind `positions`, declared: this file and `positions`, which measures them, know that kind."""

from __future__ import annotations

import numpy as np

from student_train.deferred import deferred
from student_train.evaluation.comparison import Difference, calibration_difference, mean_difference
from student_train.evaluation.figures import KindFigures, Metric, Row, calibration_errors
from student_train.training.run_folder import Record

METRICS = (
    Metric("nll", "Loss on the text", "nats per token", ".3f"),
    Metric(
        "kl_lower_bound",
        "KL to the teacher",
        "nats, lower bound",
        ".3f",
        remark="KL is over the kept candidates and their tail as one more symbol: the true one is at least that.",
    ),
    Metric("top_1_agreement", "Agreement", "top-1, with the teacher", ".1%", lowest=False),
    Metric("accuracy", "Accuracy", "top-1, on the text", ".1%", lowest=False),
    Metric("brier", "Brier", "full vocabulary", ".4f"),
    *calibration_errors(".2%"),
    Metric("full_ece", "Full-ECE", "every token", ".2%"),
)
MEANS = ("nll", "kl_lower_bound", "top_1_agreement", "accuracy", "brier")


def _rows(record: Record) -> list[Row]:
    rows = [
        Row("student", record["student"], record["per_sequence"]),
        Row("teacher", record["teacher"], teacher=True),
    ]
    if "post_hoc" in record:
        scaled = record["post_hoc"]
        label = f"at T = {scaled['temperature']:.3g}"
        rows.append(Row(label, scaled["student"], scaled["per_sequence"], scaled["temperature"]))
    return rows


def _differences(one: Record, other: Record) -> dict[str, Difference]:
    """Of what is kept of each sequence: sums over its targets. The values are those of the rounded numbers of a result."""
    targets = np.array(one["targets"], np.float64)
    means = {name: mean_difference(one[name], other[name], targets) for name in MEANS if name in one and name in other}
    return {**means, "ece_15": calibration_difference(one["gaps_15"], other["gaps_15"], targets)}


POSITION_FIGURES = KindFigures(
    title="On held-out text",
    metrics=METRICS,
    rows=_rows,
    measure=deferred("student_train.evaluation.positions", "position_figures"),
    counted="target positions",
    count=lambda measurement: measurement.record["positions"],
    sample=lambda measurement: (measurement.source, measurement.record["per_sequence"]["targets"]),
    differences=_differences,
    confidence="The confidence is the probability of the likeliest token.",
    parts=deferred("student_train.report.coverage", "coverage"),
)
