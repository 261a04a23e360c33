"""What a row is read as: each known shape, the columns that say so, and the sentence where it cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError, MismatchError
from teacher_dump import DumpConfig, dump
from teacher_dump.corpus.columns import Columns, read_columns
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.row_shapes import Content, read_content
from teacher_dump.corpus.rows import BadRow, EmptyRow
from teacher_dump.corpus.tokenisation import CorpusTokenizer

USER, ASSISTANT = {"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Far."}
TURNS = [USER, ASSISTANT]
TOOLS = [{"type": "function", "function": {"name": "lamp"}}]


def content(record: dict[str, Any], columns: str | None = None) -> Content:
    return read_content(record, Columns(read_columns(columns)))


def problem(record: dict[str, Any], columns: str | None = None) -> str:
    with pytest.raises(ValueError) as raised:
        content(record, columns)
    return str(raised.value)


def messages(record: dict[str, Any], columns: str | None = None) -> Any:
    return content(record, columns).fields["messages"]


# --- messages -----------------------------------------------------------------------------------------------------------


def test_messages_are_handed_on_with_every_field():
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "weight": 0},
        {"role": "assistant", "tool_calls": [{"function": {"name": "lamp", "arguments": "{}"}}], "train": False},
        {"role": "tool", "content": "lit", "tool_call_id": "a", "extra": None},
        {"role": "assistant", "content": None, "reasoning_content": "Hm."},
    ]
    assert messages({"messages": turns}) == turns
    assert messages({"messages": json.dumps(turns)}) == turns


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "`messages` must be a list of messages and is empty"),
        ({"role": "user"}, "`messages` must be a list of messages and is an object"),
        ("Hello", "`messages` is text that is not JSON"),
        ([USER, "Far."], "`messages` has a message that cannot be used: message 2 is text, not an object"),
        ([USER, {"content": "x"}], "`messages` has a message that cannot be used: message 2 has no `role`"),
        (
            [USER, {"role": 5, "content": "x"}],
            "`messages` has a message that cannot be used: message 2: its `role` is a number, not text",
        ),
        (
            [{"from": "someone", "value": "x"}],
            "`messages` has a message that cannot be used: message 1: its `from` is none of human, ",
        ),
        ([{"from": "gpt", "text": "x"}], "`messages` has a message that cannot be used: message 1 (gpt) has no `value`"),
        ([{"from": "function_call", "value": "lamp()"}], "message 1 (function_call): its `value` is not JSON"),
        ([{"from": "function_call", "value": "[]"}], "message 1 (function_call): its `value` has no call"),
        ([{"from": "function_call", "value": '{"name": "lamp"}'}], "is no object with `name` and `arguments`"),
        ([{"from": "gpt", "value": "x", "content": "y"}], "message 1 (gpt) has `content` beside `value`"),
    ],
)
def test_a_list_that_is_no_conversation_names_message_and_field(value, sentence):
    assert sentence in problem({"messages": value})


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        ("[", "`tools` is text that is not JSON"),
        (5, "`tools` is not a list"),
        (['{"type"'], "`tools` has an entry that cannot be used: tool 1 is text that is not JSON"),
        ([TOOLS[0], "5"], "`tools` has an entry that cannot be used: tool 2 is not an object"),
        ('[{"a": 1, "a": 2}]', "`tools` is text that is an object with the name `a` twice"),
    ],
)
def test_tools_that_are_none_are_named(tools, sentence):
    assert sentence in problem({"messages": TURNS, "tools": tools})


@pytest.mark.parametrize("nothing", ["", " ", "null", None])
def test_no_tools_and_no_history_may_be_blank_text(nothing):
    found = content({"messages": TURNS, "tools": nothing, "chat_template_kwargs": nothing})
    assert found.fields == {"messages": TURNS, "template_arguments": {}}
    row = {"instruction": "Name it.", "output": "A lighthouse.", "history": nothing}
    assert len(messages(row)) == 2
    assert content({"input_ids": [1, 2], "labels": None}).fields["is_target"] == (True, True)
    assert "`labels` is text that is not JSON" in problem({"input_ids": [1, 2], "labels": ""})


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_may_be_json_text_as_a_whole_or_each(tools):
    found = content({"messages": TURNS, "tools": tools, "chat_template_kwargs": '{"mood": null}'})
    assert found.fields["template_arguments"] == {"mood": None, "tools": TOOLS}
    assert found.columns == {}


# --- other shapes -------------------------------------------------------------------------------------------------------


def test_sharegpt_becomes_messages_with_calls_and_observations():
    turns = [
        {"from": "human", "value": "Light it."},
        {"from": "function_call", "value": '{"name": "lamp", "arguments": {"on": true}}'},
        {"from": "observation", "value": "lit", "id": 7},
        {"from": "gpt", "value": "Done.", "weight": 0},
    ]
    call = {"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
    expected = [
        {"role": "system", "content": "You keep a light."},
        {"role": "user", "content": "Light it."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "lit", "id": 7},
        {"role": "assistant", "content": "Done.", "weight": 0},
    ]
    row = {"conversations": turns, "system": "You keep a light.", "tools": json.dumps(TOOLS), "source": "x"}
    assert messages(row) == messages({**row, "conversations": json.dumps(turns)}) == expected
    assert content(row).columns == {"source": "x"}
    assert messages({"conversations": turns, "system": ""}) == expected[1:]
    assert messages({"conversations": TURNS}) == TURNS  # messages of the other form under that name
    assert "say different things" in problem({**row, "conversations": [{"from": "system", "value": "No."}, *turns]})


def test_alpaca_becomes_a_conversation():
    row = {"instruction": "Name it.", "input": "A light on a rock.", "output": "A lighthouse.", "id": 3}
    expected = [
        {"role": "user", "content": "Name it.\nA light on a rock."},
        {"role": "assistant", "content": "A lighthouse."},
    ]
    assert messages(row) == expected
    assert content(row).columns == {"id": 3}
    assert messages({**row, "input": ""})[0]["content"] == messages({**row, "input": None})[0]["content"] == "Name it."
    history = [["Hello.", "Good day."], ["Ready?", "Yes."]]
    long = messages({**row, "system": "Be brief.", "history": history})
    assert [turn["role"] for turn in long] == ["system", *["user", "assistant"] * 3]
    assert [turn["content"] for turn in long[1:5]] == ["Hello.", "Good day.", "Ready?", "Yes."] and long[5:] == expected
    assert "`output` is not a string" in problem({**row, "output": 5})
    assert "entry 1 is none" in problem({**row, "history": [["Hello."]]})


def test_a_prompt_that_repeats_a_message_stays_a_column_and_another_is_refused():
    row = {"prompt": "How far? ", "messages": TURNS, "prompt_id": "a"}
    assert messages(row) == TURNS
    assert content(row).columns == {"prompt": "How far? ", "prompt_id": "a"}
    parts = [{"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "far?"}]}, ASSISTANT]
    assert messages({**row, "messages": parts}) == parts
    sentence = problem({**row, "prompt": "Answer in French."})
    assert sentence.startswith("`prompt` is the text of none of its `messages`") and "--columns messages=messages" in sentence
    assert messages({**row, "prompt": "Answer in French."}, "messages=messages") == TURNS
    assert "both `messages` and `completion` without `prompt`" in problem({"messages": TURNS, "completion": "x"})
    assert "both `text` and `prompt` without `completion`" in problem({"text": "x", "prompt": "y"})


def test_a_system_column_is_the_first_message_of_every_conversation():
    system, brief = {"role": "system", "content": "Be brief."}, {"system": "Be brief."}
    others = [{"role": "assistant", "content": "Near."}]
    assert messages({"messages": TURNS, **brief}) == [system, *TURNS]
    assert messages({"messages": [system, *TURNS], **brief}) == [system, *TURNS]
    assert messages({"messages": TURNS, "persona": "Be brief."}, "messages=messages,system=persona") == [system, *TURNS]
    for row in (
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": others},
        {"chosen": TURNS, "rejected": [USER, *others]},
        {"prompt": TURNS[:1], "completions": [TURNS[1:], others]},
    ):
        assert content({**row, **brief}).fields["prompt"] == [system, USER]
        assert content({**row, **brief}).columns == {}
    in_parts = {**system, "content": [{"type": "text", "text": "Be brief."}]}
    assert messages({"messages": [in_parts, *TURNS], "system": "Be brief.\n"}) == [in_parts, *TURNS]
    assert messages({"messages": TURNS, "system": " "}) == TURNS
    other = {"messages": [system, *TURNS], "system": "gpt-4"}
    assert "say different things: keep one" in problem(other) and "with system=- in" in problem(other)
    assert content(other, "system=-").columns == {"system": "gpt-4"}
    assert "is not a string: where it is no message, leave it out with system=-" in problem({"messages": TURNS, "system": 3})
    plain = {"prompt": "x", "completion": "y", **brief}  # text is final
    assert "no teacher would see it" in (sentence := problem(plain)) and "leave it out with system=- in --columns" in sentence
    assert content(plain, "system=-").columns == content(plain, "prompt=prompt,completion=completion,system=-").columns == brief
    asked = {"question": "x", "answer": "y", **brief, "persona": "Be brief."}  # other names do not mean that it is known of
    assert "`system` stands beside" in problem(asked, "prompt=question,completion=answer")
    assert "`persona` stands beside" in problem(asked, "prompt=question,completion=answer,system=persona")
    assert content({**plain, "system": " "}).columns == {"system": " "}
    assert content({**plain, "finish": "stop"}).columns == {**brief, "finish": "stop"}  # what a model wrote saw its prompt
    assert "no teacher would see it" in problem({"prompt": "x", "chosen": "y", "rejected": "z", **brief})


def test_what_the_teacher_would_have_to_see_is_not_lost_unnoticed():
    for name in ("images", "functions"):
        for row, columns in (
            ({"messages": TURNS}, None),
            ({"talk": TURNS}, "messages=talk"),
            ({"prompt": TURNS[:1], "completion": TURNS[1:]}, None),
            ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt=prompt,completion=completion"),
        ):
            sentence = problem({**row, name: ["x"]}, columns)
            assert sentence.startswith(f"`{name}` is part of the conversation")
            assert f"{name}=- in --columns makes it a column as any other" in sentence
            without = f"{columns},{name}=-" if columns else f"{name}=-,system=-"
            assert content({**row, name: ["x"]}, without).columns == {name: ["x"]}
            for nothing in ([], [None], " ", "[]", "null", {"bytes": None, "path": None}, False):
                assert content({**row, name: nothing}, columns).columns == {name: nothing}
    written = {"prompt": "x", "completion": "y", "finish": "stop", "images": ["x"]}
    assert content(written).columns == {"finish": "stop", "images": ["x"]}
    assert content({"messages": TURNS, "functions": TOOLS}, "tools=functions").fields["template_arguments"] == {"tools": TOOLS}
    plain = {"prompt": "x", "completion": "y", "functions": ["x"]}  # as with `tools`, which plain text is not given
    assert content(plain).columns == {"functions": ["x"]} and "`image` is" in problem({**plain, "image": "light.jpg"})
    assert content({"text": "A light.", "image": "light.jpg"}).columns == {"image": "light.jpg"}


def test_what_is_left_out_decides_what_is_read():
    row = {"messages": TURNS, "prompt": "x", "chosen": "y", "rejected": "z"}
    assert "it fits two shapes" in problem(row)
    assert content(row, "chosen=-,rejected=-,prompt=-").fields["messages"] == TURNS
    assert content(row, "messages=-").fields["prompt"] == "x"
    assert "leave it out with tools=-" in problem({"messages": TURNS, "tools": "calculator"})
    assert "leave it out with tools=-" in problem({"messages": TURNS, "tools": ["calculator"]})
    assert content({"messages": TURNS, "tools": "calculator"}, "tools=-").columns == {"tools": "calculator"}


def test_columns_that_a_shape_does_not_take_are_kept():
    assert content({"text": "x", "tools": "hammer", "system": "y"}).columns == {"tools": "hammer", "system": "y"}
    assert content({"prompt": "x", "completion": "y", "tools": "hammer"}).columns == {"tools": "hammer"}
    assert content({"prompt": TURNS[:1], "completion": TURNS[1:], "tools": TOOLS}).columns == {}


@pytest.mark.parametrize("row", [{"prompt": "x", "completion": "y"}, {"prompt": TURNS[:1], "completion": TURNS[1:]}])
def test_a_rejected_answer_of_kto_is_not_learnt_unnoticed(row):
    for label in (True, None, 0, "x"):
        assert content({**row, "label": label}) == Content(content(row).fields, {"label": label})
    renamed = {"prompt": row["prompt"], "response": row["completion"]}
    for label in (False, "false", "False"):  # text where it was text once, as in a .csv file
        sentence = problem({**row, "label": label})
        assert "`label` is false" in sentence and "--skip-bad-rows" in sentence
        assert "`label` is false" in problem({**renamed, "label": label}, "completion=response")
        written = {"label": label, "finish": "stop"}  # of a prompt, about which a model wrote
        assert content({**row, **written}).columns == written


ANSWERED: dict[str, dict[str, Any]] = {
    "text": {"text": "Far."},
    "completion": {"prompt": "x", "completion": "y"},
    "messages as a completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "messages": {"messages": TURNS},
    "ShareGPT": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    "Alpaca": {"instruction": "x", "output": "y"},
}


@pytest.mark.parametrize("row", ANSWERED.values(), ids=ANSWERED)
def test_how_an_answer_has_ended_is_read_in_every_shape(row):
    cut_off = ("length", "content_filter", "abort", "MAX_TOKENS")
    ends = {"stop": "stop", "tool_calls": "stop", **dict.fromkeys(cut_off, "length")}
    for value, meant in ends.items():
        for said in ({"finish": value}, {"finish_reason": value}, {"finish": None, "finish_reason": value}):
            assert content({**row, **said}) == Content({**content(row).fields, "finish": meant}, said)
    for nothing in (None, "early", 5, ["length"], {"length": 1}):
        assert content({**row, "finish_reason": nothing}).fields == content(row).fields
    sentence = problem({**row, "finish": "stop", "finish_reason": "length"})
    assert sentence.startswith("`finish` and `finish_reason` say different things") and "finish=- in --columns" in sentence
    for left_out, meant in {"finish=-": "length", "finish_reason=-": "stop"}.items():
        assert content({**row, "finish": "stop", "finish_reason": "length"}, left_out).fields["finish"] == meant


def test_how_tokens_have_ended_is_told_by_the_tokens():
    assert content({"input_ids": [3, 4], "finish_reason": "length"}) == Content(
        content({"input_ids": [3, 4]}).fields, {"finish_reason": "length"}
    )


def test_a_reason_why_an_answer_has_ended_hides_nothing_that_is_refused_without_it():
    said = {"finish_reason": "stop"}  # of any model, which need not have been shown the row as `generate` shows it
    assert "`label` is false" in problem({"prompt": "x", "completion": "y", "label": False, **said})
    assert "`images` is part of the conversation" in problem({"messages": TURNS, "images": ["x"], **said})
    assert "`images` is part of the conversation" in problem({"messages": TURNS, "images": ["x"], "finish": "stop"})
    assert "`system` stands beside" in problem({"prompt": "x", "completion": "y", "system": "z", **said})


def test_steps_of_one_answer_are_no_answers_to_compare():
    row = {"prompt": "How far?", "completions": ["It is there.", "So it is far."]}
    sentence = problem({**row, "labels": [True, False]})
    assert "`labels` says which of its `completions` are right" in sentence and "as a `completion`" in sentence
    assert "where they are answers, say --columns completions=completions" in sentence
    known = {"labels": [True, False]}
    assert content({**row, **known}, "completions=completions").columns == known
    assert content({**row, **known, "scores": [1, 0]}).columns == known
    for other in ("x", []):
        assert content({**row, "labels": other}).columns == {"labels": other}


ALTERNATIVES: dict[str, dict[str, Any]] = {
    "text": {"text": "x"},
    "prompt and completion": {"prompt": "x", "completion": "y"},
    "messages": {"messages": TURNS},
    "ShareGPT": {"conversations": TURNS},
    "Alpaca": {"instruction": "x", "output": "y"},
    "token ids": {"input_ids": [1, 2]},
}


@given(st.sets(st.sampled_from(sorted(ALTERNATIVES)), min_size=2, max_size=2), st.data())
def test_a_row_of_two_shapes_is_refused_unless_columns_say_which_counts(shapes, data):
    row = {name: value for shape in shapes for name, value in ALTERNATIVES[shape].items()}
    sentence = problem(row)
    assert sentence.startswith("it fits two shapes, ") and all(shape in sentence for shape in shapes)
    chosen = data.draw(st.sampled_from(sorted(shapes)))
    (other,) = shapes - {chosen}
    columns = ",".join(f"{name}={name}" for name in ALTERNATIVES[chosen])
    assert columns in sentence
    assert content(row, columns) == Content(content(ALTERNATIVES[chosen]).fields, ALTERNATIVES[other])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "x", "completion": None}, "`completion` is null"),
        ({"prompt": None, "completion": "y", "text": None}, "`prompt` is null"),
        ({"prompt": "x", "completions": None, "scores": [1]}, "`completions` is null"),
        ({"prompt": "x", "chosen": None, "rejected": None}, "`chosen` and `rejected` are null"),
    ],
)
def test_a_half_that_is_null_is_named(row, sentence):
    assert problem(row) == sentence


def test_a_half_of_another_name_is_read_with_columns():
    sentence = "Columns of other names are read with --columns, as in --columns prompt=prompt,completion=response"
    assert sentence in problem({"prompt": "x", "response": "y"}) and sentence in problem({"prompt": "x", "text": None})
    assert sentence in problem({"prompt": "x", "response": "y", "chosen": None, "text": None})


# --- columns of other names ---------------------------------------------------------------------------------------------


def test_columns_of_other_names_are_read_where_columns_says_so():
    row = {"question": "How far?", "answer": " Far.", "prompt": "unread"}
    found = content(row, "prompt=question,completion=answer")
    assert found == Content({"prompt": "How far?", "completion": " Far."}, {"prompt": "unread"})
    assert messages({"dialogue": [{"from": "human", "value": "a"}]}, "conversations=dialogue") == [
        {"role": "user", "content": "a"}
    ]
    assert messages({"query": "a", "reply": "b"}, "instruction=query, output=reply")[1]["content"] == "b"
    assert content({"messages": TURNS, "functions": TOOLS}, "tools=functions").fields["template_arguments"] == {"tools": TOOLS}
    assert "`question` is not there, which --columns makes the prompt of prompt and completion" in problem(
        {"answer": "x"}, "prompt=question,completion=answer"
    )
    sentence = problem({"question": "x", "answer": "y"})
    assert "(it has `answer` and `question`)" in sentence and "--columns prompt=question,completion=answer" in sentence


def test_a_column_that_is_named_for_one_part_is_not_read_as_another_too():
    swapped = content({"prompt": "a", "completion": "b"}, "prompt=completion,completion=prompt")
    assert swapped.fields == {"prompt": "b", "completion": "a"}
    pairs = messages({"input": "How far?", "output": "Far."}, "instruction=input")
    assert [turn["content"] for turn in pairs] == ["How far?", "Far."]


def test_text_that_looks_like_json_is_text_unless_it_is_declared_as_json():
    halves = {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])}
    assert content(halves).fields == halves
    declared = content(halves, "prompt=prompt:json,completion=completion:json").fields
    assert (declared["prompt"], declared["completion"]) == (TURNS[:1], TURNS[1:])
    assert content({"text": "[1]"}).fields == {"text": "[1]"}
    assert messages({"instruction": "[1]", "output": '{"a": 1}'})[1]["content"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ("prompt", "'prompt' is not of the form NAME=COLUMN"),
        ("prompt=", "is not of the form NAME=COLUMN"),
        ("question=prompt", "there is no 'question'; it names text, prompt, completion, system, tools"),
        ("images=pictures", "images cannot be called otherwise; images=- leaves it out"),
        (
            ",".join(
                f"{part}=-"
                for part in ("text", "prompt", "messages", "conversations", "output", "input_ids", "chosen", "completions")
            ),
            "leaves out what a row is read by",
        ),
        ("prompt=a,prompt=b", "prompt is there twice"),
        ("prompt=a,messages=b", "a row is prompt and completion or messages, not both"),
        ("prompt=a,completion=a", "prompt and completion would both be the column 'a'"),
        ("prompt=completion", "prompt and completion would both be the column 'completion'"),
        ("messages=a,tools=a", "messages and tools would both be the column 'a'"),
        ("text=a:json", ":json is for prompt, completion, chosen and rejected alone"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused_at_once(columns, sentence):
    with pytest.raises(InputError) as raised:
        DumpConfig("teacher", Path("a.jsonl"), Path("store"), columns=columns)
    assert sentence in str(raised.value) and f"--columns {columns}" in str(raised.value)


def test_columns_are_part_of_a_dump_and_taken_from_it(tmp_path, loaded_teacher):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"question": "How far?", "answer": " Far."}] * 5)
    plain: dict[str, Any] = {"teacher": "tiny", "corpus": corpus, "store": tmp_path / "s", "name": "d", "shard_size": 2} | {
        "max_length": 30
    }
    config = DumpConfig(**plain, columns="prompt=question,completion=answer")
    assert dump(config, 0, 2, teacher=loaded_teacher).shards == 2
    assert dump(DumpConfig(**plain), 1, 2, teacher=loaded_teacher).shards == 1
    with pytest.raises(MismatchError, match="--columns said completion=answer and now says completion=reply"):
        dump(DumpConfig(**plain, columns="prompt=question,completion=reply"), teacher=loaded_teacher)
    assert KnowledgeStore.open(tmp_path / "s").sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 5}]


# --- token ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ids", "targets"),
    [
        ({"input_ids": [3, 4, 5]}, [3, 4, 5], [1, 1, 1]),
        ({"input_ids": [3, 4, 5], "labels": [-100, 4, -100]}, [3, 4, 5], [0, 1, 0]),
        ({"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}, [3, 4, 5], [0, 1, 0]),
        ({"input_ids": "[3, 4, 5]", "loss_mask": [False, True, True]}, [3, 4, 5], [0, 1, 1]),
        ({"input_ids": [9, 3, 4, 9], "attention_mask": [0, 1, 1, 0], "labels": [-100, -100, 4, -100]}, [3, 4], [0, 1]),
        ({"input_ids": [9, 9], "attention_mask": [0, 0]}, [], []),
        ({"input_ids": [3, 4], "position_ids": [0, 1], "seq_lengths": [2]}, [3, 4], [1, 1]),
        ({"input_ids": [3, 4], "seq_lengths": 2}, [3, 4], [1, 1]),
        ({"input_ids": [3, 4, 5], "assistant_tokens_mask": [0, 0, 1]}, [3, 4, 5], [0, 0, 1]),
        ({"input_ids": [3, 4], "cu_seqlens": [0, 2], "segment_ids": [1, 1]}, [3, 4], [1, 1]),
        (
            {"input_ids": [3, 4, 9], "attention_mask": [1, 1, 0], "cu_seqlens": [0, 2, 3], "segment_ids": [1, 1, 0]},
            [3, 4],
            [1, 1],
        ),
        (
            {"input_ids": [3, 4, 9], "labels": [3, 4, -100], "cu_seqlens": [0, 2, 3], "segment_ids": [1, 1, 0]},
            [3, 4, 9],
            [1, 1, 0],
        ),
        ({"input_ids": [3, 4], "prompt_length": 0}, [3, 4], [1, 1]),
    ],
)
def test_token_ids_are_taken_as_they_are(row, ids, targets):
    found = content({**row, "topic": "x"})
    assert found.fields == {"token_ids": tuple(ids), "is_target": tuple(map(bool, targets))}
    assert found.columns.keys() - {"prompt_length"} == {"topic"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"input_ids": 5}, "`input_ids` is not a list of whole numbers"),
        ({"input_ids": [3, 4.5]}, "`input_ids` is not a list of whole numbers (at token 2 it has 4.5)"),
        ({"input_ids": [3, None]}, "at token 2 it has None"),
        ({"input_ids": [3, -1]}, "`input_ids` has a negative number (-1 at token 2)"),
        ({"input_ids": [3, 4], "labels": [4, -100]}, "`labels` disagrees with `input_ids` (4 at token 1, which is 3)"),
        ({"input_ids": [3, 4], "labels": [3]}, "`labels` is not as long as `input_ids` (1 and 2)"),
        ({"input_ids": [3, 4], "loss_mask": [1, 2]}, "`loss_mask` is neither 0 nor 1 (2 at token 2)"),
        (
            {"input_ids": [3, 4, 5], "attention_mask": [1, 0, 1]},
            "`attention_mask` is 0 between tokens that are seen (at token 2)",
        ),
        ({"input_ids": [3, 4, 5], "position_ids": [0, 1, 0]}, "`position_ids` do not count from 0"),
        ({"input_ids": [3, 4, 5], "seq_lengths": [2, 1]}, "`seq_lengths` says that several texts are packed in one row"),
        ({"input_ids": [3, 4, 5], "cu_seqlens": [0, 2, 3]}, "`cu_seqlens` says that several texts are packed in one row"),
        ({"input_ids": [3, 4, 5], "cu_seqlens": [0, 2]}, "`cu_seqlens` says that several texts are packed in one row"),
        ({"input_ids": [3, 4, 5], "cu_seqlens": 3}, "`cu_seqlens` is not a list of whole numbers"),
        ({"input_ids": [3, 4, 5], "segment_ids": [1, 1, 2]}, "`segment_ids` says that several texts are packed in one row"),
        ({"input_ids": [3, 4, 5], "segment_ids": [1, 1]}, "`segment_ids` is not as long as `input_ids` (2 and 3)"),
    ],
)
def test_token_ids_that_cannot_be_meant_name_column_and_token(row, sentence):
    assert sentence in problem(row)


@pytest.mark.parametrize("name", ["prompt_length", "prompt_len", "prompt_lengths"])
def test_a_length_of_a_prompt_among_token_ids_is_not_passed_over(name):
    row = {"input_ids": [3, 4, 5], name: 2}
    sentence = problem(row)
    assert f"`{name}` says that a prompt stands in `input_ids`" in sentence and f"with {name}=- in --columns" in sentence
    assert content(row, f"{name}=-") == Content(content({"input_ids": [3, 4, 5]}).fields, {name: 2})
    for known in ({"labels": [-100, -100, 5]}, {"completion_mask": [0, 0, 1]}):
        found = content({**row, **known})
        assert found.fields["is_target"] == (False, False, True) and found.columns == {name: 2}
    assert content({"prompt": "x", "completion": "y", name: 2}).columns == {name: 2}


def test_sequences_of_token_ids_have_nothing_added_and_end_at_the_maximum_length():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    reader = CorpusTokenizer(tokenizer, 4)

    def read(ids: list[int], targets: list[bool]) -> list[Any]:
        document = Document(0, 0, 1, 0, 0, token_ids=tuple(ids), is_target=tuple(targets))
        return [(one.token_ids.tolist(), one.is_target.tolist()) for one in reader.sequences(document)]

    assert read([5, 6, 7], [True, False, True]) == [([5, 6, 7], [False, False, True])]
    assert read([5, 6, 7, 8, 9], [False, True, False, True, True]) == [([5, 6, 7, 8], [False, True, False, True])]
    for nothing in ([], [5, 6], [5]):
        with pytest.raises(EmptyRow):
            read(nothing, [len(nothing) == 1] * len(nothing))
    with pytest.raises(BadRow, match=r"`input_ids` has a token that the teacher's tokenizer does not have \(99999 at token 2"):
        read([5, 99_999], [True, True])


@pytest.mark.parametrize("beside", [{}, {"tools": TOOLS}])
def test_tools_among_the_arguments_of_a_template_are_refused(beside):
    sentence = "`chat_template_kwargs` has `tools`: give them as the row's `tools`"
    assert sentence in problem({"messages": TURNS, "chat_template_kwargs": {"tools": TOOLS}, **beside})
