"""Texts that a teacher writes: the same in any batch, lost or doubled by no kill, as likely as the teacher says they are, and a
corpus that is read back as it was written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXT, make_model, write_jsonl
from processes import Notes
from torture import generation

from knowledge_store import KnowledgeStore
from knowledge_store.errors import DamageError, InputError, MismatchError
from teacher_dump import DumpConfig, GenerateConfig, ImportConfig, dump, generate, import_dump
from teacher_dump.corpus.columns import Columns
from teacher_dump.generation.plan import written_name
from teacher_dump.generation.prompts import PromptReader
from teacher_dump.teachers.local import load_teacher
from teacher_dump.teachers.protocol import Ability, TextRequest, Writing
from teacher_dump.teachers.writing import random_numbers, writes_padded

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [
    {"prompt": f"Who {verb} the {thing}?", "topic": "light" if number % 2 else "sea", "level": number}
    for number, (verb, thing) in enumerate(
        (verb, thing)
        for verb in ("lit", "held", "counted", "saw")
        for thing in ("lamp", "ladder that stood by the door", "ships")
    )
]
OPTIONS = {"samples": 2, "temperature": 0.8, "max_new_tokens": 12, "shard_size": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "questions.jsonl", QUESTIONS)


@pytest.fixture
def options(teacher_folder, prompts, tmp_path) -> dict:
    return {"teacher": str(teacher_folder), "prompts": (prompts,), "output": tmp_path / "gen", **OPTIONS}


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A teacher whose tokens are words, so that whatever it writes is cut into the same tokens again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unknown|>"]
    words = [*special, *dict.fromkeys(TEXT.split())]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", unk_token="<|unknown|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:4]})
    folder = tmp_path_factory.mktemp("wordy") / "wordy"
    model = make_model(len(words), seed=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_teacher(str(folder), device="cpu"), folder


def texts(folder: Path) -> list[dict]:
    """All rows of a folder of texts, in order."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher_folder, loaded_teacher, prompts) -> Path:
    """A finished folder, which nobody may change."""
    folder = tmp_path_factory.mktemp("written") / "gen"
    generate(
        GenerateConfig(str(teacher_folder), prompts=prompts, output=folder, batch_size=8, **OPTIONS), teacher=loaded_teacher
    )
    return folder


def test_a_text_does_not_depend_on_its_batch(written, options, loaded_teacher):
    generate(GenerateConfig(batch_size=1, **options), teacher=loaded_teacher)
    alone, together = texts(options["output"]), texts(written)
    assert len(alone) == len(QUESTIONS) * 2
    for one, other in zip(alone, together, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
        assert {**one, "logprob": 0} == {**other, "logprob": 0}
    assert len({json.dumps(row["completion"]) for row in alone}) == len(alone)
    assert max(token for row in alone for token in row["tokens"]) < len(loaded_teacher.tokenizer)  # its head is wider


def test_another_seed_writes_other_texts(written, options, loaded_teacher):
    generate(GenerateConfig(seed=1, **{**options, "prompts": options["prompts"]}), teacher=loaded_teacher)
    pairs = zip(texts(options["output"]), texts(written), strict=True)
    assert not any(one["tokens"] == other["tokens"] for one, other in pairs)


def test_draws_are_of_the_teachers_distribution(loaded_teacher):
    prompt, temperature = np.arange(5, 12), 0.7
    requests = [TextRequest(prompt, key) for key in range(2000)]
    drawn = np.array([text.token_ids[0] for text in loaded_teacher.write(requests, Writing(temperature, 1, ()))])
    logits = loaded_teacher.model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1).detach().numpy()
    for token in expected.argsort()[-5:]:
        share, error = (drawn == token).mean(), (expected[token] * (1 - expected[token]) / len(drawn)) ** 0.5
        assert abs(share - expected[token]) < 4 * error


def test_a_model_that_knows_no_padding_writes_without(loaded_teacher, teacher_folder, tmp_path):
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size = len(loaded_teacher.tokenizer)
    RwkvForCausalLM(RwkvConfig(vocab_size=size, context_length=64, initializer_range=0.4, **shape)).save_pretrained(tmp_path)
    loaded_teacher.tokenizer.save_pretrained(tmp_path)
    requests = [TextRequest(np.arange(5, 8 + 4 * (row % 3)), row) for row in range(5)]
    writing = Writing(0.8, 6, ())
    for teacher, padded in ((load_teacher(str(tmp_path), device="cpu"), False), (loaded_teacher, True)):
        assert writes_padded(teacher) == padded
        together = teacher.write(requests, writing)
        for request, text in zip(requests, together, strict=True):
            assert text.token_ids.tolist() == teacher.write([request], writing)[0].token_ids.tolist()


def test_a_model_that_cannot_write_is_refused_before_anything_is_written(options, teacher_folder, monkeypatch):
    def fail(*arguments, **named):
        raise ValueError("no cache for these layers\nand more")

    teacher = load_teacher(str(teacher_folder), device="cpu")
    monkeypatch.setattr(teacher.model, "generate", fail)
    with pytest.raises(InputError, match=r"tiny cannot write texts by transformers' generate: no cache for these layers$"):
        generate(GenerateConfig(**options), teacher=teacher)
    assert not options["output"].exists()


def test_random_numbers_are_those_of_splitmix64():
    def splitmix64(key: int, number: int) -> int:
        mixed = (key + number * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return mixed ^ (mixed >> 31)

    key = 2**63 + 12345
    numbers = random_numbers(torch.tensor([key - 2**64]), 3, 50)[0]
    expected = [((splitmix64(key, 3 * 2**24 + 1 + token) >> 11) + 0.5) / 2**53 for token in range(50)]
    assert numbers.tolist() == pytest.approx(expected, rel=1e-6)


def test_logprob_is_what_the_teacher_says_of_the_tokens(written, loaded_teacher, options):
    assert Ability.TEXT in loaded_teacher.abilities
    for row in texts(written)[:8]:
        given = loaded_teacher.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = loaded_teacher.tokenizer(given, add_special_tokens=False)["input_ids"]
        logits = loaded_teacher.model(input_ids=torch.tensor([[*prompt, *row["tokens"]]])).logits[0].log_softmax(-1)
        forced = sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(row["tokens"]))
        assert row["logprob"] == pytest.approx(forced, abs=1e-3 * len(row["tokens"]))


@pytest.mark.parametrize("prompt_as", ["message", "text"])
def test_a_dump_has_the_very_tokens(options, wordy, tmp_path, prompt_as):
    teacher, folder = wordy
    options |= {"teacher": str(folder), "max_new_tokens": 40, "samples": 3, "prompt_as": prompt_as}
    generate(GenerateConfig(**options), teacher=teacher)
    assert all(isinstance(row["completion"], str) == (prompt_as == "text") for row in texts(options["output"]))
    config = DumpConfig(str(folder), (options["output"],), tmp_path / "store", max_length=96)
    assert config.dump_name == "wordy-gen"
    dump(config, teacher=teacher)
    sql = (
        "SELECT prompt_row, sample, finish, topic, sum(token_logprob) AS logprob, list(token_id ORDER BY position) AS ids"
        " FROM positions JOIN sequences USING (dump, sequence_id) WHERE is_target GROUP BY ALL"
    )
    dumped = {(row["prompt_row"], row["sample"]): row for row in KnowledgeStore.open(tmp_path / "store").sql(sql).to_pylist()}
    exact = [row for row in texts(options["output"]) if row["exact"]]
    assert len(exact) > 9
    assert {row["finish"] for row in exact} == {"length", "stop"}
    for row in exact:
        found = dumped[row["prompt_row"], row["sample"]]
        assert found["ids"] == row["tokens"]  # of one that was cut off, no end follows
        assert (found["finish"], found["topic"]) == (row["finish"], row["topic"])
        assert found["logprob"] == pytest.approx(row["logprob"], abs=0.07 * len(row["tokens"]))  # it has steps of 1/8


def test_what_the_teacher_thought_is_imported_without_asking_it_again(options, wordy, tmp_path):
    teacher, folder = wordy
    options |= {"teacher": str(folder), "max_new_tokens": 40, "prompt_as": "text", "keep_top_k": 5}
    generate(GenerateConfig(**options), teacher=teacher)
    names = "ids=sequence,targets=targets,token=token_logprobs,candidates=top_ids,logprobs=top_logprobs,tail=tail_logprobs"
    files = tuple(sorted(options["output"].glob("*.parquet")))
    import_dump(
        ImportConfig(
            store=tmp_path / "store", files=files, tokenizer=str(folder), format="plain", columns=names, name="imported"
        )
    )
    dump(DumpConfig(str(folder), (options["output"],), tmp_path / "store", "asked", max_length=96), teacher=teacher)
    both = "FROM positions JOIN sequences USING (dump, sequence_id)"
    sql = (
        "SELECT a.*, b.candidate_ids AS ids, b.candidate_logprobs AS logprobs, b.tail_logprob AS tail"
        f" FROM ({both}) a JOIN ({both}) b USING (token_hash, position)"
        " WHERE a.dump = 'imported' AND b.dump = 'asked' AND a.is_target AND b.is_target"
    )
    rows = KnowledgeStore.open(tmp_path / "store").sql(sql).to_pylist()
    assert len(rows) > 200
    same = [row["candidate_ids"] == row["ids"] for row in rows]
    assert np.mean(same) > 0.99  # of tokens that are as likely to within rounding, either may be first
    for row in rows:
        assert row["tail_logprob"] == pytest.approx(row["tail"], abs=0.126)


def test_a_template_makes_prompts(options, loaded_teacher, tmp_path):
    template = tmp_path / "expand.jinja"
    template.write_text("Topic: {{ topic }} ({{ level }}). {% if level > 3 %}Hard.{% endif %}\n")
    generate(GenerateConfig(template=template, **{**options, "samples": 1}), teacher=loaded_teacher)
    rows = texts(options["output"])
    assert rows[0]["prompt"] == [{"role": "user", "content": "Topic: sea (0). "}]
    assert rows[5]["prompt"][0]["content"] == "Topic: light (5). Hard."
    assert (rows[5]["given_prompt"], rows[5]["topic"], rows[5]["level"]) == (QUESTIONS[5]["prompt"], "light", 5)
    assert len({row["template_sha256"] for row in rows}) == 1
    template.write_text("Topic: {{ topic }}")
    with pytest.raises(MismatchError, match=r"begun with another template .*name another --output"):
        generate(GenerateConfig(template=template, **{**options, "samples": 1}), teacher=loaded_teacher)


def test_lists_and_objects_are_that_again_where_texts_are_prompts(options, loaded_teacher, tmp_path):
    rows = [
        {"prompt": "Who?", "options": ["sea", "ü"], "meta": {"a": [1, None]}},
        {"prompt": "Why?", "options": None, "meta": "b"},
    ]
    options |= {"samples": 1, "prompts": write_jsonl(tmp_path / "first.jsonl", rows), "output": tmp_path / "first"}
    generate(GenerateConfig(**options), teacher=loaded_teacher)
    template = tmp_path / "again.jinja"
    template.write_text(
        "{% if options is defined %}{{ options | join(' or ') }} {{ meta.a[0] }}{% else %}{{ meta }}{% endif %}"
    )
    options |= {"prompts": tmp_path / "first", "output": tmp_path / "second", "template": template}
    generate(GenerateConfig(**options), teacher=loaded_teacher)
    second = texts(tmp_path / "second")
    assert [row["prompt"][0]["content"] for row in second] == ["sea or ü 1", "b"]
    config = DumpConfig(store=tmp_path / "store", teacher=options["teacher"], corpus=(tmp_path / "first",), max_length=64)
    dump(config, teacher=loaded_teacher)
    sequences = KnowledgeStore.open(tmp_path / "store").sql("SELECT options, meta FROM sequences").to_pylist()
    assert sequences == [{"options": '["sea", "ü"]', "meta": '{"a": [1, null]}'}, {"options": None, "meta": "b"}]


def test_a_system_column_beside_text_that_is_gone_on_with_is_not_lost_unnoticed():
    def read(**columns: str) -> tuple:
        reader = PromptReader((), None, Columns(columns), None, False, None, None, 8, None)
        return reader._content({"prompt": "Who?", "system": "Be brief."})

    with pytest.raises(ValueError, match=r"`system` stands beside a prompt of plain text.* with system=- in --columns"):
        read()
    assert read(system="-") == ("Who?", {}, {"system": "Be brief."})


def test_text_that_becomes_a_message_has_its_tools():
    reader = PromptReader((), None, Columns({}), None, True, None, None, 8, None)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"prompt": "Who?", "tools": json.dumps(tools), "chat_template_kwargs": {"short": True}, "id": 1}
    message = {"role": "user", "content": "Who?"}
    assert reader._content(row) == ([message], {"tools": tools, "short": True}, {"id": 1})
    with pytest.raises(ValueError, match="`functions` is part of the conversation"):
        reader._content({"prompt": "Who?", "functions": [{"name": "look"}]})


@pytest.mark.parametrize("columns", [{"prompt": "prompt"}, {"messages": "-"}])
def test_a_prompt_beside_messages_is_taken_where_it_is_named(columns):
    reader = PromptReader((), None, Columns(columns), None, False, None, None, 8, None)
    row = {"prompt": "Who?", "messages": [{"role": "user", "content": "Why?"}]}
    assert reader._content(row)[0] == "Who?"


def test_messages_and_their_tools_travel_along(options, loaded_teacher, tmp_path):
    turns = [
        {"role": "user", "content": "Who lit it?"},
        {"role": "assistant", "content": "He."},
        {"role": "user", "content": "Who?"},
    ]
    rows = [{"messages": turns, "id": 7, "tools": ""}, {"messages": turns[:1], "id": 8}]
    brief = {"system": "Be brief.", "id": 9}
    asked = [*rows, {"messages": turns, **brief}, {"prompt": "Who?", **brief}]
    options["prompts"] = write_jsonl(tmp_path / "chat.jsonl", asked)
    generate(GenerateConfig(**{**options, "samples": 1}), teacher=loaded_teacher)
    system = {"role": "system", "content": "Be brief."}
    expected = [(turns, 7), (turns[:1], 8), ([system, *turns], 9), ([system, turns[-1]], 9)]
    assert [(row["prompt"], row["id"]) for row in texts(options["output"])] == expected
    odd = [{**row, "messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]} for row in rows]
    template = tmp_path / "parts.jinja"  # a template that takes content in parts, as those of models that see images do
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text }}{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    options |= {"prompts": write_jsonl(tmp_path / "odd.jsonl", odd), "output": tmp_path / "odd", "chat_template": template}
    generate(GenerateConfig(**{**options, "samples": 1}), teacher=loaded_teacher)
    [path] = (tmp_path / "odd").glob("*.parquet")
    assert pq.read_schema(path).field("prompt").type == pa.json_()
    config = {"teacher": options["teacher"], "corpus": (tmp_path / "odd",), "max_length": 64, "chat_template": template}
    assert dump(DumpConfig(store=tmp_path / "store", **config), teacher=loaded_teacher).counts.rows_used == 2


def test_without_prompts(options, loaded_teacher, tmp_path):
    template = tmp_path / "count.jinja"
    template.write_text("Write story number {{ row }}.")
    del options["prompts"]
    generate(GenerateConfig(count=4, template=template, **options), teacher=loaded_teacher)
    rows = texts(options["output"])
    assert [row["prompt"][0]["content"] for row in rows[::2]] == [f"Write story number {number}." for number in range(4)]
    with pytest.raises(InputError, match="no token that begins a text"):
        generate(GenerateConfig(count=4, **{**options, "output": tmp_path / "none"}), teacher=loaded_teacher)
    loaded_teacher.tokenizer.bos_token = "<|system|>"
    try:
        generate(GenerateConfig(count=4, **{**options, "output": tmp_path / "none"}), teacher=loaded_teacher)
    finally:
        loaded_teacher.tokenizer.bos_token = None
    assert {row["prompt"] for row in texts(tmp_path / "none")} == {""}


def test_ranks_share_the_files(written, options, loaded_teacher):
    report = generate(GenerateConfig(**options), 1, 3, teacher=loaded_teacher)
    assert (report.files, report.files_missing, report.files_planned) == (1, 3, 4)
    with pytest.raises(InputError, match=r"gen is not finished: 3 files of 4 are missing"):
        dump(DumpConfig(options["teacher"], tuple(options["output"].glob("*.parquet")), options["output"].with_name("s")))
    for rank in (0, 2):
        generate(GenerateConfig(**options), rank, 3, teacher=loaded_teacher)
    assert [row["tokens"] for row in texts(options["output"])] == [row["tokens"] for row in texts(written)]
    again = generate(GenerateConfig(**options), teacher=loaded_teacher)
    assert (again.files, again.files_existing, again.texts) == (0, 4, 0)


def test_killed_at_moments_of_chance(tmp_path):
    counts = generation.run(seed=2, minutes=math.inf, folder=tmp_path, trials=2)
    assert counts["survived"] == counts["faults"] >= 2
    assert counts["silent"] == 0


def test_what_a_prompt_says_of_an_end_is_not_taken_for_that_of_its_texts():
    assert [written_name(name) for name in ("finish", "finish_reason", "topic")] == [
        "given_finish",
        "given_finish_reason",
        "topic",
    ]


def test_texts_that_end_at_once_stop_no_dump(options, loaded_teacher, tmp_path):
    rows = [
        {"prompt": "Who?", "completion": "", "finish": "stop"},
        {
            "prompt": [{"role": "user", "content": "Who?"}],
            "completion": [{"role": "assistant", "content": " "}],
            "finish": "stop",
        },
        {"prompt": "Who?", "completion": " He.", "finish": "length"},
        {"prompt": "Who?", "completion": " He.", "finish": "stop"},
        {"prompt": "Who?", "completion": " He.", "finish": "early"},
    ]
    config = DumpConfig(options["teacher"], (write_jsonl(tmp_path / "t.jsonl", rows),), tmp_path / "store", "t", max_length=32)
    report = dump(config, teacher=loaded_teacher)
    assert (report.counts.rows_used, report.counts.rows_left_out, report.counts.unfinished) == (3, 2, 1)
    sql = (
        "SELECT row, bool_or(token_id = 0 AND is_target) AS ended FROM positions JOIN sequences USING (sequence_id) GROUP BY 1"
    )
    ended = {row["row"]: row["ended"] for row in KnowledgeStore.open(tmp_path / "store").sql(sql).to_pylist()}
    assert ended == {3: False, 4: True, 5: True}


def bad(name: str, rows: list, more: dict | None = None, template: str = "") -> tuple:
    return name, rows, more or {}, template


@pytest.mark.parametrize(
    ("reason", "rows", "more", "template"),
    [
        bad(r"line 2: the template asks for the column `topic`, which the row does not have \(it has `prompt`\)",
            [{"prompt": "a", "topic": "b"}, {"prompt": "c"}], template="{{ topic }}"),
        bad(r"line 1: the template asks for what the row does not have: 'dict object' has no attribute 'b'",
            [{"a": {"c": 1}}], template="{{ a.b }}"),
        bad("line 1: the template makes an empty prompt of it", [{"a": ""}], template="{{ a }}"),
        bad(r"is not Jinja: line 1: ", [{"a": ""}], template="{{ a"),
        bad(r"line 1: the prompt is empty: `prompt` \(1 more row cannot be used\)\. Repair", [{"prompt": " "}, {"prompt": ""}]),
        bad(r"line 1: the prompt leaves no room for what is to be written \(it has 805 tokens", [{"prompt": "who? " * 200}]),
        bad("line 1: `messages` ends with a turn of another than a user .*role 'assistant'",
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
        bad(r"line 1: none of the columns that a prompt is read by \(it has `question`\)", [{"question": "a"}]),
        bad("line 1: `images` is part of the conversation, .* images=- in --columns", [{"prompt": "a", "images": ["a.png"]}]),
        bad("line 1: it has both `prompt` and `messages`", [{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}]),
        bad("--max-new-tokens 256 leaves no room for a prompt: the teacher knows 256", [{"prompt": "a"}],
            {"max_new_tokens": 256}),
        bad("line 1: `messages` has messages, and prompts are gone on with as plain text",
            [{"messages": [{"role": "user", "content": "a"}]}], {"prompt_as": "text"}),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused_before_a_teacher_is_loaded(options, tmp_path, monkeypatch, reason, rows, more, template):
    monkeypatch.setattr("teacher_dump.teachers.opening.open_teacher", lambda *arguments, **named: pytest.fail("it was loaded"))
    options["prompts"] = write_jsonl(tmp_path / "bad.jsonl", rows)
    if template:
        (tmp_path / "t.jinja").write_text(template)
        options["template"] = tmp_path / "t.jinja"
    with pytest.raises(InputError, match=reason):
        generate(GenerateConfig(**options | more))
    assert not options["output"].exists()


def test_a_bad_line_of_prompts_is_called_a_line(options, tmp_path):
    options["prompts"] = tmp_path / "prompts.txt"
    options["prompts"].write_bytes(b"Who?\n\n\xff\n")
    with pytest.raises(InputError, match=r"prompts\.txt, line 3: text that is not UTF-8"):
        generate(GenerateConfig(**options))


def test_messages_need_a_chat_template(options, loaded_teacher, tmp_path, monkeypatch):
    options["prompts"] = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "Who?"}]}])
    monkeypatch.setattr(loaded_teacher.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match=r"line 1: `messages` has messages, .* name a chat template with --chat-template"):
        generate(GenerateConfig(**options), teacher=loaded_teacher)
    with pytest.raises(InputError, match="--prompt-as message needs a chat template, and the teacher's tokenizer has none"):
        generate(GenerateConfig(prompt_as="message", **options), teacher=loaded_teacher)
    assert not options["output"].exists()


def test_bad_rows_are_left_out_and_counted(options, loaded_teacher, tmp_path):
    options["prompts"] = write_jsonl(tmp_path / "some.jsonl", [{"prompt": "Who?"}, {"prompt": ""}, {"prompt": "What?"}])
    report = generate(GenerateConfig(skip_bad_rows=True, **options), teacher=loaded_teacher)
    assert report.left_out == {"the prompt is empty": 1}
    assert [(row["prompt_row"], row["sample"]) for row in texts(options["output"])] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert any("1 row was left out" in sentence.text for sentence in report.sentences)


def test_what_does_not_go_together(teacher_folder, tmp_path):
    common = {"teacher": str(teacher_folder), "output": tmp_path / "gen"}
    for reason, more in (
        ("give --prompts FILE, or --count", {}),
        ("not both", {"prompts": "a.jsonl", "count": 2}),
        ("--samples 2 with --temperature 0", {"count": 2, "samples": 2, "temperature": 0}),
        ("--columns is of the rows of --prompts", {"count": 2, "columns": "prompt=q"}),
    ):
        with pytest.raises(InputError, match=reason):
            GenerateConfig(**common, **more)
    with pytest.raises(InputError, match=r"^--teacher-url asks a server how likely tokens are, and not for texts"):
        generate(GenerateConfig(**common, count=2, teacher_url="http://127.0.0.1:1"))


def test_folders_of_something_else_are_refused(written, options, loaded_teacher, tmp_path):
    (tmp_path / "gen").mkdir()
    (tmp_path / "gen/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files than texts of teacher-dump generate \(notes.txt\)"):
        generate(GenerateConfig(**options), teacher=loaded_teacher)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: name a folder for --output"):
        generate(GenerateConfig(**{**options, "output": tmp_path / "file"}), teacher=loaded_teacher)
    for name, value in (("temperature", 0.9), ("samples", 3), ("max_new_tokens", 13), ("seed", 5)):
        with pytest.raises(MismatchError, match=rf"begun with --{name.replace('_', '-')} .*, and not {value}: give the same"):
            generate(GenerateConfig(**{**options, "output": written, name: value}), teacher=loaded_teacher)
    others = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS[1:])
    with pytest.raises(MismatchError, match="begun with other prompts"):
        generate(GenerateConfig(**{**options, "output": written, "prompts": others}), teacher=loaded_teacher)


def test_a_file_of_another_folder_is_named(written, options, loaded_teacher):
    generate(GenerateConfig(**{**options, "seed": 9}), teacher=loaded_teacher)
    foreign = options["output"] / "part-000001.parquet"
    foreign.write_bytes((written / foreign.name).read_bytes())
    with pytest.raises(DamageError, match=r"part-000001.parquet is damaged, or of another folder: remove it"):
        generate(GenerateConfig(**{**options, "seed": 9}), teacher=loaded_teacher)


def test_greedy_texts_and_what_is_said_of_them(options, loaded_teacher):
    notes = Notes()
    options |= {"samples": 1, "temperature": 0}
    report = generate(GenerateConfig(**options), teacher=loaded_teacher, reporter=notes)
    row = texts(options["output"])[0]
    given = loaded_teacher.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    ids = loaded_teacher.tokenizer(given, add_special_tokens=False)["input_ids"]
    for token in row["tokens"]:
        assert int(loaded_teacher.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    assert report.cut_off == sum(row["finish"] == "length" for row in texts(options["output"]))
    assert any(f"{report.cut_off} texts were cut off at --max-new-tokens" in sentence.text for sentence in report.sentences)
