"""Messages as rows have them, judged, and in the forms that chat templates ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from teacher_dump.corpus.rows import BadRow

# Names that a message's reasoning goes by; transformers gives a template the first of them under every name it asks for.
REASONING = ("reasoning_content", "thinking", "reasoning")
TRAINING = ("weight", "train")
# What other programs call the same. None of them is guessed at: a loss that is false is no mask that is true.
OTHER_TRAINING = ("loss", "loss_weight", "mask", "masked", "trainable", "training", "train_detail")
ARGUMENTS = ("args", "input", "parameters", "params", "kwargs")  # what other programs call a call's arguments


@dataclass(frozen=True)
class Form:
    """How the same messages may be written; a template takes one form or another.

    Attributes:
        parts: content is a list of text parts; otherwise text.
        empty_content: a message without content has empty content; otherwise none at all.
        arguments_as_text: the arguments of a call are JSON text; otherwise an object.
    """

    parts: bool = False
    empty_content: bool = False
    arguments_as_text: bool = False


@dataclass(frozen=True)
class Call:
    """A call of a tool: its name, its arguments as an object and as text, and what else the row says of it."""

    name: str
    arguments: dict[str, Any]
    text: str
    other: dict[str, Any]

    def record(self, form: Form) -> dict[str, Any]:
        """As a template gets it."""
        arguments = self.text if form.arguments_as_text else self.arguments
        return {"type": "function", **self.other, "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: as the row says it.
        content: its parts, of which most messages have one; None where it has no content.
        reasoning: what the assistant thought; None without.
        calls: of tools.
        other: further fields.
        answers: name of the call that a tool answers, where the row repeats it.
        target: whether it may be a target; None where the row does not say.
    """

    role: str
    content: tuple[str, ...] | None
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    other: dict[str, Any] = field(default_factory=dict)
    answers: str | None = None
    target: bool | None = None

    def record(self, form: Form) -> dict[str, Any]:
        """As a template gets it."""
        record: dict[str, Any] = {"role": self.role}
        texts = () if self.content is None and form.empty_content else self.content
        if texts is not None:
            record["content"] = [{"type": "text", "text": text} for text in texts] if form.parts else "".join(texts)
        if self.reasoning is not None:
            record["reasoning_content"] = self.reasoning
        if self.calls:
            record["tool_calls"] = [call.record(form) for call in self.calls]
        if self.answers is not None:
            record["name"] = self.answers
        return {**record, **self.other}

    @property
    def has_words(self) -> bool:
        """Whether it says anything."""
        return bool(self.calls) or any(text.strip() for text in (*(self.content or ()), self.reasoning or ""))


def messages_of(records: list[dict[str, Any]]) -> list[Message]:
    """A row's messages.

    Raises:
        BadRow: one of them cannot be used; names message, role and field.
    """
    messages = []
    for number, record in enumerate(records, 1):
        try:
            messages.append(_message(record))
        except ValueError as error:
            raise BadRow(f"a message cannot be used: message {number} ({record.get('role')}): {error}") from None
    names = {call.name for message in messages for call in message.calls}
    return [_without_call_name(message, names) for message in messages]


def forms(messages: list[Message]) -> Iterator[Form]:
    """The forms that these messages may have, likeliest first."""
    without_content = any(message.content is None for message in messages)
    with_arguments = any(call.arguments for message in messages for call in message.calls)
    for arguments_as_text in (False, True) if with_arguments else (False,):
        for parts in (False, True):
            for empty_content in (False, True) if without_content else (False,):
                yield Form(parts, empty_content, arguments_as_text)


def _without_call_name(message: Message, names: set[str]) -> Message:
    """The `name` of a tool's answer says which call it answers, and is no words of its own: templates know it from the call."""
    name = message.other.get("name")
    if message.role != "tool" or not isinstance(name, str) or name not in names:
        return message
    return replace(message, answers=name, other={key: value for key, value in message.other.items() if key != "name"})


def _message(record: dict[str, Any]) -> Message:
    given = {name: value for name, value in record.items() if value is not None}
    role = given.pop("role")
    content = given.pop("content", None)
    texts = None if content is None else _texts(content, "content")
    calls = given.pop("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("`tool_calls` is not a list of objects")
    message = Message(
        role=role,
        content=texts,
        reasoning=_reasoning(given),
        calls=tuple(_call(call, f"tool_calls[{index}]") for index, call in enumerate(calls)),
        target=_target(given, role),
        other={name: value for name, value in given.items() if name not in (*REASONING, *TRAINING)},
    )
    if flags := [name for name in OTHER_TRAINING if not isinstance(message.other.get(name), str | None)]:
        raise ValueError(
            f"`{flags[0]}` is not read here: `train`, true or false, says whether a message is a target; call it that, or"
            " remove it"
        )
    if "function_call" in message.other:
        raise ValueError("`function_call` is an old form of a call, which no template shows: write it as `tool_calls`")
    if not message.has_words and content is None:
        raise ValueError("it has neither `content` nor `tool_calls`: give it content, or remove it")
    return message


def _texts(value: Any, field: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"`{field}` is neither text nor a list of parts")
    for part in value:
        if isinstance(part, dict) and part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise ValueError(
                f"`{field}` has a part of type `text` whose `text` is {'no text' if 'text' in part else 'not there'}"
            )
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"`{field}` has a part of type `{kind}`, and only parts of type `text` can be used")
        others = [name for name, value in part.items() if name not in ("type", "text") and value is not None]
        if others:
            raise ValueError(f"a part of `{field}` has the field `{others[0]}`, which no template would show: remove it")
    return tuple(part["text"] for part in value)


def _reasoning(given: dict[str, Any]) -> str | None:
    texts = {name: "".join(_texts(given[name], name)) for name in REASONING if name in given}
    if len(set(texts.values())) > 1:
        raise ValueError(f"{' and '.join(f'`{name}`' for name in texts)} say different things: keep one of them")
    return next(iter(texts.values()), None)


def _target(given: dict[str, Any], role: str) -> bool | None:
    weight, train = given.get("weight"), given.get("train")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"`weight` is {weight!r}, and can be 0 or 1: a message is a target or it is not")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"`train` is {train!r}, and can be true or false")
    wanted = {bool(value) for value in (weight, train) if value is not None}
    if len(wanted) > 1:
        raise ValueError("`weight` and `train` contradict each other")
    if True in wanted and role != "assistant":
        raise ValueError("it is to be a target, and only messages of the role `assistant` can be: remove `weight` and `train`")
    return next(iter(wanted), None)


def _call(record: dict[str, Any], field: str) -> Call:
    function = record.get("function")
    inner = function if isinstance(function, dict) else record
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"`{field}` has no `name`")
    arguments, text = _arguments(inner.get("arguments"), f"{field}.function.arguments")
    given = [(key, part) for part in (inner, record) for key in ARGUMENTS if part.get(key) not in (None, {}, [], "")]
    if inner is function and record.get("arguments") not in (None, {}, ""):
        given.append(("arguments", record))
    if given:
        key = given[0][0] if given[0][1] is inner else f"{given[0][0]}` beside its `function"
        raise ValueError(f"`{field}` has `{key}`: a call has its arguments as `arguments`, beside its `name`, and no other")
    outer = {key: value for key, value in record.items() if key != "function" or value is not function}
    other = {**outer, **inner} if inner is function else outer
    return Call(
        name, arguments, text, {k: value for k, value in other.items() if k not in ("name", "arguments") and value is not None}
    )


def _arguments(value: Any, field: str) -> tuple[dict[str, Any], str]:
    if value is None or value == "":
        return {}, "{}"
    if isinstance(value, dict):
        return value, json.dumps(value, ensure_ascii=False)
    try:
        parsed = json.loads(value, object_pairs_hook=_object) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{field}` is not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"`{field}` is not an object")
    return parsed, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice in one object")
    return dict(pairs)
