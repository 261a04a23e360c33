"""`import_dump`: files of another program become a dump, shard by shard; whatever stops it, the same command resumes it."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from knowledge_store.errors import InputError, MismatchError
from knowledge_store.format.layout import STORE_FILE, manifest_file, tokens_file
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.sequences import sequence_id, token_hash, tokens_table
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions.kind import positions_of
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import open_storage
from knowledge_store.writing.repair import repair_manifest, repair_shard, repair_store_file, repair_tokens
from knowledge_store.writing.writer import DumpWriter, Shard
from teacher_dump.corpus.rows import Start
from teacher_dump.corpus.sources import corpus_record
from teacher_dump.dumping.repair import damaged_shards, manifest_to_repair
from teacher_dump.dumping.report import DumpReport
from teacher_dump.dumping.worker_shards import remaining_shards
from teacher_dump.importers.axolotl import Axolotl
from teacher_dump.importers.configuration import PREDICTS, ImportConfig
from teacher_dump.importers.distillkit import DistillKit
from teacher_dump.importers.knowledge import arrays_of, candidates_of
from teacher_dump.importers.layout import BadLayout, Layout, LayoutRow
from teacher_dump.importers.megatron import Megatron
from teacher_dump.importers.nemo import NemoAligner
from teacher_dump.importers.plain import Plain
from teacher_dump.importers.scan import Scan, file_rows, notes, scan
from teacher_dump.importers.vllm import Vllm

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher

LAYOUTS: dict[str, type[Layout]] = {
    "plain": Plain,
    "distillkit": DistillKit,
    "vllm": Vllm,
    "axolotl": Axolotl,
    "nemo-aligner": NemoAligner,
    "megatron": Megatron,
}
LONGEST_ASKED = 512


def import_dump(config: ImportConfig, teacher: Teacher | None = None, *, reporter: Reporter = SILENT) -> DumpReport:
    """Take files of another program into a store, as a dump of the kind `positions`.

    All files are read once before anything is written, and again for what is not committed yet, or is to be repaired.

    Args:
        config: which files, of which layout.
        teacher: already loaded as `config` says, where it names one; loaded here when None.
        reporter: hears of progress, and of what the files do not hold.

    Raises:
        InputError: a file is not of its layout, or its predictions stand beside other tokens than they are of, or something
            else that is given cannot be used, or there is nothing to repair. Nothing is written.
        MismatchError: the dump of that name was made from something else.
        StoreError: the store cannot be written.
        KeyboardInterrupt: Ctrl-C; shards that were committed stay.
    """
    from teacher_dump.corpus.tokenisation import describe_tokenizer  # transformers takes seconds to import
    from teacher_dump.teachers.tokenizer import load_tokenizer, token_texts

    layout = LAYOUTS[config.format](config)
    storage = open_storage(config.store)
    storage.probe()  # refused here, and not after an hour, where nothing is written
    tokenizer = load_tokenizer(config.tokenizer)
    if config.teacher and teacher is None:
        from teacher_dump.teachers import opening

        opening.check_files(config)
        teacher = opening.open_teacher(config, config.loading, LONGEST_ASKED, reporter=reporter)
    vocabulary = config.vocabulary_size or (
        _vocabulary(config, layout, max(tokenizer.get_vocab().values()) + 1) if teacher is None else teacher.vocabulary_size
    )
    if teacher is not None and vocabulary != teacher.vocabulary_size:
        raise InputError(f"--vocabulary-size is {vocabulary:,}, and the teacher's head has {teacher.vocabulary_size:,} rows")
    found = scan(config, layout, vocabulary, reporter)
    if teacher is not None:
        from teacher_dump.importers.asking import ask_again

        ask_again(config, teacher, found.sample, reporter)
    for sentence in notes(found):
        reporter.note(sentence)
    if config.repair:
        storage.replace([])  # refused here where nothing is replaced
        manifest_to_repair(storage, config.dump_name, reporter)
    manifest = Manifest(
        dump=config.dump_name,
        kinds={"positions": found.parameters(layout).to_record()},
        teacher=_unknown_teacher(config, vocabulary) if teacher is None else teacher.description,
        tokenizer=describe_tokenizer(tokenizer),
        corpus={"files": corpus_record(config.files, reporter=reporter)},
        plan={
            "max_length": found.longest,
            "shard_size": config.shard_size,
            "import": {"format": config.format, "row_predicts": PREDICTS[layout.shift], **layout.record()},
        },
        derived=found.derived(),
    )
    tokens = tokens_table(*token_texts(tokenizer, vocabulary))
    if config.repair:
        for damaged, name in (
            (repair_store_file(storage), STORE_FILE),
            (repair_manifest(storage, manifest), manifest_file(manifest.dump)),
        ):
            if damaged:
                reporter.note(f"Repaired: {storage.locate(name)} was damaged, and is written again")
    writer = DumpWriter.open(storage, manifest, tokens)
    if not config.repair:
        pending = remaining_shards(writer, 0, 1)
        report = _write(config, layout, writer, pending, writer.commit, found, vocabulary, reporter)
        writer.finish()
        return report
    if repair_tokens(writer, tokens):
        reporter.note(f"Repaired: {storage.locate(tokens_file(manifest.dump))} was damaged, and is written again")
    pending = damaged_shards(writer, range(writer.manifest.shard_count), reporter)
    return _write(config, layout, writer, pending, partial(repair_shard, writer), found, vocabulary, reporter)


def _vocabulary(config: ImportConfig, layout: Layout, known: int) -> int:
    """The vocabulary's size where only the files and the tokenizer, which knows so many tokens, can say it."""
    size = layout.vocabulary_size
    if size is not None and size < known:
        raise InputError(
            f"the files are of a vocabulary of {size:,}, and {config.tokenizer} knows {known:,} tokens: give the teacher's own"
            f" --tokenizer, or --vocabulary-size {size} if it is"
        )
    return size or known


def _unknown_teacher(config: ImportConfig, vocabulary: int) -> dict[str, Any]:
    """What a manifest says of a teacher that nobody named."""
    return {"name": f"unknown, with the tokenizer of {config.tokenizer}", "vocabulary_size": vocabulary}


def _write(
    config: ImportConfig,
    layout: Layout,
    writer: DumpWriter,
    pending: list[int],
    commit: Callable[[Shard], object],
    found: Scan,
    vocabulary: int,
    reporter: Reporter,
) -> DumpReport:
    """Make some shards of a dump, and commit each."""
    manifest, started = writer.manifest, time.monotonic()
    made_by = {
        "python": platform.python_version(),
        **{package: version(package) for package in ("knowledge-store", "pyarrow", "numpy")},
        "device": "none",
        "host": platform.node(),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    committed = positions = 0
    starts = [Start(**start) for start in manifest.derived["shards"]]
    total = sum(starts[shard].positions for shard in pending)
    try:
        with reporter.progress(f"importing {manifest.dump}", total, "positions") as advance:
            for shard, rows in _shard_rows(config, layout, starts, pending, manifest.derived["documents"]):
                made = _shard(config, layout, manifest, starts, shard, rows, vocabulary, made_by, found.most_kept(layout))
                commit(made)
                committed, positions = committed + 1, positions + starts[shard].positions
                advance(starts[shard].positions)
    except KeyboardInterrupt:
        reporter.note(f"Stopped: {committed} shards were committed by this run. The same command resumes it.")
        raise
    return DumpReport(
        dump=manifest.dump,
        shards=committed,
        shards_existing=manifest.shard_count - len(pending),
        shards_planned=manifest.shard_count,
        positions=positions,
        seconds=time.monotonic() - started,
        counts=manifest.counts,
        max_length=manifest.plan["max_length"],
    )


def _shard_rows(
    config: ImportConfig, layout: Layout, starts: list[Start], pending: list[int], documents: int
) -> Iterator[tuple[int, list[tuple[int, LayoutRow]]]]:
    """The rows of each shard that is wanted. Those that follow each other are read in one go."""
    rows: Iterator[tuple[int, LayoutRow]] = iter(())
    following = -1
    for shard in pending:
        if shard != following:
            rows = file_rows(config, layout, starts[shard])
        end = starts[shard + 1].document if shard + 1 < len(starts) else documents
        taken = [row for _, row in zip(range(end - starts[shard].document), rows, strict=False)]
        yield shard, taken
        following = shard + 1


def _shard(
    config: ImportConfig,
    layout: Layout,
    manifest: Manifest,
    starts: list[Start],
    shard: int,
    rows: list[tuple[int, LayoutRow]],
    vocabulary: int,
    made_by: dict[str, Any],
    most: int,
) -> Shard:
    """What the writer takes of a shard.

    Raises:
        MismatchError: it has not as many tokens as when the files were looked through.
    """
    names = [file["name"] for file in manifest.corpus["files"]]
    first, sequences, knowledge = starts[shard].document, [], []
    unknown = positions_of(manifest).unknown_tokens
    for document, (file, row) in enumerate(rows, first):
        for window, predictions in enumerate(row.sequences):
            try:
                candidates = candidates_of(predictions, vocabulary, layout.slack)
                if not len(candidates.places):
                    continue
                arrays: Arrays = arrays_of(predictions, candidates, most, vocabulary)
            except BadLayout as error:
                raise InputError(f"{config.files[file]}, row {row.number}: {error}") from None
            knowledge.append(arrays)
            sequences.append(
                {
                    "sequence_id": sequence_id(document, window),
                    "document": document,
                    "file": names[file],
                    "row": row.number,
                    "part": 0,
                    "window": window,
                    "length": len(predictions.token_ids),
                    "targets": int(arrays["is_target"].sum()),
                    "truncated": False,
                    "token_hash": token_hash(predictions.token_ids),
                }
            )
    positions = sum(row["length"] for row in sequences)
    if positions != starts[shard].positions or (not unknown and any(_unknown(arrays) for arrays in knowledge)):
        raise MismatchError(
            f"shard {shard} has {positions:,} tokens, and had {starts[shard].positions:,} when the files were looked through:"
            " they were changed meanwhile; import them anew"
        )
    return Shard(shard, first, len(rows), sequences, {"positions": knowledge}, [], made_by)


def _unknown(arrays: Arrays) -> bool:
    return bool((arrays["token_logprob"] != arrays["token_logprob"]).any())
