"""A query in a process of its own, for SQL that comes from somebody else: whatever it does, it ends with its limits.

DuckDB looks at its limits of memory and time between rows. One long expression (`repeat('x', 2000000000)`, a list of a billion
numbers, two long strings compared) goes past both, and a fault in DuckDB would take its process along. So a stranger's SQL is
read, run and put into words by a child, a new Python that has nothing of its parent's:

* The system refuses it memory beyond its limit (RLIMIT_DATA: what it writes to, beside what it took before it saw the SQL).
  DuckDB is told four fifths of that, so as to say what it lacked while there is room to say it.
* Before, it opens the store, which may be a stranger's too, and has limits of its own for that: generous ones (OPENING_MEMORY,
  OPENING_TIME, or the query's where those are larger), since a large store whose index is out of date takes its time.
* The system ends it when its time is over (SIGALRM, which nothing handles): the clock stands still only while the child waits
  for whoever reads the answer.
* It can enlarge no file (RLIMIT_FSIZE), once the store's index is written, and leaves no core.
* It is killed when its parent is done with it (an error, Ctrl-C), and ends when its parent is gone: Linux kills it. Elsewhere
  a thread of its own ends it, which has to wait where DuckDB keeps Python's lock (while it plans a statement).

macOS has RLIMIT_DATA and does not heed it: there, memory is limited by DuckDB's own limit alone; all else holds.

The parent loads neither pyarrow nor DuckDB for that: while the child does, it would only take longer to begin.

The child writes the answer to its standard output, and last of all one line of JSON to its standard error: how it ended.
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
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from knowledge_store import errors
from knowledge_store.sql.answers import Format, write_answer
from knowledge_store.sql.limits import MAX_MEMORY_LIMIT, MEMORY_LIMIT, TIMEOUT, check_limits, interrupted
from knowledge_store.terminal.quantities import binary_size

if TYPE_CHECKING:
    import pyarrow as pa

ARROW = "arrow"
DUCKDB_SHARE = 0.8
MAX_SECONDS = 1e8  # seconds; timers take no more
OPENING_MEMORY = 4 * 2**30
OPENING_TIME = 300.0
OPENED = "opened"
PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h


@contextmanager
def asked(
    store: str | Path, sql: str, form: str, memory_limit: float, timeout: float, remark: Callable[[str], None]
) -> Iterator[IO[bytes]]:
    """Ask a store in a process of its own, which ends with this context, and with the thread that entered it.

    Args:
        store: its folder.
        sql: one SELECT statement, from anybody.
        form: ARROW (an Arrow stream), or a Format.
        memory_limit: in bytes, for all that the query needs, its answer and its text included.
        timeout: in seconds.
        remark: is told what a person should know of the answer.

    Yields:
        the answer, as it comes.

    Raises:
        InputError: a limit is none.
        KnowledgeStoreError: as `KnowledgeStore.open` and `KnowledgeStore.sql`, when all there is of the answer was read.
    """
    check_limits(memory_limit, timeout)
    limits = {"memory_limit": int(min(memory_limit, MAX_MEMORY_LIMIT)), "timeout": min(timeout, MAX_SECONDS)}
    request = json.dumps({"store": str(store), "sql": sql, "form": form, **limits})
    program = f"import sys; sys.path[:] = {sys.path!r}; from knowledge_store.isolation.child import main; main({os.getpid()})"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdin and child.stdout and child.stderr
        try:
            with suppress(BrokenPipeError):  # how it ended says why
                child.stdin.write(request.encode() + b"\n")
                child.stdin.flush()  # and not closed: the child ends when it is
            yield child.stdout
            report = child.stderr.read().decode(errors="replace")
            _check_end(child.wait(), report, memory_limit, timeout, remark)
        finally:
            child.kill()


def _check_end(code: int, report: str, memory_limit: float, timeout: float, remark: Callable[[str], None]) -> None:
    if code < 0 and OPENED not in report.splitlines():
        most = f"{max(timeout, OPENING_TIME):g} s and {binary_size(max(memory_limit, OPENING_MEMORY))}"
        raise errors.StoreError(
            f"the store could not be opened within {most} (the process ended by {signal.Signals(-code).name})"
        )
    if code == -signal.SIGALRM:
        raise interrupted(timeout)
    if code < 0:
        name, limit = signal.Signals(-code).name, binary_size(memory_limit)
        raise errors.QueryError(f"this SQL broke the process that ran it ({name}): it may need more memory than its {limit}")
    if code > 0:
        raise RuntimeError(f"the process that was to answer a query failed:\n{report}")
    ended = json.loads(report.splitlines()[-1])
    if ended.get("error"):
        raise getattr(errors, ended["error"])(ended["message"])
    if ended.get("remark"):
        remark(ended["remark"])


def isolated_answer(store: str, sql: str, memory_limit: int = MEMORY_LIMIT, timeout: float = TIMEOUT) -> pa.Table:
    """`run_query` in a process of its own, which opens the store anew (see `asked`)."""
    import pyarrow as pa

    child = asked(store, sql, ARROW, memory_limit, timeout, lambda _: None)
    # Where the stream ends too soon, how the child ended says why.
    with child as answer, suppress(pa.ArrowInvalid, OSError), pa.ipc.open_stream(answer) as reader:
        table: pa.Table = reader.read_all()
        return table
    raise errors.QueryError("this SQL was not answered in full")


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


def _limit(memory_limit: int, timeout: float) -> None:
    """From here on this process may take so many bytes more, and so many seconds."""
    taken = 0
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    allowed = taken + memory_limit
    _, most = resource.getrlimit(resource.RLIMIT_DATA)  # left as it is: the query may take more than opening does
    resource.setrlimit(resource.RLIMIT_DATA, (allowed if most == resource.RLIM_INFINITY else min(allowed, most), most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout)


def _answer(request: dict[str, Any], outlet: IO[bytes], report: int) -> str | None:
    """Do what was asked; before the SQL is looked at, the descriptor `report` is told so. Returns the remark."""
    import pyarrow as pa

    from knowledge_store.sql.query import Query, connect
    from knowledge_store.store import KnowledgeStore

    memory_limit, timeout = request["memory_limit"], request["timeout"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(max(memory_limit, OPENING_MEMORY), max(timeout, OPENING_TIME))
    try:
        store = KnowledgeStore.open(request["store"], cache_size=0)
    except MemoryError:
        raise errors.StoreError(f"{request['store']} needs more memory to be opened than such a store should") from None
    os.environ.pop("HOME", None)  # DuckDB's messages would name it
    with connect(DUCKDB_SHARE * memory_limit) as connection:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        os.write(report, f"{OPENED}\n".encode())  # before the clock begins: however short the time is, it is the query's
        _limit(memory_limit, timeout)
        query = Query(connection, *store.parts, request["sql"], memory_limit)
        schema, batches = query.answer()
        remark = None
        if request["form"] == ARROW:
            with pa.ipc.new_stream(outlet, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
        else:
            text = io.TextIOWrapper(outlet, encoding="utf-8", newline="")
            remark = write_answer(schema, batches, Format(request["form"]), text)
            text.flush()
        outlet.flush()
        return remark


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
    """The child of process `parent`: answer the request that comes on standard input, and end."""
    _be_killed_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    report, outlet = os.dup(2), io.BufferedWriter(_Outlet(os.dup(1)), 1 << 16)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # what libraries have to say there is no part of the answer
        os.dup2(nowhere, descriptor)
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        ended = {"remark": _answer(request, outlet, report)}
    except errors.KnowledgeStoreError as error:
        ended = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # a stranger's SQL may find ways to fail that nobody thought of: the process is his alone
        message = f"this SQL was not answered: {type(error).__name__}: {str(error)[:1000]}"
        ended = {"error": errors.QueryError.__name__, "message": message}
    os.write(report, json.dumps(ended).encode() + b"\n")
    os._exit(0)  # at once, whatever state the query left its libraries in
