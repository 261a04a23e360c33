"""What decides the texts of a folder: kept in its manifest, and held against what a command asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_store.errors import InputError, MismatchError, MissingFileError
from knowledge_store.reporter import Reporter
from knowledge_store.storage import open_storage
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.columns import Columns
from teacher_dump.corpus.documents import file_names
from teacher_dump.corpus.generated import MANIFEST, read_manifest
from teacher_dump.corpus.rows import BadRow
from teacher_dump.corpus.tokenisation import CorpusTokenizer, describe_tokenizer
from teacher_dump.fingerprints import file_sha256
from teacher_dump.generation.configuration import GenerateConfig
from teacher_dump.generation.prompts import PromptReader
from teacher_dump.generation.template import PromptTemplate
from teacher_dump.teachers.files import find_folder, stated_sizes
from teacher_dump.teachers.loading import ENGINES
from teacher_dump.teachers.opening import check_device, check_files
from teacher_dump.teachers.protocol import Ability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_dump.teachers.protocol import Teacher

UNLIMITED = 2**31  # tokens, where no sequence is to be cut


def existing_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that was begun; None where there is nothing.

    Raises:
        InputError: it is a file, or a folder of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder for --output")
    try:
        return read_manifest(folder)
    except MissingFileError:
        storage = open_storage(folder)
        found = [*storage.folders(""), *(entry.name for entry in storage.files(""))] if folder.exists() else []
        if MANIFEST in found:  # another worker has just begun
            return read_manifest(folder)
        if found:
            raise InputError(
                f"{folder} has other files than texts of teacher-dump generate ({found[0]}): name a new or an empty folder for"
                " --output"
            ) from None
        return None


def as_begun(config: GenerateConfig, existing: dict[str, Any] | None) -> GenerateConfig:
    """The configuration with the engine and the quantisation of the teacher that began the folder, where it does not say."""
    if existing is None:
        return config
    kept = existing["teacher"]
    engine = config.engine or (kept.get("engine") if config.teacher_url is None else None)
    return replace(config, engine=engine, quantize=config.quantize or kept.get("quantize"))


def check_before_loading(config: GenerateConfig) -> None:
    """Make sure, as far as it is known before it is loaded, that a teacher can write.

    Raises:
        InputError: it cannot.
    """
    engine = ENGINES[config.loading.engine]
    if Ability.TEXT not in engine.abilities:
        raise InputError(
            f"{engine.flag or config.loading.engine} asks a server how likely tokens are, and not for texts: load the teacher"
            " here, with --engine transformers or --engine vllm"
        )
    check_files(config)
    check_device(config.loading)


def teacher_tokenizer(config: GenerateConfig) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, loaded alone (InputError: it cannot be)."""
    from teacher_dump.teachers.tokenizer import load_tokenizer

    return load_tokenizer(str(find_folder(config.teacher, config.gguf_file, config.revision)), config.gguf_file)


def prompt_reader(
    config: GenerateConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatOptions,
    template: PromptTemplate | None,
    teacher: Teacher | None,
) -> PromptReader:
    """What makes prompts of rows, as the options say.

    Raises:
        InputError: there is no chat template or no beginning of a text, and one is needed, or no room for a prompt.
    """
    has_template = bool(chat.template or tokenizer.chat_template)
    if config.prompt_as == "message" and not has_template:
        raise InputError(
            "--prompt-as message needs a chat template, and the teacher's tokenizer has none: name one with --chat-template, or"
            " leave --prompt-as out"
        )
    sizes = stated_sizes(config.teacher, config.gguf_file) if teacher is None else teacher.description
    positions = sizes.get("max_positions")
    if positions is not None and config.max_new_tokens >= positions:
        raise InputError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the teacher knows {positions} positions"
        )
    corpus = CorpusTokenizer(tokenizer, UNLIMITED, chat=chat)
    beginning = tokenizer.bos_token_id
    if config.count is not None and template is None and beginning is None:
        raise InputError(
            "the teacher's tokenizer has no token that begins a text, from which --count could go on: give a --template"
        )
    as_message = config.prompt_as == "message" or (config.prompt_as == "auto" and has_template)
    columns = Columns(config.column_names)
    return PromptReader(
        *(config.corpus, config.count, columns, template, as_message, corpus, beginning, config.max_new_tokens, positions)
    )


def settings_record(
    config: GenerateConfig,
    reader: PromptReader,
    chat: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
) -> dict[str, Any]:
    """Everything beside the teacher that decides a text, and the columns it is written with."""
    template = reader.template
    return {
        "samples": config.samples,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "shard_size": config.shard_size,
        "keep_top_k": config.keep_top_k,
        "prompt_as": "message" if reader.as_message else "text",
        "count": config.count,
        "columns": config.column_names,
        "template": None if template is None else {"text": template.text, "sha256": template.sha256},
        "chat": chat,
        "tokenizer": describe_tokenizer(tokenizer),
        "prompts": [
            {"name": name, "sha256": file_sha256(path, reporter=reporter)}
            for name, path in zip(file_names(config.corpus), config.corpus, strict=True)
        ],
    }


def check_same(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    """Make sure that settings are those that a folder was begun with (MismatchError: names the first that is not)."""
    for name, value in asked.items():
        if kept.get(name) == value:
            continue
        if isinstance(value, dict) and isinstance(kept.get(name), dict):
            parts = [part for part in value.keys() | kept[name].keys() if value.get(part) != kept[name].get(part)]
            what = f"another {name.replace('_', ' ')} ({', '.join(sorted(parts))})"
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            what = f"--{name.replace('_', '-')} {kept.get(name)}, and not {value}"
        else:
            what = f"other {name}" if name in ("prompts", "columns") else f"another {name}"
        raise MismatchError(f"the texts in {folder} were begun with {what}: give the same again, or name another --output")


def turn_end(reader: PromptReader) -> list[int]:
    """The id of the token with which the chat template ends a turn of the assistant, where it is one of its own."""
    if not reader.as_message:
        return []
    asked, answered = ({"role": "user", "content": "word"}, {"role": "assistant", "content": "word"})
    try:
        last = reader.tokenizer.last_target([asked, answered])
    except BadRow:
        return []
    return [] if last is None else [last]
