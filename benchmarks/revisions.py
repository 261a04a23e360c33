"""Two revisions of the project side by side: dumping, reading in order and at random, and writing a shard.

    python -m benchmarks.revisions --other ../older-checkout [--teacher FOLDER --corpus FILE]

Each side is one warm process with the packages of its own checkout (`revision_worker.py`), its own cache folder, and its own
store of the same corpus, because formats differ between revisions. They take turns, and the side that goes first changes from
turn to turn; the first turn of each task warms up and is not counted. A ratio is the other revision's time over this one's in
the same turn: how fast this one is as a multiple of the other. Its interval is made of order statistics and holds the median
of the ratios with a confidence of at least 95 %. Beside the clock's time stands the processor's, of all threads, which other
work on the machine disturbs less. Without a teacher the one of `tiny_model.py` is made, beside which the project's own work
weighs most.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep
from benchmarks.revision_worker import TASKS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 0.97  # a revision should be at least so fast as a multiple of the one before it
CONFIDENCE = 0.95
MIN_TURNS = 9
CLOCKS = ("seconds", "processor_seconds")


class Worker:
    """A process of one revision."""

    def __init__(self, checkout: Path, work: Path, settings: dict[str, Any]):
        work.mkdir(parents=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "tests")]),
            "XDG_CACHE_HOME": str(work / "cache"),
        }
        self.log = work / "log"
        with self.log.open("w") as log:
            # -P: beside the script lie modules whose names must not hide others.
            self.process = subprocess.Popen(
                [sys.executable, "-P", HERE / "revision_worker.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.facts = self.ask(json.dumps({**settings, "work": str(work)}))

    def ask(self, line: str) -> dict[str, Any]:
        """Write a line, and read the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a worker failed:\n{self.log.read_text()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def interval(values: list[float]) -> tuple[float, float]:
    """Order statistics between which the median lies with a confidence of at least `CONFIDENCE`, the narrowest such pair."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.5**count, 0  # the probability that at most `rank` of the values lie below the median
    while 1 - 2 * (following := below + math.comb(count, rank + 1) * 0.5**count) >= CONFIDENCE:
        below, rank = following, rank + 1
    return ordered[rank], ordered[count - 1 - rank]


def verdict(low: float, high: float) -> str:
    """What the interval of a ratio says of the limit."""
    if low >= LIMIT:
        return f"at least {LIMIT}"
    return f"below {LIMIT}" if high < LIMIT else f"the interval holds {LIMIT}"


def compare(task: str, this: Worker, other: Worker, turns: int) -> dict[str, Any]:
    """The figures of one task."""
    times: dict[Worker, list[dict[str, float]]] = {this: [], other: []}
    for turn in range(turns + 1):
        for worker in (this, other) if turn % 2 else (other, this):
            times[worker].append(worker.ask(task))
    pairs = list(zip(times[this], times[other], strict=True))[1:]
    found = {clock: figures([(a[clock], b[clock]) for a, b in pairs]) for clock in CLOCKS}
    for clock, each in found.items():
        print(f"{task:<24} {clock:<18} {each['ratio']:.3f} {each['interval']}  {each['verdict']}", file=sys.stderr, flush=True)
    return found


def figures(turns: list[tuple[float, float]]) -> dict[str, Any]:
    """What follows from the times of both in each turn, this revision's first."""
    ratios = [other / this for this, other in turns]
    low, high = interval(ratios)
    return {
        "this": round(statistics.median(this for this, _ in turns), 4),
        "other": round(statistics.median(other for _, other in turns), 4),
        "ratio": round(statistics.median(ratios), 3),
        "interval": [round(low, 3), round(high, 3)],
        "verdict": verdict(low, high),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def revision(checkout: Path) -> str:
    """The commit of a checkout, and whether files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> None:
    """Compare them, and print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--teacher", type=Path, help="folder of a model; made on the spot when it is not given")
    parser.add_argument("--gguf-file", help="a GGUF file in it")
    parser.add_argument("--corpus", type=Path, help="a corpus file; the tiny model's own when it is not given")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=MIN_TURNS, help=f"at least {MIN_TURNS}")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    options = parser.parse_args()
    if options.turns < MIN_TURNS:
        parser.error(f"--turns must be at least {MIN_TURNS}")
    if bool(options.teacher) != bool(options.corpus):
        parser.error("give --teacher and --corpus, or neither")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.teacher is None:
            command = [sys.executable, "-m", "benchmarks.tiny_model", str(work / "tiny")]
            subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
            options.teacher, options.corpus = work / "tiny" / "teacher", work / "tiny" / "train.jsonl"
        settings = {
            "teacher": str(options.teacher.resolve()),
            "corpus": str(options.corpus.resolve()),
            "gguf_file": options.gguf_file,
            "max_length": options.max_length,
        }
        this = Worker(ROOT, work / "this", settings)
        other = Worker(options.other.resolve(), work / "other", settings)
        if this.facts != other.facts:
            sys.exit(f"the two dumps differ: {this.facts} here, {other.facts} there")
        found: dict[str, Any] = {
            "this": revision(ROOT),
            "other": revision(options.other),
            "positions": this.facts["positions"],
            "turns": options.turns,
            "tasks": {task: compare(task, this, other, options.turns) for task in options.tasks},
        }
        this.close()
        other.close()
    keep("revisions", found)


if __name__ == "__main__":
    main()
