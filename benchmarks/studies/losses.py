"""What each loss makes of a student: all that learn from one dump of the default selection, beside full distillation.

    python -m benchmarks.studies.losses --teacher stories260K --stories stories.json

The laboratory is that of the study of selections (`fidelity.py`): a small real teacher, a student of three of its five layers,
the same sequences in the same order, and one pass, from a student that has learnt the text by cross-entropy and from random
weights. Here the dump is the same in every arm, and the loss is what differs: every loss of `LOSSES` that is of single
positions, with the options that it has when none is given, and FIRST's with a share of cross-entropy too. `full` asks the
teacher at every step for its whole distribution. "Of the way" is from cross-entropy to full distillation, in KL to the teacher;
losses of other divergences have other aims.

Finished students are kept in the folder `--work`, so that a run that was ended continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.measurement import STUDIES, keep
from benchmarks.pictures import picture
from benchmarks.selection_dumps import ARMS
from benchmarks.small_students import MAX_LENGTH, logits_of, write_atomically
from benchmarks.studies.fidelity import (
    BATCH_SIZE,
    EXPERIMENTS,
    GRADIENT_BATCHES,
    LEARNING_RATE,
    SEEDS,
    STEPS,
    Cell,
    Laboratory,
    angle,
    gradient,
)
from knowledge_store.kinds.positions.selection import DRAW_WEIGHT
from student_train.losses.step import per_target
from student_train.losses.table import LOSSES
from student_train.losses.targets import select_targets

DUMP = f"top-5, τ = {DRAW_WEIGHT:g}"
STARTS = [name for name, (_, passes) in EXPERIMENTS.items() if passes == "one pass"]
FULL, CROSS_ENTROPY = "full", "cross-entropy"
SINGLE = [name for name, loss in LOSSES.items() if not loss.whole_batch and name != "ce"]
LOSS_OF: dict[str, dict[str, Any]] = {
    CROSS_ENTROPY: {"loss": "ce"},
    "forward-kl": {"loss": "forward-kl"},
    "forward-kl, the tail a bucket": {"loss": "forward-kl", "options": {"tail": "bucket"}},
    **{name: {"loss": name} for name in SINGLE if name != "forward-kl"},
    "first, 0.3 of cross-entropy": {"loss": "first", "ce_weight": 0.3},
}
FIGURES = ("kl", "nll", "ece", "agreement")


class Losses(Laboratory):
    """The laboratory, where an arm is a loss."""

    def batches(self, arm: str, seed: int, passes: str = "one pass") -> Iterator[tuple[dict[str, Tensor], ...]]:
        """Batches of the one dump, whatever the arm."""
        return super().batches(DUMP, seed, passes)

    def loss(self, arm: str, model: LlamaForCausalLM, batch: dict[str, Tensor], key: int | None = None) -> Tensor:
        """The mean loss of a batch, in nats per target."""
        if arm == FULL:
            return super().loss(arm, model, batch)
        chosen = LOSS_OF[arm]
        function = per_target(LOSSES[chosen["loss"]], ce_weight=chosen.get("ce_weight", 0.0), options=chosen.get("options"))
        return function(*select_targets(logits_of(model, batch), batch)).mean()

    def finished(self, cell: Cell) -> dict[str, float]:
        """What a student came to, who is trained where that is not known yet."""
        start = STARTS.index(cell.experiment)
        path = self.work / "losses" / f"{cell.seed}-{start}-{cell.arm}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            figures = self.run(cell)
            write_atomically(path, figures)
            print(cell.name, figures, flush=True)
        return dict(json.loads(path.read_text()))

    def angles(self) -> dict[str, float]:
        """Between the gradient of each arm and that of full distillation, on the fine-tuned student of the first seed."""
        model = self.student("fine-tuned", SEEDS[0])
        found: dict[str, list[float]] = {arm: [] for arm in LOSS_OF}
        stream = self.batches(DUMP, SEEDS[0])
        for _ in range(GRADIENT_BATCHES):
            (batch,) = next(stream)
            full = gradient(model, self.loss(FULL, model, batch))
            for arm, angles in found.items():
                angles.append(angle(gradient(model, self.loss(arm, model, batch)), full))
        return {arm: float(np.mean(angles)) for arm, angles in found.items()}


def tabulate(runs: dict[str, dict[str, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """Of each start and arm the mean and standard deviation over seeds of every figure, and of the way."""
    rows = []
    for start, arms in runs.items():
        for arm, found in arms.items():
            columns = {metric: [run[metric] for run in found] for metric in FIGURES}
            columns["way"] = [
                (ce["kl"] - ours["kl"]) / (ce["kl"] - full["kl"])
                for ce, ours, full in zip(arms[CROSS_ENTROPY], found, arms[FULL], strict=True)
            ]
            row: dict[str, Any] = {"start": start, "arm": arm}
            for metric, values in columns.items():
                row |= {metric: float(np.mean(values)), f"{metric}_sd": float(np.std(values, ddof=1))}
            rows.append(row)
    return rows


def print_tables(record: dict[str, Any]) -> None:
    """The figures in Markdown, one table for each start."""
    shapes = {"way": ".1%", "kl": ".4f", "nll": ".3f", "ece": ".2%", "agreement": ".1%"}
    for start in STARTS:
        print(f"\n| {start} | of the way | KL | NLL | ECE | agreement | angle |\n|" + " --- |" * 7)
        for row in (row for row in record["table"] if row["start"] == start):
            cells = [f"{row[metric]:{shape}} ± {row[f'{metric}_sd']:{shape}}" for metric, shape in shapes.items()]
            turned = record["angles"].get(row["arm"])
            print(f"| {row['arm']} | {' | '.join(cells)} | {'' if turned is None else f'{turned:.0f}°'} |")


def draw(record: dict[str, Any], path: Path) -> None:
    """KL to the teacher of each loss's student, a panel for each start."""
    with picture(path, 1, len(STARTS), figsize=(8, 3.6)) as axes:
        for axis, start in zip(axes, STARTS, strict=True):
            rows = sorted((row for row in record["table"] if row["start"] == start), key=lambda row: -row["kl"])
            axis.barh(
                [row["arm"] for row in rows], [row["kl"] for row in rows], xerr=[row["kl_sd"] for row in rows], color="#4477aa"
            )
            axis.set(xlabel="KL to the teacher, nats a token", title=start)
            axis.tick_params(axis="y", labelsize=7)


def main() -> None:
    """Run the students that are missing, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a small causal language model")
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--work", type=Path, default=Path(".fidelity"), help="that of the study of selections, or a new one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    laboratory = Losses(arguments.teacher, arguments.stories, arguments.work)
    runs = {
        start: {arm: [laboratory.finished(Cell(seed, start, arm)) for seed in SEEDS] for arm in (*LOSS_OF, FULL)}
        for start in STARTS
    }
    record = {
        "settings": {
            "dump": {"arm": DUMP, **ARMS[DUMP]},
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "learning_rate": LEARNING_RATE,
            "seeds": SEEDS,
            "losses": LOSS_OF,
        },
        "teacher": laboratory.judge.quality(laboratory.teacher),
        "table": tabulate(runs),
        "angles": laboratory.angles(),
    }
    keep("losses", record, STUDIES)
    draw(record, STUDIES / "losses.svg")
    print_tables(record)


if __name__ == "__main__":
    main()
