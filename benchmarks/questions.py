"""What the studies on multiple-choice questions share: the question sets, and a teacher that is fine-tuned on them.

Options stand in the prompt, and a question is answered by an option's text. Each set is shuffled once, by its name; studies
take the first of it, so that what a teacher was tuned on is known.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store.storage.local import replace_bytes
from knowledge_store.terminal.console import note
from student_train.evaluation.questions import Question, corpus_row

SETS = ("commonsenseqa", "openbookqa", "arc-easy", "arc-challenge")
# Its middle layers are those a language model misses least (of 30).
KEPT_LAYERS = "0,1,2,3,4,5,6,7,8,9,10,11,24,25,26,27,28,29"
BINS, RESAMPLES = 10, 2000
MAX_LENGTH, BATCH_SIZE = 512, 16
LEARNING_RATE = 1e-4  # of whole models
GROUP = 256  # questions of similar length in a batch, when the teacher is tuned

_INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.+?)\s*\n\n(?P<options>Answer1: .+?)\n\nAnswer format: .+",
    re.DOTALL,
)
_OPTION = re.compile(r"(?:^|\s)Answer(\d+): ")


def add_arguments(parser: argparse.ArgumentParser, work: str) -> None:
    """The options that studies of questions share."""
    parser.add_argument("--teacher", required=True, help="folder of the model to fine-tune, which is the whole student too")
    parser.add_argument("--gguf-file", help="a GGUF file in it")
    for name in ("commonsenseqa", "openbookqa", "arc"):
        parser.add_argument(f"--{name}", required=True, type=Path, help="folder of its training and test questions")
    parser.add_argument("--work", type=Path, default=Path(work), help="where models and dumps are kept")
    parser.add_argument("--tune", type=int, default=3000, help="most questions of each set to tune the teacher on")
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--student-epochs", type=int, default=2)
    parser.add_argument("--keep-layers", default=KEPT_LAYERS, help="of the layer-dropped student")
    parser.add_argument("--cells", type=int, help="run the first so many of those that are missing")


# ---- questions


def commonsenseqa(path: Path) -> Iterator[Question | None]:
    """CommonsenseQA's own JSON Lines; None for a row that is no question."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        choices = row["question"]["choices"]
        labels = [choice["label"] for choice in choices]
        yield _question(row["question"]["stem"], [choice["text"] for choice in choices], labels, row.get("answerKey"))


def instructions(path: Path) -> Iterator[Question | None]:
    """Questions as instructions, `Answer1: … Answer2: …` in one text; None for a row that does not parse."""
    for row in json.loads(path.read_text()):
        match = _INSTRUCTION.fullmatch(row["instruction"])
        if match is None:
            yield None
            continue
        numbers, options = _OPTION.split(match["options"])[1::2], _OPTION.split(match["options"])[2::2]
        counted = numbers == [str(number) for number in range(1, len(numbers) + 1)]
        labels = [f"answer{number}" for number in numbers]
        yield _question(match["question"], options, labels, row.get("answer")) if counted else None


def _question(text: str, options: list[str], labels: list[str], answer: str | None) -> Question | None:
    text, options = text.strip(), [option.strip() for option in options]
    sound = text and all(options) and len(set(options)) == len(options) >= 2 and answer in labels
    return Question(text, tuple(options), labels.index(answer)) if sound and answer else None


def with_options(question: Question) -> Question:
    """The question with its options as part of what is asked."""
    return replace(question, text="\n".join([question.text, *(f"- {option}" for option in question.options)]))


def read_all(arguments: argparse.Namespace) -> dict[str, dict[str, list[Question]]]:
    """By data set, the training questions (`tune`) and the test questions (`judge`), each in the order of its shuffle."""
    csqa, obqa, arc = arguments.commonsenseqa, arguments.openbookqa, arguments.arc
    files = {
        "commonsenseqa": (commonsenseqa, csqa / "train_rand_split.jsonl", csqa / "dev_rand_split.jsonl"),
        "openbookqa": (instructions, obqa / "openbookqa_train.json", obqa / "openbookqa_test.json"),
        "arc-easy": (instructions, arc / "ARC-Easy_train.json", arc / "ARC-Easy_test.json"),
        "arc-challenge": (instructions, arc / "ARC-Challenge_train.json", arc / "ARC-Challenge_test.json"),
    }
    found: dict[str, dict[str, list[Question]]] = {}
    for data, (read, *paths) in files.items():
        found[data] = {}
        for part, path in zip(("tune", "judge"), paths, strict=True):
            if not path.is_file():
                sys.exit(f"there is no file {path}")
            sound = [with_options(question) for question in read(path) if question is not None]
            random.Random(f"{part} {data}").shuffle(sound)
            found[data][part] = sound
    return found


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON Lines file, which is left alone where it is the same already."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        replace_bytes(path, text.encode())


# ---- the commands, each of which goes on where it was


def run(package: str, *words: object) -> None:
    """One of the three commands."""
    note(f"$ {package.replace('_', '-')} {' '.join(map(str, words))}")
    finished = subprocess.run([sys.executable, "-m", f"{package}.cli", *map(str, words)], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def gguf(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The options that name the GGUF file of the untuned model."""
    return ("--gguf-file", arguments.gguf_file) if arguments.gguf_file else ()


def tune_teacher(arguments: argparse.Namespace, work: Path, questions: list[Question], *more: object) -> None:
    """Fine-tune the teacher on questions, with more options of `student-train run`. Only the tokens of their dump are used, so
    one layer of the model is enough to make it."""
    named = gguf(arguments)
    rows = [corpus_row(question, "text") for question in questions]
    write_lines(work / "tune.jsonl", rows)
    store, layer = work / "tuning", work / "one-layer"
    if not layer.exists():
        run("student_train", "init", "--from", arguments.teacher, *named, "--keep-layers", 0, "--output", layer)
    run(
        "teacher_dump", "run", store, "--teacher", layer, "--corpus", work / "tune.jsonl", "--name", "tune",
        "--max-length", MAX_LENGTH,
    )  # fmt: skip
    run(
        "student_train", "run", store, "--student", arguments.teacher, *named, "--output", work / "teacher", "--loss", "ce",
        "--epochs", arguments.teacher_epochs, "--batch-size", BATCH_SIZE, "--group-by-length", GROUP,
        "--learning-rate", LEARNING_RATE, "--eval-fraction", 0, "--save-steps", 50, *more,
    )  # fmt: skip


def layer_dropped(arguments: argparse.Namespace) -> Path:
    """The folder of the untuned model without its middle layers."""
    folder: Path = arguments.work / "layer-dropped"
    if not folder.exists():
        run(
            "student_train", "init", "--from", arguments.teacher, *gguf(arguments), "--keep-layers", arguments.keep_layers,
            "--output", folder,
        )  # fmt: skip
    return folder


# ---- figures


def finished_cells(result: Path, settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What a study keeps under these names, once its settings are those of the command; nothing where no cell has run."""
    if not result.exists():
        return {}
    kept: dict[str, Any] = json.loads(result.read_text())["figures"]
    if not kept["cells"] and not kept.get("models"):
        return {}
    if kept["settings"] != json.loads(json.dumps(settings)):
        sys.exit(f"{result.name} has cells of other settings: give those, or set BENCHMARK_RESULTS to another folder")
    return {name: kept[name] for name in names}


def interval(values: np.ndarray) -> list[float]:
    """[figure, lower end, upper end] of the 95% percentile bootstrap."""
    return [round(float(value), 5) for value in (values[0], *np.quantile(values[1:], [0.025, 0.975]))]


def figure_cell(figure: list[float], scale: float, sign: str = "") -> str:
    """A figure with its interval, in a table of Markdown: in percent or points at a scale of 100."""
    form = f"{sign}.1f" if scale == 100 else f"{sign}.3f"
    value, low, high = (format(scale * value, form) for value in figure)
    return f"{value} ({low} to {high})".replace("-", "−")
