"""What importing caches of other programs costs, and what a store loses on its way through DistillKit's layout.

    python -m benchmarks.imports [--positions 50000]

Caches of random predictions over 32,000 tokens, of sequences of 512, are written in each layout and imported, the whole of
`import_dump` in this process: reading all files twice, checks, packing, compression and hashing. Positions a second are of
processor time (of all threads), which other programs on the machine change little, and none of a teacher or a download.

`round_trip_steps`: two of the dumps are written by `export_distillkit`, imported again, and compared: the largest difference of
how far a candidate is below the first, and of the tail's log-odds, in steps.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from benchmarks.measurement import keep
from benchmarks.tiny_model import make_tokenizer
from knowledge_store import KnowledgeStore
from knowledge_store.kinds.positions import exact_steps
from teacher_dump.importers.configuration import ImportConfig
from teacher_dump.importers.run import import_dump

VOCABULARY, LENGTH = 32_000, 512
HIT = 0.6  # of the positions: the token is the likeliest candidate
RUNS = 3


def predictions(sequences: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (S, T), and of each position k different candidates (S, T, k) with log-probabilities, likeliest first."""
    random = np.random.default_rng(k)
    tokens = random.integers(0, VOCABULARY, (sequences, LENGTH))
    ids = (
        random.integers(0, VOCABULARY, (sequences, LENGTH, 1)) + np.cumsum(random.integers(1, 60, (sequences, LENGTH, k)), 2)
    ) % VOCABULARY
    hit = (random.random((sequences, LENGTH)) < HIT) & ~(ids == tokens[..., None]).any(axis=2)
    ids[..., 0] = np.where(hit, tokens, ids[..., 0])
    logits = np.cumsum(
        np.concatenate([random.normal(0, 1, (sequences, LENGTH, 1)), -random.exponential(0.7, (sequences, LENGTH, k))], 2), 2
    )
    total = np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return tokens, ids, (logits - total)[..., :k].astype(np.float32)


def plain(folder: Path, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    table = pa.table({"ids": tokens.tolist(), "top": ids.tolist(), "scores": logprobs.tolist()})
    pq.write_table(table, folder / "cache.parquet")
    return {"files": folder / "cache.parquet", "columns": "ids=ids,candidates=top,logprobs=scores"}


def axolotl(folder: Path, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    names = ("input_ids", "target_token_ids", "target_logprobs")
    table = pa.table(dict(zip(names, (tokens.tolist(), ids[:, 1:].tolist(), logprobs[:, 1:].tolist()), strict=True)))
    with pa.OSFile(str(folder / "cache.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return {"files": folder / "cache.arrow"}


def vllm(folder: Path, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    with open(folder / "cache.jsonl", "w") as file:
        for row, top, scores in zip(tokens.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
            said: list[Any] = [None]
            for place in range(1, LENGTH):
                entry = {str(row[place]): {"logprob": -12.0, "rank": 99, "decoded_token": "?"}}
                for rank, (token, score) in enumerate(zip(top[place], scores[place], strict=True), 1):
                    entry[str(token)] = {"logprob": score, "rank": rank, "decoded_token": "token"}
                said.append(entry)
            file.write(json.dumps({"choices": [{"prompt_token_ids": row, "prompt_logprobs": said}]}) + "\n")
    return {"files": folder / "cache.jsonl"}


def nemo(folder: Path, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    with open(folder / "cache.jsonl", "w") as file:
        for row, top, scores in zip(tokens, ids, logprobs, strict=True):
            total = -scores[1:, :1]
            columns = {
                "tokens": row[:-1], "labels": row[1:], "loss_mask": np.ones(LENGTH - 1, int), "topk_token_ids": top[1:],
                "topk_logits": scores[1:] + total, "log_sum_exp_logits": total[:, 0],
            }  # fmt: skip
            file.write(json.dumps({name: column.tolist() for name, column in columns.items()}) + "\n")
    return {"files": folder / "cache.jsonl"}


def megatron(folder: Path, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, Any]:
    with tarfile.open(folder / "cp0_dp0__9.tar", "w") as archive:
        for iteration in range(0, len(tokens), 8):
            part = slice(iteration, iteration + 8)
            top, scores = ids[part, 1:].swapaxes(0, 1), logprobs[part, 1:].swapaxes(0, 1).astype(np.float16)
            buffer = io.BytesIO()
            low = torch.from_numpy((top & 0xFFFF).astype(np.int32)).to(torch.uint16)
            torch.save(
                {"values": [torch.from_numpy(scores)], "indices_low": [low], "bit_17": [torch.from_numpy(top >> 16 > 0)]},
                buffer,
            )
            data = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
            info = tarfile.TarInfo(f"{iteration}.pt.zst")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    pq.write_table(pa.table({"input_ids": tokens.tolist()}), folder / "samples.parquet")
    return {"files": folder / "cp0_dp0__9.tar", "token_file": folder / "samples.parquet"}


Writer = Callable[[Path, np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]
CACHES: list[tuple[str, int, Writer]] = [
    ("plain", 8, plain),
    ("axolotl", 8, axolotl),
    ("vllm", 5, vllm),
    ("nemo-aligner", 8, nemo),
    ("megatron", 8, megatron),
    ("megatron", 32, megatron),
]


def measured(layout: str, store: Path, tokenizer: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Positions a second of processor time of an import, over some runs, and bytes a position."""
    speeds = []
    for _ in range(RUNS):
        shutil.rmtree(store, ignore_errors=True)
        config = ImportConfig(
            store=store, format=layout, tokenizer=str(tokenizer), vocabulary_size=VOCABULARY, name="cache", **options
        )
        began = time.process_time()
        report = import_dump(config)
        speeds.append(report.positions / (time.process_time() - began))
    [summary] = KnowledgeStore.open(store).info()
    speeds.sort()
    return {
        "positions": summary.positions,
        "positions_per_core_second": round(statistics.median(speeds)),
        "smallest": round(speeds[0]),
        "largest": round(speeds[-1]),
        "bytes_per_position": round(summary.bytes_per_position or 0, 2),
    }


def difference(first: Path, second: Path) -> dict[str, float]:
    """The largest differences of two stores of the same dump, in steps."""
    one, other = KnowledgeStore.open(first), KnowledgeStore.open(second)
    manifest = one.manifest()
    most = {"gaps": 0.0, "tail": 0.0}
    for number in range(len(one)):
        steps = []
        for store in (one, other):
            sequence = store[number]
            kept = {
                name: values[sequence["has_knowledge"]] for name, values in sequence.items() if isinstance(values, np.ndarray)
            }
            steps.append(exact_steps({**kept, "token_id": kept["input_ids"]}, manifest))
        for label, name in (("gaps", "candidate_logprobs"), ("tail", "tail_logprob")):
            apart = np.abs(np.round(steps[0][name]) - np.round(steps[1][name]))
            most[label] = max(most[label], float(np.nanmax(apart)))
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=50_000, help="of each cache")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sequences = -(-arguments.positions // LENGTH)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = folder / "tokenizer"
        make_tokenizer(list(topics.values())).save_pretrained(tokenizer)
        (tokenizer / "config.json").write_text(json.dumps({"model_type": "llama"}))
        for layout, k, write in CACHES:
            name = f"{layout}-{k}"
            cache = folder / name
            cache.mkdir()
            options = write(cache, *predictions(sequences, k))
            figures[f"{layout}, k = {k}"] = measured(layout, folder / f"{name}-store", tokenizer, options)
        for layout, k in (("plain", 8), ("megatron", 32)):
            first, packed, again = (folder / f"{layout}-{k}-{part}" for part in ("store", "packed", "again"))
            KnowledgeStore.open(first).export_distillkit(packed)
            found = measured("distillkit", again, tokenizer, {"files": packed / "data_0.parquet"})
            found["round_trip_steps"] = difference(first, again)
            figures[f"distillkit, k = {k}"] = found
    keep("imports", figures)


if __name__ == "__main__":
    main()
