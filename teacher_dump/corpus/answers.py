"""Rows of several answers to one prompt: `chosen` and `rejected`, or `completions`, with what each is worth.

Each answer is read as the completion of a row of `prompt` and `completion`. A row in which no answer can be better than another
has nothing to compare and is refused.
"""

from __future__ import annotations

import math
from typing import Any

from knowledge_store.format.sequences import WINDOW_BITS
from teacher_dump.corpus.columns import (
    CHOSEN,
    COMPLETION,
    COMPLETIONS,
    CUT_OFF,
    ENDINGS,
    FINISH,
    FINISH_REASON,
    Columns,
    Shape,
)
from teacher_dump.corpus.messages import Turns, is_message_list, message_texts, read_messages

# What is plain text where these are.
PLAIN_PARTS = {COMPLETION: ("prompt", "completion"), CHOSEN: ("chosen", "rejected"), COMPLETIONS: ("prompt",)}
SCORES = (1.0, 0.0)  # of what was chosen and what was rejected


def is_plain_text(shape: Shape, record: dict[str, Any], columns: Columns) -> bool:
    """Whether a row's prompt and answers are plain text: final, with no template to see them."""
    parts = PLAIN_PARTS.get(shape, ())
    return bool(parts) and not any(
        columns.is_json(part) or not isinstance(record.get(columns.name(part)), str) for part in parts
    )


def chosen_fields(given: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The prompt, the completions and the scores of a row of `chosen` and `rejected`.

    Raises:
        ValueError: it cannot be used; names the column.
    """
    names = [columns.name(part) for part in CHOSEN.required]
    answers = [_as_list(given[part]) for part in CHOSEN.required]
    prompt = given.get("prompt")
    if all(isinstance(answer, str) for answer in answers):
        if not isinstance(prompt, str):
            raise ValueError(
                f"`{names[0]}` and `{names[1]}` are texts, and nothing says where their prompt ends: put it into a column"
                f" `{columns.name('prompt')}`, as text, name the column that has it (--columns prompt=question), or give lists"
                " of messages"
            )
        return {"prompt": prompt, **scored(answers, SCORES, names)}
    if not all(map(is_message_list, answers)) or not (prompt is None or is_message_list(prompt)):
        both = (
            f"`{columns.name('prompt')}`, `{names[0]}` and `{names[1]}`"
            if "prompt" in given
            else " and ".join(f"`{name}`" for name in names)
        )
        raise ValueError(f"{both} must all be texts, or all lists of messages")
    conversations = [read_messages(answer, name) for answer, name in zip(answers, names, strict=True)]
    if prompt is None:
        turns = _common_beginning(conversations, names, columns)
        conversations = [messages[len(turns) :] for messages in conversations]
    else:
        turns = read_messages(prompt, columns.name("prompt"))
        for messages, name in zip(conversations, names, strict=True):
            if messages[: len(turns)] == turns:
                raise ValueError(f"`{name}` repeats the messages of `{columns.name('prompt')}`: leave one of them out")
    return {"prompt": turns, **scored(conversations, SCORES, names)}


def completions_fields(given: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The same of a row of `completions`, with or without `scores`."""
    prompt, answers = given["prompt"], given["completions"]
    name, prompt_name = columns.name("completions"), columns.name("prompt")
    if not isinstance(answers, list):
        raise ValueError(f"`{name}` is not a list")
    answers = [_as_list(answer) for answer in answers]
    names = [f"`{name}`: answer {number}" for number in range(1, len(answers) + 1)]
    scores = _scores(given.get("scores"), len(answers), columns.name("scores"))
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return {"prompt": prompt, **scored(answers, scores, names)}
    if not is_message_list(prompt) or not all(isinstance(answer, list) for answer in answers):
        raise ValueError(f"`{prompt_name}` and all of `{name}` must be texts, or lists of messages")
    if not all(answers):
        raise ValueError(empty_answer(names[answers.index([])]))
    conversations = [read_messages(answer, f"{name}[{place}]") for place, answer in enumerate(answers)]
    return {"prompt": read_messages(prompt, prompt_name), **scored(conversations, scores, names)}


def scored(answers: list[Any], scores: tuple[float | None, ...], names: list[str]) -> dict[str, Any]:
    """The fields of answers, texts or lists of messages, with their scores and what a row calls them.

    Raises:
        ValueError: there is only one, one is empty, or they are all the same.
    """
    if len(answers) < 2:
        raise ValueError(f"a group of {len(answers)}: of fewer than two answers none is better than another")
    if len(answers) > 1 << WINDOW_BITS:
        raise ValueError(f"more than {1 << WINDOW_BITS:,} answers to one prompt (it has {len(answers):,})")
    for answer, name in zip(answers, names, strict=True):
        if not (answer.strip() if isinstance(answer, str) else answer):
            raise ValueError(empty_answer(name))
    if all(answer == answers[0] for answer in answers):
        raise ValueError("its answers are all the same, so none is better than another")
    return {"completions": tuple(answers), "scores": scores}


def ending(record: dict[str, Any], columns: Columns) -> str | None:
    """How what a model wrote in a row has ended, `stop` or `length`; None where the row does not say.

    Raises:
        ValueError: it says both.
    """
    values = (record.get(columns.name(name)) for name in (FINISH, FINISH_REASON))
    said = {ENDINGS[value.lower()] for value in values if isinstance(value, str) and value.lower() in ENDINGS}
    if len(said) > 1:
        raise ValueError(
            f"`{FINISH}` and `{FINISH_REASON}` say different things: leave one of them out, such as by {FINISH}=- in --columns"
        )
    return next(iter(said), None)


def check_finished(record: dict[str, Any], columns: Columns) -> None:
    """Make sure that no answer of a group was cut off as a model wrote it: its end would be none, and is not to be compared.

    Args:
        record: a row, which may say it in one word or in a list with one for each answer.

    Raises:
        ValueError: one was.
    """
    for name in (FINISH, FINISH_REASON):
        finish = record.get(name)
        for number, value in enumerate(finish if isinstance(finish, list) else [finish], 1):
            if ending({name: value}, columns) == CUT_OFF:
                which = f"answer {number}" if isinstance(finish, list) else "an answer"
                raise ValueError(
                    f"{which} of a group was cut off where it was written (`{name}` is `{value}`): answers that are cut are not"
                    " compared; leave it out of the group"
                )


def _as_list(answer: Any) -> Any:
    """An answer that is one message as a list of it."""
    return [answer] if isinstance(answer, dict) and ("role" in answer or "from" in answer) else answer


def empty_answer(name: str) -> str:
    """Why an answer without words cannot be used, by its column, or by its place in one in quotes already."""
    return f"an answer is empty, so only its end is there to learn: {name if '`' in name else f'`{name}`'}"


def _common_beginning(conversations: list[Turns], names: list[str], columns: Columns) -> Turns:
    """The messages that two conversations begin with alike, which are their prompt."""
    one, other = conversations
    length = min(len(one), len(other))
    same = next((place for place in range(length) if one[place] != other[place]), length)
    if same == len(one) == len(other):
        raise ValueError("its answers are all the same, so none is better than another")
    if same == length:
        raise ValueError(empty_answer(names[0] if len(one) == length else names[1]))
    if not same:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` begin with different messages, so that neither says what the prompt is: put it into"
            f" a column `{columns.name('prompt')}`, as a list of messages"
        )
    return one[:same]


def check_prompt_beside(prompt: str, chosen: Any, prompt_name: str, chosen_name: str) -> None:
    """Make sure that a text `prompt` beside two conversations repeats a message of theirs, as published data sets have it; its
    words would otherwise be lost (ValueError: it does not)."""
    try:
        texts = message_texts(read_messages(chosen, chosen_name))
    except ValueError:
        return  # which is told when the messages are read
    if prompt.strip() not in texts:
        raise ValueError(
            f"`{prompt_name}` is the text of none of the messages of `{chosen_name}`: if these are what counts, say so with"
            f" --columns chosen={chosen_name},rejected=…, or give all three as text or as messages"
        )


def _is_finite(score: float) -> bool:
    """Whether a number is one as a double, too."""
    try:
        return math.isfinite(score)
    except OverflowError:  # an integer of more digits than a double can have
        return False


def _scores(value: Any, count: int, name: str) -> tuple[float | None, ...]:
    """What the answers of a row are worth; without a column of scores, nothing is said of any."""
    if value is None:
        return (None,) * count
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is not a list")
    if len(value) != count:
        raise ValueError(f"`{name}` has another number of entries than there are answers ({len(value)} for {count})")
    for number, score in enumerate(value, 1):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not _is_finite(score):
            raise ValueError(f"`{name}` has an entry that is no finite number: entry {number} is {repr(score)[:30]}")
    scores = tuple(map(float, value))
    if count > 1 and len(set(scores)) == 1:
        raise ValueError(f"all its `{name}` are equal, so no answer is better than another")
    return scores
