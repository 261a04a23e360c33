"""How fast sequences are read: the store beside mosaicml-streaming, litdata, HF datasets and a memory-mapped array.

    python -m benchmarks.reading --store STORE [--dump NAME]

The sequences of one dump are written in each reader's own format (see `readers.py`) and read by one core, warm: each repeat of
each reader is a process of its own, the readers in turn. The peers are installed in `.peers` the first time, with the versions
of `peers.txt`. Figures are medians over the repeats, with the least and the most.

Then a small student takes training steps: on one batch that is held in memory, and on the store, with a process that reads
ahead and without one, with the cache of decoded sequences and without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measurement import RESULTS, keep
from benchmarks.pictures import picture
from benchmarks.readers import READERS, Store
from knowledge_store import KnowledgeStore

HERE = Path(__file__).parent
ROOT = HERE.parent
WARM_UP = 2  # training steps that are not counted


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, made when it is missing or `peers.txt` has changed."""
    wanted = hashlib.sha256((HERE / "peers.txt").read_bytes()).hexdigest()
    python, made = folder / "bin" / "python", folder / "peers"
    if not made.exists() or made.read_text() != wanted:
        print(f"Installing the peers in {folder}.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", HERE / "peers.txt"], check=True)
        made.write_text(wanted)
    return python


def save_records(store: KnowledgeStore, dump: str, path: Path) -> dict[str, float]:
    """Write a dump's sequences for the readers, in the most compact plain types.

    Returns:
        how many sequences, positions, and bytes a position.
    """
    small = np.uint16 if store.manifest(dump).vocabulary_size <= 2**16 else np.uint32
    types = {
        "input_ids": small,
        "candidate_ids": small,
        "is_target": bool,
        "token_logprob": np.float16,
        "candidate_logprobs": np.float16,
        "tail_logprob": np.float16,
    }
    count = store.sequences(dump).num_rows
    sequences = [store[dump, ordinal] for ordinal in range(count)]
    arrays = {name: np.concatenate([each[name].astype(dtype) for each in sequences]) for name, dtype in types.items()}
    arrays["token_id"] = arrays.pop("input_ids")
    positions = len(arrays["token_id"])
    record_bytes = sum(array.nbytes for array in arrays.values()) / positions
    np.savez(path, length=np.array([len(each["input_ids"]) for each in sequences]), **arrays)
    return {"sequences": count, "positions": positions, "record_bytes_per_position": record_bytes}


def folder_bytes(*folders: Path) -> int:
    """Bytes of all files in folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def compare(options: argparse.Namespace, work: Path, facts: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The figures of each reader."""
    peers = peers_python(options.peers)
    dump = KnowledgeStore.open(options.store).dump(options.dump)
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}

    def run(name: str, *words: object) -> dict[str, Any]:
        folder = work / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(exist_ok=True)
        ours = issubclass(READERS[name], Store)
        # Each finds its caches in its own folder, where they are counted.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT) if ours else "",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HOME": str(folder / "cache"),
            "DATA_OPTIMIZER_CACHE_FOLDER": str(folder / "cache"),
            "HOME": str(folder / "cache"),
        }
        if ours and words[0] == "write":
            (folder / f"store-{dump}").symlink_to(options.store.resolve())
        command = [sys.executable if ours else peers, HERE / "readers.py", name, work / "records.npz", folder, *words]
        done = subprocess.run([str(each) for each in command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        print(f"{name}: {' '.join(map(str, words))}", file=sys.stderr)
        return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}

    for name in READERS:
        written = run(name, "write")
        own = issubclass(READERS[name], Store)
        vocabulary = (options.store / dump / "tokens.parquet").stat().st_size
        size = folder_bytes(options.store / dump) - vocabulary if own else folder_bytes(written["folder"])
        first = run(name, "read", 0)  # builds what caches there are
        cache = folder_bytes(written["folder"] / "cache") if own else folder_bytes(written["folder"]) - size
        results[name] = {
            "package": f"{written['package']} {written['version']}",
            "bytes_per_position": round(size / facts["positions"], 2),
            "cache_bytes_per_position": round(cache / facts["positions"], 2),
            "first_pass_positions_per_s": round(first["first_pass"]),
        }
    for repeat in range(options.repeats):
        for name in READERS:
            runs[name].append(run(name, "read", 2 * repeat + 1))
    labels = {
        "sequential": "sequential_positions_per_s",
        "shuffled": "shuffled_positions_per_s",
        "sequential_batches": "sequential_positions_per_s_in_batches",
        "shuffled_batches": "shuffled_positions_per_s_in_batches",
        "one_p50_ms": "one_sequence_p50_ms",
        "one_p99_ms": "one_sequence_p99_ms",
    }
    for name, measured in runs.items():
        for figure, label in labels.items():
            values = [each[figure] for each in measured if figure in each]
            if values:
                digits = 4 if "ms" in figure else None
                median, least, most = statistics.median(values), min(values), max(values)
                results[name][label] = [round(each, digits) for each in (median, least, most)]
    return results


def steps(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds of a training step, medians over runs in turn, their ratio to one repeated batch in memory, and the share of
    them that went by waiting for batches (which a busy machine disturbs least)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from student_train.training.arguments import schedule, training_arguments
    from student_train.training.configuration import TrainConfig
    from student_train.training.dataset import DistillationDataset
    from student_train.training.run_trainer import RunTrainer

    class OneBatch(DistillationDataset):
        """The first batch again and again, read once."""

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            batch = next(super().__iter__())
            while True:
                yield batch

    class Clock(TrainerCallback):
        """When each step ended."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            self.ends.append(time.perf_counter())

    class Waiting(RunTrainer):
        """Counts the seconds in which a step waits for its batches."""

        waited = 0.0

        def get_batch_samples(self, *arguments: Any) -> Any:
            began = time.perf_counter()
            found = super().get_batch_samples(*arguments)
            if self.state.global_step > WARM_UP:
                self.waited += time.perf_counter() - began
            return found

    def measure(kind: type[DistillationDataset], workers: int, cache_size: int) -> tuple[list[float], float]:
        store = KnowledgeStore.open(options.store, cache_size=cache_size)
        dump = store.dump(options.dump)
        lengths = store.sequences(dump)["length"].to_numpy()
        vocabulary = store.manifest(dump).vocabulary_size
        # Sequences of one length: a step's work does not depend on which they are.
        ordinals = np.flatnonzero(lengths == lengths.max())
        config = TrainConfig(
            str(options.store), "", str(work / "run"), steps=options.steps, batch_size=options.batch_size, workers=workers
        )
        arguments = training_arguments(config)
        schedule(arguments, config, options.steps, evaluate=False, fresh=True)
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        student = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, **shape))
        dataset = kind(store, dump, batch_size=options.batch_size, ordinals=ordinals, endless=True)
        trainer = Waiting(student, arguments, config, dataset, None, dataset.batches_per_epoch)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        shutil.rmtree(work / "run", ignore_errors=True)
        taken = np.diff(clock.ends)[WARM_UP:].tolist()
        return taken, trainer.waited / sum(taken)

    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    size = 10_000_000_000
    ways: dict[str, tuple[type[DistillationDataset], int, int]] = {
        "one batch in memory": (OneBatch, 0, 0),
        "store, cache, reading ahead": (DistillationDataset, 1, size),
        "store, cache, reading in turn": (DistillationDataset, 0, size),
        "store, Parquet alone, reading ahead": (DistillationDataset, 1, 0),
    }
    list(KnowledgeStore.open(options.store, cache_size=size).batches(options.dump))  # fills the cache
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    waits: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            taken, waited = measure(*way)
            times[name].append(taken)
            waits[name].append(waited)
    figures: dict[str, Any] = {"batch_size": options.batch_size, "steps": options.steps, "repeats": options.repeats}
    base = [statistics.median(run) for run in times["one batch in memory"]]
    for name, found in times.items():
        medians = [statistics.median(run) for run in found]
        ratios = [one / other for one, other in zip(medians, base, strict=True)]
        figures[name] = {
            "step_s": [round(each, 4) for each in (statistics.median(medians), min(medians), max(medians))],
            "mean_step_s": round(statistics.median(statistics.fmean(run) for run in found), 4),
            "waiting_share": round(statistics.median(waits[name]), 4),
            "ratio": [round(each, 4) for each in (statistics.median(ratios), min(ratios), max(ratios))],
        }
    return figures


def ratios(readers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the goals are about."""
    ours = readers["store"]

    def sequential(name: str) -> float:
        return readers[name]["sequential_positions_per_s"][0]

    return {
        "sequential, to litdata, zstd": round(sequential("store") / sequential("litdata, zstd"), 2),
        "sequential, to MDS": round(sequential("store") / sequential("MDS"), 2),
        "shuffled, to sequential": round(ours["shuffled_positions_per_s"][0] / sequential("store"), 2),
        "shuffled in batches, to sequential in batches": round(
            ours["shuffled_positions_per_s_in_batches"][0] / ours["sequential_positions_per_s_in_batches"][0], 2
        ),
        "bytes, to MDS": round(ours["bytes_per_position"] / readers["MDS"]["bytes_per_position"], 2),
        "bytes, to litdata, zstd": round(ours["bytes_per_position"] / readers["litdata, zstd"]["bytes_per_position"], 2),
    }


def draw(readers: dict[str, dict[str, Any]], path: Path) -> None:
    """Positions a second, in order and shuffled, and bytes a position, caches in a lighter colour."""
    names = list(readers)
    places = np.arange(len(names))[::-1]
    with picture(path, 1, 2, figsize=(10, 0.5 * len(names) + 1.2), sharey=True) as (speed, size):
        for offset, label, shown, colour in (
            (0.2, "sequential_positions_per_s", "in order", "#1f6f8b"),
            (-0.2, "shuffled_positions_per_s", "shuffled", "#e07a3f"),
        ):
            there = [(place, readers[name][label]) for place, name in zip(places, names, strict=True) if label in readers[name]]
            middle = np.array([each[1] for each in there]).T / 1e6
            spread = [middle[0] - middle[1], middle[2] - middle[0]]
            speed.barh([each[0] + offset for each in there], middle[0], 0.38, xerr=spread, label=shown, color=colour)
        speed.set_xscale("log")
        speed.set_xlabel("million positions a second, one core")
        speed.set_yticks(places, names)
        speed.legend(frameon=False)
        kept = [readers[name]["bytes_per_position"] for name in names]
        size.barh(places, kept, 0.6, color="#1f6f8b", label="data")
        caches = [readers[name]["cache_bytes_per_position"] for name in names]
        size.barh(places, caches, 0.6, left=kept, color="#b9d5df", label="cache, built by reading")
        size.set_xlabel("bytes a position")
        size.legend(frameon=False)


def main() -> None:
    """Compare the readers, then time training steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--dump")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="training steps in each run")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences in a training step")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="the peers' environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = KnowledgeStore.open(options.store, cache_size=0)
        facts = save_records(store, store.dump(options.dump), work / "records.npz")
        readers = compare(options, work, facts)
        training = steps(options, work)
    draw(readers, RESULTS / "reading.svg")
    keep("reading", {**facts, "repeats": options.repeats, "ratios": ratios(readers), "readers": readers, "training": training})


if __name__ == "__main__":
    main()
