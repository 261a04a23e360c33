"""How fast a store is read in each order, and in how much memory: in order, `blocks` and `global`, with the cache and without.

    python -m benchmarks.orders [--positions N] [--repeats N] [--work FOLDER]

A synthetic store of realistic columns (see `scale`), by the writer. Each repeat of each order is a process of its own on one
core, in turn with the others, with warm disk caches; it reads one epoch in batches of 8. Positions a second are told by the
clock and by the processor's time, which a busy machine disturbs less. `global` without a cache decodes a row group for nearly
every sequence, so of that only the first batches are read. `load` is how many processes wanted to run (on a busy machine more
than the cores there are). Finished runs are kept in the work folder, and skipped when it is called again.
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
from benchmarks.scale import DUMP, high_water_mib, many_positions, median, spread
from knowledge_store import KnowledgeStore
from knowledge_store.reading.plan import WINDOW

CACHE_SIZE = 10**11
SAMPLE = 40  # batches of the order that is too slow to be read whole
WINDOWS = (WINDOW, 4 * WINDOW)
# The plan of each, whether it has a cache, and how many batches are read (None: all).
ORDERS: dict[str, tuple[dict[str, Any], bool, int | None]] = {
    "in order": ({"shuffle": False}, False, None),
    **{f"blocks, window {window}": ({"order": "blocks", "window": window}, False, None) for window in WINDOWS},
    "in order, cache": ({"shuffle": False}, True, None),
    "blocks, cache": ({"order": "blocks"}, True, None),
    "global, cache": ({}, True, None),
    "global": ({}, False, SAMPLE),
}
FILL = "fill the cache"


def read(store: Path, name: str, seed: int) -> dict[str, float]:
    """Read an epoch, or a part of one."""
    plan, cached, most = {**ORDERS, FILL: ({"shuffle": False}, True, None)}[name]
    opened = KnowledgeStore.open(store, cache_size=CACHE_SIZE if cached else 0)
    began, cpu = time.perf_counter(), time.process_time()
    batches = opened.batches(DUMP, batch_size=8, seed=seed, **plan)
    positions = steps = 0
    for batch in batches:
        positions, steps = positions + int(batch["attention_mask"].sum()), steps + 1
        if steps == most:
            break
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {
        "positions_per_s": positions / seconds,
        "positions_per_cpu_s": positions / cpu_seconds,
        "peak_mib": high_water_mib(),
        "positions": positions,
    }


def measured(store: Path, name: str, seed: int) -> dict[str, float]:
    """`read` in a fresh process on one core, or the figures of one that finished before in this work folder."""
    kept = store.parent / "runs" / f"{name.replace(' ', '-')}-{seed}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    command = [sys.executable, "-m", "benchmarks.orders", "--work", str(store), "--read", name, "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(store.parent / "cache")}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        os.sched_setaffinity(0, cores)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{finished.stderr}")
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    found["load"] = round(os.getloadavg()[0], 2)
    print(f"{name}: {found['positions_per_s']:,.0f} positions/s, {found['peak_mib']:,.0f} MiB", file=sys.stderr)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def measure(work: Path, positions: int, repeats: int) -> dict[str, Any]:
    """The figures of all orders."""
    store = work / f"store-{positions}"
    if not store.exists():
        many_positions(store, positions)
    measured(store, FILL, 0)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ORDERS}
    for repeat in range(repeats):
        for name in ORDERS:
            runs[name].append(measured(store, name, repeat))
    names = ("positions_per_s", "positions_per_cpu_s", "peak_mib")
    return {
        "positions": int(runs["in order"][0]["positions"]),
        "row_groups": len(KnowledgeStore.open(store).batches(DUMP, order="blocks").readers[0].row_groups) - 1,
        "repeats": repeats,
        "load": spread([run["load"] for found in runs.values() for run in found], 1),
        "orders": {
            name: {figure: spread([run[figure] for run in found], 0) for figure in names} for name, found in runs.items()
        },
        "of_in_order_without_cache": {
            name: {
                "by_the_clock": round(median(found, "positions_per_s") / median(runs["in order"], "positions_per_s"), 3),
                "by_processor_time": round(
                    median(found, "positions_per_cpu_s") / median(runs["in order"], "positions_per_cpu_s"), 3
                ),
            }
            for name, found in runs.items()
        },
    }


def main() -> None:
    """Measure, or read once and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder for the store, which is kept there")
    parser.add_argument("--read", choices=[*ORDERS, FILL], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.work, options.read, options.seed)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        keep("orders", measure(options.work or Path(temporary), options.positions, options.repeats))


if __name__ == "__main__":
    main()
