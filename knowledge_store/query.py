"""SQL over a store: one SELECT statement, and nothing it could write to or read besides the store.

DuckDB runs in memory, with no access to files or the network, its configuration locked, in a read-only transaction. It sees
the shards as Arrow datasets over an explicit list of committed files, read by pyarrow, which verifies page checksums.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError, QueryError
from knowledge_store.index import Index
from knowledge_store.kinds import KINDS
from knowledge_store.layout import SEQUENCES, TOKENS_FILE
from knowledge_store.manifest import Manifest
from knowledge_store.parquet import check_footer, dataset
from knowledge_store.reader import shard_files
from knowledge_store.sequences import SEQUENCE_COLUMNS, TOKENS_SCHEMA, sequences_schema
from knowledge_store.summary import dumps_table, shards_table

CONFIGURATION: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_scan_all_frames": "false",
}


def read_tokens(store: Path, manifest: Manifest) -> pa.Table:
    """A dump's `tokens` table (schema TOKENS_SCHEMA).

    Raises:
        DamageError: the file is not the one the manifest names.
    """
    path = store / manifest.dump / TOKENS_FILE
    record = manifest.derived["tokens"]
    check_footer(path, record["bytes"], record["footer_sha256"])
    try:
        return pq.read_table(path, page_checksum_verification=True).cast(TOKENS_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise DamageError(f"{path} is damaged: {error}") from None


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class _Catalogue:
    """Registers a store's tables with a connection, and makes its relations as views over them."""

    def __init__(self, store: Path, index: Index, manifests: list[Manifest], connection: duckdb.DuckDBPyConnection):
        self._store = store
        self._index = index
        self._manifests = manifests
        self._connection = connection
        self._branches: dict[str, list[str]] = {}
        self._registered: set[str] = set()

    def _register(self, name: str, rows: object) -> str:
        if name not in self._registered:
            self._registered.add(name)
            self._connection.register(name, rows)
        return _identifier(name)

    def _shards(self, manifest: Manifest, table: str, schema: pa.Schema) -> str:
        """Registers a dump's table; footers are checked now, pages as they are read."""
        name = f"{manifest.dump} {table}"
        if name in self._registered:
            return _identifier(name)
        files = shard_files(self._store, self._index, manifest.dump, table)
        for file in files:
            check_footer(file.path, file.bytes, file.footer_sha256)
        return self._register(name, dataset([file.path for file in files], schema))

    def _texts(self, manifest: Manifest) -> str:
        """Registers a one-row relation whose column `list` holds the text of each token id."""
        tokens = read_tokens(self._store, manifest)
        texts = pa.array([tokens["text"].to_pylist()], pa.list_(pa.string()))
        return self._register(f"{manifest.dump} texts", pa.table({"list": texts}))

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
        dump = _literal(manifest.dump)
        if table == "tokens":
            rows = self._register(f"{manifest.dump} tokens", read_tokens(self._store, manifest))
        elif table == SEQUENCES:
            rows = self._shards(manifest, SEQUENCES, sequences_schema(manifest))
        else:
            rows = self._shards(manifest, table, KINDS[table].schema(manifest))
        if sql is None:
            return f"SELECT {dump} AS dump, * FROM {rows}"
        return sql.format(dump=dump, rows=rows, texts=self._texts(manifest) if "{texts}" in sql else "")

    def create(self, relation: str, branches: list[tuple[Manifest, str, str | None]]) -> None:
        """Make the view `relation` over all dumps that have it."""
        if branches:
            union = " UNION ALL BY NAME ".join(self._branch(*branch) for branch in branches)
        else:
            columns = SEQUENCE_COLUMNS if relation == SEQUENCES else {}
            empty = pa.schema([("dump", pa.string()), *columns.items()]).empty_table()
            union = f"SELECT * FROM {self._register(f'no {relation}', empty)}"
        self._connection.execute(f"CREATE VIEW {_identifier(relation)} AS {union}")


def _check_statement(sql: str) -> None:
    """Refuse anything but one statement that only reads.

    Raises:
        QueryError: saying what it is instead, or where it does not parse.
    """
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryError(f"this SQL does not parse: {error}") from None
    if len(statements) != 1:
        raise QueryError(f"give one SELECT statement: this has {len(statements)}")
    kind = statements[0].type.name
    if kind != "SELECT":
        raise QueryError(f"only a SELECT statement is answered, and this is {kind}: a store is never changed through SQL")


def run_query(store: Path, index: Index, manifests: list[Manifest], sql: str) -> pa.Table:
    """Answer one SELECT statement.

    Raises:
        QueryError: it is refused, or DuckDB cannot run it.
        DamageError: a file it reads is not what was published.
    """
    _check_statement(sql)
    with duckdb.connect(":memory:", config=CONFIGURATION) as connection:
        connection.register("dumps", dumps_table(index, manifests))
        connection.register("shards", shards_table(index))
        catalogue = _Catalogue(store, index, manifests, connection)
        relations = catalogue.relations()
        # Shards are opened only for a query that speaks of what is in them; SHOW TABLES speaks of nothing and gets all.
        mentioned = {name: branches for name, branches in relations.items() if name in sql.lower()}
        if not mentioned and "shards" not in sql.lower() and "dumps" not in sql.lower():
            mentioned = relations
        for relation, branches in mentioned.items():
            catalogue.create(relation, branches)
        connection.execute("SET lock_configuration = true")
        connection.execute("BEGIN TRANSACTION READ ONLY")
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            message = str(error)
            if "checksum" in message.lower():
                raise DamageError(f"a shard of {store} is damaged: run `knowledge-store verify {store}`") from None
            raise QueryError(f"this SQL was not run: {message.splitlines()[0]}") from None

