"""Rows of several answers to one prompt: each answer is the sequence that a row of prompt and completion makes, and a row that
cannot be compared says why in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import contents
from typer.testing import CliRunner

from knowledge_store import InputError, KnowledgeStore, verify
from teacher_dump import CheckConfig, DumpConfig, RunConfig, append, check, dump
from teacher_dump.checking.agreement import AGREES
from teacher_dump.cli import app
from teacher_dump.configuration import EstimateConfig, PreviewConfig
from teacher_dump.corpus import pieces
from teacher_dump.corpus.columns import Columns, read_columns
from teacher_dump.corpus.documents import Document, has_groups, read_documents
from teacher_dump.corpus.row_shapes import read_content
from teacher_dump.corpus.rows import BadRow, LongRow, Start
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.dumping.estimate import estimate
from teacher_dump.dumping.preview import preview
from teacher_dump.dumping.repair import repair

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = {"role": "user", "content": "How far?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": "How far?", "chosen": " As far as somebody looks.", "rejected": " A mile.", "source": "a"},
    {
        "prompt": "In winter",
        "chosen": " the book was empty.",
        "rejected": " they slept, and read old pages aloud.",
        "source": "b",
    },
    {"prompt": [QUESTION], "chosen": [said("Far.")], "rejected": [said("Near enough.")], "source": "c"},
    {"chosen": [QUESTION, said("Far.")], "rejected": [QUESTION, said("Not so far.")], "source": "d"},
    {"prompt": "When a storm came", "completions": [" he lit the lamp", " no", " early. They waited"], "scores": [0.5, -1, 2]},
    {"prompt": [QUESTION], "completions": [[said("Far.")], [said("As far as that.")]]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def document(row: dict, columns: str | None = None) -> Document:
    content = read_content(row, Columns(read_columns(columns)))
    return Document(0, 0, 1, 0, 0, columns=content.columns, **content.fields)


def group(tokenizer, row: dict, columns: str | None = None, max_length: int = 128, cut: bool = True):
    return CorpusTokenizer(tokenizer, max_length, cut).sequences(document(row, columns))


def assert_answers(found, tokenizer, prompt, answers, scores, **beside):
    """The windows of a group are what rows of the prompt and each answer become."""
    assert [sequence.window for sequence in found] == list(range(len(answers)))
    assert [sequence.score for sequence in found] == scores
    for sequence, answer in zip(found, answers, strict=True):
        [alone] = CorpusTokenizer(tokenizer, 128).sequences(document({"prompt": prompt, "completion": answer, **beside}))
        assert np.array_equal(sequence.token_ids, alone.token_ids) and np.array_equal(sequence.is_target, alone.is_target)


TEXTS = st.text(st.sampled_from("ab \n.<|éZ"), max_size=12)
ANSWERS = st.lists(TEXTS.filter(str.strip), min_size=2, max_size=4, unique_by=str.strip)


@settings(max_examples=40)
@given(prompt=TEXTS, answers=ANSWERS, data=st.data())
def test_each_answer_is_what_prompt_and_completion_make(tokenizer, prompt, answers, data):
    """In every shape that rows of answers have, of text and of messages."""
    scores = data.draw(st.none() | st.just([float(place) for place in range(len(answers))]))
    more = {} if scores is None else {"scores": scores}
    unscored = [None] * len(answers)
    found = group(tokenizer, {"prompt": prompt, "completions": answers, **more})
    assert_answers(found, tokenizer, prompt, answers, scores or unscored)
    chosen, rejected = answers[:2]
    found = group(tokenizer, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert_answers(found, tokenizer, prompt, [chosen, rejected], [1.0, 0.0])

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt or "x"}]
    replies = [[said(answer)] for answer in answers]
    found = group(tokenizer, {"prompt": turns, "completions": replies, **more})
    assert_answers(found, tokenizer, turns, replies, scores or unscored)
    for prompted in (
        {"prompt": turns, "chosen": replies[0], "rejected": replies[1]},
        {"chosen": turns + replies[0], "rejected": turns + replies[1]},
        {
            "prompt": prompt or "x",
            "chosen": turns + replies[0],
            "rejected": turns + replies[1],
        },  # as published data sets have it
        {"instruction": prompt or "x", "system": "Be brief.", "chosen": chosen, "rejected": rejected},
    ):
        assert_answers(group(tokenizer, prompted), tokenizer, turns, replies[:2], [1.0, 0.0])


def test_names_of_columns(tokenizer):
    """As in some of the published data sets of preferences."""
    orca = {"system": "Be brief.", "question": "How far?", "chosen": " Far.", "rejected": " Near."}
    plain = group(tokenizer, orca, "prompt=question,system=-")
    assert_answers(plain, tokenizer, "How far?", [" Far.", " Near."], [1.0, 0.0])
    turns, replies = [{"role": "system", "content": "Be brief."}, QUESTION], [[said(" Far.")], [said(" Near.")]]
    assert_answers(group(tokenizer, orca, "instruction=question"), tokenizer, turns, replies, [1.0, 0.0])

    ranked = {"q": [QUESTION], "replies": [[said("Far.")], [said("Near.")]], "marks": [3, 1], "completion": "x"}
    names = "prompt=q,completions=replies,scores=marks"
    assert_answers(group(tokenizer, ranked, names), tokenizer, [QUESTION], ranked["replies"], [3.0, 1.0])

    binarized = {
        "prompt": "How far?",
        "prompt_id": "77",
        "chosen": [QUESTION, said("Far.")],
        "rejected": [QUESTION, said("Near.")],
        "messages": [QUESTION, said("Far.")],
        "score_chosen": 8.0,
        "score_rejected": 2.5,
    }
    with pytest.raises(ValueError, match="--columns messages=messages or --columns chosen=chosen,rejected=rejected"):
        read_content(binarized)
    found = document(binarized, "chosen=chosen,rejected=rejected")
    assert found.prompt == [QUESTION] and found.completions == ([said("Far.")], [said("Near.")])
    assert found.columns is not None and found.columns.keys() == {
        "prompt",
        "prompt_id",
        "messages",
        "score_chosen",
        "score_rejected",
    }
    assert document(binarized, "messages=messages").messages == binarized["messages"]

    [one, other] = said("Far."), said("Near.")
    single = {"conversations": [{"from": "human", "value": "How far?"}], "chosen": {"from": "gpt", "value": "Far."}}
    found = document({**single, "rejected": other}, "prompt=conversations,chosen=chosen,rejected=rejected")
    assert found.prompt == [QUESTION] and found.completions == ([one], [other])
    found = document({"prompt": [QUESTION], "completions": [one, [other]], "finish": ["stop", "stop"]})
    assert found.completions == ([one], [other]) and found.columns == {"finish": ["stop", "stop"]}

    as_json = {"chosen": json.dumps([QUESTION, said("Far.")]), "rejected": json.dumps([QUESTION, said("Near.")])}
    found = group(tokenizer, as_json, "chosen=chosen:json,rejected=rejected:json")
    assert_answers(found, tokenizer, [QUESTION], [[said("Far.")], [said("Near.")]], [1.0, 0.0])
    tools = {"prompt": [QUESTION], "chosen": [said("Far.")], "rejected": [said("Near.")], "chat_template_kwargs": {"x": 1}}
    assert document(tools).template_arguments == {"x": 1}


LONG = "the lamp " * 30
BAD = {
    "a group of one": ({"prompt": "p", "completions": ["a"]}, "a group of 1: of fewer than two answers"),
    "no answer": ({"prompt": "p", "completions": []}, "a group of 0"),
    "no list": ({"prompt": "p", "completions": {"a": 1}}, "`completions` is not a list"),
    "an empty answer": ({"prompt": "p", "completions": ["a", " "]}, "an answer is empty.*`completions`: answer 2"),
    "an empty rejected": ({"prompt": "p", "chosen": "a", "rejected": "\n"}, "an answer is empty.*`rejected`"),
    "no messages": ({"prompt": [QUESTION], "completions": [[said("a")], []]}, "an answer is empty.*`completions`: answer 2"),
    "a prompt alone": ({"chosen": [QUESTION, said("a")], "rejected": [QUESTION]}, "an answer is empty.*`rejected`"),
    "other scores": ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, r"another number of entries .*\(1 for 2\)"),
    "no number": ({"prompt": "p", "completions": ["a", "b"], "scores": [1, "2"]}, "no finite number: entry 2 is '2'"),
    "no finite score": ({"prompt": "p", "completions": ["a", "b"], "scores": [float("nan"), 1]}, "no finite number: entry 1"),
    "a score that no double holds": (
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 10**400]},
        "no finite number: entry 2 is 10{20,40}$",
    ),
    "an answer that its model did not end": (
        {"prompt": "p", "completions": ["a", "b"], "finish": ["stop", "length"]},
        "answer 2 of a group was cut off where it was written",
    ),
    "a filtered answer": (
        {"prompt": "p", "completions": ["a", "b"], "finish_reason": ["content_filter", "stop"]},
        "answer 1 of a group was cut off where it was written .`finish_reason` is `content_filter`",
    ),
    "one of a pair by its reason": (
        {"chosen": [QUESTION, said("a")], "rejected": [QUESTION, said("b")], "finish_reason": "length"},
        "an answer of a group was cut off",
    ),
    "one of a pair": ({"prompt": "p", "chosen": "a", "rejected": "b", "finish": "length"}, "an answer of a group was cut off"),
    "scores no list": ({"prompt": "p", "completions": ["a", "b"], "scores": 3}, "`scores` is not a list"),
    "equal scores": ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1.0]}, "all its `scores` are equal"),
    "one text": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "its answers are all the same"),
    "one conversation": ({"chosen": [QUESTION, said("a")], "rejected": [QUESTION, said("a")]}, "its answers are all the same"),
    "texts without a prompt": ({"chosen": "Human: Hi Assistant: a", "rejected": "Human: Hi"}, "nothing says where"),
    "other beginnings": (
        {"chosen": [QUESTION, said("a")], "rejected": [{"role": "user", "content": "Who?"}, said("a")]},
        "begin with different messages",
    ),
    "another prompt": (
        {"prompt": "Who?", "chosen": [QUESTION, said("a")], "rejected": [QUESTION, said("b")]},
        "`prompt` is the text of none of the messages of `chosen`",
    ),
    "the prompt again": (
        {"prompt": [QUESTION], "chosen": [QUESTION, said("a")], "rejected": [QUESTION, said("b")]},
        "`chosen` repeats the messages of `prompt`",
    ),
    "text and messages": ({"prompt": "p", "chosen": "a", "rejected": [said("b")]}, "must all be texts, or all lists"),
    "texts to messages": ({"prompt": [QUESTION], "completions": ["a", "b"]}, "must be texts, or lists of messages"),
    "entries of another sort": ({"prompt": "p", "completions": [{"response": "a"}, {"response": "b"}]}, "must be texts"),
    "only chosen": ({"prompt": "p", "chosen": "a"}, "`chosen` and `rejected` must both be given"),
    "a completion too": ({"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}, "fits two shapes"),
    "a cut answer": ({"prompt": "p", "chosen": "a", "rejected": LONG}, r"would be cut \(answer 2 of 2 has \d+ tokens"),
    "a full prompt": ({"prompt": LONG, "chosen": "a", "rejected": "b"}, "the prompt leaves no room"),
    "no words of its own": ({"prompt": [QUESTION], "completions": [[said("a")], [said(" ")]]}, "an answer .* in answer 2 of 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_groups_say_why_in_one_line(tokenizer, name):
    row, reason = BAD[name]
    with pytest.raises((BadRow, ValueError), match=reason) as raised:
        group(tokenizer, row, max_length=40)
    assert "\n" not in str(raised.value)


def test_a_group_that_is_too_long_can_be_skipped(tokenizer):
    row = BAD["a cut answer"][0]
    with pytest.raises(LongRow):
        group(tokenizer, row, max_length=40, cut=False)
    assert len(group(tokenizer, row)) == 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Each row of PAIRS, twice, and a bad one in the middle."""
    rows = [*PAIRS, {"prompt": "p", "chosen": "a", "rejected": "a"}, *PAIRS]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def config_of(corpus, store, **options) -> DumpConfig:
    return DumpConfig("tiny", (corpus,), store, "pairs", max_length=64, shard_size=3, skip_bad_rows=True, **options)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory, corpus, loaded_teacher) -> Path:
    folder = tmp_path_factory.mktemp("dumped") / "store"
    dump(config_of(corpus, folder), teacher=loaded_teacher)
    return folder


def test_a_dump_of_groups(dumped, corpus, tokenizer):
    store = KnowledgeStore.open(dumped)
    manifest = store.manifest()
    assert manifest.plan["groups"] is True and manifest.has_groups
    rows = store.sequences().to_pylist()
    expected = [(0, 1.0), (1, 0.0), *[(0, 1.0), (1, 0.0)] * 3, (0, 0.5), (1, -1.0), (2, 2.0), (0, None), (1, None)] * 2
    assert [(row["window"], row["score"]) for row in rows] == expected
    assert [row["document"] for row in rows] == sorted(row["document"] for row in rows)
    assert store.sequences().column_names[9:12] == ["token_hash", "score", "source"]
    assert not any(row["truncated"] for row in rows) and {row["row"] for row in rows} == set(range(1, 14)) - {7}
    assert verify(dumped).sound
    best = store.sql(
        "SELECT sequence_id FROM sequences QUALIFY row_number() OVER (PARTITION BY document ORDER BY score DESC) = 1"
    )
    assert len(best) == 12
    found = 0
    for batch in store.batches(batch_size=4, groups=True, seed=1):
        for place in range(batch["group"].max() + 1):
            members = np.flatnonzero(batch["group"] == place)
            scores = sorted(batch["score"][members].tolist())
            assert len(members) in (2, 3) and (np.isnan(scores).all() or scores in ([0, 1], [-1, 0.5, 2]))
            found += 1
    assert found == 12
    assert sum((batch["sequence_id"] >= 0).sum() for batch in store.batches(batch_size=4)) == len(rows)


def test_workers_repair_and_resume_make_the_same(tmp_path, dumped, corpus, loaded_teacher, monkeypatch):
    for name in ("MIN_PIECE_BYTES", "MAX_PIECE_BYTES"):
        monkeypatch.setattr(pieces, name, 500)
    config = config_of(corpus, tmp_path / "store")
    for rank in (1, 0):
        dump(config, rank, 2, loaded_teacher)
    dump(config, teacher=loaded_teacher)
    assert contents(tmp_path / "store") == contents(dumped)
    (tmp_path / "store" / "pairs" / "sequences" / "00001.parquet").unlink()
    repair(config, teacher=loaded_teacher)
    assert contents(tmp_path / "store") == contents(dumped)


def test_estimate_and_preview_take_groups(corpus, loaded_teacher, tokenizer):
    found = estimate(EstimateConfig("tiny", (corpus,), max_length=64), loaded_teacher)
    assert found.counts.sequences == 26
    shown = preview(PreviewConfig("tiny", (corpus,), max_length=64, rows=7), tokenizer)
    assert [len(row.sequences) for row in shown.rows] == [2, 2, 2, 2, 3, 2, 0]


def test_a_preview_shows_all_answers_with_their_scores(tmp_path, teacher_folder):
    corpus = write_jsonl(tmp_path / "c.jsonl", PAIRS[4:])
    line = ["preview", "--teacher", str(teacher_folder), "--corpus", str(corpus), "--max-length", "64"]
    shown = CliRunner().invoke(app, line).stdout
    assert "in 3 answers" in shown and "in 2 answers" in shown
    labels = [text for text in shown.splitlines() if text.startswith("answer ")]
    numbers = ["answer 1, score 0.5:", "answer 2, score -1:", "answer 3, score 2:"]
    assert labels == [*numbers, "answer 1, no score:", "answer 2, no score:"]


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([*PAIRS, {"text": "The lighthouse keeper"}], "line 7: it has one text or answer, and the rows before it have several"),
        (
            [{"text": "The lighthouse keeper"}, {"title": 1}, *PAIRS],
            "line 3: it has several answers to compare",
        ),
    ],
)
def test_a_corpus_has_groups_in_all_of_its_rows_or_in_none(tmp_path, loaded_teacher, rows, where, monkeypatch):
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(InputError, match=where):
        dump(config_of(corpus, tmp_path / "s"), teacher=loaded_teacher)
    for name in ("MIN_PIECE_BYTES", "MAX_PIECE_BYTES"):
        monkeypatch.setattr(pieces, name, 200)
    with pytest.raises(InputError, match=where):
        dump(config_of(corpus, tmp_path / "s"), teacher=loaded_teacher)
    assert not (tmp_path / "s" / "pairs" / "manifest.json").exists()


def test_bad_groups_stop_a_dump_before_its_teacher_is_loaded(tmp_path, teacher_folder):
    """One line and exit code 2; `--too-long skip` leaves long ones out."""
    for name, option in (("equal scores", []), ("a cut answer", ["--too-long", "cut"])):
        row, reason = BAD[name]
        corpus = write_jsonl(tmp_path / "c.jsonl", [PAIRS[0], row])
        line = ["run", str(tmp_path / "s"), "--teacher", str(teacher_folder), "--corpus", str(corpus), "--max-length", "40"]
        done = CliRunner().invoke(app, [*line, *option])
        errors = [text for text in done.stderr.splitlines() if text.startswith("Error: ")]
        assert done.exit_code == 2 and len(errors) == 1 and "line 2: " in errors[0]
        assert re.search(reason, errors[0]) and not (tmp_path / "s" / "pairs").exists()
    rows = list(read_documents((corpus,), Start(0, 0, 1, 0, 0), 100))
    assert all(row.is_group for row in rows) and has_groups((corpus,), 100)


def test_a_family_of_dumps_has_groups_in_all_or_none(tmp_path, corpus, teacher_folder, loaded_teacher):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "The lighthouse keeper counted the ships."}])
    config = DumpConfig(str(teacher_folder), (texts,), tmp_path / "s", "news", max_length=64)
    dump(config, teacher=loaded_teacher)
    more = RunConfig(corpus=(corpus,), store=tmp_path / "s", teacher=str(teacher_folder), append="news", skip_bad_rows=True)
    with pytest.raises(InputError, match=r"pairs\.jsonl are groups of answers, and those of the dump news are not"):
        append(more, teacher=loaded_teacher)
    assert KnowledgeStore.open(tmp_path / "s").dumps == ("news",)


def test_a_teacher_agrees_with_its_dump_of_groups(dumped, corpus, loaded_teacher):
    found = check(CheckConfig(dumped, "loaded"), loaded_teacher)["positions"]
    assert found.verdict == AGREES
