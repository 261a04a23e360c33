"""Many shards, and many positions: what opening, facts, statistics and a new shard cost, and SQL beside DuckDB's own.

    python -m benchmarks.scale

**Many shards.** Stores of 1,000 and 10,000 synthetic shards. One shard is made by the writer: eight row groups, as some 250,000
positions have, but of 32 positions each. The others are copies of its two Parquet files, each with a commit record of its own.
Footers, hashes and records are as large as real ones; only the pages are small, and nothing here reads them. In turn, each in
a fresh process with warm disk caches:

* `open`: the store, its index up to date; `info`: all facts of its dump; `statistics`: the SQL below over the relation
  `shards`, the first query of its process; `statistics again`: the same, the second time;
* `footers`, `footers-duckdb`: rows of each shard from its Parquet footers, by pyarrow and by DuckDB (which cannot say more: the
  teacher's loss and the candidates' mass stand in no footer);
* `one more`: opening it after one more shard was committed; `rebuild`: reading all commit records;
* how many commit records each of them opened, and the process's resident high-water mark.

**Many positions.** A store of 10 million positions with realistic columns, by the writer, at a low compression level to be made
in time. A histogram of tail mass by source: `KnowledgeStore.sql`, opening included, beside DuckDB over the same Parquet files
and the same view, which checks no footer and no page. On one core and on two (by the process's affinity), in turn, each in a
fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duckdb
import numpy as np
import pyarrow.parquet as pq

import knowledge_store.format.parquet
import knowledge_store.writing.row_groups
from benchmarks.measurement import RESULTS, keep
from benchmarks.pictures import picture
from knowledge_store import DumpWriter, KnowledgeStore, Manifest, Shard
from knowledge_store.catalogue.index import index_path
from knowledge_store.format.commits import CommitRecord
from knowledge_store.format.layout import COMMITS, MANIFEST_FILE, SEQUENCES, commit_file, table_file
from knowledge_store.format.manifest import read_manifest
from knowledge_store.format.sequences import sequence_id, token_hash, tokens_table
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.kinds.positions import PositionsParameters
from knowledge_store.kinds.positions.selection import Selection
from knowledge_store.storage.local import LocalStorage
from knowledge_store.terminal.progress import progress_bar

STATISTICS = """
    SELECT dump, count(*) AS shards, min("positions.mean_top_k_mass"), max("positions.mean_top_k_mass"),
           sum(sequences) AS sequences, sum(positions) AS positions, sum(bytes) / sum(positions) AS bytes_per_position
    FROM shards GROUP BY dump"""

HISTOGRAM = """
    SELECT source, CAST(floor(20 * exp(tail_logprob)) AS INTEGER) AS twentieth, count(*) AS positions
    FROM {positions} JOIN {sequences} USING ({keys}) WHERE tail_logprob IS NOT NULL GROUP BY ALL ORDER BY ALL"""

DUMP = "synthetic"
SOURCES = ("books", "code", "forum", "news", "web")
VOCABULARY = 49_152
CANDIDATES = 5
STEP = 0.125


# Synthetic stores


def manifest(shards: int, documents: int, max_length: int) -> Manifest:
    """The manifest of `shards` shards of `documents` documents, one sequence each."""
    rest = {"file": 0, "part": 0, "positions": 0}
    firsts = [documents * shard for shard in range(shards)]
    starts = [{"document": first, "row": first + 1, "offset": 3000 * first, **rest} for first in firsts]
    return Manifest(
        dump=DUMP,
        kinds={"positions": PositionsParameters(Selection("top-k", CANDIDATES), STEP).to_record()},
        teacher={"name": "numbers", "vocabulary_size": VOCABULARY},
        tokenizer={"size": VOCABULARY},
        corpus={"files": [{"name": "numbers.jsonl", "bytes": 1, "sha256": "00"}]},
        plan={"max_length": max_length},
        derived={"documents": documents * shards, "columns": {"source": "string"}, "shards": starts},
    )


def knowledge(random: np.random.Generator, sequences: int, length: int) -> Arrays:
    """What an extractor hands over for sequences of `length` tokens: ids by Zipf's law, tails by a beta distribution that each
    source has of its own, candidates that fall off geometrically, half of the tokens being the likeliest candidate."""
    count = sequences * length
    likeliest = np.minimum(random.zipf(1.2, count), VOCABULARY) - 1
    ranks = np.arange(CANDIDATES)
    ids = (likeliest[:, None] + 7919 * ranks) % VOCABULARY
    source = np.repeat(np.arange(sequences) % len(SOURCES), length)
    tail = np.clip(random.beta(1 + 0.5 * source, 3, count), 1e-4, 1 - 1e-4)
    shares = np.exp(-random.uniform(0.3, 2, (count, 1)) * ranks)
    logprobs = np.log((1 - tail)[:, None] * shares / shares.sum(axis=1, keepdims=True))
    first = random.random(count) < 0.5
    other = (likeliest + 1 + random.integers(0, 7000, count)) % VOCABULARY  # between two candidates
    is_target = np.arange(count) % length > 0
    return {
        "token_id": np.where(first, likeliest, other).astype(np.uint32),
        "is_target": is_target,
        "has_knowledge": is_target,
        "token_logprob": np.where(first, logprobs[:, 0], np.log(tail) - 5).astype(np.float32),
        "candidate_ids": ids.astype(np.uint32),
        "candidate_logprobs": logprobs.astype(np.float32),
        "tail_logprob": np.log(tail).astype(np.float32),
    }


def sequence_rows(first_document: int, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Rows of `sequences` for tokens (sequences, length), one document each."""
    return [
        {
            "sequence_id": sequence_id(first_document + index, 0),
            "document": first_document + index,
            "file": "numbers.jsonl",
            "row": first_document + index + 1,
            "part": 0,
            "window": 0,
            "length": len(row),
            "targets": len(row) - 1,
            "truncated": False,
            "token_hash": token_hash(row),
            "source": SOURCES[index % len(SOURCES)],
        }
        for index, row in enumerate(tokens)
    ]


def split(arrays: Arrays, sequences: int) -> list[Arrays]:
    """The arrays of each of some sequences of one length."""
    parts = {name: np.split(array, sequences) for name, array in arrays.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(sequences)]


def write_shards(store: Path, shards: int, written: int, sequences: int, length: int) -> CommitRecord:
    """A dump of `shards` shards in the plan, the first `written` of which are written; returns the last one's commit record."""
    texts: list[str | None] = [f"w{token}" for token in range(VOCABULARY)]
    writer = DumpWriter.open(store, manifest(shards, sequences, length), tokens_table(texts, texts))
    random = np.random.default_rng(0)
    for shard in range(written):
        arrays = knowledge(random, sequences, length)
        rows = sequence_rows(shard * sequences, arrays["token_id"].reshape(sequences, length))
        record = writer.commit(
            Shard(
                shard,
                shard * sequences,
                sequences,
                rows,
                {"positions": split(arrays, sequences)},
                made_by={"device": "numbers"},
            )
        )
    return record


def copy_shard(store: Path, record: CommitRecord, shard: int) -> None:
    """Shard `shard` as a copy of the shard of that record, then its own commit record."""
    folder = store / DUMP
    for table in record.files:
        shutil.copyfile(table_file(str(folder), table, record.shard), table_file(str(folder), table, shard))
    copy = replace(record, shard=shard, first_document=shard * record.documents)
    Path(commit_file(str(folder), shard)).write_bytes(copy.to_bytes())


def many_shards(store: Path, shards: int, spare: int) -> CommitRecord:
    """A store of small shards (see above), with `spare` more in its plan; returns the first one's commit record."""
    with patch.object(knowledge_store.writing.row_groups, "ROW_GROUP_BYTES", 32 * 2048):
        record = write_shards(store, shards + spare, 1, 16, 16)
    for shard in range(1, shards):
        copy_shard(store, record, shard)
    return record


def many_positions(store: Path, positions: int) -> None:
    """A store of about that many positions, in shards of up to half a million."""
    length = 512
    shards = -(-positions // 500_000)
    with patch.object(knowledge_store.format.parquet, "COMPRESSION_LEVEL", 1):
        write_shards(store, shards, shards, -(-positions // (shards * length)), length)


# What is measured, each in a process of its own


def high_water_mib() -> float:
    """The most memory this process has had resident, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def scan_footers(store: Path) -> dict[str, int]:
    """Rows of each table, from all footers, by pyarrow."""
    return {
        table: sum(pq.read_metadata(path).num_rows for path in sorted((store / DUMP / table).glob("*.parquet")))
        for table in (SEQUENCES, "positions")
    }


def scan_footers_by_duckdb(store: Path) -> dict[str, int]:
    """Rows of each table, from all footers, by DuckDB."""
    with duckdb.connect(":memory:") as connection:
        return {
            table: connection.sql(
                f"SELECT sum(num_rows)::BIGINT FROM parquet_file_metadata('{store}/{DUMP}/{table}/*.parquet')"
            ).fetchall()[0][0]
            for table in (SEQUENCES, "positions")
        }


def histogram_by_duckdb(store: Path) -> list[dict[str, Any]]:
    """DuckDB's own answer, over the same files, through the view that FORMAT.md prints."""
    tables = {table: f"read_parquet('{store}/{DUMP}/{table}/*.parquet')" for table in ("positions", "sequences")}
    view = KINDS["positions"].view(read_manifest(LocalStorage(store), DUMP))
    assert view is not None
    tables["positions"] = f"({view.format(rows=tables['positions'])})"
    with duckdb.connect(":memory:") as connection:
        rows: list[dict[str, Any]] = connection.sql(HISTOGRAM.format(**tables, keys="sequence_id")).to_arrow_table().to_pylist()
        return rows


def run_task(task: str, store: Path) -> dict[str, Any]:
    """Do one thing in this process: seconds, peak memory, how many commit records it opened, and its answer."""

    def statistics_of_shards(again: bool = False) -> Callable[[], dict[str, int]]:
        opened = KnowledgeStore.open(store)

        def ask() -> dict[str, int]:
            [row] = opened.sql(STATISTICS).to_pylist()
            return {"sequences": int(row["sequences"]), "positions": int(row["positions"])}

        if again:
            ask()
        return ask

    def facts() -> Callable[[], dict[str, int]]:
        opened = KnowledgeStore.open(store)

        def ask() -> dict[str, int]:
            [summary] = opened.info()
            return {"sequences": summary.sequences, "positions": summary.positions}

        return ask

    def opening(rebuild: bool = False) -> Callable[[], int]:
        return lambda: len(KnowledgeStore.open(store, rebuild_index=rebuild).dumps)

    def histogram() -> list[dict[str, Any]]:
        ours = HISTOGRAM.format(positions="positions", sequences="sequences", keys="dump, sequence_id")
        return KnowledgeStore.open(store).sql(ours).to_pylist()

    # Each makes ready what is no part of its time.
    tasks: dict[str, Callable[[], Callable[[], Any]]] = {
        "imports": lambda: lambda: None,
        "open": opening,
        "info": facts,
        "statistics": statistics_of_shards,
        "statistics again": lambda: statistics_of_shards(again=True),
        "footers": lambda: lambda: scan_footers(store),
        "footers-duckdb": lambda: lambda: scan_footers_by_duckdb(store),
        "one more": opening,
        "rebuild": lambda: opening(rebuild=True),
        "histogram": lambda: histogram,
        "histogram-duckdb": lambda: lambda: histogram_by_duckdb(store),
    }
    records = 0

    def count_records(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal records
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = Path(arguments[0])
            records += path.parent.name == COMMITS and path.suffix == ".json"

    do = tasks[task]()
    sys.addaudithook(count_records)
    started, cpu_started = time.perf_counter(), time.process_time()
    answer = do()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": high_water_mib(),
        "records": records,
        "threads": duckdb.sql("SELECT current_setting('threads')").fetchall()[0][0],
        "answer": answer,
    }


def measured(task: str, store: Path, cores: int | None = None) -> dict[str, Any]:
    """`run_task` in a fresh process on the first `cores` cores (None: all)."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(ours)[:cores])  # inherited before any library counts its cores
    try:
        command = [sys.executable, "-m", "benchmarks.scale", "--task", task, "--store", str(store)]
        finished = subprocess.run(command, capture_output=True, text=True)
    finally:
        os.sched_setaffinity(0, ours)
    if finished.returncode:
        sys.exit(f"{task} failed:\n{finished.stderr}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


# The benchmark


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most of some repeats."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one task's repeats."""
    return {
        "seconds": spread([run["seconds"] for run in runs]),
        "cpu_seconds": spread([run["cpu_seconds"] for run in runs]),
        "peak_mib": spread([run["peak_mib"] for run in runs], 1),
    }


def median(runs: list[dict[str, Any]], name: str = "seconds") -> float:
    """The median of one figure over repeats."""
    return statistics.median(run[name] for run in runs)


def check_same(answers: list[Any], what: str) -> None:
    """Stop the benchmark where two ways to one answer differ."""
    if any(answer != answers[0] for answer in answers):
        sys.exit(f"{what} differ: {answers}")


ALONE = ("imports", "open", "info", "statistics", "statistics again", "footers", "footers-duckdb")


def measure_shards(folder: Path, shards: int, repeats: int) -> dict[str, Any]:
    """All tasks over a store of `shards` shards."""
    store = folder / f"{shards}"
    record = many_shards(store, shards, repeats)
    runs: dict[str, list[dict[str, Any]]] = {task: [] for task in (*ALONE, "rebuild", "one more")}
    measured("open", store)  # makes the index
    for repeat in range(repeats):
        for task in ALONE:
            runs[task].append(measured(task, store))
        runs["rebuild"].append(measured("rebuild", store))
        check_same([runs[task][-1]["answer"] for task in ALONE[2:]], "rows by the index and by the footers")
        copy_shard(store, record, shards + repeat)
        runs["one more"].append(measured("one more", store))
    footers = min(median(runs["footers"]), median(runs["footers-duckdb"]))
    cpu = min(median(runs["footers"], "cpu_seconds"), median(runs["footers-duckdb"], "cpu_seconds"))
    return {
        **{task: summary(each) for task, each in runs.items()},
        "records_read": {task: sorted({run["records"] for run in runs[task]}) for task in ("open", "one more", "rebuild")},
        "footers_over_statistics": round(footers / median(runs["statistics"]), 1),
        "footers_over_statistics_by_cpu": round(cpu / median(runs["statistics"], "cpu_seconds"), 1),
        "footers_by_pyarrow_over_statistics": round(median(runs["footers"]) / median(runs["statistics"]), 1),
        "files": 3 * (shards + repeats) + 3,
        "index_bytes": index_path(LocalStorage(store)).stat().st_size,
        "manifest_bytes": (store / DUMP / MANIFEST_FILE).stat().st_size,
        "commit_record_bytes": len(record.to_bytes()),
    }


def measure_positions(folder: Path, positions: int, repeats: int) -> dict[str, Any]:
    """The histogram, ours and DuckDB's own, at each number of cores."""
    store = folder / "positions"
    many_positions(store, positions)
    measured("open", store)
    found: dict[str, Any] = {
        "positions": measured("info", store)["answer"]["positions"],
        "index_bytes": index_path(LocalStorage(store)).stat().st_size,
    }
    cores = [count for count in (1, 2) if count <= len(os.sched_getaffinity(0))]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for count in cores:
            for task in ("histogram", "histogram-duckdb"):
                runs.setdefault((task, count), []).append(measured(task, store, count))
            check_same([runs[task, count][-1]["answer"] for task in ("histogram", "histogram-duckdb")], "histograms")
    for count in cores:
        ours, own = runs["histogram", count], runs["histogram-duckdb", count]
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(ours, own, strict=True)]
        found[f"{count} core" + "s" * (count > 1)] = {
            "ours": summary(ours),
            "duckdb": summary(own),
            "threads": ours[0]["threads"],
            "ratio": spread(ratios, 3),
            "ratio_by_cpu": round(median(ours, "cpu_seconds") / median(own, "cpu_seconds"), 3),
        }
    return found


def draw(figures: dict[str, Any], path: Path) -> None:
    """Time and memory against shards, and the histogram beside DuckDB's own."""
    with picture(path, 1, 3, figsize=(13, 4)) as (times, memory, sql):
        sizes = sorted(figures["shards"], key=int)
        numbers = [int(size) for size in sizes]
        lines = {"footers": "all footers (pyarrow)", "footers-duckdb": "all footers (DuckDB)", "rebuild": "rebuild the index"}
        lines |= {"one more": "open after one more shard", "open": "open", "info": "info", "statistics": "statistics by SQL"}
        kept = ("rebuild", "one more", "info", "statistics", "open")
        for axes, figure, tasks in ((times, "seconds", tuple(lines)), (memory, "peak_mib", kept)):
            for task in tasks:
                each = [figures["shards"][size][task][figure] for size in sizes]
                middle = [one["median"] for one in each]
                reach = [[one["median"] - one["least"] for one in each], [one["most"] - one["median"] for one in each]]
                axes.errorbar(numbers, middle, reach, marker="o", markersize=3, capsize=2, linewidth=1, label=lines[task])
            axes.set(xscale="log", xlabel="shards")
            axes.set_xticks(numbers, [f"{number:,}" for number in numbers], minor=False)
            axes.legend(frameon=False, fontsize=7)
        times.set(yscale="log", ylabel="seconds", title="Time, each in a fresh process")
        memory.set(ylim=(0, None), ylabel="MiB", title="Resident high-water mark")
        counts = [name for name in figures["histogram"] if name.endswith(("core", "cores"))]
        for place, (who, label) in enumerate((("ours", "knowledge-store sql"), ("duckdb", "DuckDB over the same Parquet"))):
            each = [figures["histogram"][name][who]["seconds"] for name in counts]
            reach = [[one["median"] - one["least"] for one in each], [one["most"] - one["median"] for one in each]]
            places = [number + 0.4 * place for number in range(len(counts))]
            sql.bar(places, [one["median"] for one in each], 0.38, yerr=reach, capsize=3, label=label)
        sql.set_xticks([number + 0.2 for number in range(len(counts))], counts)
        sql.set(ylabel="seconds", title=f"Histogram over {figures['histogram']['positions'] / 1e6:.3g} million positions")
        sql.legend(frameon=False, fontsize=7)


def main() -> None:
    """Make the stores, measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--positions", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(run_task(options.task, options.store)))
        return
    figures: dict[str, Any] = {"repeats": options.repeats, "shards": {}}
    with tempfile.TemporaryDirectory() as folder, progress_bar("measuring", len(options.shards) + 1, "stores") as advance:
        for shards in options.shards:
            figures["shards"][str(shards)] = measure_shards(Path(folder), shards, options.repeats)
            advance(1)
        figures["histogram"] = measure_positions(Path(folder), options.positions, options.repeats)
        advance(1)
    smallest, largest = (str(shards) for shards in (min(options.shards), max(options.shards)))
    peaks = [figures["shards"][shards]["statistics"]["peak_mib"]["median"] for shards in (smallest, largest)]
    figures["memory_largest_over_smallest"] = round(peaks[1] / peaks[0], 3)
    keep("scale", figures)
    draw(figures, RESULTS / "scale.svg")


if __name__ == "__main__":
    main()
