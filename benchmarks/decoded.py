"""What the cache of decoded sequences takes, and how fast it is read, with draws and without.

    python -m benchmarks.decoded STORE [--repeats N]

For each dump of a store: the bytes a position of its cache, and positions a second of processor time, in order from Parquet,
and in order and in `global` order from the cache, in batches of 8. Each repeat is a process of its own, the dumps and ways in
turn, with warm disk caches. Figures are medians over the repeats, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep
from benchmarks.scale import spread
from knowledge_store import KnowledgeStore

CACHE_SIZE = 10**11
# The plan of each way, and whether it has a cache.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "in order": ({"shuffle": False}, False),
    "in order, cache": ({"shuffle": False}, True),
    "global, cache": ({}, True),
}


def read(store: Path, dump: str, way: str) -> dict[str, float]:
    """Read an epoch."""
    plan, cached = WAYS[way]
    opened = KnowledgeStore.open(store, cache_size=CACHE_SIZE if cached else 0)
    began, positions = time.process_time(), 0
    for batch in opened.batches(dump, batch_size=8, **plan):
        positions += int(batch["attention_mask"].sum())
    return {"positions": positions, "positions_per_cpu_s": positions / (time.process_time() - began)}


def run(store: Path, dump: str, way: str, cache: Path) -> dict[str, float]:
    """`read` in a process of its own, with a cache folder of its own."""
    command = [sys.executable, "-m", "benchmarks.decoded", str(store), "--read", dump, way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    return found


def measure(store: Path, repeats: int, work: Path) -> dict[str, Any]:
    """The figures of each dump."""
    figures: dict[str, Any] = {}
    for dump in KnowledgeStore.open(store, cache_size=0).dumps:
        cache = work / dump
        positions = run(store, dump, "in order, cache", cache)["positions"]
        size = sum(path.stat().st_size for path in cache.glob("knowledge-store/decoded/*/*"))
        kept = KnowledgeStore.open(store, cache_size=0).manifest(dump).kinds["positions"]
        figures[dump] = {
            "positions": positions,
            "selection": kept["selection"],
            "cache_bytes_per_position": round(size / positions, 2),
        }
    runs: dict[tuple[str, str], list[float]] = {(dump, way): [] for dump in figures for way in WAYS}
    for _ in range(repeats):
        for dump, way in runs:
            runs[dump, way].append(run(store, dump, way, work / dump)["positions_per_cpu_s"])
    for (dump, way), found in runs.items():
        figures[dump][way] = spread(found, 0)
    return {"repeats": repeats, "dumps": figures}


def main() -> None:
    """Measure, or read once and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.store, *options.read)))
        return
    with tempfile.TemporaryDirectory() as work:
        keep("decoded", measure(options.store, options.repeats, Path(work)))


if __name__ == "__main__":
    main()
