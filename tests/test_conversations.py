"""Conversations: what messages may hold, which of them are targets, and that no word of a row is lost."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer

from knowledge_store import InputError
from knowledge_store.tokenizer import opening_tokens
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.chat.template import ChatTemplate
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.rows import BadRow
from teacher_dump.corpus.tokenisation import CorpusTokenizer, describe_tokenizer
from teacher_dump.teachers.files import model_files
from teacher_dump.teachers.local import load_teacher

ASK = {"role": "user", "content": "How far?"}
ANSWER = {"role": "assistant", "content": "As far as somebody looks."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"far": 3, "at": ["sea", "sky"]}}}]}
SEEN = {"role": "tool", "name": "look", "content": "a ship"}

# Shows what the plain one does not: reasoning of the last turn, calls with their arguments as JSON, and tools.
FULL_TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{%- for message in messages %}<|{{ message['role'] }}|>
{%- if loop.last and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message['content'] }}
{%- for call in message.tool_calls or [] %}<call>{{ call.function.name }}:{{ call.function.arguments | tojson }}</call>
{%- endfor %}
{{- '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def chat(template: str = FULL_TEMPLATE, **options) -> ChatTemplate:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, ChatOptions("2026-01-31", **options))


def shown(template: ChatTemplate, messages: list[dict], **arguments) -> str:
    """The conversation as text, with targets in brackets."""
    found = template.tokens(messages, arguments)
    tokenizer, runs = make_tokenizer(), itertools.groupby(range(len(found.token_ids)), key=lambda index: found.is_target[index])
    texts = ((target, tokenizer.decode(found.token_ids[list(run)])) for target, run in runs)
    return "".join(f"⟦{text}⟧" if target else text for target, text in texts)


def test_calls_count_with_their_syntax_and_results_do_not():
    assert shown(chat(), [ASK, CALL, SEEN, ANSWER]) == (
        '<|user|>How far?<|end|>\n<|assistant|>⟦<call>look:{"far": 3, "at": ["sea", "sky"]}</call><|end|>⟧\n'
        "<|tool|>a ship<|end|>\n<|assistant|>⟦As far as somebody looks.<|end|>⟧\n"
    )


def test_content_is_text_or_text_in_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "far?"}]}, ANSWER]
    assert shown(chat(), parts) == shown(chat(), [ASK, ANSWER])
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]
    with pytest.raises(BadRow, match=r"message 1 \(user\): `content` has a part of type `image_url`"):
        chat().tokens(picture)


def test_arguments_are_an_object_or_json_text():
    written = json.loads(json.dumps(CALL))
    written["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["tool_calls"][0]["function"]["arguments"])
    assert shown(chat(), [ASK, written]) == shown(chat(), [ASK, CALL])
    wants_text = chat(FULL_TEMPLATE.replace("arguments | tojson", "arguments + ''"))
    assert shown(wants_text, [ASK, written]) == shown(wants_text, [ASK, CALL]) == shown(chat(), [ASK, CALL])
    written["tool_calls"][0]["function"]["arguments"] = '{"far": 3, "far": 4}'
    with pytest.raises(BadRow, match=r"message 2 \(assistant\): `tool_calls\[0\].function.arguments` is not JSON .*twice"):
        chat().tokens([ASK, written])


def test_arguments_are_never_written_as_python_prints_an_object():
    printed = chat(FULL_TEMPLATE.replace("arguments | tojson", "arguments | string"))
    assert shown(printed, [ASK, CALL]) == shown(chat(), [ASK, CALL])
    with pytest.raises(BadRow, match=r"message 2 \(assistant\), `tool_calls\[0\].function.arguments`"):
        chat(FULL_TEMPLATE.replace("arguments | tojson", "arguments.copy()")).tokens([ASK, CALL])


@pytest.mark.parametrize(
    "message, place",
    [
        ({**ANSWER, "reasoning_content": "Light bends."}, r"message 2 \(assistant\), `reasoning_content`"),
        (CALL, r"message 2 \(assistant\), `tool_calls\[0\].function.name`"),
        ({**ANSWER, "note": "a word"}, r"message 2 \(assistant\), `note`"),
    ],
)
def test_words_that_a_template_leaves_out_are_named_with_the_way_out(message, place):
    with pytest.raises(BadRow, match=f"{place}; name a template that shows them with --chat-template, or remove it"):
        chat(CHAT_TEMPLATE).tokens([ASK, message, ASK, ANSWER])
    with pytest.raises(BadRow, match=r"`tools\[0\].function.name`"):
        chat(CHAT_TEMPLATE).tokens([ASK, ANSWER], {"tools": [{"type": "function", "function": {"name": "look"}}]})


def test_a_template_may_look_into_the_names_of_tools():
    spaces = "{% for tool in tools %}{{ tool.function.name.split('.')[0] }}: {{ tool.function.name }}\n{% endfor %}"
    tools = [{"type": "function", "function": {"name": name}} for name in ("sea.look", "sea.sail")]
    assert shown(chat(spaces + CHAT_TEMPLATE), [ASK, ANSWER], tools=tools).startswith("sea: sea.look\nsea: sea.sail\n<|user|>")
    with pytest.raises(BadRow, match=r"`tools\[1\].function.description`"):
        tools[1]["function"]["description"] = "To go there."
        chat(spaces + CHAT_TEMPLATE).tokens([ASK, ANSWER], {"tools": tools})


def test_a_message_of_a_role_that_a_template_does_not_know_is_refused():
    template = CHAT_TEMPLATE.replace("messages %}", "messages if message['role'] != 'developer' %}")
    with pytest.raises(BadRow, match=r"message 1 \(developer\), `content`; .*give the message the role `system`"):
        chat(template).tokens([{"role": "developer", "content": "Be brief."}, ASK, ANSWER])


def test_reasoning_that_a_template_drops_from_earlier_turns_is_counted():
    answer = {**ANSWER, "reasoning_content": "Light bends."}
    found = chat().tokens([ASK, answer, ASK, answer])
    assert found.dropped_reasoning == 1
    text = shown(chat(), [ASK, answer, ASK, answer])
    assert text.count("Light bends.") == 1 and "⟦<think>Light bends.</think>As far as somebody looks.<|end|>⟧" in text


@pytest.mark.parametrize("content", [None, ""])
def test_an_answer_without_words_is_refused(content):
    with pytest.raises(BadRow, match=r"message 2 \(assistant\)"):
        chat().tokens([ASK, {"role": "assistant", "content": content}])
    empty_calls = {"role": "assistant", "content": content, "tool_calls": None}
    with pytest.raises(BadRow, match=r"message 2 \(assistant\)"):
        chat().tokens([ASK, empty_calls])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"weight": 0.5}, "`weight` is 0.5, and can be 0 or 1"),
        ({"train": "yes"}, "`train` is 'yes', and can be true or false"),
        ({"weight": 1, "train": False}, "contradict each other"),
        ({"tool_calls": "look()"}, "`tool_calls` is not a list"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, r"`tool_calls\[0\]` has no `name`"),
        ({"reasoning": "So.", "thinking": "Or so."}, "`thinking` and `reasoning` say different things"),
        ({"content": 5}, "`content` is neither text nor a list"),
        ({"content": [{"type": "text"}]}, "`content` has a part of type `text` whose `text` is not there"),
        ({"function_call": {"name": "look", "arguments": "{}"}}, "`function_call` is an old form of a call"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(fields, said):
    with pytest.raises(BadRow, match=rf"message 2 \(assistant\): .*{said}"):
        chat().tokens([ASK, {**ANSWER, **fields}])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"name": "get", "args": {"days": 3}}, "`args`: a call has its arguments as `arguments`, beside its `name`"),
        ({"function": {"name": "get"}, "arguments": {"city": "Paris"}}, "`arguments` beside its `function`"),
        ({"function": {"name": "get"}, "args": {"days": 3}}, "`args` beside its `function`"),
        ({"function": {"name": "get", "parameters": {"days": 3, "hourly": True}}}, "`parameters`"),
        ({"function": {"name": "get", "arguments": {}, "input": {"days": 3}}}, "`input`"),
        ({"name": "get", "parameters": 3}, "`parameters`"),
    ],
)
def test_arguments_by_another_name_are_not_lost(call, said):
    with pytest.raises(BadRow, match=rf"message 2 \(assistant\): `tool_calls\[0\]` has {said}"):
        chat().tokens([ASK, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(
    "flag", [{"loss": False}, {"masked": True}, {"loss_weight": 0.5}, {"train_detail": [{"train": False}]}]
)
def test_what_is_trained_on_by_another_name_is_not_passed_over(flag):
    with pytest.raises(BadRow, match=rf"message 2 \(assistant\): `{next(iter(flag))}` is not read here: `train`"):
        chat().tokens([ASK, {**ANSWER, **flag}])


@pytest.mark.parametrize("role", ["model", "gpt", "bot", "Assistant", "ASSISTANT ", "chatgpt", "function_call"])
def test_the_assistant_by_another_name_is_no_context_unnoticed(role):
    named = {"role": role, "content": "Near."}
    for conversation in ([ASK, named], [ASK, ANSWER, ASK, named], [ASK, named, ASK, ANSWER]):
        where = conversation.index(named) + 1
        with pytest.raises(BadRow, match=rf"another name of the assistant as its role.*: message {where} \({role}\)") as bad:
            chat().tokens(conversation)
        assert "message" not in bad.value.reason.removeprefix("a message") and role not in bad.value.reason
    assert shown(chat(), [ASK, {**named, "weight": 0}, ASK, ANSWER]).count("⟦") == 1
    asked = chat().tokens([ASK, named, ASK, ANSWER], completion_from=3)  # what a prompt has is context
    assert asked.is_target.any()


def test_messages_of_no_weight_are_context():
    messages = [ASK, ANSWER, ASK, {"role": "assistant", "content": "Far."}]
    assert shown(chat(), [ASK, {**ANSWER, "weight": 0}, *messages[2:]]).count("⟦") == 1
    assert shown(chat(), [ASK, {**ANSWER, "train": False}, *messages[2:]]).endswith("⟦Far.<|end|>⟧\n")
    assert shown(chat(), [ASK, {**ANSWER, "weight": 1}, *messages[2:]]) == shown(chat(), messages)
    with pytest.raises(BadRow, match="leaves no message of the assistant to learn"):
        chat().tokens([ASK, {**ANSWER, "weight": 0}])
    with pytest.raises(BadRow, match=r"message 1 \(user\): it is to be a target"):
        chat().tokens([{**ASK, "train": True}, ANSWER])


def test_the_last_answer_alone_is_trained_on_where_it_is_asked_for():
    messages = [ASK, ANSWER, ASK, {"role": "assistant", "content": "Far."}, ASK]
    assert shown(chat(train_on="last"), messages).split("⟦")[1:] == ["Far.<|end|>⟧\n<|user|>How far?<|end|>\n"]
    with pytest.raises(BadRow, match="leaves no message"):
        chat(train_on="last").tokens([*messages[:3], {**messages[3], "train": False}])


def test_a_completion_of_messages_has_the_targets():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = FULL_TEMPLATE
    document = Document(0, 0, 1, 0, 0, prompt=[ASK, ANSWER, ASK], completion=[CALL, SEEN, ANSWER])
    (sequence,) = CorpusTokenizer(tokenizer, 256).sequences(document)
    whole = chat().tokens([ASK, ANSWER, ASK, CALL, SEEN, ANSWER])
    assert sequence.token_ids.tolist() == whole.token_ids.tolist()
    first = chat().tokens([ASK, ANSWER])
    expected = whole.is_target.copy()
    expected[: len(first.token_ids)] = False
    assert sequence.is_target.tolist() == expected.tolist()


def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user():
    assert shown(chat(), [ANSWER, ASK]).startswith("<|assistant|>⟦As far as somebody looks.<|end|>⟧\n<|user|>")


@pytest.mark.parametrize("content", ["<thinking>", " a <|end|> b", "  indented\n\n", "<|assistant|>", '{"a": "\\n"}', "é🌊 ​x"])
def test_words_may_look_like_anything(content):
    text = shown(chat(), [ASK, {"role": "assistant", "content": content}, ASK])
    assert f"⟦{content}<|end|>⟧" in text


def test_a_template_that_always_asks_for_an_answer_does_not_make_the_question_a_target():
    always = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}", "").replace("<|assistant|>{% endif %}", "<|assistant|>")
    assert shown(chat(always), [ASK, ANSWER]).endswith("⟦As far as somebody looks.<|end|>⟧\n<|assistant|>")


def test_what_precedes_the_words_is_the_assistants_where_a_template_asks_with_nothing():
    """The blank behind "[/INST]" is the first that a student writes: it is no context that somebody else has written."""
    asks = "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% else %}"
    answers = [ASK, ANSWER, ASK, {"role": "assistant", "content": "5 ships."}]
    found = shown(chat(asks + " {{ message.content }}<|end|>{% endif %}{% endfor %}"), answers)
    assert found == "[INST] How far? [/INST]⟦ As far as somebody looks.<|end|>⟧[INST] How far? [/INST]⟦ 5 ships.<|end|>⟧"
    # A header is not: it is the template's, whether or not it is asked for.
    headed = shown(chat(asks + "Answer: {{ message.content }}<|end|>{% endif %}{% endfor %}"), answers)
    assert headed == found.replace("⟦ ", "Answer: ⟦")


def test_arguments_that_are_no_templates_are_refused():
    with pytest.raises(BadRow, match="`chat_template_kwargs` has `tokenize`"):
        chat().tokens([ASK, ANSWER], {"tokenize": False})


def test_a_template_that_is_no_jinja_is_the_templates_fault():
    with pytest.raises(InputError, match=r"not Jinja: line 1: .*--chat-template"):
        chat("{% for %}").tokens([ASK, ANSWER])


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def test_named_templates_are_used_and_part_of_the_identity():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": FULL_TEMPLATE}
    named = ChatTemplate(tokenizer, ChatOptions("2026-01-31"))
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert shown(named, [ASK, ANSWER], tools=tools).startswith('{"type": "function"')
    before = describe_tokenizer(tokenizer)["chat_template_sha256"]
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": FULL_TEMPLATE + " "}
    assert describe_tokenizer(tokenizer)["chat_template_sha256"] != before
    tokenizer.chat_template = {"tool_use": FULL_TEMPLATE}
    with pytest.raises(InputError, match="the chat templates tool_use, and none is the `default`"):
        ChatTemplate(tokenizer, ChatOptions("2026-01-31")).tokens([ASK, ANSWER])


def test_named_templates_of_a_folder_are_files_of_the_teacher(tmp_path, teacher_folder):
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "tiny"))
    named = folder / "additional_chat_templates/tool_use.jinja"
    named.parent.mkdir()
    named.write_text(FULL_TEMPLATE)
    assert named in model_files(folder, None)
    before = load_teacher(str(folder), device="cpu")
    assert before.tokenizer.chat_template["tool_use"] == FULL_TEMPLATE
    named.write_text(FULL_TEMPLATE + " ")
    after = load_teacher(str(folder), device="cpu")
    name = "additional_chat_templates/tool_use.jinja"
    assert before.description["files"][name] != after.description["files"][name]


def test_opening_tokens_are_found_whatever_the_vocabulary_lacks():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"<s>": 0, "x": 1, "y": 2, "xy": 3}, [("x", "y")]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert opening_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")) == [0]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_parts_of_a_text_have_the_tokens_of_the_text(scheme):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    text = "The lamp was lit.\n\nThe ships came by.\n\nNobody slept."
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>", "<0x0A>"], show_progress=False)
    backend.train_from_iterator(text.split(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    parts = text.replace("\n\n", "\n\n|").split("|")
    made = [
        token
        for number, part in enumerate(parts)
        for sequence in CorpusTokenizer(tokenizer, 100).sequences(
            Document(number, 0, 1, number, 0, last_part=number == 2, text=part)
        )
        for token in sequence.token_ids
    ]
    assert made == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_targets_are_the_same_wherever_a_row_stands():
    template = chat()
    rows = [[ASK, ANSWER], [ASK, CALL, SEEN, ANSWER], [ANSWER, ASK, ANSWER], [ASK, {**ANSWER, "reasoning_content": "So."}]]
    alone = [chat().tokens(row) for row in rows]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        for index in order:
            found = template.tokens(rows[index])
            assert np.array_equal(found.token_ids, alone[index].token_ids)
            assert np.array_equal(found.is_target, alone[index].is_target)


def test_a_token_that_holds_the_end_of_a_turn_and_more_is_refused():
    text = CHAT_TEMPLATE.replace("<|end|>\n", "<x>").replace("<|", "<<").replace("|>", ">>")
    tokenizer = make_tokenizer().train_new_from_iterator(["look<x><<user>>look"] * 9, 300, show_progress=False)
    tokenizer.chat_template = text
    template = ChatTemplate(tokenizer, ChatOptions("2026-01-31"))
    with pytest.raises(BadRow, match=r"message 2; the template ends a turn with <x>, which is no token of the tokenizer"):
        template.tokens([ASK, ANSWER, ASK, ANSWER])


def test_a_turn_that_ends_without_a_token_is_noted():
    whole = chat()
    whole.tokens([ASK, CALL, SEEN, ANSWER])
    assert whole.notes == []
    pieces = chat(CHAT_TEMPLATE.replace("<|end|>", "<|stop|>"))
    assert shown(pieces, [ASK, ANSWER, ASK, ANSWER]).count("⟦As far as somebody looks.<|stop|>⟧\n") == 2
    assert [note.split(",")[0] for note in pieces.notes] == ["the chat template ends a turn with <|stop|>"]
    nothing = chat(CHAT_TEMPLATE.replace("<|end|>", ""))
    assert shown(nothing, [ASK, ANSWER, ASK, ANSWER]).count("⟦As far as somebody looks.⟧\n") == 2
    assert [note.split(",")[0] for note in nothing.notes] == ["the chat template writes nothing at the end of an answer"]


TOOL = {"type": "function", "function": {"name": "look", "description": "To see.", "parameters": {}}}


@pytest.mark.parametrize(
    "change, rows, tools, sentence",
    [
        (
            ("message['content']", "message['content'] + ''"),
            [ASK, CALL, SEEN, ANSWER],
            None,
            None,
        ),  # which has a form of its own
        (
            ("message['content']", "((message['content'] or 5) + '')"),
            [ASK, CALL, SEEN, ANSWER],
            None,
            r"message 2 \(assistant\), `content` is not",
        ),
        (
            ("call.function.name", "call.function.name + 5"),
            [ASK, CALL, SEEN, ANSWER],
            None,
            r"message 2 \(assistant\), `tool_calls`",
        ),
        (
            ("tool | tojson", "tool.function.description | tojson"),
            [ASK, ANSWER],
            [TOOL, {"type": "function", "function": {"name": "sail"}}],
            r"`tools\[1\].function.description` is not there",
        ),
        (("messages %}", "messages %}{{ message.content + 5 }}"), [ASK, ANSWER], None, "refuses it: .*; name another template"),
    ],
)
def test_what_makes_a_template_fail_is_named(change, rows, tools, sentence):
    template = chat(FULL_TEMPLATE.replace(*change))
    if sentence is None:
        assert template.tokens(rows).is_target.any()
        return
    with pytest.raises(BadRow, match=sentence) as refusal:
        template.tokens(rows, {"tools": tools})
    assert "--chat-template" in str(refusal.value) and "\n" not in str(refusal.value)


def test_words_of_a_templates_arguments_are_shown_or_refused():
    template = chat(
        "{% if mood == 'brief' %}Be brief.{% endif %}{% for page in documents or [] %}{{ page.text }}\n{% endfor %}"
        + FULL_TEMPLATE
    )
    assert shown(template, [ASK, ANSWER], mood="long") == shown(template, [ASK, ANSWER], enable_thinking=False)
    assert shown(template, [ASK, ANSWER], documents=[{"text": "A log."}]).startswith("A log.\n")
    for arguments, place in (
        ({"documents": [{"title": "Log", "text": "A log."}]}, r"`documents\[0\].title`"),
        ({"voice": "low"}, "`voice`"),
        ({"mood": "neither brief nor long"}, "`mood`"),
    ):
        with pytest.raises(BadRow, match=f"leaves out words of `chat_template_kwargs`: {place}"):
            template.tokens([ASK, ANSWER], arguments)


def test_numbers_of_tools_are_words_and_switches_are_not():
    template = chat(FULL_TEMPLATE.replace("tool | tojson", "tool.function.name"))
    for schema, place in (({"minimum": 5}, "minimum"), ({"enum": [True]}, r"enum\[0\]"), ({"default": False}, "default")):
        tool = {"function": {"name": "look", "parameters": schema}}
        with pytest.raises(BadRow, match=rf"`tools\[0\].function.parameters.{place}`"):
            template.tokens([ASK, ANSWER], {"tools": [tool]})
        assert "look" in shown(chat(), [ASK, ANSWER], tools=[tool])
    assert shown(template, [ASK, ANSWER], tools=[{"function": {"name": "look", "strict": True}}]).startswith("look\n")


@pytest.mark.parametrize("value", [["f"], {"a": ["f"]}, 5, True, [[["f"]]], ""])
def test_values_of_odd_types_are_a_rows_own_fault(value):
    sequences = CorpusTokenizer(make_tokenizer(), 128, chat=ChatOptions("2026-01-31"))
    sequences.tokenizer.chat_template = FULL_TEMPLATE
    schema = {"type": "object", "properties": {"at": {"type": "string"}}}
    rows = [
        ([{**message, field: value}], {})
        for message in (ASK, ANSWER, CALL, SEEN)
        for field in ("name", "content", "tool_calls", "tool_call_id", "reasoning_content", "weight", "train", "note")
    ]
    rows += [
        ([], {"tools": [{"function": {"name": "look", "parameters": {**schema, key: value}}}]})
        for key in ("required", "properties", "type")
    ]
    for messages, arguments in rows:
        document = Document(0, 0, 1, 0, 0, messages=[ASK, CALL, SEEN, ANSWER, *messages], template_arguments=arguments)
        try:
            assert sequences.sequences(document)
        except BadRow as refusal:
            assert "cannot be made into tokens" not in str(refusal)


def test_an_error_that_nobody_foresaw_is_a_rows_own_fault(monkeypatch):
    sequences = CorpusTokenizer(make_tokenizer(), 128, chat=ChatOptions("2026-01-31"))
    monkeypatch.setattr(ChatTemplate, "tokens", lambda *arguments: {}["a\nb"])
    with pytest.raises(BadRow, match=r"cannot be made into tokens \(KeyError: 'a"):
        sequences.sequences(Document(0, 0, 1, 0, 0, messages=[ASK, ANSWER]))
