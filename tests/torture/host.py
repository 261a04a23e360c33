"""Worker processes that are started in a moment, as often as need be: one that has imported everything forks each."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture.heartbeat import PATIENCE, wait_for

TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a worker ended.

    Attributes:
        returncode: as of `Popen`.
        acknowledged: what it said was done.
        message: its standard error.
        calls: the lines of strace, if it was traced.
    """

    returncode: int
    acknowledged: set[int]
    message: str
    calls: list[str]

    @property
    def injected(self) -> int:
        """How many calls were made to fail, or cut off."""
        return sum("(INJECTED)" in line for line in self.calls)


class Host:
    """Forks workers; close it after use."""

    def __init__(self, folder: Path, *modules: str):
        """Start it.

        Args:
            folder: for what workers and strace say.
            modules: imported once, so that no worker has to.
        """
        self.folder = folder
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", "from torture.host import serve; serve()", *modules]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *problem: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def ask(self, *request: Any) -> Any:
        """What the host answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def worker(self, work: str, *arguments: Any, prefix: str = "0", strace: list[str] | None = None) -> Worker:
        """Start a worker.

        Args:
            work, arguments: "module:function", called as function(acknowledge, *arguments).
            prefix: a hexadecimal digit. Workers with the same one give temporary files the same names.
            strace: trace it, with these options.
        """
        return Worker(self, work, arguments, prefix, strace)

    def run(self, work: str, *arguments: Any, prefix: str = "0", strace: list[str] | None = None) -> Outcome:
        """Start a worker and wait for its end."""
        return self.worker(work, *arguments, prefix=prefix, strace=strace).wait()


class Worker:
    """One process, traced or not."""

    def __init__(self, host: Host, work: str, arguments: tuple[Any, ...], prefix: str, strace: list[str] | None):
        self._host = host
        self._calls = host.folder / f"calls{prefix}"
        self._calls.unlink(missing_ok=True)
        self._strace: subprocess.Popen[str] | None = None
        errors, done = (str(host.folder / f"{name}{prefix}") for name in ("errors", "done"))
        self._errors, self._done = Path(errors), Path(done)
        self.pid = int(host.ask("start", work, arguments, prefix, errors, done))
        if strace is not None:
            command = ["strace", "-f", "-o", str(self._calls), *strace, "-p", str(self.pid)]
            self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert self._strace.stderr is not None
            line = self._strace.stderr.readline()
            if "attached" not in line:
                self.kill()
                self.wait()
                raise RuntimeError(f"strace: {line.strip()}")
        host.ask("go", self.pid)

    def kill(self) -> None:
        """Kill it, if it lives."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def calls(self) -> list[str]:
        """The lines of strace so far."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def wait(self) -> Outcome:
        """Wait for its end.

        Raises:
            AssertionError: it hangs.
        """
        returncode = self._host.ask("wait", self.pid)
        if self._strace is not None:
            self._strace.communicate(timeout=PATIENCE)
        message = self._errors.read_text()
        assert not isinstance(returncode, str), f"a worker hung: {returncode}: {message}"
        return Outcome(returncode, {int(line) for line in self._done.read_text().split()}, message, self.calls())

    def stopped(self) -> bool:
        """Wait until a signal stops it; False when it ends instead.

        Raises:
            AssertionError: it does neither.
        """
        reached = None

        def moment() -> bool:
            nonlocal reached
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "ZX":
                reached = False
            # Its tracer stops it for a moment at every call, too.
            if state in "tT" and any("--- stopped by SIGSTOP ---" in line for line in self.calls()):
                reached = True
            return reached is not None

        hung = wait_for(self.pid, moment)
        if hung is not None:
            self.kill()
            self.wait()
            raise AssertionError(f"a worker neither stopped nor ended: {hung}")
        return bool(reached)

    def go_on(self) -> None:
        """Let a stopped worker go on."""
        os.kill(self.pid, signal.SIGCONT)


def serve() -> None:
    """The host's own process: forks a worker for each request, one line of JSON each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    going: dict[int, int] = {}
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        answer: Any = None
        if request == "start":
            hold, let_go = os.pipe()
            answer = os.fork()
            if answer == 0:
                os.close(let_go)
                _work(hold, *arguments)
            os.close(hold)
            going[answer] = let_go
        elif request == "go":
            os.write(going[arguments[0]], b"g")
        elif request == "wait":
            os.close(going.pop(arguments[0]))
            answer = _ended(arguments[0])
        print(json.dumps(answer), flush=True)


def _ended(pid: int) -> int | str:
    """How a worker ended, or why it is taken to hang."""
    status: int | None = None

    def ended() -> bool:
        nonlocal status
        found, code = os.waitpid(pid, os.WNOHANG)
        status = code if found else None
        return bool(found)

    hung = wait_for(pid, ended)
    if hung is not None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return hung
    assert status is not None
    return os.waitstatus_to_exitcode(status)


def _work(hold: int, work: str, arguments: list[Any], prefix: str, errors: str, done: str) -> None:
    """The worker itself; never returns."""
    status = 1
    try:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: where Yama guards processes, strace may attach
        for path, descriptor in (("/dev/null", 0), ("/dev/null", 1), (errors, 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        acknowledged = os.open(done, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        predictable_names(prefix)
        module, _, function = work.partition(":")
        if os.read(hold, 1):
            getattr(importlib.import_module(module), function)(
                lambda number: os.write(acknowledged, f"{number}\n".encode()), *arguments
            )
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def predictable_names(prefix: str) -> None:
    """Give temporary files names that can be known beforehand, from now on in this process: it writes no name twice."""
    name = uuid.UUID(hex=prefix * 32)
    uuid.uuid4 = lambda: name


def nothing(acknowledge: Any) -> None:
    """Work that only says so."""
    acknowledge(7)
