"""A served store beside its folder: batches of one client and of four, bytes on the way, the server's memory, and how soon a
query ends after its client.

    python -m benchmarks.serving

The store is `scale.many_positions`: realistic columns. Server and clients are processes on this machine, over its loopback. A
first epoch fills the decoded caches, of the server and of who reads the folder. Then one client reads an epoch from the folder
and the same from the server, in turn, one epoch after the other in one process, so that what else the machine does meets both;
processor time is the client's own and, of the server, what its process took meanwhile. Four clients read as many epochs at the
same time, from the server and then from the folder. A query's client is killed before the first row, and the time is taken
until the query's process is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep
from benchmarks.scale import many_positions
from knowledge_store import KnowledgeStore

BATCH = 8
CLIENTS = 4
TOKEN = "0123456789abcdef0123456789abcdef"
ENDLESS = "SELECT sum(hash(range)) AS n FROM range(1000000000000)"
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """That a process took so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def memory_mib(pid: int, name: str) -> float:
    """Resident memory of a process: VmRSS now, VmHWM at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"there is no {name}")


def children(pid: int) -> set[int]:
    """The processes that a process has started."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


def opened(address: str, tokens: str) -> KnowledgeStore:
    """A store, from its folder or its server."""
    return KnowledgeStore.open(address, token_file=tokens)


def in_turns(server: int, stores: dict[str, KnowledgeStore], epochs: int) -> dict[str, Any]:
    """One client, which reads the same epochs from each in turn."""
    readers = {name: store.batches(batch_size=BATCH, seed=1) for name, store in stores.items()}
    for batches in readers.values():  # connections, footers
        batches[0]
    times: dict[str, list[float]] = {name: [] for name in stores}
    processor = dict.fromkeys(stores, 0.0)
    of_server, positions = 0.0, dict.fromkeys(stores, 0)
    for epoch in range(epochs):
        for name in list(stores)[:: 1 if epoch % 2 else -1]:
            began, began_processor, began_server = time.perf_counter(), time.process_time(), processor_seconds(server)
            for batch in readers[name].at(epoch):
                positions[name] += int(batch["attention_mask"].sum())
            times[name].append(time.perf_counter() - began)
            processor[name] += time.process_time() - began_processor
            of_server += (processor_seconds(server) - began_server) * (name == "served")
    each = {
        name: {
            "positions_per_second": round(positions[name] / sum(times[name])),
            "client_processor_us_per_position": round(1e6 * processor[name] / positions[name], 3),
        }
        for name in stores
    }
    ratios = [folder / served for folder, served in zip(times["folder"], times["served"], strict=True)]
    each["served"]["server_processor_us_per_position"] = round(1e6 * of_server / positions["served"], 3)
    return {
        **each,
        "share_of_local_speed": {"median": round(statistics.median(ratios), 3), "epochs": sorted(round(r, 3) for r in ratios)},
        "share_of_local_speed_by_processor_time_of_the_client": round(processor["folder"] / processor["served"], 3),
    }


def read_epochs(address: str, tokens: str, seed: int, epochs: int, found: Any) -> None:
    """A client of several."""
    with opened(address, tokens) as store:
        batches = store.batches(batch_size=BATCH, seed=seed)
        batches[0]
        found.put(("ready", 0, 0.0))
        began = time.perf_counter()
        positions = sum(int(batch["attention_mask"].sum()) for epoch in range(epochs) for batch in batches.at(epoch))
        found.put(("done", positions, time.perf_counter() - began))


def several(address: str, tokens: str, epochs: int) -> dict[str, Any]:
    """So many clients at the same time; positions each second of all together, by the slowest."""
    start = multiprocessing.get_context("spawn")
    found = start.Queue()
    clients = [start.Process(target=read_epochs, args=(address, tokens, seed, epochs, found)) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    said = [found.get(timeout=400) for _ in range(2 * CLIENTS)]
    for client in clients:
        client.join()
    ended = [(positions, seconds) for what, positions, seconds in said if what == "done"]
    return {
        "positions_per_second": round(sum(positions for positions, _ in ended) / max(seconds for _, seconds in ended)),
        "each": sorted(round(positions / seconds) for positions, seconds in ended),
    }


def ask_for_ever(address: str, tokens: str) -> None:
    """A client whose query has no first row."""
    opened(address, tokens).sql(ENDLESS)


def endings(server: int, address: str, tokens: str, times: int) -> list[float]:
    """Seconds from the death of a query's client to that of the query's process."""
    start, found = multiprocessing.get_context("spawn"), []
    for _ in range(times):
        client = start.Process(target=ask_for_ever, args=(address, tokens))
        client.start()
        while not children(server):
            time.sleep(0.05)
        time.sleep(1.0)
        client.kill()
        began = time.perf_counter()
        while children(server):
            time.sleep(0.005)
        found.append(round(time.perf_counter() - began, 3))
        client.join()
    return sorted(found)


def measure(work: Path, positions: int, epochs: int, times: int) -> dict[str, Any]:
    """All of it, in a folder."""
    folder, tokens = work / "store", work / "tokens"
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    many_positions(folder, positions)
    tokens.write_text(f"{TOKEN}\n")
    local = opened(str(folder), str(tokens))
    for _ in local.batches(batch_size=BATCH):  # fills the decoded cache
        pass
    local = opened(str(folder), str(tokens))  # which has nothing of it in memory
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache of the server")}
    command = [sys.executable, "-m", "knowledge_store.cli", "serve", folder, "--token-file", tokens, "--bind", "127.0.0.1:0"]
    with (
        open(work / "log", "w") as log,
        subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            with opened(address, str(tokens)) as served:
                memory = {"server_mib_at_rest": memory_mib(process.pid, "VmRSS")}
                for _ in served.batches(batch_size=BATCH):  # fills its cache
                    pass
                one = in_turns(process.pid, {"folder": local, "served": served}, epochs)
            together = {
                where: several(place, str(tokens), epochs) for where, place in (("served", address), ("folder", str(folder)))
            }
            memory["server_mib_at_most"] = memory_mib(process.pid, "VmHWM")
            ended = endings(process.pid, address, str(tokens), times)
        finally:
            process.kill()
    [facts] = local.info()
    sent = round(sent_bytes(work / "log") * facts.sequences / facts.positions, 2)
    return {
        "positions": positions,
        "one_client": one,
        f"{CLIENTS}_clients_at_once": together,
        "bytes_sent_per_position": sent,
        "memory": memory,
        "seconds_from_a_clients_death_to_its_querys": ended,
    }


def sent_bytes(path: Path) -> float:
    """Bytes that were sent for each sequence, by the server's log."""
    calls = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    streams = [call for call in calls if call["call"] == "sequences" and call["outcome"] == "ok"]
    total, sequences = (sum(call[name] for call in streams) for name in ("bytes", "sequences"))
    return float(total / sequences)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=2_000_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--times", type=int, default=5, help="that a query's client is killed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        figures = measure(Path(work), arguments.positions, arguments.epochs, arguments.times)
    keep("serving", figures)


if __name__ == "__main__":
    main()
