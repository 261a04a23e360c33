"""Many workers on one store: killed, started again as other ranks, with clocks a year off, racing for a name, read meanwhile.

The workers go through their shards as `teacher_dump.dump` does and publish with the real writer; their knowledge is made with
numpy, so that none has to load a model. Machines differ in what they say (as GPUs do in the last digits, but more), so that a
shard put together from two of them would show.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from processes import Finished, Running
from stores import DOCUMENTS, commit, knowledge_of, make_manifest, words

from knowledge_store import DumpWriter, KnowledgeStore, KnowledgeStoreError, Manifest, MismatchError, StoreError, verify
from knowledge_store.format.sequences import sequence_id, tokens_table
from knowledge_store.kinds import Arrays
from torture.heartbeat import PATIENCE, beat, wait_for, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
WORLDS = (1, 2, 3, 8)
WORKERS = 8
SHARDS = 24
SEQUENCES = 4  # in a shard
VOCABULARY = 11
K = 3
MACHINES = 3
CLOCKS = ("+365d", "-365d")

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
# What libfaketime makes for a process, and leaves behind when that is killed; by the process's id.
FAKETIME_FILES = ("/dev/shm/faketime_shm_{}", "/dev/shm/sem.faketime_sem_{}")


# --- what the processes do ----------------------------------------------------------------------------------------------


@lru_cache(1000)
def knowledge(shard: int, machine: int) -> list[Arrays]:
    """A shard as one machine has it: the tokens of every machine, log-probabilities of its own."""
    common, own = np.random.default_rng(shard), np.random.default_rng([shard, machine])
    found = []
    for length in common.integers(2, 40, SEQUENCES).tolist():
        tokens, logits = common.integers(0, VOCABULARY, length), common.normal(0, 2, (length, VOCABULARY))
        found.append(knowledge_of(tokens, logits + own.normal(0, 0.5, logits.shape), K))
    return found


def tokens_of(shard: int) -> list[list[int]]:
    """The tokens of a shard's sequences."""
    return [arrays["token_id"].tolist() for arrays in knowledge(shard, 0)]


def plan(shards: int, teacher: str = "one", prefix: str = "w") -> tuple[Manifest, Any]:
    """The dump "d" of one teacher, and a vocabulary that begins every word with `prefix`."""
    manifest = make_manifest("d", VOCABULARY, K, shards)
    manifest.teacher["files"] = {"model.safetensors": teacher}
    manifest.tokenizer["vocabulary_sha256"] = prefix
    texts = [word.replace("w", prefix) for word in words(VOCABULARY) if word]
    return manifest, tokens_table(texts, texts)


def pause(seconds: float) -> None:
    """Sleep. (`time.sleep` fails in a process under libfaketime.)"""
    select.select([], [], [], max(seconds, 0))


def work(
    store: str,
    rank: int,
    world_size: int,
    shards: int,
    machine: int,
    begin: float,
    teacher: str = "one",
    prefix: str = "w",
    held_at: int | None = None,
    until: str = "",
) -> None:
    """Commit the shards of one rank that no worker has committed. Prints how it ended.

    Args:
        held_at: a shard; from there on it waits until there is a file `until`, for ever if that has no name.
    """
    pause(begin - time.monotonic())
    manifest, tokens = plan(shards, teacher, prefix)
    try:
        writer = DumpWriter.open(Path(store), manifest, tokens)
        for shard in range(rank, shards, world_size):
            while held_at is not None and shard >= held_at and not (until and Path(until).exists()):
                pause(0.01)
            if not writer.committed(shard):
                commit(writer, shard, knowledge(shard, machine))
        print("done")
    except KnowledgeStoreError as error:
        print(f"{type(error).__name__}: {error}")


def read(store: str, passes: str, stop: str, cache: str) -> None:
    """Open the store, ask it everything, and begin anew, until there is a file `stop`; a byte in `passes` for each time."""
    os.environ["XDG_CACHE_HOME"] = cache
    seen: frozenset[int] = frozenset()
    while not Path(stop).exists():
        if not Path(store, "store.json").exists():
            pause(0.001)
            continue
        opened = KnowledgeStore.open(store)
        if "d" in opened.dumps:
            now = check_snapshot(opened)
            assert now >= seen, f"shards {sorted(seen - now)} were there before, and are gone"
            seen = now
            with open(passes, "a") as file:
                file.write(".")


def check_snapshot(opened: KnowledgeStore) -> frozenset[int]:
    """Everything an open store says is of whole committed shards, the same ones whatever it is asked.

    Returns:
        which ones.
    """
    shards = opened.sql("SELECT shard FROM shards ORDER BY shard")["shard"].to_pylist()
    assert len(set(shards)) == len(shards), f"a shard is there twice: {shards}"
    expected = {
        sequence_id(DOCUMENTS * shard + index, 0): tokens for shard in shards for index, tokens in enumerate(tokens_of(shard))
    }
    assert opened.sequences("d")["sequence_id"].to_pylist() == list(expected), f"other sequences than those of {shards}"
    [row] = opened.sql("SELECT count(*) AS n, count(DISTINCT sequence_id) AS s, sum(token_id) AS t FROM positions").to_pylist()
    sums = {
        "n": sum(map(len, expected.values())), "s": len(expected), "t": sum(map(sum, expected.values())) if expected else None
    }  # fmt: skip
    assert row == sums, f"SQL says {row} of {shards}, not {sums}"
    if not shards:
        return frozenset()
    found = {}
    for batch in opened.batches("d", batch_size=5, seed=len(shards)):
        mass = np.exp(batch["candidate_logprobs"].astype(np.float64)).sum(axis=2) + np.exp(batch["tail_logprob"])
        assert np.abs(mass - 1).max() < 1e-6, "candidates and tail do not sum to one"
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            if sequence >= 0:
                assert sequence not in found, f"sequence {sequence} came twice"
                found[sequence] = batch["input_ids"][row][batch["attention_mask"][row]].tolist()
    assert found == expected, f"batches have other sequences or tokens than those of {shards}"
    return frozenset(shards)


# --- processes ----------------------------------------------------------------------------------------------------------


class Elsewhere:
    """A function at work in a process whose clock is off (libfaketime also moves the times of files that it sees)."""

    def __init__(self, function: Callable[..., None], arguments: tuple, clock: str):
        # What libfaketime made is open by then, and not looked for again. It goes first: this may be killed at any time.
        code = f"""
import contextlib, json, os, sys
for name in {FAKETIME_FILES!r}:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name.format(os.getpid()))
from torture.workers import {function.__name__} as f
f(*json.loads(sys.argv[1]))
"""
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME": clock,
            "DONT_FAKE_MONOTONIC": "1",
        }
        command = [sys.executable, "-c", code, json.dumps(arguments)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self) -> Finished:
        """Wait for its end."""
        hung = wait_for(self.process.pid, lambda: self.process.poll() is not None)
        assert hung is None, f"the process hangs: {hung}"
        out, err = self.process.communicate(timeout=PATIENCE)
        for name in FAKETIME_FILES:  # it may have been killed before it began
            Path(name.format(self.process.pid)).unlink(missing_ok=True)
        return Finished(self.process.returncode, out, err)


Process = Running | Elsewhere


def start(function: Callable[..., None], *arguments: object, folder: Path, clock: str | None = None) -> Process:
    """Start one of the functions above."""
    if clock is None:
        return Running(function, *arguments, folder=folder)
    return Elsewhere(function, arguments, clock)


def kill(process: Process) -> bool:
    """`kill -9`; False when it had ended already."""
    process.process.kill()
    return process.wait().returncode == -signal.SIGKILL


def ended(process: Process) -> str:
    """How a worker said that it ended."""
    finished = process.wait()
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


# --- rounds -------------------------------------------------------------------------------------------------------------


def published(store: Path) -> dict[str, tuple[int, bytes]]:
    """Every file that has its name for good: inode and contents."""
    found = {}
    for path in store.rglob("*"):
        if path.is_file() and not path.name.startswith(".tmp-"):
            found[str(path.relative_to(store))] = path.stat().st_ino, path.read_bytes()
    return found


def without_makers(data: bytes) -> dict[str, Any]:
    """A commit record but for who made it, and when."""
    return {key: value for key, value in json.loads(data).items() if key not in ("made_by", "sha256")}


@lru_cache(10)
def undisturbed(folder: Path, shards: int, machine: int, teacher: str = "one") -> dict[str, bytes]:
    """The files of a dump that one worker of one machine made alone."""
    store = folder / f"undisturbed-{shards}-{machine}-{teacher}"
    if not store.exists():
        manifest, tokens = plan(shards, teacher)
        writer = DumpWriter.open(store, manifest, tokens)
        for shard in range(shards):
            commit(writer, shard, knowledge(shard, machine))
    return {name: data for name, (_, data) in published(store).items()}


def check_complete(store: Path, folder: Path, shards: int, machines: set[int], teacher: str = "one") -> None:
    """Every shard is there once, and each of its files is what one of the machines makes of it alone."""
    manifest, tokens = plan(shards, teacher)
    DumpWriter.open(store, manifest, tokens)  # tidies
    leftovers = list(store.rglob(".tmp-*"))
    assert not leftovers, f"left behind: {leftovers}"
    found = verify(store)
    assert found.sound and not found.notes, found
    files = {name: data for name, (_, data) in published(store).items()}
    alone = [undisturbed(folder, shards, machine, teacher) for machine in sorted(machines)]
    assert files.keys() == alone[0].keys(), sorted(files.keys() ^ alone[0].keys())
    for name, data in files.items():
        if "/commits/" not in name:
            assert data in [each[name] for each in alone], f"{name} is what no machine makes"
    for shard in range(shards):
        one = [each for each in alone if each[f"d/positions/{shard:05d}.parquet"] == files[f"d/positions/{shard:05d}.parquet"]]
        name = f"d/commits/{shard:05d}.json"
        assert without_makers(files[name]) == without_makers(one[0][name]), f"{name} records something else"
    assert check_snapshot(KnowledgeStore.open(store)) == set(range(shards))


def disturbed_dump(chance: random.Random, folder: Path, kills: int, shards: int = SHARDS, clocks: bool = True) -> Counter[str]:
    """Eight workers with overlapping shares, killed and started again as other ranks of other worlds, and two readers.

    Returns:
        counts of what was done.
    """
    counts: Counter[str] = Counter(rounds=1)
    store, log, stop, passes = (folder / name for name in ("store", "log", "stop", "passes"))
    machines = {0} if chance.random() < 0.5 else set(range(MACHINES))
    off = iter(CLOCKS if clocks and FAKETIME else ())

    def worker(clock: str | None = None, held_at: int | None = None) -> Process:
        world_size = chance.choice(WORLDS)
        machine = chance.choice(sorted(machines))
        counts["clocks a year off"] += clock is not None
        arguments = str(store), chance.randrange(world_size), world_size, shards, machine, 0.0, "one", "w", held_at
        return start(work, *arguments, folder=log, clock=clock)

    def reader(clock: str | None = None) -> Process:
        return start(read, str(store), str(passes), str(stop), str(folder / "cache"), folder=log, clock=clock)

    readers = [reader(), reader(next(off, None))]
    # The first cannot end before it is killed: however long this process is kept from its work, one is there to be killed.
    workers = [worker(next(off, None), shards // 2), *(worker() for _ in range(WORKERS - 1))]
    before: dict[str, tuple[int, bytes]] = {}
    try:
        while counts["kills"] < kills:
            beat(f"{folder}, after {counts['kills']} kills and {counts['ended by themselves']} workers that ended")
            time.sleep(chance.expovariate(1 / 0.02))
            victim = chance.randrange(WORKERS) if counts["kills"] else 0
            if kill(workers[victim]):
                counts["kills"] += 1
            else:
                counts["ended by themselves"] += 1
                if counts["ended by themselves"] > 2 * WORKERS:
                    break  # the dump is complete: nobody is left to kill
            workers[victim] = worker()
            now = published(store) if store.exists() else {}
            changed = [name for name in before if now.get(name) != before[name]]
            assert not changed, f"published files were replaced or lost: {changed}"
            before = now
        assert {ended(each) for each in workers} == {"done"}
        assert ended(start(work, str(store), 0, 1, shards, 0, 0.0, folder=log)) == "done"
        stop.touch()
        for each in readers:
            ended(each)
    finally:
        stop.touch()
        for each in [*workers, *readers]:
            if each.process.exitcode is None if isinstance(each, Running) else each.process.returncode is None:
                kill(each)
    counts["reads"] = passes.stat().st_size if passes.exists() else 0
    check_complete(store, folder.parent, shards, machines)
    return counts


def race_for_a_name(difference: str, folder: Path, racers: int = 4, shards: int = 4) -> Counter[str]:
    """Dumps of one name started at once: those made alike share the work; of others one wins, and the rest are told.

    Args:
        difference: between every other one: nothing, teacher, or vocabulary.
    """
    store = folder / "store"
    own = [("one", "w")] * racers
    own[1::2] = [{"nothing": ("one", "w"), "teacher": ("two", "w"), "vocabulary": ("one", "v")}[difference]] * (racers // 2)
    begin = time.monotonic() + 0.2
    processes = [
        start(work, str(store), 0, 1, shards, 0, begin, teacher, prefix, folder=folder / "log") for teacher, prefix in own
    ]
    outcomes = [ended(each) for each in processes]
    winners = {each for each, outcome in zip(own, outcomes, strict=True) if outcome == "done"}
    assert len(winners) == 1, (own, outcomes)
    for each, outcome in zip(own, outcomes, strict=True):
        if each not in winners:
            assert outcome.startswith("MismatchError: "), outcome
            assert "delete" not in outcome, f"a racer is told to delete the winner's dump: {outcome}"
    [(teacher, prefix)] = winners
    found = verify(store)
    assert found.sound and not found.notes, found
    text = KnowledgeStore.open(store).tokens()["text"].to_pylist()[0]
    assert text == f"{prefix}0", (winners, text)
    files = published(store)
    assert json.loads(files["d/manifest.json"][1])["teacher"]["files"] == {"model.safetensors": teacher}
    assert check_snapshot(KnowledgeStore.open(store)) == set(range(shards))
    return Counter(races=1)


def removed_and_made_anew(chance: random.Random, folder: Path, shards: int = SHARDS) -> Counter[str]:
    """A dump is removed and begun anew with another teacher while workers of the first still run: they stop."""
    store, log = folder / "store", folder / "log"
    # They still run when the dump is removed, and go on when it is made anew.
    anew, held_at = folder / "anew", 20 * shards
    first = [
        start(work, str(store), rank, 2, 40 * shards, 1, 0.0, "old", "w", held_at, str(anew), folder=log) for rank in range(2)
    ]
    wanted = chance.randrange(1, 4)
    wait_until(lambda: len(list(store.glob("d/commits/*.json"))) >= wanted)
    KnowledgeStore.open(store).remove("d")
    assert ended(start(work, str(store), 0, 1, shards, 0, 0.0, folder=log)) == "done"
    anew.touch()
    for each in first:
        assert ended(each).split(":")[0] in (StoreError.__name__, MismatchError.__name__), each.wait()
    check_complete(store, folder.parent, shards, {0})
    return Counter(removals=1)


def run(seed: int, minutes: float, folder: Path) -> dict[str, int]:
    """Rounds of all three sorts until the minutes are over.

    Returns:
        counts; `faults` are kills, races, removals and clocks that were off.
    """
    deadline = time.monotonic() + 60 * minutes
    totals: Counter[str] = Counter()
    number = 0
    while number == 0 or time.monotonic() < deadline:
        chance = random.Random(f"{seed} {number}")
        own = folder / f"round{number}"
        beat(f"seed {seed}, round {number}")
        own.mkdir(parents=True)
        try:
            if number % 4 == 2:
                totals += race_for_a_name(chance.choice(["nothing", "teacher", "vocabulary"]), own)
            elif number % 4 == 3:
                totals += removed_and_made_anew(chance, own)
            else:
                shards = chance.choice([SHARDS, 4 * SHARDS])
                totals += disturbed_dump(chance, own, kills=chance.randrange(10, 40), shards=shards)
        except AssertionError as error:
            raise AssertionError(f"workers, seed {seed}, round {number} (its files: {own}): {error}") from error
        number += 1
    faults = totals["kills"] + totals["races"] + totals["removals"] + totals["clocks a year off"]
    return {**totals, "faults": faults, "survived": faults, "silent": 0}
