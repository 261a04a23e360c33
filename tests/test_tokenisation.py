"""Documents become sequences in the shapes that TRL's SFTTrainer gives them: which tokens, and which of them count."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE, TEXT, make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from knowledge_store.errors import InputError
from teacher_dump.corpus.documents import Document, read_documents
from teacher_dump.corpus.rows import BadRow, EmptyRow, LongRow, Start
from teacher_dump.corpus.tokenisation import CorpusTokenizer

END = 0  # the id of <|end|>, the tokenizer's end of sequence


def document(**content) -> Document:
    return Document(0, 0, 1, 0, 0, **content)


def opened_tokenizer(opening: str = "<|user|>", closing: str = "<|system|>"):
    """A tokenizer that adds a token of its own at both ends of a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (opening, closing)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{opening} $A {closing}", pair=f"{opening} $A $B {closing}", special_tokens=ids
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids_of(sequence) -> list[int]:
    return sequence.token_ids.tolist()


def words_of(tokenizer, sequence) -> list[str]:
    """The runs of target tokens of a sequence, as text."""
    runs, previous = [], -2
    for position in np.flatnonzero(sequence.is_target):
        if position != previous + 1:
            runs.append([])
        runs[-1].append(sequence.token_ids[position])
        previous = position
    return [tokenizer.decode(run) for run in runs]


# --- text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["The lamp", "The lamp<|end|>"])
def test_a_text_is_closed_once(tokenizer, text):
    (sequence,) = CorpusTokenizer(tokenizer, 64).sequences(document(text=text))
    assert ids_of(sequence) == [*tokenizer("The lamp")["input_ids"], END]
    assert sequence.is_target.tolist() == [False] + [True] * (len(sequence.token_ids) - 1)
    assert not sequence.truncated


def test_windows_of_a_long_text_are_the_text_and_each_is_opened_as_the_tokenizer_opens_texts():
    tokenizer = opened_tokenizer()
    opening = tokenizer.convert_tokens_to_ids("<|user|>")
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    sequences = CorpusTokenizer(tokenizer, 20).sequences(document(text=TEXT))
    assert len(sequences) > 3
    assert all(ids_of(sequence)[0] == opening for sequence in sequences)
    assert [token for sequence in sequences for token in ids_of(sequence)[1:]] == [*plain, END]
    assert {len(sequence.token_ids) for sequence in sequences[:-1]} == {20}
    assert [sequence.window for sequence in sequences] == list(range(len(sequences)))


def test_a_token_that_would_stand_alone_takes_one_along(tokenizer):
    """Alone it would be predicted from nothing, and be lost: here the end of sequence after exactly two windows of text."""
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:24]
    sequences = CorpusTokenizer(tokenizer, 12).sequences(document(text=tokenizer.decode(plain)))
    assert [token for sequence in sequences for token in ids_of(sequence)] == [*plain, END]
    assert [len(sequence.token_ids) for sequence in sequences] == [12, 11, 2]


def test_only_the_last_part_of_a_text_is_closed(tokenizer):
    parts = [
        Document(number, 0, 1, number, 0, last_part=number == 1, text=text)
        for number, text in enumerate(("The lamp ", "burns"))
    ]
    ends = [ids_of(sequence)[-1] for part in parts for sequence in CorpusTokenizer(tokenizer, 64).sequences(part)]
    assert ends[0] != END and ends[1] == END


@given(st.text(st.characters(codec="utf-8"), max_size=80), st.integers(4, 20), st.booleans())
def test_no_sequence_is_too_long_or_trains_on_what_nothing_predicts(tokenizer, opened, text, max_length, with_opening):
    corpus_tokenizer = CorpusTokenizer(opened if with_opening else tokenizer, max_length)
    contents = [{"text": text}, {"prompt": text[:20], "completion": text[20:]}]
    contents.append({"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]})
    for content in contents:
        try:
            sequences = corpus_tokenizer.sequences(document(**content))
        except EmptyRow:
            continue
        except BadRow as reason:
            assert "text" not in content and re.search("leaves no|an answer is empty|private-use plane", str(reason))
            continue
        for sequence in sequences:
            assert 2 <= len(sequence.token_ids) == len(sequence.is_target) <= max_length
            assert not sequence.is_target[0] and sequence.is_target.any()


@pytest.fixture(scope="module")
def opened():
    return opened_tokenizer()


@pytest.mark.parametrize("content", [{"text": ""}, {"prompt": "", "completion": ""}])
def test_empty_texts_are_nothing_to_learn_from(tokenizer, content):
    with pytest.raises(EmptyRow, match="nothing to learn from"):
        CorpusTokenizer(tokenizer, 64).sequences(document(**content))


def test_a_maximum_length_without_room_for_text_is_refused(opened):
    CorpusTokenizer(opened, 3)
    with pytest.raises(InputError, match="--max-length 2 leaves no room: give at least 3"):
        CorpusTokenizer(opened, 2)


# --- prompt and completion ----------------------------------------------------------------------------------------------


def test_a_completion_counts_and_its_prompt_does_not(tokenizer):
    (sequence,) = CorpusTokenizer(tokenizer, 64).sequences(document(prompt="The lamp", completion=" burns early"))
    assert ids_of(sequence) == [*tokenizer("The lamp burns early")["input_ids"], END]
    assert words_of(tokenizer, sequence) == [" burns early<|end|>"]


def test_where_prompt_and_completion_merge_into_one_token_that_token_counts(tokenizer):
    whole = tokenizer("counted the ships")["input_ids"]
    prompt = tokenizer("counted the sh")["input_ids"]
    shared = next(place for place, token in enumerate(prompt) if token != whole[place])
    (sequence,) = CorpusTokenizer(tokenizer, 64).sequences(document(prompt="counted the sh", completion="ips"))
    assert ids_of(sequence) == [*whole, END]
    assert np.flatnonzero(sequence.is_target)[0] == shared


def test_a_completion_is_opened_and_closed_as_a_text_is(opened):
    (sequence,) = CorpusTokenizer(opened, 64).sequences(document(prompt="The lamp", completion=" burns<|end|>"))
    plain = opened("The lamp burns", add_special_tokens=False)["input_ids"]
    assert ids_of(sequence) == [opened.convert_tokens_to_ids("<|user|>"), *plain, END]
    assert words_of(opened, sequence) == [" burns<|end|>"]


@pytest.mark.parametrize("content", [{"text": "{}The lamp"}, {"prompt": "{}The", "completion": " lamp"}])
def test_a_text_that_begins_as_the_tokenizer_opens_it_is_told(opened, tokenizer, content):
    def notes(tokenizer, opening: str) -> list[str]:
        cutter = CorpusTokenizer(tokenizer, 64)
        (sequence,) = cutter.sequences(document(**{part: text.format(opening) for part, text in content.items()}))
        assert ids_of(sequence)[:2].count(tokenizer.convert_tokens_to_ids("<|user|>")) == (tokenizer is opened) + bool(opening)
        return cutter.notes

    assert notes(opened, "") == notes(tokenizer, "<|user|>") == []
    [note] = notes(opened, "<|user|>")
    assert note.startswith("some texts begin with <|user|>, which the tokenizer puts before every text")


def test_a_conversation_as_prompt_and_completion(tokenizer):
    prompt = [{"role": "user", "content": "How far?"}]
    completion = [{"role": "assistant", "content": "As far as somebody looks."}]
    (sequence,) = CorpusTokenizer(tokenizer, 64).sequences(document(prompt=prompt, completion=completion))
    rendered = "<|user|>How far?<|end|>\n<|assistant|>As far as somebody looks.<|end|>\n"
    assert ids_of(sequence) == tokenizer(rendered)["input_ids"]  # no second end of sequence
    assert words_of(tokenizer, sequence) == ["As far as somebody looks.<|end|>"]


def test_what_goes_on_after_the_maximum_length_is_cut_and_said(tokenizer):
    whole = CorpusTokenizer(tokenizer, 256).sequences(document(prompt="The lamp", completion=TEXT[:200]))[0]
    (sequence,) = CorpusTokenizer(tokenizer, 20).sequences(document(prompt="The lamp", completion=TEXT[:200]))
    assert ids_of(sequence) == ids_of(whole)[:20]
    assert sequence.truncated and not whole.truncated
    lost = len(whole.token_ids) - 20
    assert (sequence.tokens_cut, sequence.targets_cut) == (lost, lost) and (whole.tokens_cut, whole.targets_cut) == (0, 0)


def test_an_answer_before_the_cut_loses_nothing(tokenizer):
    messages = [{"role": "user", "content": "Far?"}, {"role": "assistant", "content": "Far."}]
    short = len(CorpusTokenizer(tokenizer, 64).sequences(document(messages=messages))[0].token_ids)
    longer = [*messages, {"role": "user", "content": "How far?"}]
    (sequence,) = CorpusTokenizer(tokenizer, short).sequences(document(messages=longer))
    assert sequence.tokens_cut > 0 and sequence.targets_cut == 0


def test_what_is_too_long_is_refused_where_nothing_may_be_cut_and_plain_text_is_not(tokenizer):
    whole = CorpusTokenizer(tokenizer, 20, cut=False)
    with pytest.raises(LongRow, match=r"longer than --max-length \(it has \d+ tokens, and may have 20\)"):
        whole.sequences(document(prompt="The lamp", completion=TEXT[:200]))
    assert len(whole.sequences(document(text=TEXT[:200]))) > 1


def test_a_prompt_that_fills_the_maximum_length_is_refused(tokenizer):
    length = len(tokenizer(TEXT[:100])["input_ids"])
    content = {"prompt": TEXT[:100], "completion": " and so on"}
    with pytest.raises(BadRow, match=rf"the prompt leaves no room .*it has {length} tokens, and --max-length is {length}"):
        CorpusTokenizer(tokenizer, length).sequences(document(**content))
    (sequence,) = CorpusTokenizer(tokenizer, length + 1).sequences(document(**content))
    assert sequence.is_target.sum() == 1


# --- messages -----------------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How far?"},
    {"role": "assistant", "content": "Far é🌊."},
    {"role": "user", "content": "Farther?"},
    {"role": "assistant", "content": "  As far\n\nas somebody looks. "},
]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_assistants_turns_count_with_and_without_marks(template, trim_offsets):
    from tokenizers.processors import ByteLevel

    tokenizer = make_tokenizer()
    # Some tokenizers leave spaces out of the places that they report for their tokens.
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    tokenizer.chat_template = template
    (sequence,) = CorpusTokenizer(tokenizer, 128).sequences(document(messages=CONVERSATION))
    assert ids_of(sequence) == tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert words_of(tokenizer, sequence) == ["Far é🌊.<|end|>", "  As far\n\nas somebody looks. <|end|>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE])
def test_the_last_turn_that_was_cut_off_has_no_end(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    reader, last = CorpusTokenizer(tokenizer, 128), "  As far\n\nas somebody looks. "
    (whole,) = reader.sequences(document(messages=CONVERSATION, finish="stop"))
    assert words_of(tokenizer, whole) == ["Far é🌊.<|end|>", f"{last}<|end|>"]
    for more in ([], [{"role": "user", "content": "Go on."}]):
        (cut,) = reader.sequences(document(messages=[*CONVERSATION, *more], finish="length"))
        assert words_of(tokenizer, cut) == ["Far é🌊.<|end|>", last.rstrip()]
    unweighted = [*CONVERSATION[:-1], {**CONVERSATION[-1], "weight": 0}]  # the turn that was cut off is no target at all
    (cut,) = reader.sequences(document(messages=unweighted, finish="length"))
    assert words_of(tokenizer, cut) == ["Far é🌊.<|end|>"]


def test_a_text_that_was_cut_off_has_no_end(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": TEXT * 2, "finish_reason": reason} for reason in ("stop", "length")])
    parts = list(read_documents((path,), Start(0, 0, 1, 0, 0), len(TEXT)))
    assert [(part.row, part.last_part, part.finish) for part in parts if part.finish] == [
        (1, True, "stop"),
        (2, True, "length"),
    ]
    whole, cut = ([s for p in parts if p.row == row for s in CorpusTokenizer(tokenizer, 64).sequences(p)] for row in (1, 2))
    assert [*map(ids_of, cut[:-1])] == [*map(ids_of, whole[:-1])]
    assert ids_of(whole[-1]) == [*ids_of(cut[-1]), tokenizer.eos_token_id] and cut[-1].is_target[1:].all()


def test_a_completion_of_calls_alone_that_says_how_it_has_ended_has_something_to_learn():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}",
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "lamp", "arguments": {}}}]}
    (sequence,) = CorpusTokenizer(tokenizer, 64).sequences(document(prompt=CONVERSATION[:2], completion=[call], finish="stop"))
    said = {"role": "assistant", "content": "", "tool_calls": [], "refusal": None, "weight": 1}  # as servers answer
    with pytest.raises(EmptyRow):  # which is left out, and stops nothing
        CorpusTokenizer(tokenizer, 64).sequences(document(prompt=CONVERSATION[:2], completion=[said], finish="stop"))
    assert words_of(tokenizer, sequence) == ["lamp<|end|>"]


def test_a_template_that_leaves_words_out_is_refused_with_their_place():
    forgetful = make_tokenizer()
    forgetful.chat_template = (
        "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}<|{{ message['role'] }}|>"
        "{{ message['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(BadRow, match=r"leaves out words of the row: message 1 \(system\), `content`; .* --chat-template"):
        CorpusTokenizer(forgetful, 128).sequences(document(messages=CONVERSATION))


def test_a_conversation_without_an_assistant_is_refused(tokenizer):
    with pytest.raises(BadRow, match="no message has the role `assistant`"):
        CorpusTokenizer(tokenizer, 64).sequences(document(messages=CONVERSATION[:2]))


def test_a_tokenizer_without_a_template_is_refused_and_the_way_out_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"no chat template.*`prompt` and `completion`"):
        CorpusTokenizer(tokenizer, 64).sequences(document(messages=CONVERSATION))


@pytest.mark.parametrize("failure", ["{{ raise_exception('not so') }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ none.x.y }}"])
def test_a_row_that_the_template_fails_on_is_that_row_alone(failure):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = failure
    with pytest.raises(BadRow, match="the chat template refuses it"):
        CorpusTokenizer(tokenizer, 64).sequences(document(messages=CONVERSATION))


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_arguments_reach_the_template(tmp_path: Path, as_text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}{{ mood or 'plain' }}\n" + MARKED_CHAT_TEMPLATE
    )
    tools = [{"type": "function", "function": {"name": "lamp"}}]
    messages = CONVERSATION[1:3]
    row = {"messages": messages, "tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"mood": "stormy"}}
    path = tmp_path / "a.jsonl"
    halves = {**row, "messages": None, "prompt": messages[:1], "completion": messages[1:]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(halves) + "\n")
    for each in read_documents((path,), Start(0, 0, 1, 0, 0), 1000):
        (sequence,) = CorpusTokenizer(tokenizer, 64).sequences(each)
        assert tokenizer.decode(sequence.token_ids).startswith("lamp stormy\n<|user|>")
        assert words_of(tokenizer, sequence)[0].startswith("Far é🌊.<|end|>")
