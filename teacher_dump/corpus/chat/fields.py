"""The words of a conversation, one field at a time, and how to write a conversation again with some of them changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from teacher_dump.corpus.chat.messages import Call, Form, Message

TOOLS = -1  # in place of a message's index: the row's tools

# Kinds of fields.
CONTENT = "content"
REASONING = "reasoning"
TEXT = "text"  # of calls, tools and further fields: words that may stand in JSON
NAME = "name"  # of an argument or a property
VALUE = "value"  # a number or a truth value of an argument, or a number of a tool

# What names a thing, or says of what sort it is, and need not be seen by a teacher.
IDENTIFIERS = frozenset({"id", "tool_call_id", "type", "index"})

# Where templates that know them cut an assistant's content in two; a tag that is not in a template's text cuts nothing.
THINK_TAGS = (("<think>", "</think>"), ("<|channel>", "<channel|>"), ("[THINK]", "[/THINK]"))


class Field(NamedTuple):
    """A place of a conversation where words stand.

    Attributes:
        message: index of the message, or TOOLS.
        name: as a person would look it up: `content`, `tool_calls[0].function.name`.
        kind: CONTENT, REASONING, TEXT, NAME or VALUE.
        piece: counts the pieces of one field.
    """

    message: int
    name: str
    kind: str
    piece: int = 0


Change = Callable[[Field, Any], Any]


def think_tags(template: str) -> re.Pattern[str] | None:
    """What cuts an assistant's content under a template, as a pattern of one group."""
    known = [tag for pair in THINK_TAGS if pair[1] in template for tag in pair]
    return re.compile(f"({'|'.join(map(re.escape, known))})") if known else None


def changed_messages(messages: Iterable[Message], form: Form, change: Change, tags: re.Pattern[str] | None) -> list[Message]:
    """Messages with each field that they have in a form as `change` gives it back."""
    return [_changed_message(message, index, form, change, tags) for index, message in enumerate(messages)]


def changed_tools(tools: list[Any], change: Change) -> list[Any]:
    """Tools with each of their texts, numbers and property names as `change` gives them back."""
    return [_changed(tool, f"tools[{index}]", TOOLS, change, NAME_PARENTS) for index, tool in enumerate(tools)]


# Keys of a schema whose values are objects that people name the members of.
NAME_PARENTS = frozenset({"properties", "$defs", "definitions"})


# Where truth values of a schema are what an argument may be.
_VALUES = re.compile(r"\.(default|const|enum\[\d+\])$")


def _changed_message(message: Message, index: int, form: Form, change: Change, tags: re.Pattern[str] | None) -> Message:
    content, reasoning = message.content, message.reasoning
    if content is not None:
        cuts = tags if message.role == "assistant" else None
        opens = [not any(text.strip() for text in content[:part]) for part in range(len(content))]
        content = tuple(_changed_text(text, index, part, change, cuts, opens[part]) for part, text in enumerate(content))
    if reasoning is not None:
        reasoning = change(Field(index, "reasoning_content", REASONING), reasoning)
    calls = tuple(_changed_call(call, index, number, form, change) for number, call in enumerate(message.calls))
    other = {
        name: value if name in IDENTIFIERS else _changed(value, name, index, change) for name, value in message.other.items()
    }
    return Message(message.role, content, reasoning, calls, other, message.answers, message.target)


def _changed_text(text: str, index: int, part: int, change: Change, cuts: re.Pattern[str] | None, opens: bool) -> str:
    name = "content" if part == 0 else f"content[{part}]"
    pieces: list[str] = cuts.split(text) if cuts is not None else [text]
    thought = opens and begins_with_thought(pieces)
    for place in range(0, len(pieces), 2):
        pieces[place] = change(Field(index, name, REASONING if thought and place == 2 else CONTENT, place), pieces[place])
    return "".join(pieces)


def begins_with_thought(pieces: list[str]) -> bool:
    """Whether content that is split at think tags begins with a thought between two of them. Nothing else in it is reasoning:
    a tag that stands among the words is one of them."""
    return len(pieces) >= 5 and not pieces[0].strip() and (pieces[1], pieces[3]) in THINK_TAGS


def closing_tag_among_words(message: Message, tags: re.Pattern[str] | None) -> tuple[str, str] | None:
    """The pair of think tags of which the closing one stands in an assistant's content, and is no end of a thought that the
    content begins with; None where there is no such tag."""
    if tags is None or message.role != "assistant" or message.content is None:
        return None
    pieces = tags.split("".join(message.content))
    found = pieces[5::2] if begins_with_thought(pieces) else pieces[1::2]
    return next((pair for pair in THINK_TAGS if pair[1] in found), None)


def _changed_call(call: Call, index: int, number: int, form: Form, change: Change) -> Call:
    path = f"tool_calls[{number}].function"
    name, arguments, text = change(Field(index, f"{path}.name", TEXT), call.name), call.arguments, call.text
    if form.arguments_as_text:
        text = change(Field(index, f"{path}.arguments", TEXT), text)
    else:
        arguments = _changed(arguments, f"{path}.arguments", index, change, None)
    other = {
        key: value if key in IDENTIFIERS else _changed(value, f"tool_calls[{number}].{key}", index, change)
        for key, value in call.other.items()
    }
    return Call(name, arguments, text, other)


def _changed(
    value: Any, path: str, index: int, change: Change, named: frozenset[str] | None = frozenset(), names: bool = False
) -> Any:
    """A JSON value with each text changed.

    Args:
        named: keys whose values are objects with names of people's own; None where every object is one, and numbers count.
        names: whether this value is such an object.
    """
    if isinstance(value, str):
        return change(Field(index, path, TEXT), value)
    if isinstance(value, bool | int | float):
        # Of tools, truth values are switches for who calls them (`strict`), and numbers are words (`minimum`).
        counts = named is None or (index == TOOLS and (not isinstance(value, bool) or _VALUES.search(path)))
        return change(Field(index, path, VALUE), value) if counts else value
    if isinstance(value, list):
        return [_changed(item, f"{path}[{place}]", index, change, named) for place, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    record: dict[str, Any] = {}
    properties = value.get("properties") if named and not names else None
    renamed: dict[str, str] = {}
    if isinstance(properties, dict):  # `required` lists their names again
        inner = f"{path}.properties"
        renamed = {name: change(Field(index, f"{inner}.{name}", NAME), name) for name in properties}
    for key, item in value.items():
        inner = f"{path}.{key}"
        if key == "properties" and renamed:
            record[key] = {
                renamed[name]: _changed(property, f"{inner}.{name}", index, change, named) for name, property in item.items()
            }
        elif key == "required" and isinstance(item, list) and all(isinstance(name, str) and name in renamed for name in item):
            record[key] = [renamed[name] for name in item]
        elif named is None or names:
            record[change(Field(index, inner, NAME), key)] = _changed(item, inner, index, change, named)
        elif key in IDENTIFIERS:
            record[key] = item
        else:
            record[key] = _changed(item, inner, index, change, named, key in named)
    return record
