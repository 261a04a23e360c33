"""One side of `revisions.py`: a warm process of one revision of the project, which is asked for turns over its standard input.

Runs with the packages of any revision on its path, so it takes from the project only what all of them have: `DumpConfig` and
`dump`, `KnowledgeStore.open`, `.batches` and `[…]`, and, since how a shard is handed to the writer has changed, the helpers of
that revision's own tests/stores.py. What lies elsewhere in older revisions is looked for there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Times = dict[str, float]

DUMP = "dump"
MIN_SECONDS = 0.5  # of a turn
BATCH_SIZE = 8
RANDOM_READS = 500
WRITTEN_SEQUENCES, WRITTEN_LENGTH, WRITTEN_VOCABULARY = 96, 512, 512


def load(name: str, *modules: str) -> Any:
    """`name` from the first of the modules that exists."""
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    raise SystemExit(f"this revision has {name} in none of {', '.join(modules)}")


def forget_editable_installs() -> None:
    """Leave only the checkout on the path: an editable install would lend its own modules where this revision has none."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", ""))]


class Side:
    """Everything that a turn needs, made once: the teacher, a store of its own dump, and rows to write."""

    def __init__(self, work: Path, teacher: str, gguf_file: str | None, corpus: Path, max_length: int):
        from knowledge_store import DumpWriter, KnowledgeStore
        from teacher_dump import DumpConfig, dump

        self.work, self.writer, self.store_type = work, DumpWriter, KnowledgeStore
        load_teacher = load("load_teacher", "teacher_dump.teachers.local", "teacher_dump.teacher")
        self.teacher = load_teacher(teacher, gguf_file, "float32", "cpu")

        def run(store: Path) -> int:
            config = DumpConfig(
                teacher=teacher,
                corpus=(corpus,),
                store=store,
                name=DUMP,
                max_length=max_length,
                dtype="float32",
                device="cpu",
                gguf_file=gguf_file,
            )
            return int(dump(config, teacher=self.teacher).positions)

        self.run = run
        self.positions = run(work / "store")
        self.plain = KnowledgeStore.open(work / "store", cache_size=0)
        self.cached = KnowledgeStore.open(work / "store")
        self.read(self.cached)  # fills the cache
        stores = import_module("stores")
        self.stores = stores
        self.rows = stores.random_sequences(0, WRITTEN_SEQUENCES, WRITTEN_VOCABULARY, 5, WRITTEN_LENGTH)
        names = stores.words(WRITTEN_VOCABULARY)
        tokens_table = load("tokens_table", "knowledge_store.format.sequences", "knowledge_store.sequences")
        self.tokens = tokens_table(names, names)

    def read(self, store: Any) -> None:
        """All batches of the dump in order."""
        for batch in store.batches(DUMP, batch_size=BATCH_SIZE, shuffle=False):
            batch["input_ids"].sum()

    def dump(self) -> Times:
        return self._timed(lambda folder: self.run(folder))

    def read_from_parquet(self) -> Times:
        return self._timed(lambda folder: self.read(self.plain))

    def read_from_the_cache(self) -> Times:
        return self._timed(lambda folder: self.read(self.cached))

    def read_at_random(self) -> Times:
        order = np.random.default_rng(0).integers(self.cached.sequence_count(DUMP), size=RANDOM_READS).tolist()
        return self._timed(lambda folder: [self.cached[DUMP, ordinal] for ordinal in order])

    def write(self) -> Times:
        """One shard's rows: handed to the writer, and committed."""
        manifest = self.stores.make_manifest("written", WRITTEN_VOCABULARY, 5, 1)
        writers = []

        def prepare(folder: Path) -> None:
            writers.append(self.writer.open(folder, manifest, self.tokens))

        return self._timed(lambda folder: self.stores.commit(writers[-1], 0, self.rows), prepare)

    def _timed(self, turn: Callable[[Path], Any], prepare: Callable[[Path], None] | None = None) -> Times:
        """One turn, repeated until it has taken `MIN_SECONDS`; it may use a folder that is empty before and gone afterwards."""
        folder = self.work / "turn"
        seconds = processor_seconds = 0.0
        count = 0
        while seconds < MIN_SECONDS:
            if prepare:
                prepare(folder)
            began, processor_began = time.perf_counter(), time.process_time()
            turn(folder)
            seconds += time.perf_counter() - began
            processor_seconds += time.process_time() - processor_began
            count += 1
            shutil.rmtree(folder, ignore_errors=True)
        return {"seconds": seconds / count, "processor_seconds": processor_seconds / count}


TASKS = {
    "dump": Side.dump,
    "read in order, Parquet": Side.read_from_parquet,
    "read in order, cache": Side.read_from_the_cache,
    "read at random": Side.read_at_random,
    "write a shard": Side.write,
}


def main() -> None:
    """Answer each line of standard input, the name of a task, with a line: its seconds, by the clock and of the processor."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    forget_editable_installs()
    answers = os.fdopen(os.dup(1), "w")  # what the project prints goes to standard error
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    side = Side(
        Path(settings["work"]),
        settings["teacher"],
        settings["gguf_file"],
        Path(settings["corpus"]),
        settings["max_length"],
    )
    print(json.dumps({"positions": side.positions}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(TASKS[line.strip()](side)), file=answers, flush=True)


if __name__ == "__main__":
    main()
