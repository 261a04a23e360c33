"""SQL over a store: one SELECT statement, and nothing it could write to or read besides the store and files that its asker
names.

DuckDB runs in memory, with no access to files or the network, its configuration locked, in a read-only transaction. It sees
the shards as Arrow datasets over an explicit list of committed files, of which every byte is checked when it is read.

Its own limits of memory and time, which `run_query` sets, hold for what it does row by row. They do not hold for one long
expression (`repeat('x', 2000000000)`): `isolation` has an answer to that.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.catalogue.summary import dumps_table, shards_table
from knowledge_store.errors import InputError, KnowledgeStoreError, QueryError, QueryLimitError
from knowledge_store.format.layout import SEQUENCES
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import dataset
from knowledge_store.format.sequences import SEQUENCE_COLUMNS, sequences_schema
from knowledge_store.isolation.child import MAX_MEMORY_LIMIT
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.kind import filled
from knowledge_store.quantities import binary_size
from knowledge_store.sql.limits import MEMORY_LIMIT, TIMEOUT, check_limits, interrupted
from knowledge_store.sql.mixed_columns import fields_of, mixed_columns, replacements
from knowledge_store.sql.named_files import NamedFiles, checked_files, file_rows
from knowledge_store.sql.parameters import Parameters, plain_parameters
from knowledge_store.sql.quoting import identifier, literal

if TYPE_CHECKING:
    import pyarrow.dataset as ds

BATCH_ROWS = 4 * 2048  # DuckDB works on 2048 rows at a time
LONG_SQL = 4096  # characters; above, DuckDB is not asked for names: that takes the square of their length, and minutes

QUERY_THREAD = "query"
GRACE = 1.0  # seconds that a query's caller waits for it to stop, when its time is over

NOWHERE = "/nowhere"
CONFIGURATION: dict[str, str | bool | int | float | list[str]] = {
    # DuckDB lets queries read its folder for temporary files, whatever else is forbidden: let there be none.
    "temp_directory": "",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_persistent_secrets": "false",
    # By themselves these are folders of the user's home, and queries may ask for their names.
    "secret_directory": NOWHERE,
    "extension_directory": NOWHERE,
    "python_scan_all_frames": "false",
    # DuckDB does not know how many rows an Arrow dataset has, and would as soon keep ten million positions in memory to look up
    # sequences in them: it keeps the right-hand side of a join as it is written.
    "disabled_optimizers": "build_side_probe_side",
}


# Tables that the relations are made of. `SHOW TABLES` lists relations only, since these are in a schema of their own.
TABLES = "store_tables"


def readable(column: pa.Field) -> pa.Field:
    """A column as DuckDB can read it: it knows no float16."""
    if pa.types.is_list(column.type):
        return pa.field(column.name, pa.list_(readable(column.type.value_field)))
    return column.with_type(pa.float32()) if pa.types.is_float16(column.type) else column


class _Catalogue:
    """Gives a store's tables to a connection, and makes its relations as views over them."""

    def __init__(self, dumps: Dumps, connection: duckdb.DuckDBPyConnection):
        self._dumps = dumps
        self._connection = connection
        self._tables: set[str] = set()
        self.mixed: dict[str, tuple[str, ...]] = {}  # columns of `sequences`, once it is made
        self.errors: list[KnowledgeStoreError] = []
        connection.execute(f"CREATE SCHEMA {TABLES}")

    def _table(self, name: str, make_rows: Callable[[], pa.Table | ds.Dataset]) -> str:
        """Gives the connection a table, unless it has it already. Returns how SQL names it."""
        if name not in self._tables:
            self._tables.add(name)
            self._connection.execute(f"USE {TABLES}")
            self._connection.from_arrow(make_rows()).create_view(name)
            self._connection.execute("USE main")
        return f"{TABLES}.{identifier(name)}"

    def _shards(self, manifest: Manifest, table: str, schema: pa.Schema) -> ds.Dataset:
        """A dump's table; everything is checked when it is read, and what is wrong is noted: DuckDB says only that reading
        failed."""
        files = self._dumps.files(manifest, table, schema)
        return dataset(list(files.values()), pa.schema([readable(column) for column in schema]), self.errors)

    def _texts(self, manifest: Manifest) -> pa.Table:
        """One row whose column `list` holds the text of each token id."""
        texts = self._dumps.tokens(manifest)["text"].combine_chunks()
        return pa.table({"list": pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)})

    def relations(self) -> dict[str, list[tuple[Manifest, str, str | None]]]:
        """What there is to ask about: relation name → for each dump that has it, its kind and SQL (None: a fixed table)."""
        relations: dict[str, list[tuple[Manifest, str, str | None]]] = {SEQUENCES: [], "tokens": []}
        for kind in KINDS.values():
            for relation in {kind.name: None, **kind.relations}:
                relations[relation] = []
        for manifest in self._dumps.manifests.values():
            relations[SEQUENCES].append((manifest, SEQUENCES, None))
            relations["tokens"].append((manifest, "tokens", None))
            for name in manifest.kinds:
                for relation in {name: None, **KINDS[name].relations}:
                    relations[relation].append((manifest, name, KINDS[name].relation(relation, manifest)))
        return relations

    def _rows(self, manifest: Manifest, table: str) -> str:
        """A dump's table, as SQL."""

        def make_rows() -> pa.Table | ds.Dataset:
            if table == "tokens":
                return self._dumps.tokens(manifest)
            schema = sequences_schema(manifest) if table == SEQUENCES else KINDS[table].stored_schema(manifest)
            return self._shards(manifest, table, schema)

        rows = self._table(f"{manifest.dump} {table}", make_rows)
        view = KINDS[table].view(manifest) if table in KINDS else None
        return rows if view is None else f"({filled(view, rows=rows)})"

    def _branch(self, manifest: Manifest, table: str, sql: str | None) -> str:
        dump, rows = literal(manifest.dump), self._rows(manifest, table)
        if sql is None:
            replaced = replacements(manifest, self.mixed) if table == SEQUENCES else ""
            return f"SELECT {dump} AS dump, *{f' REPLACE ({replaced})' if replaced else ''} FROM {rows}"
        texts = self._table(f"{manifest.dump} texts", lambda: self._texts(manifest)) if "{texts}" in sql else ""
        return filled(sql, lambda kind: self._rows(manifest, kind), dump=dump, rows=rows, texts=texts)

    def add(self, relation: str, rows: pa.Table | ds.Dataset) -> None:
        """Make a relation of a table that is at hand."""
        name = self._table(relation, lambda: rows)
        self._connection.execute(f"CREATE VIEW {identifier(relation)} AS SELECT * FROM {name}")

    def create(self, relation: str, branches: list[tuple[Manifest, str, str | None]]) -> None:
        """Make the view `relation` over all dumps that have it."""
        if not branches:
            columns = SEQUENCE_COLUMNS if relation == SEQUENCES else {}
            self.add(relation, pa.schema([("dump", pa.string()), *columns.items()]).empty_table())
            return
        if relation == SEQUENCES:
            self.mixed = mixed_columns(manifest for manifest, _, _ in branches)
        union = " UNION ALL BY NAME ".join(self._branch(*branch) for branch in branches)
        try:
            self._connection.execute(f"CREATE VIEW {identifier(relation)} AS {union}")
        except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
            kinds = " and ".join(dict.fromkeys(repr(kind) for _, kind, _ in branches))
            raise QueryError(f"the relation {relation!r} that the kind {kinds} declares is no SQL: {_reason(error)}") from None


def connect(memory_limit: float) -> duckdb.DuckDBPyConnection:
    """An empty database in memory, out of which no query can reach.

    Args:
        memory_limit: in bytes, for what DuckDB keeps while it answers.
    """
    limit = int(min(memory_limit, MAX_MEMORY_LIMIT))
    connection = duckdb.connect(":memory:", config={**CONFIGURATION, "memory_limit": f"{limit}B"})
    # Not before: a database that is opened without access to files may still read its own, and takes ":memory:" for its name.
    connection.execute("SET enable_external_access = false")
    return connection


# How a statement that only reads begins. `PIVOT` is several to DuckDB, which finds the new columns before it answers.
READING = {"select", "with", "from", "table", "values", "pivot", "unpivot", "show", "describe", "desc", "summarize", "("}


def _check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse anything but one statement that only reads.

    Raises:
        QueryError: saying what it is instead, or where it does not parse.
    """
    try:
        sql.encode()  # DuckDB's own refusal of half a character is no duckdb.Error
        statements = connection.extract_statements(sql)
    except (duckdb.Error, UnicodeEncodeError) as error:
        raise QueryError(f"this SQL does not parse: {_reason(error)}") from None
    several = len(statements) > 1 and ";" not in sql.strip().rstrip(";")  # how DuckDB 1.4 has a PIVOT, in its parts
    if len(statements) != 1 and not several:
        raise QueryError(f"give one SELECT statement: this has {len(statements)}")
    try:
        kind = "MULTI" if several else statements[0].type.name
    except ValueError:  # DuckDB's Python knows fewer kinds than DuckDB (UPDATE EXTENSIONS)
        kind = "another"
    if kind != "SELECT" and not (kind == "MULTI" and _first_word(sql) in READING):
        raise QueryError(f"only a SELECT statement is answered, and this is {kind}: a store is never changed through SQL")


def _first_word(sql: str) -> str:
    """The first word or sign of a statement that parses, in small letters; comments do not count."""
    starts = (start for start, kind in duckdb.tokenize(sql) if kind != duckdb.token_type.comment)
    word = re.match(r"\w+|.", sql.encode()[next(starts) :].decode())
    return word[0].lower() if word else ""


def _mentioned(connection: duckdb.DuckDBPyConnection, sql: str, relations: set[str]) -> set[str]:
    """The relations that a query needs: shards are opened only for a query about what is in them."""
    if _first_word(sql) == "show":
        return relations
    if len(sql) > LONG_SQL:
        return {name for name in relations if name in sql.lower()}
    try:
        return relations & {name.lower() for name in connection.get_table_names(sql)}
    except duckdb.Error:  # it cannot be bound while the relations are missing: more of them than it needs will do
        return {name for name in relations if name in sql.lower()}


def _reason(error: Exception) -> str:
    """What DuckDB says, with the names that it suggests, on one line; without the statement."""
    message, _, _ = str(error).partition("\n\nLINE ")
    return " ".join(message.split()) or type(error).__name__


def _own_names(names: list[str]) -> list[str]:
    """Names of which no two are the same: a second `dump` becomes `dump_1`, as where DuckDB makes a table of it."""
    used = set(names)
    owned: list[str] = []
    for name in names:
        unique, number = name, 0
        while unique in owned or (number and unique in used):
            number += 1
            unique = f"{name}_{number}"
        owned.append(unique)
    return owned


class _Relations:
    """A store's relations on a connection, made as statements need them, and answers to these statements.

    Args:
        connection: from `connect`; the tables are given to it.
        memory_limit: in bytes, for an answer; None where it is not kept in memory.
        files: Parquet files that statements may read as relations, by their names.

    Raises:
        InputError: a file or its name cannot be used.
        DamageError: a dump is closed because it is damaged.
        StoreError: every dump is closed.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, dumps: Dumps, memory_limit: int | None, files: NamedFiles | None = None
    ):
        dumps.check_answerable()
        self._connection, self._memory_limit = connection, memory_limit
        self._catalogue = _Catalogue(dumps, connection)
        self._relations = self._catalogue.relations()
        self._facts: dict[str, Callable[[], pa.Table | ds.Dataset]] = {
            "dumps": lambda: dumps_table(dumps),
            "shards": lambda: shards_table(dumps.index),
        }
        for name, path in checked_files(files).items():
            if name in self._relations.keys() | self._facts.keys():
                raise InputError(f"the store has a relation {name!r} itself: give {path} another name")
            self._facts[name] = partial(file_rows, path)
        self._made: dict[str, None] = {}

    def _make(self, sql: str) -> None:
        """Make the relations that a statement needs."""
        for relation in _mentioned(self._connection, sql, self._relations.keys() | self._facts.keys()) - self._made.keys():
            if relation in self._facts:
                self._catalogue.add(relation, self._facts[relation]())
            else:
                self._catalogue.create(relation, self._relations[relation])
            self._made[relation] = None

    def _answer(self, sql: str, parameters: Any = None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        with self._errors():
            rows = self._connection.sql(sql, params=parameters)
            # What DuckDB 1.4 calls otherwise.
            reader = getattr(rows, "to_arrow_reader" if hasattr(rows, "to_arrow_reader") else "fetch_record_batch")(BATCH_ROWS)
        names = _own_names(reader.schema.names)
        schema = pa.schema([field.with_name(name) for field, name in zip(reader.schema, names, strict=True)])
        return schema, self._batches(reader, schema)

    def _batches(self, reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        size = 0
        with self._errors():
            for batch in reader:
                size += batch.nbytes
                if self._memory_limit is not None and size > self._memory_limit:
                    limit = binary_size(self._memory_limit)
                    raise QueryLimitError(f"this SQL was cut off: its answer takes more memory than the limit of {limit}")
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError, pa.ArrowException, MemoryError) as error:
            # Of what goes wrong while rows come, Arrow hands on no more than DuckDB's words.
            for damage in self._catalogue.errors:
                raise damage from None
            if isinstance(error, MemoryError) or "Out of Memory" in str(error):
                # What DuckDB advises further, to set this and that, no query may.
                reason, *_ = str(error).splitlines() or [type(error).__name__]
                limit, advice = "there is", ""
                if self._memory_limit is not None:
                    limit = f"its limit of {binary_size(self._memory_limit)}"
                    advice = "; give a larger memory limit (--memory-limit), or ask for less"
                raise QueryLimitError(f"this SQL needs more memory than {limit}: {reason}{advice}") from None
            reason = _reason(error)
            if "Table with name" in reason:
                reason += f" (the store's relations: {', '.join([*self._relations, *self._facts])})"
            elif "STRUCT(" in reason and (fields := fields_of(self._catalogue.mixed)):
                reason += f" (dumps have columns in several types: ask for {fields})"
            raise QueryError(f"this SQL was not run: {reason}") from None
        for damage in self._catalogue.errors:
            raise damage


class Query(_Relations):
    """One SELECT statement over a store, made ready to be answered.

    Args:
        connection, dumps, memory_limit, files: as of `_Relations`.
        sql: the statement, from anybody.
        parameters: values for the statement's `?` or `$1`, in order, or by name for its `$name`.

    Raises:
        InputError: a file or its name cannot be used.
        QueryError: it is refused.
        DamageError: a file it needs has not the footer that was published, or a dump is closed because it is damaged.
        StoreError: every dump is closed.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        dumps: Dumps,
        sql: str,
        memory_limit: int | None,
        parameters: Parameters | None = None,
        files: NamedFiles | None = None,
    ):
        dumps.check_answerable()
        _check_statement(connection, sql)
        self._parameters, self._sql = plain_parameters(parameters), sql
        super().__init__(connection, dumps, memory_limit, files)
        self._make(sql)
        connection.execute("SET lock_configuration = true")
        connection.execute("BEGIN TRANSACTION READ ONLY")

    def answer(self) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Its columns, no two of one name, and its rows, as they are found.

        Raises:
            QueryError: DuckDB cannot run it, or, from the iterator, the answer is larger than the limit.
            DamageError: a file it reads is not what was published.
        """
        return self._answer(self._sql, self._parameters)

    def schemas(self) -> dict[str, pa.Schema]:
        """The columns of the relations that the statement needs, by their names (raises as `answer`)."""
        with self._errors():
            tables = {name: self._connection.sql(f"SELECT * FROM {identifier(name)} LIMIT 0") for name in self._made}
            return {name: table.to_arrow_table().schema for name, table in tables.items()}


class Statements(_Relations):
    """Statements of one's own over a store, one after the other, on one connection: an answer takes a fifth of the time.

    Args:
        dumps, memory_limit, files: as of `Query`.

    Raises:
        as `Query`.
    """

    def __init__(self, dumps: Dumps, memory_limit: int = MEMORY_LIMIT, files: NamedFiles | None = None):
        super().__init__(connect(memory_limit), dumps, memory_limit, files)

    def answer(self, sql: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """As of `Query`; all of it is to be taken before the next one is asked for."""
        _check_statement(self._connection, sql)
        self._catalogue.errors.clear()
        self._make(sql)
        return self._answer(sql)

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


def run_query(
    dumps: Dumps,
    sql: str,
    memory_limit: int = MEMORY_LIMIT,
    timeout: float = TIMEOUT,
    parameters: Parameters | None = None,
    files: NamedFiles | None = None,
) -> pa.Table:
    """Answer one SELECT statement, in this process.

    What DuckDB does row by row ends with its time. What it does not interrupt (planning a statement of some thousand parts,
    one long expression) continues in the background, and the caller gets an error all the same, at most GRACE seconds after the
    time is over. But while DuckDB parses, or looks for the names of tables, it keeps Python's lock, and all threads wait.
    Only a process of its own limits the time of SQL that may come from anybody (see `isolation`).

    Args:
        memory_limit: in bytes, for what DuckDB keeps while it answers, and for the outcome.
        timeout: in seconds, after which DuckDB is asked to stop.
        parameters, files: as of `Query`.

    Raises:
        InputError: a limit or a file cannot be used.
        QueryError: it is refused, DuckDB cannot run it, or it needs more than its limits.
        DamageError: a file it reads is not what was published.
    """
    check_limits(memory_limit, timeout)
    connection = connect(memory_limit)
    outcome: Future[pa.Table] = Future()

    def collect() -> None:
        try:
            schema, batches = Query(connection, dumps, sql, memory_limit, parameters, files).answer()
            outcome.set_result(pa.Table.from_batches(batches, schema))
        except BaseException as error:
            outcome.set_exception(error)

    def end() -> None:
        # Again and again: DuckDB forgets what comes just before it begins.
        while asking.ident is not None and not outcome.done():
            connection.interrupt()
            wait([outcome], 0.1)
        connection.close()

    # On a thread of its own, so that this one hears Ctrl-C and the clock. No program waits for such threads when it ends.
    asking = threading.Thread(target=collect, name=QUERY_THREAD, daemon=True)
    try:
        asking.start()
        wait([outcome], min(timeout, threading.TIMEOUT_MAX))
        if not outcome.done():
            raise interrupted(timeout)
        return outcome.result()
    finally:
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(GRACE)
