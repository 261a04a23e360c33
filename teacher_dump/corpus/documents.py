"""A corpus as one stream of documents.

A *document* is a row of the corpus, or one part of a text too long for one: parts end at paragraph ends and put together are
the text again. Documents are numbered through the whole corpus, and every row has at least one number, good or bad, so that
numbers do not depend on what is skipped. Nothing is held but the document at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError
from teacher_dump.corpus.conversations import Turns, is_conversation, template_arguments
from teacher_dump.corpus.jsonl import json_rows
from teacher_dump.corpus.parquet import parquet_rows
from teacher_dump.corpus.rows import Row, Start
from teacher_dump.corpus.text import cut_text, text_parts

CONTENT_COLUMNS = ("text", "prompt", "completion", "messages", "tools", "chat_template_kwargs")
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
SUFFIXES_READ_THROUGH = (".zst", ".parquet")  # to get to the middle of these is to read what comes before


@dataclass(frozen=True)
class Document:
    """One document. Either `problem` says why it cannot be used, or one of text, prompt + completion, messages is there.

    Attributes:
        number: in the corpus, counted from 0.
        file, row, part, offset: where it stands (see Start).
        last_part: whether the row's text ends here.
        columns: the row's other columns.
        template_arguments: `tools` and `chat_template_kwargs` for the chat template.
    """

    number: int
    file: int
    row: int
    part: int
    offset: int
    last_part: bool = True
    text: str | None = None
    prompt: str | Turns | None = None
    completion: str | Turns | None = None
    messages: Turns | None = None
    columns: dict[str, Any] | None = None
    template_arguments: dict[str, Any] | None = None
    problem: str | None = None

    @property
    def characters(self) -> int:
        """Roughly how much text there is."""
        contents = (self.text, self.prompt, self.completion, self.messages)
        return sum(len(str(content)) for content in contents if content is not None)


def check_files(files: tuple[Path, ...]) -> None:
    """Make sure every corpus file is there and of a known kind.

    Raises:
        InputError: naming the file.
    """
    for path in files:
        if not path.exists():
            raise InputError(f"there is no corpus file {path}")
        if not path.is_file():
            raise InputError(f"{path} is a folder: name the corpus files in it")
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} is not of a known kind: a corpus file ends in {', '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        if path.suffix == ".zst":
            try:
                import zstandard  # noqa: F401
            except ImportError:
                raise InputError(f"{path} needs zstandard: pip install 'knowledge-store[teacher]'") from None


def file_names(files: tuple[Path, ...]) -> list[str]:
    """What the corpus files are called in the store: their names, with their folder's where names repeat."""
    names = [path.name for path in files]
    return [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in files]


def place_text(files: tuple[Path, ...], file: int, row: int) -> str:
    """Where a row stands, as people read it."""
    return f"{files[file]}, {'row' if files[file].suffix == '.parquet' else 'line'} {row}"


def problem_text(files: tuple[Path, ...], file: int, row: int, problem: str) -> str:
    """A row's problem with its place, as people read it."""
    return f"{place_text(files, file, row)}: {problem}"


def _sound_unicode(value: Any) -> bool:
    """Whether all text in a row, also in the columns that only travel along, can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError):
        return False
    return True


def _row_content(record: Any) -> dict[str, Any] | str:
    """The content of a row as Document's fields, or why it has none."""
    if not isinstance(record, dict):
        return "not an object with columns"
    if not _sound_unicode(record):
        return "text that is not sound Unicode (half of a surrogate pair)"
    given = {name: record[name] for name in CONTENT_COLUMNS if record.get(name) is not None}
    if "prompt" in given or "completion" in given:
        prompt, completion = given.get("prompt"), given.get("completion")
        strings = isinstance(prompt, str) and isinstance(completion, str)
        if not strings and not (is_conversation(prompt) and is_conversation(completion)):
            return "`prompt` and `completion` must both be given, both strings or both lists of messages"
        return {"prompt": prompt, "completion": completion, "template_arguments": template_arguments(given)}
    if "messages" in given:
        if not is_conversation(given["messages"]):
            return "`messages` must be a list of objects with `role`"
        return {"messages": given["messages"], "template_arguments": template_arguments(given)}
    if "text" in given:
        return {"text": given["text"]} if isinstance(given["text"], str) else "`text` is not a string"
    nulls = [f"`{name}`" for name in ("text", "prompt", "completion", "messages") if name in record]
    if nulls:
        return f"{' and '.join(nulls)} {'is' if len(nulls) == 1 else 'are'} null"
    return "none of the columns `text`, `prompt` and `completion`, or `messages`"


def _row_documents(row: Row, number: int, file: int, first_part: int, part_characters: int) -> Iterator[Document]:
    place: dict[str, Any] = {"file": file, "row": row.number, "offset": row.offset}
    try:
        content = row.problem or _row_content(row.record)
    except ValueError as error:
        content = str(error)
    if isinstance(content, str):
        yield Document(number, **place, part=0, problem=content)
        return
    columns = {name: value for name, value in row.record.items() if name not in CONTENT_COLUMNS}
    if "text" not in content:
        yield Document(number, **place, part=0, columns=columns, **content)
        return
    parts = list(cut_text(content["text"], part_characters))
    for part, text in list(enumerate(parts))[first_part:]:
        yield Document(
            number + part - first_part, **place, part=part, text=text, columns=columns, last_part=part + 1 == len(parts)
        )


def read_documents(files: tuple[Path, ...], start: Start, part_characters: int) -> Iterator[Document]:
    """The documents of a corpus from `start` on.

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    number = start.document
    for file in range(start.file, len(files)):
        path = files[file]
        here = start if file == start.file else Start(number, file, 1, 0, 0)
        try:
            if path.suffix == ".txt":
                for part, offset, text, last in text_parts(path, here, part_characters):
                    yield Document(number, file, 1, part, offset, last, text=text, columns={})
                    number += 1
                continue
            rows = parquet_rows(path, here) if path.suffix == ".parquet" else json_rows(path, here)
            first_part = here.part
            for row in rows:
                for document in _row_documents(row, number, file, first_part, part_characters):
                    yield document
                    number += 1
                first_part = 0
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
