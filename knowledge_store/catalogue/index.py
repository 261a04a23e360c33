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

from knowledge_store.errors import DamageError
from knowledge_store.format.commits import CommitRecord, misplaced, read_commit
from knowledge_store.format.layout import COMMITS, FORMAT_VERSION, INDEX_FILE, SEQUENCES, commit_path, commit_shard
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.pages import MAX_COLUMNS
from knowledge_store.storage.local import disk_errors, replace_bytes

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
MAX_TEXT = 1000
MAX_FILES = 64  # of one shard, as commit records may name
TYPES = {
    pa.string(): "VARCHAR",
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
    SHARDS.field("column_bytes").type: "MAP(VARCHAR, BIGINT)",
}
# How an index is read: as a database beside DuckDB's own, so that no function or type that it may define is found by its name.
GIVEN = "given.main"
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
    """The commit records that stand in the store: (dump, shard) to (bytes, modification time in ns).

    Raises:
        DamageError: there is a name of a commit record, and nothing can be found out about the file.
        StoreError: a folder of commit records cannot be listed.
    """
    found: Standing = {}
    for dump in dumps:
        folder = store / dump / COMMITS
        with disk_errors("read", folder):
            try:
                entries = os.scandir(folder)
            except FileNotFoundError:  # nothing is committed yet, or somebody removes the dump
                if folder.is_symlink():
                    raise
                continue
            with entries:
                found.update(_standing(dump, entries, folder))
    return found


def _standing(dump: str, entries: Iterable[os.DirEntry[str]], folder: Path) -> Standing:
    """`standing_records` of one dump; none of a dump that is removed meanwhile."""
    found: Standing = {}
    for entry in entries:
        shard = commit_shard(entry.name)
        if shard is None:
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if os.path.lexists(entry.path):  # a link to nothing, or to itself
                raise DamageError(f"{entry.path} is damaged: it cannot be read ({error.strerror})") from None
            if not folder.exists():
                return {}
            continue  # removed since its name was read
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


def _log(path: Path) -> Path:
    """Where DuckDB keeps what is not in a database yet. No index ever has one."""
    return path.with_name(f"{path.name}.wal")


def _load(path: Path, standing: Standing) -> Index | None:
    """The index in a file, or None when there is none that this version can use for these commit records.

    A store may come from anywhere. Nothing in its index can make DuckDB look elsewhere, run what is written there, or take much
    more memory than an index of such commit records does.
    """
    if path.is_symlink() or not path.is_file() or os.path.lexists(_log(path)):
        return None
    room = 2**16 + 4 * min(sum(size for size, _ in standing.values()), 2**28)  # for all its text, in bytes: twice what it is
    try:
        if path.stat().st_size > 2**22 + room:
            return None
        limits: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{2**27 + 4 * room}B",
            "threads": "2",
            "temp_directory": "",
        }
        with duckdb.connect(":memory:", config=limits) as connection:
            name = str(path.absolute()).replace("'", "''")
            connection.execute(f"SET allowed_paths = ['{name}', '{name}.wal']")
            connection.execute("SET enable_external_access = false")
            connection.execute(f"ATTACH '{name}' AS given (READ_ONLY, TYPE duckdb)")
            statistics = _statistics(connection, len(standing))
            if statistics is None or 8 * len(standing) * len(statistics) > room or not _sound(connection, room):
                return None
            shards = _rows(connection, "shards", _shards_schema(statistics), "dump, shard")
            index = Index(shards, _rows(connection, "files", FILES, 'dump, shard, "table"'))
            return index if _each_once(index) else None
    except (duckdb.Error, pa.ArrowException, OSError, ValueError, KeyError, MemoryError):
        return None  # damaged, or of another DuckDB: it is rebuilt


def _each_once(index: Index) -> bool:
    """Whether each shard stands once, and each of its files, as many for every shard of a dump."""
    shards = index.shards.group_by(["dump", "shard"]).aggregate([])
    files = index.files.group_by(["dump", "shard", "table"]).aggregate([])
    if len(shards) < len(index.shards) or len(files) < len(index.files):
        return False
    of_dumps = index.files.group_by(["dump", "table"]).aggregate([("shard", "count")])
    counts = index.shards.group_by("dump").aggregate([("shard", "count")])
    expected = dict(zip(counts["dump"].to_pylist(), counts["shard_count"].to_pylist(), strict=True))
    rows = zip(of_dumps["dump"].to_pylist(), of_dumps["shard_count"].to_pylist(), strict=True)
    return set(of_dumps["dump"].to_pylist()) == expected.keys() and all(count == expected.get(dump) for dump, count in rows)


def _rows(connection: duckdb.DuckDBPyConnection, table: str, schema: pa.Schema, order: str) -> pa.Table:
    columns = ", ".join(f'"{name}"' for name in schema.names)
    return connection.sql(f"SELECT {columns} FROM {GIVEN}.{table} ORDER BY {order}").to_arrow_table().cast(schema)


def _statistics(connection: duckdb.DuckDBPyConnection, records: int) -> list[str] | None:
    """The columns of statistics of an index that holds what `_save` makes of so many commit records at most, and nothing else:
    no view, and no column that is computed. None for another. Only DuckDB's catalogue is read, and no table."""
    views = connection.sql("SELECT 1 FROM duckdb_views() WHERE database_name = 'given' LIMIT 1").fetchall()
    tables = connection.sql(
        "SELECT schema_name || '.' || table_name, estimated_size FROM duckdb_tables() WHERE database_name = 'given'"
    ).fetchall()
    most = {"main.about": 1, "main.shards": records, "main.files": MAX_FILES * records}
    if views or dict(tables).keys() != most.keys() or any(rows > most[name] for name, rows in tables):
        return None
    found = connection.sql(
        "SELECT table_name, column_name, data_type, column_default FROM duckdb_columns() WHERE database_name = 'given'"
    ).fetchall()
    statistics = [
        name
        for table, name, _, _ in found
        if table == "shards" and name.startswith(STATISTIC) and name.removeprefix(STATISTIC).isidentifier()
    ]
    expected = {("about", "value", "VARCHAR", None)} | {
        (table, field.name, TYPES[field.type], None)
        for table, schema in (("shards", _shards_schema(statistics)), ("files", FILES))
        for field in schema
    }
    return statistics if set(found) == expected else None


def _sound(connection: duckdb.DuckDBPyConnection, room: int) -> bool:
    """Whether the tables of an index are of this version and have no more text than there is room for, and no longer: one that
    is compressed can stand for more than any memory holds. Hashes become names of files."""
    if connection.sql(f"SELECT value FROM {GIVEN}.about LIMIT 2").fetchall() != [(INDEX_SCHEMA,)]:
        return False
    texts = {
        f"{GIVEN}.shards": ("dump", "identity", "committed_at"),
        f"{GIVEN}.files": ("dump", '"table"', "sha256", "footer_sha256"),
        f"(SELECT unnest(map_keys(column_bytes)) AS name FROM {GIVEN}.shards)": ("name",),
    }
    for rows, names in texts.items():
        of_each = ", ".join(f"max(strlen({name})), sum(strlen({name}))" for name in names)
        [found] = connection.sql(f"SELECT {of_each} FROM {rows}").fetchall()
        room -= sum(size or 0 for size in found[1::2])
        if room < 0 or max(size or 0 for size in found[::2]) > MAX_TEXT:
            return False
    [[columns]] = connection.sql(f"SELECT max(cardinality(column_bytes)) FROM {GIVEN}.shards").fetchall()
    hashes = " AND ".join(f"regexp_full_match({name}, '[0-9a-f]{{64}}')" for name in ("sha256", "footer_sha256"))
    [[hashed]] = connection.sql(f"SELECT bool_and({hashes}) FROM {GIVEN}.files").fetchall()
    return (columns or 0) <= MAX_COLUMNS and hashed is not False


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
        with contextlib.suppress(FileNotFoundError):
            _log(path).unlink()  # of some other database in its place
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
    known = None if rebuild else _load(path, standing)
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
        if dump in manifests and identity != manifests[dump].identity_sha256:
            return False
    return True


def _keep(table: pa.Table, keys: set[tuple[str, int]]) -> pa.Table:
    pairs = zip(table["dump"].to_pylist(), table["shard"].to_pylist(), strict=True)
    return table.filter(pa.array([pair in keys for pair in pairs], pa.bool_()))
