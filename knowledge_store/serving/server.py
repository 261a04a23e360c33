"""The Flight server: every call is let in by its token, counted, logged, limited and answered.

A client asks for files and facts by actions, for sequences and answers to SQL by tickets. What other clients ask for, ADBC's
among them, is Flight SQL (`flight_sql`).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import flight

from knowledge_store.errors import InputError, KnowledgeStoreError, QueryError
from knowledge_store.reading.transfer import received_bytes
from knowledge_store.serving.flight_sql import FlightSql
from knowledge_store.serving.limits import STALLED, Slots, Watch
from knowledge_store.serving.metrics import Call, Log, Metrics, resident_bytes
from knowledge_store.serving.queries import Queries
from knowledge_store.serving.requests import MAX_REQUEST, from_bytes
from knowledge_store.serving.sequences import SequenceStreams
from knowledge_store.serving.served import ServedStore, row_groups_bytes, table_bytes
from knowledge_store.sql.parameters import Parameters
from knowledge_store.sql.statement import Statement
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.messages import BusyError, flight_error
from knowledge_store.storage.served.tokens import TokenFile

CALLER = "caller"
STREAM_PATIENCE = 20.0  # seconds that one call more than there are slots waits
QUERY_PATIENCE = 2.0
ENDING_PATIENCE = 5.0

_SQL_SHAPE = {"sql": str, "memory_limit": int, "timeout": float}


@dataclass(frozen=True)
class Caller:
    """Who calls: the name of the token, and the store that the call names, empty for the only one."""

    name: str
    store: str


class _CallerMiddleware(flight.ServerMiddleware):
    def __init__(self, caller: Caller):
        self.caller = caller


class _Gate(flight.ServerMiddlewareFactory):
    """Lets in calls that have a token; one of no call is looked at before."""

    def __init__(self, tokens: TokenFile, refused: Callable[[str, str], None]):
        self._tokens, self._refused = tokens, refused

    def start_call(self, info: Any, headers: Mapping[str, list[str]]) -> _CallerMiddleware:
        def header(name: str) -> str:
            values = [value for key, found in headers.items() if key.lower() == name for value in found]
            last = values[-1] if values else ""
            return last.decode("latin-1") if isinstance(last, bytes) else last

        given = header(messages.AUTHORIZATION)
        secret = given[len(messages.BEARER) :] if given.startswith(messages.BEARER) else ""
        name = self._tokens.holder(secret.strip())
        if name is None:
            reason = "this server does not know the token" if given else "this server asks for a token, and none was given"
            self._refused(str(info.method).rpartition(".")[2].lower(), reason)
            raise flight.FlightUnauthenticatedError(reason)
        return _CallerMiddleware(Caller(name, header(messages.STORE_HEADER)))


@dataclass(frozen=True)
class Limits:
    """Of a server.

    Attributes:
        streams: calls for sequences and files that are answered at once.
        queries: the same of SQL.
        memory_limit, timeout: the most bytes and seconds of a query.
        stalled: seconds after which a client that takes nothing is given up.
    """

    streams: int
    queries: int
    memory_limit: int
    timeout: float
    stalled: float = STALLED


class StoreServer(flight.FlightServerBase):
    """Serves stores from when it is made until `close`.

    Args:
        location: where, as Flight takes it; port 0 has the system choose one, which is `port` then.
        stores: by their names.
        tokens: who is let in.
        limits: of calls.
        certificate: chain and key of the server, PEM; None for no TLS.
        log: hears of each call that has ended.

    Raises (on construction):
        InputError: it cannot listen there.
    """

    def __init__(
        self,
        location: str,
        stores: Mapping[str, ServedStore],
        tokens: TokenFile,
        limits: Limits,
        log: Log,
        certificate: tuple[bytes, bytes] | None = None,
    ):
        self._stores, self._log = stores, log
        self.ended = False
        self.streams = Slots("streams", limits.streams, STREAM_PATIENCE)
        self.query_slots = Slots("queries", limits.queries, QUERY_PATIENCE)
        self._watch = Watch(limits.stalled)
        self._sequences = SequenceStreams(self.streams, self._watch)
        self._queries = Queries(self.query_slots, self._watch, limits.memory_limit, limits.timeout)
        self._flight_sql = FlightSql(self._queries)
        self.metrics = Metrics(
            {
                "streams_now": ("Calls for sequences and files that are being answered.", lambda: self.streams.taken),
                "streams_standing": ("Streams of sequences, most of which rest.", lambda: self._sequences.standing.taken),
                "queries_now": ("Queries that are being answered.", lambda: self.query_slots.taken),
                "streams_refused": ("Calls for sequences and files that found no slot, so far.", lambda: self.streams.refused),
                "queries_refused": ("Queries that found no slot, so far.", lambda: self.query_slots.refused),
                "resident_bytes": ("Memory that the server has in use.", resident_bytes),
            }
        )

        def refused(method: str, reason: str) -> None:
            Call(log, self.metrics, {"call": method, "who": None}).end("refused", reason)

        options: dict[str, Any] = {"middleware": {CALLER: _Gate(tokens, refused)}}
        if certificate is not None:
            options["tls_certificates"] = [certificate]
        os.environ.setdefault(*messages.QUIET)
        try:
            super().__init__(location, **options)
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the server cannot listen at {location}: {reason}; give another --bind") from None

    def close(self) -> None:
        """End all calls, and serve no more.

        A client that takes nothing of its answer is waited for `ENDING_PATIENCE` seconds. With such a one `ended` stays False,
        and the library keeps a thread that waits for it.
        """
        self._watch.close()
        # Flight waits for every call, however long, and hears no Ctrl-C meanwhile.
        ending = threading.Thread(target=self.shutdown, name="shutdown", daemon=True)
        ending.start()
        ending.join(ENDING_PATIENCE)
        self.ended = not ending.is_alive()

    # What Flight calls, each in a thread of its own

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        """Answer what is short."""
        with self._calls(context, action.type) as (call, store):
            body = action.body.to_pybytes() if action.body is not None else b""
            if len(body) > MAX_REQUEST:
                raise InputError(f"an action has at most {MAX_REQUEST:,} bytes")
            results = self._action(context, call, store, action.type, body)
            call.sent(sum(map(len, results)))
        return iter([flight.Result(result) for result in results])

    def do_get(self, context: Any, ticket: Any) -> flight.GeneratorStream:
        """Answer with a stream."""
        data = ticket.ticket
        with self._calls(context, "ticket", ends=False) as (call, store):
            if len(data) > MAX_REQUEST:
                raise InputError(f"a ticket has at most {MAX_REQUEST:,} bytes")
            if not data.startswith(b"{"):
                call.facts["call"] = "flight-sql"
                return self._stream(call, self._flight_sql.answer(context, call, store, data))
            call.facts["call"] = "sql"
            return self._stream(call, self._sql(context, call, store, data))

    def get_flight_info(self, context: Any, descriptor: Any) -> flight.FlightInfo:
        """Say where the answer to a command of Flight SQL is: here."""
        with self._calls(context, "flight-info") as (call, _):
            command = _command(descriptor)
            return flight.FlightInfo(None, descriptor, [self._flight_sql.endpoint(call, command)], -1, -1)

    def get_schema(self, context: Any, descriptor: Any) -> flight.SchemaResult:
        """Say which columns a command of Flight SQL answers with."""
        with self._calls(context, "schema") as (call, store):
            return flight.SchemaResult(self._flight_sql.schema(context, call, store, _command(descriptor)))

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Take the parameters of a prepared statement; all else would write."""
        with self._calls(context, "put") as (call, _):
            writer.write(pa.py_buffer(self._flight_sql.bound(call, _command(descriptor), reader)))

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Send sequences as they are asked for."""
        with self._calls(context, "sequences") as (call, store):
            self._sequences.answer(context, call, store, _command(descriptor), reader, writer)

    def list_flights(self, context: Any, criteria: Any) -> Iterator[flight.FlightInfo]:
        """There are none: what there is says SQL."""
        with self._calls(context, "flights"):
            return iter(())

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        """Nothing for people to call."""
        with self._calls(context, "actions"):
            return []

    # How

    def _calls(self, context: Any, what: str, *, ends: bool = True) -> _Calls:
        return _Calls(self, context, what[:100], ends)

    def began(self, context: Any, what: str) -> tuple[Call, ServedStore]:
        """A call that begins, and the store that it is about (InputError: there is no such store, or it names none)."""
        caller = context.get_middleware(CALLER).caller
        facts = {"call": what.removeprefix("knowledge-store."), "who": caller.name, "peer": context.peer()}
        call = Call(self._log, self.metrics, facts)
        names = ", ".join(self._stores)
        if not caller.store and len(self._stores) == 1:
            return call, next(iter(self._stores.values()))
        if caller.store not in self._stores:
            found = f"no store named {caller.store!r} is" if caller.store else "several stores are"
            call.facts["call"] = "other"
            call.end("refused", "no such store")
            missing = "" if caller.store else ", and none was named"
            raise flight_error(
                InputError(
                    f"{found} served here{missing}: put one of {names} behind the address, or into the header"
                    f" {messages.STORE_HEADER} of a client by ADBC"
                )
            )
        call.facts["store"] = caller.store
        return call, self._stores[caller.store]

    def _stream(self, call: Call, parts: Iterator[Any]) -> flight.GeneratorStream:
        """What is sent of parts, of which the first is the schema."""
        guarded = self._guarded(call, parts)
        return flight.GeneratorStream(next(guarded), guarded)

    def _guarded(self, call: Call, parts: Iterator[Any]) -> Iterator[Any]:
        try:
            for number, part in enumerate(parts):
                if number:
                    batch = part[0] if isinstance(part, tuple) else part
                    call.sent(received_bytes(batch))
                yield part
            call.end("ok")
        except GeneratorExit:
            call.end("cancelled")
            raise
        except Exception as error:
            raise _told(call, error) from None
        finally:
            parts.close()  # type: ignore[attr-defined]

    def _sql(self, context: Any, call: Call, store: ServedStore, ticket: bytes) -> Iterator[Any]:
        request = from_bytes(ticket, _SQL_SHAPE)
        parameters: Parameters | None = request.get("parameters")
        if not (parameters is None or isinstance(parameters, (list, dict))):
            raise InputError("the parameters of a statement are a list, or have names")
        kept = bool(request.get("kept"))
        statement = Statement(request["sql"], request["memory_limit"], request["timeout"], parameters, kept=kept)
        schema = None
        remarks: list[str] = []
        for part in self._queries.answer(context, call, store, statement, remarks.append):
            if schema is None:
                schema = part
            yield part
        yield pa.RecordBatch.from_pylist([], schema=schema), json.dumps(remarks).encode()

    def _action(self, context: Any, call: Call, store: ServedStore, what: str, body: bytes) -> list[bytes]:
        if what == messages.OPEN:
            from_bytes(body, {"version": int})
            dumps = store.open()
            closed = {name: [type(error).__name__, str(error)] for name, error in dumps.closed.items()}
            facts = {"version": messages.VERSION, "dumps": list(dumps.manifests), "closed": closed}
            return [json.dumps(facts).encode(), table_bytes(dumps.index.shards), table_bytes(dumps.index.files)]
        if what in (messages.READ, messages.SIZE, messages.FILES, messages.FOLDERS):
            request = from_bytes(body, {"name": str})
            call.facts["file"] = name = request["name"][:300]
            if what == messages.SIZE:
                return [json.dumps(store.size(name)).encode()]
            if what == messages.FILES:
                return [json.dumps([[entry.name, entry.size, entry.version] for entry in store.files(name)]).encode()]
            if what == messages.FOLDERS:
                return [json.dumps(store.folders(name)).encode()]
            span = from_bytes(body, {"start": int, "end": int})
            start, end = max(span["start"], 0), span["end"]
            give_back = self.streams.take()
            try:
                return [store.read(name, start, max(start, min(end, start + messages.MAX_READ)))]
            finally:
                give_back()
        if what == messages.ROW_GROUPS:
            request = from_bytes(body, {"dump": str, "snapshot": int})
            with store.reader(request["dump"], request["snapshot"]) as reader:
                return [row_groups_bytes(reader)]
        call.facts["call"] = "flight-sql-action"
        return self._flight_sql.action(context, call, store, what, body)


class _Calls:
    """A call from its beginning to its end, or to the beginning of its stream: what goes wrong is told, and logged."""

    def __init__(self, server: StoreServer, context: Any, what: str, ends: bool):
        self._server, self._context, self._what, self._ends = server, context, what, ends

    def __enter__(self) -> tuple[Call, ServedStore]:
        self._call, store = self._server.began(self._context, self._what)
        return self._call, store

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise _told(self._call, error) from None
        if self._ends:
            self._call.end("ok")


def _told(call: Call, error: Exception) -> flight.FlightError:
    """What a client is told of an error; whoever runs the server is told in the log."""
    known = isinstance(error, (KnowledgeStoreError, flight.FlightError))
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    outcome = "failed"
    if isinstance(error, (BusyError, InputError, QueryError)):
        outcome = "refused"
    elif isinstance(error, flight.FlightCancelledError):
        outcome = "cancelled"
    call.end(outcome, reason[:500])
    return flight_error(error)


def _command(descriptor: Any) -> bytes:
    """The command of a descriptor (InputError: it is a path)."""
    if descriptor.descriptor_type != flight.DescriptorType.CMD:
        raise InputError("a served store knows commands of Flight SQL, and no paths")
    command: bytes = descriptor.command
    if len(command) > MAX_REQUEST:
        raise InputError(f"a command has at most {MAX_REQUEST:,} bytes")
    return command
