"""A store in a bucket against the same store on the local disk: time, requests and bytes of what people do with it.

    python -m benchmarks.buckets [--positions N] [--repeats N] [--delay MILLISECONDS] [--work FOLDER]

A synthetic store (see `scale`) is copied into a bucket of SeaweedFS on this machine, by `copy`, and read in turn from there and
from the disk, in one process:

* `first open`: with no index; `open`: with one;
* `statistics`: SQL over the relation `shards`; `tail`: SQL over a column of all positions; `tail, small row groups`: the same
  of a store of a tenth of the positions, whose row groups are a quarter as large;
* `blocks`: an epoch of the order `blocks` without a cache; `global`: a first epoch of the order `global`, with a cache that is
  empty and large enough; `global again`: the next one.

A run that was cut off resumes where it was, in the same FOLDER.
Requests are counted where they are made, and bytes where they arrive. A service that is far away answers later: the same again
with so many milliseconds before each request says what that costs (`delayed`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
from knowledge_store.format.layout import NOWHERE
from knowledge_store.storage import BucketStorage, Storage, open_storage
from knowledge_store.writing import row_groups
from knowledge_store.writing.copy import copy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

CACHE = 64 * 2**30  # bytes, of the order `global`
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


def epoch(store: KnowledgeStore, **plan: Any) -> int:
    """Positions of an epoch."""
    return sum(int(batch["attention_mask"].sum()) for batch in store.batches(DUMP, batch_size=8, **plan))


TASKS: dict[str, Callable[[KnowledgeStore], Any]] = {
    "statistics": lambda store: store.sql(STATISTICS).to_pylist(),
    "tail": lambda store: store.sql(TAIL, timeout=3600).to_pylist(),
    "blocks": lambda store: epoch(store, order="blocks"),
}
SMALL = "tail, small row groups"


def run(storage: Storage, small: Storage, cache: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The figures of each task on one storage, and its answers."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    figures: dict[str, dict[str, Any]] = {}
    answers: dict[str, Any] = {}

    def timed(name: str, task: Callable[[], Any], place: Storage = storage) -> Any:
        if isinstance(place, Counted):
            place.requests.clear()
            place.bytes = 0
        began, cpu = time.perf_counter(), time.process_time()
        result = task()
        figures[name] = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        if isinstance(place, Counted):
            figures[name] |= {"requests": dict(place.requests), "bytes": place.bytes}
        return result

    with patch.object(index, "index_path", lambda storage: NOWHERE):
        timed("first open", lambda: KnowledgeStore.open(storage, cache_size=0))
    KnowledgeStore.open(storage, cache_size=0)
    for name, task in TASKS.items():
        store = timed("open", lambda: KnowledgeStore.open(storage, cache_size=0))
        answers[name] = timed(name, lambda store=store, task=task: task(store))
        print(name, figures[name], file=sys.stderr)
    other = KnowledgeStore.open(small, cache_size=0)
    answers[SMALL] = timed(SMALL, lambda: TASKS["tail"](other), small)
    for name in ("global", "global again"):
        store = KnowledgeStore.open(storage, cache_size=CACHE)
        answers[name] = timed(name, lambda store=store: epoch(store))
        print(name, figures[name], file=sys.stderr)
    shutil.rmtree(cache)
    return figures, answers


def summary(runs: list[dict[str, dict[str, Any]]], size: int, small: int) -> dict[str, Any]:
    """Medians of seconds, and the counts, which are the same each time."""
    found: dict[str, Any] = {}
    for name, last in runs[-1].items():
        found[name] = {figure: spread([run[name][figure] for run in runs]) for figure in ("seconds", "cpu_seconds")}
        if "requests" in last:
            share = last["bytes"] / (small if name == SMALL else size)
            found[name] |= {"requests": last["requests"], "share_of_bytes": round(share, 4)}
    return found


def written(local: Path, positions: int, row_group_bytes: int) -> list[int]:
    """A store on the disk, unless it is there; the bytes of its files, tables last."""
    if not local.exists():
        making = local.with_suffix(".tmp")
        shutil.rmtree(making, ignore_errors=True)
        with patch.object(row_groups, "ROW_GROUP_BYTES", row_group_bytes):
            many_positions(making, positions)
        making.rename(local)
    files = sorted(path for path in local.rglob("*") if path.is_file())
    return [path.stat().st_size for path in files]


def measure(positions: int, repeats: int, delay: float, work: Path) -> dict[str, Any]:
    """All figures."""
    from bucket_servers import seaweedfs

    local, local_small, kept = work / "store", work / "small", work / "runs.json"
    size = sum(written(local, positions, row_groups.ROW_GROUP_BYTES))
    small_size = sum(written(local_small, positions // 10, row_groups.ROW_GROUP_BYTES // 4))
    tables = len(list(local.rglob("*.parquet"))) - 1  # but for the vocabulary
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"runs": []}
    with seaweedfs(work / "weed") as service:
        os.environ |= service.environment
        there, there_small = Counted(service.store("store")), Counted(service.store("small"))
        began = time.perf_counter()
        copy(local, there)
        copy(local_small, there_small)
        found.setdefault("copied", {"seconds": round(time.perf_counter() - began, 3), "requests": dict(there.requests)})
        groups = len(KnowledgeStore.open(there, cache_size=0).batches(DUMP, order="blocks").readers[0].row_groups) - 1
        disk = (open_storage(local), open_storage(local_small), 0.0)
        places = {"disk": disk, "bucket": (there, there_small, 0.0)}
        places |= {"delayed": (there, there_small, delay)} if delay else {}
        for number in range(repeats):
            for name, (storage, small, wait) in places.items():
                if any((one["repeat"], one["place"]) == (number, name) for one in found["runs"]):
                    continue
                print(number, name, file=sys.stderr)
                Counted.delay = wait
                figures, answers = run(storage, small, work / f"cache-{name}")
                found["runs"].append({"repeat": number, "place": name, "figures": figures, "answers": answers})
                kept.write_text(json.dumps(found))
        Counted.delay = 0.0
    # DuckDB adds up in any order: the last digits of a mean are of no account.
    rounded = [json.dumps(one["answers"]) for one in found["runs"]]
    answers = [json.loads(text, parse_float=lambda number: round(float(number), 9)) for text in rounded]
    if any(answer != answers[0] for answer in answers):
        sys.exit(f"the bucket and the disk answer differently: {answers}")
    runs = {name: [one["figures"] for one in found["runs"] if one["place"] == name] for name in places}
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
        "small_row_groups": {"positions": positions // 10, "bytes": small_size},
        "copy_into_the_bucket": found["copied"],
        **{name: summary(each, size, small_size) for name, each in runs.items()},
    }


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=14_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds before each request; 0: not measured")
    parser.add_argument("--work", type=Path, help="a folder to work in, which is left there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        keep("buckets", measure(options.positions, options.repeats, options.delay / 1000, work))


if __name__ == "__main__":
    main()
