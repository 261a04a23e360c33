"""`repair`: what is damaged of a dump is made again by the teacher that made it, and what is sound stays as it is."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from knowledge_store.errors import DamageError, InputError, MismatchError, MissingFileError
from knowledge_store.format.commits import commit_records
from knowledge_store.format.layout import STORE_FILE, manifest_file, tokens_file
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import Storage, open_storage
from knowledge_store.writing.repair import (
    damaged_files,
    repair_manifest,
    repair_shard,
    repair_store_file,
    repair_tokens,
    tokens_damage,
)
from knowledge_store.writing.writer import DumpWriter
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.dumping.inspection import corpus_tokenizer, inspect_before_loading
from teacher_dump.dumping.mismatch import check_same
from teacher_dump.dumping.preconditions import as_made, check_before_loading, check_request
from teacher_dump.dumping.report import DumpReport
from teacher_dump.dumping.request import chat_asked, fitted
from teacher_dump.dumping.worker_shards import worker_shards

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher


def repair(
    config: DumpConfig, rank: int = 0, world_size: int = 1, teacher: Teacher | None = None, *, reporter: Reporter = SILENT
) -> DumpReport:
    """Make the damaged shards of one rank again, and the store's, the dump's and the vocabulary's files where they are damaged.

    Shards that are not committed are not damaged: `dump` makes those. Where nothing is damaged, no teacher is loaded.

    Args:
        config: what the dump was made with.
        rank, world_size: this worker's number among all.
        teacher: already loaded as `config` says; loaded here when None and needed.
        reporter: hears of progress, and of what is damaged and what was made again.

    Raises:
        InputError: something given cannot be used, there is no such dump, or its storage replaces no files (a bucket).
        MismatchError: the dump of that name was made from something else.
        DamageError: its folder of commit records is not a folder.
        StoreError: the store cannot be written, or something of the dump has a newer format version.
        KeyboardInterrupt: Ctrl-C; shards that had been handed to the writer are repaired first.
    """
    storage = open_storage(config.store)
    storage.replace([])  # refused here, and not after an hour, where nothing is replaced
    config = with_local_corpus(config, reporter=reporter)
    check_request(config, storage, rank, world_size)
    existing = manifest_to_repair(storage, config.dump_name, reporter)
    config = fitted(as_made(config, existing), teacher, existing, reporter=reporter)
    if repair_store_file(storage):
        reporter.note(f"Repaired: {storage.locate(STORE_FILE)} was damaged, and is written again")
    pending: list[int] = []
    if existing is not None:
        writer = DumpWriter(storage, existing)
        pending = damaged_shards(writer, worker_shards(existing, rank, world_size), reporter)
        if not pending and not tokens_damage(writer):
            shards = worker_shards(existing, rank, world_size)
            return DumpReport(existing.dump, 0, len(shards), existing.shard_count)
    loading = check_before_loading(config, storage, existing, teacher, reporter)
    chat = chat_asked(config, existing)
    derived = inspect_before_loading(config, existing, teacher, chat, reporter=reporter)

    # Torch takes seconds to import: mistakes that were found above, and sound dumps, do not wait for it.
    from teacher_dump.dumping.batches import find_batching
    from teacher_dump.dumping.plan import ShardReader, make_manifest
    from teacher_dump.dumping.teacher_pass import dump_shards
    from teacher_dump.extraction import check_needs
    from teacher_dump.teachers.opening import open_teacher

    teacher = teacher or open_teacher(config, loading, config.max_length, reporter=reporter)
    check_needs(config.kinds, teacher)
    config = fitted(config, teacher, existing, reporter=reporter)
    if existing is not None:
        teacher.recognise(existing.teacher)
    find_batching(config, teacher, config.max_length, reporter)
    planned = make_manifest(config, teacher, chat, derived, reporter=reporter)
    if existing is not None:
        check_same(storage, existing, planned)
    reader = ShardReader(config, planned, corpus_tokenizer(config, teacher.tokenizer, chat))
    tokens = tokens_table(*teacher.tokens())
    made_again = existing is None and _repair_manifest(storage, planned)
    writer = DumpWriter.open(storage, planned, tokens)
    if repair_tokens(writer, tokens):
        reporter.note(f"Repaired: {storage.locate(tokens_file(config.dump_name))} was damaged, and is written again")
    shards = worker_shards(writer.manifest, rank, world_size)
    if made_again:
        reporter.note(f"Repaired: {storage.locate(manifest_file(config.dump_name))} was damaged, and is written again")
        pending = damaged_shards(writer, shards, reporter)
    started = time.monotonic()
    repaired = dump_shards(config, teacher, reader, writer, pending, partial(repair_shard, writer), reporter)
    return DumpReport(
        dump=writer.manifest.dump,
        shards=repaired.shards,
        shards_existing=len(shards) - len(pending),
        shards_planned=writer.manifest.shard_count,
        positions=repaired.positions,
        seconds=time.monotonic() - started,
    )


def manifest_to_repair(storage: Storage, dump: str, reporter: Reporter) -> Manifest | None:
    """The manifest of the dump to repair; None where it is damaged itself, and has to be made again first.

    Raises:
        InputError: there is no dump of that name.
        DamageError: its `commits` is not a folder.
    """
    try:
        return read_manifest(storage, dump)
    except DamageError as error:
        if isinstance(error, MissingFileError) and not commit_records(storage, dump):
            raise InputError(f"there is no dump {dump!r} in {storage.address} to repair") from None
        reporter.note(f"Damage: {error}")
        return None


def _repair_manifest(storage: Storage, planned: Manifest) -> bool:
    """`repair_manifest`, which says where it fails for a date that the damaged manifest alone knew."""
    try:
        return repair_manifest(storage, planned)
    except MismatchError as error:
        if "date" not in planned.plan["chat"]:
            raise
        raise MismatchError(
            f"{error}. The chat template asks for the date ({planned.plan['chat']['date']} here): pass the day of the dump"
            "'s beginning as --template-date"
        ) from None


def damaged_shards(writer: DumpWriter, shards: range, reporter: Reporter) -> list[int]:
    """Those of some shards that are committed and damaged; says what is damaged of each."""
    damaged = []
    with reporter.progress(f"checking {writer.manifest.dump}", len(shards), "shards") as advance:
        for shard in shards:
            sentences = damaged_files(writer, shard)
            for sentence in sentences:
                reporter.note(f"Damage: {sentence}")
            if sentences:
                damaged.append(shard)
            advance(1)
    return damaged
