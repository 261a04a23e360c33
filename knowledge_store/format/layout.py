"""Where each file of a store lives. Nothing else in the project joins these names.

STORE/
  store.json
  DUMP/manifest.json
  DUMP/tokens.parquet
  DUMP/TABLE/00017.parquet     TABLE is `sequences` or a kind of knowledge
  DUMP/commits/00017.json
  DUMP/commits/00000-00999-KEY.json.gz   many commit records at once, in a bucket (see `bundles`)
  .scan-KEY-DUMP/              what workers that begin a dump found in its corpus so far; gone once there is a manifest
    00017.parquet, 00017.json, 00017.begun

Names are relative to the store, as its storage takes them. What is derived of a store (its index, decoded arrays) lies in the
user's cache folder, and not in the store.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from knowledge_store.errors import InputError

FORMAT_NAME = "knowledge-store"
FORMAT_VERSION = 5

STORE_FILE = "store.json"
MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.parquet"
COMMITS = "commits"
SEQUENCES = "sequences"

_DUMP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SCAN_FOLDER = re.compile(r"\.scan-[0-9a-f]{16}-(.+)")
_COMMIT_NAME = re.compile(r"(\d{5,})\.json")
_BUNDLE_NAME = re.compile(r"(\d{5,15})-(\d{5,15})-[0-9a-f]{16}\.json\.gz")


def check_dump_name(name: str) -> str:
    """Return `name`, or raise InputError when it cannot be a folder's name on every system."""
    if name == STORE_FILE:
        raise InputError(f"{name!r} cannot name a dump: the store has a file of that name")
    if not _DUMP_NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a dump: use letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit"
        )
    return name


def shard_name(shard: int) -> str:
    """The stem of a shard's files: five digits, more when they are needed."""
    return f"{shard:05d}"


def manifest_file(dump: str) -> str:
    """A dump's manifest."""
    return f"{dump}/{MANIFEST_FILE}"


def tokens_file(dump: str) -> str:
    """A dump's vocabulary."""
    return f"{dump}/{TOKENS_FILE}"


def table_file(dump: str, table: str, shard: int) -> str:
    """One table of one shard."""
    return f"{dump}/{table}/{shard_name(shard)}.parquet"


def commit_file(dump: str, shard: int) -> str:
    """A shard's commit record."""
    return f"{dump}/{COMMITS}/{shard_name(shard)}.json"


def scan_folder(dump: str, key: str) -> str:
    """Where workers that begin a dump share what they find in its corpus; `key` is the SHA-256 of all that it depends on."""
    return f".scan-{key[:16]}-{dump}"


def scanned_dump(folder: str) -> str | None:
    """The dump that a folder of a store is such a place for, or None when it is none."""
    match = _SCAN_FOLDER.fullmatch(folder)
    return match[1] if match else None


def scan_file(folder: str, piece: int, suffix: str) -> str:
    """What was found in one piece of a corpus: `parquet` of its documents, `json` for the rest; `begun` marks it as taken."""
    return f"{folder}/{shard_name(piece)}.{suffix}"


def commit_shard(name: str) -> int | None:
    """The shard a file in `commits/` records, or None when it is no commit record (a temporary file, say)."""
    match = _COMMIT_NAME.fullmatch(name)
    if match is None:
        return None
    shard = int(match[1])
    return shard if shard_name(shard) == match[1] else None


def bundle_file(dump: str, first: int, last: int, key: str) -> str:
    """The commit records of shards from one number to another in one file; `key` is the SHA-256 of what is in it."""
    return f"{dump}/{COMMITS}/{shard_name(first)}-{shard_name(last)}-{key[:16]}.json.gz"


def bundle_shards(name: str) -> tuple[int, int] | None:
    """The first and the last shard whose records a file in `commits/` bundles, or None when it is no bundle."""
    match = _BUNDLE_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


NOWHERE = Path(os.devnull, "nowhere")  # nothing is there, nor can anything be made, in what is no folder


def user_cache(name: str) -> Path:
    """The folder for one sort of thing that may be lost at any time, in the cache of whoever runs this; somewhere in NOWHERE
    where there is no home, as is ordinary in containers."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        base = NOWHERE
    return base / "knowledge-store" / name
