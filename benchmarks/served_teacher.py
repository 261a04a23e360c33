"""A vLLM server against transformers: the same corpus is dumped from both, and what was kept is compared step by step.

    python -m benchmarks.served_teacher --teacher FOLDER --url http://127.0.0.1:8000 --text FILE

FOLDER has the weights that the server serves in float32. Each dump is also checked with the other side as the judge. Of the
processor's time that of this process is told, which is the client's own work where the server answers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measurement import keep
from knowledge_store.kinds.columns import padded_lists
from teacher_dump import CheckConfig, DumpConfig, check, dump
from teacher_dump.teachers.opening import open_teacher

TOP_K = 5


def columns(store: Path, name: str) -> pa.Table:
    """What is stored of a dump's positions with knowledge."""
    files = sorted((store / name / "positions").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in files])
    return table.filter(table["candidate_ids"].is_valid())


def compare(one: pa.Table, other: pa.Table) -> dict[str, Any]:
    """How many of the stored steps differ, and by how many steps, where candidates are the same and in the same order."""
    same = np.array(one["candidate_ids"].to_pylist(), object) == np.array(other["candidate_ids"].to_pylist(), object)
    one, other = (table.filter(pa.array(same)) for table in (one, other))
    figures: dict[str, Any] = {"positions": len(same), "positions_with_the_same_candidates": int(same.sum())}
    for name in ("gap_steps", "tail_steps", "token_steps"):
        values = [
            padded_lists(table[name], 0, np.float64)[0].ravel()
            if name == "gap_steps"
            else table[name].fill_null(0).to_numpy().astype(np.float64)
            for table in (one, other)
        ]
        apart = np.abs(values[0] - values[1])
        figures[name] = {
            "values": len(apart),
            "differ": int((apart > 0).sum()),
            "share": float((apart > 0).mean()),
            "most_steps": float(apart.max(initial=0)),
        }
    return figures


def by_size(one: pa.Table, other: pa.Table) -> dict[str, Any]:
    """How many steps tails are apart, by the tail's log-odds."""
    steps = [table["tail_steps"].to_numpy().astype(np.float64) for table in (one, other)]
    odds = 16 - (steps[1] - 2**23) / 8
    edges = (0.0, -7.0, -9.0, -11.0, -13.0, -np.inf)
    figures = {}
    for above, below in zip((np.inf, *edges), edges, strict=False):
        inside = (odds < above) & (odds >= below)
        apart = np.abs(steps[0] - steps[1])[inside]
        figures[f"log-odds from {below:g} to {above:g}"] = {
            "positions": int(inside.sum()),
            "differ": int((apart > 0).sum()),
            "most_steps": float(apart.max(initial=0)),
        }
    return figures


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=20_000)
    parser.add_argument("--max-length", type=int, default=255)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        store, corpus = Path(scratch) / "store", Path(scratch) / "text.txt"
        corpus.write_text(arguments.text.read_text()[: 4 * arguments.positions])
        common: dict[str, Any] = {"max_length": arguments.max_length, "top_k": TOP_K, "draw_weight": 0.0, "tail_entropy": False}
        configs = {
            "server": DumpConfig(arguments.teacher, (corpus,), store, "server", teacher_url=arguments.url, **common),
            "transformers": DumpConfig(arguments.teacher, (corpus,), store, "transformers", device="cpu", **common),
        }
        figures: dict[str, Any] = {}
        teachers = {}
        for name, config in configs.items():
            teachers[name] = open_teacher(config, config.loading, config.max_length)
            processor, started = time.process_time(), time.monotonic()
            report = dump(config, teacher=teachers[name])
            figures[name] = {
                "positions": report.positions,
                "seconds": time.monotonic() - started,
                "processor_seconds_here": time.process_time() - processor,
            }
        server, local = columns(store, "server"), columns(store, "transformers")
        figures["kept"] = compare(server, local)
        figures["tails"] = by_size(server, local)
        for name, judge in (("server", "transformers"), ("transformers", "server")):
            url = {"teacher_url": arguments.url} if judge == "server" else {"device": "cpu"}
            config = CheckConfig(teacher=arguments.teacher, store=store, dump=name, sample=50, **url)
            agreement = check(config, teachers[judge])["positions"]
            figures[f"{name}_judged_by_{judge}"] = {
                "verdict": agreement.verdict,
                "positions": agreement.positions,
                "most_beyond_rounding": {each: found.quantiles[-1] for each, found in agreement.differences.items()},
            }
        figures["engine_version"] = teachers["server"].description["engine_version"]
    keep("served_teacher", figures)


if __name__ == "__main__":
    main()
