"""The index under every sort of harm, and many readers of a store whose index is made anew all the time.

The index is derived: whatever happens to it, the answers are those of the commit records, and nobody fails by it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
from stores import commit, make_manifest, random_sequences, words

from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.catalogue.index import INDEX_SCHEMA
from knowledge_store.format.layout import commit_path
from knowledge_store.format.sequences import tokens_table

ROOT = Path(__file__).resolve().parent.parent.parent
SHARDS = 6
QUERY = "SELECT * EXCLUDE (committed_at) FROM shards ORDER BY dump, shard"
READERS = 10
HARMS = {"flip": 40, "overwritten": 20, "half written": 15} | dict.fromkeys(
    ("lost", "stale", "another version", "log beside it", "pipe beside it", "pipe", "hostile", "folder"), 5
)

READ = """
import sys, time
from knowledge_store import KnowledgeStore
rebuild, end, counts = sys.argv[2] == "rebuild", time.time() + float(sys.argv[3]), 0
while time.time() < end or not counts:
    opened = KnowledgeStore.open(sys.argv[1], rebuild_index=rebuild)
    assert len(opened) == len(opened.sql("SELECT * FROM sequences")) == int(sys.argv[4])
    assert opened.sql("SELECT sum(sequences)::INT AS n FROM shards").to_pylist() == [{"n": int(sys.argv[4])}]
    counts += 1
print(counts)
"""

# What a stranger may have made of a sound index: each must be seen without being run.
HOSTILE = (
    "CREATE VIEW more AS SELECT 1",
    "DROP TABLE about; CREATE VIEW about AS SELECT 'x' AS value FROM range(100000000), range(100000000)",
    "INSERT INTO about SELECT value FROM about, range(100000)",
    "ALTER TABLE shards ADD COLUMN x VARCHAR DEFAULT 'x'",
    "CREATE MACRO strlen(x) AS 1; UPDATE shards SET committed_at = repeat('x', 1000000)",
)


def answers(store: Path) -> Any:
    """What depends on the index."""
    opened = KnowledgeStore.open(store, cache_size=0)
    return opened.info(), opened.sql(QUERY).to_pylist(), len(opened)


def other_database(path: Path, *statements: str) -> None:
    """A DuckDB file of one's own in place of the index."""
    path.unlink(missing_ok=True)
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)


def harm(path: Path, data: bytes, older: bytes, chance: random.Random) -> str:
    """Do something to the index; returns what."""
    harmed = bytearray(data)
    sort = chance.choices(list(HARMS), list(HARMS.values()))[0]
    if sort == "flip":  # most of a DuckDB file is empty: half of them where something is
        place = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(3 * 4096)
        harmed[place] ^= 1 << chance.randrange(8)
    elif sort == "overwritten":
        start = chance.randrange(len(data))
        harmed[start : start + 4096] = chance.randbytes(min(4096, len(data) - start))
    elif sort == "half written":
        del harmed[chance.randrange(len(data)) :]
    elif sort == "stale":
        harmed[:] = older
    if sort in ("lost", "folder", "another version", "pipe"):
        path.unlink()
    if sort == "folder":
        path.mkdir()
    elif sort == "another version":
        value = chance.choice([INDEX_SCHEMA, INDEX_SCHEMA + "1", "format 1", "format 99"])
        other_database(path, f"CREATE TABLE about AS SELECT '{value}' AS value", "CREATE TABLE shards AS SELECT 1 AS dump")
    elif sort == "log beside it":
        Path(f"{path}.wal").write_bytes(chance.randbytes(chance.choice([0, 100, 5000])))
    elif sort in ("pipe", "pipe beside it"):
        os.mkfifo(path if sort == "pipe" else f"{path}.wal")
    elif sort == "hostile":
        with duckdb.connect(str(path)) as connection:
            connection.execute(chance.choice(HOSTILE))
    elif sort != "lost":
        path.write_bytes(harmed)
    return sort


def mend(path: Path) -> None:
    """Take away what stands in the place of an index and cannot be replaced."""
    if path.is_dir():
        path.rmdir()
    Path(f"{path}.wal").unlink(missing_ok=True)


def make_store(folder: Path) -> tuple[Path, bytes]:
    """A store, and an index of it from before its last two shards."""
    writer = DumpWriter.open(folder, make_manifest(shards=SHARDS), tokens_table(words(11), words(11)))
    older = b""
    for shard in range(SHARDS):
        commit(writer, shard, random_sequences(shard, 3))
        if shard == SHARDS - 3:
            KnowledgeStore.open(folder)
            older = (folder / "index.duckdb").read_bytes()
    return folder, older


def try_harm(store: Path, older: bytes, seed: int, number: int, expected: Any) -> Counter[str]:
    """One harm: the same answers, twice, and a sound index afterwards. AssertionError: another answer, or an error."""
    path = store / "index.duckdb"
    chance = random.Random(f"{seed} {number}")
    sort = harm(path, path.read_bytes(), older, chance)
    try:
        for _ in range(2):
            assert answers(store) == expected, f"SILENT: harm {number} of seed {seed} ({sort})"
    except Exception as error:
        raise AssertionError(f"harm {number} of seed {seed} ({sort}) reached the user: {error}") from error
    finally:
        mend(path)
    if not path.exists():
        KnowledgeStore.open(store)
    return Counter({"faults": 1, "survived": 1, sort: 1})


def crowd(store: Path, seconds: float, sequences: int) -> Counter[str]:
    """Ten readers, one process that makes the index anew all the time, and one that loses it: nobody meets an error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READ, str(store)]
    processes = [
        subprocess.Popen(
            [*command, "rebuild" if reader == 0 else "read", str(seconds), str(sequences)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for reader in range(READERS + 1)
    ]  # fmt: skip
    losses = 0
    while any(process.poll() is None for process in processes):
        (store / "index.duckdb").unlink(missing_ok=True)
        losses += 1
        # A commit record that is written anew, with the same contents, makes the index out of date.
        os.utime(commit_path(store / "small", losses % SHARDS))
        time.sleep(0.2)
    counts: Counter[str] = Counter()
    for number, process in enumerate(processes):
        out, errors = process.communicate()
        assert process.returncode == 0, f"a reader met an error:\n{errors}"
        counts["rebuilds beside readers" if number == 0 else "openings beside a rebuild"] += int(out)
    return counts + Counter({"faults": losses, "survived": losses, "lost under readers": losses})


def try_harms(seed: int, minutes: float | None, harms: int, folder: Path, seconds: float) -> dict[str, int]:
    """Harms until the time is over (None: `harms` of them), then a crowd for so many seconds."""
    end = time.monotonic() + 60 * (minutes or 0)
    store, older = make_store(folder / "store")
    expected = answers(store)
    counts: Counter[str] = Counter({"silent": 0})
    number = 0
    while time.monotonic() < end - seconds if minutes is not None else number < harms:
        counts.update(try_harm(store, older, seed, number, expected))
        number += 1
    counts.update(crowd(store, seconds, expected[2]))
    assert answers(store) == expected
    assert not list(store.glob(".tmp-*"))
    return dict(counts)


def run(seed: int, minutes: float, folder: Path) -> dict[str, int]:
    """Harms for three quarters of the time, a crowd for the rest."""
    return try_harms(seed, minutes, 0, folder, 15 * minutes)
