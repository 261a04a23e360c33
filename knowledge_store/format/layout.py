"""Where each file of a store lives. Nothing else in the project joins these names.

STORE/
  store.json
  DUMP/manifest.json
  DUMP/tokens.parquet
  DUMP/TABLE/00017.parquet     TABLE is `sequences` or a kind of knowledge
  DUMP/commits/00017.json
  index.duckdb
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from knowledge_store.errors import InputError

FORMAT_NAME = "knowledge-store"
FORMAT_VERSION = 4

STORE_FILE = "store.json"
INDEX_FILE = "index.duckdb"
MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.parquet"
COMMITS = "commits"
SEQUENCES = "sequences"

_DUMP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_COMMIT_NAME = re.compile(r"(\d{5,})\.json")


def check_dump_name(name: str) -> str:
    """Return `name`, or raise InputError when it cannot be a folder's name on every system."""
    if name in (STORE_FILE, INDEX_FILE):
        raise InputError(f"{name!r} cannot name a dump: the store has a file of that name")
    if not _DUMP_NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a dump: use letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit"
        )
    return name


def shard_name(shard: int) -> str:
    """The stem of a shard's files: five digits, more when they are needed."""
    return f"{shard:05d}"


def table_path(dump_folder: Path, table: str, shard: int) -> Path:
    """Path of one table of one shard."""
    return dump_folder / table / f"{shard_name(shard)}.parquet"


def commit_path(dump_folder: Path, shard: int) -> Path:
    """Path of a shard's commit record."""
    return dump_folder / COMMITS / f"{shard_name(shard)}.json"


def commit_shard(name: str) -> int | None:
    """The shard a file in `commits/` records, or None when it is no commit record (a temporary file, say)."""
    match = _COMMIT_NAME.fullmatch(name)
    if match is None:
        return None
    shard = int(match[1])
    return shard if shard_name(shard) == match[1] else None


def dump_folders(store: Path) -> list[Path]:
    """The dumps of a store: its folders with a manifest, by name."""
    return sorted(path.parent for path in store.glob(f"*/{MANIFEST_FILE}") if _DUMP_NAME.fullmatch(path.parent.name))


def user_cache(name: str) -> Path:
    """The folder for one sort of thing that may be lost at any time, in the cache of whoever runs this."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache")).expanduser()
    return base / "knowledge-store" / name
