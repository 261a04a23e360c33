"""Do rationales from a teacher's saliency help a small student (Ballout et al. 2024, arXiv 2409.12586), or any second task?

    python -m benchmarks.studies.rationales --teacher FOLDER --gguf-file FILE --commonsenseqa DIR --openbookqa DIR --arc DIR

A small teacher is fine-tuned on the training questions of all four data sets, whose options stand in the prompt, and answers by
an option's text. For each data set it is dumped with its saliency over a thousand of these questions, and over judged ones for
the overlap of its five most salient tokens with the answer. Students learn the thousand in six ways; what is judged is their
likelihoods of the options of the judged questions.

Students, data sets, seeds, ways and their order are fixed here, before anything has run. A cell is one student, data set, seed
and way. The finished ones are kept in rationales.json, and the same command goes on with those that are missing there, in the
same order; `--cells` stops after so many. Weights of students are deleted once they are judged.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measurement import STUDIES, keep
from benchmarks.pictures import picture
from benchmarks.questions import (
    BATCH_SIZE,
    BINS,
    LEARNING_RATE,
    MAX_LENGTH,
    RESAMPLES,
    SETS,
    add_arguments,
    figure_cell,
    finished_cells,
    gguf,
    interval,
    layer_dropped,
    read_all,
    run,
    tune_teacher,
    write_lines,
)
from knowledge_store import KnowledgeStore
from knowledge_store.terminal.console import note
from student_train.evaluation.bootstrap import calibration_gaps, gap_error
from student_train.evaluation.questions import Question, corpus_row
from student_train.rationales.configuration import RationalesConfig
from student_train.rationales.overlap import Share, measure_overlap

RESULT = STUDIES / "rationales.json"

WAYS: dict[str, tuple[str, ...]] = {
    "label only": ("--loss", "ce"),
    "+ random": ("--loss", "ce", "--rationale", "random"),
    "+ masked": ("--loss", "ce", "--rationale", "masked"),
    "+ saliency": ("--loss", "ce", "--rationale", "saliency"),
    "distillation": ("--loss", "forward-kl"),
    "distillation + saliency": ("--loss", "forward-kl", "--rationale", "saliency"),
}
# What each way is compared with; None stands for the others.
LABELS = "label only"
BASELINES: dict[str | None, tuple[str, ...]] = {None: (LABELS,), "distillation + saliency": (LABELS, "distillation")}
OVER = f"over {LABELS}"
STUDENTS = {"whole": LEARNING_RATE, "layer-dropped": 3e-4}  # learning rates: where layers are missing there is more to learn
SEEDS = (0, 1, 2)
WEIGHT, TOKENS = 0.2, 5
PRECISION = "bf16"
CLAIMED_OVERLAP = 0.68


@dataclass(frozen=True)
class Cell:
    """One student that is trained and judged."""

    student: str
    data: str
    seed: int
    way: str

    @property
    def name(self) -> str:
        """What it is called in the result."""
        return f"{self.student} / {self.data} / seed {self.seed} / {self.way}"


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they run: two seeds of the first two data sets, the whole student and then the other;
    the same of ARC; then the third seed of everything."""
    for seeds, groups in ((SEEDS[:2], (SETS[:2], SETS[2:])), (SEEDS[2:], (SETS,))):
        for sets in groups:
            for student in STUDENTS:
                for data in sets:
                    for seed in seeds:
                        for way in WAYS:
                            yield Cell(student, data, seed, way)


# ---- questions


def write_files(arguments: argparse.Namespace, questions: dict[str, dict[str, list[Question]]]) -> None:
    """Corpora to dump, and the questions to judge by."""
    work = arguments.work
    for data, parts in questions.items():
        judged = parts["judge"][: arguments.judge]
        write_lines(work / f"{data}.jsonl", [corpus_row(question, "text") for question in parts["tune"][: arguments.train]])
        write_lines(work / f"{data}-judged.jsonl", [corpus_row(question, "text") for question in judged])
        asked = [{"question": each.text, "options": each.options, "answer": each.answer} for each in judged]
        write_lines(work / f"{data}-questions.jsonl", asked)


# ---- the commands, each of which goes on where it was


def prepare(arguments: argparse.Namespace, data: str) -> None:
    """Dump the teacher over a data set's questions."""
    work, store = arguments.work, arguments.work / "store"
    for name in (data, f"{data}-judged"):
        run(
            "teacher_dump", "run", store, "--teacher", work / "teacher", "--corpus", work / f"{name}.jsonl", "--name", name,
            "--kind", "positions", "--kind", "saliency", "--max-length", MAX_LENGTH,
        )  # fmt: skip


def judge(arguments: argparse.Namespace, model: Path, named: tuple[str, ...], data: str) -> dict[str, Any]:
    """What a model answers of a data set's judged questions: confidence, whether it is right, and nats, of each."""
    result = arguments.work / "judged.json"
    result.unlink(missing_ok=True)
    run(
        "student_train", "evaluate", "--model", model, *named, "--questions", arguments.work / f"{data}-questions.jsonl",
        "--answer-as", "text", "--batch-size", BATCH_SIZE, "--output", result,
    )  # fmt: skip
    answers = json.loads(result.read_text())["sequence"]["answers"]
    rounded = {name: [round(float(value), 3) for value in answers[name]] for name in ("confidence", "nll")}
    return {"correct": [int(value) for value in answers["correct"]], **rounded}


def train(arguments: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Train the student of a cell and judge it."""
    work = arguments.work
    whole = (arguments.teacher, *gguf(arguments))
    student: tuple[object, ...] = whole if cell.student == "whole" else (layer_dropped(arguments),)
    output = work / "run"
    options = WAYS[cell.way]
    if "--rationale" in options:
        options = (*options, "--rationale-weight", str(WEIGHT), "--rationale-tokens", str(TOKENS))
    marker = work / "cell.txt"
    if not marker.exists() or marker.read_text() != cell.name:  # of another cell, which was stopped
        shutil.rmtree(output, ignore_errors=True)
        marker.write_text(cell.name)
    run(
        "student_train", "run", work / "store", "--dump", cell.data, "--student", *student, "--output", output, *options,
        "--epochs", arguments.student_epochs, "--batch-size", BATCH_SIZE, "--learning-rate", STUDENTS[cell.student],
        "--precision", PRECISION, "--eval-fraction", 0, "--save-steps", 50, "--seed", cell.seed,
    )  # fmt: skip
    history = json.loads((output / "history.json").read_text())
    answers = judge(arguments, output, (), cell.data)
    shutil.rmtree(output)
    return {"seconds": round(history["seconds"], 1), **answers}


def overlaps(arguments: argparse.Namespace, data: str, chance: float) -> dict[str, Any]:
    """How often the teacher's most salient tokens are of the answer, on questions that it was not tuned on."""
    store = arguments.work / "store"
    config = RationalesConfig(str(store), dump=f"{data}-judged", rationale_tokens=TOKENS, chance=chance)
    found = measure_overlap(KnowledgeStore.open(store), config)

    def shown(share: Share | None) -> Any:
        if share is None:
            return None
        random_share = None if share.random is None else round(share.random, 4)
        return {"share": [round(value, 4) for value in (share.value, *share.interval)], "random": random_share}

    shares = {"answer in the context": found.stands, "gold": found.gold, "own": found.own, "likeliest is right": found.accuracy}
    return {**{name: shown(share) for name, share in shares.items()}, "warnings": list(found.warnings())}


# ---- the table


def figures(seeds: list[dict[str, Any]], data: str) -> dict[str, np.ndarray]:
    """Accuracy, ECE and NLL in RESAMPLES bootstrap samples of a data set's questions, the means over seeds: (1 + RESAMPLES,),
    the figure itself first. All cells of a data set have the same samples, so that two can be subtracted."""
    size = len(seeds[0]["correct"])
    samples = np.random.default_rng(SETS.index(data)).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    times = np.vstack([np.ones(size), samples])
    found: dict[str, list[np.ndarray]] = {"accuracy": [], "ece": [], "nll": []}
    for each in seeds:
        correct, confidence, nll = (np.array(each[name], np.float64) for name in ("correct", "confidence", "nll"))
        found["accuracy"].append(times @ correct / size)
        found["ece"].append(
            gap_error(times @ calibration_gaps(confidence, correct.astype(bool), BINS), np.full(len(times), size))
        )
        found["nll"].append(times @ nll / size)
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def tabulate(finished: dict[str, Any], seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """A row for each student, data set and way with a finished cell, and for the mean of the data sets of which all ways have
    run with the same seeds; the difference to a baseline is over the seeds that both have."""
    table = []
    for student in STUDENTS:

        def seeds_of(data: str, way: str, student: str = student) -> tuple[int, ...]:
            return tuple(seed for seed in seeds if Cell(student, data, seed, way).name in finished)

        first = seeds_of(SETS[0], LABELS)
        whole = tuple(data for data in SETS if first and all(seeds_of(data, way) == first for way in WAYS))
        for group in (*((data,) for data in SETS), *([whole] if len(whole) > 1 else [])):

            def mean_of(
                way: str, chosen: tuple[int, ...], student: str = student, group: tuple[str, ...] = group
            ) -> dict[str, np.ndarray]:
                each = [figures([finished[Cell(student, data, seed, way).name] for seed in chosen], data) for data in group]
                return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}

            for way in WAYS:
                done = seeds_of(group[0], way)
                if not done:
                    continue
                row: dict[str, Any] = {"student": student, "data": " and ".join(group), "way": way, "seeds": list(done)}
                row |= {name: interval(values) for name, values in mean_of(way, done).items()}
                for baseline in BASELINES.get(way, BASELINES[None]):
                    both = tuple(seed for seed in done if seed in seeds_of(group[0], baseline))
                    if way != baseline and both:
                        one, other = mean_of(way, both), mean_of(baseline, both)
                        row[f"over {baseline}"] = {name: interval(one[name] - other[name]) for name in one}
                table.append(row)
    return table


def print_table(record: dict[str, Any]) -> None:
    """The table and the overlaps in Markdown."""
    print("| student | data | way | seeds | accuracy | ECE | NLL |\n|" + " --- |" * 7)
    for row in record["table"]:
        shown = [figure_cell(row[name], scale) for name, scale in (("accuracy", 100), ("ece", 100), ("nll", 1))]
        print(f"| {row['student']} | {row['data']} | {row['way']} | {len(row['seeds'])} | {' | '.join(shown)} |")
    print("\n| student | data | way | | Δ accuracy | Δ ECE | Δ NLL |\n|" + " --- |" * 7)
    for row in record["table"]:
        for title in (title for title in row if title.startswith("over ")):
            shown = [figure_cell(row[title][name], scale) for name, scale in (("accuracy", 100), ("ece", 100), ("nll", 1))]
            print(f"| {row['student']} | {row['data']} | {row['way']} | {title} | {' | '.join(shown)} |")
    print(f"\nNot run: {len(record['not_run'])} of {len(record['not_run']) + len(record['cells'])} cells.")
    print("\n| data | the teacher is right | chance | rationales hold the answer | random | claimed |\n|" + " --- |" * 6)
    for data, each in record["teachers"].items():
        gold = each["overlap"]["gold"]
        print(
            f"| {data} | {figure_cell(each['accuracy'], 100)} | {100 * each['chance']:.0f} | {figure_cell(gold['share'], 100)}"
            f" | {100 * gold['random']:.0f} | {100 * CLAIMED_OVERLAP:.0f} |"
        )


def draw(record: dict[str, Any], path: Path) -> None:
    """What each way gains over labels alone, with its interval."""
    rows = [row for row in record["table"] if OVER in row]
    if not rows:
        return
    with picture(path, figsize=(7.5, 0.9 + 0.24 * len(rows))) as axes:
        for place, row in enumerate(rows):
            value, low, high = (100 * each for each in row[OVER]["accuracy"])
            axes.errorbar(value, -place, xerr=[[value - low], [high - value]], fmt="o", color="#33658a", capsize=2)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_yticks(
            [-place for place in range(len(rows))], [f"{row['data']}, {row['student']}: {row['way']}" for row in rows]
        )
        axes.set_xlabel("points of accuracy over labels alone (95% intervals)")


# ---- all together


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same of all cells."""
    names = ("tune", "train", "judge", "teacher_epochs", "student_epochs", "keep_layers")
    fixed = {"weight": WEIGHT, "tokens": TOKENS, "learning_rates": STUDENTS, "batch_size": BATCH_SIZE, "precision": PRECISION}
    return {**{name: getattr(arguments, name) for name in names}, **fixed, "ways": {way: " ".join(WAYS[way]) for way in WAYS}}


def store_record(record: dict[str, Any]) -> None:
    """Keep what there is so far, and which cells there are not."""
    record["table"] = tabulate(record["cells"])
    record["not_run"] = [cell.name for cell in cells() if cell.name not in record["cells"]]
    with contextlib.redirect_stdout(io.StringIO()):
        keep("rationales", record, STUDIES)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ".rationales")
    parser.add_argument("--train", type=int, default=1000, help="of the questions to tune on, those to train students on")
    parser.add_argument("--judge", type=int, default=500, help="most questions to judge by, of each set")
    return parser.parse_args()


def main() -> None:
    """Run the cells that are missing, in their order."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"settings": settings(arguments), "teachers": {}, "cells": {}}
    record |= finished_cells(RESULT, record["settings"], ("teachers", "cells"))
    missing = [cell for cell in cells() if cell.name not in record["cells"]][: arguments.cells]
    if missing:
        questions = read_all(arguments)
        write_files(arguments, questions)
        tuned_on = [question for parts in questions.values() for question in parts["tune"][: arguments.tune]]
        tune_teacher(arguments, arguments.work, tuned_on, "--precision", PRECISION)
    for data in dict.fromkeys(cell.data for cell in missing):
        prepare(arguments, data)
        if data not in record["teachers"]:
            chance = float(np.mean([1 / len(question.options) for question in questions[data]["judge"][: arguments.judge]]))
            answers = {"tuned": judge(arguments, arguments.work / "teacher", (), data)}
            answers["untuned"] = judge(arguments, arguments.teacher, gguf(arguments), data)
            accuracies = {name: interval(figures([each], data)["accuracy"]) for name, each in answers.items()}
            record["teachers"][data] = {
                "accuracy": accuracies["tuned"], "untuned": accuracies["untuned"], "chance": round(chance, 4),
                "overlap": overlaps(arguments, data, chance),
            }  # fmt: skip
            store_record(record)
    for cell in missing:
        note(f"== {cell.name}")
        record["cells"][cell.name] = train(arguments, cell)
        store_record(record)
    store_record(record)
    print_table(record)
    draw(record, STUDIES / "rationales.svg")


if __name__ == "__main__":
    main()
