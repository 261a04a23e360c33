"""Does a student gain by having the teacher's hidden states, beside its distributions?

    python -m benchmarks.studies.hidden_states --stories tinystories.json --teacher stories260K --work FOLDER

The teacher is dumped once, with `positions` and `hidden` of its last layer, and copies of three of its five layers learn from
the dump for the same steps, with the same batches: by `forward-kl` alone, and with a loss of hidden states beside it, with a
projector and without. What is judged after the last step is the divergence from the teacher on held-out stories (`eval_kl`,
nats), and how far the hidden states still are. Finished runs stay in the folder, and are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import STUDIES, keep
from knowledge_store.terminal.console import note
from student_train.training.configuration import TrainConfig
from student_train.training.initialisation import initialise
from student_train.training.run import train
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump

LAYERS = [0, 2, 4]
STORIES, MAX_LENGTH = 500, 192
STEPS, BATCH, RATE = 150, 8, 2e-3
SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "forward-kl": {},
    **{
        f"{weight:g} of {loss}{', projector' if projector else ''}": {
            "hidden_weight": weight, "hidden_loss": loss, "hidden_projector": projector,
        }
        for weight, loss, projector in (
            (0.1, "mse", False), (0.1, "cosine", False), (0.5, "cosine", False), (0.1, "mse", True), (0.1, "cosine", True)
        )
    },
}  # fmt: skip


def learn(work: Path, seed: int, arm: str, options: dict[str, Any]) -> dict[str, float]:
    """The figures of a run, which is made if it is not there."""
    output = work / "runs" / f"{seed} {arm}"
    config = TrainConfig(
        str(work / "store"), student=str(work / "student"), output=str(output), steps=STEPS, batch_size=BATCH, seed=seed,
        learning_rate=RATE, eval_fraction=0.2, evaluations=1, precision="fp32", **options,
    )  # fmt: skip
    train(config)
    entries = json.loads((output / "history.json").read_text())["entries"]
    first, last = (entry for entry in entries if "eval_kl" in entry)
    names = [name for name in ("eval_kl", "eval_nll", "eval_hidden") if name in last]
    return {**{name: round(last[name], 5) for name in names}, "eval_kl_before": round(first["eval_kl"], 5)}


def main() -> None:
    """Make every run, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of stories")
    parser.add_argument("--teacher", required=True, help="folder of a small model of stories")
    parser.add_argument("--work", required=True, type=Path, help="where the dump and the runs are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / "stories.jsonl"
    stories = json.loads(arguments.stories.read_text())[:STORIES]
    corpus.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    kinds = ("positions", "hidden")
    dump(DumpConfig(arguments.teacher, (corpus,), work / "store", "stories", kinds=kinds, max_length=MAX_LENGTH))
    if not (work / "student").exists():
        initialise(arguments.teacher, LAYERS, work / "student")
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, options in ARMS.items():
            runs[arm].append(learn(work, seed, arm, options))
            note(f"seed {seed}, {arm}: {runs[arm][-1]}")
    plain = [run["eval_kl"] for run in runs["forward-kl"]]
    gains = {arm: [round(1 - run["eval_kl"] / base, 4) for run, base in zip(runs[arm], plain, strict=True)] for arm in ARMS}
    figures = {
        "layers": LAYERS, "stories": STORIES, "steps": STEPS, "batch": BATCH, "seeds": list(SEEDS), "runs": runs,
        "divergence_less_by": gains,
        "divergence_less_by_mean": {arm: round(statistics.mean(each), 4) for arm, each in gains.items()},
    }  # fmt: skip
    keep("hidden_states", figures, STUDIES)


if __name__ == "__main__":
    main()
