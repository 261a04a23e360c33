"""The readers that `reading.py` compares: how each writes the same sequences, and how it gives them back.

Runs in the environment of the peers as well as in the project's own, one reader in a process:

    python readers.py NAME RECORDS FOLDER write     writes them (the store is there already)
    python readers.py NAME RECORDS FOLDER read      prints figures as JSON

A record is one sequence of T positions with K candidates, as compact as plain types keep it: `token_id` (T,), `candidate_ids`
(T, K), `is_target` (T,), and log-probabilities in float16, `token_logprob` (T,), `candidate_logprobs` (T, K), `tail_logprob`
(T,). That is less than the store gives back, whose arrays are int64 and float32 as training takes them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

BATCH = 8
SECONDS = 3.0  # after which a pass over the sequences, or reading single ones, is cut short
SINGLE = 2000
Record = dict[str, np.ndarray]
FIELDS = ("token_id", "is_target", "token_logprob", "candidate_ids", "candidate_logprobs", "tail_logprob")


def records(path: Path) -> list[Record]:
    """The sequences in an .npz file that `reading.py` made."""
    arrays = dict(np.load(path))
    starts = np.concatenate([[0], np.cumsum(arrays.pop("length"))])
    return [{name: arrays[name][a:b] for name in FIELDS} for a, b in pairwise(starts)]


class Reader:
    """What is measured: `item` gives any sequence; `items` all of them in order, by the reader's own fastest means."""

    package = "numpy"
    at_random = True  # whether it reads single sequences

    def __init__(self, folder: Path, found: list[Record]):
        self.folder = folder
        self.count = len(found)

    @staticmethod
    def write(folder: Path, found: list[Record]) -> None:
        """Write the sequences."""

    def item(self, index: int) -> Record:
        """One sequence."""
        raise NotImplementedError

    def items(self) -> Iterable[Record]:
        """All of them, in order."""
        return (self.item(index) for index in range(self.count))

    def batches(self, order: np.ndarray) -> Iterable[Record]:
        """Batches as training takes them: int64 and float32, padded on the right."""
        for start in range(0, len(order), BATCH):
            yield stack([self.item(int(index)) for index in order[start : start + BATCH]])

    def ordered_batches(self) -> Iterable[Record]:
        """The same, in the order of the sequences."""
        held: list[Record] = []
        for record in self.items():
            held.append(record)
            if len(held) == BATCH:
                yield stack(held)
                held = []
        if held:
            yield stack(held)


def stack(held: list[Record]) -> Record:
    """Sequences of (T, …) as one batch of (B, T, …)."""
    longest = max(len(record["token_id"]) for record in held)
    lengths = np.array([len(record["token_id"]) for record in held])
    batch = {"attention_mask": np.arange(longest) < lengths[:, None]}
    for name in FIELDS:
        first = held[0][name]
        dtype = np.float32 if first.dtype.kind == "f" else bool if first.dtype.kind == "b" else np.int64
        batch[name] = np.zeros((len(held), longest, *first.shape[1:]), dtype)
        for row, record in enumerate(held):
            batch[name][row, : len(record[name])] = record[name]
    return batch


class MemoryMap(Reader):
    """One .npy file for each field, mapped; a sequence is copied out of it, since a view has read nothing yet."""

    def __init__(self, folder: Path, found: list[Record]):
        super().__init__(folder, found)
        self.starts = np.load(folder / "starts.npy")
        self.fields = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in FIELDS}

    @staticmethod
    def write(folder: Path, found: list[Record]) -> None:
        np.save(folder / "starts.npy", np.cumsum([0, *(len(record["token_id"]) for record in found)]))
        for name in FIELDS:
            np.save(folder / f"{name}.npy", np.concatenate([record[name] for record in found]))

    def item(self, index: int) -> Record:
        start, end = self.starts[index : index + 2]
        return {name: array[start:end].copy() for name, array in self.fields.items()}


def without_torchvision() -> None:
    """Let mosaicml-streaming be imported where torch is built for CPUs: the index has torchvision for GPUs only, which fails
    to load then. Its data sets of pictures, which alone need it, are not used here."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


class Mosaic(Reader):
    """mosaicml-streaming: `StreamingDataset[i]` of a local folder. It keeps compressed shards decompressed as well."""

    package = "mosaicml-streaming"
    compression: str | None = None

    def __init__(self, folder: Path, found: list[Record]):
        without_torchvision()
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        super().__init__(folder, found)
        clean_stale_shared_memory()
        self.dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1, keep_zip=True)

    @classmethod
    def write(cls, folder: Path, found: list[Record]) -> None:  # type: ignore[override]
        without_torchvision()
        from streaming import MDSWriter

        columns = {name: f"ndarray:{found[0][name].dtype}" for name in FIELDS if name != "is_target"}
        columns["is_target"] = "ndarray:uint8"  # it has no arrays of booleans
        with MDSWriter(out=str(folder), columns=columns, compression=cls.compression) as writer:
            for record in found:
                writer.write({**record, "is_target": record["is_target"].view(np.uint8)})

    def item(self, index: int) -> Record:
        return self.dataset[index]


class MosaicZstd(Mosaic):
    """The same, compressed."""

    compression = "zstd"


class Lit(Reader):
    """litdata: `StreamingDataset`, iterated for the order and indexed for single sequences."""

    package = "litdata"
    compression: str | None = None

    def __init__(self, folder: Path, found: list[Record]):
        from litdata import StreamingDataset

        super().__init__(folder, found)
        self.dataset = StreamingDataset(str(folder / "data"), shuffle=False)

    @classmethod
    def write(cls, folder: Path, found: list[Record]) -> None:  # type: ignore[override]
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder / "data"), chunk_bytes=2**26, compression=cls.compression)
        for index, record in enumerate(found):
            writer[index] = record
        writer.done()
        writer.merge(1)

    def item(self, index: int) -> Record:
        return self.dataset[index]

    def items(self) -> Iterable[Record]:
        return self.dataset  # not its iterator, whose own iterator begins afresh


class LitZstd(Lit):
    """The same, compressed."""

    compression = "zstd"


class HuggingFace(Reader):
    """datasets: Arrow files, mapped; lists of K are kept flat, which it reads fastest, and given their shape here."""

    package = "datasets"

    def __init__(self, folder: Path, found: list[Record]):
        from datasets import load_from_disk

        super().__init__(folder, found)
        self.width = found[0]["candidate_ids"].shape[1]
        self.dataset = load_from_disk(str(folder / "data")).with_format("numpy")

    @staticmethod
    def write(folder: Path, found: list[Record]) -> None:
        from datasets import Dataset, Features, Sequence, Value

        features = Features({name: Sequence(Value(str(found[0][name].dtype))) for name in FIELDS})
        flat = {name: [record[name].reshape(-1) for record in found] for name in FIELDS}
        Dataset.from_dict(flat, features=features).save_to_disk(str(folder / "data"))

    def shaped(self, record: Record) -> Record:
        """Two dimensions where there are two."""
        return {name: array.reshape(-1, self.width) if "candidate" in name else array for name, array in record.items()}

    def item(self, index: int) -> Record:
        return self.shaped(self.dataset[index])


class HuggingFaceIterable(HuggingFace):
    """The same data set as an iterable one, which only goes through in order (or shuffles within a buffer)."""

    at_random = False

    def items(self) -> Iterable[Record]:
        return map(self.shaped, self.dataset.to_iterable_dataset().with_format("numpy"))


class Store(Reader):
    """This project: `store[i]` and `store.batches`, with the cache of decoded sequences that an epoch before this one left."""

    package = "pyarrow"
    cache_size = 10_000_000_000

    def __init__(self, folder: Path, found: list[Record]):
        from knowledge_store import KnowledgeStore

        super().__init__(folder, found)
        [link] = folder.glob("store*")
        self.dump = link.name.partition("-")[2]
        self.store = KnowledgeStore.open(link.resolve(), cache_size=self.cache_size)

    def item(self, index: int) -> Record:
        return self.store[self.dump, index]

    def batches(self, order: np.ndarray) -> Iterable[Record]:
        return iter(self.store.batches(self.dump, BATCH, ordinals=order, shuffle=False))

    def ordered_batches(self) -> Iterable[Record]:
        return self.batches(np.arange(self.count))


class StoreParquet(Store):
    """The same without that cache, and with one decoded row group in memory: what Parquet alone gives."""

    cache_size = 0

    def __init__(self, folder: Path, found: list[Record]):
        import knowledge_store.reading.reader

        knowledge_store.reading.reader.MEMORY_BYTES = 1
        super().__init__(folder, found)


READERS: dict[str, type[Reader]] = {
    "store": Store,
    "store, Parquet alone": StoreParquet,
    "memory-mapped array": MemoryMap,
    "MDS": Mosaic,
    "MDS, zstd": MosaicZstd,
    "litdata": Lit,
    "litdata, zstd": LitZstd,
    "HF datasets, map": HuggingFace,
    "HF datasets, iterable": HuggingFaceIterable,
}


def rate(passes: Callable[[], Iterable[Record]]) -> float:
    """Positions a second over passes that take SECONDS together, the last one cut short. A batch counts what is no padding."""
    positions, began = 0, time.perf_counter()
    while True:
        for record in passes():
            mask = record.get("attention_mask")
            tokens = record["input_ids" if "input_ids" in record else "token_id"]
            positions += tokens.size if mask is None or mask.ndim == 1 else int(np.count_nonzero(mask))
            if time.perf_counter() - began > SECONDS:
                return positions / (time.perf_counter() - began)


def measure(reader: Reader, seed: int) -> dict[str, float]:
    """The figures of one process, after one pass that warms it up."""
    order = np.random.default_rng(seed).permutation(reader.count)
    began = time.perf_counter()
    warm = sum(len(record["input_ids" if "input_ids" in record else "token_id"]) for record in reader.items())
    figures = {
        "first_pass": warm / (time.perf_counter() - began),
        "sequential": rate(reader.items),
        "sequential_batches": rate(reader.ordered_batches),
    }
    if reader.at_random:
        figures["shuffled"] = rate(lambda: (reader.item(int(index)) for index in order))
        figures["shuffled_batches"] = rate(lambda: reader.batches(order))
        times, until = [], time.perf_counter() + SECONDS
        for index in np.random.default_rng(seed + 1).integers(0, reader.count, SINGLE).tolist():
            began = time.perf_counter()
            reader.item(index)
            times.append(time.perf_counter() - began)
            if began > until:
                break
        figures["one_p50_ms"], figures["one_p99_ms"] = (float(np.percentile(times, each)) * 1e3 for each in (50, 99))
    return figures


def main() -> None:
    """Write or read, on one core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=READERS, metavar="NAME")
    parser.add_argument("records", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=("write", "read"))
    parser.add_argument("seed", type=int, nargs="?", default=0, help="of the random order")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    kind, found = READERS[options.name], records(options.records)
    if options.task == "write":
        kind.write(options.folder, found)
        result: dict[str, Any] = {"package": kind.package, "version": version(kind.package)}
    else:
        result = measure(kind(options.folder, found), options.seed)
    print(json.dumps(result), flush=True)
    os._exit(0)  # some peers leave threads that would hold the process up


if __name__ == "__main__":
    main()
