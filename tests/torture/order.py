"""Order and resume: all ranks, workers and interruptions read one order; a run killed anywhere ends as one left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from conftest import save_teacher, story_rows, write_jsonl
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from processes import Running
from safetensors.numpy import load_file
from stores import commit, make_manifest, random_sequences, words

from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reading.permutation import permuted
from student_train.training.dataset import DistillationDataset
from torture.heartbeat import beat

WORLDS = (1, 2, 3, 8)
SIZES = (1, 7, 5)  # of the store's shards: none divides another
TRAINING = {"steps": 9, "batch_size": 3, "save_steps": 2, "eval_fraction": 0.2, "evaluations": 3}
TOLERANCE = 1e-6  # nats, between losses of a run that was killed and one that was not


# --- the order ----------------------------------------------------------------------------------------------------------


def small_store(folder: Path) -> KnowledgeStore:
    """A dump of 13 sequences."""
    writer = DumpWriter.open(folder, make_manifest(shards=len(SIZES)), tokens_table(words(11), words(11)))
    for shard, size in enumerate(SIZES):
        commit(writer, shard, random_sequences(shard, size))
    return KnowledgeStore.open(folder)


@dataclass(frozen=True)
class _Worker:
    """What torch tells a worker process of a DataLoader about itself."""

    id: int
    num_workers: int


class _Rank:
    """One rank's batches as a DataLoader with so many workers delivers them: from each worker in turn, read by each alone."""

    def __init__(self, dataset: DistillationDataset, workers: int):
        self.dataset = dataset
        self._infos = [_Worker(number, workers) for number in range(workers)] or [None]
        self._iterators = [iter(dataset) for _ in self._infos]
        self._turn = count()

    def take(self) -> list[int]:
        """The sequences of its next batch; a row of padding is −1."""
        turn = next(self._turn) % len(self._infos)
        # Which sequences come is the question here, not what is in them: nothing is read, nothing becomes a tensor.
        with patch.multiple(
            "student_train.training.dataset", get_worker_info=lambda: self._infos[turn], tensors=lambda batch: batch
        ):
            return list(next(self._iterators[turn])["sequence_id"].tolist())


class Epochs(RuleBasedStateMachine):
    """Epoch after epoch in one order, for ranks and workers that come and go, die, and go on from their last checkpoint."""

    store: KnowledgeStore

    @initialize(seed=st.integers(0, 3), world_size=st.sampled_from(WORLDS), workers=st.integers(0, 3))
    def begin(self, seed: int, world_size: int, workers: int) -> None:
        ids = self.store.sequences()["sequence_id"].to_pylist()
        self.expected = [
            ids[place] for epoch in range(130) for place in permuted(np.arange(len(ids)), len(ids), seed, 0, epoch)
        ]
        self.seen: list[int] = []
        self.saved: dict[str, int] = {"seed": seed}
        self.saved_after = 0
        self.start(world_size, 2, workers)

    def start(self, world_size: int, batch_size: int, workers: int) -> None:
        """Start all ranks from the last checkpoint."""
        del self.seen[self.saved_after :]
        self.steps, self.batch_size = 0, batch_size
        plan = {"batch_size": batch_size, "world_size": world_size, "endless": True, "kinds": (), **self.saved}
        self.ranks = [_Rank(DistillationDataset(self.store, rank=rank, **plan), workers) for rank in range(world_size)]

    @rule(steps=st.integers(1, 6))
    def train(self, steps: int) -> None:
        """All ranks take some steps."""
        for _ in range(steps):
            for rank in self.ranks:
                batch = rank.take()
                assert len(batch) == self.batch_size
                self.seen += [sequence for sequence in batch if sequence >= 0]
            self.steps += 1

    @rule()
    def save(self) -> None:
        """A checkpoint, which is the same on every rank."""
        states = [rank.dataset.state_after(self.steps) for rank in self.ranks]
        assert all(state == states[0] for state in states)
        self.saved, self.saved_after = json.loads(json.dumps(states[0])), len(self.seen)

    @rule(world_size=st.sampled_from(WORLDS), batch_size=st.integers(1, 5), workers=st.integers(0, 3))
    def die_and_go_on(self, world_size: int, batch_size: int, workers: int) -> None:
        """What was read since the last checkpoint is lost with what was learnt of it, and read again."""
        self.start(world_size, batch_size, workers)

    @invariant()
    def in_order(self) -> None:
        """Which says that every epoch has every sequence once: its part of `expected` is a permutation."""
        if hasattr(self, "seen"):
            assert self.seen == self.expected[: len(self.seen)]


def check_order(store: KnowledgeStore, seed: int, examples: int) -> int:
    """Search for a history that breaks the order.

    Returns:
        how many were tried.
    """
    tried = Counter[str]()

    @seeded(seed)
    class Seeded(Epochs):
        def teardown(self) -> None:
            tried["histories"] += 1
            beat(f"seed {seed}, history {tried['histories'] + 1}")

    Seeded.store = store
    limits: dict[str, Any] = {"max_examples": examples, "stateful_step_count": 20, "deadline": None, "database": None}
    run_state_machine_as_test(Seeded, settings=settings(**limits, suppress_health_check=list(HealthCheck)))
    return tried["histories"]


# --- training -----------------------------------------------------------------------------------------------------------


def training_settings(folder: Path) -> dict[str, Any]:
    """A store made by a tiny teacher, a tiny student, and how to train it."""
    finished = Running(_make_models, folder, folder=folder / "log").wait()
    assert finished.returncode == 0, finished.stderr
    return {"store": str(folder / "store"), "student": str(folder / "student"), "dump": "train", "learning_rate": 1e-3}


def _make_models(folder: Path) -> None:
    from teacher_dump import DumpConfig, dump
    from teacher_dump.teachers.local import load_teacher

    teacher = save_teacher(folder / "teacher")
    corpus = write_jsonl(folder / "rows.jsonl", story_rows(17))
    config = DumpConfig(str(teacher), (corpus,), folder / "store", "train", max_length=32, batch_size=4, shard_size=8)
    dump(config, teacher=load_teacher(str(teacher), device="cpu"))
    save_teacher(folder / "student", layers=1, seed=1)


def train_until(settings: dict[str, Any], moment: int | None, number: int) -> None:
    """Train, and send this process a signal at its moment: a step it begins or something it does to a file of the run's folder.

    Prints how many such moments there were and whether the run is finished, when it lives to see its end.
    """
    import torch

    from student_train.training.configuration import TrainConfig
    from student_train.training.run import train
    from student_train.training.run_trainer import RunTrainer

    torch.set_num_threads(1)
    output = settings["output"]
    passed = 0

    def pass_moment() -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), number)

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(output):
            pass_moment()

    draw = RunTrainer.get_batch_samples

    def drawing(self: RunTrainer, *arguments: Any) -> Any:
        pass_moment()
        return draw(self, *arguments)

    sys.addaudithook(watch)
    with patch.object(RunTrainer, "get_batch_samples", drawing):
        result = train(TrainConfig(**settings))
    print(json.dumps([passed, result.finished]))


def outcome(output: Path) -> tuple[dict[int, dict[str, float]], dict[str, Any]]:
    """What a finished run measured at each step (seconds left out), and its weights."""
    history = json.loads((output / "history.json").read_text())
    assert history["finished"]
    measured: dict[int, dict[str, float]] = {}
    for entry in history["entries"]:
        figures = {name: value for name, value in entry.items() if name in ("loss", "eval_loss", "eval_nll", "eval_kl")}
        there = measured.setdefault(entry["step"], {})
        assert not there.keys() & figures.keys(), f"step {entry['step']} was measured twice"
        there.update(figures)
    return measured, load_file(output / "model.safetensors")


def undisturbed_training(settings: dict[str, Any], folder: Path) -> tuple[int, Any]:
    """How many moments a run has that is left alone, and its outcome."""
    alone = folder / "alone"
    finished = Running(train_until, settings | {"output": str(alone)}, None, signal.SIGKILL, folder=folder / "log").wait()
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)[0], outcome(alone)


def killed_training(
    chance: random.Random, settings: dict[str, Any], folder: Path, moments: int, expected: Any, kills: int, end: float
) -> Counter[str]:
    """A run killed at one random moment after another, each time gone on with by the same command.

    Args:
        moments, expected: of a run left alone.
        kills: how often at most; then it is left alone.
        end: when to leave it alone at the latest, on the monotonic clock.
    """
    output = folder / "run"
    counts: Counter[str] = Counter()
    for life in count():
        number = chance.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        harmed = life < kills and (life == 0 or time.monotonic() < end)
        moment = chance.randrange(1, moments // 3) if harmed else None  # the next life goes on, with fewer moments left
        beat(f"{output}, life {life}, signal {number} at moment {moment}")
        arguments = settings | {"output": str(output)}
        finished = Running(train_until, arguments, moment, number, folder=folder / "log").wait()
        assert finished.returncode in (0, -number), finished.stderr
        if finished.returncode == 0 and json.loads(finished.stdout)[1]:
            break
        counts["kills" if finished.returncode else "stops"] += 1
    measured, weights = outcome(output)
    measured_alone, weights_alone = expected
    assert measured.keys() == measured_alone.keys(), sorted(measured.keys() ^ measured_alone.keys())
    for step, figures in measured_alone.items():
        assert figures.keys() == measured[step].keys(), (step, figures, measured[step])
        for name, value in figures.items():
            assert abs(measured[step][name] - value) <= TOLERANCE, (step, name, value, measured[step][name])
    furthest = max(abs(weights[name] - weights_alone[name]).max() for name in weights_alone)
    assert furthest <= TOLERANCE, f"weights differ by {furthest}"
    leftovers = [path.name for path in output.iterdir() if path.name.startswith((".tmp-", "checkpoint-"))]
    assert not leftovers, leftovers
    return counts


def run(seed: int, minutes: float, folder: Path) -> dict[str, int]:
    """A third of the time for the order, the rest for killed runs.

    Returns:
        counts; `faults` are kills and stops of training, and histories with deaths and other ranks.
    """
    began = time.monotonic()
    end = began + 60 * minutes
    totals: Counter[str] = Counter()
    store = small_store(folder / "small")
    number = 0
    while number == 0 or time.monotonic() - began < 20 * minutes:
        totals["histories"] += check_order(store, seed + number, 25)
        number += 1
    settings = training_settings(folder) | TRAINING
    moments, expected = undisturbed_training(settings, folder)
    number = 0
    while number == 0 or time.monotonic() < end:
        own = folder / f"training{number}"
        try:
            totals += killed_training(random.Random(f"{seed} {number}"), settings, own, moments, expected, 12, end)
        except AssertionError as error:
            raise AssertionError(f"order, seed {seed}, training {number} (its files: {own}): {error}") from error
        totals["trainings"] += 1
        number += 1
    faults = totals["kills"] + totals["stops"] + totals["histories"]
    return {**totals, "faults": faults, "survived": faults, "silent": 0}
