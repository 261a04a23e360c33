"""Questions: read strictly, laid out the same everywhere, and cut into the tokens that a dump of them has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from knowledge_store.errors import InputError
from student_train.evaluation.questions import Question, completions, corpus_row, prompt, read_questions, tokenise
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import CorpusTokenizer

LAMP = {"question": "Who lit the lamp?", "options": ["the keeper", "his daughter", "nobody"], "answer": 0}


def read(tmp_path: Path, *rows: dict, answer_as: str = "letter") -> list[Question]:
    return read_questions(write_jsonl(tmp_path / "questions.jsonl", list(rows)), answer_as)


def test_the_layout():
    question = Question("Who lit the lamp?", ("the keeper", "his daughter"), 1)
    assert prompt(question) == "Question: Who lit the lamp?\nA. the keeper\nB. his daughter\nAnswer:"
    assert completions(question) == [" A", " B"]
    # Answered in words, the options are not shown before they are judged.
    assert prompt(question, "text") == "Question: Who lit the lamp?\nAnswer:"
    assert completions(question, "text") == [" the keeper", " his daughter"]
    assert corpus_row(question) == {"prompt": prompt(question), "completion": " B"}
    assert corpus_row(question, "text") == {"prompt": prompt(question, "text"), "completion": " his daughter"}


@pytest.mark.parametrize(
    ("options", "answer", "index"),
    [
        (["red", "green", "blue"], 2, 2),
        (["red", "green", "blue"], "B", 1),
        (["red", "green", "blue"], "blue", 2),
        (["A", "B"], "B", 1),  # letter and option agree
        (["2", "3", "1"], "1", 2),  # a text is never an index
    ],
)
def test_answers(tmp_path, options, answer, index):
    (found,) = read(tmp_path, {"question": "Which?", "options": options, "answer": answer, "id": 7})
    assert (found.text, found.options, found.answer) == ("Which?", tuple(options), index)


def test_places_and_empty_lines(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"\ufeff{json.dumps(LAMP)}\n\n{json.dumps(LAMP)}\n")
    assert [question.place for question in read_questions(path)] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "`question` is not a text"),
        ({"options": "red, green"}, "`options` is not a list of texts"),
        ({"options": ["red", 2]}, "`options` is not a list of texts"),
        ({"options": ["red", " "]}, "`options` is not a list of texts"),
        ({"options": ["red"]}, "at least two options, and this one has 1"),
        ({"options": ["red", "green", "red "]}, "'red ' stands there twice"),
        ({"answer": 3}, "the answer 3 is no index of 3 options"),
        ({"answer": -1}, "the answer -1 is no index"),
        ({"answer": True}, "neither an index, nor a letter, nor an option"),
        ({"answer": "yellow"}, "'yellow' is neither an option nor a letter of one"),
        ({"answer": "D"}, "'D' is neither an option nor a letter of one"),
        ({"options": ["B", "A"], "answer": "A"}, "'A' is an option and the letter of another"),
        ({"options": [f"number {n}" for n in range(27)]}, "27 options are more than there are letters: use --answer-as text"),
    ],
)
def test_lines_that_are_no_question(tmp_path, change, message):
    with pytest.raises(InputError, match=r"questions\.jsonl, line 2: ") as caught:
        read(tmp_path, LAMP, {**LAMP, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["question", "options", "answer"])
def test_a_missing_key_is_named(tmp_path, name):
    with pytest.raises(InputError, match=f"line 1: there is no `{name}`"):
        read(tmp_path, {key: value for key, value in LAMP.items() if key != name})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1: not a JSON object"),
        (b"[1, 2]\n", "line 1: not a JSON object"),
        (b"[" * 100_000, "line 1: not a JSON object"),
        (b"\n \n", "has no questions"),
        (b'{"question": "\xff"}', "is not UTF-8"),
        (b'{"question": "\\ud800", "options": ["a", "b"], "answer": 0}', "line 1: text that is not sound Unicode"),
    ],
)
def test_files_without_questions(tmp_path, content, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_questions(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        read_questions(tmp_path)
    with pytest.raises(InputError, match="answer_as is 'number'; it must be letter or text"):
        read_questions(tmp_path / "absent.jsonl", "number")


def test_more_options_than_letters_are_answered_in_words(tmp_path):
    options = [f"number {n}" for n in range(30)]
    (question,) = read(tmp_path, {"question": "Which?", "options": options, "answer": "number 29"}, answer_as="text")
    assert question.answer == 29
    assert completions(question, "text") == [f" {option}" for option in options]


def opened(tokenizer):
    """The same tokenizer, which now puts <|user|> before every text."""
    mark = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", pair="<|user|> $A $B", special_tokens=[("<|user|>", mark)]
    )
    return tokenizer


TOKENIZERS = {"plain": make_tokenizer(), "opened": opened(make_tokenizer())}
TEXT = st.text(st.sampled_from("abc lighthouse? .\nÄ字"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60)
@given(
    text=TEXT,
    options=st.lists(TEXT, min_size=2, max_size=4, unique_by=str.strip),
    answer_as=st.sampled_from(["letter", "text"]),
    name=st.sampled_from(sorted(TOKENIZERS)),
)
def test_the_tokens_are_those_of_a_dump(text, options, answer_as, name):
    tokenizer = TOKENIZERS[name]
    questions = [Question(text, tuple(options), answer) for answer in range(len(options))]
    for question, tokens in zip(questions, tokenise(questions, tokenizer, answer_as), strict=True):
        document = Document(0, 0, 1, 0, 0, **corpus_row(question, answer_as))
        (dumped,) = CorpusTokenizer(tokenizer, max_length=1000).sequences(document)
        whole = [*tokens.context, *tokens.completions[tokens.answer], tokenizer.eos_token_id]
        assert dumped.token_ids.tolist() == whole
        assert dumped.is_target[len(tokens.context) :].all()
        if answer_as == "letter":
            assert tokens.first_tokens_differ and {len(each) for each in tokens.completions} == {
                1
            }  # here the space is a token of its own, and the context's last
            assert dumped.is_target.sum() == 3
        else:
            assert not dumped.is_target[: len(tokens.context)].any()


def test_what_comes_before_a_text_is_there():
    question = Question("Who lit the lamp?", ("the keeper", "his daughter"), 1)
    (plain,), (opened,) = (tokenise([question], TOKENIZERS[name]) for name in ("plain", "opened"))
    assert opened.context == (TOKENIZERS["opened"].convert_tokens_to_ids("<|user|>"), *plain.context)
    assert opened.completions == plain.completions


def test_what_the_first_token_tells():
    tokenizer = TOKENIZERS["plain"]
    clashing = Question("Which?", ("the ship", "the lamp"), 0)
    (letters,), (texts,) = tokenise([clashing], tokenizer), tokenise([clashing], tokenizer, "text")
    assert letters.first_tokens_differ and {len(each) for each in letters.completions} == {1}
    assert not texts.first_tokens_differ
    distinct = Question("Which?", ("the ship", "a lamp"), 0)
    (texts,) = tokenise([distinct], tokenizer, "text")
    assert texts.first_tokens_differ and min(len(each) for each in texts.completions) > 1


def test_questions_too_long_for_the_model():
    question = Question("Who lit the lamp?", ("the keeper", "his daughter"), 0, "q.jsonl, line 5")
    (tokens,) = tokenise([question], TOKENIZERS["plain"], "text")
    size = len(tokens.context) + max(map(len, tokens.completions))
    assert tokenise([question], TOKENIZERS["plain"], "text", size) == [tokens]
    with pytest.raises(
        InputError, match=rf"q\.jsonl, line 5: the question has {size} tokens, and the model takes at most {size - 1}"
    ):
        tokenise([question], TOKENIZERS["plain"], "text", size - 1)
