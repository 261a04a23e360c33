"""Rows of any JSON in any column: each becomes sequences or says why not, and nothing else is ever raised."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from knowledge_store.errors import InputError
from teacher_dump import DumpConfig, dump
from teacher_dump.corpus.columns import SHAPES
from teacher_dump.corpus.documents import Document, read_documents
from teacher_dump.corpus.messages import SHAREGPT_ROLES
from teacher_dump.corpus.rows import BadRow, EmptyRow, Start
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence

COLUMNS = sorted({column for shape in SHAPES for column in (*shape.required, *shape.optional)})
FIELDS = ("role", "from", "value", "content", "tool_calls", "name", "function", "arguments", "type", "text")
ODD_FIELDS = (*FIELDS, "weight", "train", "reasoning_content", "thinking", "tool_call_id")
SHAREGPT_TURNS = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-200, 500),
    st.sampled_from([2**63, -(2**70), 1e300, float("nan"), float("inf"), 0.5]),
    st.text(max_size=5),
    st.sampled_from(["user", "assistant", "tool", "human", "gpt", "function_call", "text", "[]", "{}", '{"a": [1]}']),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(ODD_FIELDS), st.text(max_size=3)), inner, max_size=4),
    ),
    max_leaves=12,
)
role = st.sampled_from(["user", "assistant", "tool", "system"])
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": role, "content": values}, optional=dict.fromkeys(ODD_FIELDS[4:], values)),
        st.fixed_dictionaries({"from": st.sampled_from(sorted(SHAREGPT_ROLES)), "value": values}),
        st.fixed_dictionaries({"from": values, "value": values}),
    ),
    min_size=1,
    max_size=3,
)
ids = st.lists(st.integers(0, 90), max_size=4)
of_a_shape = st.sampled_from(SHAPES).flatmap(
    lambda shape: st.fixed_dictionaries(
        dict.fromkeys(shape.required, st.one_of(values, messages, ids, st.text(max_size=5))),
        optional=dict.fromkeys(shape.optional, st.one_of(values, ids, messages)),
    )
)
of_any_columns = st.dictionaries(st.sampled_from(COLUMNS), st.one_of(values, messages), max_size=4)


@cache
def tokenizer() -> CorpusTokenizer:
    made = make_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return CorpusTokenizer(made, 60)


def documents(file: Path) -> list[Document]:
    return list(read_documents((file,), Start(0, 0, 1, 0, 0), 1000))


def sequences(row: Any, folder: Path) -> list[TokenSequence]:
    (document,) = documents(write_jsonl(folder / "rows.jsonl", [row]))
    return tokenizer().sequences(document)


def problem(row: Any, folder: Path) -> str:
    with pytest.raises(BadRow) as raised:
        sequences(row, folder)
    return str(raised.value)


@settings(max_examples=300)
@given(row=st.one_of(of_a_shape, of_any_columns, values))
@example(row={"conversations": [{"from": ["human"], "value": "x"}]})
@example(row={"conversations": [{"from": {"a": 1}, "value": "x"}]})
def test_any_json_becomes_sequences_or_says_why_not(row, tmp_path_factory):
    try:
        found = sequences(row, tmp_path_factory.getbasetemp())
    except BadRow as bad:
        assert str(bad) and bad.reason
    else:
        assert found and all(sequence.is_target.any() for sequence in found)


@pytest.mark.parametrize(("speaker", "kind"), [(["human"], "a list"), ({"a": 1}, "an object"), (5, "a number"), ("me", "'me'")])
def test_a_speaker_that_is_none_is_named(speaker, kind, tmp_path):
    sentence = problem({"conversations": [SHAREGPT_TURNS[0], {"from": speaker, "value": "y"}]}, tmp_path)
    assert sentence.startswith("`conversations` has a message that cannot be used: message 2: its `from` is none of human, ")
    assert sentence.endswith(f"({kind})")


def test_speakers_are_known_in_any_case_and_beside_null_fields(tmp_path):
    expected = [sequence.token_ids.tolist() for sequence in sequences({"conversations": SHAREGPT_TURNS}, tmp_path)]
    for names in (("Human", "GPT"), ("USER", "Assistant")):
        nulls = {"role": None, "content": None, "tool_calls": None}
        turns = [{**turn, "from": name, **nulls} for turn, name in zip(SHAREGPT_TURNS, names, strict=True)]
        found = [sequence.token_ids.tolist() for sequence in sequences({"conversations": turns}, tmp_path)]
        assert found == expected


@pytest.mark.parametrize("words", ["", "  ", "\n\t"])
def test_an_answer_without_words_is_refused_and_text_without_words_is_nothing(words, tmp_path):
    reason = "an answer is empty, so only its end is there to learn"
    assert problem({"prompt": "Who?", "completion": words}, tmp_path) == f"{reason}: `completion`"
    assert problem({"instruction": "Who?", "output": words}, tmp_path) == f"{reason}: `output`"
    assert "an answer is empty" in problem({"messages": [{"role": "assistant", "content": words}]}, tmp_path)
    with pytest.raises(EmptyRow):
        sequences({"text": words}, tmp_path)


def test_white_space_between_the_parts_of_a_long_text_is_kept(tmp_path):
    row = {"text": "x" * 900 + " " * 1500 + "y" * 900}
    parts = documents(write_jsonl(tmp_path / "long.jsonl", [row]))
    assert any(not part.text.strip() for part in parts if part.text is not None)
    assert all(tokenizer().sequences(part) for part in parts)
    assert json.loads((tmp_path / "long.jsonl").read_text()) == row


def test_a_token_that_the_model_does_not_know_is_found_before_the_model_is_loaded(tmp_path, teacher_folder):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    configuration = json.loads((folder / "config.json").read_text())
    ids = tokenizer().tokenizer("lit it")["input_ids"]
    (folder / "config.json").write_text(json.dumps({**configuration, "vocab_size": max(ids)}))
    corpus = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [0, 1]}, {"input_ids": ids}])
    sentence = rf"rows\.jsonl, line 2: the teacher's tokenizer gives token {max(ids)}, and its config\.json has a vocabulary of"
    with pytest.raises(InputError, match=sentence):
        dump(DumpConfig(str(folder), (corpus,), tmp_path / "store", max_length=40))
    assert not (tmp_path / "store").exists()
