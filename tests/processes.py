"""Real processes, many of them: a server that has imported torch once forks each in a moment."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from torture.heartbeat import PATIENCE, wait_for, wait_until

from knowledge_store.reporter import Reporter

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("teacher_dump.cli", "teacher_dump.dumping.repair", "teacher_dump.dumping.run", "teacher_dump.dumping.estimate"),
        *("teacher_dump.checking.run", "teacher_dump.checking.positions.verdicts", "teacher_dump.generation.parts"),
        *("student_train.training.run", "kinds"),
    ]
)


class Notes(Reporter):
    """A reporter that remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        """Remember it."""
        self.notes.append(sentence)


@dataclass(frozen=True)
class Moment:
    """When a process gets a signal: once `reached(folder)` is true, before it does anything more to a file of the folder.

    The process looks for itself, so that the moment is the same however busy the machine is.
    """

    folder: Path
    reached: Callable[[Path], bool]
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Finished:
    """How a process ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@contextmanager
def child_process(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A `Popen` that does not outlive its test, however that ends."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


class Running:
    """A function at work in a process of its own, in the environment of now; what it prints goes to files in `folder`."""

    def __init__(self, function: Callable[..., None], *arguments: object, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.err"
        self._out.touch()
        task = (function, arguments, dict(os.environ), str(self._out), str(self._err))
        self.process: BaseProcess = _server.Process(target=_run, args=task)
        self.process.start()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    def wait(self) -> Finished:
        """Wait for its end.

        Raises:
            AssertionError: it hangs.
        """
        assert self.process.pid is not None
        hung = wait_for(self.process.pid, lambda: self.process.exitcode is not None)
        assert hung is None, f"the process hangs: {hung}"
        error = self._err.read_text() if self._err.exists() else ""  # killed before it began
        return Finished(self.process.exitcode, self._out.read_text(), error)


class Command(Running):
    """A running `teacher-dump ARGUMENTS…` or another of the commands, which may get a signal at a moment of its life."""

    def __init__(self, *arguments: object, folder: Path, package: str = "teacher_dump", at: Moment | None = None):
        super().__init__(_command, package, [str(each) for each in arguments], at, folder=folder)

    def wait_until_stopped(self) -> None:
        """Wait until SIGSTOP has stopped it; SIGCONT lets it go on.

        Raises:
            AssertionError: it ends before that.
        """
        process = psutil.Process(self.process.pid)
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED, self.process.is_alive)


def _run(function: Callable[..., None], arguments: tuple, environment: dict[str, str], out: str, err: str) -> None:
    gc.freeze()  # what the server had imported
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    function(*arguments)


def run_ranks(count: int, function: Callable[..., None], *arguments: object, folder: Path) -> list[Finished]:
    """A function in each of some processes, which find their ranks in the environment; where one is killed, so are the others,
    as torchrun does both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Running(_rank, rank, count, port, function, arguments, folder=folder) for rank in range(count)]
    left = {running.process.sentinel: running.process for running in ranks}
    while left:
        ended = [left.pop(sentinel) for sentinel in wait(list(left), timeout=PATIENCE)]
        if not ended or any(process.exitcode < 0 for process in ended):  # they hang, or one was killed
            for process in left.values():
                process.kill()
    return [running.wait() for running in ranks]


def _rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(*arguments)


def _await(moment: Moment) -> None:
    looking, passed = threading.local(), threading.Event()

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.link", "os.rename", "os.remove", "os.mkdir") or passed.is_set() or hasattr(looking, "now"):
            return
        if any(isinstance(each, str | Path) and Path(each).is_relative_to(moment.folder) for each in arguments[:2]):
            looking.now = True
            if moment.reached(moment.folder):
                passed.set()
                os.kill(os.getpid(), moment.signal)
            del looking.now

    sys.addaudithook(watch)


def _command(package: str, arguments: list[str], at: Moment | None) -> None:
    import torch

    if at is not None:
        _await(at)
    torch.set_num_threads(1)
    sys.argv = [package.replace("_", "-"), *arguments]
    importlib.import_module(f"{package}.cli").main()
