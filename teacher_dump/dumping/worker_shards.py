"""Which shards of a dump are a worker's, and which are left to do: a worker that restarts asks the store alone."""

from __future__ import annotations

import random

from knowledge_store.format.manifest import Manifest
from knowledge_store.writing.writer import DumpWriter


def worker_shards(manifest: Manifest, rank: int, world_size: int) -> range:
    """The shards of one worker: rank, rank + world_size, …"""
    return range(rank, manifest.shard_count, world_size)


def remaining_shards(writer: DumpWriter, rank: int, world_size: int) -> list[int]:
    """Those of them that have no commit record yet (StoreError: the storage refuses)."""
    committed = writer.committed_shards()
    return [shard for shard in worker_shards(writer.manifest, rank, world_size) if shard not in committed]


def shards_of_others(writer: DumpWriter, rank: int, world_size: int) -> list[int]:
    """What is missing of the other workers' shards, in an order of this rank's own.

    It is random, so that two that help seldom take the same shard, and never several in step. Each other worker's first missing
    shard comes last: that is what it is at, if it is there at all.

    Raises:
        StoreError: the storage refuses.
    """
    committed = writer.committed_shards()
    shares = [worker_shards(writer.manifest, other, world_size) for other in range(world_size) if other != rank]
    missing = [[shard for shard in share if shard not in committed] for share in shares]
    rest, first = [shard for shards in missing for shard in shards[1:]], [shards[0] for shards in missing if shards]
    chance = random.Random(rank)
    chance.shuffle(rest)
    chance.shuffle(first)
    return rest + first
