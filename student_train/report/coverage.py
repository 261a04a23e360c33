"""Top-k coverage, how much of the teacher's probability the candidates hold: belongs to the figures of the kind `positions`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from student_train.evaluation.figures import Measurement
from student_train.report.charts import FAINT, INK, TEACHER, svg
from student_train.training.run_folder import Record


def coverage(measurement: Measurement, place: str) -> list[str]:
    """Coverage by position and by how many candidates are kept, in words and as a picture; nothing of a dump of draws alone."""
    if "coverage" not in measurement.record:
        return []
    figures = measurement.record["coverage"]
    means = figures["mean_by_rank"]
    words = (
        f"The candidates, {len(means)} at most, hold {means[-1]:.1%} of the teacher's probability on average, the likeliest"
        f" alone {means[0]:.1%}. What is left over is the tail."
    )
    return [f"<h3>Top-k coverage of the teacher</h3><p>{words}</p>", _picture(figures, place)]


def _picture(figures: Record, place: str) -> str:
    figure = Figure(figsize=(11.1, 3.2), layout="constrained")
    spread, ranks = figure.subplots(1, 2, width_ratios=[2, 1])
    edges = np.array(figures["histogram"]["edges"])
    counts = np.array(figures["histogram"]["counts"])
    means = figures["mean_by_rank"]
    spread.bar(edges[:-1], counts / counts.sum(), np.diff(edges) * 0.9, align="edge", color=TEACHER, linewidth=0)
    spread.axvline(means[-1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
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
    spread.set_title("Top-k coverage, by position")
    spread.set(xlim=(0, 1), xlabel=f"probability of the {len(means)} candidates together", ylabel="share of positions")
    for axis in (spread.xaxis, spread.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    ranks.bar(range(1, len(means) + 1), means, 0.7, color=TEACHER, linewidth=0)
    if len(means) <= 8:
        for rank, mean in enumerate(means, 1):
            ranks.annotate(
                f"{mean:.0%}", (rank, mean), (0, 2), textcoords="offset points", ha="center", fontsize=9, color=FAINT
            )
    ranks.set_title("Mean, by how many are kept")
    ranks.set(ylim=(0, 1.05), xlabel="candidates kept")
    ranks.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ranks.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return svg(figure, f"Coverage: {len(means)} candidates hold {means[-1]:.1%} on average", place)
