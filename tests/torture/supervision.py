"""Runs a loop of faults in a process of its own, and ends it with all it started: at its end, when it hangs, or at a signal."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_store.quantities import duration

from . import heartbeat

TESTS = Path(__file__).resolve().parent.parent
RESERVED = 1.5  # minutes: a loop finishes its case when its time is over
ENDING = 10.0  # seconds that killed processes may take to be gone
TRACEBACK = 5.0  # seconds that a hanging process may take to say where it is
# What libfaketime (tests/torture/workers.py) leaves of a killed process.
FAKETIME_FILES = ("/dev/shm/faketime_shm_{}", "/dev/shm/sem.faketime_sem_{}")

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
import faulthandler, importlib, json, pathlib, sys
faulthandler.enable()
folder, result, module, seed, minutes = sys.argv[1:]
counts = importlib.import_module(f"torture.{module}").run(int(seed), float(minutes), pathlib.Path(folder))
pathlib.Path(result).write_text(json.dumps(counts))
"""


@dataclass(frozen=True)
class Ending:
    """How a piece of Python ended.

    Attributes:
        result: its result, None if it has none.
        output: what it printed.
        hung: why it was taken to hang, and at which case, None if it was not.
        cut_off: the case it was at when its time was over, None if it ended by itself.
    """

    result: Any = None
    output: str = ""
    hung: str | None = None
    cut_off: str | None = None


def adopt_orphans() -> None:
    """Have orphans of this process's children become its children, where the system can (Linux), so that it can end them."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


class Processes:
    """Pieces of Python at work, each in a session of its own, so that it is ended with everything it started."""

    def __init__(self, spinning: float = heartbeat.SPINNING, idle: float = heartbeat.IDLE) -> None:
        """Begin with none.

        Args:
            spinning, idle: see `heartbeat.Watch`.
        """
        self._spinning, self._idle = spinning, idle
        self._running: set[subprocess.Popen[bytes]] = set()
        self._over = False
        self._lock = threading.Lock()

    def run(self, code: str, folder: Path, arguments: list[str], seconds: float) -> Ending:
        """Run one.

        Args:
            folder: a folder for it, to be made.
            arguments: what it is given after its folder and the file for its result.
            seconds: after how long it is cut off.
        """
        own, cache, temporary = (folder / name for name in ("own", "cache", "tmp"))
        for each in (folder, own, temporary):
            each.mkdir()
        result, output, case = folder / "result.json", folder / "output", folder / "case"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
        environment |= {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary), heartbeat.FILE: str(case)}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", code, str(own), str(result), *arguments]
        with self._lock, output.open("wb") as file:
            if self._over:
                return Ending(cut_off="")
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            self._running.add(process)
        hung = cut_off = None
        try:
            watch = heartbeat.watch_session(process.pid, case, self._spinning, self._idle)
            until = time.monotonic() + seconds
            while process.poll() is None and hung is None and cut_off is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(min(1, until - time.monotonic()), 0))
                    break
                if time.monotonic() >= until:
                    cut_off = watch.case
                elif reason := watch.hung():
                    hung = f"{reason} at {watch.case!r}" if watch.case else reason
                    process.send_signal(signal.SIGABRT)  # a loop prints where it is, and ends
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(TRACEBACK)
        finally:
            _end(process)
            with self._lock:
                self._running.discard(process)
            _unmount(own)
        found = json.loads(result.read_text()) if result.exists() else None
        printed = output.read_text(errors="replace").strip()
        return Ending(found, printed or f"it printed nothing, and ended with {process.returncode}", hung, cut_off)

    def end(self) -> None:
        """End all that run, and begin none any more."""
        with self._lock:
            self._over = True
            running = list(self._running)
        for process in running:
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


def module_of(loop: str) -> str:
    """The module in tests/torture that a loop is."""
    return loop.split()[0]


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
    own = folder / loop.replace(" ", "_")
    limit = min(seconds + 120 * RESERVED, left)
    ending = processes.run(WORK, own, [module_of(loop), str(seed), str(seconds / 60)], limit)
    found: dict[str, Any] = {"seed": seed, "seconds": round(time.monotonic() - began, 1)}
    if ending.result is not None:
        shutil.rmtree(own, ignore_errors=True)
        return {**found, "counts": ending.result}
    if ending.hung is not None:
        return {**found, "broken": f"it hung: {ending.hung}\n{ending.output}"}
    if ending.cut_off is not None:
        return {**found, "cut_off": f"it was to end after {duration(seconds)}, and was at {ending.cut_off!r}"}
    return {**found, "broken": ending.output}
