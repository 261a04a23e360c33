"""SQL over a store: one SELECT statement, and nothing it could write to or read besides the store.

DuckDB runs in memory, with no access to files or the network, its configuration locked, in a read-only transaction. It sees
the shards as Arrow datasets over an explicit list of committed files, read by pyarrow, which verifies page checksums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from knowledge_store.errors import DamageError, QueryError
from knowledge_store.index import Index
from knowledge_store.kinds import KINDS
from knowledge_store.layout import SEQUENCES, TOKENS_FILE
from knowledge_store.manifest import Manifest
from knowledge_store.parquet import check_footer, dataset, describe, read_file
from knowledge_store.reader import ShardFile, shard_files
from knowledge_store.sequences import SEQUENCE_COLUMNS, TOKENS_SCHEMA, sequences_schema
from knowledge_store.summary import dumps_table, shards_table

CONFIGURATION: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    # DuckDB lets queries read its folder for temporary files, whatever else is forbidden: let there be none.
    "temp_directory": "",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_scan_all_frames": "false",
    # DuckDB does not know how many rows an Arrow dataset has, and would as soon keep ten million positions in memory to look up
    # sequences in them: it keeps the right-hand side of a join as it is written.
    "disabled_optimizers": "build_side_probe_side",
}


def read_tokens(store: Path, manifest: Manifest) -> pa.Table:
    """A dump's `tokens` table (schema TOKENS_SCHEMA).

    Raises:
        DamageError: the file is not the one the manifest names, or holds something else.
    """
    path = store / manifest.dump / TOKENS_FILE
    record = manifest.derived["tokens"]
    check_footer(path, record["bytes"], record["footer_sha256"])
    tokens = read_file(path)
    if not tokens.schema.equals(TOKENS_SCHEMA):
        raise DamageError(f"{path} is damaged: it does not have the columns of its table")
    return tokens


# Tables that the relations are made of. `SHOW TABLES` lists relations only, since these are in a schema of their own.
TABLES = "store_tables"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class _Catalogue:
    """Gives a store's tables to a connection, and makes its relations as views over them."""

    def __init__(self, store: Path, index: Index, manifests: list[Manifest], connection: duckdb.DuckDBPyConnection):
        self._store = store
        self._index = index
        self._manifests = manifests
        self._connection = connection
        self._tables: set[str] = set()
        self.opened: list[ShardFile] = []
        connection.execute(f"CREATE SCHEMA {TABLES}")

    def _table(self, name: str, make_rows: Callable[[], pa.Table | ds.Dataset]) -> str:
        """Gives the connection a table, unless it has it already. Returns how SQL names it."""
        if name not in self._tables:
            self._tables.add(name)
            self._connection.execute(f"USE {TABLES}")
            self._connection.from_arrow(make_rows()).create_view(name)
            self._connection.execute("USE main")
        return f"{TABLES}.{_identifier(name)}"

    def _shards(self, manifest: Manifest, table: str, schema: pa.Schema) -> ds.Dataset:
        """A dump's table; footers are checked now, pages as they are read."""
        files = shard_files(self._store, self._index, manifest.dump, table)
        for file in files:
            check_footer(file.path, file.bytes, file.footer_sha256)
        self.opened += files
        return dataset([file.path for file in files], schema)

    def _texts(self, manifest: Manifest) -> pa.Table:
        """One row whose column `list` holds the text of each token id."""
        tokens = read_tokens(self._store, manifest)
        return pa.table({"list": pa.array([tokens["text"].to_pylist()], pa.list_(pa.string()))})

    def relations(self) -> dict[str, list[tuple[Manifest, str, str | None]]]:
        """What there is to ask about: relation name → for each dump that has it, its kind and SQL (None: a fixed table)."""
        found: dict[str, list[tuple[Manifest, str, str | None]]] = {SEQUENCES: [], "tokens": []}
        for kind in KINDS.values():
            for relation in {kind.name: None, **kind.relations}:
                found[relation] = []
        for manifest in self._manifests:
            found[SEQUENCES].append((manifest, SEQUENCES, None))
            found["tokens"].append((manifest, "tokens", None))
            for name in manifest.kinds:
                for relation, sql in {name: None, **KINDS[name].relations}.items():
                    found[relation].append((manifest, name, sql))
        return found

    def _branch(self, manifest: Manifest, table: str, sql: str | None) -> str:
        def make_rows() -> pa.Table | ds.Dataset:
            if table == "tokens":
                return read_tokens(self._store, manifest)
            schema = sequences_schema(manifest) if table == SEQUENCES else KINDS[table].stored_schema(manifest)
            return self._shards(manifest, table, schema)

        dump = _literal(manifest.dump)
        rows = self._table(f"{manifest.dump} {table}", make_rows)
        view = KINDS[table].view(manifest) if table in KINDS else None
        if view is not None:
            rows = f"({view.format(rows=rows)})"
        if sql is None:
            return f"SELECT {dump} AS dump, * FROM {rows}"
        texts = self._table(f"{manifest.dump} texts", lambda: self._texts(manifest)) if "{texts}" in sql else ""
        return sql.format(dump=dump, rows=rows, texts=texts)

    def add(self, relation: str, rows: pa.Table) -> None:
        """Make a relation of a table that is at hand."""
        name = self._table(relation, lambda: rows)
        self._connection.execute(f"CREATE VIEW {_identifier(relation)} AS SELECT * FROM {name}")

    def create(self, relation: str, branches: list[tuple[Manifest, str, str | None]]) -> None:
        """Make the view `relation` over all dumps that have it."""
        if not branches:
            columns = SEQUENCE_COLUMNS if relation == SEQUENCES else {}
            self.add(relation, pa.schema([("dump", pa.string()), *columns.items()]).empty_table())
            return
        union = " UNION ALL BY NAME ".join(self._branch(*branch) for branch in branches)
        self._connection.execute(f"CREATE VIEW {_identifier(relation)} AS {union}")


def _check_statement(sql: str) -> None:
    """Refuse anything but one statement that only reads.

    Raises:
        QueryError: saying what it is instead, or where it does not parse.
    """
    try:
        sql.encode()  # DuckDB's own refusal of half a character is no duckdb.Error
        statements = duckdb.extract_statements(sql)
    except (duckdb.Error, UnicodeEncodeError) as error:
        raise QueryError(f"this SQL does not parse: {_first_line(error)}") from None
    if len(statements) != 1:
        raise QueryError(f"give one SELECT statement: this has {len(statements)}")
    kind = statements[0].type.name
    if kind != "SELECT":
        raise QueryError(f"only a SELECT statement is answered, and this is {kind}: a store is never changed through SQL")


def _mentioned(connection: duckdb.DuckDBPyConnection, sql: str, relations: set[str]) -> set[str]:
    """The relations that a query needs: shards are opened only for a query about what is in them."""
    if sql.split()[0].lower() == "show":
        return relations
    try:
        return relations & {name.lower() for name in connection.get_table_names(sql)}
    except duckdb.Error:  # it cannot be bound while the relations are missing: more of them than it needs will do
        return {name for name in relations if name in sql.lower()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _check_opened(files: list[ShardFile]) -> None:
    """Find the damaged one among files that could not be read.

    Raises:
        DamageError: naming it.
    """
    for file in files:
        if describe(file.path).sha256 != file.sha256:
            raise DamageError(f"{file.path} is damaged: its contents are not those that were published")


def _with_own_names(answer: pa.Table) -> pa.Table:
    """The answer with no two columns of one name: a second `dump` becomes `dump_1`, as where DuckDB makes a table of it."""
    taken = set(answer.column_names)
    names: list[str] = []
    for name in answer.column_names:
        own, number = name, 0
        while own in names or (number and own in taken):
            number += 1
            own = f"{name}_{number}"
        names.append(own)
    return answer.rename_columns(names)


def run_query(store: Path, index: Index, manifests: list[Manifest], sql: str) -> pa.Table:
    """Answer one SELECT statement.

    Raises:
        QueryError: it is refused, or DuckDB cannot run it.
        DamageError: a file it reads is not what was published.
    """
    _check_statement(sql)
    with duckdb.connect(":memory:", config=CONFIGURATION) as connection:
        catalogue = _Catalogue(store, index, manifests, connection)
        relations = catalogue.relations()
        facts = {"dumps": lambda: dumps_table(store, index, manifests), "shards": lambda: shards_table(index)}
        for relation in _mentioned(connection, sql, relations.keys() | facts.keys()):
            if relation in facts:
                catalogue.add(relation, facts[relation]())
            else:
                catalogue.create(relation, relations[relation])
        connection.execute("SET lock_configuration = true")
        connection.execute("BEGIN TRANSACTION READ ONLY")
        try:
            return _with_own_names(connection.sql(sql).to_arrow_table())
        except RuntimeError as error:
            if "interrupted" in str(error).lower():  # how DuckDB passes Ctrl-C on
                raise KeyboardInterrupt from None
            raise
        except duckdb.Error as error:
            # "reading the Arrow source failed": rare enough to look for the reason in every file.
            if isinstance(error, (duckdb.InvalidInputException, duckdb.IOException)) and " failed" in str(error):
                _check_opened(catalogue.opened)
            raise QueryError(f"this SQL was not run: {_first_line(error)}") from None
