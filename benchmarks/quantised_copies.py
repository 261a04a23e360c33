"""Quantised copies of a model judged against a dump of it, beside all log-probabilities kept on disk and the exact divergence.

    python -m benchmarks.quantised_copies --model smollm2 --original F32.gguf --copies Q8_0.gguf Q4_K_M.gguf Q2_K.gguf \\
        --text wikitext2-test.txt --work .bench/copies

Three ways, over the same positions of one text, with the same forward passes of float32:

* a store: the original is dumped (with `--top-k` of TOP_K, the other options as they are), and each copy evaluated on it;
* a base file: 16 bits for each log-probability, in the layout of llama.cpp's `--kl-divergence-base` as we wrote it after its
  source (steps from a position's likeliest token down to 16 nats below, and 8 bytes of scale), written and read with numpy;
* the exact divergence, in float64 from float32 log-probabilities held in memory.

Seconds are those of the processor, of one thread, with the forward pass and without loading a model. The copies are GGUF files
whose weights are widened to float32: the arithmetic of an engine is no part of this. Figures of a copy are kept in the folder
`--work`, so that a run that was ended continues; they go to results/quantised_copies.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measurement import keep
from knowledge_store import KnowledgeStore
from student_train.evaluation.bootstrap import group_sizes, group_sums
from student_train.evaluation.comparison import mean_difference
from student_train.evaluation.judged_positions import kl_percentiles
from student_train.evaluation.kinds import measure
from student_train.evaluation.metrics import standard_error
from student_train.training.models import load_model
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump
from teacher_dump.teachers.local import load_teacher

TOP_K = (5, 50)
WORST = 20  # positions whose order is compared
CHARACTERS = 4  # of a token, about
DEPTH = 16  # nats of a base file
FIGURES = ("nll", "kl", "kl_standard_error", "kl_lower_bound", "top_1_agreement", "perplexity_change", "kl_median", "kl_99")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and how many seconds of the processor it took."""
    started = time.process_time()
    result = work()
    return result, round(time.process_time() - started, 2)


def judged(model: Any, store: KnowledgeStore, name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Log-probabilities, float32 (n, V), tokens and sequence ids of a dump's targets, a batch at a time."""
    for batch in store.batches(name, batch_size=2, shuffle=False):
        targets = torch.from_numpy(batch["is_target"])[:, 1:]
        with torch.inference_mode():
            tokens, mask = (torch.from_numpy(batch[column]) for column in ("input_ids", "attention_mask"))
            logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits[:, :-1][targets]
            logprobs = logits.float().log_softmax(-1).numpy()
        rows = targets.nonzero()[:, 0].numpy()
        yield logprobs, tokens[:, 1:][targets].numpy(), batch["sequence_id"][rows]


def write_base(path: Path, model: Any, store: KnowledgeStore, name: str) -> np.ndarray:
    """Write a base file; the exact log-probabilities (N, V), float32."""
    parts = []
    with open(path, "wb") as file:
        for logprobs, _, _ in judged(model, store, name):
            highest = logprobs.max(axis=1)
            lowest = np.maximum(logprobs.min(axis=1), highest - DEPTH)
            scale = np.maximum((highest - lowest) / 65535, np.finfo(np.float32).tiny)
            steps = ((np.maximum(logprobs, lowest[:, None]) - lowest[:, None]) / scale[:, None]).round().astype(np.uint16)
            head = np.stack([scale, lowest], axis=1).astype(np.float32).view(np.uint16)
            np.concatenate([head, steps], axis=1).tofile(file)
            parts.append(logprobs)
    return np.concatenate(parts)


def divergences(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Σ q ln(q / p) of log-probabilities (n, V) each, float64 (n,)."""
    wide = teacher.astype(np.float64)
    return (np.exp(wide) * (wide - student)).sum(axis=1)


def base_divergences(path: Path, model: Any, store: KnowledgeStore, name: str) -> dict[str, np.ndarray]:
    """The divergence of a model from a base file at each position, and what else the model says there."""
    vocabulary = len(store.tokens(name))
    rows = np.memmap(path, np.uint16, "r").reshape(-1, vocabulary + 4)
    found: dict[str, list[np.ndarray]] = {"kl": [], "logprobs": [], "tokens": [], "sequences": []}
    start = 0
    for logprobs, tokens, sequences in judged(model, store, name):
        part = np.asarray(rows[start : start + len(logprobs)])
        scale, lowest = part[:, :4].copy().view(np.float32).T
        teacher = part[:, 4:] * scale[:, None] + lowest[:, None]
        kl = np.where(part[:, 4:] > 0, np.exp(teacher) * (teacher - logprobs), 0).sum(axis=1, dtype=np.float64)
        for column, values in zip(found.values(), (kl, logprobs, tokens, sequences), strict=True):
            column.append(values)
        start += len(logprobs)
    return {column: np.concatenate(values) for column, values in found.items()}


def described(kl: np.ndarray, sequences: np.ndarray) -> dict[str, Any]:
    """Of the divergence at each position."""
    percentiles = {name: value for name, value in kl_percentiles(kl).items() if name in FIGURES}
    sums, sizes = group_sums(kl, sequences), group_sizes(len(kl), sequences)
    return {"kl": float(kl.mean()), "kl_standard_error": standard_error(sums, sizes), **percentiles}


def in_order(kl: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How well a figure of each position sorts them: correlation with the exact one, and how many of its worst it has."""
    worst = [set(np.argsort(values)[-WORST:].tolist()) for values in (kl, exact)]
    return {"correlation": float(np.corrcoef(kl, exact)[0, 1]), "worst_found": len(worst[0] & worst[1]) / WORST}


def measured(model: Any, store: KnowledgeStore, name: str, file: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What `evaluate` says of a model, with its seconds, and its lower bound at each position in the store's order."""
    import pyarrow.parquet as pq

    file.unlink(missing_ok=True)
    result, seconds = timed(lambda: measure(model, store, name, batch_size=2, positions_file=file))
    record = result["figures"]["positions"]
    figures = {column: record["student"].get(column) for column in FIGURES}
    figures |= {"floor": record["teacher"].get("kl"), "seconds": seconds, "positions_file": file.stat().st_size}
    return {**figures, "per_sequence": record["per_sequence"]}, pq.read_table(file)["kl_lower_bound"].to_numpy()


def judge_copy(path: Path, options: argparse.Namespace, store: KnowledgeStore, exact: np.ndarray) -> dict[str, Any]:
    """All three ways on one copy."""
    model = load_model(str(options.model), path.name)
    names = {k: f"top-{k}" for k in TOP_K}
    base, seconds = timed(lambda: base_divergences(options.work / "base.bin", model, store, names[TOP_K[0]]))
    rows, logprobs = np.arange(len(exact)), base["logprobs"]
    kl = np.concatenate([divergences(exact[start : start + 64], logprobs[start : start + 64]) for start in rows[::64]])
    ratio = np.exp((exact[rows, base["tokens"]] - logprobs[rows, base["tokens"]]).mean(dtype=np.float64))
    figures: dict[str, Any] = {
        "bytes": path.stat().st_size,
        "exact": {
            **described(kl, base["sequences"]),
            "top_1_agreement": float((exact.argmax(axis=1) == logprobs.argmax(axis=1)).mean()),
            "perplexity_change": float(ratio - 1),
        },
        "base file": {**described(base["kl"], base["sequences"]), "seconds": seconds, **in_order(base["kl"], kl)},
    }
    for k, name in names.items():
        found, lower_bounds = measured(model, store, name, options.work / "positions.parquet")
        figures[f"store, top-{k}"] = {**found, **in_order(lower_bounds, kl)}
    return figures


def judge_original(options: argparse.Namespace) -> dict[str, Any]:
    """Both the dumps and the base file, and what the original scores on the dumps."""
    teacher = load_teacher(str(options.model), options.original)
    corpus = options.work / "corpus.jsonl"
    text = options.text.read_text()[: options.sequences * options.length * CHARACTERS]
    corpus.write_text(json.dumps({"text": text}) + "\n")
    figures: dict[str, Any] = {}
    for k in TOP_K:
        config = DumpConfig(
            str(options.model), (corpus,), options.work / "store", f"top-{k}", max_length=options.length, top_k=k,
            gguf_file=options.original,
        )  # fmt: skip
        report, seconds = timed(lambda config=config: dump(config, teacher=teacher))
        figures[f"store, top-{k}"] = {"dump_seconds": seconds, "positions": report.positions}
    store = KnowledgeStore.open(options.work / "store")
    exact, seconds = timed(lambda: write_base(options.work / "base.bin", teacher.model, store, f"top-{TOP_K[0]}"))
    np.save(options.work / "exact.npy", exact)
    figures["base file"] = {"dump_seconds": seconds, "bytes": (options.work / "base.bin").stat().st_size}
    for k in TOP_K:
        found, _ = measured(teacher.model, store, f"top-{k}", options.work / "positions.parquet")
        summary = next(each for each in store.info() if each.dump == f"top-{k}")
        figures[f"store, top-{k}"] |= {**found, "bytes": summary.bytes, "tokens_bytes": summary.tokens_bytes}
    return figures


def cached(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures, which are made where they are not there."""
    if not path.exists():
        path.write_text(json.dumps(work(), indent=1))
    return dict(json.loads(path.read_text()))


def main() -> None:
    """Print the figures, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of the GGUF files")
    parser.add_argument("--original", required=True, help="name of the original's GGUF file")
    parser.add_argument("--copies", nargs="+", required=True, help="names of the copies' GGUF files")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the store, the base file and unfinished figures")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--length", type=int, default=96, help="tokens of a sequence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    original = cached(options.work / "original.json", lambda: judge_original(options))
    store = KnowledgeStore.open(options.work / "store")
    exact = np.load(options.work / "exact.npy", mmap_mode="r")
    copies = {}
    for name in options.copies:
        copy = options.model / name
        copies[name] = cached(options.work / f"{name}.json", lambda copy=copy: judge_copy(copy, options, store, exact))
    for k in TOP_K:
        sums = original[f"store, top-{k}"].pop("per_sequence")
        for found in copies.values():
            figures = found[f"store, top-{k}"]
            ours = figures.pop("per_sequence")
            for figure in ("kl", "kl_lower_bound"):
                difference = mean_difference(ours[figure], sums[figure], np.array(sums["targets"], np.float64))
                figures[f"{figure}_less_the_original"] = [difference.value, difference.low, difference.high]
    keep("quantised_copies", {"positions": len(exact), "vocabulary": exact.shape[1], "original": original, "copies": copies})


if __name__ == "__main__":
    main()
