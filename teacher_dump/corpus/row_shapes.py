"""What a row holds: which of the known shapes it has, and its content as a document's fields.

A row has one shape, and says so by its columns alone. Where they fit two, or would leave a prompt unread, the row is refused,
and `--columns` says what counts. All columns that a shape does not take stay beside the row's sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from teacher_dump.corpus.answers import (
    SCORES,
    check_finished,
    check_prompt_beside,
    chosen_fields,
    completions_fields,
    empty_answer,
    ending,
    is_plain_text,
    scored,
)
from teacher_dump.corpus.columns import (
    ALPACA_CHOSEN,
    CHAT_COLUMNS,
    CHOSEN,
    COMPLETION,
    COMPLETIONS,
    CUT_OFF,
    FINISH,
    GROUPS,
    LEFT_OUT,
    MAY_BE_BLANK,
    MESSAGES,
    OWN_NAMES,
    SHAPES,
    SHAREGPT,
    STOPPED,
    TEMPLATE_COLUMNS,
    TEXT,
    TOKENS,
    UNSEEN,
    Columns,
    Shape,
)
from teacher_dump.corpus.json_text import json_value
from teacher_dump.corpus.messages import Turns, is_message_list, message_texts, read_messages
from teacher_dump.corpus.token_rows import check_prompt_length, token_content

# Of a row of `prompt`, `completion` and `label`, as TRL's KTOTrainer reads them. Where a model wrote the completion, `label` is
# one of its prompt's columns.
REJECTED = (
    "`label` is false, as of a completion that was rejected, and a student would learn to write it: --skip-bad-rows leaves such"
    " rows out; to read them, give the column another name"
)


# Of a row of `prompt`, `completions` and `labels`, as TRL's PRMTrainer reads them.
STEPS = (
    "`labels` says which of its `completions` are right, as of the steps of one answer, and several answers to one prompt were"
    " to be compared: put the steps together as a `completion`, or, where they are answers, say --columns"
    " completions=completions"
)


@dataclass(frozen=True)
class Content:
    """The content of a row.

    Attributes:
        fields: those of a Document: text; prompt and completion; prompt, completions and scores; messages; token_ids and
            is_target; template_arguments; finish.
        columns: the row's other columns.
    """

    fields: dict[str, Any]
    columns: dict[str, Any]


def read_content(record: dict[str, Any], columns: Columns = OWN_NAMES) -> Content:
    """The content of a row.

    Raises:
        ValueError: why it has none that can be used; names the column, and the message and its field.
    """
    shape = columns.shape or _shape_by_presence(record, columns)
    # A prompt and completion in plain text are final: no template sees them, and `tools` beside them is a column as any other.
    plain_text = is_plain_text(shape, record, columns)
    if shape not in (TEXT, TOKENS) and not (shape is COMPLETION and _is_written(record)):
        check_seen(record, columns, tools=not plain_text)
    parts = (*shape.required, *columns.optional(shape))
    if plain_text:
        check_system(record, columns)
        parts = tuple(part for part in parts if part not in CHAT_COLUMNS)
    if shape is CHOSEN and not plain_text and isinstance(record.get(columns.name("prompt")), str):
        parts = _without_repeated_prompt(parts, record, columns)
    given: dict[str, Any] = {}
    for part in parts:
        value = record.get(columns.name(part))
        if value is None:
            if part in shape.required:
                raise ValueError(missing_column(part, shape, record, columns))
        elif isinstance(value, str) and columns.is_json(part):
            read = column_value(value, part, columns)
            if read is not None or part not in MAY_BE_BLANK:
                given[part] = read
        else:
            given[part] = value
    if shape is TOKENS:
        check_prompt_length(record, given, columns)
    taken = {columns.name(part) for part in parts}
    others = {name: value for name, value in record.items() if name not in taken}
    if shape in GROUPS:
        check_finished(others, columns)
    labels = others.get("labels")
    steps = isinstance(labels, list) and bool(labels) and all(isinstance(label, bool) for label in labels)
    if shape is COMPLETIONS and steps and "scores" not in given and "completions" not in columns.names:
        raise ValueError(STEPS)
    if shape is COMPLETION and not _is_written(others) and str(others.get("label")).lower() == "false":
        raise ValueError(REJECTED)
    finish = None if shape in (TOKENS, *GROUPS) else ending(others, columns)  # tokens are given with their end, or without
    if finish is None:
        return Content(_fields(shape, given, plain_text, columns), others)
    return Content({**_fields(shape, given, plain_text, columns, written=True), "finish": finish}, others)


def check_system(record: dict[str, Any], columns: Columns) -> None:
    """Make sure that no words of a `system` column are lost beside a prompt of plain text (ValueError: they would be)."""
    system = record.get(name := columns.name("system"))
    if _is_written(record) or not isinstance(system, str) or not system.strip():
        return
    raise ValueError(
        f"`{name}` stands beside a prompt of plain text, which is final, so that no teacher would see it: write the row as"
        " `messages`, or, where the rest alone counts, leave it out with system=- in --columns"
    )


def _is_written(record: dict[str, Any]) -> bool:
    """Whether `teacher-dump generate` wrote a row's completion: its model saw the prompt as it is."""
    return record.get(FINISH) in (STOPPED, CUT_OFF)


def column_value(text: str, part: str, columns: Columns) -> Any:
    """The value that JSON text in a column stands for (ValueError: it is no JSON)."""
    if part in MAY_BE_BLANK and not text.strip():
        return None
    try:
        return json_value(text)
    except ValueError as error:
        way_out = f"; where it is no {part}, leave it out with {part}=- in --columns" if part in TEMPLATE_COLUMNS else ""
        raise ValueError(f"`{columns.name(part)}` is text that is {error}{way_out}") from None


def _without_repeated_prompt(parts: tuple[str, ...], record: dict[str, Any], columns: Columns) -> tuple[str, ...]:
    """The parts of a row of two conversations without a `prompt` of text beside them, which is no part of them."""
    if columns.is_json("prompt"):
        return parts
    if "chosen" not in columns.names:  # else `--columns` says that these are what counts
        names = [columns.name(part) for part in ("prompt", "chosen")]
        check_prompt_beside(record[names[0]], record[names[1]], *names)
    return tuple(part for part in parts if part != "prompt")


def _shape_by_presence(record: dict[str, Any], columns: Columns) -> Shape:
    names = {name for name, value in record.items() if value is not None}
    shapes = columns.shapes(names)
    if len(shapes) > 1:
        ways = " or ".join(f"--columns {_own_names(shape, columns)}" for shape in shapes[:2])
        raise ValueError(f"it fits two shapes, {shapes[0].name} and {shapes[1].name}: say which counts with {ways}")
    halves = [part for part in COMPLETION.required if part in names and columns.name(part) != LEFT_OUT]
    if halves and shapes:
        halves = [part for part in halves if part not in (*shapes[0].required, *shapes[0].optional)]
    if not shapes and columns.deciding:
        return columns.candidates[0]  # of which it is told what is missing
    if not shapes:
        raise ValueError(_no_shape(record, halves))
    if halves:
        _check_half(record, halves, shapes[0])
    return shapes[0]


def _check_half(record: dict[str, Any], halves: list[str], shape: Shape) -> None:
    """Make sure that a `prompt` beside messages repeats one of them, as some published data sets have it; its words would
    otherwise be lost."""
    if halves == ["prompt"] and shape in (MESSAGES, SHAREGPT) and isinstance(record["prompt"], str):
        value = record[shape.required[0]]
        try:
            messages = read_messages(json_value(value) if isinstance(value, str) else value, shape.required[0])
        except ValueError:
            return  # which is told when the messages are read
        if record["prompt"].strip() in message_texts(messages):
            return
        raise ValueError(
            f"`prompt` is the text of none of its `{shape.required[0]}`: if these are what counts, say so with"
            f" --columns {_own_names(shape, OWN_NAMES)}"
        )
    other = "completion" if halves == ["prompt"] else "prompt"
    raise ValueError(
        f"both {_quoted(shape.required)} and `{halves[0]}` without `{other}`: say what counts with"
        f" --columns {_own_names(shape, OWN_NAMES)}"
    )


def check_seen(record: dict[str, Any], columns: Columns, *, tools: bool) -> None:
    """Make sure that nothing stands beside a conversation that its teacher would have to see, and does not.

    Args:
        record: the row.
        columns: its own names for columns.
        tools: whether a template sees the row, which may be given tools.

    Raises:
        ValueError: something does; names its column.
    """
    for name, why in UNSEEN.items():
        if name == "functions" and not tools:
            continue
        if not _is_nothing(record.get(columns.name(name))) and name not in map(columns.name, columns.names):
            raise ValueError(
                f"`{name}` is part of the conversation, and {why}; where the words alone count, {name}=- in --columns makes"
                " it a column as any other"
            )


def _is_nothing(value: Any) -> bool:
    """Whether a value is empty, however it is written: as blank or JSON text, or in lists and objects of nothing."""
    if isinstance(value, (list, dict)):
        return all(map(_is_nothing, value.values() if isinstance(value, dict) else value))
    return value.strip() in ("", "null", "[]", "{}") if isinstance(value, str) else not value


def _no_shape(record: dict[str, Any], halves: list[str]) -> str:
    if sum(record.get(part) is not None for part in CHOSEN.required) == 1:
        return "`chosen` and `rejected` must both be given"
    whole = [shape for shape in SHAPES if {*halves} & {*shape.required, *shape.optional} and {*shape.required} <= record.keys()]
    parts = dict.fromkeys(part for shape in (whole if halves else SHAPES) for part in shape.required)
    if nulls := [part for part in parts if part in record and record[part] is None]:
        return f"{_quoted(nulls)} {'is' if len(nulls) == 1 else 'are'} null"
    if halves:
        return (
            "`prompt` and `completion` must both be given, both strings or both lists of messages. Columns of other names are"
            " read with --columns, as in --columns prompt=prompt,completion=response"
        )
    names = sorted(record)[:6]
    columns = f" (it has {_quoted(names)}{' and more' if len(record) > len(names) else ''})" if names else ""
    return (
        f"none of the columns that a row is read by{columns}: `text`, `prompt` and `completion`, `messages`, `conversations`,"
        " `instruction` and `output`, `input_ids`, `chosen` and `rejected`, or `prompt` and `completions`. Columns of other"
        " names are read with --columns, as in --columns prompt=question,completion=answer"
    )


def missing_column(part: str, shape: Shape, record: dict[str, Any], columns: Columns) -> str:
    name = columns.name(part)
    why = "is null" if name in record else "is not there"
    return f"`{name}` {why}, which --columns makes the {part} of {shape.name}" if name != part else f"`{name}` {why}"


def _quoted(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _own_names(shape: Shape, columns: Columns) -> str:
    return ",".join(f"{part}={columns.name(part)}" for part in shape.required)


def _fields(shape: Shape, given: dict[str, Any], plain_text: bool, columns: Columns, written: bool = False) -> dict[str, Any]:
    """The content by a shape; `written`: a model wrote the completion, which may be empty."""
    if shape is TOKENS:
        return token_content(given)
    if shape is TEXT:
        return {"text": _text(given, "text", columns)}
    arguments = {} if plain_text else {"template_arguments": template_arguments(given, columns)}
    if shape in (CHOSEN, COMPLETIONS):
        group = (chosen_fields if shape is CHOSEN else completions_fields)(given, columns)
        return (group if plain_text else _with_system(group, "prompt", given, columns)) | arguments
    if plain_text:
        if not written:
            _check_words(given, "completion", columns)
        return {"prompt": given["prompt"], "completion": given["completion"]}
    if shape is COMPLETION:
        if not (is_message_list(given["prompt"]) and is_message_list(given["completion"])):
            names = _quoted([columns.name(part) for part in COMPLETION.required])
            raise ValueError(f"{names} must both be given, both strings or both lists of messages")
        messages = {part: read_messages(given[part], columns.name(part)) for part in COMPLETION.required}
        return _with_system(messages, "prompt", given, columns) | arguments
    if shape in (MESSAGES, SHAREGPT):
        [part] = shape.required
        messages = {"messages": read_messages(given[part], columns.name(part))}
        return _with_system(messages, "messages", given, columns) | arguments
    prompt, answers = _alpaca_prompt(given, columns), [part for part in shape.required if part != "instruction"]
    for part in answers:
        _check_words(given, part, columns)
    turns = [{"role": "assistant", "content": given[part]} for part in answers]
    if shape is ALPACA_CHOSEN:
        scores = scored([[turn] for turn in turns], SCORES, [columns.name(part) for part in answers])
        return {"prompt": prompt, **scores} | arguments
    return {"messages": [*prompt, *turns]} | arguments


def _text(given: dict[str, Any], part: str, columns: Columns) -> str:
    value = given.get(part, "")
    if not isinstance(value, str):
        raise ValueError(f"`{columns.name(part)}` is not a string")
    return value


def _check_words(given: dict[str, Any], part: str, columns: Columns) -> None:
    """Make sure that there is something to learn: without words, the only target would be the token that ends the sequence."""
    if not _text(given, part, columns).strip():
        raise ValueError(empty_answer(f"`{columns.name(part)}`"))


def _with_system(fields: dict[str, Any], field: str, given: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The fields of messages, the first of which a `system` column may be."""
    if not isinstance(fields[field], list):
        return fields
    return {**fields, field: [*system_turns(given, fields[field], columns), *fields[field]]}


def system_turns(given: dict[str, Any], messages: Turns, columns: Columns) -> Turns:
    """A `system` column as the first message; one that is empty is none."""
    system, name = given.get("system", ""), columns.name("system")
    if not isinstance(system, str):
        raise ValueError(f"`{name}` is not a string: where it is no message, leave it out with system=- in --columns")
    if not system.strip():
        return []
    if messages and messages[0].get("role") == "system":
        if message_texts(messages[:1]) == [system.strip()]:
            return []
        raise ValueError(
            f"`{name}` and a first message of the role `system` say different things: keep one of them, or leave the column out"
            " with system=- in --columns"
        )
    return [{"role": "system", "content": system}]


def _alpaca_prompt(given: dict[str, Any], columns: Columns) -> Turns:
    """The messages before the answer."""
    instruction, words = (_text(given, part, columns) for part in ("instruction", "input"))
    question = instruction + "\n" + words if instruction and words else instruction or words
    turns: list[tuple[str, str]] = []
    history = given.get("history", [])
    for number, pair in enumerate(history if isinstance(history, list) else [None], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(words, str) for words in pair)):
            raise ValueError(f"`{columns.name('history')}` must be a list of pairs of strings (entry {number} is none)")
        turns.append((pair[0], pair[1]))
    return [
        *system_turns(given, [], columns),
        *({"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)),
        {"role": "user", "content": question},
    ]


def template_arguments(given: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """What goes to the chat template beside the messages."""
    arguments, tools = given.get("chat_template_kwargs", {}), given.get("tools", [])
    way_out = "; where it holds none, leave it out with tools=- in --columns"
    if not isinstance(arguments, dict):
        raise ValueError(f"`{columns.name('chat_template_kwargs')}` is not an object")
    if "tools" in arguments:
        raise ValueError(
            f"`{columns.name('chat_template_kwargs')}` has `tools`: give them as the row's `{columns.name('tools')}`"
        )
    if not isinstance(tools, list):
        raise ValueError(f"`{columns.name('tools')}` is not a list{way_out}")
    described = []
    for number, tool in enumerate(tools, 1):
        unusable = f"`{columns.name('tools')}` has an entry that cannot be used: tool {number}"
        try:
            tool = json_value(tool) if isinstance(tool, str) else tool
        except ValueError as error:
            raise ValueError(f"{unusable} is text that is {error}{way_out}") from None
        if not isinstance(tool, dict):
            raise ValueError(f"{unusable} is not an object{way_out}")
        described.append(tool)
    return {**arguments, "tools": described} if described else dict(arguments)
