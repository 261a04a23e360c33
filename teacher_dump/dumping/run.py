"""One teacher's pass over one corpus.

The next shard is read and tokenised, and the last one compressed, hashed and written, each on a thread of its own, while the
teacher works on this one. A shard is all or nothing: whatever stops a dump, the same command goes on where it stopped.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from knowledge_store.calibration.file import read_calibration
from knowledge_store.errors import DamageError, InputError, MissingFileError
from knowledge_store.format.commits import CommitRecord, commit_records
from knowledge_store.format.layout import STORE_FILE, commit_file, manifest_file, tokens_file
from knowledge_store.format.manifest import Manifest, check_version, read_manifest
from knowledge_store.format.records import read_record
from knowledge_store.format.sequences import corpus_column, sequence_id, token_hash, tokens_table
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import positions_of
from knowledge_store.reporter import Advance
from knowledge_store.storage import Storage, open_storage
from knowledge_store.store import check_store, occupied
from knowledge_store.terminal.console import note
from knowledge_store.terminal.progress import progress_bar
from knowledge_store.writing.writer import DumpWriter, Shard, repair_manifest, repair_store_file
from teacher_dump.corpus.documents import check_files
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence
from teacher_dump.dumping.configuration import DumpConfig
from teacher_dump.dumping.plan import ShardInput, ShardReader, corpus_columns, length_batches, make_manifest
from teacher_dump.extraction.positions import EXTRACTORS, ExtractionBatch
from teacher_dump.teachers.local import Prediction, Teacher, load_teacher

RECORDED_PACKAGES = ("knowledge-store", "torch", "transformers", "tokenizers", "pyarrow", "numpy")


@dataclass(frozen=True)
class DumpReport:
    """What one call of `dump` did.

    Attributes:
        dump: its name.
        shards: committed by this call; shards_planned: in the whole dump.
        shards_standing: of this rank's, committed before.
        positions, seconds: of this call.
        skipped_rows: rows of this call's shards that were left out.
    """

    dump: str
    shards: int
    shards_standing: int
    shards_planned: int
    positions: int
    seconds: float
    skipped_rows: int


def dump(
    config: DumpConfig, rank: int = 0, world_size: int = 1, teacher: Teacher | None = None, repair: bool = False
) -> DumpReport:
    """Dump the shards of one rank that are not committed yet: shards rank, rank + world_size, …

    Any rank and world size may be used at any time, also other ones than before: what a shard contains does not depend on them.

    Args:
        config: what to dump.
        rank, world_size: this worker's number among all.
        teacher: already loaded as `config` says; loaded here when None.
        repair: dump instead the shards of this rank that are committed and damaged, and put tokens.parquet and store.json in
            order.

    Raises:
        InputError: something given cannot be used.
        MismatchError: the dump of that name was made from something else.
        DamageError: a file that an unfinished run left cannot be used.
        StoreError: the store cannot be written, or something of the dump has a newer format version.
        KeyboardInterrupt: Ctrl-C; the shard that was being published is published first.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank} is not one of --world-size {world_size}: ranks count from 0")
    for kind in config.kinds:
        if kind not in EXTRACTORS:
            raise InputError(f"no extractor is known for knowledge of kind {kind!r}")
    # What can be seen at once is seen before a large teacher is loaded.
    check_files(config.corpus)
    storage = open_storage(config.store)
    _check_versions(storage, config.dump_name)
    pending: list[int] = []
    standing: Manifest | None = None
    if repair:
        standing = _manifest_to_repair(storage, config.dump_name)
        if repair_store_file(storage):
            note(f"{storage.locate(STORE_FILE)} was damaged, and is written anew")
        if standing is not None:
            writer = DumpWriter(storage, standing)
            pending = _damaged(writer, range(rank, standing.shard_count, world_size))
            if not pending and not writer.tokens_damage():
                return DumpReport(standing.dump, 0, 0, standing.shard_count, 0, 0.0, 0)  # no teacher is asked for nothing
    if occupied(storage):  # else it can become a store; one that another worker is just making counts
        check_store(storage)
    if config.calibration is not None:
        read_calibration(config.calibration).to_manifest()
    teacher = teacher or load_teacher(config.teacher, config.gguf_file, config.dtype, config.device)
    tokenizer = CorpusTokenizer(teacher.tokenizer, config.max_length)
    planned = make_manifest(config, teacher, anew=repair and standing is None)
    reader, first = ShardReader(config, planned, tokenizer), None
    begun = planned.dump in storage.folders("")
    if rank < len(planned.derived.get("shards", ())) and not begun:
        first = reader.read(rank)  # most of what a corpus can have wrong shows here, before anything is made
    tokens = tokens_table(*teacher.tokens())
    remade = repair and standing is None and repair_manifest(storage, planned)
    writer = DumpWriter.open(storage, planned, tokens)
    if repair and writer.repair_tokens(tokens):
        note(f"{storage.locate(tokens_file(planned.dump))} was damaged, and is written anew")
    manifest = writer.manifest
    mine = range(rank, manifest.shard_count, world_size)
    if remade:
        note(f"{storage.locate(manifest_file(planned.dump))} was damaged, and is written anew")
        pending = _damaged(writer, mine)
    if not repair:
        pending = [shard for shard in mine if not writer.committed(shard)]
    started = time.monotonic()
    total = sum(manifest.derived["shards"][shard]["characters"] for shard in pending)
    tally = _Tally()
    with progress_bar(f"dumping {manifest.dump}", total) as advance:
        _dump_shards(config, teacher, reader, first, writer, pending, repair, _Meter(advance, tally), tally)
    return DumpReport(
        dump=manifest.dump,
        shards=tally.shards,
        shards_standing=len(mine) - len(pending),
        shards_planned=manifest.shard_count,
        positions=tally.committed_positions,
        seconds=time.monotonic() - started,
        skipped_rows=tally.skipped_rows,
    )


def _check_versions(storage: Storage, dump: str) -> None:
    """Make sure that a dump can be gone on with here: which shards are there is told by the names of their records alone, and a
    newer knowledge-store may have written one. Each record is read, which takes 0.2 ms.

    Raises:
        NewerVersionError: the manifest or a commit record has a newer format version.
        DamageError: its `commits` is not a folder.
        StoreError: one cannot be read.
    """
    for name in (manifest_file(dump), *(commit_file(dump, shard) for shard in commit_records(storage, dump))):
        with suppress(DamageError):  # missing, or for --repair
            check_version(read_record(storage, name), storage.locate(name))


def _manifest_to_repair(storage: Storage, dump: str) -> Manifest | None:
    """The manifest of the dump to repair; None where it is damaged itself, and has to be made again first.

    Raises:
        InputError: there is no dump of that name.
        DamageError: its `commits` is not a folder.
    """
    try:
        return read_manifest(storage, dump)
    except MissingFileError as error:
        if not commit_records(storage, dump):
            raise InputError(f"there is no dump {dump!r} in {storage.address} to repair") from None
        note(f"Damage: {error}")
        return None
    except DamageError as error:
        note(f"Damage: {error}")
        return None


def _damaged(writer: DumpWriter, shards: range) -> list[int]:
    """Those of some shards that are committed and damaged; says what is damaged of each."""
    found = []
    with progress_bar(f"checking {writer.manifest.dump}", len(shards), "shards") as advance:
        for shard in shards:
            damage = writer.damaged(shard)
            for sentence in damage:
                note(f"Damage: {sentence}")
            if damage:
                found.append(shard)
            advance(1)
    return found


@dataclass
class _Tally:
    """What has been done so far by this call."""

    shards: int = 0
    committed_positions: int = 0
    committed_bytes: int = 0
    skipped_rows: int = 0
    positions: int = 0
    predictions: int = 0
    mass: float = 0.0

    def committed(self, record: CommitRecord, positions: int) -> None:
        self.shards += 1
        self.committed_positions += positions
        self.committed_bytes += sum(file.bytes for file in record.files.values())
        self.skipped_rows += len(record.skipped)


class _Meter:
    """Feeds the progress bar: characters done, and the live figures behind it."""

    def __init__(self, advance: Advance, tally: _Tally):
        self._advance, self._tally = advance, tally
        self._started = time.monotonic()

    def batch(self, characters: float, knowledge: list[Arrays], positions: int) -> None:
        tally = self._tally
        tally.positions += positions
        for arrays in knowledge:
            kept = arrays["has_knowledge"]
            tally.predictions += int(kept.sum())
            tally.mass += float(np.exp(arrays["candidate_logprobs"][kept].astype(np.float64)).sum())
        self.show(characters)

    def show(self, characters: float = 0) -> None:
        """Show the figures as they stand, after `characters` more."""
        tally = self._tally
        figures = {"positions/s": f"{tally.positions / (time.monotonic() - self._started):,.0f}"}
        if tally.committed_positions:
            figures["bytes/position"] = f"{tally.committed_bytes / tally.committed_positions:.1f}"
        if tally.predictions:
            figures["candidates' mass"] = f"{tally.mass / tally.predictions:.3f}"
        self._advance(characters, **figures)


def _dump_shards(
    config: DumpConfig,
    teacher: Teacher,
    reader: ShardReader,
    first: ShardInput | None,
    writer: DumpWriter,
    pending: list[int],
    repair: bool,
    meter: _Meter,
    tally: _Tally,
) -> None:
    made_by, temperature = _made_by(teacher), positions_of(writer.manifest).temperature
    publishing: tuple[Future[CommitRecord], int] | None = None

    def settle() -> None:
        nonlocal publishing
        if publishing is not None:
            future, positions = publishing
            record = future.result()  # Ctrl-C while it waits here: it is settled again
            publishing = None
            tally.committed(record, positions)
            meter.show()

    def settle_if_done() -> None:
        if publishing is not None and publishing[0].done():
            settle()

    with ThreadPoolExecutor(1, "reader") as executor, ThreadPoolExecutor(1, "writer") as publisher:
        try:
            for shard in _read_ahead(executor, reader, pending, first):
                if not repair and writer.committed(shard.shard):
                    continue  # another worker was quicker
                knowledge = _ask(config, teacher, shard, temperature, meter, settle_if_done)
                settle()
                future = publisher.submit(publish_shard, writer, shard, knowledge, made_by, repair)
                publishing = future, shard.positions
            settle()
        except KeyboardInterrupt:
            settle()
            note(f"Stopped: {tally.shards} shards were committed by this run. The same command goes on from there.")
            raise


def _read_ahead(
    executor: ThreadPoolExecutor, reader: ShardReader, shards: list[int], first: ShardInput | None
) -> Iterator[ShardInput]:
    """The input of each shard, the next one being read while this one is used; `first` is one that has been read."""
    following: Future[ShardInput] | None = None
    for index, shard in enumerate(shards):
        if first is not None and first.shard == shard:
            ready, first = first, None
        else:
            ready = (following or executor.submit(reader.read, shard)).result()
        following = executor.submit(reader.read, shards[index + 1]) if index + 1 < len(shards) else None
        yield ready


def _ask(
    config: DumpConfig,
    teacher: Teacher,
    shard: ShardInput,
    temperature: float | None,
    meter: _Meter,
    after_batch: Callable[[], None],
) -> dict[str, list[Arrays]]:
    """The teacher's knowledge of every sequence of a shard, in the shard's order, for each kind.

    `after_batch` is called after each batch: what the writer met ends the dump there, not when the shard is done.
    """
    lengths = [len(sequence.token_ids) for sequence in shard.sequences]
    knowledge: dict[str, list[Any]] = {kind: [None] * len(lengths) for kind in config.kinds}
    for indices in length_batches(lengths, config.batch_size * config.max_length):
        sequences = [shard.sequences[index] for index in indices]
        batch = extract_batch(config, predict_batch(config, teacher, sequences), sequences, temperature)
        for kind, extracted in batch.items():
            for index, arrays in zip(indices, extracted, strict=True):
                knowledge[kind][index] = arrays
        positions = sum(len(sequence.token_ids) for sequence in sequences)
        meter.batch(shard.characters * positions / shard.positions, batch.get("positions", []), positions)
        after_batch()
    return knowledge


def predict_batch(config: DumpConfig, teacher: Teacher, sequences: list[TokenSequence]) -> Prediction:
    """Run the teacher on some sequences as one batch, padded on the right."""
    for sequence in sequences:
        if sequence.token_ids.max() >= teacher.vocabulary_size:
            raise InputError(
                f"the teacher's tokenizer gives token {sequence.token_ids.max()} (row {sequence.document.row} of corpus file"
                f" {sequence.document.file + 1}), and its model knows {teacher.vocabulary_size}: they do not belong together"
            )
    with _enough_memory(config, sequences):
        return teacher.predict(*batch_arrays(sequences))


def batch_arrays(sequences: list[TokenSequence]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 (B, T), padded on the right, and which of them are tokens, bool (B, T)."""
    longest = max(len(sequence.token_ids) for sequence in sequences)
    token_ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros((len(sequences), longest), bool)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence.token_ids)] = sequence.token_ids
        mask[row, : len(sequence.token_ids)] = True
    return token_ids, mask


def extract_batch(
    config: DumpConfig, prediction: Prediction, sequences: list[TokenSequence], temperature: float | None
) -> dict[str, list[Arrays]]:
    """Take each kind of knowledge from the teacher's prediction for a batch."""
    batch = ExtractionBatch(sequences, prediction, config.rule, config.keep_context, temperature)
    with _enough_memory(config, sequences):
        return {kind: EXTRACTORS[kind](batch) for kind in config.kinds}


@contextmanager
def _enough_memory(config: DumpConfig, sequences: list[TokenSequence]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        longest = max(len(sequence.token_ids) for sequence in sequences)
        raise InputError(
            f"the teacher ran out of memory on {len(sequences)} sequences of {longest} tokens:"
            f" give a smaller --batch-size (now {config.batch_size})"
        ) from None


def publish_shard(
    writer: DumpWriter,
    shard: ShardInput,
    knowledge: dict[str, list[Arrays]],
    made_by: dict[str, Any],
    repair: bool = False,
) -> CommitRecord:
    """Commit or repair a shard: its sequences, and for each kind what was taken of each of them, in order (see
    `DumpWriter.commit`)."""
    names = [file["name"] for file in writer.manifest.corpus["files"]]
    rows = []
    for sequence in shard.sequences:
        document = sequence.document
        own = {corpus_column(name): value for name, value in corpus_columns(writer.manifest, sequence).items()}
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
                **own,
            }
        )
    arrays = {kind: joined(each) for kind, each in knowledge.items()}
    publish = writer.repair if repair else writer.commit
    return publish(Shard(shard.shard, shard.first_document, shard.documents, rows, arrays, shard.skipped, made_by))


def joined(knowledge: list[Arrays]) -> Arrays:
    """The arrays of several sequences, one after the other; of one entry each for a kind per sequence."""
    if not knowledge:
        return {}
    return {name: np.concatenate([arrays[name] for arrays in knowledge]) for name in knowledge[0]}


def _made_by(teacher: Teacher) -> dict[str, Any]:
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cuda = teacher.device.type == "cuda"
    return {
        "python": platform.python_version(),
        **versions,
        "device": torch.cuda.get_device_name(teacher.device) if cuda else teacher.device.type,
        "host": platform.node(),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
