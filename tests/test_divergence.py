"""Runs whose numbers stop being finite end at once, say where, and keep what was good; evaluations of such models end too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from processes import run_ranks
from ranks import diverge
from safetensors.torch import load_file, save_file
from test_student_training import command
from typer.testing import CliRunner

from knowledge_store.errors import InputError
from student_train.cli import app
from student_train.evaluation.configuration import EvaluateConfig
from student_train.evaluation.run import evaluate
from student_train.training.configuration import TrainConfig
from student_train.training.divergence import DivergenceError
from student_train.training.run import train
from student_train.training.run_folder import last_checkpoint, write_json
from student_train.training.run_trainer import RunTrainer

WILD = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup": 0.0}


def strict(path: Path) -> dict:
    """A JSON file; NaN and Infinity are none."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path.name} has {word}"))


def break_weights(monkeypatch, after: int) -> None:
    """After so many steps an update spoils the weights."""
    schedule = RunTrainer._get_learning_rate

    def spoil(self):
        if self.state.global_step == after - 1:  # asked for between the update and the next step
            next(self.model.parameters()).data.fill_(float("nan"))
        return schedule(self)

    monkeypatch.setattr(RunTrainer, "_get_learning_rate", spoil)


def test_a_run_that_diverges_is_no_finished_one(settings, tmp_path):
    done = CliRunner().invoke(app, ["run", *command(settings | WILD)])
    assert done.exit_code == 1 and not done.stdout
    assert done.stderr.count("Error: training diverged at step ") == 1
    assert "--learning-rate" in done.stderr.splitlines()[-1]
    run = tmp_path / "run"
    assert not strict(run / "history.json").get("finished") and not (run / "model.safetensors").exists()
    assert last_checkpoint(run) is None or last_checkpoint(run).step == 0


@pytest.mark.parametrize("save_steps", [1, 2, 3])
def test_the_last_good_checkpoint_is_kept(settings, tmp_path, monkeypatch, save_steps):
    """The fourth update spoils the weights. A checkpoint of them is not written, in whose place a good one would be removed."""
    break_weights(monkeypatch, after=4)
    with pytest.raises(DivergenceError, match=r"diverged at step [45]: the loss.* is nan\. The checkpoint of step") as error:
        train(TrainConfig(**settings | {"save_steps": save_steps}))
    assert error.value.step == (5 if save_steps == 3 else 4)
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint.step == {1: 3, 2: 2, 3: 3}[save_steps]
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint.folder / "model.safetensors").values())
    assert not strict(tmp_path / "run" / "history.json")["finished"]
    monkeypatch.undo()
    resumed = train(TrainConfig(**settings | {"save_steps": save_steps}))
    assert resumed.finished and resumed.began_at == checkpoint.step


def test_the_last_update_is_looked_at_too(settings, tmp_path, monkeypatch):
    break_weights(monkeypatch, after=6)
    with pytest.raises(DivergenceError, match="diverged at step 6: the loss after it is nan"):
        train(TrainConfig(**settings | {"save_steps": 2}))
    assert last_checkpoint(tmp_path / "run").step == 4
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_gradient_that_overflows(settings, monkeypatch):
    """The loss is finite; clipping would make nothing of an infinite gradient."""

    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    compute = RunTrainer.compute_loss
    monkeypatch.setattr(RunTrainer, "compute_loss", lambda *given, **named: Overflowing.apply(compute(*given, **named)))
    with pytest.raises(DivergenceError, match=r"at step 1: the norm of the gradient is (inf|nan)") as error:
        train(TrainConfig(**settings))
    assert "no checkpoint was saved" in str(error.value).lower() and "--learning-rate" not in str(error.value)


def test_a_student_that_gives_no_numbers(settings, student, tmp_path):
    broken = broken_model(student, tmp_path / "student")
    with pytest.raises(DivergenceError, match="at step 1: the loss is nan"):
        train(TrainConfig(**settings | {"student": str(broken)}))
    with pytest.raises(DivergenceError, match="at step 0: the validation loss is nan"):
        train(TrainConfig(**settings | {"student": str(broken), "eval_fraction": 0.2, "output": str(tmp_path / "other")}))


def test_all_ranks_stop_together(settings, tmp_path):
    """One of two processes has the loss that is not finite."""
    ranks = run_ranks(2, diverge, command(settings | {"batch_size": 2, "save_steps": 1}), folder=tmp_path)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert sum(rank.stderr.count("Error: training diverged at step 3: the loss is inf") for rank in ranks) == 1
    assert last_checkpoint(tmp_path / "run").step == 2


def broken_model(model: Path, folder: Path, value: float = float("nan")) -> Path:
    """A copy of a model, one weight of which is not finite."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_evaluating_a_model_that_gives_no_numbers(store_folder, student, tmp_path, value):
    broken = broken_model(student, tmp_path / "broken", value)
    done = CliRunner().invoke(app, ["evaluate", str(store_folder), "--dump", "heldout", "--model", str(broken)])
    assert done.exit_code == 2, done.exception
    assert [line[:55] for line in done.stderr.splitlines() if line] == [
        "Error: the model gives no probabilities that can be mea"
    ]
    assert not (broken / "evaluations").exists()
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"question": "Who?", "options": ["he", "she"], "answer": 0}] * 3)
    with pytest.raises(InputError, match="no probabilities that can be measured"):
        evaluate(EvaluateConfig(str(broken), questions=str(questions)))


def test_numbers_that_are_no_json(tmp_path):
    record = {"loss": float("nan"), "entries": [{"grad_norm": float("inf")}, [1.0, float("-inf")]], "step": 3}
    write_json(tmp_path / "history.json", record)
    assert strict(tmp_path / "history.json") == {"loss": None, "entries": [{"grad_norm": None}, [1.0, None]], "step": 3}
