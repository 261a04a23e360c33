"""A dump's relations as SQL that any DuckDB runs by itself, over the committed files: what `knowledge-store view` prints.

DuckDB's own reader checks neither block digests nor page checksums: `knowledge-store verify` first, where that matters.
"""

from __future__ import annotations

import duckdb
import pyarrow as pa

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.format.layout import SEQUENCES, tokens_file
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.kind import filled
from knowledge_store.sql.query import readable
from knowledge_store.sql.quoting import identifier, literal


def create_statements(dumps: Dumps, manifest: Manifest) -> str:
    """Statements that create the views of one dump: `sequences`, `tokens`, and the relations of its kinds.

    Raises:
        StoreError: the dump has columns of an unknown type.
        InputError: no other program can open the store's files.
    """
    dump = literal(manifest.dump)
    tokens = f"read_parquet({literal(dumps.storage.external_address(tokens_file(manifest.dump)))})"
    statements = {
        "tokens": f"SELECT {dump} AS dump, * FROM {tokens}",
        SEQUENCES: f"SELECT {dump} AS dump, * FROM {_files(dumps, manifest, SEQUENCES, sequences_schema(manifest))}",
    }
    texts = f"(SELECT list(text ORDER BY token_id) AS list FROM {tokens})"
    tables = {name: _table(dumps, manifest, name) for name in manifest.kinds}
    for name, rows in tables.items():
        kind = KINDS[name]
        places = {"dump": dump, "rows": rows, "texts": texts}
        for relation in {name: None, **kind.relations}:
            sql = kind.relation(relation, manifest) or "SELECT {dump} AS dump, * FROM {rows}"
            statements[relation] = filled(sql, tables.__getitem__, **places).strip()
    return "\n\n".join(f"CREATE VIEW {identifier(relation)} AS\n{sql};" for relation, sql in statements.items())


def _table(dumps: Dumps, manifest: Manifest, name: str) -> str:
    """The table of a kind, as SQL."""
    kind = KINDS[name]
    rows, view = _files(dumps, manifest, name, kind.stored_schema(manifest)), kind.view(manifest)
    return rows if view is None else f"({filled(view, rows=rows)})"


def _files(dumps: Dumps, manifest: Manifest, table: str, schema: pa.Schema) -> str:
    """The committed files of a table, as SQL; where there is none yet, no rows of its columns."""
    files = dumps.files(manifest, table, schema).values()
    if not files:
        return _no_rows(schema)
    paths = [literal(file.storage.external_address(file.name)) for file in files]
    return f"read_parquet([{', '.join(paths)}])"


def _no_rows(schema: pa.Schema) -> str:
    with duckdb.connect() as connection:
        empty = connection.from_arrow(pa.schema([readable(column) for column in schema]).empty_table())
        columns = [f"NULL::{kind} AS {identifier(name)}" for name, kind in zip(empty.columns, empty.types, strict=True)]
    return f"(SELECT {', '.join(columns)} WHERE false)"
