"""Flight SQL, as far as a client takes it to ask a store: statements, prepared ones, and what relations there are.

The commands and the columns of their answers are those of the specification
(https://arrow.apache.org/docs/format/FlightSql.html). The server keeps nothing of a client: a prepared statement's handle is
the statement itself with its parameters, and a transaction is a word, since nothing is ever written.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from pyarrow import flight

from knowledge_store.errors import InputError, QueryError
from knowledge_store.serving.metrics import Call
from knowledge_store.serving.protobuf import Message, Value, message
from knowledge_store.serving.queries import Queries
from knowledge_store.serving.served import ServedStore
from knowledge_store.sql.parameters import check_json
from knowledge_store.sql.statement import Statement

TYPE_PREFIX = "type.googleapis.com/arrow.flight.protocol.sql."
CATALOGUE, SCHEMA, TABLE_TYPE = "memory", "main", "VIEW"  # what a statement finds the relations in, and what they are
TRANSACTION = b"reading"
CLOSED = 1  # a session is
SCHEMAS_KEPT = 256  # of statements: who prepares one again does not wait for its columns

_STRING, _BINARY, _INT = pa.string(), pa.binary(), pa.int32()
_INFO_VALUE = pa.dense_union([
    pa.field("string_value", _STRING), pa.field("bool_value", pa.bool_()), pa.field("bigint_value", pa.int64()),
    pa.field("int32_bitmask", _INT), pa.field("string_list", pa.list_(_STRING)),
    pa.field("int32_to_int32_list_map", pa.map_(_INT, pa.list_(_INT))),
])  # fmt: skip


def _columns(*columns: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable) for name, dtype, nullable in columns])


INFO = _columns(("info_name", pa.uint32(), False), ("value", _INFO_VALUE, False))
CATALOGUES = _columns(("catalog_name", _STRING, False))
SCHEMAS = _columns(("catalog_name", _STRING, True), ("db_schema_name", _STRING, False))
TABLES = _columns(
    ("catalog_name", _STRING, True), ("db_schema_name", _STRING, True), ("table_name", _STRING, False),
    ("table_type", _STRING, False),
)  # fmt: skip
TABLES_AND_COLUMNS = TABLES.append(pa.field("table_schema", _BINARY, False))
TABLE_TYPES = _columns(("table_type", _STRING, False))
KEYS = _columns(
    ("catalog_name", _STRING, True), ("db_schema_name", _STRING, True), ("table_name", _STRING, False),
    ("column_name", _STRING, False), ("key_name", _STRING, True), ("key_sequence", _INT, False),
)  # fmt: skip

STATEMENT, PREPARED, TICKET = "CommandStatementQuery", "CommandPreparedStatementQuery", "TicketStatementQuery"
_EMPTY = {"CommandGetPrimaryKeys": KEYS}  # a store's relations have none
_FIXED = {
    "CommandGetSqlInfo": INFO,
    "CommandGetCatalogs": CATALOGUES,
    "CommandGetDbSchemas": SCHEMAS,
    "CommandGetTableTypes": TABLE_TYPES,
    **_EMPTY,
}


class FlightSql:
    """Answers the commands.

    Args:
        queries: what statements are answered by.
    """

    def __init__(self, queries: Queries):
        self._queries = queries
        self._schemas: OrderedDict[tuple[str, str, int], pa.Schema] = OrderedDict()
        self._lock = threading.Lock()

    def endpoint(self, call: Call, data: bytes) -> flight.FlightEndpoint:
        """Where the answer to a command is: here, for a ticket that says it again."""
        name, command = _command(data)
        call.facts["command"] = name
        if name == STATEMENT:
            handle = _handle(command.text(1) or "")
            return flight.FlightEndpoint(_any(TICKET, [(1, handle)]), [])
        if name == PREPARED:
            handle = command.bytes(1) or b""
            _statement(handle)
            return flight.FlightEndpoint(_any(TICKET, [(1, handle)]), [])
        if name in _FIXED or name == "CommandGetTables":
            return flight.FlightEndpoint(data, [])
        raise InputError(_unknown(name))

    def schema(self, context: Any, call: Call, store: ServedStore, data: bytes) -> pa.Schema:
        """Which columns a command answers with."""
        name, command = _command(data)
        call.facts["command"] = name
        if name in _FIXED:
            return _FIXED[name]
        if name == "CommandGetTables":
            return TABLES_AND_COLUMNS if command.number(5) else TABLES
        if name not in (STATEMENT, PREPARED):
            raise InputError(_unknown(name))
        handle = _handle(command.text(1) or "") if name == STATEMENT else command.bytes(1) or b""
        return self._statement_schema(context, call, store, *_statement(handle))

    def answer(self, context: Any, call: Call, store: ServedStore, data: bytes) -> Iterator[Any]:
        """The columns of an answer to a ticket of `endpoint`, and its batches."""
        name, command = _command(data)
        call.facts["command"] = name
        if name == TICKET:
            sql, parameters = _statement(command.bytes(1) or b"")
            yield from self._queries.answer(context, call, store, _unlimited(sql, parameters))
            return
        if name == "CommandGetTables":
            table = self._tables(context, call, store, command)
        elif name in _FIXED:
            table = _fixed(name, command)
        else:
            raise InputError(_unknown(name))
        yield table.schema
        yield from table.to_batches()

    def action(self, context: Any, call: Call, store: ServedStore, what: str, body: bytes) -> list[bytes]:
        """What an action of Flight SQL answers."""
        name, request = (what, Message(b"")) if not body else _command(body)
        call.facts["command"] = what[:100]
        if what == "CreatePreparedStatement" and name == "ActionCreatePreparedStatementRequest":
            sql = request.text(1) or ""
            schema = b""
            try:
                schema = _schema_bytes(self._statement_schema(context, call, store, sql, None))
            except QueryError:
                if not re.search(r"[?$]", sql):  # with parameters, it has columns only when it is run
                    raise
            return [_any("ActionCreatePreparedStatementResult", [(1, _handle(sql)), (2, schema), (3, b"")])]
        if what == "BeginTransaction":
            return [_any("ActionBeginTransactionResult", [(1, TRANSACTION)])]
        if what in ("ClosePreparedStatement", "EndTransaction"):
            return []
        if what == "CloseSession":
            return [message([(1, CLOSED)])]
        raise InputError(f"a served store has no action {what[:100]!r}")

    def bound(self, call: Call, data: bytes, reader: Any) -> bytes:
        """The handle of a prepared statement with the parameters that come."""
        name, command = _command(data)
        call.facts["command"] = name
        if name != PREPARED:
            raise QueryError("a store is never changed through SQL: only a SELECT statement is answered")
        sql, _ = _statement(command.bytes(1) or b"")
        rows: list[tuple[Any, ...]] = []
        for chunk in reader:
            if chunk.data is not None:
                rows += zip(*map(_values, chunk.data.columns), strict=True)
            if len(rows) > 1:
                raise InputError("a statement is answered once: give the parameters of one row")
        parameters = list(rows[0]) if rows else None
        check_json(parameters)
        return message([(1, _handle(sql, parameters))])

    def _statement_schema(self, context: Any, call: Call, store: ServedStore, sql: str, parameters: Any) -> pa.Schema:
        key = (store.storage.address, sql, store.number)
        with self._lock:
            if parameters is None and key in self._schemas:
                return self._schemas[key]
        plain = sql.strip().rstrip(";")
        limited = re.match(r"[\s(]*(--|/\*|(select|with|from|values)\b)", plain, re.IGNORECASE) is not None
        statement = f"SELECT * FROM ({plain}\n) LIMIT 0" if limited else sql
        parts = self._queries.answer(context, call, store, _unlimited(statement, parameters))
        try:
            schema: pa.Schema = next(parts)
        finally:
            parts.close()  # type: ignore[attr-defined]
        with self._lock:
            self._schemas[key] = schema
            if len(self._schemas) > SCHEMAS_KEPT:
                self._schemas.popitem(last=False)
        return schema

    def _tables(self, context: Any, call: Call, store: ServedStore, command: Message) -> pa.Table:
        wanted, types = command.text(3), command.texts(4)
        found = {}
        if _is_here(command.text(1), command.text(2)) and (not types or TABLE_TYPE in types):
            found = self._queries.schemas(context, call, store)
        names = [name for name in sorted(found) if wanted is None or _like(wanted, name)]
        rows: dict[str, list[Any]] = {
            "catalog_name": [CATALOGUE] * len(names),
            "db_schema_name": [SCHEMA] * len(names),
            "table_name": names,
            "table_type": [TABLE_TYPE] * len(names),
        }
        if not command.number(5):
            return pa.table(rows, schema=TABLES)
        return pa.table({**rows, "table_schema": [_schema_bytes(found[name]) for name in names]}, schema=TABLES_AND_COLUMNS)


def _fixed(name: str, command: Message) -> pa.Table:
    """The answers that are the same for all stores."""
    if name == "CommandGetSqlInfo":
        return _info(command.numbers(1))
    if name == "CommandGetCatalogs":
        return pa.table({"catalog_name": [CATALOGUE]}, schema=CATALOGUES)
    if name == "CommandGetDbSchemas":
        names = [SCHEMA] if _is_here(command.text(1), command.text(2)) else []
        return pa.table({"catalog_name": [CATALOGUE] * len(names), "db_schema_name": names}, schema=SCHEMAS)
    if name == "CommandGetTableTypes":
        return pa.table({"table_type": [TABLE_TYPE]}, schema=TABLE_TYPES)
    empty: pa.Table = _EMPTY[name].empty_table()
    return empty


def _info(wanted: list[int]) -> pa.Table:
    """What a server says of itself, by the numbers that the specification gives its facts."""
    facts: dict[int, str | bool | int] = {
        0: "knowledge-store",
        1: version("knowledge-store"),
        2: pa.__version__,
        3: True,  # read-only
        4: True,  # SQL
        5: False,  # Substrait
        8: 1,  # transactions: what they mean is that nothing is written
        504: '"',  # quotes names
    }
    chosen = {number: fact for number, fact in facts.items() if not wanted or number in wanted}
    strings = [fact for fact in chosen.values() if isinstance(fact, str)]
    truths = [fact for fact in chosen.values() if isinstance(fact, bool)]
    numbers = [fact for fact in chosen.values() if isinstance(fact, int) and not isinstance(fact, bool)]
    types, offsets, counts = [], [], [0] * 6
    for fact in chosen.values():
        kind = 0 if isinstance(fact, str) else 1 if isinstance(fact, bool) else 3
        types.append(kind)
        offsets.append(counts[kind])
        counts[kind] += 1
    children = [
        pa.array(strings, _STRING), pa.array(truths, pa.bool_()), pa.array([], pa.int64()), pa.array(numbers, _INT),
        pa.array([], _INFO_VALUE.field(4).type), pa.array([], _INFO_VALUE.field(5).type),
    ]  # fmt: skip
    names = [_INFO_VALUE.field(place).name for place in range(6)]
    values = pa.UnionArray.from_dense(pa.array(types, pa.int8()), pa.array(offsets, _INT), children, names)
    return pa.Table.from_arrays([pa.array(list(chosen), pa.uint32()), values], schema=INFO)


def _any(name: str, fields: list[tuple[int, Value]]) -> bytes:
    """A message that says what it is."""
    return message([(1, f"{TYPE_PREFIX}{name}".encode()), (2, message(fields))])


def _command(data: bytes) -> tuple[str, Message]:
    """The name of a command, and its message (InputError: it is none)."""
    outer = Message(data)
    name = outer.text(1) or ""
    if not name.startswith(TYPE_PREFIX):
        raise InputError("this is no command of Flight SQL: it does not say which")
    return name.removeprefix(TYPE_PREFIX)[:100], Message(outer.bytes(2) or b"")


def _handle(sql: str, parameters: list[Any] | None = None) -> bytes:
    return json.dumps({"sql": sql, "parameters": parameters}).encode()


def _statement(handle: bytes) -> tuple[str, list[Any] | None]:
    """The statement and the parameters of a handle (InputError: it is none of this server's)."""
    try:
        found = json.loads(handle)
        sql, parameters = found["sql"], found["parameters"]
    except (ValueError, KeyError, TypeError, RecursionError):
        sql = parameters = None
    if not isinstance(sql, str) or not (parameters is None or isinstance(parameters, list)):
        raise InputError("this is no statement that this server prepared")
    return sql, parameters


def _unlimited(sql: str, parameters: list[Any] | None) -> Statement:
    """A statement whose limits are those of the server: a client by Flight SQL says none."""
    return Statement(sql, math.inf, math.inf, parameters)


def _values(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return values


def _schema_bytes(schema: pa.Schema) -> bytes:
    """A schema as an encapsulated message of Arrow IPC."""
    data: bytes = schema.serialize().to_pybytes()
    return data


def _is_here(catalogue: str | None, schema: str | None) -> bool:
    """Whether what a client names, if it names something, is where a store's relations are."""
    return (not catalogue or catalogue == CATALOGUE) and (not schema or _like(schema, SCHEMA))


def _like(pattern: str, name: str) -> bool:
    """SQL's LIKE, where `%` stands for anything and `_` for one character."""
    parts = {"%": ".*", "_": "."}
    return re.fullmatch("".join(parts.get(sign, re.escape(sign)) for sign in pattern), name, re.DOTALL) is not None


def _unknown(name: str) -> str:
    if "Update" in name or "Ingest" in name:
        return "a store is never changed through SQL: only a SELECT statement is answered"
    return f"a served store does not answer the command {name!r} of Flight SQL"
