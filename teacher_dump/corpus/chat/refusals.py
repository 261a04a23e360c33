"""What of a row makes a chat template fail: found by giving it the row with less in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from teacher_dump.corpus.chat.messages import Form, Message
from teacher_dump.corpus.chat.rendering import Renderer, TemplateRefusal
from teacher_dump.corpus.chat.shapes import ChatRow
from teacher_dump.corpus.rows import BadRow

MAX_MESSAGES = 64  # a template is asked again for each
ASKED_OF_TOOLS = ("description", "parameters")  # fields that templates expect of a tool


class Refusals:
    """Explains why a template fails.

    Args:
        renderer: of the template.
    """

    def __init__(self, renderer: Renderer):
        self._renderer = renderer

    def explained(self, row: ChatRow, refusals: list[tuple[Form, TemplateRefusal]]) -> BadRow:
        """What a template fails on in a row's every form: the field, where one alone is to blame, and the way out."""
        for form, refusal in refusals:
            found = self._explained(row, form, refusal)
            if found is not None:
                return found
        # What a template says itself is nearer to the row than what fails in a form that it was not made for.
        refusal = min(refusals, key=lambda item: (" object" in item[1].error, not item[0].empty_content))[1]
        return BadRow(f"the chat template refuses it: {refusal.error}; name another template with --chat-template")

    def _explained(self, row: ChatRow, form: Form, refusal: TemplateRefusal) -> BadRow | None:
        if row.tools and self._renders(replace(row, tools=None), form):
            return self._tools(row, row.tools, form, refusal)
        found = self._message(row, form) if len(row.messages) <= MAX_MESSAGES else None
        if found is None:
            return None
        index, field = found
        message = row.messages[index]
        place = f"message {index + 1} ({message.role}), `{field}`"
        if field == "content" and message.content is None:
            return BadRow(
                f"the chat template needs content: {place} is not there ({refusal.error}); give the message content, or name"
                " another template with --chat-template"
            )
        return BadRow(
            f"the chat template refuses a field of a message: {place} ({refusal.error}); name another template with"
            " --chat-template, or remove the field"
        )

    def _tools(self, row: ChatRow, tools: list[Any], form: Form, refusal: TemplateRefusal) -> BadRow:
        for index, tool in enumerate(tools):
            function = tool.get("function")
            for name in ASKED_OF_TOOLS if isinstance(function, dict) else ():
                added = {**function, name: function.get(name) or ({} if name == "parameters" else "word")}
                if name not in function and self._renders(replace(row, tools=[{**tool, "function": added}]), form):
                    return BadRow(
                        f"the chat template needs a field of a tool: `tools[{index}].function.{name}` is not there"
                        f" ({refusal.error}); add it, or name another template with --chat-template"
                    )
        alone = [index for index, tool in enumerate(tools) if not self._renders(replace(row, tools=[tool]), form)]
        place = f"`tools[{alone[0]}]`" if alone else "`tools`"
        return BadRow(
            f"the chat template refuses a tool: {place} ({refusal.error}); name another template with --chat-template, or"
            " remove the tool"
        )

    def _message(self, row: ChatRow, form: Form) -> tuple[int, str] | None:
        """The first message that makes the template fail, and its field; None where content and roles alone do."""
        plain = [Message(message.role, message.content or ("word",)) for message in row.messages]
        if not self._renders(replace(row, messages=plain), form):
            return None
        for index, message in enumerate(row.messages):
            for field, restored in _restored(plain[index], message):
                if not self._renders(replace(row, messages=[*plain[:index], restored, *plain[index + 1 :]]), form):
                    return index, field
        return None

    def _renders(self, row: ChatRow, form: Form) -> bool:
        try:
            self._renderer.render(row.messages, form, row.tools, row.arguments)
        except BadRow:
            return False
        return True


def _restored(plain: Message, message: Message) -> Iterator[tuple[str, Message]]:
    """A message with one of its fields given back after another."""
    if message.content is None:
        yield "content", replace(plain, content=None)
    if message.calls:
        yield "tool_calls", replace(plain, calls=message.calls)
    if message.reasoning is not None:
        yield "reasoning_content", replace(plain, reasoning=message.reasoning)
    for name, value in message.other.items():
        yield name, replace(plain, other={name: value})
