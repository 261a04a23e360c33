"""Two runs into one folder: the second is refused, whatever it finds there, and no lock outlives its run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import save_teacher
from processes import Running, run_ranks
from ranks import begin_late, pause
from test_student_training import assert_close, command, weights
from torture.heartbeat import wait_until
from typer.testing import CliRunner

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT
from student_train.cli import app
from student_train.training.configuration import TrainConfig
from student_train.training.run import train
from student_train.training.run_lock import LOCK_FILE, check_unlocked, locked
from student_train.training.run_trainer import RunTrainer


@pytest.fixture
def settings(store_folder, tmp_path) -> dict:
    return {
        "store": str(store_folder),
        "student": str(save_teacher(tmp_path / "student", layers=1, seed=1)),
        "output": str(tmp_path / "run"),
        "dump": "train",
        "batch_size": 4,
        "steps": 3,
        "eval_fraction": 0.0,
    }


def test_a_second_run_is_refused(settings, tmp_path, monkeypatch):
    """While the first is between two steps; the first goes on as if nothing had happened."""
    train(TrainConfig(**settings | {"output": str(tmp_path / "alone")}))
    draw = RunTrainer.get_batch_samples
    refused = []

    def drawing(self, *arguments):
        if self.state.global_step == 1:
            refused.append(CliRunner().invoke(app, ["run", *command(settings)]))
            # … also one whose beginning is past the first look.
            with pytest.raises(InputError, match="another process is training into"), locked(tmp_path / "run", SILENT):
                pytest.fail("two hold the lock")
        return draw(self, *arguments)

    monkeypatch.setattr(RunTrainer, "get_batch_samples", drawing)
    assert train(TrainConfig(**settings)).finished
    [second] = refused
    sentence = f"Error: another process is training into {tmp_path / 'run'}: wait until it ends, or choose another --output\n"
    assert (second.exit_code, second.stdout, second.stderr) == (2, "", sentence)
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "alone"), 0)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_run_that_finished_while_another_loaded_its_model(settings, tmp_path, monkeypatch):
    """The other finds it finished, and leaves it alone."""
    from student_train.training import run

    load = run.load_model
    monkeypatch.setattr(run, "load_model", lambda *arguments: (train_meanwhile(), load(*arguments))[1])

    def train_meanwhile() -> None:
        monkeypatch.setattr(run, "load_model", load)
        train(TrainConfig(**settings))

    result = train(TrainConfig(**settings))
    assert result.finished and result.began_at == 3


def test_a_killed_run_leaves_no_lock(settings, tmp_path):
    """Not even through the processes that read its batches ahead, which live on for some seconds."""
    reached = tmp_path / "reached"
    process = Running(pause, command(settings | {"workers": 2}), reached, folder=tmp_path / "said").process
    try:
        wait_until(reached.exists, process.is_alive)
        with pytest.raises(InputError, match="another process is training into"):
            check_unlocked(tmp_path / "run")
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert workers
        for worker in workers:
            os.kill(int(worker), signal.SIGSTOP)  # they notice nothing
        process.kill()
        process.join()
        try:
            assert train(TrainConfig(**settings)).finished
        finally:
            for worker in workers:
                os.kill(int(worker), signal.SIGKILL)
    finally:
        process.kill()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_all_ranks_hear_of_another_run(settings, tmp_path):
    """The lock is the first process's; the others end with it, and say the same."""
    with locked(tmp_path / "run", SILENT):
        ranks = run_ranks(2, begin_late, command(settings | {"batch_size": 2}), folder=tmp_path / "said")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    for rank in ranks:
        assert rank.returncode == 2 and rank.stderr.startswith("Error: another process is training into"), rank


def test_a_file_system_without_locks(settings, tmp_path, monkeypatch):
    import fcntl

    from processes import Notes

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    notes = Notes()
    with locked(tmp_path / "run", notes):
        check_unlocked(tmp_path / "run")
    assert notes.notes == [
        f"Warning: {tmp_path / 'run'} cannot be locked (Operation not supported): start no other run with this --output."
    ]
