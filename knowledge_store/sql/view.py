"""A dump's relations as SQL that any DuckDB runs by itself, over the committed files: what `knowledge-store view` prints.

DuckDB's own reader checks neither block digests nor page checksums: `knowledge-store verify` first, where that matters.
"""

from __future__ import annotations

from pathlib import Path

from knowledge_store.catalogue.index import Index
from knowledge_store.format.layout import SEQUENCES, TOKENS_FILE
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS
from knowledge_store.reading.reader import shard_files
from knowledge_store.sql.query import identifier, literal


def dump_views(store: Path, index: Index, manifest: Manifest) -> str:
    """Statements that create the views of one dump: `sequences`, `tokens`, and the relations of its kinds.

    Raises:
        StoreError: the dump has columns of an unknown type.
    """
    folder = (store / manifest.dump).absolute()
    dump = literal(manifest.dump)
    tokens = f"read_parquet({literal(str(folder / TOKENS_FILE))})"
    statements = {
        "tokens": f"SELECT {dump} AS dump, * FROM {tokens}",
        SEQUENCES: f"SELECT {dump} AS dump, * FROM {_files(store, index, manifest, SEQUENCES)}",
    }
    texts = f"(SELECT list(text ORDER BY token_id) AS list FROM {tokens})"
    for name in manifest.kinds:
        kind = KINDS[name]
        rows = _files(store, index, manifest, name)
        view = kind.view(manifest)
        if view is not None:
            rows = f"({view.format(rows=rows)})"
        for relation, sql in {name: "SELECT {dump} AS dump, * FROM {rows}", **kind.relations}.items():
            statements[relation] = sql.format(dump=dump, rows=rows, texts=texts).strip()
    return "\n\n".join(f"CREATE VIEW {identifier(relation)} AS\n{sql};" for relation, sql in statements.items())


def _files(store: Path, index: Index, manifest: Manifest, table: str) -> str:
    """The committed files of a table, as SQL."""
    paths = [literal(str(file.path.absolute())) for file in shard_files(store, index, manifest.dump, table)]
    return f"read_parquet([{', '.join(paths)}])"
