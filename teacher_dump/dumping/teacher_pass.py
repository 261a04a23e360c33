"""The teacher's pass over the shards of a dump.

The next shard is read and tokenised, and the last one compressed, hashed and written, each in a thread of its own, while the
teacher works on this one.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from knowledge_store.format.commits import CommitRecord
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.sequences import SCORE, sequence_id, stored_columns, token_hash
from knowledge_store.kinds.kind import Parameters
from knowledge_store.reporter import Advance, Reporter
from knowledge_store.writing.writer import DumpWriter, Shard
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.asked_batches import AskedBatch, BatchAsker
from teacher_dump.dumping.batches import extract_batch
from teacher_dump.dumping.plan import ShardInput, ShardReader, corpus_columns, kept_parameters
from teacher_dump.dumping.publishing import Committed, Knowledge, ShardPublisher
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.teachers.protocol import Teacher

RECORDED_PACKAGES = ("knowledge-store", "torch", "transformers", "tokenizers", "pyarrow", "numpy")

LOOK_EVERY = 1.0  # seconds between looks whether another worker has committed the shard that is being made

Publish = Callable[[Shard], CommitRecord]


class _Overtaken(Exception):
    """Another worker has committed the shard that is being made."""


def dump_shards(
    config: DumpConfig,
    teacher: Teacher,
    reader: ShardReader,
    writer: DumpWriter,
    pending: list[int],
    publish: Publish,
    reporter: Reporter,
) -> Committed:
    """Ask the teacher for some shards and publish them.

    Args:
        config: of the dump.
        teacher: that can give what its kinds need.
        reader: of the shards.
        writer: of the dump.
        pending: the shards.
        publish: `writer.commit`, or a repair. A shard that is to be committed is left once another worker has committed it.
        reporter: hears of progress, and of how much was committed when Ctrl-C ends it.

    Returns:
        what was committed.

    Raises:
        KeyboardInterrupt: Ctrl-C; shards that had been handed over are committed first.
    """
    made_by, parameters = _made_by(teacher), kept_parameters(writer.manifest)
    total = sum(writer.manifest.derived["shards"][shard]["positions"] for shard in pending)

    def publish_knowledge(shard: ShardInput, knowledge: Knowledge) -> CommitRecord:
        teacher.check_unchanged()  # after all its answers, and before any of them is kept
        return publish(shard_of(writer.manifest, shard, knowledge, made_by))

    publisher = ShardPublisher(publish_knowledge)

    looked: dict[int, float] = {}  # when a shard was last looked for

    def committed_already(shard: int) -> bool:
        looked[shard] = time.monotonic()
        return publish == writer.commit and writer.committed(shard)

    try:
        with (
            reporter.progress(f"dumping {writer.manifest.dump}", total, "positions") as advance,
            ThreadPoolExecutor(1, "reader") as executor,
            ExitStack() as stack,
        ):
            meter = _Meter(advance, publisher)
            shards = _read_ahead(executor, reader, pending, committed_already)
            asked = BatchAsker(config, teacher, parameters, shards).shards()
            for shard, batches in stack.enter_context(closing(asked)):

                def look(number: int = shard.shard) -> None:
                    publisher.check()
                    if time.monotonic() - looked[number] >= LOOK_EVERY and committed_already(number):
                        raise _Overtaken

                with suppress(_Overtaken):
                    look()
                    publisher.hand_over(shard, _take(config, shard, batches, parameters, meter, look))
            publisher.close()
            meter.show()
        publisher.check()
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):  # pressed again
            publisher.close()
        reporter.note(
            f"Stopped: {publisher.committed.shards} shards were committed by this run. The same command resumes the dump."
        )
        publisher.check()
        raise
    finally:
        publisher.close()
    return publisher.committed


class _Meter:
    """Feeds the progress: positions done, and the live figures behind it."""

    def __init__(self, advance: Advance, publisher: ShardPublisher):
        self._advance, self._publisher = advance, publisher
        self._started = time.monotonic()
        self._positions = 0
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def batch(self, knowledge: Knowledge, positions: int) -> None:
        """Count a batch, and show the figures with it."""
        self._positions += positions
        for kind, extracted in knowledge.items():
            for name, figure in EXTRACTORS[kind].figures.items():
                total, count = figure(extracted)
                self._sums[name] += total  # type: ignore[assignment]
                self._counts[name] += count
        self.show(positions)

    def show(self, positions: int = 0) -> None:
        """Show the figures, after so many positions more."""
        figures = {"positions/s": f"{self._positions / (time.monotonic() - self._started):,.0f}"}
        committed = self._publisher.committed
        if committed.positions:
            figures["bytes/position"] = f"{committed.bytes / committed.positions:.1f}"
        figures |= {name: f"{self._sums[name] / count:.3f}" for name, count in self._counts.items() if count}
        self._advance(positions, **figures)


def _read_ahead(
    executor: ThreadPoolExecutor, reader: ShardReader, shards: Iterable[int], committed: Callable[[int], bool]
) -> Iterator[ShardInput]:
    """The input of each shard that is not committed when its turn comes, the next one being read while this one is used."""
    missing = (shard for shard in shards if not committed(shard))

    def begin() -> Future[ShardInput] | None:
        return None if (shard := next(missing, None)) is None else executor.submit(reader.read, shard)

    following = begin()
    while following is not None:
        ready, following = following.result(), begin()
        yield ready


def _take(
    config: DumpConfig,
    shard: ShardInput,
    batches: Iterator[AskedBatch],
    parameters: dict[str, Parameters],
    meter: _Meter,
    after_batch: Callable[[], None],
) -> Knowledge:
    """The teacher's knowledge of every sequence of a shard, in the shard's order, for each kind.

    `after_batch` is called after each batch: what the writer met ends the dump there, not when the shard is done.
    """
    knowledge: dict[str, list[Any]] = {kind: [None] * len(shard.sequences) for kind in parameters}
    for asked in batches:
        batch = extract_batch(config, parameters, asked.prediction, asked.sequences)
        for kind, extracted in batch.items():
            for index, arrays in zip(asked.indices, extracted, strict=True):
                knowledge[kind][index] = arrays
        meter.batch(batch, sum(len(sequence.token_ids) for sequence in asked.sequences))
        after_batch()
    return knowledge


def shard_of(manifest: Manifest, shard: ShardInput, knowledge: Knowledge, made_by: dict[str, Any]) -> Shard:
    """What the writer takes of a shard: its sequences, and for each kind what was taken of each of them."""
    names = [file["name"] for file in manifest.corpus["files"]]
    rows = []
    stored = stored_columns(manifest.derived["columns"], manifest.has_groups)
    for sequence in shard.sequences:
        document = sequence.document
        row_columns = {stored[name]: value for name, value in corpus_columns(manifest, sequence).items()}
        rows.append(
            {
                "sequence_id": sequence_id(document.number, sequence.window),
                "document": document.number,
                "file": names[document.file],
                "row": document.row,
                "part": document.part,
                "window": sequence.window,
                "length": len(sequence.token_ids),
                "targets": int(sequence.is_target.sum()),
                "truncated": sequence.truncated,
                "token_hash": token_hash(sequence.token_ids),
                **({SCORE: sequence.score} if manifest.has_groups else {}),
                **row_columns,
            }
        )
    return Shard(shard.shard, shard.first_document, shard.documents, rows, knowledge, shard.skipped, made_by)


def _made_by(teacher: Teacher) -> dict[str, Any]:
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        **versions,
        "device": teacher.device_name,
        "host": platform.node(),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
