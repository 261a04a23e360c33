"""Is a dump of the student as good a reference for DPO as the student itself?

    python -m benchmarks.studies.preference_reference --teacher stories260K --stories tinystories_1000.json

The student, its samples and the teacher's scores are those of the study `preferences`, which this goes on from. Two students
take 60 steps of DPO on the same groups in the same order: one is held to the log-probabilities that a dump of the student
keeps, which are rounded, and one to those that the student gives of the same tokens in float32. Then both are asked about all
answers and about held-out sentences. `apart` is by how much the mean log-probability of a text's tokens differs between the
two, in nats, averaged over texts, and at most; `moved` is the same between the first and the student before training.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from benchmarks.measurement import STUDIES, keep
from benchmarks.studies.preferences import BATCH_SIZE, LEARNING_RATE, SEEDS, STEPS, Laboratory, add_arguments, finished
from knowledge_store import KnowledgeStore
from student_train import DistillationDataset, DistillationTrainer, Preferences, preferences
from student_train.losses.preference import TargetLogprobs, answer_logprobs
from student_train.losses.sliced import target_logprobs

RESULT = STUDIES / "preference_reference.json"


def loaded(folder: Path) -> Any:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def likelihoods(model: Any, store: KnowledgeStore, dump: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of a dump's sequences, ascending; of each the sum of the log-probabilities of its targets, float64, and their
    count."""
    ids, sums, counts = [], [], []
    with torch.no_grad():
        for batch in DistillationDataset(store, dump, batch_size=32, shuffle=False):
            real = batch["sequence_id"] >= 0
            ids.append(batch["sequence_id"][real])
            sums.append(answer_logprobs(TargetLogprobs(target_logprobs(model, batch)), batch)[real].double())
            counts.append(batch["is_target"][real][:, 1:].sum(dim=1))
    order = torch.argsort(torch.cat(ids))
    return tuple(torch.cat(part)[order].numpy() for part in (ids, sums, counts))


def train(start: Path, store: KnowledgeStore, asked: Preferences, seed: int, output: Path) -> Any:
    """A student after DPO."""
    dataset = DistillationDataset(store, "judged", groups=True, batch_size=BATCH_SIZE, seed=seed, prepare=asked)
    arguments = TrainingArguments(
        str(output), max_steps=STEPS, learning_rate=LEARNING_RATE, warmup_steps=round(0.05 * STEPS), weight_decay=0.01,
        lr_scheduler_type="cosine", seed=seed, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DistillationTrainer(loaded(start), arguments, train_dataset=dataset, loss="dpo")
    trainer.train()
    return trainer.model.eval()


def compare(laboratory: Laboratory, seed: int) -> dict[str, Any]:
    """The figures of one seed."""
    start, folder = laboratory.start(seed), laboratory.groups(seed)
    store, text = KnowledgeStore.open(folder), KnowledgeStore.open(laboratory.store)
    kept = preferences(store, "judged", reference="reference", scores="judged")
    before = loaded(start).eval()
    ids, exact, _ = likelihoods(before, store, "judged")
    assert kept.reference is not None and np.array_equal(ids, kept.sequence_ids)
    students = [
        train(start, store, asked, seed, laboratory.work / "reference-run") for asked in (kept, replace(kept, reference=exact))
    ]
    found: dict[str, Any] = {
        "count": len(ids),
        "rounding": {"mean": float((kept.reference - exact).mean()), "sd": float((kept.reference - exact).std(ddof=1))},
    }
    for name, opened, dump in (("answers", store, "judged"), ("held-out sentences", text, "held-out")):
        means = [sums / counts for _, sums, counts in (likelihoods(model, opened, dump) for model in (*students, before))]
        apart, moved = np.abs(means[0] - means[1]), np.abs(means[0] - means[2])
        found[name] = {
            "apart": float(apart.mean()),
            "apart_at_most": float(apart.max()),
            "moved": float(moved.mean()),
        }
    return found


def main() -> None:
    """Compare for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ".preferences")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "beta": 0.1}
    cells = finished(RESULT, settings).get("cells", {})
    missing = [seed for seed in SEEDS if f"seed {seed}" not in cells][: arguments.cells]
    laboratory = Laboratory(arguments.teacher, arguments.stories, arguments.work)
    for seed in missing:
        cells[f"seed {seed}"] = compare(laboratory, seed)
        not_run = [f"seed {seed}" for seed in SEEDS if f"seed {seed}" not in cells]
        keep(RESULT.stem, {"settings": settings, "cells": cells, "not_run": not_run}, STUDIES)


if __name__ == "__main__":
    main()
