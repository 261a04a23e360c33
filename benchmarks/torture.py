"""Faults of every sort at a store, its writers, its readers and its SQL, until the time is over: what `make torture` runs.

    python benchmarks/torture.py [damage kills ...] [--seed 7] [--minutes 20]

The loops are those of tests/torture, of which `make test` runs short versions. Two go at once, each in a process of its own;
time is shared out among those that can run here. Each counts the faults it made, those after which everything that is promised
held, and wrong answers or losses that nobody was told of. A broken promise ends its loop, is printed with how to see it again,
and makes the exit code 1; the files of such a loop are kept. What a loop does depends on its seed, and on how far it comes in
its time. No loop goes on when the time is over. Ctrl-C ends all of them, with whatever they started.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn

import measurement

from knowledge_store.terminal.progress import duration

TESTS = Path(__file__).resolve().parent.parent / "tests"

# Loops, and their shares of the time. Damage goes twice, with a seed of its own each time: there is most to try.
LOOPS = {
    "damage": 7.0,
    "damage again": 7.0,
    "kills": 4.7,
    "disk_errors": 3.0,
    "workers": 2.5,
    "hostile_sql": 2.0,
    "order": 2.0,
    "power_loss": 2.0,
}
AT_ONCE = 2
RESERVED = 1.5  # minutes: a loop ends what it is at when its time is over
ENDING = 10.0  # seconds that killed processes may take to be gone
# What libfaketime (tests/torture/workers.py) leaves of a killed process.
FAKETIME_FILES = ("/dev/shm/faketime_shm_{}", "/dev/shm/sem.faketime_sem_{}")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOM = 2 * 2**30  # bytes

CHECK = """
import importlib, json, pathlib, sys
folder, result, *modules = sys.argv[1:]
reasons = {}
for module in modules:
    find = getattr(importlib.import_module(f"torture.{module}"), "unavailable", None)
    reasons[module] = find and find(pathlib.Path(folder))
pathlib.Path(result).write_text(json.dumps(reasons))
"""
WORK = """
import importlib, json, pathlib, sys
folder, result, module, seed, minutes = sys.argv[1:]
counts = importlib.import_module(f"torture.{module}").run(int(seed), float(minutes), pathlib.Path(folder))
pathlib.Path(result).write_text(json.dumps(counts))
"""


def work_folder() -> str | None:
    """Where to make stores: in memory where there is room, since the loops flush to the disk over and over."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM
    return str(memory) if roomy else None


def module_of(loop: str) -> str:
    """The module in tests/torture that a loop is."""
    return loop.split()[0]


class Stopped(BaseException):
    """A signal that ends everything."""


def stop(number: int, frame: object) -> NoReturn:
    """Called by a signal."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the first one counts
    raise Stopped(number)


class Processes:
    """Pieces of Python at work, each in a session of its own, so that it is ended with everything it started."""

    def __init__(self) -> None:
        self._going: set[subprocess.Popen[bytes]] = set()
        self._over = False
        self._lock = threading.Lock()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: their orphans become children of this process

    def run(self, code: str, folder: Path, arguments: list[str], seconds: float) -> tuple[Any, str | None]:
        """Run one.

        Args:
            folder: a folder for it, to be made.
            arguments: what it is given after its folder and the file for its result.
            seconds: how long it may take.

        Returns:
            its result, None if it has none; and what it said, None if it was still at work after all that time.
        """
        own, cache, temporary = (folder / name for name in ("own", "cache", "tmp"))
        for each in (folder, own, temporary):
            each.mkdir()
        result, said = folder / "result.json", folder / "said"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
        environment |= {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", code, str(own), str(result), *arguments]
        with self._lock, said.open("wb") as file:
            if self._over:
                return None, None
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            self._going.add(process)
        try:
            process.wait(seconds)
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            _end(process)
            with self._lock:
                self._going.discard(process)
            _unmount(own)
        if result.exists():
            return json.loads(result.read_text()), ""
        words = said.read_text(errors="replace").strip()
        return None, None if hung else words or f"its process ended without a word ({process.returncode})"

    def end(self) -> None:
        """End all that run, and begin none any more."""
        with self._lock:
            self._over = True
            going = list(self._going)
        for process in going:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: not permitted for one that has ended
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of what it started, and wait until all of it is gone."""
    _kill(process)
    until = time.monotonic() + ENDING
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING)
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < until:
            pid, _ = os.waitpid(-process.pid, os.WNOHANG)
            for name in FAKETIME_FILES if pid else ():
                Path(name.format(pid)).unlink(missing_ok=True)
            if pid == 0:
                time.sleep(0.01)


def _unmount(folder: Path) -> None:
    """Unmount what killed processes left mounted in a folder."""
    mounts = Path("/proc/self/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[1])
        if Path(place).is_relative_to(folder):
            subprocess.run(["fusermount3", "-u", "-z", place], capture_output=True, check=False)


def run_loop(processes: Processes, loop: str, seed: int, minutes: float, folder: Path, deadline: float) -> dict[str, Any]:
    """One loop in a process of its own, which ends at the deadline whatever it is at.

    Returns:
        its `seconds` and `counts`, or what is `broken`, or why it was `cut_off`: then there was no time for it.
    """
    began = time.monotonic()
    left = deadline - began
    if left <= 0:
        return {"seed": seed, "seconds": 0.0, "cut_off": "the time was over before it began"}
    seconds = min(60 * minutes, max(left - 60 * RESERVED, left / 2))
    limit = min(seconds + 120 * RESERVED, left)
    own = folder / loop.replace(" ", "_")
    counts, said = processes.run(WORK, own, [module_of(loop), str(seed), str(seconds / 60)], limit)
    found: dict[str, Any] = {"seed": seed, "seconds": round(time.monotonic() - began, 1)}
    if counts is not None:
        shutil.rmtree(own, ignore_errors=True)
        return {**found, "counts": counts}
    if said is not None:
        return {**found, "broken": said}
    why = f"it was to end after {duration(seconds)}"
    return {**found, **({"broken": f"it hung: {why}"} if limit - seconds >= 60 * RESERVED - 1e-6 else {"cut_off": why})}


def in_words(counts: dict[str, int | None]) -> str:
    """Counts in a line, what matters first."""
    first = ("faults", "survived", "silent")
    names = [*first, *sorted(counts.keys() - set(first))]
    return ", ".join(f"{'unknown' if counts[name] is None else format(counts[name], ',')} {name}" for name in names)


def told(found: dict[str, Any]) -> str:
    """How a loop ended, in a line."""
    if "counts" in found:
        return in_words(found["counts"])
    return f"BROKEN: {found['broken']}" if "broken" in found else f"CUT OFF: {found['cut_off']}"


def say(what: str, seconds: float, words: str) -> None:
    """Print a line of the table."""
    print(f"{what:<14} {duration(seconds):>10}  {words}", flush=True)


def run_all(
    processes: Processes, executor: ThreadPoolExecutor, chosen: list[str], seed: int, minutes: float, folder: Path
) -> dict[str, Any]:
    """Run the loops, and print a line as each ends.

    Returns:
        the figures to keep.
    """
    began = time.monotonic()
    deadline = began + 60 * minutes
    modules = sorted({module_of(loop) for loop in chosen})
    reasons, said = executor.submit(processes.run, CHECK, folder / "check", modules, 60 * minutes).result()
    if reasons is None:
        sys.exit(f"no loop can be run here: {said or 'the time was over before that was known'}")
    skipped = {loop: reason for loop in chosen if (reason := reasons[module_of(loop)])}
    chosen = [loop for loop in chosen if loop not in skipped]
    lanes = min(AT_ONCE, len(chosen))
    shares = sum(LOOPS[loop] for loop in chosen) / max(lanes, 1)
    longest = max((LOOPS[loop] for loop in chosen), default=0)
    unit = max((deadline - time.monotonic()) / 60 - RESERVED, 0) / max(shares, longest, 1e-9)
    print(f"seed {seed}: {', '.join(chosen)}; {minutes:g} minutes at most", flush=True)
    for loop, reason in skipped.items():
        print(f"{loop:<14} SKIPPED: {reason}", flush=True)
    running = {}
    for loop in chosen:
        own = seed + list(LOOPS).index(loop)
        running[executor.submit(run_loop, processes, loop, own, unit * LOOPS[loop], folder, deadline)] = loop
    found = {}
    for future in as_completed(running):
        loop = running[future]
        found[loop] = future.result()
        say(loop, found[loop]["seconds"], told(found[loop]))
    broken = [loop for loop, each in found.items() if "broken" in each]
    counts = [each["counts"] for each in found.values() if "counts" in each]
    total: dict[str, int | None] = {name: sum(each[name] for each in counts) for name in ("faults", "survived", "silent")}
    if broken:
        total["silent"] = None  # what a broken loop counted is lost
    say("all", time.monotonic() - began, in_words(total))
    spent = round((time.monotonic() - began) / 60, 1)
    return {"seed": seed, "minutes": spent, **total, "broken": broken, "loops": found, "skipped": skipped}


def main() -> None:
    """Run the loops, and keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loops", nargs="*", metavar="LOOP", help=f"one or more of {', '.join(LOOPS)}; all when none is named")
    parser.add_argument("--seed", type=int, help="of the first run of each loop; drawn when it is not given")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long all of it may take")
    options = parser.parse_args()
    unknown = sorted(set(options.loops) - LOOPS.keys())
    if unknown or not options.minutes > RESERVED:
        parser.error(f"no such loop: {', '.join(unknown)}" if unknown else f"it takes more than {RESERVED:g} minutes")
    seed = random.randrange(2**31) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=work_folder())).resolve()
    processes, executor = Processes(), ThreadPoolExecutor(AT_ONCE)
    figures: dict[str, Any] = {"broken": []}
    try:
        for each in SIGNALS:
            signal.signal(each, stop)
        try:
            figures = run_all(
                processes, executor, list(dict.fromkeys(options.loops)) or list(LOOPS), seed, options.minutes, folder
            )
        finally:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
            executor.shutdown(wait=False, cancel_futures=True)
            processes.end()
            executor.shutdown()
            if not figures["broken"]:
                shutil.rmtree(folder, ignore_errors=True)
    except Stopped as stopped:
        number = signal.Signals(stopped.args[0])
        print(f"STOPPED by {number.name} (seed {seed}): all that was at work is ended, nothing is kept", flush=True)
        sys.exit(128 + number)
    measurement.keep("torture", figures)
    if figures["broken"]:
        print(f"The files of what is broken are in {folder}: delete it when you have seen them")
    if figures["broken"] or figures["silent"]:
        sys.exit(f"BROKEN: {', '.join(figures['broken']) or 'silent errors'} (seed {seed})")


if __name__ == "__main__":
    main()
