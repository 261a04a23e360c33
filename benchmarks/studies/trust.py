"""FIRST's table: are students that learn from a re-calibrated teacher's five candidates more accurate, and less sure of
themselves where they are wrong (Shum et al. 2024, arXiv 2408.12168), where the students know language?

    python -m benchmarks.studies.trust --teacher FOLDER --gguf-file FILE --commonsenseqa DIR --openbookqa DIR --arc DIR \
        --text FILE

The teacher is fine-tuned on 3,000 training questions of CommonsenseQA, and dumped over the first 1,000 of them, which students
learn by each method: the model that the teacher was tuned from, and a copy without its middle layers that was healed by
distillation on a text from a store. So fine-tuning has 1,000 labels, and a distilled student the same questions through a
teacher that has seen 3,000: a gain over fine-tuning may be of these labels, and one over direct distillation may not. In domain
is CommonsenseQA, 1,000 unseen questions; out of domain are 300 of each other set, drawn once, on which nobody was trained.
Options stand in the prompt, answers are the options' texts, and confidence is the likelihood of the chosen option made to sum
to one over the options.

A seed is a block of its own: a teacher that was tuned with it, what it was calibrated to, its dump (and another with saliency
for the methods with rationales), and the students that learn from these. So methods are compared within a block, and the mean
over several is of several teachers too, not of several students of one. The healed student before it learns is the same in all.
A block is made on one processor, since another would tune another teacher; blocks may be of different ones.

Calibrators. Before the dump, the teacher's temperature; c is FIRST's own. After training: a temperature, Platt's logistic
function of the confidence's logit, and isotonic regression. All are fitted on 500 more questions of CommonsenseQA that neither
teacher nor student was trained on; those before the dump on all tokens of their answers, of which the later ones are easy.
Focal loss is the control that needs no teacher.

Intervals are of 95%, by a bootstrap of the questions and, where there are several seeds, of these: n − 1 of n seeds, drawn
with replacement, vary as their mean does (Rao & Wu 1988). Of so few the ends are not those of 95%: if the questions were no
source of error, an interval would reach from the lowest of three seeds to the highest, and hold their mean three times in four;
with two, every other time. Calibrators are not fitted anew in it. A calibration error of few questions comes out too large, the
more so the smaller it is, and that of a resample once more: what the bootstrap sees of that is taken off. All verdicts are 95%
each, with no correction for how many there are.

A cell is one student, seed and method, and trust.json keeps the finished ones. The same command goes on with those that are
missing, and refuses where settings, questions or models are others by now. `--cells` runs the first so many, and `--seeds`
those of other seeds, where the folder of a seed's teacher is gone. Several processes of one checkout with one `--work` share
the cells, on a core each with OMP_NUM_THREADS=1; while one tunes or heals, those of the same seed wait. The order is fixed
here, before anything has run, so that what is cut is what comes last: the methods of CORE on every seed of the whole student,
the first seed first, and then of the healed one; then the other methods, likewise. (One seed of two students would tell less
than several of one: a difference that another seed turns round says nothing of a method.) The fourth seed was added to these
when the teachers of the first two were gone before all methods of CORE had learnt from them: it has no other purpose, and
nothing was taken out for it. Calibrators after training cost no training and are in each cell. No method is left out after its
cells have run; the last line that is printed names the missing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import STUDIES, keep, processor
from benchmarks.questions import (
    BATCH_SIZE,
    GROUP,
    LEARNING_RATE,
    MAX_LENGTH,
    SETS,
    add_arguments,
    finished_cells,
    gguf,
    layer_dropped,
    read_all,
    run,
    tune_teacher,
    write_lines,
)
from benchmarks.trust_figures import FIT, GROUPS, STUDENTS, Cell, claims, draw, print_tables, tabulate
from knowledge_store import KnowledgeStore
from knowledge_store.calibration.file import read_calibration
from knowledge_store.terminal.console import note
from knowledge_store.terminal.progress import TerminalReporter
from student_train.evaluation.multiple_choice import score
from student_train.evaluation.questions import Question, corpus_row, tokenise
from student_train.losses.divergences import token_nll
from student_train.losses.table import LOSSES, Loss
from student_train.losses.targets import Targets
from student_train.training.configuration import TrainConfig
from student_train.training.model_folder import model_sha256
from student_train.training.models import load_model, load_tokenizer
from student_train.training.run import TrainResult, train

RESULT = STUDIES / "trust.json"

# Options of `student-train run`. FIRST's losses say nothing of the probability outside the five candidates; cross-entropy does.
FIRST = {"loss": "first", "calibration": "first.json"}
DRAWS = {"loss": "forward-kl", "tail": "draws"}
RATIONALES = {"rationale": "saliency", "dump": "salient"}
CORE: dict[str, dict[str, Any]] = {
    "fine-tuning": {"loss": "ce"},
    "direct distillation": {"loss": "top-k-renormalised"},
    "FIRST": FIRST,
    "FIRST + CE": {**FIRST, "ce_weight": 0.3},
    "candidates + draws": DRAWS,
}
OTHERS: dict[str, dict[str, Any]] = {
    "label smoothing": {"loss": "label-smoothing", "smoothing": 0.1},
    "FIRST, not re-calibrated": {"loss": "conditional-kl"},
    "teacher at T, bucket": {"loss": "forward-kl", "calibration": "calibration.json"},
    "focal loss": {"loss": "focal"},
    "fine-tuning + rationales": {"loss": "ce", **RATIONALES},
    "candidates + draws + rationales": {**DRAWS, **RATIONALES},
}
METHODS = {**CORE, **OTHERS}
SEEDS = (0, 1, 2, 3)
PROGRESS = ("origin", "questions", "models", "healing", "cells")  # what trust.json keeps of the cells that are finished
HEALING = {"learning_rate": 3e-4, "batch_size": 4, "eval_fraction": 0.0}  # sequences of up to 512 tokens
PRECISION = "auto"  # mixed on a GPU that has bfloat16, float32 elsewhere
GAMMA = 3.0
OPTIONS = 64  # in a forward pass, when a model is asked


def focal(logits: Tensor, targets: Targets) -> Tensor:
    """Focal loss, −(1 − p)^γ log p of the token, γ = 3 (Mukhoti et al. 2020, arXiv 2002.09437): (N, V) to (N,) nats."""
    nll = token_nll(logits, targets.token_ids)
    return (1 - torch.exp(-nll)).clamp(min=0) ** GAMMA * nll


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they run."""
    for methods in (CORE, OTHERS):
        for student in STUDENTS:
            for seed in SEEDS:
                for method in methods:
                    yield Cell(student, seed, method)


# ---- what they are trained on and asked


def asked_questions(
    arguments: argparse.Namespace, questions: dict[str, dict[str, list[Question]]]
) -> dict[str, list[Question]]:
    """By data set the questions to judge by, and those to fit calibrators on, which follow the teacher's in the shuffle."""
    sizes = {data: arguments.judge if data in GROUPS["in domain"] else arguments.judge_out for data in SETS}
    fit = questions[SETS[0]]["tune"][arguments.tune : arguments.tune + arguments.fit]
    if not fit:
        sys.exit("no question of CommonsenseQA is left to fit calibrators on: give a smaller --tune")
    return {**{data: questions[data]["judge"][:size] for data, size in sizes.items()}, FIT: fit}


def dump_teacher(work: Path, name: str, corpus: str, *more: object) -> None:
    """Dump the teacher of a seed over a corpus, with its temperature beside it."""
    run(
        "teacher_dump", "run", work / "store", "--teacher", work / "teacher", "--max-length", MAX_LENGTH, "--corpus",
        work / corpus, "--name", name, "--calibration", work / "calibration.json", *more,
    )  # fmt: skip


def prepare(work: Path, learnt: list[Question], fit: list[Question]) -> None:
    """Fit the teacher's temperature, dump it over the questions to learn, and fit FIRST's c from a dump of others."""
    calibration, first = work / "calibration.json", work / "first.json"
    for name, questions in (("learnt", learnt), ("fit", fit)):
        write_lines(work / f"{name}.jsonl", [{**corpus_row(question, "text"), "split": name} for question in questions])
    if not calibration.exists():
        run(
            "teacher_dump", "calibrate", "--teacher", work / "teacher", "--max-length", MAX_LENGTH, "--corpus",
            work / "fit.jsonl", "--output", calibration,
        )  # fmt: skip
    dump_teacher(work, "learnt", "learnt.jsonl")
    dump_teacher(work, "fit", "fit.jsonl")
    if not first.exists():
        run(
            "student_train", "calibrate", work / "store", "--dump", "fit", "--method", "first", "--split", "split=fit",
            "--output", first,
        )  # fmt: skip


def heal(arguments: argparse.Namespace, record: dict[str, Any]) -> Path:
    """Distil the untuned model on text into its copy without middle layers, and note how it went. The student's folder."""
    store, output = arguments.work / "text", arguments.work / "healed"
    whole = ("--teacher", arguments.teacher, *gguf(arguments), "--max-length", MAX_LENGTH)
    with locked(arguments.work / "heal.lock", wait=True):
        run("teacher_dump", "run", store, *whole, "--corpus", arguments.text, "--name", "text")
        result = train(
            TrainConfig(
                str(store), dump="text", student=str(layer_dropped(arguments)), output=str(output), **DRAWS, **HEALING,
                epochs=arguments.heal_epochs, precision=PRECISION, save_steps=50,
            ),
            reporter=TerminalReporter(),
        )  # fmt: skip
    record["healing"] = how_it_went(result) | record["healing"]
    return output


def how_it_went(result: TrainResult) -> dict[str, Any]:
    """Seconds, steps, and the first and last training loss that was noted, of a run that has to be finished."""
    if not result.finished:
        sys.exit("interrupted: the same command resumes it")
    entries = json.loads((result.output / "history.json").read_text())["entries"]
    losses = [each["loss"] for each in entries if "loss" in each]
    return {"seconds": round(result.seconds, 1), "steps": result.steps, "losses": [*losses[:1], *losses[-1:]]}


def ask(folder: str, gguf_file: str | None, asked: dict[str, list[Question]]) -> dict[str, list[float]]:
    """The log-likelihood of each option, in nats below the likeliest of its question, one question after another."""
    model = load_model(folder, gguf_file).to("cuda" if torch.cuda.is_available() else "cpu")
    together = [question for questions in asked.values() for question in questions]
    tokenised = tokenise(together, load_tokenizer(folder, gguf_file), "text")
    rows = iter(score(model, tokenised, batch_size=OPTIONS, reporter=TerminalReporter()).sequence)
    found = {}
    for data, questions in asked.items():
        values = [next(rows)[: len(question.options)] for question in questions]
        found[data] = [round(float(value), 3) for row in values for value in row - row.max()]
    return found


def run_folder(work: Path, cell: Cell) -> Path:
    """Where the student of a cell is trained, in the folder of its seed."""
    return work / f"{cell.student}, {cell.method}"


def train_and_ask(
    work: Path, epochs: int, cell: Cell, student: tuple[str, str | None], asked: dict[str, list[Question]]
) -> dict[str, Any]:
    """Train the student of a cell, a folder and the GGUF file in it, in the folder of its seed, and ask it."""
    output, options = run_folder(work, cell), dict(METHODS[cell.method])
    if "calibration" in options:
        options["calibration"] = str(work / options["calibration"])
    if "rationale" in options:
        with locked(work / "start.lock", wait=True):
            dump_teacher(work, options["dump"], "learnt.jsonl", "--kind", "positions", "--kind", "saliency")
    result = train(
        TrainConfig(
            str(work / "store"), student=student[0], gguf_file=student[1], output=str(output), **{"dump": "learnt", **options},
            epochs=epochs, eval_fraction=0, batch_size=BATCH_SIZE, group_by_length=GROUP, learning_rate=LEARNING_RATE,
            precision=PRECISION, save_steps=50, seed=cell.seed,
        ),
        reporter=TerminalReporter(),
    )  # fmt: skip
    return {**how_it_went(result), "likelihoods": ask(str(output), None, asked)}


# ---- all together


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same of all cells."""
    names = ("tune", "learn", "judge", "judge_out", "fit", "teacher_epochs", "student_epochs", "heal_epochs", "keep_layers")
    fixed = {"learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, "group_by_length": GROUP, "precision": PRECISION}
    fixed["healing"] = HEALING
    return {**{name: getattr(arguments, name) for name in names}, **fixed, "methods": METHODS}


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else has this lock; with `wait`, once that is so."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def store_record(record: dict[str, Any], work: Path) -> None:
    """Keep what there is so far, what other processes found with it, and which cells there are not."""
    with locked(work / "record.lock", wait=True):
        take_finished(record)
        record["table"] = tabulate(record)
        record["claims"] = claims(record["table"])
        record["not_run"] = [cell.name for cell in cells() if cell.name not in record["cells"]]
        with contextlib.redirect_stdout(io.StringIO()):
            keep("trust", record, STUDIES)


def take_finished(record: dict[str, Any]) -> None:
    """Add what trust.json has to a record, which must be of the same models."""
    kept = finished_cells(RESULT, record["settings"], PROGRESS)
    note_origin(record, kept.pop("origin", {}))
    for name, part in kept.items():
        record[name] = part | record[name]


def share(record: dict[str, Any], part: str, name: str, work: Path, find: Callable[[], dict[str, Any]]) -> None:
    """Find what is missing under this name of a part of the record and keep it, unless another process does or did."""
    with locked(work / f"{name.replace(' / ', '-')}.lock", wait=False) as mine:
        if mine:
            take_finished(record)
            if name not in record[part]:
                note(f"== {name}")
                record[part][name] = find()
                store_record(record, work)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ".trust")
    parser.add_argument("--text", required=True, type=Path, help="text to heal the layer-dropped student on")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="whose cells to run")
    parser.add_argument("--learn", type=int, default=1000, help="of the questions to tune on, those that students learn")
    parser.add_argument("--judge", type=int, default=1000, help="most questions to judge by in domain")
    parser.add_argument("--judge-out", type=int, default=300, help="most questions to judge by of each other set")
    parser.add_argument("--fit", type=int, default=500, help="questions to fit calibrators on")
    parser.add_argument("--heal-epochs", type=int, default=3)
    parser.set_defaults(teacher_epochs=1)  # new questions teach more than old ones, and it is sure enough of those it knows
    return parser.parse_args()


def identity(folder: str, gguf_file: str | None) -> str:
    """By which a model is known in trust.json."""
    return " ".join([model_sha256(folder)[:16], gguf_file or ""]).strip()


def note_questions(record: dict[str, Any], asked: dict[str, list[Question]]) -> None:
    """Note what is asked, and refuse to go on with cells of other questions."""
    found = {
        data: {"options": [len(each.options) for each in part], "answers": [each.answer for each in part]}
        for data, part in asked.items()
    }
    if record["questions"] not in ({}, found):
        sys.exit(f"{RESULT.name} has cells of other questions: give those, or set BENCHMARK_RESULTS to another folder")
    record["questions"] = found


def note_origin(record: dict[str, Any], found: dict[str, Any]) -> None:
    """Note of what cells are, and refuse to go on with those of another teacher, student, calibration or selection."""
    for name, value in found.items():
        if record["origin"].setdefault(name, value) != value:
            sys.exit(
                f"{RESULT.name} has cells of another {name}, {record['origin'][name]} instead of {value}: go on with that, run"
                " another of the --seeds, or set BENCHMARK_RESULTS to another folder"
            )


def start(
    arguments: argparse.Namespace, record: dict[str, Any], seed: int, questions: dict[str, dict[str, list[Question]]]
) -> Path:
    """Tune the teacher of a seed and dump it, and note in the record of what the cells of that seed are. Its folder."""
    work, learnt = arguments.work / f"seed-{seed}", questions[SETS[0]]["tune"]
    if not work.exists() and any(name.endswith(f" of seed {seed}") for name in record["origin"]):
        sys.exit(
            f"{RESULT.name} has cells of seed {seed}, whose teacher is not in {work}: run another of the --seeds, or take all"
            f" that names seed {seed} out of {RESULT.name}"
        )
    work.mkdir(exist_ok=True)
    with locked(work / "start.lock", wait=True):
        tune_teacher(arguments, work, learnt[: arguments.tune], "--precision", PRECISION, "--seed", seed)
        prepare(work, learnt[: arguments.learn], learnt[arguments.tune :][: arguments.fit])
    (kept,) = (each for each in KnowledgeStore.open(work / "store").info() if each.dump == "learnt")
    found = {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "teacher": identity(str(work / "teacher"), None),
        "selection": str(kept.facts["positions.selection"]),
        "temperature": read_calibration(work / "calibration.json").value,
        "c": read_calibration(work / "first.json").value,
    }
    note_origin(record, {f"{name} of seed {seed}": value for name, value in found.items()})
    return work


def main() -> None:
    """Run the cells that are missing, in their order."""
    arguments = parse()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"settings": settings(arguments), **{name: {} for name in PROGRESS}}
    kept, fixed = work / "settings.json", json.dumps(record["settings"])
    if kept.exists() and kept.read_text() != fixed:
        sys.exit(f"{work} has the models of other settings: give another --work")
    kept.write_text(fixed)
    take_finished(record)
    missing = [cell for cell in cells() if cell.name not in record["cells"] and cell.seed in arguments.seeds][: arguments.cells]
    if missing:
        LOSSES["focal"] = Loss(focal)
        questions = read_all(arguments)
        asked = asked_questions(arguments, questions)
        whole = (arguments.teacher, arguments.gguf_file)
        note_questions(record, asked)
        note_origin(record, {"whole": identity(*whole)})
        share(record, "models", "whole", work, partial(ask, *whole, asked))
    for (seed, student), group in groupby(missing, key=lambda cell: (cell.seed, cell.student)):
        block = start(arguments, record, seed, questions)
        share(record, "models", f"teacher / seed {seed}", work, partial(ask, str(block / "teacher"), None, asked))
        place = whole
        if student == "healed":
            place = (str(heal(arguments, record)), None)
            note_origin(record, {f"healed of seed {seed}": identity(*place)})
            share(record, "models", f"healed / seed {seed}", work, partial(ask, *place, asked))
        for cell in group:
            find = partial(train_and_ask, block, arguments.student_epochs, cell, place, asked)
            share(record, "cells", cell.name, work, find)
            if cell.name in record["cells"]:  # and kept
                shutil.rmtree(run_folder(block, cell), ignore_errors=True)
    store_record(record, work)
    print_tables(record)
    draw(record, STUDIES / "trust.svg")


if __name__ == "__main__":
    main()
