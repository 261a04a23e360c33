"""`dump`: one teacher's pass over one corpus. A shard is all or nothing: whatever stops a dump, the same command resumes it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from knowledge_store.format.sequences import tokens_table
from knowledge_store.quantities import counted
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import open_storage
from knowledge_store.writing.writer import DumpWriter
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.dumping.inspection import corpus_tokenizer, inspect_before_loading
from teacher_dump.dumping.mismatch import check_alike, check_same
from teacher_dump.dumping.preconditions import as_made, check_before_loading, check_request, existing_manifest
from teacher_dump.dumping.report import DumpReport
from teacher_dump.dumping.request import chat_asked, check_size, fitted
from teacher_dump.dumping.shared_scan import Sharing
from teacher_dump.dumping.worker_shards import remaining_shards, shards_of_others, worker_shards
from teacher_dump.fingerprints import check_unchanged, file_stamps
from teacher_dump.teachers.files import stated_sizes

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher


def dump(
    config: DumpConfig, rank: int = 0, world_size: int = 1, teacher: Teacher | None = None, *, reporter: Reporter = SILENT
) -> DumpReport:
    """Dump the shards of one rank that are not committed yet: shards rank, rank + world_size, …

    With `help_others` it goes on with what is missing of other ranks' shards, so that the dump is complete when it returns. Any
    rank and world size may be used at any time, also other ones than before: what a shard contains does not depend on them, nor
    on the batch size or the device.

    Args:
        config: what to dump.
        rank, world_size: this worker's number among all.
        teacher: already loaded as `config` says; loaded here when None.
        reporter: hears of progress and of what a person should know.

    Raises:
        InputError: something given cannot be used.
        MismatchError: the dump of that name was made from something else.
        DamageError: a file that an unfinished run left cannot be used.
        StoreError: the store cannot be written, or something of the dump has a newer format version.
        KeyboardInterrupt: Ctrl-C; shards that had been handed to the writer are committed first.
    """
    storage = open_storage(config.store)
    storage.probe()  # refused here, and not after an hour, where nothing is written
    config = with_local_corpus(config, reporter=reporter)
    check_request(config, storage, rank, world_size)
    existing = existing_manifest(storage, config.dump_name)
    config = fitted(as_made(config, existing), teacher, existing, reporter=reporter)
    loading = check_before_loading(config, storage, existing, teacher, reporter)
    chat = chat_asked(config, existing or config.like)
    stamps = file_stamps(config.corpus)
    sharing = Sharing(storage, rank, world_size)
    derived = inspect_before_loading(config, existing, teacher, chat, sharing, reporter=reporter)
    if existing is None:
        sizes = stated_sizes(config.teacher, config.gguf_file) if teacher is None else teacher.description
        check_size(config, sizes, derived)

    # Torch takes seconds to import, and mistakes that were found above must not wait for it.
    from teacher_dump.dumping.batches import find_batching
    from teacher_dump.dumping.plan import ShardReader, make_manifest
    from teacher_dump.dumping.publishing import Committed
    from teacher_dump.dumping.teacher_pass import dump_shards
    from teacher_dump.extraction import check_needs
    from teacher_dump.teachers.opening import open_teacher

    teacher = teacher or open_teacher(config, loading, config.max_length, reporter=reporter)
    check_needs(config.kinds, teacher)
    config = fitted(config, teacher, existing, reporter=reporter)
    if existing is None:
        check_size(config, teacher.description, derived)
    find_batching(config, teacher, config.max_length, reporter)  # a teacher that cannot be asked is refused here
    if existing is None and (existing := existing_manifest(storage, config.dump_name)) is not None:
        chat, derived = chat_asked(config, existing), existing.derived  # another worker has begun the dump, maybe yesterday
    if existing is not None:
        teacher.recognise(existing.teacher)
    planned = make_manifest(config, teacher, chat, derived, reporter=reporter)
    check_unchanged(config.corpus, stamps)  # else the hashes are of other rows than the plan
    if existing is not None:
        check_same(storage, existing, planned)
    elif config.like is not None:
        check_alike(storage, config.like, planned)
    writer = DumpWriter.open(storage, planned, tokens_table(*teacher.tokens()))
    pending = remaining_shards(writer, rank, world_size)
    reader = ShardReader(config, writer.manifest, corpus_tokenizer(config, teacher.tokenizer, chat))
    started = time.monotonic()
    committed = dump_shards(config, teacher, reader, writer, pending, writer.commit, reporter)
    helped = Committed()
    if config.help_others and (missing := shards_of_others(writer, rank, world_size)):
        reporter.note(f"The shards of rank {rank} are done, and it helps with {counted(len(missing), 'other', 'others')}")
        helped = dump_shards(config, teacher, reader, writer, missing, writer.commit, reporter)
        committed = committed.and_others(helped)
    return DumpReport(
        dump=writer.manifest.dump,
        shards=committed.shards,
        shards_of_others=helped.shards,
        shards_missing=writer.manifest.shard_count - len(writer.finish()),
        shards_existing=len(worker_shards(writer.manifest, rank, world_size)) - len(pending),
        shards_planned=writer.manifest.shard_count,
        positions=committed.positions,
        seconds=time.monotonic() - started,
        counts=writer.manifest.counts,
        max_length=config.max_length,
    )
