"""Runs end to end: the same sequences give the same student however they are cut up, interrupted or shared out."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tokenizer, save_teacher
from processes import Running
from ranks import die_at_a_checkpoint
from safetensors.torch import load_file
from torture import order
from torture.heartbeat import PATIENCE
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.reporter import Reporter
from student_train.cli import app
from student_train.losses.table import LOSSES, Loss
from student_train.training import run_trainer
from student_train.training.configuration import TrainConfig, check_config
from student_train.training.run import train
from student_train.training.run_folder import last_checkpoint
from student_train.training.run_trainer import RunTrainer

Weights = dict[str, torch.Tensor]

# Summing in another order moves a float32 gradient by 1e-7 of its size, and Adam divides by that size: weights may
# differ by this much of a learning rate of 1e-3.
TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(store_folder, student, tmp_path_factory) -> Path:
    """A run of one step."""
    output = tmp_path_factory.mktemp("finished") / "run"
    options = {"batch_size": 4, "learning_rate": 1e-3, "steps": 1, "eval_fraction": 0.0}
    train(TrainConfig(store=str(store_folder), student=str(student), output=str(output), dump="train", **options))
    return output


def weights(output: str | Path) -> Weights:
    return load_file(Path(output) / "model.safetensors")


def assert_close(one: Weights, other: Weights, tolerance: float = TOLERANCE) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max() <= tolerance, name


def furthest(one: Weights, other: Weights) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if not loss.whole_batch])
def test_every_loss_goes_down(settings, loss, tmp_path):
    extra = {"ce_weight": 0.5} if loss == "first" else {}
    result = train(TrainConfig(**settings | extra | {"loss": loss, "steps": 12, "eval_fraction": 0.2, "evaluations": 2}))
    assert result.finished and result.step == result.steps == 12
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["finished"]
    evaluations = [entry for entry in history["entries"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 6, 12]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all({"eval_nll", "eval_kl", "seconds", "epoch"} <= entry.keys() for entry in evaluations)
    assert result.eval_loss == evaluations[-1]["eval_loss"]


def test_what_a_run_leaves(settings, tmp_path):
    train(TrainConfig(**settings))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json", "history.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) or name.startswith(("checkpoint", ".tmp")) for name in names)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == make_tokenizer().get_vocab()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"] == json.loads(json.dumps(TrainConfig(**settings).__dict__))
    assert [dump["name"] for dump in run["dumps"]] == ["train"] and run["versions"]["torch"] == torch.__version__


def test_accumulation_and_workers_change_nothing(settings, tmp_path):
    """Over more than an epoch, whose last step is short: 4 at once, 2 × 2, 4 × 1, and read by other processes."""
    count = KnowledgeStore.open(settings["store"]).sequences("train").num_rows
    assert count % 4 in (1, 2)  # the last step of an epoch has fewer batches
    settings["steps"] = -(-count // 4) + 3
    train(TrainConfig(**settings))
    whole = weights(tmp_path / "run")
    start = weights(settings["student"])
    assert furthest(whole, start) > 50 * TOLERANCE
    for name, changed in {
        "halves": {"batch_size": 2, "gradient_accumulation": 2},
        "quarters": {"batch_size": 1, "gradient_accumulation": 4},
        "workers": {"workers": 2},
    }.items():
        train(TrainConfig(**settings | changed | {"output": str(tmp_path / name)}))
        assert_close(weights(tmp_path / name), whole, 0 if name == "workers" else TOLERANCE)
    assert not multiprocessing.active_children()


def test_tokens_seen_are_those_of_the_sequences_each_time_they_are_read(settings, tmp_path):
    sequences = KnowledgeStore.open(settings["store"]).sequences("heldout")
    settings |= {"dump": ("heldout",), "epochs": 2, "steps": None, "batch_size": 3, "gradient_accumulation": 2}
    train(TrainConfig(**settings))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["tokens"] == 2 * sum(sequences["length"].to_pylist())
    assert history["step"] == 2 * -(-sequences.num_rows // 6)


def test_bfloat16_is_near_float32(settings, tmp_path):
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"precision": "bf16", "output": str(tmp_path / "bf16")}))
    low = weights(tmp_path / "bf16")
    assert all(tensor.dtype == torch.float32 for tensor in low.values())
    assert 0 < furthest(low, weights(tmp_path / "run")) < 6 * 1e-3


def test_interrupted_runs_resume(settings, tmp_path, monkeypatch):
    """Ctrl-C in step 3, and again in step 5: same weights as without, nothing read twice, and it says so."""
    whole = settings | {"output": str(tmp_path / "whole"), "eval_fraction": 0.2, "evaluations": 3}
    train(TrainConfig(**whole))
    draw = RunTrainer.get_batch_samples
    drawn: list[int] = []
    stop_at = 2

    def interrupting(self, *arguments):
        drawn.append(self.state.global_step)
        if self.state.global_step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return draw(self, *arguments)

    monkeypatch.setattr(RunTrainer, "get_batch_samples", interrupting)
    broken = TrainConfig(**whole | {"output": str(tmp_path / "run")})
    notes: list[str] = []
    reporter = Reporter()
    monkeypatch.setattr(reporter, "note", notes.append)
    first = train(broken, reporter=reporter)
    assert last_checkpoint(tmp_path / "run").step == first.step  # what it reports is what was saved
    assert (first.finished, first.step, first.began_at) == (False, 3, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stop_at = 4
    second = train(broken, reporter=reporter)
    assert last_checkpoint(tmp_path / "run").step == second.step
    assert (second.finished, second.step, second.began_at) == (False, 5, 3)
    stopping = "Stopping after the next step. Press Ctrl-C again to stop at once, without a checkpoint."
    beginning, notes = notes[:2], notes[2:]
    assert "An epoch has 14 steps, and the run 6." in beginning[0] and "of the batches is padding" in beginning[1]
    assert notes == [stopping, f"Resuming {tmp_path / 'run'} from step 3 of 6.", stopping]
    stop_at = -1
    third = train(broken)
    assert (third.finished, third.step, third.began_at) == (True, 6, 5)
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), 0)
    one, other = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("run", "whole"))
    measured = [entry for entry in one["entries"] if "eval_loss" in entry]
    expected = [entry["eval_loss"] for entry in other["entries"] if "eval_loss" in entry]
    assert [entry["eval_loss"] for entry in measured] == expected and len(measured) == 4
    seconds = [entry["seconds"] for entry in one["entries"]]
    assert seconds == sorted(seconds)
    assert (one["step"], one["tokens"]) == (other["step"], other["tokens"]) and one["step"] == 6

    fourth = train(broken)
    assert fourth.finished and fourth.began_at == 6 and fourth.eval_loss == expected[-1]
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_logged_losses_are_means_over_the_same_steps(settings, tmp_path, monkeypatch):
    """Of a run of 600 steps every third is logged. Ctrl-C between them, and a kill after a checkpoint between them."""
    settings |= {"steps": 600, "save_steps": 4}
    draw = RunTrainer.get_batch_samples

    def until(step: int, output: Path, *, kill: bool = False) -> dict[int, float]:
        def drawing(self, *arguments):
            if self.state.global_step == step and kill:
                raise MemoryError
            if self.state.global_step == step - 1 and not kill:
                signal.raise_signal(signal.SIGINT)
            return draw(self, *arguments)

        monkeypatch.setattr(RunTrainer, "get_batch_samples", drawing)
        with pytest.raises(MemoryError) if kill else nullcontext():
            train(TrainConfig(**settings | {"output": str(output)}))
        entries = json.loads((output / "history.json").read_text())["entries"]
        return {entry["step"]: entry["loss"] for entry in entries}

    whole = until(13, tmp_path / "whole")
    assert list(whole) == [3, 6, 9, 12]
    until(5, tmp_path / "run")
    until(11, tmp_path / "run", kill=True)
    assert last_checkpoint(tmp_path / "run").step == 8
    assert until(13, tmp_path / "run") == whole


def test_a_run_stopped_before_its_model_was_saved(settings, tmp_path, monkeypatch):
    train(TrainConfig(**settings | {"output": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "write_history", lambda self, *, finished: 1 / 0 if finished else None)
        with pytest.raises(ZeroDivisionError):
            train(TrainConfig(**settings))
    (tmp_path / "run" / "model.safetensors").unlink()
    result = train(TrainConfig(**settings))
    assert result.finished and result.began_at == 6
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), 0)


def command(settings: dict) -> list[str]:
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if name != "store"]
    return [settings["store"], *(part for option in options for part in option)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_killed_and_started_again(settings, tmp_path):
    """SIGKILL in a process of its own, then the same command: bit for bit the weights of a run left alone."""
    settings |= {"steps": 30, "save_steps": 20}
    killed = Running(die_at_a_checkpoint, command(settings), folder=tmp_path / "said").wait()
    assert killed.returncode == -signal.SIGKILL, killed
    # A checkpoint that was being written when the process died must not be taken for one.
    (tmp_path / "run" / "checkpoint-29").mkdir()
    again = CliRunner().invoke(app, ["run", *command(settings)])
    assert again.exit_code == 0, again.stderr
    assert f"Resuming {tmp_path / 'run'} from step 20 of 30" in again.stderr and "is finished: 30 steps" in again.stdout
    train(TrainConfig(**settings | {"output": str(tmp_path / "whole")}))
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), 0)


def test_killed_at_one_moment_after_another(settings, tmp_path):
    """At steps, and while files of the run are written: the losses and the weights of a run left alone, each step's once."""
    settings |= order.TRAINING | {"steps": 6}
    moments, expected = order.undisturbed_training(settings, tmp_path)
    counts = order.killed_training(random.Random(5), settings, tmp_path, moments, expected, kills=6, end=math.inf)
    assert counts["kills"] > 2


def stopped_at_once(settings, monkeypatch):
    """What `train` returns of a run that Ctrl-C stops at its first step."""
    draw = RunTrainer.get_batch_samples

    def interrupted(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "get_batch_samples", interrupted)
        return train(TrainConfig(**settings))


def test_a_run_never_resumes_from_a_pickle(settings, tmp_path, monkeypatch):
    """What the trainer would load where model.safetensors is missing: a pickle, or what an index names."""
    assert stopped_at_once(settings, monkeypatch).step == 1
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    whole = checkpoint / "model.safetensors"
    for pickle in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"):
        whole.rename(checkpoint / "model-00001-of-00001.safetensors")
        torch.save(load_file(checkpoint / "model-00001-of-00001.safetensors"), checkpoint / pickle)
        with pytest.raises(InputError, match=f"checkpoint-1 has {pickle} instead of model.safetensors"):
            train(TrainConfig(**settings))
        (checkpoint / pickle).unlink()
        (checkpoint / "model-00001-of-00001.safetensors").rename(whole)
    index = checkpoint / "model.safetensors.index.json"
    shard = whole.rename(checkpoint / "weights")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "weights"}}))
    with pytest.raises(InputError, match="no weights that can be used"):
        train(TrainConfig(**settings))
    shard.rename(checkpoint / "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="names weights in 'weights'"):
        train(TrainConfig(**settings))
    index.unlink()
    (checkpoint / "model-00001-of-00001.safetensors").rename(whole)
    assert train(TrainConfig(**settings)).began_at == 1


def test_killed_while_it_wrote_its_first_file(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-run.json-1").write_text("{")
    assert train(TrainConfig(**settings | {"steps": 1})).finished
    assert not list((tmp_path / "run").glob(".tmp-*"))


RANK = """
import sys, torch
from student_train import cli
from student_train.training import run as training, run_trainer

class Recorded(training.RunTrainer):
    def save_model(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            record = {"weights": self.model.state_dict(), "gradients": training.recorded}
            torch.save(record, f"rank{self.args.process_index}.pt")
        super().save_model(output_dir, _internal_call)

def record(self, args, state, control, model=None, **kwargs):
    training.recorded.append({name: p.grad.clone() for name, p in self.trainer.model.named_parameters()})

training.recorded = []
training.RunTrainer = Recorded
run_trainer._Progress.on_pre_optimizer_step = record
cli.main()
"""


def test_two_processes_are_one_with_twice_the_batch(settings, tmp_path, monkeypatch):
    """torchrun on the CPU: gradients and weights are the same on both ranks, and those of one process."""
    settings |= {"steps": 9, "eval_fraction": 0.1, "evaluations": 3, "max_grad_norm": 0}
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py", "run"]
    pair = settings | {"output": str(tmp_path / "pair"), "batch_size": 1, "gradient_accumulation": 2}
    done = subprocess.run(
        launch + command(pair), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished") == 1
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_close(ranks[0]["weights"], ranks[1]["weights"], 0)
    assert len(ranks[0]["gradients"]) == len(ranks[1]["gradients"]) == 9
    for one, other in zip(ranks[0]["gradients"], ranks[1]["gradients"], strict=True):
        assert_close(one, other, 0)

    alone: list[Weights] = []
    monkeypatch.setattr(
        run_trainer._Progress,
        "on_pre_optimizer_step",
        lambda self, *_, **__: alone.append({n: p.grad.clone() for n, p in self.trainer.model.named_parameters()}),
    )
    result = train(TrainConfig(**settings))
    assert_close(ranks[0]["gradients"][0], alone[0], 1e-6)
    assert max(gradient.abs().max() for gradient in alone[0].values()) > 1e-3
    assert_close(weights(tmp_path / "pair"), weights(tmp_path / "run"))
    history = json.loads((tmp_path / "pair" / "history.json").read_text())["entries"]
    assert [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1] == pytest.approx(result.eval_loss, abs=1e-4)


def test_a_loss_of_another_kind_trains(settings, monkeypatch, tmp_path):
    """Hidden states and the whole batch are at hand, and the step is divided by sequences."""

    def shrink(outputs, batch):
        hidden = outputs.hidden_states[-1]
        assert {"input_ids", "sequence_id"} <= batch.keys() and hidden.shape[:2] == batch["input_ids"].shape
        return hidden.square().mean(dim=(1, 2))

    monkeypatch.setitem(LOSSES, "shrink", Loss(shrink, whole_batch=True, unit="sequence", hidden_states=True))
    train(TrainConfig(**settings | {"loss": "shrink", "steps": 12}))
    losses = [
        entry["loss"] for entry in json.loads((tmp_path / "run" / "history.json").read_text())["entries"] if "loss" in entry
    ]
    assert losses[-1] < losses[0]


def test_a_loss_without_its_knowledge_is_refused(settings, monkeypatch, tmp_path):
    monkeypatch.setitem(LOSSES, "rationales", Loss(print, kinds=("positions", "rationales")))
    monkeypatch.setitem(LOSSES, "vectors", Loss(print, columns=("vector",)))
    with pytest.raises(InputError, match="needs the kind 'rationales', and the dump train holds positions"):
        train(TrainConfig(**settings | {"loss": "rationales"}))
    with pytest.raises(InputError, match="needs vector, which the dump train does not hold"):
        train(TrainConfig(**settings | {"loss": "vectors"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "nonsense"}, "there is no loss 'nonsense': choose one of forward-kl, reverse-kl"),
        ({"ce_weight": 1.5}, "--ce-weight"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": 2.0, "loss": "first"}, "the loss first takes no --temperature"),
        ({"first_c": 0.5}, "the loss forward-kl takes no --first-c"),
        ({"epochs": 1.0}, "--epochs or --steps, not both"),
        ({"batch_size": 0}, "--batch-size"),
        ({"eval_fraction": 1.0}, "--eval-fraction"),
        ({"precision": "int8"}, "--precision"),
        ({"schedule": "square"}, "--schedule"),
        ({"dump": "absent"}, "absent"),
        ({"dump": ()}, "heldout"),
        ({"student": "/no/such/student"}, "there is no folder"),
        ({"report_to": "nobody"}, "nobody"),
    ],
)
def test_bad_options_leave_nothing_behind(settings, changed, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**settings | changed))
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_something_else(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("…")
    with pytest.raises(InputError, match="holds no training run"):
        train(TrainConfig(**settings))
    with pytest.raises(InputError, match="is a file"):
        train(TrainConfig(**settings | {"output": str(tmp_path / "run" / "thesis.tex")}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("history.json", "5", "history.json is not the history of a training run: it has no 'finished'"),
        ("history.json", "", "history.json is not a JSON file"),
        ("history.json", '{"finished": true}', "history.json is not the history of a training run: it has no 'seconds'"),
        ("run.json", "[5]", "run.json is not the record of a training run: it has no 'identity'"),
    ],
)
def test_a_file_of_a_run_that_is_something_else_is_refused(settings, finished, tmp_path, name, text, message):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**settings | {"steps": 1}))


def test_another_configuration_is_refused_by_name(settings):
    train(TrainConfig(**settings | {"steps": 1}))
    with pytest.raises(InputError, match=r"--learning-rate was 0\.001 and is now 0\.01"):
        train(TrainConfig(**settings | {"steps": 1, "learning_rate": 0.01}))
    with pytest.raises(InputError, match="number of steps was 1 and is now 2"):
        train(TrainConfig(**settings | {"steps": 2}))
    with pytest.raises(InputError, match="sequences per step was 4 and is now 8"):
        train(TrainConfig(**settings | {"steps": 1, "gradient_accumulation": 2}))
    same = train(TrainConfig(**settings | {"steps": 1, "batch_size": 2, "gradient_accumulation": 2, "save_steps": 7}))
    assert same.finished and same.began_at == 1


def test_the_defaults_are_in_range():
    check_config(TrainConfig("store", "student", "output"))


def test_the_command_reports_mistakes_in_one_line(settings, tmp_path):
    other = save_teacher(tmp_path / "other", layers=1)
    make_tokenizer(extra_words=("zebra",)).save_pretrained(other)
    done = CliRunner().invoke(app, ["run", *command(settings | {"student": str(other)})])
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr.startswith("Error: the vocabulary of the student is not that of the dump train: token id 4 is")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_student_at_the_same_place_is_refused(settings, tmp_path):
    settings["student"] = str(save_teacher(tmp_path / "student", layers=1, seed=1))
    train(TrainConfig(**settings))
    save_teacher(tmp_path / "student", layers=1, seed=2)
    with pytest.raises(InputError, match="student's files was"):
        train(TrainConfig(**settings))
