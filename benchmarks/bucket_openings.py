"""What it takes to open a store of many shards from a bucket, for the first time on a machine and again.

    python -m benchmarks.bucket_openings [--shards N] [--repeats N] [--delay MILLISECONDS]

A dump of so many synthetic shards in a bucket of SeaweedFS on this machine: its manifest and its commit records, each as large
as a real one (see `scale`), with hashes and statistics of its own, and no tables, which opening does not look at. In turn, in
one process:

* `records`: no index, no bundle: each commit record is read by itself; `bundle`: no index, but the bundle that a writer leaves
  when a dump is complete; `index`: with an index;
* the same with so many milliseconds before each request (`delayed`), as a service that is far away answers.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.buckets import Counted
from benchmarks.measurement import keep
from benchmarks.scale import DUMP, spread, write_shards
from knowledge_store import KnowledgeStore
from knowledge_store.catalogue import index
from knowledge_store.format.bundles import bundles
from knowledge_store.format.layout import COMMITS, NOWHERE, STORE_FILE, commit_file, manifest_file, tokens_file
from knowledge_store.format.manifest import read_manifest
from knowledge_store.storage import concurrently, contents, open_storage
from knowledge_store.writing.bundles import publish_bundles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def write_records(local: Path, there: Counted, shards: int) -> None:
    """The dump in the bucket: what opening reads."""
    record = write_shards(local, shards, 1, 16, 16)
    origin = open_storage(local)
    for name in (STORE_FILE, manifest_file(DUMP), tokens_file(DUMP)):
        there.create(name, contents(origin.read(name)))

    chance = random.Random(0)
    records = []
    for shard in range(shards):
        files = {
            table: replace(file, sha256=chance.randbytes(32).hex(), footer_sha256=chance.randbytes(32).hex())
            for table, file in record.files.items()
        }
        measures = {name: value * chance.uniform(0.9, 1) for name, value in record.statistics.items()}
        numbers = {"shard": shard, "first_document": shard * record.documents}
        records.append(replace(record, **numbers, files=files, statistics=measures))

    def create(shard: int) -> bool:
        return there.create(commit_file(DUMP, shard), contents(records[shard].to_bytes()))

    concurrently(there, create, range(shards))


def opened(there: Counted, shards: int, with_index: bool, with_bundle: bool) -> dict[str, Any]:
    """What one opening takes."""
    there.requests.clear()
    there.bytes = 0
    with (
        patch.object(index, "index_path", index.index_path if with_index else lambda storage: NOWHERE),
        patch.object(index, "bundles", bundles if with_bundle else lambda dump, entries: []),
    ):
        began, cpu = time.perf_counter(), time.process_time()
        store = KnowledgeStore.open(there, cache_size=0)
        taken = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    counts = {"requests": dict(there.requests), "all_requests": there.requests.total(), "bytes": there.bytes}
    if store.info()[0].shards != shards:
        sys.exit("not all shards were seen")
    return taken | counts


WAYS: dict[str, tuple[bool, bool]] = {"records": (False, False), "bundle": (False, True), "index": (True, True)}


def measure(shards: int, repeats: int, delay: float, work: Path) -> dict[str, Any]:
    """All figures."""
    from bucket_servers import seaweedfs

    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    with seaweedfs(work / "weed") as service:
        os.environ |= service.environment
        there = Counted(service.store("store"))
        write_records(work / "local", there, shards)
        manifest = read_manifest(there, DUMP)
        there.requests.clear()
        began, cpu = time.perf_counter(), time.process_time()
        publish_bundles(there, manifest)
        published = {
            "seconds": round(time.perf_counter() - began, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "requests": dict(there.requests),
        }
        sizes = [bundle.size for bundle in bundles(DUMP, there.files(f"{DUMP}/{COMMITS}"))]
        KnowledgeStore.open(there)  # makes the index
        found: dict[str, Any] = {}
        for name, wait in (("at once", 0.0), ("delayed", delay)):
            Counted.delay = wait
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(repeats):
                for way, choice in WAYS.items():
                    runs[way].append(opened(there, shards, *choice))
                print(name, {way: round(each[-1]["seconds"], 2) for way, each in runs.items()}, file=sys.stderr)
            found[name] = {
                way: {figure: spread([run[figure] for run in each]) for figure in ("seconds", "cpu_seconds")}
                | {
                    "requests": each[-1]["requests"],
                    "all_requests": sum(each[-1]["requests"].values()),
                    "bytes": each[-1]["bytes"],
                }
                for way, each in runs.items()
            }
        Counted.delay = 0.0
    return {
        "service": "SeaweedFS on this machine",
        "shards": shards,
        "load": round(os.getloadavg()[0], 1),
        "repeats": repeats,
        "delay_ms": 1000 * delay,
        "most_requests": 5 + shards / 1000,
        "bundle_bytes": sizes,
        "publishing_the_bundle": published,
        **found,
    }


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds before each request")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        keep("bucket_openings", measure(options.shards, options.repeats, options.delay / 1000, Path(work)))


if __name__ == "__main__":
    main()
