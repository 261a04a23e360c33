"""The chat templates people use, with conversations of many shapes: used with the right targets, or refused.

A part of what `python -m benchmarks.chat_templates` looks at whole.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from benchmarks.chat_templates import SHAPES, Judge, Shape, conversation, names, table_row
from teacher_dump.corpus.chat.template import ChatTemplate
from teacher_dump.corpus.rows import BadRow

PER_TEMPLATE = 5


@cache
def judge(name: str, sentencepiece: bool = False) -> Judge:
    return Judge(name, sentencepiece)


def plain(name: str) -> Shape:
    """A shape that every template knows."""
    return Shape(2, "", "parts" if "idefics" in name or "llava" in name else "plain", "")


@pytest.mark.parametrize("name", names())
def test_a_template_is_used_with_the_right_targets_or_refuses(name):
    generator = random.Random(name)
    counted = table_row(judge(name), [plain(name), *generator.sample(SHAPES, PER_TEMPLATE)])
    assert counted["faults"] == {}
    assert counted["refused"] == {}  # of what the template shows whole
    assert counted["used"] >= 1


@pytest.mark.parametrize("name", ["phi3", "gemma3", "qwen3", "gptoss", "llama3_1"])
def test_tokens_with_their_spaces_as_sentencepiece_has_them(name):
    counted = table_row(judge(name, sentencepiece=True), random.Random(name).sample(SHAPES, PER_TEMPLATE))
    assert counted["faults"] == counted["refused"] == {}


def changes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A row with one field after another replaced by another word: words, and what people named arguments and properties."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            for place, changed in changes(item, f"{path}[{index}]"):
                yield place, [*value[:index], changed, *value[index + 1 :]]
    elif isinstance(value, dict):
        for key, item in value.items():
            place = f"{path}.{key}"
            if key in ("role", "id", "tool_call_id", "type", "required"):
                continue
            if "arguments" in path or path.endswith("properties"):
                yield f"{place} (its name)", {("another" if name == key else name): each for name, each in value.items()}
            if isinstance(item, bool):
                yield place, {**value, key: not item}
            elif isinstance(item, int):
                yield place, {**value, key: item + 1}
            elif isinstance(item, str):
                yield place, {**value, key: "another"}
            else:
                yield from ((inner, {**value, key: changed}) for inner, changed in changes(item, place))


@pytest.mark.parametrize("name", names())
def test_no_word_of_a_row_can_change_unnoticed(name):
    chat = judge(name).chat
    shapes = [Shape(2, "system", content, "") for content in ("tools and calls", "reasoning and calls")]
    assert sum(_changes_are_noticed(chat, shape) for shape in shapes) or _changes_are_noticed(chat, plain(name))


def _changes_are_noticed(chat: ChatTemplate, shape: Shape) -> bool:
    """Change one field of a conversation after another; False if the template cannot be used with it."""
    messages, arguments, _ = conversation(shape)
    for message in messages:
        message.pop("name", None)  # of a tool's answer: the name of the call it answers
    try:
        whole = chat.tokens(messages, arguments)
    except BadRow:
        return False
    unnoticed = 0
    for place, changed in changes({"messages": messages, **arguments}):
        try:
            found = chat.tokens(changed["messages"], {name: changed[name] for name in arguments})
        except BadRow:
            continue
        same = found.token_ids.tolist() == whole.token_ids.tolist()
        unnoticed += same
        assert not same or "reasoning_content" in place, place
    assert unnoticed == whole.dropped_reasoning
    return True


@pytest.mark.parametrize("name", names())
def test_weight_and_train_change_the_targets(name):
    chat = judge(name).chat
    messages = conversation(plain(name))[0]
    whole = chat.tokens(messages)
    last = [index for index, message in enumerate(messages) if message["role"] == "assistant"][-1]
    for field, context in (("weight", 0), ("train", False)):
        changed = copy.deepcopy(messages)
        changed[last][field] = context
        found = chat.tokens(changed)
        assert found.token_ids.tolist() == whole.token_ids.tolist()
        assert 0 < found.is_target.sum() < whole.is_target.sum() and not (found.is_target & ~whole.is_target).any()
        changed[last][field] = type(context)(1)
        assert chat.tokens(changed).is_target.tolist() == whole.is_target.tolist()


def answers(content: Any, later: bool = True, **fields: Any) -> list[dict[str, Any]]:
    """A conversation whose first answer has a content, with another turn after it or none."""
    asked = {"role": "user", "content": "Who lit the lamp?"}
    further = [asked, {"role": "assistant", "content": "He did."}] if later else []
    return [asked, {"role": "assistant", "content": content, **fields}, *further]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(
    "content, fields",
    [
        ("The tag </think> closes it.", {}),
        ("The tag <think> opens it, and </think> closes it.", {}),
        ("<think>Light bends.</think> So </think> ends it.", {}),
        ("<think>Light <think> bends.</think> Far.", {}),
        ("The tag </think> closes it.", {"reasoning_content": "Light bends."}),
    ],
)
def test_a_think_tag_among_the_words_of_an_answer_takes_none_of_them_away(name, content, fields):
    chat = judge(name).chat
    for later in (True, False):
        try:
            found = chat.tokens(answers(content, later, **fields))
        except BadRow as refusal:
            assert "reasoning" in str(refusal) or not fields, refusal
            continue
        text = judge(name).tokenizer.decode(found.token_ids)
        dropped = fields.get("reasoning_content", "") if found.dropped_reasoning else ""
        for word in re.findall(
            r"\w+", content.replace("<think>", " ").replace("</think>", " ") + " " + fields.get("reasoning_content", "")
        ):
            assert word in text or word in dropped


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "glm4moe", "lfm2_2_5"])
def test_what_stands_before_a_closing_tag_is_refused_with_the_way_out(name):
    with pytest.raises(
        BadRow, match=r"message 2 \(assistant\), `content`; .*give what stands before </think> as `reasoning_content`"
    ):
        judge(name).chat.tokens(answers("The tag </think> closes it."))
    thought = judge(name).chat.tokens(answers("<think>Light bends.</think> Far."))
    assert thought.dropped_reasoning == 1


def test_an_answer_whose_thought_the_prompt_opens_may_begin_within_it():
    content = "Light bends.\n</think>\n\nFar."
    assert judge("qwen3_5_think").chat.tokens(answers(content, later=False)).dropped_reasoning == 0
    with pytest.raises(BadRow, match="takes what stands before </think> in the content for reasoning"):
        judge("qwen3").chat.tokens(answers(content, later=False))


def test_what_a_message_of_no_weight_begins_with_ends_no_other():
    call = {"function": {"name": "look", "arguments": {"far": "away"}}}
    seen = {"role": "tool", "name": "look", "content": "a ship"}
    messages = [
        {"role": "user", "content": "Who lit the lamp?"},
        {"role": "assistant", "content": "A while.", "tool_calls": [call]},
        seen,
        {"role": "assistant", "tool_calls": [call]},
        seen,
        {"role": "assistant", "content": "He did."},
    ]
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for name in names():
        chat = judge(name).chat
        try:
            whole = chat.tokens(messages).is_target
        except BadRow:
            continue
        alone = []
        for place in places:
            weighted = [
                {**message, "weight": int(index == place)} if index in places else message
                for index, message in enumerate(messages)
            ]
            alone.append(chat.tokens(weighted).is_target)
        assert (np.sum(alone, axis=0) == whole).all(), name  # each token is the target of one message
