"""The command: help that helps, one line for a mistake, and the whole road from a teacher to a page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from command_server import forked_command
from conftest import ROOT, run_command, write_jsonl
from processes import Running
from ranks import without_a_hub
from typer.testing import CliRunner

import student_train
from knowledge_store.calibration.file import Calibration, write_calibration
from student_train.cli import app
from student_train.training.run_folder import last_checkpoint
from student_train.training.run_trainer import RunTrainer

COMMANDS = typer.main.get_command(app).commands


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands():
    assert list(COMMANDS) == ["init", "run", "calibrate", "evaluate", "compare", "rationales", "report"]


@pytest.mark.parametrize("name", ["init", "run", "calibrate", "evaluate", "compare", "rationales", "report"])
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


def without(library: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process in which a library cannot be imported."""
    return forked_command("student_train", *arguments, before=f"import sys; sys.modules['{library}'] = None")


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_extra_is_one_line(library, store_folder, teacher_folder):
    done = without(library, "run", store_folder, "--student", teacher_folder, "--output", "o", "--dump", "train")
    assert done.returncode == 2
    assert done.stderr == "Error: student-train needs torch and transformers: pip install 'knowledge-store[student]'\n"
    assert without(library, "--help").returncode == 0


RUN = ["run", "STORE", "--student", "TEACHER", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "--from", "/absent", "--keep-layers", "0", "--output", "o"], "there is no folder /absent"),
        (["init", "--from", "TEACHER", "--keep-layers", "0", "--output", "TEACHER"], "exists already: choose another --output"),
        (["init", "--from", "TEACHER", "--keep-layers", "0,99", "--output", "o"], "layer 99 does not exist"),
        (["run", "/absent", "--student", "TEACHER", "--output", "o"], "there is no store at /absent"),
        ([*RUN, "--dump", "absent"], "no dump 'absent'"),
        ([*RUN, "--dump", "train", "--loss", "nonsense"], "there is no loss 'nonsense'"),
        ([*RUN, "--dump", "train", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        ([*RUN, "--dump", "train", "--calibration", "/absent.json"], "there is no calibration file /absent.json"),
        (["run", "STORE", "--student", "/absent", "--output", "o", "--dump", "train"], "there is no folder /absent"),
        (["run", "STORE", "--student", "TEACHER", "--output", "STORE", "--dump", "train"], "holds no training run: choose"),
        ([*RUN, "--dump", "train", "--calibration", "OTHER"], "the calibration belongs to another teacher"),
        ([*RUN, "--dump", "train", "--report-to", "nobody"], "--report-to is 'nobody'; it must be none, all, azure_ml"),
        (["run", "STORE", "--student", "nosuch", "--output", "o", "--dump", "train"], "there is no folder nosuch, and"),
        (["run", "STORE", "--student", "TEACHER"], "missing option '--output'"),
        (["calibrate", "/absent"], "there is no store at /absent"),
        (["evaluate", "/absent", "--model", "TEACHER"], "there is no store at /absent"),
        (["evaluate", "STORE", "--dump", "heldout", "--model", "/absent"], "there is no folder /absent"),
        (["report", "/absent"], "there is no run at /absent"),
    ],
)
def test_mistakes_are_found_before_torch_is_imported(arguments, message, store_folder, teacher_folder, tmp_path):
    """In a process in which the import of torch fails, the mistake is reported and not the missing library."""
    figures = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}
    teacher = {"name": "other", "files": {"model.safetensors": "00"}}
    write_calibration(
        tmp_path / "other.json",
        Calibration("temperature", 1.7, teacher, {"vocabulary_sha256": "00"}, {}, 500, figures, figures),
    )
    places = {"STORE": store_folder, "TEACHER": teacher_folder, "OTHER": tmp_path / "other.json"}
    done = without("torch", *(places.get(word, word) for word in arguments))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_run_that_is_resumed_with_other_options_is_refused_before_torch_is_imported(store_folder, teacher_folder, tmp_path):
    run = ["run", store_folder, "--student", teacher_folder, "--output", tmp_path / "run", "--dump", "train", "--steps", 2]
    assert invoke(*run).exit_code == 0
    for options, message in (
        (["--batch-size", 4], "sequences per step was 8 and is now 4"),
        (["--seed", 1], "--seed was 0 and is now 1"),
        (["--steps", 3], "number of steps was 2 and is now 3"),
    ):
        done = without("torch", *(run if options[0] != "--steps" else run[:-2]), *options)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "pip install" in without("torch", *run).stderr


def test_an_option_given_twice_is_refused_and_the_version_is_shown():
    twice = invoke("run", "store", "--student", "a", "--student", "b", "--output", "o")
    assert twice.exit_code == 2 and "--student is given 2 times" in twice.stderr
    assert invoke("--version").stdout.startswith("knowledge-store ")


def test_from_a_teacher_to_a_page(teacher_folder, store_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = invoke("init", "--from", teacher_folder, "--keep-layers", "0", "--output", "student")
    assert made.exit_code == 0, made.stderr
    assert "1 of 2 layers" in made.stdout
    run = ["run", store_folder, "--student", "student", "--output", "runs/one", "--dump", "train", "--steps", "4"]
    done = invoke(*run)
    assert done.exit_code == 0, done.stderr
    assert "runs/one is finished: 4 steps" in done.stdout and "training: 100% 4 of 4 steps" in done.stderr
    assert "is finished already" in invoke(*run).stdout
    for model in ("student", "runs/one"):
        measured = invoke("evaluate", store_folder, "--model", model, "--dump", "heldout", "--batch-size", 3)
        assert measured.exit_code == 0, measured.stderr
        assert "lower bound" in measured.stdout and "teacher" in measured.stdout
    assert json.loads((tmp_path / "runs/one/evaluations/heldout.json").read_text())["dump"]["name"] == "heldout"
    for name, rows in (("exam", range(9)), ("other", range(9, 20))):
        questions = [{"question": f"What is {n}?", "options": ["a ship", "the sea"], "answer": "AB"[n % 2]} for n in rows]
        write_jsonl(tmp_path / f"{name}.jsonl", questions)
    for model in ("student", "runs/one"):
        asked = invoke("evaluate", "--model", model, "--questions", "exam.jsonl", "--post-hoc-temperature", "other.jsonl")
        assert asked.exit_code == 0, asked.stderr
        assert "9 questions of exam" in asked.stdout and "over the options" in asked.stdout and "post-hoc" in asked.stdout
        assert f"Written to {model}/evaluations/exam.letter.json" in asked.stderr
    shorter = ["run", store_folder, "--student", "student", "--output", "runs/two", "--dump", "train", "--steps", "2"]
    assert "validation loss" in invoke(*shorter).stdout
    page = invoke("report", "student", "runs/one", "runs/two", "--output", "pages/report.html")
    assert page.exit_code == 0, page.stderr
    assert page.stdout == "pages/report.html\n"
    text = (tmp_path / "pages/report.html").read_text().split("<details>")[0]
    assert "runs/one" not in text  # called `one`
    assert "not trained alike: optimiser steps: <b>one</b> 4, <b>two</b> 2; tokens seen: " in text
    assert "dumps:" not in text and "different states" not in text and "<small>of 8 sequences</small>" in text


def test_interrupt_says_how_to_resume(teacher_folder, store_folder, tmp_path, monkeypatch):
    draw = RunTrainer.get_batch_samples

    def interrupting(self, *arguments):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return draw(self, *arguments)

    monkeypatch.setattr(RunTrainer, "get_batch_samples", interrupting)
    run = ["run", store_folder, "--student", teacher_folder, "--output", tmp_path / "run", "--dump", "train"]
    done = invoke(*run, "--steps", 5)
    assert done.exit_code == 130
    assert "Stopped at step 2 of 5" in done.stderr and "Run the same command again to resume" in done.stderr
    assert last_checkpoint(tmp_path / "run").step == 2  # what it reports is what was saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "--from", "/absent", "--keep-layers", "0", "--output", "x"], "there is no folder /absent"),
        (["init", "--from", ".", "--keep-layers", "one", "--output", "x"], "--keep-layers"),
        (["run", "/absent", "--student", ".", "--output", "x"], "there is no store at /absent"),
        (["run", ".", "--student", ".", "--output", "x"], "there is no store at ."),
        (["evaluate", "/absent", "--model", "/absent"], "there is no store at /absent"),
        (["evaluate", "--model", "/absent"], "give either STORE"),
        (["evaluate", "--model", "/absent", "--questions", "/absent.jsonl"], "there is no file /absent.jsonl"),
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


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("student_train", ["run", "STORE", "--student", "nobody/nosuch", "--output", "o", "--dump", "train"]),
        ("teacher_dump", ["check", "STORE", "--teacher", "nobody/nosuch", "--dump", "train"]),
    ],
)
def test_a_model_that_is_nowhere_is_one_line_where_the_hub_cannot_be_reached(package, arguments, store_folder, tmp_path):
    words = [store_folder if word == "STORE" else word for word in arguments]
    done = Running(without_a_hub, package, words, folder=tmp_path).wait()
    message = "Error: there is no folder nobody/nosuch, and the hub, which may have a model of that name, cannot be reached\n"
    assert (done.returncode, done.stderr) == (2, message)
