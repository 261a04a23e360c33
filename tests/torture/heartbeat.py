"""Tells a process that hangs from one that is slow because its machine has other things to do.

The clock cannot tell them apart. A process hangs when the case it is at takes far more processor time than any case needs (it
spins), or when it and all it started take none, though no other process keeps them from it (it waits for what never comes).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

FILE = "TORTURE_HEARTBEAT"  # the environment variable that names the file of `beat`
LENGTH = 400  # bytes of the name of a case
SPINNING = 60.0  # seconds of processor time for one case of a loop, which takes a few at most
PROCESS_SPINNING = 300.0  # seconds of processor time for all that one worker process does, training a little model included
IDLE = 60.0  # seconds
PATIENCE = 1000.0  # seconds for what no watch is kept over: only so that nothing waits for ever
ACTIVE = 0.01  # share of one processor; what wakes up now and then to look whether it may go on takes less

_descriptor: int | None = None


def beat(case: str) -> None:
    """Say which case begins, so that the one before it is done. Does nothing in a process that nobody watches."""
    global _descriptor
    if FILE not in os.environ:
        return
    if _descriptor is None:
        _descriptor = os.open(os.environ[FILE], os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(_descriptor, case.encode(errors="replace")[:LENGTH].ljust(LENGTH), 0)


@dataclass(frozen=True)
class Reading:
    """What is known of a process and of all it started, at one moment.

    Attributes:
        clock: in seconds, of a clock that never goes back.
        case: the case it is at.
        own: seconds of processor time that each of the processes took by itself, by process.
        total: seconds of processor time that all took, those that ended included.
        ready: one of them runs, or waits for a processor or a disk.
    """

    clock: float
    case: str
    own: dict[int, float]
    total: float
    ready: bool


@dataclass
class Watch:
    """Watches a process and what it started; ask `hung` about once a second.

    Attributes:
        read: what gives a Reading.
        spinning: seconds of processor time that one process may take for one case.
        idle: seconds in which all of them may take no processor time.
    """

    read: Callable[[], Reading]
    spinning: float = SPINNING
    idle: float = IDLE
    _began: Reading = field(init=False)  # when the case began
    _active: Reading = field(init=False)  # when something was last done

    def __post_init__(self) -> None:
        self._began = self._active = self.read()

    @property
    def case(self) -> str:
        """The case that the process was at when it was last looked at."""
        return self._began.case

    def hung(self) -> str | None:
        """Why the process is taken to hang; None when it is not."""
        now = self.read()
        if now.case != self._began.case:
            self._began = self._active = now
            return None
        used = max((seconds - self._began.own.get(pid, 0) for pid, seconds in now.own.items()), default=0)
        if used > self.spinning:
            return f"it used {used:.0f} s of processor time"
        done = now.total - self._active.total
        if now.ready or done < 0 or done > ACTIVE * self.idle:  # less than before: one of them is gone
            self._active = now
        if now.clock - self._active.clock > self.idle:
            return f"it used no processor time for {now.clock - self._active.clock:.0f} s"
        return None


def watch_tree(pid: int, spinning: float = SPINNING, idle: float = IDLE) -> Watch:
    """Watch a process and its descendants; all it does is one case."""

    def processes() -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            return [process, *process.children(recursive=True)]
        return []

    return Watch(lambda: _reading("", processes()), spinning, idle)


def wait_for(pid: int, ended: Callable[[], bool], spinning: float = PROCESS_SPINNING, idle: float = IDLE) -> str | None:
    """Wait until `ended` says that a process has ended, or until the process hangs.

    Args:
        spinning, idle: see `Watch`.

    Returns:
        why it is taken to hang; None when it ended.
    """
    pause, watch, looked = 0.001, watch_tree(pid, spinning, idle), time.monotonic()
    while not ended():
        time.sleep(pause)
        pause = min(1.1 * pause, 0.02)
        if time.monotonic() - looked > 1:
            looked = time.monotonic()
            if reason := watch.hung():
                return reason
    return None


def wait_until(condition: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for a moment in the life of another process.

    Args:
        condition: whether it has come.
        alive: whether it may still come.

    Raises:
        AssertionError: it did not come.
    """
    until = time.monotonic() + PATIENCE
    while not condition():
        assert alive() or condition(), "the process ended before that moment"
        assert time.monotonic() < until, f"the moment did not come in {PATIENCE:.0f} s"
        time.sleep(0.001)


def watch_session(pid: int, file: Path, spinning: float = SPINNING, idle: float = IDLE) -> Watch:
    """Watch all processes of the session that a process leads; the file is where that one says which case it is at."""

    def processes() -> Iterable[psutil.Process]:
        for each in psutil.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(each) == pid:
                    yield psutil.Process(each)

    def read() -> Reading:
        case = file.read_text(errors="replace").strip() if file.exists() else ""
        return _reading(case, processes())

    return Watch(read, spinning, idle)


def _reading(case: str, processes: Iterable[psutil.Process]) -> Reading:
    own, total, ready = {}, 0.0, False
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            times = process.cpu_times()
            own[process.pid] = times.user + times.system
            total += own[process.pid] + times.children_user + times.children_system
            ready = ready or process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return Reading(time.monotonic(), case, own, total, ready)
