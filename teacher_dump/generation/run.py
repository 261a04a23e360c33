"""`generate`: a teacher writes texts for prompts. A file is all or nothing: whatever stops it, the same command resumes.

What is drawn for a text is a function of the seed, the row and the sample, so a file that is written again has the same texts,
but for rounding: what was published first stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.format.records import seal
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage.local import LocalStorage
from knowledge_store.storage.protocol import contents
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.chat.rendering import Renderer
from teacher_dump.corpus.generated import CONTENTS, MANIFEST, VERSION, read_manifest
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.fingerprints import check_unchanged, file_stamps
from teacher_dump.generation.configuration import GenerateConfig
from teacher_dump.generation.plan import Plan, look_through
from teacher_dump.generation.report import GenerateReport
from teacher_dump.generation.settings import (
    as_begun,
    check_before_loading,
    check_same,
    existing_manifest,
    prompt_reader,
    settings_record,
    teacher_tokenizer,
    turn_end,
)
from teacher_dump.generation.template import PromptTemplate
from teacher_dump.teachers.protocol import Ability, TextRequest, Writing

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher


def generate(
    config: GenerateConfig, rank: int = 0, world_size: int = 1, teacher: Teacher | None = None, *, reporter: Reporter = SILENT
) -> GenerateReport:
    """Write the files of one rank that are not there yet: those with the numbers rank, rank + world_size, …

    Args:
        config: what to write.
        rank, world_size: this worker's number among all, which may be others at any time.
        teacher: already loaded as `config` says; loaded here when None.
        reporter: hears of progress and of what a person should know.

    Raises:
        InputError: something given cannot be used.
        MismatchError: the folder was begun with other settings.
        DamageError: a file of the folder is damaged.
        StoreError: the folder cannot be written.
        KeyboardInterrupt: Ctrl-C; what was published stays.
    """
    existing = existing_manifest(config.output)
    config = with_local_corpus(as_begun(config, existing), reporter=reporter)
    if teacher is None:
        check_before_loading(config)
    template = PromptTemplate(config.template) if config.template is not None else None
    stamps = file_stamps(config.corpus)
    tokenizer = teacher.tokenizer if teacher is not None else teacher_tokenizer(config)
    kept = {} if existing is None else existing["settings"].get("chat", {})
    chat = ChatOptions.asked(config.chat_template, None, config.template_date, kept)
    reader = prompt_reader(config, tokenizer, chat, template, teacher)
    dated = chat.record(Renderer(tokenizer, chat).asks_for_date())
    settings = settings_record(config, reader, dated, tokenizer, reporter)
    if existing is not None:
        check_same(config.output, existing["settings"], settings)
        plan = Plan.from_record(existing)
    else:
        plan = look_through(reader, config.shard_size, config.skip_bad_rows, reporter=reporter)

    # Torch takes seconds to import, and mistakes that were found above must not wait for it.
    from teacher_dump.generation.parts import Writer
    from teacher_dump.teachers.opening import open_teacher

    longest = plan.longest + config.max_new_tokens
    teacher = teacher or open_teacher(config, config.loading, longest, reporter=reporter)
    if Ability.TEXT not in teacher.abilities:
        raise InputError(f"the teacher {teacher.description['name']!r} does not write texts: use another one")
    # One that cannot is refused here, before anything is written.
    teacher.write([TextRequest(np.zeros(1, np.int64), 0)], Writing(0.0, 1, ()))
    check_unchanged(config.corpus, stamps)  # else the hashes are of other rows than the plan
    asked = {"teacher": teacher.description, "stop_tokens": sorted({*teacher.stop_tokens, *turn_end(reader)})}
    storage = LocalStorage(config.output)
    if existing is None:
        record = {"contents": CONTENTS, "version": VERSION, "settings": settings, **asked}
        storage.create(MANIFEST, contents(seal({**record, "prompts": plan.to_record(), "columns": plan.columns})))
        existing = read_manifest(config.output)  # another worker may have begun it meanwhile
        check_same(config.output, existing["settings"], settings)
    check_same(config.output, existing, asked)
    return Writer(config, existing, reader, teacher, storage).write(rank, world_size, reporter)
