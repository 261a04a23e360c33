"""Which selection brings a student closest to its teacher: measured where full distillation can be afforded.

    python -m benchmarks.studies.fidelity --teacher stories260K --stories stories.json

A small real teacher (vocabulary 512), a student of three of its five layers, and targets from real dumps, one for each arm; the
arms of rules that the project had before are drawn from the teacher's distributions as a dump of theirs would have been, the
same at each pass. One arm learns from two dumps at once, which differ in the seed of their draws alone; its bytes are of both.
`full` asks the teacher at every step for its whole distribution. All arms see the same sequences in the same
order from the same weights, and take the same number of steps. Four experiments:

* `fine-tuned, one pass`: from a student that has learnt the text by cross-entropy; each sequence is seen once.
* `fine-tuned, sixteen passes`: the same over a sixteenth of the sequences, with the same draws at each pass.
* `random, one pass`, `random, sixteen passes`: from random weights.

Beside them, on the fine-tuned student of seed 0, the gradient of each arm against that of full distillation: the angle between
them on a batch, and the variance over draws made anew, relative to the full gradient's squared norm; for draws of constant
weight also with the normaliser counted once, where a position's target does not sum to one (`variance_of_one_normaliser`).

The order of cells is fixed here, before any has run: seeds outermost, then experiments, then arms, as they stand below; so what
there is after any time has all arms of the same seeds but for the last. Finished cells are kept in fidelity.json, and the same
command goes on with those that are missing there; `--cells` stops after so many. The way of an arm is counted over the seeds
that it shares with cross-entropy and `full`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.measurement import STUDIES, keep
from benchmarks.pictures import picture
from benchmarks.selection_dumps import ARMS
from benchmarks.small_students import (
    MAX_LENGTH,
    Judge,
    cosine,
    logits_of,
    three_layers,
    write_atomically,
    write_texts,
)
from benchmarks.studies.selections import measure
from knowledge_store import KnowledgeStore
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.targets import Targets, select_targets
from student_train.training.dataset import DistillationDataset
from teacher_dump.configuration import DumpConfig
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.positions import positions_parameters
from teacher_dump.teachers.local import load_teacher

SEEDS = tuple(range(5))
EXPERIMENTS = {
    f"{start}, {passes}": (start, passes) for passes in ("one pass", "sixteen passes") for start in ("fine-tuned", "random")
}
ORDER = (  # of arms, within an experiment
    "cross-entropy", "full", "top-5, τ = 0.05", "threshold, τ = 0.05", "top-5, 4 tail draws", "random sampling, 22 draws",
    "top-5, τ = 0.1", "threshold, τ = 0.1", "top-5, τ = 0.025", "threshold, τ = 0.025", "top-5, τ = 0.2",
    "threshold, τ = 0.2", "top-5", "top-5, τ = 0.1, two draw seeds",
)  # fmt: skip
TWO = {"top-5, τ = 0.1, two draw seeds": ("top-5, τ = 0.1", "top-5, τ = 0.1, draw seed 1")}
FORMER = {"top-5, 4 tail draws": 4, "random sampling, 22 draws": 22}
K = 5

BATCH_SIZE, STEPS, PASSES = 4, 192, 16
LEARNING_RATE = {"fine-tuned": 2e-3, "random": 5e-3}
JUDGED = 100  # sequences of held-out text
SHARD = 200  # stories of which the sequences to train on come: a few more than are needed
REDRAWS, GRADIENT_BATCHES = 12, 3
RESULT = STUDIES / "fidelity.json"


@dataclass(frozen=True)
class Cell:
    """One student."""

    seed: int
    experiment: str
    arm: str

    @property
    def name(self) -> str:
        """As the result has it."""
        return f"seed {self.seed} / {self.experiment} / {self.arm}"


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they run."""
    for seed in SEEDS:
        for experiment in EXPERIMENTS:
            for arm in ORDER:
                yield Cell(seed, experiment, arm)


class Laboratory:
    """The teacher, the dumps, and everything that a cell needs.

    Args:
        teacher: its folder.
        stories: a JSON list of texts; the first are held out, and of the others come the sequences to train on.
        work: where the dumps and the fine-tuned students are kept.
    """

    def __init__(self, teacher: str, stories: Path, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        local = load_teacher(teacher, dtype="float32")
        self.teacher = local.model.requires_grad_(False)
        corpus, held_out = write_texts(stories, work)
        if not (work / "sizes.json").exists():
            base = DumpConfig(teacher, (corpus,), work / "store", dtype="float32", max_length=MAX_LENGTH, shard_size=SHARD)
            rows, _ = measure(base, local, work / "states", shards=1)
            write_atomically(work / "sizes.json", rows)
        self.sizes = json.loads((work / "sizes.json").read_text())
        for arm, dumps in TWO.items():
            self.sizes[arm] = {name: sum(self.sizes[dump][name] for dump in dumps) for name in ("bytes", "ids")}
        self.store = KnowledgeStore.open(work / "store")
        self.judge = Judge(self.teacher, local.tokenizer, held_out, JUDGED)

    def batches(self, arm: str, seed: int, passes: str = "one pass") -> Iterator[tuple[dict[str, Tensor], ...]]:
        """Batches of the same sequences from each of an arm's dumps as the trainer reads them, without end."""
        ordinals = np.arange(STEPS * BATCH_SIZE // (1 if passes == "one pass" else PASSES))
        read = partial(DistillationDataset, batch_size=BATCH_SIZE, seed=seed, ordinals=ordinals, endless=True)
        dumps = TWO.get(arm, (arm if arm in ARMS else "top-5",))
        return zip(*(read(self.store, f"arm-{list(ARMS).index(dump)}") for dump in dumps), strict=True)

    def student(self, start: str, seed: int) -> LlamaForCausalLM:
        """A student of three layers, as an experiment starts with it."""
        model = three_layers(self.teacher, seed, cut=start != "random")
        if start == "random":
            return model
        weights = self.work / f"start-{seed}.pt"
        if not weights.exists():
            self.train(model, "fine-tuned", "cross-entropy", seed + 100, "one pass")  # another order than the arms will see
            torch.save(model.state_dict(), weights)
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model

    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's logits at the predicting positions, in the order of `select_targets`."""
        with torch.no_grad():
            return select_targets(logits_of(self.teacher, batch), batch)[0]

    def former(self, arm: str, batch: dict[str, Tensor], targets: Targets, key: int) -> Targets:
        """Targets of a rule that is no more: its draws depend on the sequence, the position and the key alone."""
        draws = FORMER[arm]
        q = torch.softmax(self.teacher_logits(batch).double(), dim=-1)
        samples = arm.startswith("random")
        counts = batch["is_target"][:, 1:]
        uniform = np.zeros((*counts.shape, draws if samples else 1))
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            generator = np.random.Generator(np.random.Philox(key=max(sequence, 0) | key << 64))
            uniform[row] = generator.random(uniform.shape[1:])
        points = torch.from_numpy(uniform)[counts]
        if not samples:
            points = (points + torch.arange(draws)) / draws
            q = q.scatter(1, q.topk(K, dim=1).indices, 0.0)
        sums = q.cumsum(dim=1)
        ids = torch.searchsorted(sums, points * sums[:, -1:], right=True).clamp(max=q.shape[1] - 1)
        weights = (sums[:, -1:] / draws).float().expand(ids.shape)
        if samples:
            nothing = {"candidate_ids": targets.candidate_ids[:, :0], "candidate_logprobs": targets.candidate_logprobs[:, :0]}
            targets = targets._replace(**nothing, tail_logprob=torch.zeros_like(targets.tail_logprob))
        return targets._replace(draw_ids=ids, draw_weights=weights)

    def anew(self, arm: str, batch: dict[str, Tensor], targets: Targets, key: int) -> Targets:
        """Targets of an arm with draws that no other key makes."""
        if arm in FORMER:
            return self.former(arm, batch, targets, key)
        rule = positions_parameters(DumpConfig("teacher", (Path("x.txt"),), Path("x"), **ARMS[arm])).selection
        start = torch.from_numpy(np.random.default_rng(key).random(len(targets.token_ids)))
        found = knowledge_of(self.teacher_logits(batch), targets.token_ids, rule, start)
        drawn = found["tail_ids"] >= 0
        return targets._replace(
            candidate_ids=found["candidate_ids"],
            candidate_logprobs=found["candidate_logprobs"],
            tail_logprob=found["tail_logprob"],
            draw_ids=found["tail_ids"].clamp(min=0),
            draw_weights=torch.where(drawn, rule.draw_weight, 0.0),
        )

    def loss(self, arm: str, model: LlamaForCausalLM, batch: dict[str, Tensor], key: int | None = None) -> Tensor:
        """The mean loss of a batch, in nats per target; with a key, with draws made anew."""
        logits, targets = select_targets(logits_of(model, batch), batch)
        if arm == "cross-entropy":
            return cross_entropy(logits, targets).mean()
        if arm == "full":
            q = torch.log_softmax(self.teacher_logits(batch), dim=-1)
            return (q.exp() * (q - torch.log_softmax(logits, dim=-1))).sum(dim=-1).mean()
        if key is not None:
            targets = self.anew(arm, batch, targets, key)
        elif arm in FORMER:
            targets = self.former(arm, batch, targets, 0)
        return forward_kl(logits, targets).mean()

    def one_normaliser(self, arm: str, model: LlamaForCausalLM, batch: dict[str, Tensor], key: int) -> Tensor:
        """−Σ w z + LSE(z), whose gradient is that of full distillation on average too."""
        logits, targets = select_targets(logits_of(model, batch), batch)
        targets = self.anew(arm, batch, targets, key)
        assert targets.draw_ids is not None and targets.draw_weights is not None
        taken = (targets.candidate_logprobs.exp() * logits.gather(1, targets.candidate_ids)).sum(dim=1)
        drawn = (targets.draw_weights * logits.gather(1, targets.draw_ids)).sum(dim=1)
        return (torch.logsumexp(logits, dim=1) - taken - drawn).mean()

    def train(self, model: LlamaForCausalLM, start: str, arm: str, seed: int, passes: str) -> None:
        """Train a student in place, with AdamW and a cosine of the learning rate."""
        stream = self.batches(arm, seed, passes)
        optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[start], weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(STEPS))
        for _ in range(STEPS):
            each = [self.loss(arm, model, batch) for batch in next(stream)]
            loss = torch.stack(each).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()

    def run(self, cell: Cell) -> dict[str, float]:
        """Train a student and measure it."""
        start, passes = EXPERIMENTS[cell.experiment]
        model = self.student(start, cell.seed)
        began = time.process_time()
        self.train(model, start, cell.arm, cell.seed, passes)
        return {"processor_seconds": round(time.process_time() - began, 1), **self.judge.quality(model.eval())}

    def gradients(self) -> dict[str, Any]:
        """Of each arm, on the fine-tuned student of seed 0: the angle of its gradient and the variance over its draws."""
        model = self.student("fine-tuned", 0)
        found: dict[str, Any] = {}
        streams = {arm: self.batches(arm, 0) for arm in ORDER if arm not in TWO}
        for number in range(GRADIENT_BATCHES):
            for arm, stream in streams.items():
                (batch,) = next(stream)
                full = gradient(model, self.loss("full", model, batch))
                size = full.square().sum()
                row = {"angle": angle(gradient(model, self.loss(arm, model, batch)), full)}
                if arm in FORMER or ARMS.get(arm, {}).get("draw_weight"):
                    keys = range(1 + REDRAWS * number, 1 + REDRAWS * (number + 1))
                    drawn = torch.stack([gradient(model, self.loss(arm, model, batch, key)) for key in keys])
                    row["variance"] = float(drawn.var(dim=0).sum() / size)
                    if arm not in FORMER:
                        drawn = torch.stack([gradient(model, self.one_normaliser(arm, model, batch, key)) for key in keys])
                        row["variance_of_one_normaliser"] = float(drawn.var(dim=0).sum() / size)
                for name, value in row.items():
                    found.setdefault(arm, {}).setdefault(name, []).append(value)
        return {arm: {name: float(np.mean(values)) for name, values in row.items()} for arm, row in found.items()}


def gradient(model: LlamaForCausalLM, loss: Tensor) -> Tensor:
    """Of a loss by all weights of a model, float64 (weights,)."""
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters() if parameter.grad is not None])


def angle(one: Tensor, other: Tensor) -> float:
    """Between two vectors, in degrees."""
    return math.degrees(math.acos(min(float(torch.cosine_similarity(one, other, dim=0)), 1.0)))


def tabulate(finished: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Of each experiment and arm, over the seeds that are finished: mean and standard deviation of every figure, and how far of
    the way from cross-entropy to full distillation, in KL; null where no seed is finished."""
    rows: list[dict[str, Any]] = []
    for experiment in EXPERIMENTS:
        for arm in ORDER:
            runs, ways = [], []
            for seed in SEEDS:
                ours, ce, full = (finished.get(Cell(seed, experiment, name).name) for name in (arm, "cross-entropy", "full"))
                if ours:
                    runs.append(ours)
                if ours and ce and full:
                    ways.append((ce["kl"] - ours["kl"]) / (ce["kl"] - full["kl"]))
            row: dict[str, Any] = {"experiment": experiment, "arm": arm, "seeds": len(runs)}
            columns = {metric: [run[metric] for run in runs] for metric in ("kl", "nll", "ece", "agreement")} | {"way": ways}
            for metric, values in columns.items():
                row[metric] = float(np.mean(values)) if values else None
                row[f"{metric}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            rows.append(row)
    return rows


def print_tables(record: dict[str, Any]) -> None:
    """The figures of each experiment in Markdown."""
    gradients = record.get("gradients", {})
    for experiment in EXPERIMENTS:
        print(f"\n{experiment}\n| arm | ids | bytes | seeds | of the way | KL | NLL | ECE | angle | variance |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in record["table"]:
            if row["experiment"] != experiment:
                continue
            size, moved = record["sizes"].get(row["arm"], {}), gradients.get(row["arm"], {})
            cell = [row["arm"], *(f"{size[name]:.2f}" if name in size else "" for name in ("ids", "bytes")), str(row["seeds"])]
            for metric, shape in {"way": ".1%", "kl": ".4f", "nll": ".3f", "ece": ".2%"}.items():
                value, spread = row[metric], row[f"{metric}_sd"]
                cell.append("not run" if value is None else f"{value:{shape}}" + (f" ± {spread:{shape}}" if spread else ""))
            cell += [
                f"{moved[name]:{shape}}" if name in moved else "" for name, shape in (("angle", ".1f"), ("variance", ".4f"))
            ]
            print("| " + " | ".join(cell) + " |")
    print(f"\nNot run: {len(record['not_run'])} of {len(list(cells()))} cells.")


def draw(record: dict[str, Any], path: Path) -> None:
    """How much of the way is left to full distillation against the bytes of the same dump, one panel an experiment."""
    ran = [name for name in EXPERIMENTS if any(row["way"] is not None for row in record["table"] if row["experiment"] == name)]
    with picture(path, 1, len(ran), figsize=(4 * len(ran), 3.6), squeeze=False) as axes:
        for axis, experiment in zip(axes[0], ran, strict=True):
            rows = [row for row in record["table"] if row["experiment"] == experiment and row["way"] is not None]
            alone = ("top-5, 4 tail draws", "random sampling, 22 draws", "top-5", *TWO)
            for number, rule in enumerate(("top-5, τ", "threshold, τ", *alone)):
                named = [row for row in rows if row["arm"] in record["sizes"]]
                if rule in alone:
                    chosen = [row for row in named if row["arm"] == rule]
                else:
                    chosen = [row for row in named if row["arm"].startswith(rule) and row["arm"] not in alone]
                points = sorted(
                    (record["sizes"][row["arm"]]["bytes"], row["way"], row["way_sd"] or 0, row["arm"]) for row in chosen
                )
                if points:
                    sizes_, ways, spreads, names = zip(*points, strict=True)
                    label = names[0] if len(names) == 1 else rule.split(",")[0] + ", τ from 0.2 to 0.025"
                    axis.errorbar(
                        sizes_, ways, yerr=spreads, marker="o", markersize=4, capsize=2, color=f"C{number}", label=label
                    )
            axis.axhline(1, color="#bbbbbb", linewidth=0.8)
            axis.set(xlabel="bytes a position", title=experiment)
        axes[0][0].set_ylabel("of the way from cross-entropy to full")
        axes[0][0].legend(frameon=False, fontsize=7)


def main() -> None:
    """Run the cells that are missing, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a small causal language model")
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--work", type=Path, default=Path(".fidelity"), help="where dumps and fine-tuned students are kept")
    parser.add_argument("--cells", type=int, help="stop after so many more cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    laboratory = Laboratory(arguments.teacher, arguments.stories, arguments.work)
    settings = {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "passes": PASSES,
        "learning_rate": LEARNING_RATE,
    }
    record: dict[str, Any] = {"settings": settings, "teacher": laboratory.judge.quality(laboratory.teacher), "cells": {}}
    if RESULT.exists():
        kept = json.loads(RESULT.read_text())["figures"]
        if kept.get("settings") != settings:
            sys.exit(f"{RESULT.name} has cells of other settings: remove it, or set BENCHMARK_RESULTS to another folder")
        record |= {name: kept[name] for name in ("cells", "gradients") if name in kept}
    record["sizes"] = laboratory.sizes

    def publish() -> None:
        record["table"] = tabulate(record["cells"])
        record["not_run"] = [cell.name for cell in cells() if cell.name not in record["cells"]]
        with contextlib.redirect_stdout(io.StringIO()):
            keep("fidelity", record, STUDIES)

    for cell in [cell for cell in cells() if cell.name not in record["cells"]][: arguments.cells]:
        record["cells"][cell.name] = laboratory.run(cell)
        print(cell.name, record["cells"][cell.name], flush=True)
        publish()
    if "gradients" not in record:
        record["gradients"] = laboratory.gradients()
    publish()
    draw(record, STUDIES / "fidelity.svg")
    print_tables(record)


if __name__ == "__main__":
    main()
