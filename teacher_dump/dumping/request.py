"""What a configuration asks for, checked before a teacher is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.kind import Parameters
from knowledge_store.quantities import byte_size
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.configuration import CorpusOptions, DumpConfig, EstimateConfig
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.documents import has_groups
from teacher_dump.extraction import EXTRACTORS, check_abilities
from teacher_dump.teachers.files import stated_sizes
from teacher_dump.teachers.loading import ENGINES
from teacher_dump.teachers.opening import check_files
from teacher_dump.teachers.protocol import Ability

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher


def parameters_asked(config: EstimateConfig, kind: str) -> Parameters:
    """The parameters of a kind that the options stand for, or those of the dump that this one is to be like.

    Raises:
        InputError: a file that an option names cannot be used. DamageError: it was altered.
    """
    if config.like is not None:
        return KINDS[kind].parameters.from_record(config.like.kinds[kind])
    parameters = EXTRACTORS[kind].parameters
    return KINDS[kind].parameters() if parameters is None else parameters(config.kind_options(kind))


C = TypeVar("C", bound=EstimateConfig)


def fitted(config: C, teacher: Teacher | None, existing: Manifest | None = None, *, reporter: Reporter = SILENT) -> C:
    """A configuration with the options of each kind as they are for what the teacher can give.

    Args:
        config: what is asked for.
        teacher: that is loaded; without one what its engine can give at most counts.
        existing: the manifest of a dump that is resumed or repaired.
        reporter: hears of what is left out.

    Raises:
        InputError: the teacher cannot give what is asked for.
    """
    abilities = teacher.abilities if teacher is not None else ENGINES[config.loading.engine].abilities
    if teacher is None:
        check_abilities(config.kinds, abilities, f"a teacher of {ENGINES[config.loading.engine].flag or config.loading.engine}")
    if config.like is not None:
        return config
    for kind in config.kinds:
        options, extractor = config.kind_options(kind), EXTRACTORS[kind]
        # An engine gives less at times than it could: what it gave decides.
        gave_less = existing is not None and kind in existing.kinds and _made_of_likeliest(options, existing, kind)
        if Ability.DISTRIBUTIONS in abilities and not gave_less:
            continue
        limited = extractor.of_likeliest(options)
        if limited != options:
            config = replace(config, **{field.name: getattr(limited, field.name) for field in fields(limited)})
            if existing is None:
                reporter.note(
                    "The teacher gives its likeliest tokens and no whole distributions: neither draws nor the entropy of tails"
                    " are kept, and a tail is what the candidates leave of one (tail: remainder)"
                )
    return config


def _made_of_likeliest(options: Any, existing: Manifest, kind: str) -> bool:
    """Whether a dump has of a kind what these options stand for, of a teacher without whole distributions."""
    extractor = EXTRACTORS[kind]
    try:
        limited = extractor.of_likeliest(options)
    except InputError:
        return False
    return extractor.parameters is not None and extractor.parameters(limited).to_record() == existing.kinds[kind]


def chat_asked(config: CorpusOptions, existing: Manifest | None = None) -> ChatOptions:
    """How conversations are rendered: as the options say, and what they do not say as the dump that exists was made, or else as
    a dump that begins today is.

    Raises:
        InputError: the file of the chat template cannot be used.
    """
    kept = {} if existing is None else existing.plan.get("chat", {})
    return ChatOptions.asked(config.chat_template, config.train_on, config.template_date, kept)


def corpus_groups(config: CorpusOptions) -> dict[str, Any]:
    """What `plan` of the manifest says of a corpus whose rows are groups of answers; nothing of another.

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    found = has_groups(config.corpus, config.part_characters, config.column_names)
    return {"groups": True} if found else {}


def plan_record(config: EstimateConfig, chat: dict[str, Any]) -> dict[str, Any]:
    """`plan` of the manifest, but for `groups`: how documents become sequences and shards; `chat` is how conversations do."""
    return {
        "max_length": config.max_length,
        "too_long": config.too_long,
        "shard_size": config.shard_size,
        "part_characters": config.part_characters,
        "chat": chat,
    }


def check_length(config: CorpusOptions, teacher: Mapping[str, Any]) -> None:
    """Make sure that sequences are no longer than a teacher knows positions, where its description says how many it knows.

    Raises:
        InputError: they may be longer.
    """
    positions = teacher.get("max_positions")
    if positions is not None and config.max_length > positions:
        raise InputError(
            f"--max-length {config.max_length} is above the {positions} positions the teacher knows: give {positions} or less"
        )


def check_size(config: DumpConfig, teacher: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Make sure that a dump takes no more bytes than is asked for, as far as its kinds know beforehand.

    Args:
        config: of the dump.
        teacher: what is known of it: its `hidden_size`.
        derived: of the manifest: what became of the corpus.

    Raises:
        InputError: it takes more.
    """
    counts = CorpusCounts.from_record(derived["counts"])
    for kind in config.kinds:
        size = EXTRACTORS[kind].bytes(parameters_asked(config, kind), teacher, counts)
        if size is not None and size > config.max_bytes:
            raise InputError(
                f"--kind {kind} would take {byte_size(size)} of {counts.positions:,} positions, and --max-bytes allows"
                f" {byte_size(config.max_bytes)}: keep less, or give --max-bytes {size}"
            )


def check_teacher(config: CorpusOptions) -> None:
    """Make sure, before it is loaded, that a teacher has the files it needs, and that the options fit what they say of it.

    Raises:
        InputError: it has not, or they do not.
    """
    check_files(config)
    sizes = stated_sizes(config.teacher, config.gguf_file)
    check_length(config, sizes)
    if isinstance(config, EstimateConfig) and config.like is None:
        for kind in config.kinds:
            EXTRACTORS[kind].check(config.kind_options(kind), sizes, None)
