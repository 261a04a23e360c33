"""The index: what the commit records say, in one DuckDB file that opens fast. Derived, and disposable at any time.

It lies in the cache folder of whoever reads the store, and not in the store: a store may be read-only, or come from somebody
else, whose index nobody should open. It is built from commit records alone; no shard is opened. A new index is made elsewhere
and renamed over the old one, and nobody ever opens an index for writing, so readers never meet a lock. It is fresh when it has
exactly the commit records that stand in the store, by name, size and version; only records that it does not hold yet are read,
from a bucket many at once where they are bundled (see `bundles`).
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import DamageError, StoreError
from knowledge_store.format.bundles import Bundle, bundles, read_bundle
from knowledge_store.format.commits import CommitRecord, commit_entries, read_commit_of
from knowledge_store.format.layout import COMMITS, FORMAT_VERSION, SEQUENCES, user_cache
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.sequences import POSITIONS_STATISTIC, TRUNCATED_STATISTIC
from knowledge_store.storage import Storage, concurrently
from knowledge_store.storage.local import make_folder, replace_bytes

SHARDS = pa.schema(
    [
        ("dump", pa.string()),
        ("shard", pa.int64()),
        ("identity", pa.string()),
        ("record_bytes", pa.int64()),
        ("record_version", pa.string()),
        ("first_document", pa.int64()),
        ("documents", pa.int64()),
        ("sequences", pa.int64()),
        ("positions", pa.int64()),
        ("truncated", pa.int64()),
        ("skipped_rows", pa.int64()),
        ("skip_reasons", pa.map_(pa.string(), pa.int64())),
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
OWN_STATISTICS = (POSITIONS_STATISTIC, TRUNCATED_STATISTIC)  # which are columns of SHARDS
INDEX_SCHEMA = f"format {FORMAT_VERSION}, index 6"
ORDER = [("dump", "ascending"), ("shard", "ascending")]

Versions = dict[tuple[str, int], tuple[int, str]]


@dataclass(frozen=True)
class Index:
    """The committed shards of a store and their files (schema FILES), both ordered by dump and shard.

    Questions about shards are answered from the first table alone, column by column: Python objects for each of ten
    thousand shards would take longer than DuckDB's whole answer. It has the columns of SHARDS, where `sequences` are
    rows of that table, `positions` all their tokens, `truncated` how many were truncated, `bytes` are of all files, and
    the keys of `column_bytes` are "table.column"; then one column (float64) for each statistic of the commit records, its
    name after STATISTIC.
    """

    shards: pa.Table
    files: pa.Table


def index_path(storage: Storage) -> Path:
    """Where the index of a store is kept."""
    return user_cache("index") / f"{hashlib.sha256(storage.cache_key.encode()).hexdigest()[:32]}.duckdb"


def _shards_schema(names: Iterable[str]) -> pa.Schema:
    """SHARDS, and the columns of statistics among these names."""
    return pa.schema([*SHARDS, *((name, pa.float64()) for name in sorted(set(names)) if name.startswith(STATISTIC))])


def _shard_row(commit: CommitRecord, version: tuple[int, str]) -> dict[str, object]:
    columns = {f"{table}.{name}": size for table, file in commit.files.items() for name, size in file.column_bytes.items()}
    return {
        "dump": commit.dump,
        "shard": commit.shard,
        "identity": commit.identity,
        "record_bytes": version[0],
        "record_version": version[1],
        "first_document": commit.first_document,
        "documents": commit.documents,
        "sequences": commit.files[SEQUENCES].rows if SEQUENCES in commit.files else None,
        "positions": int(commit.statistics.get(POSITIONS_STATISTIC, 0)),
        "truncated": int(commit.statistics.get(TRUNCATED_STATISTIC, 0)),
        "skipped_rows": len(commit.skipped),
        "skip_reasons": list(Counter(str(row.get("reason", "")) for row in commit.skipped).items()),
        "bytes": sum(file.bytes for file in commit.files.values()),
        "committed_at": commit.made_by.get("committed_at"),
        "column_bytes": list(columns.items()),
        **{f"{STATISTIC}{name}": value for name, value in commit.statistics.items() if name not in OWN_STATISTICS},
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
    """The index in a file, or None when this version can use nothing there."""
    try:
        if not path.is_file():
            return None
        with duckdb.connect(str(path), read_only=True) as connection:
            if connection.sql("SELECT value FROM about").fetchall() != [(INDEX_SCHEMA,)]:
                return None
            shards = connection.sql("SELECT * FROM shards ORDER BY dump, shard").to_arrow_table()
            files = connection.sql('SELECT * FROM files ORDER BY dump, shard, "table"').to_arrow_table()
        return Index(shards.cast(_shards_schema(shards.column_names)), files.cast(FILES))
    except (duckdb.Error, pa.ArrowException, OSError, ValueError, KeyError, MemoryError):
        return None  # damaged, or of another DuckDB: it is rebuilt


def _save(index: Index, path: Path) -> None:
    make_folder(path.parent)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        # Small blocks: with DuckDB's own of 256 kB the smallest index takes a megabyte.
        with duckdb.connect(str(made), config={"default_block_size": "16384"}) as connection:
            connection.execute("CREATE TABLE about AS SELECT ? AS value", [INDEX_SCHEMA])
            for name, table in (("shards", index.shards), ("files", index.files)):
                connection.register("rows", table)
                connection.execute(f"CREATE TABLE {name} AS SELECT * FROM rows")
                connection.unregister("rows")
        replace_bytes(path, made.read_bytes())


def refresh(
    storage: Storage, manifests: list[Manifest], *, rebuild: bool = False
) -> tuple[Index, dict[str, DamageError | StoreError]]:
    """The index of some dumps, brought up to date with the commit records that stand in the store.

    Args:
        storage: of the store.
        manifests: of the dumps.
        rebuild: ignore the index there is and read every commit record.

    Returns:
        the index, and for each dump that it leaves out, why: a commit record is altered, of another dump, or cannot be read,
        or all of them cannot be listed.
    """
    path = index_path(storage)
    by_name = {manifest.dump: manifest for manifest in manifests}
    unusable: dict[str, DamageError | StoreError] = {}
    standing: Versions = {}
    bundled: dict[str, list[Bundle]] = {}
    for dump in by_name:
        try:
            entries = storage.files(f"{dump}/{COMMITS}")
        except (DamageError, StoreError) as error:
            unusable[dump] = error
            continue
        standing |= {(dump, shard): (entry.size, entry.version) for shard, entry in commit_entries(entries).items()}
        bundled[dump] = bundles(dump, entries) if storage.at_once > 1 and not rebuild else []
    known = None if rebuild else _load(path)
    indexed: Versions = {}
    if known is not None:
        columns = (known.shards[name].to_pylist() for name in ("dump", "shard", "record_bytes", "record_version"))
        indexed = {(dump, shard): (size, version) for dump, shard, size, version in zip(*columns, strict=True) if version}
        if not _of_these_dumps(known.shards, by_name):  # a manifest is not what it was: which record is wrong, they say
            known, indexed = None, {}
        elif indexed == standing:
            return known, unusable
    shard_rows, file_rows = [], []

    def add(commit: CommitRecord) -> None:
        shard_rows.append(_shard_row(commit, standing[commit.dump, commit.shard]))
        file_rows.extend(_file_rows(commit))

    unread = {key: version for key, version in sorted(standing.items()) if indexed.get(key) != version}
    for dump, found in bundled.items():
        for commit in _bundled(storage, by_name[dump], found, unread):
            add(commit)
            del unread[dump, commit.shard]

    def read(key: tuple[str, int]) -> CommitRecord | DamageError | StoreError | None:
        dump, shard = key
        try:
            return None if dump in unusable else read_commit_of(storage, by_name[dump], shard)
        except (DamageError, StoreError) as error:
            return unusable.setdefault(dump, error)

    for outcome in concurrently(storage, read, unread):
        if isinstance(outcome, CommitRecord):
            add(outcome)
    shards = pa.Table.from_pylist(shard_rows, schema=_shards_schema(chain.from_iterable(shard_rows)))
    files = pa.Table.from_pylist(file_rows, schema=FILES)
    keep = {key for key, version in standing.items() if indexed.get(key) == version}
    if known is not None:
        shards = pa.concat_tables([_keep(known.shards, keep), shards], promote_options="default")
        files = pa.concat_tables([_keep(known.files, keep), files])
    index = Index(shards.sort_by(ORDER), files.sort_by([*ORDER, ("table", "ascending")]))
    if known is None or shard_rows or len(keep) < len(indexed):
        with contextlib.suppress(duckdb.Error, OSError, StoreError):  # a cache that cannot be written costs time, nothing else
            _save(index, path)
    if unusable:  # what can be used of them is saved, so that it is not read again
        usable = pc.field("dump").isin(pa.array(by_name.keys() - unusable.keys(), pa.string()))
        index = Index(index.shards.filter(usable), index.files.filter(usable))
    return index, unusable


def _bundled(storage: Storage, manifest: Manifest, found: list[Bundle], unread: Versions) -> Iterator[CommitRecord]:
    """The commit records of a dump among those still to be read that bundles of it hold as they stand now; those that are not
    to be had so are read by themselves. What is taken is to be taken out of `unread`."""
    for bundle in found:
        if sum(dump == manifest.dump and bundle.first <= shard <= bundle.last for dump, shard in unread) < 2:
            continue
        with contextlib.suppress(DamageError, StoreError):  # `verify` names it; the records themselves are there
            for shard, (size, version, commit) in read_bundle(storage, manifest, bundle).items():
                if unread.get((manifest.dump, shard)) == (size, version):
                    yield commit


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
