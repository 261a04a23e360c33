"""Faults of every sort at a store, its writers, its readers and its SQL, until the time is over: what `make torture` runs.

    python benchmarks/torture.py [damage kills ...] [--seed 7] [--minutes 20]

The loops are those of tests/torture, of which `make test` runs short versions. Two go at once, each in a process of its own;
time is shared out among those that can run here. Each counts the faults it made, those after which everything that is promised
held, and wrong answers or losses that nobody was told of. A broken promise ends its loop, is printed with how to see it again,
and makes the exit code 1. What a loop does depends on its seed, and on how far it comes in its time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import measurement

from knowledge_store.progress import duration

TESTS = Path(__file__).resolve().parent.parent / "tests"

# Loops, and their shares of the time. Damage goes twice, with a seed of its own each time: there is most to try.
LOOPS = {
    "damage": 7.0,
    "damage again": 7.0,
    "hostile_files": 6.5,
    "kills": 4.0,
    "disk_errors": 3.0,
    "workers": 2.5,
    "hostile_sql": 2.0,
    "order": 2.0,
    "power_loss": 1.8,
    "indexes": 1.2,
}
AT_ONCE = 2
RESERVED = 1.5  # minutes: a loop ends what it is at when its time is over
ROOM = 2 * 2**30  # bytes

WORK = """
import importlib, json, pathlib, sys
module, seed, minutes, folder, result = sys.argv[1:]
counts = importlib.import_module(f"torture.{module}").run(int(seed), float(minutes), pathlib.Path(folder))
pathlib.Path(result).write_text(json.dumps(counts))
"""


def work_folder() -> str | None:
    """Where to make stores: in memory where there is room, since the loops flush to the disk over and over."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM
    return str(memory) if roomy else None


def unavailable(loop: str, folder: Path) -> str | None:
    """Why a loop cannot run here, if it cannot."""
    find = getattr(importlib.import_module(f"torture.{module_of(loop)}"), "unavailable", None)
    return None if find is None else find(folder)


def module_of(loop: str) -> str:
    """The module in tests/torture that a loop is."""
    return loop.split()[0]


def run_loop(loop: str, seed: int, minutes: float, folder: Path) -> dict[str, Any]:
    """One loop in a process of its own.

    Returns:
        its `seconds` and `counts`, or what is `broken`.
    """
    own, result = folder / loop.replace(" ", "_"), folder / f"{loop}.json"
    own.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(own / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", WORK, module_of(loop), str(seed), str(minutes), str(own), str(result)]
    began = time.monotonic()
    limit = 60 * (minutes + 2 * RESERVED)
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        complaint = ended.stderr.strip()
    except subprocess.TimeoutExpired:
        complaint = f"it hung: it was to end after {duration(60 * minutes)}"
    found: dict[str, Any] = {"seed": seed, "seconds": round(time.monotonic() - began, 1)}
    if result.exists():
        shutil.rmtree(own, ignore_errors=True)
        return {**found, "counts": json.loads(result.read_text())}
    return {**found, "broken": complaint or "its process ended without a word"}


def in_words(counts: dict[str, int]) -> str:
    """Counts in a line, what matters first."""
    first = ("faults", "survived", "silent")
    names = [*first, *sorted(counts.keys() - set(first))]
    return ", ".join(f"{counts[name]:,} {name}" for name in names)


def main() -> None:
    """Run the loops, print a line as each ends, and keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loops", nargs="*", metavar="LOOP", help=f"one or more of {', '.join(LOOPS)}; all when none is named")
    parser.add_argument("--seed", type=int, help="of the first run of each loop; drawn when it is not given")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long all of it may take")
    options = parser.parse_args()
    unknown = sorted(set(options.loops) - LOOPS.keys())
    if unknown or not options.minutes > RESERVED:
        parser.error(f"no such loop: {', '.join(unknown)}" if unknown else f"it takes more than {RESERVED:g} minutes")
    seed = random.randrange(2**31) if options.seed is None else options.seed
    sys.path.insert(0, str(TESTS))
    chosen = options.loops or list(LOOPS)
    with tempfile.TemporaryDirectory(dir=work_folder()) as name, ThreadPoolExecutor(AT_ONCE) as executor:
        folder = Path(name)
        skipped = {loop: reason for loop in chosen if (reason := unavailable(loop, folder))}
        chosen = [loop for loop in chosen if loop not in skipped]
        lanes = min(AT_ONCE, len(chosen))
        shares = sum(LOOPS[loop] for loop in chosen) / max(lanes, 1)
        longest = max((LOOPS[loop] for loop in chosen), default=0)
        unit = (options.minutes - RESERVED) / max(shares, longest, 1e-9)
        print(f"seed {seed}: {', '.join(chosen)}; {options.minutes:g} minutes at most", flush=True)
        for loop, reason in skipped.items():
            print(f"{loop:<14} SKIPPED: {reason}", flush=True)
        began = time.monotonic()
        running = {
            executor.submit(run_loop, loop, seed + list(LOOPS).index(loop), unit * LOOPS[loop], folder): loop for loop in chosen
        }
        found = {}
        for future in as_completed(running):
            loop = running[future]
            found[loop] = future.result()
            counts = found[loop].get("counts")
            told = in_words(counts) if counts else f"BROKEN: {found[loop]['broken']}"
            print(f"{loop:<14} {duration(found[loop]['seconds']):>10}  {told}", flush=True)
    counts = [each["counts"] for each in found.values() if "counts" in each]
    total = {name: sum(each[name] for each in counts) for name in ("faults", "survived", "silent")}
    minutes = round((time.monotonic() - began) / 60, 1)
    measurement.keep("torture", {"seed": seed, "minutes": minutes, **total, "loops": found, "skipped": skipped})
    broken = [loop for loop, each in found.items() if "broken" in each]
    if broken or total["silent"]:
        sys.exit(f"BROKEN: {', '.join(broken) or 'silent errors'} (seed {seed})")


if __name__ == "__main__":
    main()
