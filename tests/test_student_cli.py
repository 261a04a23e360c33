"""The command: help that helps, one line for a mistake, and the whole road from a teacher to a page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from conftest import ROOT, run_command, write_jsonl
from typer.testing import CliRunner

import student_train
from student_train.cli import app
from student_train.training.run import DistillationTrainer

COMMANDS = typer.main.get_command(app).commands


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands():
    assert list(COMMANDS) == ["init", "run", "calibrate", "evaluate", "report"]


@pytest.mark.parametrize("name", ["init", "run", "calibrate", "evaluate", "report"])
def test_help_has_an_example_and_explains_every_option(name):
    text = invoke(name, "--help").stdout
    assert f"student-train {name} " in text
    assert all(parameter.help for parameter in COMMANDS[name].params if parameter.name != "help")


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_nothing_heavy_is_imported_before_it_is_used():
    heavy = "any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib'))"
    assert python(f"import sys, student_train, student_train.cli; sys.exit({heavy})").returncode == 0
    # … and this notices when it is.
    assert python(f"import sys; from student_train import Targets; sys.exit({heavy})").returncode == 1


def test_every_public_name_is_there():
    for name in student_train.__all__:
        assert getattr(student_train, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = student_train.nonsense


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_extra_is_one_line(library):
    arguments = ["student-train", "run", "--store", "s", "--student", "m", "--output", "o"]
    code = f"import sys; sys.modules['{library}'] = None; sys.argv = {arguments}; from student_train.cli import main; main()"
    done = python(code)
    assert done.returncode == 2
    assert done.stderr == "Error: student-train needs torch and transformers: pip install 'knowledge-store[student]'\n"
    assert python(code.replace(str(arguments), "['student-train', '--help']")).returncode == 0


def test_from_a_teacher_to_a_page(teacher_folder, store_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = invoke("init", "--from", teacher_folder, "--keep-layers", "0", "--output", "student")
    assert made.exit_code == 0, made.stderr
    assert "1 of 2 layers" in made.stdout
    run = ["run", "--store", store_folder, "--student", "student", "--output", "runs/one", "--dump", "train", "--steps", "4"]
    done = invoke(*run)
    assert done.exit_code == 0, done.stderr
    assert "runs/one is finished: 4 steps" in done.stdout and "training: 100% 4 of 4 steps" in done.stderr
    assert "is finished already" in invoke(*run).stdout
    for model in ("student", "runs/one"):
        measured = invoke("evaluate", model, "--store", store_folder, "--dump", "heldout", "--batch-size", 3)
        assert measured.exit_code == 0, measured.stderr
        assert "lower bound" in measured.stdout and "teacher" in measured.stdout
    assert json.loads((tmp_path / "runs/one/evaluations/heldout.json").read_text())["dump"]["name"] == "heldout"
    for name, rows in (("exam", range(9)), ("other", range(9, 20))):
        questions = [{"question": f"What is {n}?", "options": ["a ship", "the sea"], "answer": "AB"[n % 2]} for n in rows]
        write_jsonl(tmp_path / f"{name}.jsonl", questions)
    for model in ("student", "runs/one"):
        asked = invoke("evaluate", model, "--questions", "exam.jsonl", "--post-hoc-temperature", "other.jsonl")
        assert asked.exit_code == 0, asked.stderr
        assert "9 questions of exam" in asked.stdout and "over the options" in asked.stdout and "post-hoc" in asked.stdout
        assert f"Written to {model}/evaluations/exam.letter.json" in asked.stderr
    page = invoke("report", "student", "runs/one", "--output", "pages/report.html")
    assert page.exit_code == 0, page.stderr
    assert page.stdout == "pages/report.html\n"
    assert "runs/one" not in (tmp_path / "pages/report.html").read_text().split("<details>")[0]  # called `one`


def test_interrupt_says_how_to_go_on(teacher_folder, store_folder, tmp_path, monkeypatch):
    draw = DistillationTrainer.get_batch_samples

    def interrupting(self, *arguments):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return draw(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "get_batch_samples", interrupting)
    run = ["run", "--store", store_folder, "--student", teacher_folder, "--output", tmp_path / "run", "--dump", "train"]
    done = invoke(*run, "--steps", 5)
    assert done.exit_code == 130
    assert "Stopped at step 2 of 5" in done.stderr and "Run the same command again" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "--from", "/absent", "--keep-layers", "0", "--output", "x"], "there is no model folder /absent"),
        (["init", "--from", ".", "--keep-layers", "one", "--output", "x"], "--keep-layers"),
        (["run", "--store", "/absent", "--student", ".", "--output", "x"], "there is no store at /absent"),
        (["run", "--store", ".", "--student", ".", "--output", "x"], "not a knowledge store"),
        (["evaluate", "/absent", "--store", "/absent"], "there is no store at /absent"),
        (["evaluate", "/absent"], "give either --store"),
        (["evaluate", "/absent", "--questions", "/absent.jsonl"], "there is no file /absent.jsonl"),
        (["report", "/absent"], "there is no run at /absent"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr.startswith("Error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_mistake_in_a_process_of_its_own_is_one_line_too():
    done = run_command("student_train", "report", "/absent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: there is no run at /absent\n"
