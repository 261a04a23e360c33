"""FIRST's table: are students that learn from a re-calibrated teacher's five candidates more accurate, and less sure of
themselves where they are wrong (Shum et al. 2024, arXiv 2408.12168)?

    python -m benchmarks.studies.trust --teacher FOLDER --gguf-file FILE --commonsenseqa DIR --openbookqa DIR --arc DIR

A small teacher is fine-tuned on CommonsenseQA. A layer-dropped copy of it as it was before learns the same questions in the
same order by each method, all from one dump. Everything is measured on held-out questions of CommonsenseQA, and on OpenBookQA,
ARC-Easy and ARC-Challenge, which nobody was trained on. Answers are the options' texts, since a model this small does not learn
what letters stand for. Everything is kept in the work folder, and the same command resumes from what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measurement import STUDIES, keep
from knowledge_store import KnowledgeStore
from knowledge_store.calibration.expected_calibration_error import equal_width_bins, expected_calibration_error
from knowledge_store.calibration.file import read_calibration
from knowledge_store.storage.local import replace_bytes
from knowledge_store.terminal.progress import progress_bar
from student_train.evaluation.bootstrap import calibration_gaps, gap_error
from student_train.evaluation.questions import Question, corpus_row, read_questions, tokenise
from student_train.losses.head import head_at
from student_train.losses.table import LOSSES
from student_train.training.configuration import TrainConfig
from student_train.training.dump_facts import describe_dump
from student_train.training.knowledge import columns_read
from student_train.training.models import load_model, load_tokenizer
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence

STAGES = ("questions", "teacher", "dump", "students", "evaluations", "table")

# Its middle layers are those a language model misses least (of 30).
KEPT_LAYERS = "0,1,2,3,4,5,6,7,8,9,10,11,24,25,26,27,28,29"
IN_DOMAIN = ("commonsenseqa",)
OUT_OF_DOMAIN = ("openbookqa", "arc-easy", "arc-challenge")
SETS = (*IN_DOMAIN, *OUT_OF_DOMAIN)

BINS = 10
RESAMPLES = 2000
# FIRST's, on average over its data sets: in points of accuracy and, as we read it, in points of calibration error.
CLAIMS = {"accuracy": 2.3, "ece_10": -10.0}

MAX_LENGTH = 512
BATCH_SIZE = 16
TEACHER_LEARNING_RATE = 1e-4
STUDENT_LEARNING_RATE = 3e-4  # with twelve layers taken out there is more to learn than an answer
WARMUP = 0.05
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
CHUNK = 16  # batches that are sorted by length together
CHECKPOINT_STEPS = 20


@dataclass(frozen=True)
class Method:
    """A way to train the student: its name in the table, and the options of `student-train run`."""

    name: str
    options: tuple[str, ...]


METHODS = {
    "ce": Method("fine-tuning", ("--loss", "ce")),
    "direct": Method("direct distillation", ("--loss", "top-k-renormalised")),
    "smoothed": Method("label smoothing", ("--loss", "label-smoothing", "--smoothing", "0.1")),
    "first-plain": Method("FIRST, not re-calibrated", ("--loss", "conditional-kl")),
    "first": Method("FIRST", ("--loss", "first", "--calibration", "{work}/first.json")),
    "draws": Method("ours: candidates + draws", ("--loss", "forward-kl", "--tail", "draws")),
    "tempered": Method("ours: teacher at T, bucket", ("--loss", "forward-kl", "--calibration", "{work}/calibration.json")),
    # FIRST's losses say nothing of the probability outside the five candidates, and the student is not fine-tuned before;
    # cross-entropy makes up for both.
    "first-mixed": Method("FIRST + CE", ("--loss", "first", "--calibration", "{work}/first.json", "--ce-weight", "0.3")),
}
TEACHER = "teacher"
BASELINE = METHODS["ce"].name
CONTROL = "fine-tuning, temperature after"
LABELS = {"accuracy": "accuracy", "ece_10": "ECE", "nll": "NLL", "brier": "Brier"}
PAPER = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
# The mean over these sets, each counting the same.
GROUPS = {"in domain": IN_DOMAIN, "out of domain": OUT_OF_DOMAIN, "all four": SETS}

_INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.+?)\s*\n\n(?P<options>Answer1: .+?)\n\nAnswer format: .+",
    re.DOTALL,
)
_OPTION = re.compile(r"(?:^|\s)Answer(\d+): ")


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


def write_questions(arguments: argparse.Namespace) -> None:
    """A seeded sample of each set as questions, those to learn from as corpora too, and what was dropped, in counts.json."""
    work, asked = arguments.work, arguments.questions
    wanted = {
        "train": (arguments.commonsenseqa / "train_rand_split.jsonl", commonsenseqa, arguments.train + arguments.calibration),
        "commonsenseqa": (arguments.commonsenseqa / "dev_rand_split.jsonl", commonsenseqa, asked),
        "openbookqa": (arguments.openbookqa / "openbookqa_test.json", instructions, asked),
        "arc-easy": (arguments.arc / "ARC-Easy_test.json", instructions, asked),
        "arc-challenge": (arguments.arc / "ARC-Challenge_test.json", instructions, asked),
    }
    counts: dict[str, dict[str, int]] = {}
    samples: dict[str, list[Question]] = {}
    for name, (path, read, size) in wanted.items():
        if not path.is_file():
            sys.exit(f"there is no file {path}")
        rows = list(read(path))
        sound = [row for row in rows if row is not None]
        if len(sound) < size:
            sys.exit(f"{path} has {len(sound):,} questions, and {size:,} are asked for")
        samples[name] = random.Random(f"{arguments.seed} {name}").sample(sound, size)
        counts[name] = {"rows": len(rows), "dropped": len(rows) - len(sound), "used": size}
    samples["calibration"] = samples["train"][arguments.train :]
    samples["train"] = samples["train"][: arguments.train]
    counts["calibration"] = {**counts["train"], "used": arguments.calibration}
    counts["train"]["used"] = arguments.train
    for name in ("train", "calibration"):
        corpus = [{**corpus_row(question, "text"), "split": name} for question in samples[name]]
        _write_lines(work / f"{name}-corpus.jsonl", corpus)
    _write_lines(work / "calibration.jsonl", [_record(question, "calibration") for question in samples["calibration"]])
    # One file for all: a temperature is then fitted once for each model.
    _write_lines(work / "test.jsonl", [_record(question, name) for name in SETS for question in samples[name]])
    _write_json(work / "counts.json", counts)


def _record(question: Question, name: str) -> dict[str, Any]:
    return {"question": question.text, "options": question.options, "answer": question.answer, "set": name}


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    replace_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write_json(path: Path, value: Any) -> None:
    replace_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


# ---- the teacher


def tune_teacher(arguments: argparse.Namespace) -> None:
    """Fine-tune the teacher on the training corpus by cross-entropy of the completions; resumes from its last checkpoint."""
    work, folder = arguments.work, arguments.work / "teacher"
    torch.manual_seed(arguments.seed)
    tokenizer = load_tokenizer(arguments.teacher, arguments.gguf_file)
    rows = [json.loads(line) for line in (work / "train-corpus.jsonl").read_text().splitlines()]
    cutter = CorpusTokenizer(tokenizer, MAX_LENGTH)
    sequences = [
        sequence
        for number, row in enumerate(rows)
        for sequence in cutter.sequences(
            Document(number, 0, number + 1, 0, 0, prompt=row["prompt"], completion=row["completion"])
        )
    ]
    order = [batch for epoch in range(arguments.teacher_epochs) for batch in batches(sequences, arguments.seed, epoch)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(arguments.teacher, arguments.gguf_file).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=TEACHER_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    begun, losses, before = 0, [], 0.0
    checkpoint = work / "teacher-checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        begun, losses, before = state["step"], state["losses"], state["seconds"]
    started = time.monotonic()
    with progress_bar("tuning the teacher", len(order) - begun, "steps") as advance:
        for step in range(begun, len(order)):
            for group in optimiser.param_groups:
                group["lr"] = TEACHER_LEARNING_RATE * rate_share(step, len(order))
            loss = completion_loss(model, [sequences[place] for place in order[step]], device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(round(loss.item(), 4))
            if (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < len(order):
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1, "losses": losses}
                unfinished = checkpoint.with_suffix(".tmp")
                torch.save({**state, "seconds": before + time.monotonic() - started}, unfinished)
                unfinished.replace(checkpoint)
            advance(1)
    seconds = round(before + time.monotonic() - started, 1)
    unfinished = work / "teacher-unfinished"
    model.to("cpu").eval().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    facts = {"epochs": arguments.teacher_epochs, "steps": len(order), "batch_size": BATCH_SIZE, "seconds": seconds}
    rates = {"learning_rate": TEACHER_LEARNING_RATE, "warmup": WARMUP, "weight_decay": WEIGHT_DECAY, "schedule": "cosine"}
    _write_json(unfinished / "tuning.json", {**facts, **rates, "loss": losses})
    unfinished.replace(folder)
    checkpoint.unlink(missing_ok=True)


def batches(sequences: list[TokenSequence], seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches, as places in `sequences`: shuffled, with little padding, since lengths are sorted in chunks."""
    order = list(range(len(sequences)))
    generator = random.Random(f"{seed} {epoch}")
    generator.shuffle(order)
    found = []
    for start in range(0, len(order), CHUNK * BATCH_SIZE):
        chunk = sorted(order[start : start + CHUNK * BATCH_SIZE], key=lambda place: len(sequences[place].token_ids))
        parts = [chunk[begin : begin + BATCH_SIZE] for begin in range(0, len(chunk), BATCH_SIZE)]
        generator.shuffle(parts)
        found += parts
    return found


def rate_share(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up in a line, down in half a cosine."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def completion_loss(model: Any, sequences: list[TokenSequence], device: str) -> Tensor:
    """Mean cross-entropy (nats, a scalar) of the target tokens; the head sees no other position."""
    longest = max(len(each.token_ids) for each in sequences)
    tokens, mask = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(2))
    targets = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, each in enumerate(sequences):
        tokens[row, : len(each.token_ids)] = torch.from_numpy(each.token_ids)
        mask[row, : len(each.token_ids)] = 1
        targets[row, : len(each.token_ids)] = torch.from_numpy(each.is_target)
    rows, columns = targets.nonzero(as_tuple=True)  # a token is predicted one position before it stands
    with head_at(model, rows.to(device), (columns - 1).to(device)):
        logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits[0]
    return functional.cross_entropy(logits, tokens[rows, columns].to(device))


# ---- the commands


class Journal:
    """The steps that are done, with their commands and seconds, in steps.json of the work folder."""

    def __init__(self, work: Path):
        self.work = work
        self.path = work / "steps.json"
        self.steps: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, step: str, result: Path, package: str, *arguments: object) -> None:
        """Print one of the three commands and run it, unless it is done and what it made is there."""
        if step in self.steps and result.exists():
            return
        words = [str(argument) for argument in arguments]
        shown = f"{package.replace('_', '-')} {shlex.join(words)}"
        print(f"\n$ {shown}", flush=True)
        started = time.monotonic()
        finished = subprocess.run([sys.executable, "-m", f"{package}.cli", *words], check=False)
        if finished.returncode:
            sys.exit(finished.returncode)
        # What a folder is called on this machine is nobody's business.
        plain = [word.replace(str(self.work), ".trust") for word in words]
        plain = [Path(word).name if word.startswith("/") else word for word in plain]
        command = f"{package.replace('_', '-')} {shlex.join(plain)}"
        self.steps[step] = {"command": command, "seconds": round(time.monotonic() - started, 1)}
        _write_json(self.path, self.steps)


def dump_teacher(arguments: argparse.Namespace, journal: Journal) -> None:
    """Fit the teacher's temperature, dump it once for all methods, and fit FIRST's c from the dump of other questions."""
    work, store = arguments.work, arguments.work / "store"
    teacher = ("--teacher", work / "teacher", "--max-length", MAX_LENGTH)
    corpora = {name: work / f"{name}-corpus.jsonl" for name in ("train", "calibration")}
    fitted = work / "calibration.json"
    journal.run(
        "calibrate teacher", fitted, "teacher_dump", "calibrate", *teacher, "--corpus", corpora["calibration"],
        "--output", fitted,
    )  # fmt: skip
    for name, corpus in corpora.items():
        journal.run(
            f"dump {name}", store, "teacher_dump", "run", store, *teacher, "--corpus", corpus, "--name", name,
            "--tail-draws", 4, "--calibration", fitted,
        )  # fmt: skip
    journal.run(
        "calibrate first", work / "first.json", "student_train", "calibrate", store, "--dump", "calibration",
        "--method", "first", "--split", "split=calibration", "--output", work / "first.json",
    )  # fmt: skip


def train_students(arguments: argparse.Namespace, journal: Journal) -> None:
    """The same student by every method, over the same questions in the same order."""
    work = arguments.work
    gguf = ("--gguf-file", arguments.gguf_file) if arguments.gguf_file else ()
    student = work / "student"
    journal.run(
        "student", student, "student_train", "init", "--from", arguments.teacher, *gguf,
        "--keep-layers", arguments.keep_layers, "--output", student,
    )  # fmt: skip
    for slug, method in METHODS.items():
        folder = work / "runs" / slug
        journal.run(
            f"train {slug}", folder / "config.json", "student_train", "run", work / "store", "--dump", "train",
            "--student", student, "--output", folder, *(option.format(work=work) for option in method.options),
            "--epochs", arguments.student_epochs, "--batch-size", BATCH_SIZE, "--learning-rate", STUDENT_LEARNING_RATE,
            "--warmup", WARMUP, "--weight-decay", WEIGHT_DECAY, "--max-grad-norm", MAX_GRADIENT_NORM,
            "--eval-fraction", 0, "--save-steps", 50, "--seed", arguments.seed,
        )  # fmt: skip


def evaluate(arguments: argparse.Namespace, journal: Journal) -> None:
    """The teacher and every student on all questions, as they are and with a temperature fitted after training."""
    work = arguments.work
    (work / "evaluations").mkdir(exist_ok=True)
    for slug in (TEACHER, *METHODS):
        model = work / "teacher" if slug == TEACHER else work / "runs" / slug
        result = work / "evaluations" / f"{slug}.json"
        journal.run(
            f"evaluate {slug}", result, "student_train", "evaluate", "--model", model,
            "--questions", work / "test.jsonl", "--answer-as", "text", "--post-hoc-temperature", work / "calibration.jsonl",
            "--batch-size", BATCH_SIZE, "--output", result,
        )  # fmt: skip


# ---- the table

Answers = dict[str, np.ndarray]  # (N,) confidence, correct, nll (nats) and brier of the same questions


def read_answers(arguments: argparse.Namespace, confidence: str) -> tuple[dict[str, dict[str, Answers]], dict[str, float]]:
    """For each row of the table what it answered of each set, and for each with a temperature fitted after training, that.

    Args:
        arguments: the command line.
        confidence: "sequence", or "first_token", which leaves out questions whose options share their first token.
    """
    work = arguments.work
    tags = np.array([json.loads(line)["set"] for line in (work / "test.jsonl").read_text().splitlines()])
    if confidence != "sequence":
        tokenised = tokenise(read_questions(work / "test.jsonl", "text"), load_tokenizer(str(work / "teacher")), "text")
        tags = tags[[question.first_tokens_differ for question in tokenised]]
    rows: dict[str, dict[str, Answers]] = {}
    temperatures: dict[str, float] = {}
    for slug in (TEACHER, *METHODS):
        result = json.loads((work / "evaluations" / f"{slug}.json").read_text())
        name = TEACHER if slug == TEACHER else METHODS[slug].name
        scaled = result["post_hoc"][confidence]
        temperatures[after(name)] = scaled["temperature"]
        for row, side in ((name, result[confidence]), (after(name), scaled)):
            columns = {column: np.array(values, np.float64) for column, values in side["answers"].items()}
            assert all(len(column) == len(tags) for column in columns.values())
            rows[row] = {each: {column: values[tags == each] for column, values in columns.items()} for each in SETS}
    return rows, temperatures


def after(name: str) -> str:
    """A row's name with a temperature fitted after training."""
    return f"{name}, temperature after"


def replicates(answers: dict[str, Answers], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy, ECE, NLL and Brier of each set in RESAMPLES bootstrap samples of its questions: (1 + RESAMPLES,), the figure
    itself first. The same seed draws the same questions, so that two rows can be subtracted."""
    found = {}
    for place, (name, each) in enumerate(answers.items()):
        size = len(each["correct"])
        drawn = np.random.default_rng((seed, place)).multinomial(size, np.full(size, 1 / size), RESAMPLES)
        times = np.vstack([np.ones(size), drawn])
        gaps = calibration_gaps(each["confidence"], each["correct"].astype(bool), BINS)
        found[name] = {
            "accuracy": times @ each["correct"] / size,
            "ece_10": gap_error(times @ gaps, np.full(len(times), size)),
            "nll": times @ each["nll"] / size,
            "brier": times @ each["brier"] / size,
        }
    return found


def grouped(sets: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Means over the sets of each group."""
    return {
        group: {metric: np.mean([sets[name][metric] for name in names], axis=0) for metric in LABELS}
        for group, names in GROUPS.items()
    }


def interval(values: np.ndarray) -> list[float]:
    """[figure, lower end, upper end] of the 95% percentile bootstrap."""
    return [round(float(value), 5) for value in (values[0], *np.quantile(values[1:], [0.025, 0.975]))]


def least_error(answers: dict[str, Answers], seed: int) -> dict[str, float]:
    """The ECE that a model of these confidences would be given if it were perfectly calibrated, for each group: with a few
    hundred questions it is not 0."""
    generator = np.random.default_rng(seed)
    sets = {}
    for name, each in answers.items():
        confidence = np.minimum(each["confidence"], 1.0)
        right = generator.random((200, len(confidence))) < confidence
        sets[name] = float(np.mean([expected_calibration_error(confidence, row, BINS) for row in right]))
    return {group: round(float(np.mean([sets[name] for name in names])), 5) for group, names in GROUPS.items()}


def tabulate(arguments: argparse.Namespace, confidence: str) -> dict[str, Any]:
    """Every figure with its interval, and what each row gains over fine-tuning, alone and with its temperature."""
    rows, temperatures = read_answers(arguments, confidence)
    seed = arguments.seed
    samples = {name: replicates(answers, seed) for name, answers in rows.items()}
    means = {name: grouped(sample) for name, sample in samples.items()}
    table = {
        name: {
            **{
                group: {metric: interval(values) for metric, values in figures.items()}
                for group, figures in (means[name] | samples[name]).items()
            },
            "ECE if perfectly calibrated": least_error(rows[name], seed),
            "temperature": temperatures.get(name, 1.0),
        }
        for name in rows
    }
    differences = {
        baseline: {
            name: {
                group: {metric: interval(values - means[baseline][group][metric]) for metric, values in figures.items()}
                for group, figures in means[name].items()
            }
            for name in rows
            if name != baseline and (baseline == CONTROL or name == CONTROL or name not in temperatures)
        }
        for baseline in (BASELINE, CONTROL)
    }
    questions = {name: len(each["correct"]) for name, each in rows[BASELINE].items()}
    return {"questions": questions, "rows": table, "differences": differences}


def verdict(difference: list[float], claimed: float) -> str:
    """What a difference in points, with its interval, says of a claim. Where the interval holds 0, "not shown" means that it
    holds the claimed figure too, and "no sign of it" that it does not."""
    figure, low, high = difference
    sign = 1 if claimed > 0 else -1
    figure, least, most = (figure, low, high) if sign > 0 else (-figure, -high, -low)
    if least > 0:
        return "holds here" if figure >= abs(claimed) else "better here too, by less than claimed"
    if most < 0:
        return "the opposite here"
    return "not shown here" if most >= abs(claimed) else "no sign of it here"


def claims(differences: dict[str, Any]) -> list[dict[str, Any]]:
    """FIRST's claims against fine-tuning beside what was found, in points; and the same figures of our methods."""
    found = []
    names = [method.name for method in METHODS.values() if "FIRST" in method.name or "ours" in method.name]
    for name in (each for each in names if each in differences):
        for metric, claimed in CLAIMS.items():
            for group in GROUPS:
                points = [round(100 * value, 2) for value in differences[name][group][metric]]
                entry = {"method": name, "metric": LABELS[metric], "where": group, "points": points, "claimed": claimed}
                found.append({**entry, "verdict": verdict(points, claimed)})
    return found


def print_tables(result: dict[str, Any], rows: list[str], found: list[dict[str, Any]]) -> None:
    """The table, and FIRST's claims beside what was found, in Markdown."""
    for group in ("in domain", "out of domain"):
        _heading(group, *LABELS.values(), "ECE if perfectly calibrated", "Δ accuracy", "Δ ECE")
        for name in rows:
            figures, gains = result["rows"][name], result["differences"][BASELINE].get(name)
            cells = [_cell(figures[group][metric], metric in CLAIMS) for metric in LABELS]
            cells += [f"{100 * figures['ECE if perfectly calibrated'][group]:.1f}"]
            cells += [_cell(gains[group][metric], True, "+") if gains else "" for metric in CLAIMS]
            print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\nBy the likelihood of the options; accuracy and ECE in percent, NLL in nats; out of domain the mean of three sets;"
        f" 95% bootstrap intervals over questions; ECE with {BINS} bins; Δ to {BASELINE} on the same questions, in points."
    )
    print("\nFIRST claims +2.3 points of accuracy and −10 points of calibration error over fine-tuning, on average. Here:")
    _heading("method", "figure", *GROUPS, "claimed", "on all four")
    for name, label in dict.fromkeys((each["method"], each["metric"]) for each in found):
        entries = [each for each in found if (each["method"], each["metric"]) == (name, label)]
        cells = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*each["points"]) for each in entries]
        print(f"| {name} | {label} | {' | '.join(cells)} | {entries[-1]['claimed']:+g} | {entries[-1]['verdict']} |")


def _heading(*titles: str) -> None:
    print(f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")


def _cell(figure: list[float], percent: bool, sign: str = "") -> str:
    form, scale = (f"{sign}.1f", 100) if percent else (f"{sign}.3f", 1)
    value, low, high = (format(scale * each, form) for each in figure)
    return f"{value} [{low}, {high}]"


def draw_picture(rows: dict[str, dict[str, Answers]], table: dict[str, Any], path: Path) -> None:
    """Reliability diagrams of every row of the table, in domain and out of domain (pooled), with how many answers are where."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "trust", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    names = list(rows)
    wide = -(-len(names) // 2)
    strips = [names[start : start + wide] for start in range(0, len(names), wide)]
    chart = plt.figure(figsize=(2 * wide + 0.6, 6.2 * len(strips)), layout="constrained")
    for strip, part in zip(strips, chart.subfigures(len(strips), 1, hspace=0.04, squeeze=False)[:, 0], strict=True):
        axes = part.subplots(4, wide, sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": [4, 1, 4, 1]})
        for column in range(wide):
            for row, group in enumerate(("in domain", "out of domain")):
                above, below = axes[2 * row : 2 * row + 2, column]
                if column < len(strip):
                    name = strip[column]
                    _draw_reliability(above, below, rows[name], GROUPS[group])
                    error, accuracy = (table[name][group][metric][0] for metric in ("ece_10", "accuracy"))
                    text = f"accuracy {accuracy:.1%}\nECE {error:.1%}"
                    above.text(0.04, 0.97, text, va="top", fontsize=8, transform=above.transAxes, bbox=PAPER)
                    if row == 0:
                        above.set_title(textwrap.fill(name, 22), fontsize=9, fontweight="bold", loc="left")
                    else:
                        below.set_xlabel("confidence")
                    if column == 0:
                        above.set_ylabel(f"{group}\naccuracy")
                        below.set_ylabel("share")
                else:
                    above.set_axis_off()
                    below.set_axis_off()
    chart.suptitle(
        "How often answers are right, by how sure the model is. Red: surer than right; green: less sure; pale: under 10.\n"
        "Out of domain three sets are pooled, and accuracy and ECE are their means.",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    chart.savefig(path, metadata={"Date": None})
    plt.close(chart)


def _draw_reliability(above: Any, below: Any, answers: dict[str, Answers], sets: tuple[str, ...]) -> None:
    """One diagram, and under it the share of answers in each bin."""
    confidence, correct = (np.concatenate([answers[name][key] for name in sets]) for key in ("confidence", "correct"))
    middle, width = (np.arange(BINS) + 0.5) / BINS, 0.92 / BINS
    bins = equal_width_bins(confidence, BINS)
    count = np.bincount(bins, minlength=BINS)
    filled = np.flatnonzero(count)
    right = np.bincount(bins, correct, BINS)[filled] / count[filled]
    sure = np.bincount(bins, confidence, BINS)[filled] / count[filled]
    strength = np.where(count[filled] < 10, 0.35, 1.0)  # a few answers say little
    for place, height, claimed, alpha in zip(middle[filled], right, sure, strength, strict=True):
        above.bar(place, height, width, color="#33658a", alpha=alpha, linewidth=0)
        colour = "#c1440e" if claimed > height else "#6a9a3b"
        above.bar(place, claimed - height, width, height, color=colour, alpha=0.45 * alpha, linewidth=0)
    above.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
    above.set(xlim=(0, 1), ylim=(0, 1))
    below.bar(middle, count / count.sum(), width, color="#9a9a9a", linewidth=0)
    below.set_xticks([0, 0.5, 1], ["0", "½", "1"])


def report(arguments: argparse.Namespace, journal: Journal) -> None:
    """The figures and the picture, kept in results/."""
    work = arguments.work
    store = KnowledgeStore.open(work / "store")
    tuning = json.loads((work / "teacher" / "tuning.json").read_text())
    losses = tuning.pop("loss")
    fitted = {name: read_calibration(work / f"{name}.json") for name in ("calibration", "first")}
    result = tabulate(arguments, "sequence")
    shown = [TEACHER, BASELINE, CONTROL, *(each.name for each in METHODS.values() if each.name != BASELINE)]
    seconds = {"tune teacher": tuning["seconds"], **{step: entry["seconds"] for step, entry in journal.steps.items()}}
    for slug in METHODS:  # sessions that were interrupted included
        seconds[f"train {slug}"] = round(json.loads((work / "runs" / slug / "history.json").read_text())["seconds"], 1)
    found_claims = claims(result["differences"][BASELINE])
    keep(
        "trust",
        {
            "settings": {**settings(arguments), "batch_size": BATCH_SIZE, "student_learning_rate": STUDENT_LEARNING_RATE},
            "counts": json.loads((work / "counts.json").read_text()),
            "teacher": {**tuning, "first_loss": _mean(losses[:10]), "last_loss": _mean(losses[-10:])},
            "calibration": {
                name: {"value": each.value, "targets": each.targets, "uncovered": each.uncovered}
                | {"before": each.before, "after": each.after}
                for name, each in fitted.items()
            },
            "dumps": {
                each.dump: {
                    "selection": str(each.facts["positions.selection"]),
                    "bytes": each.bytes,
                    "predictions": each.statistics["positions.predictions"],
                    "bytes_per_prediction": round(each.bytes / each.statistics["positions.predictions"], 2),
                    "dense_bytes": each.facts["positions.dense_bytes"],
                    "mean_top_k_mass": each.statistics["positions.mean_top_k_mass"],
                }
                for each in store.info()
            },
            "bytes_per_prediction_read": {METHODS[slug].name: bytes_read(store, work / "runs" / slug) for slug in METHODS},
            "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
            "commands": [entry["command"] for entry in journal.steps.values()],
            "sequence": result,
            "first_token": tabulate(arguments, "first_token"),
            "claims": found_claims,
        },
        STUDIES,
    )
    rows = read_answers(arguments, "sequence")[0]
    draw_picture({name: rows[name] for name in shown}, result["rows"], STUDIES / "trust.svg")
    print_tables(result, shown, found_claims)


def bytes_read(store: KnowledgeStore, run: Path) -> float:
    """Bytes of the dump a prediction, without the columns that a run's loss has no use for."""
    config = TrainConfig(**json.loads((run / "run.json").read_text())["config"])
    facts = describe_dump(store, "train", columns_read(store.manifest("train"), config, LOSSES[config.loss]))
    return round(facts["bytes_read"] / facts["targets"], 2)


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


# ---- all together


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must not change between the calls that share a work folder."""
    names = ("train", "questions", "calibration", "keep_layers", "teacher_epochs", "student_epochs", "seed", "gguf_file")
    return {name: getattr(arguments, name) for name in names}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the model to fine-tune, and to make students of")
    parser.add_argument("--gguf-file", help="a GGUF file in it")
    for name, files in (
        ("commonsenseqa", "train_rand_split.jsonl and dev_rand_split.jsonl"),
        ("openbookqa", "openbookqa_test.json"),
        ("arc", "ARC-Easy_test.json and ARC-Challenge_test.json"),
    ):
        parser.add_argument(f"--{name}", required=True, type=Path, help=f"folder with {files}")
    parser.add_argument("--work", type=Path, default=Path(".trust"), help="where everything is kept")
    parser.add_argument("--train", type=int, default=2000, help="questions to train on")
    parser.add_argument("--questions", type=int, default=150, help="questions to measure on, of each set")
    parser.add_argument("--calibration", type=int, default=300, help="questions to fit temperatures and FIRST's c on")
    parser.add_argument("--keep-layers", default=KEPT_LAYERS, help="the student's")
    parser.add_argument("--teacher-epochs", type=int, default=1)
    parser.add_argument("--student-epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    return parser.parse_args()


def main() -> None:
    """Run every stage that is not done yet."""
    arguments = parse()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    record = work / "settings.json"
    if record.exists() and json.loads(record.read_text()) != settings(arguments):
        sys.exit(f"{work} was made with other settings ({record}): give those, or another --work")
    _write_json(record, settings(arguments))
    stages = STAGES[: STAGES.index(arguments.until) + 1]
    if "questions" in stages and not (work / "counts.json").exists():
        write_questions(arguments)
    if "teacher" in stages and not (work / "teacher").exists():
        tune_teacher(arguments)
    journal = Journal(work)
    for stage, run in (("dump", dump_teacher), ("students", train_students), ("evaluations", evaluate), ("table", report)):
        if stage in stages:
            run(arguments, journal)


if __name__ == "__main__":
    main()
