"""A corpus as a stream of documents, and the plan that says where each shard's documents begin.

A *document* is a row of the corpus, or one part of a text too long for one: parts end at paragraph ends and put together are
the text again. Documents are numbered through the whole corpus, and every row has at least one number, good or bad, so that
numbers do not depend on what is skipped. `scan` reads the corpus once, checks every row and notes where every shard begins; a
worker then goes straight to its shard. Nothing is held but the document at hand.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError

CONTENT_COLUMNS = ("text", "prompt", "completion", "messages", "tools", "chat_template_kwargs")
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
SUFFIXES_READ_THROUGH = (".zst", ".parquet")  # to get to the middle of these is to read what comes before
READ_BYTES = 1 << 20
ZSTD_BYTES = 1 << 16  # compressed; text can be hundreds of times as long
PARQUET_ROWS = 64

_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")
_LINE_END = re.compile(r"\n")
_SPACE = re.compile(r"\s")

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """Where a shard begins.

    Attributes:
        document: its first document's number.
        file: index of the corpus file; row: counted from 1; part: of that row, counted from 0.
        offset: of the row (of the part, in a .txt file) in bytes of uncompressed text; unused in Parquet.
        characters: how much text the shard holds, to measure progress by.
    """

    document: int
    file: int
    row: int
    part: int
    offset: int
    characters: int = 0


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
        return sum(len(each) if isinstance(each, str) else len(str(each)) for each in contents if each is not None)


@dataclass(frozen=True)
class Scan:
    """What reading the whole corpus found: how many documents, where shards begin, the types of its own columns, and the rows
    that cannot be used (the first of them in words)."""

    documents: int
    shards: list[Start]
    columns: dict[str, str]
    bad_rows: int
    first_problem: str | None


# --- rows ---------------------------------------------------------------------------------------------------------------


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file. Unlike the library's own reader, it notices a file that ends too early."""

    def __init__(self, file: BinaryIO, path: Path):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._file, self._path = file, path
        self._frame = self._new()
        self._inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            chunk = chunk or self._file.read(ZSTD_BYTES)
            if not chunk:
                if self._inside and not self._frame.eof:
                    raise InputError(f"{self._path} ends in the middle: it was cut off while written or copied")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._inside = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as error:
                raise InputError(f"{self._path} is not a sound Zstandard file: {error}") from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, offset: int) -> BinaryIO:
    """The uncompressed bytes of a file from `offset` on."""
    file = open(path, "rb")  # noqa: SIM115 — the caller closes it
    if path.suffix != ".zst":
        file.seek(offset)
        return file
    stream = io.BufferedReader(_ZstdReader(file, path), READ_BYTES)
    while offset and (skipped := stream.read(min(offset, READ_BYTES))):
        offset -= len(skipped)
    return cast(BinaryIO, stream)


@dataclass(frozen=True)
class _Row:
    number: int
    offset: int
    record: Any = None
    problem: str | None = None


def _json_rows(path: Path, start: Start) -> Iterator[_Row]:
    offset, number = start.offset, start.row - 1
    with _open(path, offset) as file:
        for line in file:
            number += 1
            if line.strip():
                yield _json_row(line, number, offset)
            offset += len(line)


def _json_row(line: bytes, number: int, offset: int) -> _Row:
    try:
        return _Row(number, offset, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
    except UnicodeDecodeError as error:
        return _Row(number, offset, problem=f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return _Row(number, offset, problem=f"not JSON ({error})")


def _parquet_rows(path: Path, start: Start) -> Iterator[_Row]:
    try:
        # With a buffer, a row group is read page by page and never held whole.
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            number, group = 0, 0
            while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows < start.row:
                number += file.metadata.row_group(group).num_rows
                group += 1
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(range(group, file.num_row_groups))):
                wanted = batch.slice(max(start.row - 1 - number, 0))
                yield from _parquet_batch(wanted, number + len(batch) - len(wanted))
                number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _parquet_batch(batch: pa.RecordBatch, number: int) -> Iterator[_Row]:
    """The rows of a batch that comes after `number` rows."""
    try:
        for index, record in enumerate(batch.to_pylist(), number + 1):
            yield _Row(index, 0, record)
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            for index in range(len(batch)):
                yield from _parquet_batch(batch.slice(index, 1), number + index)
        elif isinstance(error, UnicodeDecodeError):
            yield _Row(number + 1, 0, problem="text that is not UTF-8")
        else:
            yield _Row(number + 1, 0, problem=f"a value that cannot be read ({str(error).splitlines()[0]})")


# --- texts --------------------------------------------------------------------------------------------------------------


def cut_point(text: str, limit: int, start: int = 0) -> int:
    """Where to cut a text that goes on for more than `limit` characters from `start`: after the last paragraph that fits, or
    else line, or else word, in the second half of what fits; or else after `limit` characters."""
    for ending in (_PARAGRAPH_END, _LINE_END, _SPACE):
        ends = [match.end() for match in ending.finditer(text, start + limit // 2, start + limit)]
        if ends:
            return ends[-1]
    return start + limit


def cut_text(text: str, limit: int) -> Iterator[str]:
    """The parts of a text, each of at most `limit` characters; joined, they are the text."""
    start = 0
    while len(text) - start > limit:
        cut = cut_point(text, limit, start)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _text_parts(path: Path, start: Start, limit: int) -> Iterator[tuple[int, int, str, bool]]:
    """(part, offset, text, last) of a .txt file from `start` on, reading no more of it than a part needs. A byte-order mark
    at its beginning is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, part = start.offset, start.part
    text, done, ended = "", 0, False  # the first `done` characters of `text` have been given
    with open(path, "rb") as file:
        if offset == 0 and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            offset = len(codecs.BOM_UTF8)
        file.seek(offset)
        while True:
            if not ended and len(text) - done <= limit:
                text, done = text[done:], 0
            while not ended and len(text) <= limit:
                chunk = file.read(READ_BYTES)
                ended = not chunk
                at = file.tell() - len(chunk) - len(decoder.getstate()[0])
                try:
                    text += decoder.decode(chunk, final=ended)
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path} is not UTF-8 at byte {at + error.start}: convert it, for example with iconv"
                    ) from None
            last = len(text) - done <= limit
            cut = len(text) if last else cut_point(text, limit, done)
            yield part, offset, text[done:cut], last
            if last:
                return
            offset += len(text[done:cut].encode())
            part, done = part + 1, cut


# --- documents ----------------------------------------------------------------------------------------------------------


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in value)
    )


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
        if not strings and not (_is_conversation(prompt) and _is_conversation(completion)):
            return "`prompt` and `completion` must both be there, both strings or both lists of messages"
        return {"prompt": prompt, "completion": completion, "template_arguments": _template_arguments(given)}
    if "messages" in given:
        if not _is_conversation(given["messages"]):
            return "`messages` must be a list of objects with `role` and `content`"
        return {"messages": given["messages"], "template_arguments": _template_arguments(given)}
    if "text" in given:
        return {"text": given["text"]} if isinstance(given["text"], str) else "`text` is not a string"
    return "none of the columns `text`, `prompt` and `completion`, or `messages`"


def _template_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What goes to the chat template beside the messages. Raises ValueError, in words."""
    arguments = given.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError("`chat_template_kwargs` is not an object")
    tools = given.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`tools` is not JSON ({error})") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError("`tools` is not a list")
    return {**arguments, "tools": tools} if tools else dict(arguments)


def _row_documents(row: _Row, number: int, file: int, first_part: int, part_characters: int) -> Iterator[Document]:
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
                for part, offset, text, last in _text_parts(path, here, part_characters):
                    yield Document(number, file, 1, part, offset, last, text=text, columns={})
                    number += 1
                continue
            rows = _parquet_rows(path, here) if path.suffix == ".parquet" else _json_rows(path, here)
            first_part = here.part
            for row in rows:
                for document in _row_documents(row, number, file, first_part, part_characters):
                    yield document
                    number += 1
                first_part = 0
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None


# --- the scan -----------------------------------------------------------------------------------------------------------


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


def _column_type(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "double" if isinstance(value, float) else "string"


def _common_type(one: str | None, other: str | None) -> str | None:
    if one is None or other is None or one == other:
        return one or other
    return "double" if {one, other} == {"int64", "double"} else "string"


def column_value(value: Any, column_type: str) -> Any:
    """A corpus column's value as the type its column has: anything that is no string becomes JSON text in a string column."""
    if value is None or (column_type == "string" and isinstance(value, str)):
        return value
    if column_type == "string":
        return json.dumps(value, ensure_ascii=False, default=str)
    return float(value) if column_type == "double" else value


def problem_text(files: tuple[Path, ...], file: int, row: int, problem: str) -> str:
    """A row's problem with its place, as people read it."""
    return f"{files[file]}, {'row' if files[file].suffix == '.parquet' else 'line'} {row}: {problem}"


def scan(
    files: tuple[Path, ...], shard_size: int, part_characters: int, progress: Callable[[int], None] = lambda count: None
) -> Scan:
    """Read the whole corpus once.

    Args:
        files: checked by `check_files`.
        shard_size: documents in a shard.
        part_characters: longest text that is one document.
        progress: called with the number of characters of each document.

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    starts: list[Start] = []
    characters: list[int] = []
    columns: dict[str, str | None] = {}
    bad_rows, first_problem, count = 0, None, 0
    for document in read_documents(files, Start(0, 0, 1, 0, 0), part_characters):
        if document.number % shard_size == 0:
            starts.append(Start(document.number, document.file, document.row, document.part, document.offset))
            characters.append(0)
        count = document.number + 1
        characters[-1] += document.characters
        progress(document.characters)
        if document.problem is not None:
            bad_rows += 1
            first_problem = first_problem or problem_text(files, document.file, document.row, document.problem)
        elif document.part == 0:
            for name, value in (document.columns or {}).items():
                columns[name] = _common_type(columns.get(name), _column_type(value))
    shards = [
        Start(start.document, start.file, start.row, start.part, start.offset, size)
        for start, size in zip(starts, characters, strict=True)
    ]
    return Scan(count, shards, {name: kind or "string" for name, kind in columns.items()}, bad_rows, first_problem)
