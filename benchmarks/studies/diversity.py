"""Does a student learn more from a diverse tenth of a corpus, chosen by the teacher's vectors in SQL, than from a random one?

    python -m benchmarks.studies.diversity --teacher stories260K --stories stories.json

A small real teacher (vocabulary 512), a dump of its predictions, and beside it one of the kind `vectors`. Each arm is a query
as `student-train run --where` takes it, one statement that gives a tenth of the sequences; a student of three of the teacher's
five layers learns from these alone, by forward KL with draws, for as many steps as the others. `diverse` takes the sequence
farthest from all that were taken, over and over (farthest-first, Gonzalez 1985), beginning with a random one; `typical` takes
those nearest to the mean. The ends of stories are short sequences, whose vectors are means of few states and lie far from all
others: so there are arms that choose among sequences of whole windows, which have equally many tokens, and arms that choose
among all. Held out, over all targets: NLL of the text, KL to the teacher over the whole vocabulary, ECE of the likeliest token.
Beside them: in how many stories the chosen sequences stand, how many targets they have, and how near the corpus is to them, the
mean over all its sequences of the cosine with the nearest chosen one.

Cells run in the order of `CELLS`; finished ones are kept in the work folder, and skipped when it is called again;
`--only-finished` keeps the figures of those alone.
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
    HELD_OUT,
    MAX_LENGTH,
    Judge,
    cosine,
    logits_of,
    three_layers,
    write_atomically,
    write_texts,
)
from benchmarks.studies.positions import BATCH_SIZE, DUMP, LEARNING_RATE
from knowledge_store import KnowledgeStore
from student_train.losses.table import LOSSES
from student_train.losses.targets import select_targets
from student_train.training.dataset import DistillationDataset
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump
from teacher_dump.teachers.local import load_teacher

STORIES = 400
SHARE = 10
METRICS = ("stories", "targets", "nearest", "nll", "kl", "ece", "agreement")

RANDOM = "SELECT '{dump}' AS dump, sequence_id FROM {candidates} ORDER BY hash(sequence_id, {seed}) LIMIT {count}"
DIVERSE = """\
WITH RECURSIVE taken AS (
    SELECT 1 AS step, sequence_id, vector, -2 - hash(sequence_id, {seed}) / 2e19 AS nearest FROM {candidates}
    UNION ALL
    SELECT step + 1, sequence_id, taken.vector, greatest(nearest, list_cosine_similarity(taken.vector, last.vector))
    FROM taken, (SELECT arg_min(vector, nearest) AS vector FROM taken) AS last WHERE step < {count})
SELECT '{dump}' AS dump, arg_min(sequence_id, nearest) AS sequence_id FROM taken GROUP BY step"""
TYPICAL = """\
SELECT '{dump}' AS dump, sequence_id FROM {candidates}, (
    SELECT list(value ORDER BY place)::FLOAT[] AS centre FROM (
        SELECT place, avg(value) AS value
        FROM (SELECT generate_subscripts(vector, 1) AS place, unnest(vector) AS value FROM vectors) GROUP BY place))
ORDER BY list_cosine_similarity(vector, centre) DESC LIMIT {count}"""
WHOLE = f"(SELECT vectors.* FROM vectors JOIN sequences USING (dump, sequence_id) WHERE length = {MAX_LENGTH})"

# A query, and what it chooses among; None: nothing is chosen.
ARMS: dict[str, tuple[str, str] | None] = {
    "whole windows, at random": (RANDOM, WHOLE),
    "whole windows, diverse": (DIVERSE, WHOLE),
    "whole windows, typical": (TYPICAL, WHOLE),
    "any, at random": (RANDOM, "vectors"),
    "any, diverse": (DIVERSE, "vectors"),
    "all": None,
}
SEEDS = range(3)
CELLS = [(arm, seed) for arms in (list(ARMS)[:3], list(ARMS)[3:]) for seed in SEEDS for arm in arms]


class Study:
    """The arms, and the runs of each."""

    def __init__(self, teacher: str, stories: Path, work: Path, steps: int):
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.steps, part = work, steps, work / "stories.json"
        if not part.exists():
            part.write_text(json.dumps(json.loads(stories.read_text())[: HELD_OUT + STORIES]))
        corpus, held_out = write_texts(part, work)
        dump(DumpConfig(teacher, (corpus,), work / "store", DUMP, max_length=MAX_LENGTH))
        dump(DumpConfig(teacher, (corpus,), work / "store", "vectors", kinds=("vectors",), max_length=MAX_LENGTH))
        self.store = store = KnowledgeStore.open(work / "store")
        loaded = load_teacher(teacher, dtype="float32")
        self.teacher = loaded.model.requires_grad_(False)
        self.judge = Judge(self.teacher, loaded.tokenizer, held_out)
        found = [store["vectors", ordinal] for ordinal in range(store.sequence_count("vectors"))]
        vectors = np.stack([arrays["vector"] for arrays in found])
        self._unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        table = store.sequences(DUMP, ["document", "targets"])
        self.documents, self.targets = (table[name].to_numpy() for name in ("document", "targets"))

    def chosen(self, arm: str, seed: int) -> np.ndarray:
        """Ordinals of the sequences that an arm reads."""
        if (choice := ARMS[arm]) is None:
            return np.arange(len(self.documents))
        query, candidates = choice
        query = query.format(dump=DUMP, seed=seed, count=len(self.documents) // SHARE, candidates=candidates)
        return self.store.choose_sequences(query, DUMP).ordinals[DUMP]

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train a student and measure it, or take the result of a finished run."""
        result = self.result(arm, seed)
        if result.exists():
            return dict(json.loads(result.read_text()))
        result.parent.mkdir(parents=True, exist_ok=True)
        ordinals = self.chosen(arm, seed)
        model = three_layers(self.teacher, seed, cut=True)
        stream = iter(DistillationDataset(self.store, DUMP, batch_size=BATCH_SIZE, seed=seed, ordinals=ordinals, endless=True))
        optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(self.steps))
        began = time.process_time()
        for _ in range(self.steps):
            batch = next(stream)
            logits, targets = select_targets(logits_of(model, batch), batch)
            optimiser.zero_grad()
            LOSSES["forward-kl"].function(logits, targets, tail="draws").mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        figures = {
            "sequences": len(ordinals),
            "stories": len(np.unique(self.documents[ordinals])),
            "targets": int(self.targets[ordinals].sum()),
            "nearest": float((self._unit @ self._unit[ordinals].T).max(axis=1).mean()),
            "processor_seconds": round(time.process_time() - began, 1),
            **self.judge.quality(model.eval()),
        }
        write_atomically(result, figures)
        print(f"{arm:<20} seed {seed}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        return figures

    def result(self, arm: str, seed: int) -> Path:
        """Where the figures of a finished run are."""
        name = "".join(letter if letter.isalnum() else "-" for letter in arm)
        return self.work / "runs" / f"diversity-{self.steps}" / f"{name}-{seed}.json"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    found: dict[str, Any] = {"sequences": runs[0]["sequences"]}
    for metric in METRICS:
        values = [run[metric] for run in runs]
        sd = round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None
        found[metric] = {"mean": round(float(np.mean(values)), 5), "sd": sd, "by_seed": [round(value, 5) for value in values]}
    return found


def print_table(arms: dict[str, Any]) -> None:
    """The figures in Markdown: mean ± standard deviation over seeds."""
    print("| read | sequences | of stories | targets | nearest | NLL | KL to the teacher | ECE, 15 bins |\n|" + " --- |" * 8)
    for name, row in arms.items():
        nll, kl, ece = (f"{row[metric]['mean']:.3f} ± {row[metric]['sd'] or 0:.3f}" for metric in ("nll", "kl", "ece"))
        stories, targets, nearest = (row[metric]["mean"] for metric in ("stories", "targets", "nearest"))
        print(f"| {name} | {row['sequences']} | {stories:.0f} | {targets:,.0f} | {nearest:.3f} | {nll} | {kl} | {ece} |")


def main() -> None:
    """Run every arm that is not done yet, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a small causal language model")
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--work", type=Path, default=Path(".diversity"), help="where dumps and finished runs are kept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only-finished", action="store_true", help="train nothing, and keep the figures of finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options.teacher, options.stories, options.work, options.steps)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for arm, seed in CELLS:
        if options.only_finished and not study.result(arm, seed).exists():
            continue
        runs[arm].append(study.run(arm, seed))
    arms = {
        arm: {"query": (choice := ARMS[arm]) and choice[0].replace("{candidates}", choice[1]), **summary(of_arm)}
        for arm, of_arm in runs.items()
        if of_arm
    }
    figures = {
        "steps": options.steps,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "learning_rate": LEARNING_RATE,
        "seeds_planned": len(SEEDS),
        "seeds": {arm: len(of_arm) for arm, of_arm in runs.items()},
        "stories": STORIES,
        "sequences": len(study.documents),
        "teacher": study.judge.quality(study.teacher),
        "arms": arms,
    }
    keep("diversity", figures, STUDIES)
    print_table(arms)


if __name__ == "__main__":
    main()
