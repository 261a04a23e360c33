"""Rows as prompts: what a teacher goes on from, and the columns that travel along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store.errors import InputError
from teacher_dump.corpus.columns import COMPLETION, MESSAGES, SHAREGPT, TEMPLATE_COLUMNS, Columns
from teacher_dump.corpus.documents import file_rows, problem_text, sound_unicode
from teacher_dump.corpus.messages import Turns, read_messages
from teacher_dump.corpus.row_shapes import check_seen, check_system, column_value, system_turns, template_arguments
from teacher_dump.corpus.rows import BadRow, Row, Start
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.generation.template import PromptTemplate

PARTS = ("prompt", "messages", "conversations")  # what a prompt may stand in, where no template makes it
ASKING = ("user", "tool")  # whose turn an assistant answers
LINE = "prompt"  # the column of a line of a .txt file
COUNTED = "row"  # the only column there is with --count


@dataclass(frozen=True)
class Prompt:
    """A row of the prompts. Either `problem` says why it cannot be used, or the rest is there.

    Attributes:
        number: among all rows of all files, counted from 0.
        start: where it stands: file, row (counted from 1) and offset.
        content: text, or messages that the assistant is asked to answer.
        arguments: for the chat template.
        columns: the row's other columns, as the template saw them.
        token_ids: int64 (T,), what the teacher goes on from.
    """

    number: int
    start: Start
    content: str | Turns = ""
    arguments: dict[str, Any] | None = None
    columns: dict[str, Any] | None = None
    token_ids: np.ndarray | None = None
    problem: BadRow | None = None


@dataclass(frozen=True)
class PromptReader:
    """How the rows of files become prompts.

    Attributes:
        files: checked; none where prompts are counted.
        count: how many prompts there are without files.
        columns: which column holds what.
        template: that makes prompts of rows, if there is one.
        as_message: whether text becomes a message of a user; else it is gone on with.
        tokenizer: that makes their tokens.
        beginning: the token that begins a text, which is all there is of a prompt without files and template.
        max_new_tokens: that are written behind each.
        positions: that the teacher knows, where that is known.
    """

    files: tuple[Path, ...]
    count: int | None
    columns: Columns
    template: PromptTemplate | None
    as_message: bool
    tokenizer: CorpusTokenizer
    beginning: int | None
    max_new_tokens: int
    positions: int | None

    def prompts(self, start: Start) -> Iterator[Prompt]:
        """The prompts from one on, which `start` names by its number (`document`) and its place.

        Raises:
            InputError: a file cannot be read as what its name says, or there is no chat template.
        """
        if self.count is not None:
            for number in range(start.document, self.count):
                yield self._prompt(number, 0, Row(number + 1, 0, {COUNTED: number}))
            return
        number = start.document
        for file in range(start.file, len(self.files)):
            here = start if file == start.file else Start(number, file, 1, 0, 0)
            try:
                for row in self._rows(self.files[file], here):
                    yield self._prompt(number, file, row)
                    number += 1
            except OSError as error:
                raise InputError(f"cannot read {self.files[file]}: {error.strerror or error}") from None

    def place(self, prompt: Prompt) -> str:
        """What is wrong with a prompt, with its place, as people read it."""
        if not self.files:
            return f"{COUNTED} {prompt.number}: {prompt.problem}"
        path = self.files[prompt.start.file]
        if path.suffix == ".txt":  # each line of which is a prompt, where a corpus has one text
            return f"{path}, line {prompt.start.row}: {prompt.problem}"
        return problem_text(self.files, prompt.start.file, prompt.start.row, str(prompt.problem))

    def _rows(self, path: Path, start: Start) -> Iterator[Row]:
        if path.suffix != ".txt":
            yield from file_rows(path, start)
            return
        with open(path, "rb") as file:
            file.seek(start.offset)
            offset, number = start.offset, start.row
            for line in file:
                try:
                    text = line.decode("utf-8-sig" if offset == 0 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield Row(number, offset, problem="text that is not UTF-8")
                else:
                    if text.strip():
                        yield Row(number, offset, {LINE: text})
                offset, number = offset + len(line), number + 1

    def _prompt(self, number: int, file: int, row: Row) -> Prompt:
        start = Start(number, file, row.number, 0, row.offset)
        try:
            if row.problem is not None:
                raise BadRow(row.problem)
            if not isinstance(row.record, dict):
                raise BadRow("not an object with columns")
            if not sound_unicode(row.record):
                raise BadRow("text that is not sound Unicode (half of a surrogate pair)")
            try:
                content, arguments, columns = self._content(row.record)
            except ValueError as error:
                raise BadRow(str(error)) from None
            token_ids = self._tokens(content, arguments)
        except BadRow as problem:
            return Prompt(number, start, problem=problem)
        return Prompt(number, start, content, arguments, columns, token_ids)

    def _content(self, record: dict[str, Any]) -> tuple[str | Turns, dict[str, Any], dict[str, Any]]:
        """The prompt of a row, what its chat template gets beside it, and the columns that neither is made of."""
        if self.template is not None:
            return self._as_asked(self.template.render(record)), {}, record
        if self.count is not None:
            return "", {}, record
        part = self._part(record)
        name = self.columns.name(part)
        value = record.get(name)
        if value is None:
            raise ValueError(f"`{name}` {'is null' if name in record else 'is not there'}")
        check_seen(record, self.columns, tools=self.as_message)
        if isinstance(value, str) and self.columns.is_json(part):
            value = column_value(value, part, self.columns)
        system = self.columns.name("system")
        given = {"system": record[system]} if record.get(system) is not None else {}
        if isinstance(value, str):
            if not value.strip():
                raise BadRow(f"the prompt is empty: `{name}`")
            asked = self._as_asked(value)
            if isinstance(asked, str):
                check_system(record, self.columns)
                return asked, {}, {key: other for key, other in record.items() if key != name}
            messages = asked
        elif self.as_message:
            messages = read_messages(value, name)
        else:
            raise BadRow(
                f"`{name}` has messages, and prompts are gone on with as plain text here: name a chat template with"
                " --chat-template and leave --prompt-as out, or make text of them with --template"
            )
        messages = [*system_turns(given, messages, self.columns), *messages]
        last = str(messages[-1]["role"])
        if last not in ASKING:
            raise BadRow(
                f"`{name}` ends with a turn of another than a user (message {len(messages)} is of the role {last!r}), so that"
                " there is nothing to answer: leave the last turn out, or make a prompt with --template"
            )
        for argument in TEMPLATE_COLUMNS:
            found = record.get(self.columns.name(argument))
            found = column_value(found, argument, self.columns) if isinstance(found, str) else found
            if found is not None:
                given[argument] = found
        taken = {name, *(self.columns.name(argument) for argument in TEMPLATE_COLUMNS)}
        others = {key: other for key, other in record.items() if key not in taken}
        return messages, template_arguments(given, self.columns), others

    def _part(self, record: dict[str, Any]) -> str:
        """Which part of a row the prompt stands in."""
        if len(said := [part for part in PARTS if part in self.columns.deciding]) == 1:
            return said[0]
        named = {COMPLETION: "prompt", MESSAGES: "messages", SHAREGPT: "conversations"}
        if self.columns.shape in named:
            return named[self.columns.shape]
        present = [part for part in PARTS if record.get(self.columns.name(part)) is not None]
        if len(present) > 1:
            raise BadRow(
                f"it has both `{present[0]}` and `{present[1]}`: say which is the prompt with --columns"
                f" {present[0]}={present[0]} or --columns {present[1]}={present[1]}"
            )
        if not present:
            names = ", ".join(f"`{name}`" for name in record)
            raise BadRow(
                f"none of the columns that a prompt is read by (it has {names or 'none'}): `prompt`, `messages` or"
                " `conversations`. Make a prompt of other columns with --template, or name one as in --columns prompt=question"
            )
        return present[0]

    def _as_asked(self, text: str) -> str | Turns:
        """Text as a prompt."""
        return [{"role": "user", "content": text}] if self.as_message else text

    def _tokens(self, content: str | Turns, arguments: dict[str, Any]) -> np.ndarray:
        if not content:
            assert self.beginning is not None
            return np.array([self.beginning], np.int64)
        token_ids = self.tokenizer.prompt_tokens(content, arguments)
        if not len(token_ids):
            raise BadRow("the prompt has no tokens")
        if self.positions is not None and len(token_ids) + self.max_new_tokens > self.positions:
            raise BadRow(
                f"the prompt leaves no room for what is to be written (it has {len(token_ids):,} tokens, which with"
                f" --max-new-tokens {self.max_new_tokens} are more than the {self.positions:,} positions the teacher knows)"
            )
        return token_ids
