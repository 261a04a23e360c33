"""Real processes, many of them: a server that has imported torch once forks each in a moment."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from torture.heartbeat import wait_for

from knowledge_store.reporter import Reporter

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("teacher_dump.cli", "teacher_dump.dumping.repair", "teacher_dump.dumping.run", "teacher_dump.dumping.estimate"),
        *("teacher_dump.checking.run", "teacher_dump.checking.verdicts", "student_train.training.run", "stores"),
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
class Finished:
    """How a process ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A function at work in a process of its own; what it prints goes to files in `folder`."""

    def __init__(self, function: Callable[..., None], *arguments: object, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.err"
        self._out.touch()
        self.process: BaseProcess = _server.Process(target=_run, args=(function, arguments, str(self._out), str(self._err)))
        self.process.start()

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
    """A running `teacher-dump ARGUMENTS…`."""

    def __init__(self, *arguments: object, folder: Path):
        super().__init__(_teacher_dump, [str(each) for each in arguments], folder=folder)


def _run(function: Callable[..., None], arguments: tuple, out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    function(*arguments)


def _teacher_dump(arguments: list[str]) -> None:
    import torch

    from teacher_dump.cli import main

    torch.set_num_threads(1)
    sys.argv = ["teacher-dump", *arguments]
    main()
