"""The small dump that is killed, starved and cut off, and what must hold of whatever is left of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer
from stores import DOCUMENTS, commit, contents, make_manifest, random_sequences, read_whole, words

from knowledge_store import DumpWriter, KnowledgeStore, verify
from knowledge_store.format import parquet
from knowledge_store.format.layout import COMMITS, SEQUENCES, commit_shard, table_file
from knowledge_store.format.sequences import WINDOW_BITS, tokens_table
from knowledge_store.storage.naming import TEMPORARY_PREFIX
from knowledge_store.terminal.console import command_errors
from knowledge_store.writing.repair import damaged_files

DUMP = "small"
SHARDS = 3
# The first shard's positions take several writes, the others' one.
SIZES = (40, 3, 3)
QUICK = 1  # a compression level of a twin: the same rows in other bytes


def write_dump(store: Path, acknowledge: Callable[[int], None] = lambda shard: None, level: int | None = None) -> None:
    """Make the small dump, or go on with it, as a worker does: what has no commit record is made and committed.

    Args:
        store: the store's folder.
        acknowledge: called with each shard, as soon as the writer says that it is committed.
        level: compress as no other worker does.
    """
    if level is not None:
        parquet.COMPRESSION_LEVEL = level
    writer = DumpWriter.open(store, make_manifest(DUMP, shards=SHARDS), tokens_table(words(11), words(11)))
    for shard in range(SHARDS):
        if not writer.committed(shard):
            commit(writer, shard, random_sequences(shard, SIZES[shard], longest=64))
        acknowledge(shard)


def harm(store: Path) -> None:
    """Damage a file of each sort, each in a shard of its own."""
    for name in ("commits/00000.json", "positions/00001.parquet", "sequences/00002.parquet"):
        path = store / DUMP / name
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)


def repair_dump(store: Path, acknowledge: Callable[[int], None] = lambda shard: None) -> None:
    """Repair what is damaged of the small dump, as `--repair` does, and acknowledge each shard that is sound then."""
    writer = DumpWriter.open(store, make_manifest(DUMP, shards=SHARDS), tokens_table(words(11), words(11)))
    for shard in range(SHARDS):
        if damaged_files(writer, shard):
            commit(writer, shard, random_sequences(shard, SIZES[shard], longest=64), repair=True)
        acknowledge(shard)


def check_half_repaired(store: Path, acknowledged: set[int], whole: Path) -> None:
    """Make sure that what is left of a repair that was cut off is found to be damaged, or as in the `whole` dump.

    Raises:
        AssertionError: it is neither.
    """
    damage = verify(store).damage
    for shard in range(SHARDS):
        if any(f"/{shard:05d}." in sentence for sentence in damage):
            assert shard not in acknowledged, f"shard {shard} was acknowledged, and is damaged: {damage}"
        else:
            assert all(mine.equals(theirs) for mine, theirs in zip(rows(store, shard), rows(whole, shard), strict=True))


def committed(store: Path) -> set[int]:
    """The shards with a commit record."""
    folder = store / DUMP / COMMITS
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return {shard for name in names if (shard := commit_shard(name)) is not None}


def leftovers(store: Path) -> list[Path]:
    """Temporary files and folders anywhere in a store."""
    return list(store.rglob(f"{TEMPORARY_PREFIX}*"))


def rows(store: Path, shard: int) -> list[pa.Table]:
    """The tables of a shard as they are stored, whatever their bytes."""
    return [read_whole(store / table_file(DUMP, table, shard)) for table in (SEQUENCES, "positions")]


def check_standing(store: Path, acknowledged: set[int], whole: Path) -> set[int]:
    """Make sure that what is left of a dump holds what was acknowledged, and nothing that is not in the `whole` dump.

    Returns:
        the shards that are committed.

    Raises:
        AssertionError: it does not.
    """
    standing = committed(store)
    assert acknowledged <= standing, f"lost: shards {sorted(acknowledged - standing)} were acknowledged"
    if not (store / DUMP / "manifest.json").exists():
        assert not standing, "commit records without a manifest"
        return standing
    found = verify(store)
    assert found.sound, found
    with_shards = KnowledgeStore.open(store)
    ids = with_shards.sequences(DUMP)["sequence_id"].to_pylist()
    seen = {(each >> WINDOW_BITS) // DOCUMENTS for each in ids}
    assert seen == standing, f"a reader sees shards {sorted(seen)} where {sorted(standing)} are committed"
    assert len(ids) == sum(SIZES[shard] for shard in standing)
    for shard in standing:
        assert all(mine.equals(theirs) for mine, theirs in zip(rows(store, shard), rows(whole, shard), strict=True))
    return standing


def check_complete(store: Path, whole: Path, same_bytes: bool = True) -> None:
    """Make sure that a dump that was gone on with is the `whole` dump: to the byte where no twin wrote other bytes.

    Times stand in commit records (`made_by`): those alone may differ.

    Raises:
        AssertionError: it is not.
    """
    assert check_standing(store, set(range(SHARDS)), whole) == set(range(SHARDS))
    assert not leftovers(store), leftovers(store)
    mine, theirs = contents(store), contents(whole)
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    if same_bytes:
        assert mine == theirs, [name for name in mine if mine[name] != theirs[name]]


def published(store: Path) -> dict[str, tuple[Any, ...]]:
    """Every file under its own name: which file it is, when it was written, and its bytes."""
    found = {}
    for path in store.rglob("*"):
        if path.is_file() and not path.name.startswith(TEMPORARY_PREFIX):
            status = path.stat()
            found[str(path)] = status.st_ino, status.st_mtime_ns, path.read_bytes()
    return found


def work(acknowledge: Callable[[int], None], store: str, level: int | None = None) -> None:
    """`write_dump` as a command does it: what the disk refuses is one line, and exit code 2."""
    _as_command(lambda: write_dump(Path(store), acknowledge, level))


def repair_work(acknowledge: Callable[[int], None], store: str) -> None:
    """`repair_dump` as a command does it."""
    _as_command(lambda: repair_dump(Path(store), acknowledge))


def _as_command(doing: Callable[[], None]) -> None:
    try:
        with command_errors():
            doing()
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from None
