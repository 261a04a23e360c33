"""Lists of messages as rows hold them: checked, and brought to the form of a chat template, with every field kept.

What a message's fields mean (content in parts, calls, reasoning, weights) is judged where a template renders them.
"""

from __future__ import annotations

from typing import Any

from teacher_dump.corpus.json_text import json_value

Turns = list[dict[str, Any]]

# The names that ShareGPT and the tools that read it give to who speaks.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
# Names that are given to the assistant in place of its role, as which no template knows it.
OTHER_NAMES = frozenset({"bot", "ai", *(name for name, role in SHAREGPT_ROLES.items() if role == "assistant")})
_CALLS = ("function_call", "tool_call")


def is_message_list(value: Any) -> bool:
    """Whether a value is a list of objects, as conversations are, and not text."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def read_messages(value: Any, column: str) -> Turns:
    """The messages of a column, each with `role`; those of ShareGPT (`from`, `value`) become such.

    Raises:
        ValueError: naming the column, the message and its field.
    """
    if not isinstance(value, list):
        raise ValueError(f"`{column}` must be a list of messages and is {_kind_of(value)}")
    if not value:
        raise ValueError(f"`{column}` must be a list of messages and is empty")
    return [
        _read_message(message, f"`{column}` has a message that cannot be used: message {number}")
        for number, message in enumerate(value, 1)
    ]


def _read_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {_kind_of(message)}, not an object")
    if message.get("from") is not None and message.get("role") is None:
        return _sharegpt_message(message, place)
    role = message.get("role")
    if role is None:
        raise ValueError(f"{place} has no `role`")
    if not isinstance(role, str):
        raise ValueError(f"{place}: its `role` is {_kind_of(role)}, not text")
    return message


def _sharegpt_message(message: dict[str, Any], place: str) -> dict[str, Any]:
    name = message["from"]
    speaker = name.lower() if isinstance(name, str) else ""
    if speaker not in SHAREGPT_ROLES:
        found = repr(name) if isinstance(name, str) else _kind_of(name)
        raise ValueError(f"{place}: its `from` is none of {', '.join(SHAREGPT_ROLES)} ({found})")
    if "value" not in message:
        raise ValueError(f"{place} ({speaker}) has no `value`")
    if taken := [name for name in ("content", "tool_calls") if message.get(name) is not None]:
        raise ValueError(f"{place} ({speaker}) has `{taken[0]}` beside `value`")
    others = {name: value for name, value in message.items() if name not in ("from", "value", "role", "content", "tool_calls")}
    if speaker in _CALLS:
        return {"role": "assistant", "tool_calls": _calls(message["value"], f"{place} ({speaker})"), **others}
    return {"role": SHAREGPT_ROLES[speaker], "content": message["value"], **others}


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Calls as ShareGPT has them: an object with `name` and `arguments`, or several, mostly as JSON text."""
    if isinstance(value, str):
        try:
            value = json_value(value)
        except ValueError as error:
            raise ValueError(f"{place}: its `value` is {error}") from None
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise ValueError(f"{place}: its `value` is no object with `name` and `arguments`")
    if not calls:
        raise ValueError(f"{place}: its `value` has no call")
    return [{"type": "function", "function": call} for call in calls]


def message_texts(messages: Turns) -> list[str]:
    """The texts of messages, those in parts put together, without white space at their ends."""
    texts = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if isinstance(content, str):
            texts.append(content.strip())
    return texts


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
