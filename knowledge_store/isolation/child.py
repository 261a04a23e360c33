"""A task in a process of its own, for what comes from somebody else: whatever it does, it ends with its limits.

Libraries look at limits of memory and time now and then, or never. One long SQL expression goes past DuckDB's; a Parquet file
of a few kilobytes may stand for many gigabytes; a fault in a library would take its process along. So a child, a new Python
that has nothing of its parent's, does such work:

* The system refuses it memory beyond its limit (RLIMIT_DATA: what it writes to, beside what it took before).
* The system ends it when its time is over (SIGALRM, which nothing handles): the clock stands still only while the child waits
  for whoever reads the answer.
* It leaves no core, and a task may forbid it to enlarge files (`forbid_files`).
* It is killed when its parent is done with it (an error, Ctrl-C), and ends when its parent is gone: Linux kills it. Elsewhere
  a thread of its own ends it, which has to wait where a library keeps Python's lock.

macOS has RLIMIT_DATA and does not heed it: there, memory is limited by what libraries promise; all else holds.

A task is a function `task(request, answer, report)`: `request` is a dict of JSON values, what it writes to the file `answer` is
read by the parent as it comes, `report` takes dicts of JSON values that the parent hears, and it returns a JSON value. It sets
its own limits (`limit`) before it looks at anything. The request comes as one line on standard input; reports, and last how it
ended, are lines of standard error. The parent loads none of the libraries that the task needs.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import IO, Any

from knowledge_store import errors

MEMORY_LIMIT = 4 * 2**30  # bytes, of a child that opens or reads a store
MAX_MEMORY_LIMIT = 2**50  # limits take no more
MAX_SECONDS = 1e8  # timers take no more
PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h

Report = Callable[[dict[str, Any]], None]
Task = Callable[[dict[str, Any], IO[bytes], Report], Any]


class Killed(Exception):
    """The child did not come to its end.

    Attributes:
        signal: what ended it: SIGALRM where its time was over.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class Child:
    """A child at work on a task; see `started`.

    Attributes:
        answer: what it writes, as it comes.
    """

    def __init__(self, process: subprocess.Popen[bytes]):
        assert process.stdout and process.stderr
        self._process, self._reports = process, process.stderr
        self.answer: IO[bytes] = process.stdout

    def kill(self) -> None:
        """End it, from any thread."""
        self._process.kill()

    def result(self, hear: Report = lambda report: None) -> Any:
        """What the task returned. Hear its reports until it ends; read the answer first, if it writes one.

        Raises:
            KnowledgeStoreError: what the task raised.
            MemoryError: the task needed more memory than it may.
            Killed: the system ended it.
        """
        output = []
        ending: dict[str, Any] = {}
        for line in self._reports:
            try:
                message = json.loads(line)
                if "report" in message:
                    hear(message["report"])
                else:
                    ending = message
            except (ValueError, TypeError):
                output.append(line.decode(errors="replace"))
        code = self._process.wait()
        if code < 0:
            raise Killed(-code)
        if code > 0 or not ending:
            raise RuntimeError(f"a process that was to work apart failed:\n{''.join(output)}")
        if ending.get("error") == MemoryError.__name__:
            raise MemoryError(ending["message"])
        if ending.get("error"):
            raise getattr(errors, ending["error"])(ending["message"])
        return ending["result"]


@contextmanager
def started(task: str, request: dict[str, Any]) -> Iterator[Child]:
    """Start a child, which ends with this context, and with the thread that entered it.

    Args:
        task: a function, as "module:name".
        request: JSON values for it.
    """
    program = f"import sys; sys.path[:] = {sys.path!r}; from knowledge_store.isolation.child import main; main({os.getpid()})"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin
        try:
            with suppress(BrokenPipeError):  # how it ended says why
                process.stdin.write(json.dumps({"task": task, "request": request}).encode() + b"\n")
                process.stdin.flush()  # and not closed: the child ends when it is
            yield Child(process)
        finally:
            process.kill()


# In the child


def load_arrow() -> None:
    """Load Arrow before there is a limit: at its first allocation it takes a gigabyte of address space, most of it never used,
    and a limit that was there before would count it."""
    import pyarrow as pa
    import pyarrow.dataset

    pa.allocate_buffer(1)


def limit(memory: int, seconds: float) -> None:
    """From here on this process may take so many bytes more, and so many seconds. Said again, it begins again."""
    memory_in_use = 0
    if sys.platform == "linux":
        memory_in_use = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    allowed = memory_in_use + memory
    _, maximum = resource.getrlimit(resource.RLIMIT_DATA)  # left as it is: a later limit may be larger
    resource.setrlimit(resource.RLIMIT_DATA, (allowed if maximum == resource.RLIM_INFINITY else min(allowed, maximum), maximum))
    limit_time(seconds)


def limit_time(seconds: float) -> None:
    """From here on this process may take so many seconds."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, MAX_SECONDS))


def forbid_files() -> None:
    """From here on this process can enlarge no file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


class _PandasLeftOut(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is left out of this process", name=name)


def leave_out_pandas() -> None:
    """From here on this process has no pandas: nothing here uses it, and pyarrow imports it wherever it is installed, which
    takes longer than the rest of a short command."""
    sys.meta_path.insert(0, _PandasLeftOut())


class _Outlet(io.RawIOBase):
    """Where the answer goes. While its reader makes us wait, our time does not run."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        written = os.write(self._descriptor, data)
        signal.setitimer(signal.ITIMER_REAL, left)
        return written


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is written here: it ends when the parent does
    os._exit(1)


def _be_killed_with(parent: int) -> None:
    """Have Linux kill this process when its parent's thread that started it is gone, whatever this one is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:  # it was gone before that was said
            os._exit(1)


def main(parent: int) -> None:
    """The child of process `parent`: do what comes on standard input, and end."""
    _be_killed_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    leave_out_pandas()
    reports, answer = os.dup(2), io.BufferedWriter(_Outlet(os.dup(1)), 1 << 16)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # what libraries have to say there is no part of the answer
        os.dup2(nowhere, descriptor)
    message = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        os.write(reports, json.dumps(message).encode() + b"\n")

    try:
        module, name = message["task"].split(":")
        task: Task = getattr(import_module(module), name)
        ending = {"result": task(message["request"], answer, lambda report: say({"report": report}))}
        answer.flush()
    except (errors.KnowledgeStoreError, MemoryError) as error:
        known = type(error).__name__ if isinstance(error, errors.KnowledgeStoreError) else MemoryError.__name__
        ending = {"error": known, "message": str(error)}
    except Exception as error:  # there are ways to fail that nobody thought of, and the process is the task's alone
        message = f"a process that worked apart failed: {type(error).__name__}: {str(error)[:1000]}"
        ending = {"error": errors.KnowledgeStoreError.__name__, "message": message}
    say(ending)
    os._exit(0)  # at once, whatever state the task left its libraries in
