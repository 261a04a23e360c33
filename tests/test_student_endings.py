"""What a trained student stops at, where the dump's targets end with another token than the student's texts did."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, story_rows, write_jsonl
from processes import Notes
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from knowledge_store import KnowledgeStore
from student_train.training.chat_template import note_template
from student_train.training.configuration import TrainConfig
from student_train.training.endings import ending_tokens
from student_train.training.run import train
from teacher_dump import DumpConfig, dump
from teacher_dump.teachers.local import load_teacher

STOP = "<|stop|>"


pytestmark = pytest.mark.usefixtures("one_thread")


def save_model(folder: Path, eos: str, chat_template: str | None = None) -> Path:
    """A model whose texts end with a token."""
    tokenizer = make_tokenizer((STOP,))
    tokenizer.eos_token = tokenizer.pad_token = eos
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    model = make_model(len(tokenizer), layers=1)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A chat teacher, whose turns end with <|end|>, and base students, whose texts end with <|stop|>."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "teacher", "<|end|>")
    save_model(folder / "base", STOP)
    save_model(folder / "other-chat", STOP, "{% for message in messages %}{{ message['content'] }}<|stop|>{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def store(models, tmp_path_factory) -> KnowledgeStore:
    """Dumps of the chat teacher: of conversations, of texts longer than its sequences, and of token ids that no token ends."""
    folder = tmp_path_factory.mktemp("stores")
    texts = [row["text"] for row in story_rows(12)]
    chats = [
        {"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text}]} for text in texts[:11]
    ]
    teacher = load_teacher(str(models / "teacher"), device="cpu")
    ids = [{"input_ids": teacher.tokenizer(text)["input_ids"]} for text in texts]
    for name, rows in (("chat", chats), ("text", [{"text": text} for text in texts]), ("open", ids)):
        corpus = write_jsonl(folder / f"{name}.jsonl", rows)
        config = DumpConfig(str(models / "teacher"), (corpus,), folder / "store", name, max_length=60, shard_size=8)
        dump(config, teacher=teacher)
    return KnowledgeStore.open(folder / "store")


def trained(store: KnowledgeStore, student: Path, output: Path, dump: str | tuple[str, ...], **changes: object) -> list[str]:
    """The notes of a run of one step, but for those on what it reads."""
    reporter = Notes()
    options = {"steps": 1, "batch_size": 2, "eval_fraction": 0.0, **changes}
    train(TrainConfig(store=store.address, student=str(student), output=str(output), dump=dump, **options), reporter=reporter)
    return [note for note in reporter.notes if not re.search("of the batches is padding|^An epoch has", note)]


def test_a_dumps_endings_are_found_whatever_is_cut(store):
    """Most conversations and texts are longer than a sequence: neither the cut ones nor first windows say how they end."""
    special = {0, 1, 2, 3, 4}
    sequences = store.sequences("chat")
    assert any(sequences["truncated"].to_pylist()) and not all(sequences["truncated"].to_pylist())
    assert max(store.sequences("text")["window"].to_pylist()) > 0
    assert ending_tokens(store, "chat", special) == ending_tokens(store, "text", special) == [0]
    assert ending_tokens(store, "open", special) == []


def test_a_base_student_of_a_chat_dump_stops(store, models, tmp_path):
    notes = trained(store, models / "base", tmp_path / "run", "chat")
    assert notes == [
        "The targets of chat end with '<|end|>', and the student's generation settings stop at '<|stop|>': the trained"
        " student's will stop at '<|end|>' and '<|stop|>' (--keep-eos leaves them)."
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    end, stop = tokenizer.convert_tokens_to_ids(["<|end|>", STOP])
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == STOP
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [end, stop]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.eos_token_id == end
    prompt = torch.tensor([[20, 21, 22]])

    def always_end(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([end]), 0.0)

    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, logits_processor=[always_end]
    )
    assert written[0, 3:].tolist() == [end]


def test_dumps_that_end_differently_are_told(store, models, tmp_path):
    notes = trained(store, models / "base", tmp_path / "run", ("chat", "open"))
    assert notes[:2] == [
        "The targets of the dumps do not end with the same special tokens (chat: '<|end|>'; open: no token).",
        "No special token ends the targets of open: the student does not learn from it where a text ends.",
    ]
    assert notes[2].startswith(
        "The targets of chat end with '<|end|>', and the student's generation settings stop at '<|stop|>'"
    )


def test_keep_eos_leaves_the_settings_and_warns(store, models, tmp_path):
    (note,) = trained(store, models / "base", tmp_path / "run", "chat", keep_eos=True)
    assert note.startswith("Warning: ") and "with --keep-eos, the trained student will not stop" in note
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.eos_token == STOP
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == tokenizer.eos_token_id


def test_a_chat_template_keeps_the_token_that_it_writes(store, models, tmp_path):
    """Turns of such a student still end with its own token: both stop it, and its tokenizer stays as it is."""
    *_, note = trained(store, models / "other-chat", tmp_path / "run", "chat")
    assert "conversations of chat were written by a chat template, and the student's tokenizer has another" in note
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    end, stop = tokenizer.convert_tokens_to_ids(["<|end|>", STOP])
    assert tokenizer.eos_token == STOP
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [end, stop]


def test_a_student_without_the_chat_template_of_its_conversations_is_told(store, models):
    tokenizer, reporter = AutoTokenizer.from_pretrained(models / "teacher"), Notes()
    note_template(tokenizer, store, ["chat", "text", "open"], reporter=reporter)
    assert reporter.notes == []
    tokenizer.chat_template = None
    note_template(tokenizer, store, ["chat", "text", "open"], reporter=reporter)
    [note] = reporter.notes  # texts and token ids without context were written by none
    assert "the conversations of chat were written by a chat template, and the student's tokenizer has none" in note


def test_nothing_is_said_or_changed_where_both_agree(store, models, tmp_path):
    assert trained(store, models / "teacher", tmp_path / "run", "chat") == []
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == 0


def test_a_dump_whose_targets_end_nowhere_is_told(store, models, tmp_path):
    (note,) = trained(store, models / "base", tmp_path / "run", "open")
    assert note.startswith("No special token ends the targets of open")
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == make_tokenizer((STOP,)).convert_tokens_to_ids(
        STOP
    )
