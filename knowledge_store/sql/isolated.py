"""A query in a process of its own, for SQL that comes from somebody else (see `isolation.child`).

DuckDB looks at its limits of memory and time between rows. One long expression (`repeat('x', 2000000000)`, a list of a billion
numbers, two long strings compared) goes past both. So such SQL is read, run and put into words by a child, whose memory and
time the system limits. DuckDB's own limit is four fifths of the memory: it can then still say what it lacked.

Before, the child opens the store, which may be somebody else's too, and has limits of its own for that: generous ones
(OPENING_MEMORY, OPENING_TIME, or the query's where those are larger), since a large store whose index is out of date takes its
time. Once the index is written, it can enlarge no file.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from typing import IO, TYPE_CHECKING, Any, cast

from knowledge_store import errors
from knowledge_store.format.layout import STORE_FILE
from knowledge_store.isolation import child as isolation
from knowledge_store.isolation.child import (
    MAX_MEMORY_LIMIT,
    MAX_SECONDS,
    Child,
    Killed,
    Report,
    forbid_files,
    limit,
    load_arrow,
    started,
)
from knowledge_store.sql.answers import Format, write_answer
from knowledge_store.sql.excerpt import excerpt
from knowledge_store.sql.limits import broken, check_limits, interrupted, not_opened
from knowledge_store.sql.named_files import checked_files
from knowledge_store.sql.parameters import check_json, plain_parameters
from knowledge_store.sql.progress import ReadStorage, reported
from knowledge_store.sql.served import served_batches
from knowledge_store.sql.statement import Statement
from knowledge_store.storage import Storage, open_storage
from knowledge_store.storage.served.address import is_served
from knowledge_store.storage.served.client import ServedStorage

if TYPE_CHECKING:
    import pyarrow as pa

ANSWER = "knowledge_store.sql.isolated:answer"  # the child's task
ARROW, SCHEMAS = "arrow", "schemas"
EXCERPT = "excerpt"  # the JSON of `sql.excerpt`, with progress
DUCKDB_SHARE = 0.8
OPENING_MEMORY = isolation.MEMORY_LIMIT
OPENING_TIME = 300.0
OPENED = "opened"
STOPPED_WITHIN = 0.1  # seconds


Remark = Callable[[str], None]
Begin = Callable[[Child], None]


def silent(what: object) -> None:
    """Hears, and does nothing."""


@contextmanager
def asked(store: str, statement: Statement, form: str, remark: Remark = silent, begin: Begin = silent) -> Iterator[IO[bytes]]:
    """Ask a store in a process of its own, which ends with this context, and with the thread that entered it.

    Args:
        store: its address.
        statement: what is asked, and its limits.
        form: ARROW (an Arrow stream), SCHEMAS (as of `isolated_schemas`), or a Format.
        remark: called with what a person should know of the answer.
        begin: gets the process when it begins.

    Yields:
        the answer, as it comes.

    Raises:
        InputError: a limit, a parameter or a file cannot be used.
        KnowledgeStoreError: as `KnowledgeStore.open` and `KnowledgeStore.sql`, when all there is of the answer was read.
    """
    check_limits(statement.memory_limit, statement.timeout)
    if is_served(store):
        with _asked_server(store, statement, Format(form), remark) as text:
            yield text
        return
    with started(ANSWER, _request(store, statement, form)) as child:
        begin(child)
        yield child.answer
        sentence = _result(child, statement)
        if sentence:
            remark(sentence)


def _request(store: str, statement: Statement, form: str) -> dict[str, Any]:
    """What the child is told (InputError: a parameter or a file cannot be used)."""
    values = plain_parameters(statement.parameters)
    check_json(values)
    return {
        "store": store, "sql": statement.sql, "form": form, "parameters": values, "kept": statement.kept,
        "memory_limit": int(min(statement.memory_limit, MAX_MEMORY_LIMIT)), "timeout": min(statement.timeout, MAX_SECONDS),
        "files": checked_files(statement.files),
    }  # fmt: skip


def _result(child: Child, statement: Statement, hear: Report = silent) -> Any:
    states: set[str] = set()

    def note(report: dict[str, Any]) -> None:
        states.add(report.get("state", ""))
        hear(report)

    try:
        return child.result(note)
    except Killed as killed:
        if OPENED not in states:
            time, memory = max(statement.timeout, OPENING_TIME), max(statement.memory_limit, OPENING_MEMORY)
            raise not_opened(time, memory, f"the process ended by {killed}") from None
        if killed.signal == signal.SIGALRM:
            raise interrupted(statement.timeout) from None
        raise broken(str(killed), statement.memory_limit) from None


def isolated_excerpt(
    store: str, statement: Statement, stopped: threading.Event, hear: Callable[[int, int], None]
) -> dict[str, Any] | None:
    """The beginning of an answer (see `sql.excerpt`), from a process of its own.

    Args:
        store, statement: as of `asked`.
        stopped: set by another thread, it ends the process.
        hear: called now and then with how many bytes of the tables that are read have been passed, and of how many.

    Returns:
        the excerpt, with `remark`, what a person should know of it; None where it was stopped.

    Raises:
        as `asked`.
    """
    check_limits(statement.memory_limit, statement.timeout)
    if is_served(store):
        return _served_excerpt(store, statement, stopped)
    done = threading.Event()
    with started(ANSWER, _request(store, statement, EXCERPT)) as child:

        def stop_when_told() -> None:
            while not done.is_set():
                if stopped.wait(STOPPED_WITHIN):
                    child.kill()
                    return

        threading.Thread(target=stop_when_told, daemon=True).start()
        parts: list[bytes] = []
        reading = threading.Thread(target=lambda: parts.append(child.answer.read()), daemon=True)
        reading.start()
        try:
            remark = _result(child, statement, lambda report: _hear_progress(report, hear))
        except errors.KnowledgeStoreError:
            if stopped.is_set():
                return None
            raise
        finally:
            done.set()
        reading.join()
    return None if stopped.is_set() else {**json.loads(parts[0]), "remark": remark}


def _served_excerpt(store: str, statement: Statement, stopped: threading.Event) -> dict[str, Any] | None:
    """As `isolated_excerpt`, of a served store, which does not say how far it is."""
    remarks: list[str] = []
    with answered(open_storage(store), statement, remarks.append) as reader:
        found = excerpt(reader.schema, takewhile(lambda batch: not stopped.is_set(), reader))
    return None if stopped.is_set() else {**found, "remark": "; ".join(remarks)}


def _hear_progress(report: dict[str, Any], hear: Callable[[int, int], None]) -> None:
    if "read" in report:
        hear(report["read"], report["of"])


@contextmanager
def isolated_batches(
    store: str, statement: Statement, remark: Remark = silent, begin: Begin = silent
) -> Iterator[pa.RecordBatchReader]:
    """The answer to a statement, batch by batch as it comes, from a process of its own (see `asked`).

    The errors of the statement come when all there is of the answer was read, as this context ends.
    """
    import pyarrow as pa

    complete = False
    # Where the stream ends too soon, how the child ended says why.
    with (
        asked(store, statement, ARROW, remark, begin) as answer,
        suppress(pa.ArrowInvalid, OSError),
        pa.ipc.open_stream(answer) as reader,
    ):
        yield reader
        complete = True
    if not complete:
        raise errors.QueryError("this SQL was not answered in full")


@contextmanager
def answered(storage: Storage, statement: Statement, remark: Remark = silent) -> Iterator[pa.RecordBatchReader]:
    """As `isolated_batches`, of a storage; one that is served is asked where it is served, within the limits there."""
    if not isinstance(storage, ServedStorage):
        with isolated_batches(storage.address, statement, remark) as reader:
            yield reader
        return
    check_limits(statement.memory_limit, statement.timeout)
    if statement.files:
        raise errors.InputError(
            f"{storage.address} is a served store, and files of this machine are not read there: leave out"
            f" {', '.join(sorted(statement.files))}"
        )
    with served_batches(storage, statement, remark) as reader:
        yield reader


@contextmanager
def _asked_server(address: str, statement: Statement, form: Format, remark: Remark) -> Iterator[IO[bytes]]:
    """As `asked`, of a served store: the answer is put into words here."""
    remarks: list[str] = []
    with tempfile.TemporaryFile() as kept, answered(open_storage(address), statement, remarks.append) as reader:
        text = io.TextIOWrapper(kept, encoding="utf-8", newline="")
        written = write_answer(reader.schema, iter(reader), form, text)
        text.flush()
        kept.seek(0)
        yield kept
    for sentence in [written, *remarks]:
        if sentence:
            remark(sentence)


def check_answered(storage: Storage) -> None:
    """Make sure that another process can answer SQL over a storage (InputError: none can open it)."""
    if not isinstance(storage, ServedStorage):
        storage.external_address(STORE_FILE)


def isolated_answer(storage: Storage, statement: Statement, remark: Remark = silent) -> pa.Table:
    """`run_query` in a process of its own, which opens the store again (see `asked`)."""
    with answered(storage, replace(statement, kept=True), remark) as reader:
        table: pa.Table = reader.read_all()
    return table


def isolated_schemas(store: str, memory_limit: float, timeout: float, begin: Begin = silent) -> dict[str, pa.Schema]:
    """The columns of a store's relations, by their names, found in a process of its own (raises as `asked`)."""
    import pyarrow as pa

    with asked(store, Statement("SHOW TABLES", memory_limit, timeout), SCHEMAS, begin=begin) as answer:
        schemas: dict[str, str] = json.loads(answer.read() or b"{}")
    return {name: pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(text))) for name, text in schemas.items()}


def answer(request: dict[str, Any], outlet: IO[bytes], report: Report) -> str | None:
    """The child's task: answer one statement. Returns what a person should know of the answer."""
    import pyarrow as pa

    from knowledge_store.catalogue.dumps import open_dumps
    from knowledge_store.sql.query import Query, connect

    memory_limit, timeout = request["memory_limit"], request["timeout"]
    load_arrow()
    limit(max(memory_limit, OPENING_MEMORY), max(timeout, OPENING_TIME))
    storage = ReadStorage(open_storage(request["store"]))
    try:
        dumps = open_dumps(cast(Storage, storage))
    except MemoryError:
        raise not_opened(max(timeout, OPENING_TIME), max(memory_limit, OPENING_MEMORY), "it needs more memory") from None
    os.environ.pop("HOME", None)  # DuckDB's messages would name it
    with connect(DUCKDB_SHARE * memory_limit) as connection:
        forbid_files()
        report({"state": OPENED})  # before the clock begins: however short the time is, it is the query's
        limit(memory_limit, timeout)
        try:
            kept = memory_limit if request["kept"] else None
            query = Query(connection, dumps, request["sql"], kept, request["parameters"], request["files"])
            remark = None
            if request["form"] == EXCERPT:
                with reported(storage, dumps.file_sizes(), report):
                    outlet.write(json.dumps(excerpt(*query.answer())).encode())
            elif request["form"] == SCHEMAS:
                columns = {name: found.serialize().to_pybytes().hex() for name, found in query.schemas().items()}
                outlet.write(json.dumps(columns).encode())
            elif request["form"] == ARROW:
                schema, batches = query.answer()
                with pa.ipc.new_stream(outlet, schema) as writer:
                    for batch in batches:
                        writer.write_batch(batch)
            else:
                schema, batches = query.answer()
                text = io.TextIOWrapper(outlet, encoding="utf-8", newline="")
                remark = write_answer(schema, batches, Format(request["form"]), text)
                text.flush()
                text.detach()
            outlet.flush()
            sentences = [remark] if remark else []
            remark = "; ".join([*sentences, *dumps.remarks])
        except errors.KnowledgeStoreError:
            raise
        except Exception as error:  # SQL from anybody may find ways to fail that nobody thought of
            raise errors.QueryError(f"this SQL was not answered: {type(error).__name__}: {str(error)[:1000]}") from None
        return remark
