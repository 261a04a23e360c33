"""Does training on a fifth of the positions do as well as training on all of them, and on which fifth?

    python -m benchmarks.studies.positions --teacher stories260K --stories stories.json

A small real teacher (vocabulary 512), one dump of it with the default selection, and a student that keeps three of its five
layers. Every arm reads the same sequences in the same order, for as many steps, with the loss `forward-kl` averaged over the
targets that count; the arms differ in which these are (`KnowledgeStore.choose_targets`). Held out, over all targets: NLL of the
text, KL to the teacher over the whole vocabulary, ECE of the likeliest token, and how often that is the teacher's.

The teacher's entropy is that of its whole distribution, and its loss −log of the probability it gave to the token of the text.
Finished runs are kept in the work folder, and skipped when it is called again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measurement import STUDIES, keep
from benchmarks.small_students import (
    MAX_LENGTH,
    Judge,
    cosine,
    logits_of,
    three_layers,
    write_atomically,
    write_texts,
)
from knowledge_store import KnowledgeStore
from knowledge_store.reading.target_mask import TargetMask
from student_train.losses.table import LOSSES
from student_train.losses.targets import select_targets
from student_train.training.dataset import DistillationDataset
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump
from teacher_dump.teachers.local import load_teacher

DUMP = "train"
BATCH_SIZE, LEARNING_RATE = 4, 2e-3
TARGETS = f"FROM positions WHERE dump = '{DUMP}' AND is_target"

# Which targets count; {seed} is the run's.
ARMS: dict[str, str | None] = {
    "all": None,
    "a fifth, by the teacher's entropy": f"teacher_entropy >= (SELECT quantile_cont(teacher_entropy, 0.8) {TARGETS})",
    "a fifth, by the teacher's loss": f"token_logprob <= (SELECT quantile_cont(token_logprob, 0.2) {TARGETS})",
    "a fifth, at random": "hash(sequence_id, position, {seed}) % 5 = 0",
}


class Study:
    """The arms, and the runs of each.

    Args:
        teacher: its folder.
        stories: a JSON list of texts.
        work: where the dump and finished runs are kept.
        steps: of a run.
    """

    def __init__(self, teacher: str, stories: Path, work: Path, steps: int):
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.steps = work, steps
        corpus, held_out = write_texts(stories, work)
        dump(DumpConfig(teacher, (corpus,), work / "store", DUMP, max_length=MAX_LENGTH))
        self.store = KnowledgeStore.open(work / "store")
        loaded = load_teacher(teacher, dtype="float32")
        self.teacher = loaded.model.requires_grad_(False)
        self.judge = Judge(self.teacher, loaded.tokenizer, held_out)
        ids = self.store.sequences(DUMP)["sequence_id"].to_pylist()
        self._ordinals = {sequence: ordinal for ordinal, sequence in enumerate(ids)}

    def student(self, seed: int) -> Any:
        """One that has learnt nothing since it was cut."""
        return three_layers(self.teacher, seed, cut=True)

    def chosen(self, arm: str, seed: int) -> tuple[TargetMask | None, float]:
        """Which targets count in a run (None: all), and the share of the dump's that they are."""
        condition = ARMS[arm]
        if condition is None:
            return None, 1.0
        found = self.store.choose_targets(condition.format(seed=seed), DUMP)
        return found.masks[DUMP], float(found.masks[DUMP].counts().sum() / found.targets[DUMP].sum())

    def train(self, model: Any, mask: TargetMask | None, seed: int) -> int:
        """Train a student in place, with AdamW and a cosine of the learning rate. Returns the targets that counted."""
        stream = iter(DistillationDataset(self.store, DUMP, batch_size=BATCH_SIZE, seed=seed, endless=True))
        optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(self.steps))
        count = 0
        for _ in range(self.steps):
            batch = next(stream)
            for row, sequence in enumerate(batch["sequence_id"].tolist()):
                if mask is not None and sequence >= 0:
                    positions = torch.from_numpy(mask.positions(self._ordinals[sequence]))
                    batch["is_target"][row, : len(positions)] &= positions
            logits, targets = select_targets(logits_of(model, batch), batch)
            values = LOSSES["forward-kl"].function(logits, targets, tail="draws")
            count += len(values)
            optimiser.zero_grad()
            (values.sum() / max(len(values), 1)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        return count

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train a student and measure it, or take the result of a finished run."""
        name = "".join(letter if letter.isalnum() else "-" for letter in arm)
        result = self.work / "runs" / f"positions-{self.steps}" / f"{name}-{seed}.json"
        if result.exists():
            return dict(json.loads(result.read_text()))
        result.parent.mkdir(parents=True, exist_ok=True)
        mask, share = self.chosen(arm, seed)
        model = self.student(seed)
        began = time.monotonic()
        count = self.train(model, mask, seed)
        seconds = round(time.monotonic() - began, 1)
        figures = {"share": share, "targets": count, "seconds": seconds, **self.judge.quality(model.eval())}
        write_atomically(result, figures)
        print(f"{arm:<34} seed {seed}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        return figures


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    found = {}
    for metric in ("share", "targets", "nll", "kl", "ece", "agreement"):
        values = [run[metric] for run in runs]
        found[metric] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
    return found


def print_table(arms: dict[str, Any]) -> None:
    """The figures in Markdown: mean ± standard deviation over seeds."""
    print(
        "| targets that count | of all | seen | NLL | KL to the teacher | ECE, 15 bins |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, row in arms.items():
        nll, kl, ece = (f"{row[metric]['mean']:.3f} ± {row[metric]['sd'] or 0:.3f}" for metric in ("nll", "kl", "ece"))
        print(f"| {name} | {row['share']['mean']:.1%} | {row['targets']['mean']:,.0f} | {nll} | {kl} | {ece} |")


def main() -> None:
    """Run every arm that is not done yet, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a small causal language model")
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--work", type=Path, default=Path(".positions"), help="where dumps and finished runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    study = Study(arguments.teacher, arguments.stories, arguments.work, arguments.steps)
    seeds = list(range(arguments.seeds))
    # Seed by seed: what is cut off has whole seeds of all arms.
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            runs[arm].append(study.run(arm, seed))
    arms = {arm: {"condition": ARMS[arm], **summary(of_arm), "runs": of_arm} for arm, of_arm in runs.items()}
    figures = {
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "seeds": seeds,
        "learning_rate": LEARNING_RATE,
        "sequences": {DUMP: study.store.sequences(DUMP).num_rows},
        "teacher": study.judge.quality(study.teacher),
        "before": study.judge.quality(study.student(0).eval()),
        "arms": arms,
    }
    keep("positions", figures, STUDIES)
    print_table(arms)


if __name__ == "__main__":
    main()
