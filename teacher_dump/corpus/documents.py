"""A corpus as one stream of documents.

A *document* is a row of the corpus, or one part of a text too long for one: parts end at paragraph ends and put together are
the text again. Documents are numbered through the whole corpus, and every row has at least one number, good or bad, so that
numbers do not depend on what is skipped. Nothing is held but the document at hand.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from knowledge_store.errors import InputError
from teacher_dump.corpus.arrow_files import arrow_rows
from teacher_dump.corpus.columns import Columns
from teacher_dump.corpus.compression import uncompressed_name
from teacher_dump.corpus.hub import hub_file_name
from teacher_dump.corpus.json_list import json_file_rows
from teacher_dump.corpus.jsonl import json_rows
from teacher_dump.corpus.messages import Turns
from teacher_dump.corpus.parquet import parquet_rows
from teacher_dump.corpus.row_shapes import Content, read_content
from teacher_dump.corpus.rows import Row, Start
from teacher_dump.corpus.text import cut_text, text_parts

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    *(".json", ".json.gz", ".json.zst"),
    *(".parquet", ".arrow", ".txt"),
)
TABLES_OF_TEXT = (".csv", ".tsv", ".csv.gz", ".tsv.gz")  # whose quotes and separators are for DuckDB to find out
SUFFIXES_READ_THROUGH = (".gz", ".zst", ".parquet", ".arrow")  # to get to the middle of these is to read what comes before


@dataclass(frozen=True)
class Document:
    """One document. Either `problem` says why it cannot be used, or one of text, prompt + completion, prompt + completions,
    messages, token ids is there.

    Attributes:
        number: in the corpus, counted from 0.
        file, row, part, offset: where it stands (see Start).
        last_part: whether the row's text ends here.
        messages: as the row has them, each with a `role`.
        completions: of a group, its answers, at least 2; each as `completion` has it.
        scores: what each of these is worth; None where nobody says.
        token_ids, is_target: of one length; the latter says which tokens count for training.
        columns: the row's other columns; columns_read: the names of those that its content was read from.
        template_arguments: `tools` and `chat_template_kwargs` for the chat template.
        finish: how what a model wrote has ended, `stop` or `length`: a completion, the last turn of the assistant, or a text
            with this part; None of others.
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
    completions: tuple[str | Turns, ...] | None = None
    scores: tuple[float | None, ...] | None = None
    messages: Turns | None = None
    token_ids: tuple[int, ...] | None = None
    is_target: tuple[bool, ...] | None = None
    columns: dict[str, Any] | None = None
    columns_read: tuple[str, ...] = ()
    template_arguments: dict[str, Any] | None = None
    finish: str | None = None
    problem: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole row, and no part of one."""
        return self.part == 0 and self.last_part

    @property
    def characters(self) -> int:
        """Roughly how much text there is."""
        contents = (self.text, self.prompt, self.completion, self.completions, self.messages, self.token_ids)
        return sum(len(str(content)) for content in contents if content is not None)

    @property
    def is_group(self) -> bool:
        """Whether it is several answers to one prompt."""
        return self.completions is not None


def check_files(files: tuple[Path, ...]) -> None:
    """Make sure every corpus file is there and of a known kind, and that none is there twice.

    Raises:
        InputError: naming the file.
    """
    known: dict[Path, Path] = {}
    for path in files:
        # In the hub's cache, two files of one content are links to one.
        place = path.parent.resolve() / path.name if hub_file_name(path) else path.resolve()
        if place in known:
            same = f"{path} is given twice" if path == known[place] else f"{path} is the same file as {known[place]}"
            raise InputError(f"{same}: its rows would count twice; name it once")
        known[place] = path
        if not path.exists():
            raise InputError(f"there is no file {path}")
        if path.is_dir():
            kinds = Counter(file.suffix for file in path.glob("*") if file.suffix in SUFFIXES).most_common(1)
            inside = f", such as {path}/*{kinds[0][0]}" if kinds else ""
            raise InputError(f"{path} is a folder: name the files in it{inside}")
        if not path.is_file():
            raise InputError(
                f"{path} is a pipe or a device, and a corpus is read more than once: write it to a file, and name that"
            )
        if path.name.lower().endswith(TABLES_OF_TEXT):
            script = f"import duckdb; duckdb.read_csv({str(path)!r}, all_varchar=True).write_parquet({f'{path}.parquet'!r})"
            raise InputError(f"{path} is not of a known kind: make a Parquet file of it with python -c {shlex.quote(script)}")
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} is not of a known kind: the name of a file ends in {', '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        if path.suffix == ".zst":
            try:
                import zstandard  # noqa: F401
            except ImportError:
                raise InputError(f"{path} needs zstandard: pip install 'knowledge-store[teacher]'") from None


def file_names(files: tuple[Path, ...]) -> list[str]:
    """What the corpus files are called in the store: their names, and where names repeat, as many of their folders' before them
    as tell them apart; those of the hub with their data set and its commit."""
    places = [PurePath(hub_file_name(path) or path.parent.resolve() / path.name) for path in files]
    depths = [1 if hub_file_name(path) is None else len(place.parts) for path, place in zip(files, places, strict=True)]
    while True:
        names = ["/".join(place.parts[-depth:]) for place, depth in zip(places, depths, strict=True)]
        deeper = [
            depth + (names.count(name) > 1 and depth < len(place.parts) - 1)
            for name, place, depth in zip(names, places, depths, strict=True)
        ]
        if deeper == depths:
            return names
        depths = deeper


def place_text(files: tuple[Path, ...], file: int, row: int) -> str:
    """Where a row stands, as people read it."""
    is_line = uncompressed_name(files[file]).endswith(".jsonl")
    return f"{files[file]}, {'line' if is_line else 'row'} {row}"


def problem_text(files: tuple[Path, ...], file: int, row: int, problem: str) -> str:
    """A row's problem with its place, as people read it."""
    return f"{place_text(files, file, row)}: {problem}"


def sound_unicode(value: Any) -> bool:
    """Whether all text in a row, also in the columns that only travel along, can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError):
        return False
    return True


def _row_content(row: Row, columns: Columns) -> Content | str:
    """The content of a row, or why it has none."""
    if row.problem is not None:
        return row.problem
    if not isinstance(row.record, dict):
        return "not an object with columns"
    if not sound_unicode(row.record):
        return "text that is not sound Unicode (half of a surrogate pair)"
    try:
        return read_content(row.record, columns)
    except ValueError as error:
        return str(error)


def _row_documents(
    row: Row, columns: Columns, number: int, file: int, first_part: int, part_characters: int
) -> Iterator[Document]:
    place: dict[str, Any] = {"file": file, "row": row.number, "offset": row.offset}
    content = _row_content(row, columns)
    if isinstance(content, str):
        yield Document(number, **place, part=0, problem=content)
        return
    place |= {"columns": content.columns, "columns_read": tuple(name for name in row.record if name not in content.columns)}
    text = content.fields.get("text")
    if text is None:
        yield Document(number, **place, part=0, **content.fields)
        return
    parts = list(cut_text(text, part_characters))
    for part, words in list(enumerate(parts))[first_part:]:
        last = part + 1 == len(parts)
        yield Document(
            number + part - first_part,
            **place,
            part=part,
            text=words,
            last_part=last,
            finish=content.fields.get("finish") if last else None,
        )


def file_rows(path: Path, start: Start) -> Iterator[Row]:
    """The rows of a file that has rows, from `start` on."""
    if path.suffix == ".parquet":
        return parquet_rows(path, start)
    if path.suffix == ".arrow":
        return arrow_rows(path, start)
    return json_rows(path, start) if uncompressed_name(path).endswith(".jsonl") else json_file_rows(path, start)


def read_documents(
    files: tuple[Path, ...], start: Start, part_characters: int, column_names: Mapping[str, str] | None = None
) -> Iterator[Document]:
    """The documents of a corpus from `start` on.

    Args:
        files: checked by `check_files`.
        start: where to begin.
        part_characters: longest text that is one document.
        column_names: what `--columns` says (see `read_columns`).

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    columns = Columns(column_names or {})
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
            first_part = here.part
            for row in file_rows(path, here):
                for document in _row_documents(row, columns, number, file, first_part, part_characters):
                    yield document
                    number += 1
                first_part = 0
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def has_groups(files: tuple[Path, ...], part_characters: int, column_names: Mapping[str, str] | None = None) -> bool:
    """Whether the rows of a corpus are groups of answers: the first of those that can be read decides.

    Args:
        files, part_characters, column_names: as of `read_documents`.

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    documents = read_documents(files, Start(0, 0, 1, 0, 0), part_characters, column_names)
    return next((document.is_group for document in documents if document.problem is None), False)
