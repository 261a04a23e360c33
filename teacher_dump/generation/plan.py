"""What is to be written, found before the teacher is loaded: prompts looked through, and the files that their texts go into."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.quantities import counted
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.corpus.columns import COMPLETION, FINISH, FINISH_REASON, SHAPES, TEMPLATE_COLUMNS
from teacher_dump.corpus.rows import Start
from teacher_dump.corpus.scan import column_type, common_type
from teacher_dump.generation.prompts import PromptReader

# Columns of a text, beside those of its prompt.
WRITTEN = (
    *(*COMPLETION.required, "sample", "seed", "logprob", "tokens", FINISH, "exact"),
    *("teacher", "template_sha256", "prompt_file", "prompt_row"),
    *("sequence", "targets", "token_logprobs", "top_ids", "top_logprobs", "tail_logprobs"),
)
# A prompt's own columns of these names would be read as something else where the texts are a corpus.
TAKEN = {*WRITTEN, FINISH_REASON, *TEMPLATE_COLUMNS, *(part for shape in SHAPES for part in (*shape.required, *shape.optional))}
GIVEN = "given_"  # stands before these
NESTED = "json"  # the type of a column that has lists or objects, which a template finds again where the texts are its prompts
PLAIN_MESSAGE = {"role", "content"}


@dataclass(frozen=True)
class Plan:
    """What looking through the prompts found.

    Attributes:
        parts: where the prompts of each file begin.
        rows: how many rows there are; prompts: those that can be used.
        longest: tokens of the longest prompt.
        columns: the types of the prompts' own columns, by the name they are written under.
        messages: whether prompts are messages; plain_messages: of nothing but a role and text.
        arguments: whether some have arguments for the chat template.
        left_out: how many rows cannot be used, by reason.
    """

    parts: list[Start]
    rows: int
    prompts: int
    longest: int
    columns: dict[str, str]
    messages: bool
    plain_messages: bool
    arguments: bool
    left_out: dict[str, int]

    def to_record(self) -> dict[str, Any]:
        """As the manifest has it, without the columns."""
        return {
            "parts": [
                {"number": start.document, "file": start.file, "row": start.row, "offset": start.offset} for start in self.parts
            ],
            "rows": self.rows,
            "prompts": self.prompts,
            "longest": self.longest,
            "messages": self.messages,
            "plain_messages": self.plain_messages,
            "arguments": self.arguments,
            "left_out": self.left_out,
        }

    @classmethod
    def from_record(cls, manifest: dict[str, Any]) -> Plan:
        """As a manifest has it."""
        record = manifest["prompts"]
        parts = [Start(part["number"], part["file"], part["row"], 0, part["offset"]) for part in record["parts"]]
        names = ("rows", "prompts", "longest", "messages", "plain_messages", "arguments", "left_out")
        return cls(parts=parts, columns=manifest["columns"], **{name: record[name] for name in names})


def written_name(name: str) -> str:
    """The name that a prompt's own column is written under: no two names become one."""
    plain = name.lower()
    while plain.startswith(GIVEN):
        plain = plain.removeprefix(GIVEN)
    return f"{GIVEN}{name}" if plain in TAKEN else name


def look_through(reader: PromptReader, shard_size: int, skip_bad_rows: bool, *, reporter: Reporter = SILENT) -> Plan:
    """Read all prompts.

    Args:
        reader: of them.
        shard_size: prompts in a file.
        skip_bad_rows: whether rows that cannot be used are left out.
        reporter: hears of progress.

    Raises:
        InputError: a file cannot be read, or a row cannot be used; names the first.
    """
    parts: list[Start] = []
    rows = prompts = longest = 0
    columns: dict[str, str | None] = {}
    messages, plain_messages, arguments = False, True, False
    left_out: Counter[str] = Counter()
    first = ""
    with reporter.progress("looking through the prompts", reader.count, "prompts") as advance:
        for prompt in reader.prompts(Start(0, 0, 1, 0, 0)):
            if rows % shard_size == 0:
                parts.append(prompt.start)
            rows += 1
            advance(1)
            if prompt.problem is not None:
                left_out[prompt.problem.reason] += 1
                first = first or reader.place(prompt)
                continue
            assert prompt.columns is not None and prompt.token_ids is not None
            prompts += 1
            longest = max(longest, len(prompt.token_ids))
            arguments |= bool(prompt.arguments)
            if not isinstance(prompt.content, str):
                messages = True
                plain_messages &= all(
                    message.keys() == PLAIN_MESSAGE and isinstance(message["content"], str) for message in prompt.content
                )
            for name, value in prompt.columns.items():
                kind = NESTED if isinstance(value, list | dict) else column_type(value)
                columns[name] = NESTED if NESTED in (kind, columns.get(name)) else common_type(columns.get(name), kind)
    if left_out and not skip_bad_rows:
        others = left_out.total() - 1
        more = f" ({counted(others, 'more row', 'more rows')} cannot be used)" if others else ""
        raise InputError(f"{first}{more}. Repair the prompts, or pass --skip-bad-rows to leave such rows out")
    if not prompts:
        raise InputError(f"there is no prompt that can be used{f': {first}' if first else ''}")
    own = {written_name(name): kind or "string" for name, kind in columns.items()}
    return Plan(parts, rows, prompts, longest, own, messages, plain_messages, arguments, dict(left_out))
