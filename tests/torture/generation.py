"""Workers that write texts, killed at whatever they do to their folder, and started again as other ranks of other numbers.

They are the real command with a tiny teacher. Whatever is killed when, no file is replaced, and in the end each row has each of
its samples once, with the texts of a run that nobody disturbed.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from conftest import save_teacher, write_jsonl
from processes import Command, Moment

from torture.heartbeat import beat

ROWS, SHARD_SIZE, SAMPLES = 11, 3, 2
WORLDS = (1, 2, 3)
LOOKS = 16  # a worker touches its folder about as often, or more often where it writes more of the files
KILLS = 6  # of a round, at most


@dataclass
class Touched:
    """True when the folder was touched so many times."""

    left: int

    def __call__(self, folder: Path) -> bool:
        self.left -= 1
        return self.left <= 0


def texts(folder: Path) -> list[tuple[int, int, list[int]]]:
    """Row, sample and tokens of all texts of a folder, in order."""
    return [
        (row["prompt_row"], row["sample"], row["tokens"])
        for path in sorted(folder.glob("part-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def published(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells one file of a folder from another of its name."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith("."):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def run(seed: int, minutes: float, folder: Path, trials: int | None = None) -> dict[str, int]:
    """Write texts in rounds, and kill workers of each.

    Args:
        seed: of what is killed when.
        minutes: how long to go on.
        folder: an empty folder.
        trials: stop after as many kills.

    Returns:
        `faults` (kills), those `survived`, `silent` losses, and `rounds`.

    Raises:
        AssertionError: a file was replaced, or a text was lost, doubled or written otherwise.
    """
    deadline = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    counts = Counter(faults=0, survived=0, silent=0, rounds=0)
    teacher = save_teacher(folder / "teacher")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Who lit lamp {row}?"} for row in range(ROWS)])
    words = ["generate", "--teacher", teacher, "--prompts", prompts, "--samples", SAMPLES, "--temperature", 0.8]
    words += ["--max-new-tokens", 6, "--shard-size", SHARD_SIZE, "--device", "cpu"]
    assert Command(*words, "--output", folder / "whole", folder=folder / "said").wait().returncode == 0
    whole = texts(folder / "whole")
    assert [text[:2] for text in whole] == [(row + 1, sample) for row in range(ROWS) for sample in range(SAMPLES)]
    while time.monotonic() < deadline and (trials is None or counts["faults"] < trials):
        beat(f"seed {seed}, round {counts['rounds']}")
        _round(chance, counts, [*words, "--output", folder / "gen"], folder, whole, trials, deadline)
    return dict(counts)


def _round(
    chance: random.Random, counts: Counter[str], words: list, folder: Path, whole: list, trials: int | None, deadline: float
) -> None:
    output, killed = folder / "gen", 0
    shutil.rmtree(output, ignore_errors=True)
    while killed < KILLS and time.monotonic() < deadline and (trials is None or counts["faults"] < trials):
        world = chance.choice(WORLDS)
        before = published(output)
        workers = [
            Command(
                *(*words, "--rank", rank, "--world-size", world),
                folder=folder / "said",
                at=Moment(output, Touched(chance.randint(1, LOOKS))),
            )
            for rank in range(world)
        ]
        endings = [worker.wait() for worker in workers]
        assert all(ending.returncode in (0, -9) for ending in endings), endings
        deaths = sum(ending.returncode != 0 for ending in endings)
        killed += deaths
        counts.update(faults=deaths)
        after = published(output)
        assert {name: after.get(name) for name in before} == before, "a file was replaced"
        assert set(map(repr, texts(output))) <= set(map(repr, whole)), "a text is another one"
        if not deaths:
            break
    ending = Command(*words, folder=folder / "said").wait()
    assert ending.returncode == 0, ending.stderr
    assert texts(output) == whole, "texts were lost, doubled or written otherwise"
    names = sorted(path.name for path in output.iterdir())
    assert names == ["manifest.json", *(f"part-{number:06d}.parquet" for number in range(-(-ROWS // SHARD_SIZE)))], names
    counts.update(rounds=1)
    counts["survived"] = counts["faults"]
