"""Which shards of a dump are a worker's, and which of them are left to do: a worker that restarts asks the store alone."""

from __future__ import annotations

from knowledge_store.format.manifest import Manifest
from knowledge_store.writing.writer import DumpWriter


def worker_shards(manifest: Manifest, rank: int, world_size: int) -> range:
    """The shards of one worker: rank, rank + world_size, …"""
    return range(rank, manifest.shard_count, world_size)


def remaining_shards(writer: DumpWriter, rank: int, world_size: int) -> list[int]:
    """Those of them that have no commit record yet (StoreError: the storage refuses)."""
    return writer.remaining(worker_shards(writer.manifest, rank, world_size))
