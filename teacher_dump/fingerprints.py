"""SHA-256 of large files, computed once: kept in the user's cache until a file's size or modification time changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.format.layout import user_cache
from knowledge_store.reporter import SILENT, Reporter

CHUNK_BYTES = 8 * 2**20
SHOW_PROGRESS_BYTES = 2 * 2**30


def _cache_path(path: Path) -> Path:
    return user_cache("fingerprints") / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"


def file_sha256(path: Path, *, reporter: Reporter = SILENT) -> str:
    """SHA-256 (hexadecimal) of a file, from the cache when its size and modification time are those it was computed at.

    Args:
        path: of the file.
        reporter: hears of progress through a large one.

    Raises:
        InputError: the file cannot be read.
    """
    path = path.resolve()
    try:
        status = path.stat()
        known = {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        cache = _cache_path(path)
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            cached = json.loads(cache.read_text())
            if isinstance(cached.get("sha256"), str) and {**cached, "sha256": None} == {**known, "sha256": None}:
                return str(cached["sha256"])
        sha256 = _hash(path, status.st_size, reporter)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**known, "sha256": sha256}))
        temporary.replace(cache)
    return sha256


def file_stamps(files: tuple[Path, ...]) -> list[tuple[int, int]]:
    """Size and modification time of each file, in bytes and nanoseconds (InputError: one cannot be read)."""
    stamps = []
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


def check_unchanged(files: tuple[Path, ...], stamps: list[tuple[int, int]]) -> None:
    """Make sure that no file was written since it had the stamps of `file_stamps`.

    Raises:
        InputError: one was; names it.
    """
    for path, before, now in zip(files, stamps, file_stamps(files), strict=True):
        if before != now:
            raise InputError(
                f"{path} was changed while the corpus was looked through: give the command again when nobody writes it any more"
            )


def _hash(path: Path, size: int, reporter: Reporter) -> str:
    if size < SHOW_PROGRESS_BYTES:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as file, reporter.progress(f"hashing {path.name}", size) as advance:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
