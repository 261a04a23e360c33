"""The index: what the commit records say, in one DuckDB file that opens fast. Derived, and disposable at any time.

It is built from commit records alone; no shard is opened. A new index is made elsewhere and renamed over the old one, and
nobody ever opens an index for writing, so readers never meet a lock. It is fresh when it holds exactly the commit records
that stand in the store, by name, size and modification time; only records that it does not hold yet are read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow as pa

from knowledge_store.commits import CommitRecord, misplaced, read_commit
from knowledge_store.errors import DamageError
from knowledge_store.layout import COMMITS, FORMAT_VERSION, INDEX_FILE, SEQUENCES, commit_path, commit_shard
from knowledge_store.manifest import Manifest
from knowledge_store.pages import MOST_COLUMNS
from knowledge_store.publication import replace_bytes

SHARDS = pa.schema(
    [
        ("dump", pa.string()),
        ("shard", pa.int64()),
        ("identity", pa.string()),
        ("record_bytes", pa.int64()),
        ("record_mtime_ns", pa.int64()),
        ("first_document", pa.int64()),
        ("documents", pa.int64()),
        ("sequences", pa.int64()),
        ("positions", pa.int64()),
        ("skipped_rows", pa.int64()),
        ("bytes", pa.int64()),
        ("committed_at", pa.string()),
        ("column_bytes", pa.map_(pa.string(), pa.int64())),
    ]
)

FILES = pa.schema(
    [
        ("dump", pa.string()),
        ("shard", pa.int64()),
        ("table", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("footer_sha256", pa.string()),
        ("rows", pa.int64()),
    ]
)

STATISTIC = "statistic "
MOST_ROWS = 10_000_000
MOST_TEXT = 1000
INDEX_SCHEMA = f"format {FORMAT_VERSION}, index 3"

Standing = dict[tuple[str, int], tuple[int, int]]


@dataclass(frozen=True)
class Index:
    """The committed shards of a store and their files (schema FILES), both ordered by dump and shard.

    Questions about shards are answered from the first table alone, column by column: Python objects for each of ten
    thousand shards would take longer than DuckDB's whole answer. It has the columns of SHARDS, where `sequences` and
    `positions` are rows of those tables (null without one), `bytes` are of all files, and the keys of `column_bytes` are
    "table.column"; then one column (float64) for each statistic of the commit records, its name after STATISTIC.
    """

    shards: pa.Table
    files: pa.Table


def standing_records(store: Path, dumps: list[str]) -> Standing:
    """The commit records that stand in the store: (dump, shard) to (bytes, modification time in ns)."""
    found: Standing = {}
    for dump in dumps:
        with contextlib.suppress(FileNotFoundError), os.scandir(store / dump / COMMITS) as entries:
            for entry in entries:
                shard = commit_shard(entry.name)
                if shard is not None:
                    status = entry.stat()
                    found[dump, shard] = status.st_size, status.st_mtime_ns
    return found


def _shards_schema(names: Iterable[str]) -> pa.Schema:
    """SHARDS, and the columns of statistics among these names."""
    return pa.schema([*SHARDS, *((name, pa.float64()) for name in sorted(set(names)) if name.startswith(STATISTIC))])


def _shard_row(commit: CommitRecord, standing: tuple[int, int]) -> dict[str, object]:
    columns = {f"{table}.{name}": size for table, file in commit.files.items() for name, size in file.column_bytes.items()}
    return {
        "dump": commit.dump,
        "shard": commit.shard,
        "identity": commit.identity,
        "record_bytes": standing[0],
        "record_mtime_ns": standing[1],
        "first_document": commit.first_document,
        "documents": commit.documents,
        **{table: commit.files[table].rows for table in (SEQUENCES, "positions") if table in commit.files},
        "skipped_rows": len(commit.skipped),
        "bytes": sum(file.bytes for file in commit.files.values()),
        "committed_at": commit.made_by.get("committed_at"),
        "column_bytes": list(columns.items()),
        **{f"{STATISTIC}{name}": value for name, value in commit.statistics.items()},
    }


def _file_rows(commit: CommitRecord) -> list[dict[str, object]]:
    return [
        {
            "dump": commit.dump,
            "shard": commit.shard,
            "table": table,
            "bytes": record.bytes,
            "sha256": record.sha256,
            "footer_sha256": record.footer_sha256,
            "rows": record.rows,
        }
        for table, record in sorted(commit.files.items())
    ]


def _load(path: Path) -> Index | None:
    """The index in a file, or None when there is none that this version can use."""
    if not path.is_file():
        return None
    try:
        # A store may come from anywhere: nothing in its index can make DuckDB look elsewhere.
        with duckdb.connect(str(path), read_only=True, config={"enable_external_access": "false"}) as connection:
            if connection.sql("SELECT value FROM about").fetchall() != [(INDEX_SCHEMA,)] or not _sound(connection):
                return None
            shards = connection.sql("SELECT * FROM shards ORDER BY dump, shard").to_arrow_table()
            files = connection.sql('SELECT * FROM files ORDER BY dump, shard, "table"').to_arrow_table()
            schema = _shards_schema(shards.column_names)
            return Index(shards.select(schema.names).cast(schema), files.cast(FILES))
    except (duckdb.Error, pa.ArrowException, ValueError, KeyError):
        return None  # damaged, or of another DuckDB: it is rebuilt


def _sound(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether an index holds tables alone, of no more rows and text than commit records could have given it: it comes with a
    store, and a view or a compressed constant could stand for more than any memory holds. Hashes become names of files."""
    if connection.sql("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() != [(0,)]:
        return False
    [[shards, longest, columns]] = connection.sql(
        "SELECT count(*), max(greatest(strlen(dump), strlen(identity), strlen(committed_at))), max(cardinality(column_bytes))"
        " FROM shards"
    ).fetchall()
    [[files, named, hashed]] = connection.sql(
        'SELECT count(*), max(greatest(strlen(dump), strlen("table"))), bool_and('
        "regexp_full_match(sha256, '[0-9a-f]{64}') AND regexp_full_match(footer_sha256, '[0-9a-f]{64}')) FROM files"
    ).fetchall()
    return bool(
        max(shards, files) <= MOST_ROWS
        and max(longest or 0, named or 0) <= MOST_TEXT
        and (columns or 0) <= MOST_COLUMNS
        and hashed is not False
    )


def _save(index: Index, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / INDEX_FILE
        # Small blocks: with DuckDB's own of 256 kB the smallest index takes a megabyte.
        with duckdb.connect(str(made), config={"default_block_size": "16384"}) as connection:
            connection.execute("CREATE TABLE about AS SELECT ? AS value", [INDEX_SCHEMA])
            for name, table in (("shards", index.shards), ("files", index.files)):
                connection.register("rows", table)
                connection.execute(f"CREATE TABLE {name} AS SELECT * FROM rows")
                connection.unregister("rows")
        replace_bytes(path, made.read_bytes())


def refresh(store: Path, manifests: list[Manifest], *, rebuild: bool = False) -> Index:
    """The index of some dumps, brought up to date with the commit records that stand in the store.

    Args:
        store: the store's folder. When it cannot be written, the index lives in memory only.
        manifests: of the dumps.
        rebuild: ignore the index there is and read every commit record.

    Raises:
        DamageError: a commit record is altered, or of another dump.
    """
    path = store / INDEX_FILE
    by_name = {each.dump: each for each in manifests}
    standing = standing_records(store, list(by_name))
    known = None if rebuild else _load(path)
    indexed: Standing = {}
    if known is not None:
        columns = (known.shards[name].to_pylist() for name in ("dump", "shard", "record_bytes", "record_mtime_ns"))
        indexed = {(dump, shard): (size, mtime) for dump, shard, size, mtime in zip(*columns, strict=True)}
        if indexed == standing and _of_these_dumps(known.shards, by_name):
            return known
        if not _of_these_dumps(known.shards, by_name):  # a manifest is not what it was: which record is wrong, they say
            known, indexed = None, {}
    shard_rows, file_rows = [], []
    for (dump, shard), status in sorted(standing.items()):
        if indexed.get((dump, shard)) != status:
            path_of_record = commit_path(store / dump, shard)
            commit = read_commit(path_of_record)
            complaint = misplaced(commit, by_name[dump], shard, path_of_record)
            if complaint:
                raise DamageError(complaint)
            shard_rows.append(_shard_row(commit, status))
            file_rows.extend(_file_rows(commit))
    shards = pa.Table.from_pylist(shard_rows, schema=_shards_schema(chain.from_iterable(shard_rows)))
    files = pa.Table.from_pylist(file_rows, schema=FILES)
    if known is not None:
        keep = {key for key, status in standing.items() if indexed.get(key) == status}
        shards = pa.concat_tables([_keep(known.shards, keep), shards], promote_options="default")
        files = pa.concat_tables([_keep(known.files, keep), files])
    order = [("dump", "ascending"), ("shard", "ascending")]
    index = Index(shards.sort_by(order), files.sort_by([*order, ("table", "ascending")]))
    with contextlib.suppress(duckdb.Error, OSError):  # a store that cannot be written is read all the same
        _save(index, path)
    return index


def _of_these_dumps(shards: pa.Table, manifests: dict[str, Manifest]) -> bool:
    """Whether an index's shards are of dumps as their manifests have them now. (Of dumps that are gone, it does not matter.)"""
    pairs = shards.select(["dump", "identity"]).group_by(["dump", "identity"]).aggregate([])
    for dump, identity in zip(pairs["dump"].to_pylist(), pairs["identity"].to_pylist(), strict=True):
        if (manifest := manifests.get(dump)) is None or (identity is None and manifest.version < 3):
            continue
        if identity != manifest.identity_sha256:
            return False
    return True


def _keep(table: pa.Table, keys: set[tuple[str, int]]) -> pa.Table:
    pairs = zip(table["dump"].to_pylist(), table["shard"].to_pylist(), strict=True)
    return table.filter(pa.array([pair in keys for pair in pairs], pa.bool_()))
