"""A store in a bucket against the same store on the local disk: time, requests and bytes of what people do with it.

    python -m benchmarks.buckets [--positions N] [--repeats N] [--delay MILLISECONDS]

A synthetic store (see `scale`) is copied into a bucket of SeaweedFS on this machine, by `copy`, and read in turn from there and
from the disk, in one process:

* `first open`: with no index; `open`: with one;
* `statistics`: SQL over the relation `shards`; `tail`: SQL over a column of all positions;
* `blocks`: an epoch of the order `blocks` without a cache; `global`: the first batches of a first epoch of the order `global`.

Requests are counted where they are made, and bytes where they arrive. A service that is far away answers later: the same again
with so many milliseconds before each request says what that costs (`delayed`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measurement import keep
from benchmarks.scale import DUMP, many_positions, spread
from knowledge_store import KnowledgeStore
from knowledge_store.catalogue import index
from knowledge_store.storage import BucketStorage, Storage, open_storage
from knowledge_store.writing.copy import copy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SAMPLE = 20  # batches of the order `global`
PAGE = 1000  # names in an answer to a listing
STATISTICS = 'SELECT count(*), min("positions.mean_top_k_mass"), avg(positions) FROM shards'
TAIL = "SELECT count(*), avg(tail_logprob) FROM positions"


class Counted(BucketStorage):
    """Counts its requests and the bytes that come."""

    delay = 0.0

    def __init__(self, address: Any, store: Any = None):
        super().__init__(address, store)
        self.requests: Counter[str] = Counter()
        self.bytes = 0
        self._lock = threading.Lock()

    def _count(self, what: str, number: int = 1, size: int = 0) -> None:
        with self._lock:
            self.requests[what] += number
            self.bytes += size

    def _head(self, name: str) -> Any:
        time.sleep(self.delay)
        self._count("HEAD")
        return super()._head(name)

    def _body(self, store: Any, name: str, options: Any) -> bytes:
        time.sleep(self.delay)
        data = super()._body(store, name, options)
        self._count("GET", size=len(data))
        return data

    def _listed(self, prefix: str) -> Any:
        time.sleep(self.delay)
        found = super()._listed(prefix)
        self._count("LIST", -(-max(len(found["objects"]) + len(found["common_prefixes"]), 1) // PAGE))
        return found

    def _put(self, name: str, data: bytes | memoryview) -> bool:
        self._count("PUT")
        return super()._put(name, data)


def epoch(store: KnowledgeStore, most: int | None, **plan: Any) -> int:
    """Positions of the first batches of an epoch, or of all."""
    positions = 0
    for step, batch in enumerate(store.batches(DUMP, batch_size=8, **plan)):
        positions += int(batch["attention_mask"].sum())
        if step + 1 == most:
            break
    return positions


TASKS: dict[str, Callable[[KnowledgeStore], Any]] = {
    "statistics": lambda store: store.sql(STATISTICS).to_pylist(),
    "tail": lambda store: store.sql(TAIL, timeout=600).to_pylist(),
    "blocks": lambda store: epoch(store, None, order="blocks"),
    "global": lambda store: epoch(store, SAMPLE),
}


def run(storage: Storage, cache: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The figures of each task on one storage, and its answers."""
    os.environ["XDG_CACHE_HOME"] = cache
    figures: dict[str, dict[str, Any]] = {}
    answers: dict[str, Any] = {}

    def timed(name: str, task: Callable[[], Any]) -> Any:
        if isinstance(storage, Counted):
            storage.requests.clear()
            storage.bytes = 0
        began, cpu = time.perf_counter(), time.process_time()
        result = task()
        figures[name] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        if isinstance(storage, Counted):
            figures[name] |= {"requests": dict(storage.requests), "bytes": storage.bytes}
        return result

    with patch.object(index, "index_path", lambda storage: None):
        timed("first open", lambda: KnowledgeStore.open(storage, cache_size=0))
    for name, task in TASKS.items():
        store = timed("open", lambda: KnowledgeStore.open(storage, cache_size=0))
        answers[name] = timed(name, lambda store=store, task=task: task(store))
    return figures, answers


def summary(runs: list[dict[str, dict[str, Any]]], size: int) -> dict[str, Any]:
    """Medians of seconds, and the counts, which are the same each time."""
    found: dict[str, Any] = {}
    for name, last in runs[-1].items():
        found[name] = {figure: spread([run[name][figure] for run in runs]) for figure in ("seconds", "cpu_seconds")}
        if "requests" in last:
            found[name] |= {"requests": last["requests"], "share_of_bytes": round(last["bytes"] / size, 4)}
    return found


def measure(positions: int, repeats: int, delay: float, work: Path) -> dict[str, Any]:
    """All figures."""
    from bucket_servers import seaweedfs

    local = work / "store"
    many_positions(local, positions)
    files = [path for path in local.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    with seaweedfs(work / "weed") as service:
        os.environ |= service.environment
        there = Counted(service.store("store"))
        began = time.perf_counter()
        copy(local, there)
        copied = {"seconds": round(time.perf_counter() - began, 3), "requests": dict(there.requests)}
        opened = KnowledgeStore.open(there, cache_size=0)
        groups = len(opened.batches(DUMP, order="blocks").readers[0].row_groups) - 1
        tables = sum(path.suffix == ".parquet" for path in files) - 1  # but for the vocabulary
        runs: dict[str, list[dict[str, dict[str, Any]]]] = {"disk": [], "bucket": [], "delayed": []}
        for _ in range(repeats):
            answers = []
            for name, storage, wait in (
                ("disk", open_storage(local), 0.0), ("bucket", there, 0.0), ("delayed", there, delay)
            ):  # fmt: skip
                Counted.delay = wait
                found, answer = run(storage, str(work / f"index-{name}"))
                runs[name].append(found)
                answers.append(answer)
                print(name, {task: round(figures["seconds"], 2) for task, figures in found.items()}, file=sys.stderr)
            if any(answer != answers[0] for answer in answers):
                sys.exit(f"the bucket and the disk answer differently: {answers}")
            Counted.delay = 0.0
    return {
        "service": "SeaweedFS on this machine",
        "positions": answers[0]["blocks"],
        "bytes": size,
        "table_files": tables,
        "row_groups": groups,
        "most_requests_of_a_pass": 2 * tables + groups,
        "load": round(os.getloadavg()[0], 1),
        "repeats": repeats,
        "delay_ms": 1000 * delay,
        "global_batches": SAMPLE,
        "copy_into_the_bucket": copied,
        **{name: summary(found, size) for name, found in runs.items()},
    }


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds before each request")
    parser.add_argument("--work", type=Path, help="a folder to work in, which is left there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        keep("buckets", measure(options.positions, options.repeats, options.delay / 1000, work))


if __name__ == "__main__":
    main()
