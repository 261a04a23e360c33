"""What a student gains from a teacher's opinion of its own texts, from rounds of its own texts, and from itself as a teacher.

    python -m benchmarks.studies.preferences --teacher stories260K --stories tinystories_1000.json

The task is to write the next sentence of a story. A small teacher and a student of three of its five layers are fine-tuned on
it, the student anew for each seed. Then, from that student:

* `arms`: it writes four samples for each of 160 prompts, and the teacher judges them by the mean log-probability of their
  tokens. Left out are samples that were cut off, that the tokenizer would cut otherwise, and that stand in their group already;
  a prompt with fewer than two left is no group. Each arm takes 60 steps of 8: of sequences for cross-entropy on a random
  sample, and on the best by `--where`; of groups for RRHF, PRO and DPO, whose reference is a dump of the student. `none` is
  the student as it was. Their learning rate is a third of the first one tried, with which even the random sample took the
  student of seed 0 far from the teacher.
* `rounds`: three times over, it writes, the teacher is dumped over that, and the student learns it by forward KL for 60 steps;
  beside it `text`, as many steps over sentences of people, one pass, measured as often.
* `generations`: the student's own distributions over the text teach a new student of the same layers, three times over;
  generation 0 learnt the text itself.

Every student writes two samples for each of 100 other prompts. `judged` is what the teacher thinks of them, in nats a token
over all their tokens; beside it their mean length and how many are distinct, and on held-out sentences the KL to the teacher,
the loss on the text and the calibration error (15 bins).

A cell is a seed with an arm, all rounds, the pass over text or all generations; the arms of all seeds come first. Finished
cells are kept in preferences.json, and the same command goes on with those that are missing there; `--cells` stops after so
many. All are made of calls that are the commands' own (`teacher-dump generate` and `run`, `student-train init`, `run` and
`evaluate`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.measurement import STUDIES, keep
from benchmarks.small_students import KEPT_LAYERS
from knowledge_store import KnowledgeStore
from student_train import EvaluateConfig, TrainConfig, evaluate, initialise, train
from teacher_dump import DumpConfig, GenerateConfig, dump, generate

RESULT = STUDIES / "preferences.json"
SEEDS = (0, 1, 2)
BEST = (
    "SELECT dump, arg_max(sequence_id, mean) AS sequence_id FROM"
    " (SELECT dump, document, sequence_id, avg(token_logprob) AS mean FROM positions JOIN sequences USING (dump, sequence_id)"
    " WHERE dump = 'judged' AND is_target GROUP BY ALL) GROUP BY dump, document"
)
RANDOM = "SELECT dump, sequence_id FROM sequences WHERE dump = 'judged' AND \"window\" = 0"
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "random sample": {"loss": "ce", "where": RANDOM},
    "best of 4": {"loss": "ce", "where": BEST},
    "RRHF": {"loss": "rrhf", "scores": "judged"},
    "PRO": {"loss": "pro", "scores": "judged"},
    "DPO": {"loss": "dpo", "scores": "judged", "reference": "reference"},
}
OTHERS = ("rounds", "text", "generations")

PROMPTS, SAMPLES, FRESH, FRESH_SAMPLES = 160, 4, 100, 2
STEPS, BATCH_SIZE, LEARNING_RATE = 60, 8, 3e-4
ROUNDS = GENERATIONS = 3
ROUND_RATE = 1e-3
TUNING_STEPS, TUNING_RATE = 400, 2e-3
MAX_LENGTH, MAX_NEW_TOKENS = 160, 48
HELD_OUT = 60  # stories
LEARNT: dict[str, Any] = {"loss": "forward-kl", "rate": ROUND_RATE}  # in rounds, and of text


@dataclass(frozen=True)
class Cell:
    """What is trained and measured at once."""

    seed: int
    part: str

    @property
    def name(self) -> str:
        """As the result has it."""
        return f"seed {self.seed} / {self.part}"


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they run."""
    for parts in (tuple(ARMS), OTHERS):
        for seed in SEEDS:
            for part in parts:
                yield Cell(seed, part)


# ---- texts


def next_sentences(text: str, most: int = 3) -> list[dict[str, str]]:
    """Rows of a story: what was told so far, and the next sentence."""
    sentences = re.findall(r"[^.!?]+[.!?]+[\"”']?", " ".join(text.split()))
    rows = []
    for place in range(2, min(len(sentences), 2 + most)):
        prompt, completion = "".join(sentences[:place]).strip(), sentences[place].rstrip()
        if 4 <= len(completion.split()) <= 20 and completion.startswith(" ") and len(prompt) < 300:
            rows.append({"prompt": prompt, "completion": completion})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A corpus file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the calls


class Laboratory:
    """The texts, the teacher, and the students that all cells of a seed begin with.

    Args:
        teacher: folder of the model that is fine-tuned to be the teacher.
        stories: a JSON list of texts.
        work: where everything is kept.
    """

    def __init__(self, teacher: str, stories: Path, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.store = work, work / "store"
        texts = json.loads(stories.read_text())
        rows = [next_sentences(text) for text in texts]
        used = HELD_OUT
        self.held_out = write_rows(work / "held-out.jsonl", [row for of_text in rows[:used] for row in of_text])
        ends = {"fresh": FRESH, "prompts": PROMPTS}
        for name, count in ends.items():
            chosen = [of_text[0] for of_text in rows[used:] if of_text][:count]
            used += sum(1 for _ in _until(rows[used:], count))
            write_rows(work / f"{name}.jsonl", [{"prompt": row["prompt"]} for row in chosen])
        self.text = write_rows(work / "text.jsonl", [row for of_text in rows[used:] for row in of_text])
        self.teacher = work / "teacher"
        with_text = self.dump("text-only", Path(teacher), self.text, work / "tuning")
        self.train(Path(teacher), self.teacher, with_text, "text-only", 0, steps=TUNING_STEPS, rate=TUNING_RATE)
        for name, corpus in (("held-out", self.held_out), ("text", self.text)):
            self.dump(name, self.teacher, corpus)

    def dump(self, name: str, teacher: Path, corpus: Path, store: Path | None = None) -> Path:
        """What a model knows of a corpus; the store it is kept in."""
        store = store or self.store
        config = DumpConfig(str(teacher), (corpus,), store, name, dtype="float32", max_length=MAX_LENGTH, batch_size=32)
        dump(config)
        return store

    def train(
        self, student: Path, output: Path, store: Path, name: str, seed: int,
        *, steps: int = STEPS, rate: float = LEARNING_RATE, **options: Any,
    ) -> Path:  # fmt: skip
        """Train a student on a dump, unless that is done; its folder."""
        given = {"loss": "ce", **options}
        config = TrainConfig(
            str(store), str(student), str(output), dump=name, steps=steps, batch_size=BATCH_SIZE, learning_rate=rate, seed=seed,
            eval_fraction=0.0, save_steps=10_000, **given,
        )  # fmt: skip
        train(config)
        return output

    def start(self, seed: int) -> Path:
        """The student that all cells of a seed begin with."""
        output = self.work / f"start-{seed}"
        return self.train(self.layers(), output, self.work / "tuning", "text-only", seed, steps=TUNING_STEPS, rate=TUNING_RATE)

    def layers(self) -> Path:
        """Three layers of the teacher."""
        output = self.work / "layers"
        if not (output / "config.json").exists():
            initialise(str(self.teacher), list(KEPT_LAYERS), str(output))
        return output

    def write(self, model: Path, prompts: str, samples: int, seed: int, output: Path) -> list[dict[str, Any]]:
        """What a model writes for prompts, as rows."""
        config = GenerateConfig(
            str(model), prompts=(self.work / f"{prompts}.jsonl",), output=output, samples=samples, seed=seed, dtype="float32",
            max_new_tokens=MAX_NEW_TOKENS, batch_size=64, prompt_as="text",
        )  # fmt: skip
        generate(config)
        return [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]

    def measure(self, model: Path, seed: int, folder: Path) -> dict[str, float]:
        """The figures of a student."""
        written = self.write(model, "fresh", FRESH_SAMPLES, 1000 + seed, folder / "fresh")
        store = folder / "fresh-store"
        self.dump("fresh", self.teacher, folder / "fresh", store)
        [judged] = (
            KnowledgeStore.open(store)
            .sql("SELECT sum(token_logprob) / count(*) AS mean, count(*) AS tokens FROM positions WHERE is_target")
            .to_pylist()
        )
        config = EvaluateConfig(str(model), store=str(self.store), dump="held-out", output=str(folder / "evaluation.json"))
        student = evaluate(config)["figures"]["positions"]["student"]
        figures = {
            "judged": judged["mean"],
            "length": judged["tokens"] / len(written),
            "distinct": len({(row["prompt_row"], row["completion"]) for row in written}) / len(written),
            "cut": sum(row["finish"] != "stop" for row in written) / len(written),
            "kl": student["kl"],
            "nll": student["nll"],
            "ece": student["ece_15"],
        }
        for made in ("fresh", "fresh-store", "evaluation.json"):
            path = folder / made
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return {name: round(float(value), 5) for name, value in figures.items()}

    # ---- cells

    def run(self, cell: Cell) -> Any:
        """Train and measure."""
        folder = self.work / f"cell-{cell.seed}"
        folder.mkdir(exist_ok=True)
        if cell.part in ARMS:
            return self.arm(cell, folder)
        found = {"rounds": self.rounds, "text": self.pass_over_text, "generations": self.generations}[cell.part](cell, folder)
        return found

    def groups(self, seed: int) -> Path:
        """The student's samples as groups, judged by the teacher, and known by the student; the store."""
        store, start = self.work / f"groups-{seed}", self.start(seed)
        corpus = self.work / f"groups-{seed}.jsonl"
        if not corpus.exists():
            rows = self.write(start, "prompts", SAMPLES, seed, self.work / f"samples-{seed}")
            write_rows(corpus, grouped(rows))
        self.dump("judged", self.teacher, corpus, store)
        self.dump("reference", start, corpus, store)
        return store

    def arm(self, cell: Cell, folder: Path) -> dict[str, float]:
        """One student of a seed, from the same samples as the others."""
        store, model = self.groups(cell.seed), self.start(cell.seed)
        output = folder / "arm"
        shutil.rmtree(output, ignore_errors=True)
        if options := ARMS[cell.part]:
            model = self.train(model, output, store, "judged", cell.seed, **options)
        figures = self.measure(model, cell.seed, folder)
        groups = KnowledgeStore.open(store).sql(
            "SELECT count(DISTINCT document) AS groups, count(*) AS answers FROM sequences WHERE dump = 'judged'"
        )
        return figures | groups.to_pylist()[0]

    def rounds(self, cell: Cell, folder: Path) -> list[dict[str, float]]:
        """A student that learns from what the teacher knows of its own samples, again and again."""
        model, found = self.start(cell.seed), []
        for number in range(ROUNDS):
            place = folder / f"round-{number}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            self.write(model, "prompts", SAMPLES, 100 * (number + 1) + cell.seed, place / "samples")
            self.dump("samples", self.teacher, place / "samples", place / "store")
            model = self.train(model, place / "student", place / "store", "samples", cell.seed + number, **LEARNT)
            found.append(self.measure(model, cell.seed, folder))
        return found

    def pass_over_text(self, cell: Cell, folder: Path) -> list[dict[str, float]]:
        """As many steps on what the teacher knows of the text, other sequences in each third."""
        model, found = self.start(cell.seed), []
        count = KnowledgeStore.open(self.store).sequence_count("text")
        order = np.random.default_rng(cell.seed).permutation(count)
        for number in range(ROUNDS):
            output = folder / f"text-{number}"
            shutil.rmtree(output, ignore_errors=True)
            third = sorted(order[number * STEPS * BATCH_SIZE : (number + 1) * STEPS * BATCH_SIZE].tolist())
            ids = KnowledgeStore.open(self.store).sequences("text", ["sequence_id"])["sequence_id"].to_numpy()[third]
            where = (
                f"SELECT dump, sequence_id FROM sequences WHERE dump = 'text' AND sequence_id IN ({', '.join(map(str, ids))})"
            )
            model = self.train(model, output, self.store, "text", cell.seed + number, where=where, **LEARNT)
            found.append(self.measure(model, cell.seed, folder))
        return found

    def generations(self, cell: Cell, folder: Path) -> list[dict[str, float]]:
        """Students each taught by the one before; the first learnt the text."""
        model = self.start(cell.seed)
        found = [self.measure(model, cell.seed, folder)]
        for number in range(GENERATIONS):
            place = folder / f"generation-{number}"
            shutil.rmtree(place, ignore_errors=True)
            store = self.dump("own", model, self.text, place / "store")
            model = self.train(
                self.layers(),
                place / "student",
                store,
                "own",
                cell.seed,
                steps=TUNING_STEPS,
                rate=TUNING_RATE,
                loss="forward-kl",
            )
            found.append(self.measure(model, cell.seed, folder))
        return found


def _until(rows: Sequence[list[Any]], count: int) -> Iterator[list[Any]]:
    """The first texts, until so many of them have rows."""
    found = 0
    for of_text in rows:
        if found == count:
            return
        found += bool(of_text)
        yield of_text


def grouped(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of each prompt that ended by themselves as one row; those with fewer than two are left out."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        group = found.setdefault(row["prompt_row"], {"prompt": row["prompt"], "completions": []})
        if (
            row["finish"] == "stop"
            and row["exact"]
            and row["completion"].strip()
            and row["completion"] not in group["completions"]
        ):
            group["completions"].append(row["completion"])
    return [group for group in found.values() if len(group["completions"]) > 1]


# ---- tables


def tabulate(cells_done: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Means and standard deviations over the finished seeds: of each arm, and of each step of the others."""
    tables: dict[str, list[dict[str, Any]]] = {"arms": [], **{part: [] for part in OTHERS}}
    for part in (*ARMS, *OTHERS):
        runs = [cells_done[Cell(seed, part).name] for seed in SEEDS if Cell(seed, part).name in cells_done]
        for number in range(len(runs[0]) if runs and part in OTHERS else bool(runs)):
            figures = [run[number] if part in OTHERS else run for run in runs]
            row: dict[str, Any] = {"arm": part} if part in ARMS else {"number": number}
            row["seeds"] = len(figures)
            for name in ("judged", "length", "distinct", "cut", "kl", "nll", "ece"):
                values = [each[name] for each in figures]
                row[name] = round(float(np.mean(values)), 4)
                row[f"{name}_sd"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
            tables["arms" if part in ARMS else part].append(row)
    return tables


def print_tables(record: dict[str, Any]) -> None:
    """The tables in Markdown."""
    shapes = {"judged": ".3f", "length": ".1f", "distinct": ".1%", "cut": ".1%", "kl": ".4f", "nll": ".3f", "ece": ".2%"}
    for part, rows in record["tables"].items():
        print(f"\n{part}\n| | seeds | {' | '.join(shapes)} |\n|{' --- |' * (2 + len(shapes))}")
        for row in rows:
            shown = [
                f"{row[name]:{shape}}" + (f" ± {row[f'{name}_sd']:{shape}}" if row[f"{name}_sd"] is not None else "")
                for name, shape in shapes.items()
            ]
            print(f"| {row.get('arm', row.get('number'))} | {row['seeds']} | {' | '.join(shown)} |")
    print(f"\nNot run: {len(record['not_run'])} of {len(list(cells()))} cells.")


def settings() -> dict[str, Any]:
    """What must be the same of all cells."""
    return {
        "prompts": PROMPTS, "samples": SAMPLES, "fresh": FRESH, "fresh_samples": FRESH_SAMPLES, "steps": STEPS,
        "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "round_rate": ROUND_RATE, "rounds": ROUNDS,
        "generations": GENERATIONS, "tuning_steps": TUNING_STEPS, "tuning_rate": TUNING_RATE, "max_length": MAX_LENGTH,
        "max_new_tokens": MAX_NEW_TOKENS,
        "arms": ARMS,
    }  # fmt: skip


def store_record(record: dict[str, Any]) -> None:
    """Keep what there is so far, and which cells there are not."""
    record["tables"] = tabulate(record["cells"])
    record["not_run"] = [cell.name for cell in cells() if cell.name not in record["cells"]]
    with contextlib.redirect_stdout(io.StringIO()):
        keep("preferences", record, STUDIES)


def add_arguments(parser: argparse.ArgumentParser, work: str) -> None:
    """Those of a laboratory."""
    parser.add_argument("--teacher", required=True, help="folder of a small causal language model")
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--work", type=Path, default=Path(work), help="where models, texts and stores are kept")
    parser.add_argument("--cells", type=int, help="stop after so many more cells")


def finished(result: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures that a result has already (SystemExit: they are of other settings)."""
    if not result.exists():
        return {}
    kept: dict[str, Any] = json.loads(result.read_text())["figures"]
    if kept.get("settings") != json.loads(json.dumps(settings)):
        sys.exit(f"{result.name} has cells of other settings: remove it, or set BENCHMARK_RESULTS to another folder")
    return kept


def main() -> None:
    """Run the cells that are missing, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ".preferences")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"settings": settings(), "cells": {}}
    kept = finished(RESULT, record["settings"])
    record |= {name: kept[name] for name in ("cells", "teacher") if name in kept}
    laboratory = Laboratory(arguments.teacher, arguments.stories, arguments.work)
    if "teacher" not in record:
        record["teacher"] = laboratory.measure(laboratory.teacher, 0, arguments.work)
    for cell in [cell for cell in cells() if cell.name not in record["cells"]][: arguments.cells]:
        record["cells"][cell.name] = laboratory.run(cell)
        print(cell.name, record["cells"][cell.name], flush=True)
        store_record(record)
    store_record(record)
    print_tables(record)


if __name__ == "__main__":
    main()
