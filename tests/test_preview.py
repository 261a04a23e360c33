"""`teacher-dump preview`: rows as tokens, without a model, and the same signs in a pipe as on a terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_server import forked_command
from conftest import TEXT, make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from processes import Command, Notes

from knowledge_store.errors import InputError
from knowledge_store.terminal.tokens import shown_tokens
from teacher_dump import DumpConfig, PreviewConfig, dump, preview
from teacher_dump.dumping.preview import token_texts

TURNS = [{"role": "user", "content": "Who lit\tthe lamp?"}, {"role": "assistant", "content": "The keeper did.\n\n🌊."}]
ROWS = [
    {"messages": TURNS, "source\x1b": "log"},
    {"messages": TURNS[:1]},
    {"prompt": "The lamp", "completion": TEXT[:200]},
    {"text": TEXT},
    {"text": ""},
]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "chat.jsonl", ROWS)


@pytest.fixture
def tokenizer_folder(teacher_folder, tmp_path) -> Path:
    """A teacher without weights."""
    return shutil.copytree(teacher_folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))


def test_rows_are_shown_as_they_are_dumped(corpus, tmp_path, loaded_teacher):
    shown = preview(PreviewConfig("tiny", (corpus,), max_length=40, rows=9), loaded_teacher.tokenizer)
    config = DumpConfig("tiny", (corpus,), tmp_path / "store", max_length=40, skip_bad_rows=True)
    report = dump(config, teacher=loaded_teacher)
    assert shown.counts == report.counts and (report.counts.rows, report.counts.rows_left_out) == (5, 2)
    first, refused, cut, text, empty = shown.rows
    assert first.place == f"{corpus}, line 1" and refused.place == f"{corpus}, line 2"
    assert "no message has the role" in str(refused.problem) and empty.problem == "nothing to learn from"
    (sequence,) = first.sequences
    assert "".join(token.text for token in sequence.tokens if token.is_target) == "The keeper did.\n\n🌊.<|end|>"
    assert [token.text for token in sequence.tokens if token.is_special] == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert cut.sequences[0].tokens_cut == cut.sequences[0].targets_cut > 0 and len(cut.sequences[0].tokens) == 40
    assert len(text.sequences) > 2 and not any(each.tokens_cut for each in text.sequences)


@pytest.mark.parametrize(("too_long", "rows_used"), [("cut", 3), ("skip", 2), ("refuse", 2)])
def test_rows_that_are_too_long(corpus, loaded_teacher, too_long, rows_used):
    shown = preview(PreviewConfig("tiny", (corpus,), max_length=40, rows=9, too_long=too_long), loaded_teacher.tokenizer)
    assert shown.counts.rows_used == rows_used and shown.counts.cut == (too_long == "cut")
    assert ("longer than --max-length" in str(shown.rows[2].problem)) == (too_long != "cut")


def test_only_as_many_rows_as_asked_for_are_read(corpus, loaded_teacher):
    corpus.write_text(corpus.read_text() + "broken\n")
    shown = preview(PreviewConfig("tiny", (corpus,), max_length=40), loaded_teacher.tokenizer)
    assert len(shown.rows) == shown.counts.rows == 3


@given(st.text(max_size=60))
def test_token_texts_put_together_are_the_text(text):
    tokenizer = make_tokenizer()
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    pieces = list(token_texts(tokenizer, ids))
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids.tolist())


def test_signs_show_targets_borders_and_white_space_without_colours():
    tokens = [("<s>", False, True), (" lit", True, False), ("", True, False), ("é\n", True, False), ("\x1b[1m\t", False, False)]
    assert shown_tokens(tokens).plain == "<s>│⟦·lit││é↵\n⟧│\\x1b[1m⇥"
    assert shown_tokens([("a", True, False)]).plain == "⟦a⟧"


def test_the_command_needs_no_weights_and_shows_rows_with_their_reasons(corpus, tokenizer_folder):
    line = ["preview", "--teacher", tokenizer_folder, "--corpus", corpus, "--max-length", 40, "--rows", 5]
    result = forked_command("teacher_dump", *line, before="from transformers import AutoTokenizer")
    assert result.returncode == 0, result
    for words in (
        f"{corpus}, line 1: ",
        "<|assistant|>│⟦",
        "<|end|>⟧",
        "not used: no message has the role `assistant`",
        "✂ cut off: ",
        "Warning: 3 of 5 rows are used, 2 not (40%)",
        "1 row is cut at 40 tokens (33%); 1 answer loses the end",
        "In all: ",
        "Columns read: messages, prompt, completion, text; kept beside and unseen by the teacher: source\\x1b",
    ):
        assert words in result.stdout, words
    assert "\x1b" not in result.stdout


def test_rows_of_which_none_can_be_used_are_shown_and_the_exit_code_says_so(tmp_path, tokenizer_folder):
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text("broken\n" + json.dumps({"title": "x"}))
    result = Command(
        "preview", "--teacher", tokenizer_folder, "--corpus", corpus, "--max-length", 40, folder=tmp_path / "said"
    ).wait()
    assert result.returncode == 2 and "bad.jsonl, line 2: not used: none of the columns" in result.stdout
    assert "Warning: 0 of 2 rows are used, 2 not (100%)" in result.stdout
    assert result.stderr == (
        "`teacher-dump run` would stop: 2 rows of these cannot be used. Repair the corpus, or pass --skip-bad-rows to leave bad"
        " rows out\nError: none of these rows can be used, for the reasons above\n"
    )
    corpus.write_text("\n \n")
    result = Command(
        "preview", "--teacher", tokenizer_folder, "--corpus", corpus, "--max-length", 40, folder=tmp_path / "said"
    ).wait()
    assert (result.returncode, result.stderr) == (2, "Error: the corpus has no rows\n")


def test_rows_that_would_stop_a_run_are_not_said_to_be_left_out(corpus, tmp_path, tokenizer_folder):
    write_jsonl(corpus, ROWS[2:3])
    line = ["preview", "--teacher", tokenizer_folder, "--corpus", corpus, "--max-length", 40, "--too-long", "refuse"]
    result = Command(*line, folder=tmp_path / "said").wait()
    assert result.returncode == 2 and "line 1: would stop the run: longer than --max-length" in result.stdout
    assert "Warning: 0 of 1 row is used, 1 not (100%)" in result.stdout and "left out" not in result.stdout
    assert (
        "would stop: 1 row of these cannot be used. Give a larger --max-length, or use --too-long cut or skip" in result.stderr
    )


def test_a_teacher_without_a_tokenizer_is_refused(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be loaded"):
        preview(PreviewConfig(str(tmp_path / "empty"), (corpus,)))


def test_reasoning_that_the_template_drops_from_earlier_turns_is_counted_and_told(tmp_path, tokenizer_folder):
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if loop.last and message['reasoning_content'] %}({{ message['reasoning_content'] }}) {% endif %}"
        "{{ message['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tokenizer_folder / "chat_template.jinja").write_text(template)
    answer = {"role": "assistant", "content": "Far.", "reasoning_content": "As far as it is seen."}
    corpus = write_jsonl(tmp_path / "reasoning.jsonl", [{"messages": [*TURNS[:1], answer] * 2}])
    result = Command(
        "preview", "--teacher", tokenizer_folder, "--corpus", corpus, "--max-length", 200, folder=tmp_path / "said"
    ).wait()
    assert result.returncode == 0, result
    assert "reasoning of 1 message left out by the template" in result.stdout
    assert "The chat template leaves the reasoning of 1 message out" in result.stdout


def test_a_turn_without_an_end_is_told_once(tokenizer_folder, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}")
    config = PreviewConfig(
        teacher=str(tokenizer_folder),
        corpus=(write_jsonl(tmp_path / "turns.jsonl", ROWS[:1] * 3),),
        chat_template=template,
        max_length=128,
    )
    notes = Notes()
    assert all(row.problem is None for row in preview(config, reporter=notes).rows)
    assert len(notes.notes) == 1 and "a student does not learn there to stop" in notes.notes[0]
