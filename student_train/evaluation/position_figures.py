"""The figures of the kind `positions`, declared: this file and `positions`, which measures them, know that kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from student_train.deferred import deferred
from student_train.evaluation.comparison import Difference, calibration_difference, mean_difference
from student_train.evaluation.figures import (
    Bars,
    Chart,
    Curve,
    KindFigures,
    Measurement,
    Metric,
    Row,
    calibration_error,
    calibration_errors,
)
from student_train.training.run_folder import Record

METRICS = (
    Metric("nll", "Loss on the text", "nats per token", ".3f"),
    Metric(
        "kl",
        "KL to the teacher",
        "nats per token",
        ".5f",
        remark="KL is an unbiased estimate. The teacher's is the floor, what it would score itself: by rounding on average, and"
        " with the draws' own standard error.",
    ),
    Metric("kl_standard_error", "Standard error of KL", "over sequences", ".5f"),
    Metric(
        "kl_lower_bound",
        "KL, candidates and tail",
        "lower bound",
        ".5f",
        remark="The lower bound of KL is over the kept candidates and their tail as one more symbol: the true one is at least"
        " that.",
    ),
    Metric("top_1_agreement", "Agreement", "top-1, with the teacher", ".1%", lowest=False),
    Metric("accuracy", "Accuracy", "top-1, on the text", ".1%", lowest=False),
    Metric("brier", "Brier", "full vocabulary", ".4f"),
    *calibration_errors(".2%"),
    calibration_error("full_ece", "Full-ECE", "every token", ".2%"),
)
DETAILS = (
    Metric("perplexity_change", "Perplexity", "change from the teacher's", "+.2%"),
    Metric("kl_median", "KL, candidates and tail", "median position", ".3g"),
    Metric("kl_90", "KL, candidates and tail", "90% of positions", ".3g"),
    Metric("kl_99", "KL, candidates and tail", "99% of positions", ".3g"),
    Metric("kl_99_9", "KL, candidates and tail", "99.9% of positions", ".3g"),
    Metric("kl_max", "KL, candidates and tail", "worst position", ".3g"),
)
MEANS = ("nll", "kl", "kl_lower_bound", "top_1_agreement", "accuracy", "brier")


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


def _coverage(measurement: Measurement) -> Iterator[Chart]:
    """How much of the teacher's probability the candidates hold; a dump of draws alone has none."""
    if "coverage" not in measurement.record:
        return
    means, histogram = (measurement.record["coverage"][name] for name in ("mean_by_rank", "histogram"))
    total = sum(histogram["counts"])
    spread = Bars(
        "Top-k coverage, by position",
        f"probability of the {len(means)} candidates together",
        "share of positions",
        histogram["edges"],
        [count / total for count in histogram["counts"]],
        mean=means[-1],
    )
    ranks = [rank + 0.5 for rank in range(len(means) + 1)]
    yield Chart(
        "Top-k coverage of the teacher",
        f"The candidates, {len(means)} at most, hold {means[-1]:.1%} of the teacher's probability on average, the likeliest"
        f" alone {means[0]:.1%}. What is left over is the tail.",
        f"Coverage: {len(means)} candidates hold {means[-1]:.1%} on average",
        (spread, Bars("Mean, by how many are kept", "candidates kept", "", ranks, means, highest=1.05)),
    )


def _likeliest(batch: Mapping[str, np.ndarray], positions: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The candidates, of which a dump of draws alone has none."""
    if "candidate_ids" not in batch:
        return [[] for _ in positions]
    columns = (batch[name][0, list(positions)].tolist() for name in ("candidate_ids", "candidate_logprobs"))
    return [
        [(token, math.exp(logprob)) for token, logprob in zip(*candidates, strict=True) if math.isfinite(logprob)]
        for candidates in zip(*columns, strict=True)
    ]


POSITION_FIGURES = KindFigures(
    title="On the text of a dump",
    metrics=METRICS,
    details=DETAILS,
    rows=_rows,
    measure=deferred("student_train.evaluation.positions", "position_figures"),
    likeliest=_likeliest,
    curves=(
        Curve("eval_kl", "KL to the teacher", "nats per token"),
        Curve("eval_kl_lower_bound", "KL to the teacher", "nats per token, lower bound"),
    ),
    whole_bytes="dense_bytes",
    whole_words="The teacher's whole distributions would take predictions × vocabulary × 4 bytes.",
    counted="target positions",
    count=lambda measurement: measurement.record["positions"],
    sample=lambda measurement: (measurement.source, measurement.record["per_sequence"]["targets"]),
    differences=_differences,
    confidence="The confidence is the probability of the likeliest token.",
    charts=_coverage,
)
