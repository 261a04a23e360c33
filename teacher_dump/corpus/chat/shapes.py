"""Conversations in outline: rendered with short words in place of their own, once for all rows of one shape.

What a template puts around the words of a message depends on the shape of the conversation and not on the words, or else a
rendering with marks shows that it does. So what is found out with an outline holds for every row of that shape.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from teacher_dump.corpus.chat.fields import NAME, VALUE, Change, Field, changed_messages, changed_tools
from teacher_dump.corpus.chat.marks import Marked, Marks
from teacher_dump.corpus.chat.messages import Form, Message
from teacher_dump.corpus.chat.rendering import Renderer
from teacher_dump.corpus.rows import BadRow

REMEMBERED = 4096  # renderings

USER = Message("user", ("word",))
ASSISTANT = Message("assistant", ("word",))


@dataclass(frozen=True)
class ChatRow:
    """What a row gives a chat template: its messages, its tools, further arguments, and what cuts the assistant's content."""

    messages: list[Message]
    tools: list[Any] | None
    arguments: dict[str, Any]
    tags: Any

    def changed(self, form: Form, change: Change) -> ChatRow:
        """The row with each field of its messages and tools as `change` gives it back."""
        tools = changed_tools(self.tools, change) if self.tools else self.tools
        return replace(self, messages=changed_messages(self.messages, form, change, self.tags), tools=tools)

    def outline(self, form: Form, values: bool = False) -> ChatRow:
        """The row with a short word in place of each text of its messages; names of calls and arguments stay.

        Args:
            values: whether numbers are replaced too.
        """

        def change(place: Field, value: Any) -> Any:
            if place.kind == VALUE:
                return value if not values else True if isinstance(value, bool) else type(value)(1)
            core = value.strip()
            if place.kind == NAME or not core or place.name.endswith("function.name"):
                return value
            return value.replace(core, "word", 1) if len(core) < len(value) else "word"

        messages = changed_messages(self.messages, form, change, self.tags)
        return replace(self, messages=messages)

    def identifiers(self) -> set[str]:
        """The texts that name its messages and calls."""
        return {
            value
            for message in self.messages
            for record in (message.other, *(call.other for call in message.calls))
            for name, value in record.items()
            if name in ("id", "tool_call_id") and isinstance(value, str)
        }

    def with_numbered_identifiers(self) -> ChatRow:
        """The row with a number in place of each identifier, alike where they were alike."""
        numbers: dict[str, str] = {}

        def numbered(record: dict[str, Any]) -> dict[str, Any]:
            return {
                name: numbers.setdefault(value, f"{len(numbers):09d}")
                if name in ("id", "tool_call_id") and isinstance(value, str)
                else value
                for name, value in record.items()
            }

        messages = [
            replace(
                message,
                calls=tuple(replace(call, other=numbered(call.other)) for call in message.calls),
                other=numbered(message.other),
            )
            for message in self.messages
        ]
        return replace(self, messages=messages)

    def excerpt(self, index: int) -> tuple[ChatRow, int]:
        """The messages that what stands around one message can depend on, and its index among them: a system prompt, the
        question before it, the call and the results just before it, what follows it directly, and the last question of all."""
        roles = [message.role for message in self.messages]
        users = [place for place, role in enumerate(roles) if role == "user"]
        kept = {0, index} if roles[0] in ("system", "developer") else {index}
        kept.update([place for place in users if place < index][-1:], users[-1:] if users and users[-1] > index else [])
        before, after = index - 1, index + 1
        while before > 0 and roles[before] == "tool":
            kept.add(before)
            before -= 1
        while after < len(roles) and roles[after] == "tool":
            kept.add(after)
            after += 1
        kept.update(place for place in (before, index + 1) if 0 <= place < len(roles))
        places = sorted(kept)
        return replace(self, messages=[self.messages[place] for place in places]), places.index(index)

    def first(self, count: int, *further: Message) -> ChatRow:
        """The first messages of the row, and further ones."""
        return replace(self, messages=[*self.messages[:count], *further])


class Shapes:
    """Renderings of outlines, remembered.

    Args:
        renderer: of the template.
    """

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._known: OrderedDict[Any, Any] = OrderedDict()

    def marked(self, row: ChatRow, form: Form, prompt: bool = False) -> Marked | None:
        """A row rendered with marks; None where the template refuses it, or has no messages to render."""

        def render() -> Marked | None:
            marks = Marks()
            try:
                changed = row.changed(form, marks.change)
                return Marked(self._renderer.render(changed.messages, form, changed.tools, changed.arguments, prompt), marks)
            except BadRow:
                return None

        return self._remembered(("marked", prompt, *_key(row, form)), render) if row.messages else None

    def shows(self, row: ChatRow, form: Form, place: Field) -> bool:
        """Whether a field is in the text: another value there makes another text."""

        def change(field: Field, value: Any) -> Any:
            if field != place:
                return value
            if place.kind == VALUE:
                return not value if isinstance(value, bool) else value + 1
            return f"{value}other"

        def differ() -> bool:
            try:
                texts = [
                    self._renderer.render(version.messages, form, version.tools, version.arguments)
                    for version in (row, row.changed(form, change))
                ]
            except BadRow:
                return False
            return texts[0] != texts[1]

        return bool(self._remembered(("shows", place, *_key(row, form)), differ))

    def _remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        value = self._known[key] = make()
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return value


def _key(row: ChatRow, form: Form) -> tuple[Any, ...]:
    return form, tuple(map(repr, row.messages)), json.dumps([row.tools, row.arguments], sort_keys=False, default=repr)
