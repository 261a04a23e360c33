"""Students whose context is shorter than the sequences of a dump: refused where they cannot read them, else warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_tokenizer
from processes import Notes
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.cli import app
from student_train.evaluation.configuration import EvaluateConfig
from student_train.evaluation.run import evaluate
from student_train.training.configuration import TrainConfig
from student_train.training.run import train

CONTEXT = 32
TABLES = {
    "gpt2": {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "gptj": {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 8},
    "opt": {
        "max_position_embeddings": CONTEXT,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "mpt": {"max_seq_len": CONTEXT, "d_model": 16, "n_layers": 1, "n_heads": 2},
}
ROTARY = {
    kind: {
        "max_position_embeddings": CONTEXT,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for kind in ("llama", "gpt_neox")
}


def save_student(folder: Path, kind: str, **changes: int) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ends, **(TABLES | ROTARY)[kind] | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def training(store: Path, student: Path) -> TrainConfig:
    output = str(student.parent / "run")
    return TrainConfig(str(store), str(student), output, dump="train", steps=1, batch_size=4, eval_fraction=0.0)


@pytest.mark.parametrize("kind", TABLES)
def test_positions_that_end_are_refused(kind, store_folder, tmp_path):
    student = save_student(tmp_path / "student", kind)
    before = sorted(student.iterdir())
    lengths = KnowledgeStore.open(store_folder).sequences("train")["length"].to_numpy()
    reason = f"^{(lengths > CONTEXT).sum()} of {len(lengths)} sequences of the dump train are longer than the 32 tokens of"
    with pytest.raises(InputError, match=reason + " the student's context .*no positions beyond: .*--max-length 32"):
        train(training(store_folder, student))
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(app, ["evaluate", str(store_folder), "--dump", "heldout", "--model", str(student)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and f"of {student}'s context" in done.stderr
    assert sorted(student.iterdir()) == before


@pytest.mark.parametrize("kind", ROTARY)
def test_positions_that_go_on_are_warned_of(kind, store_folder, tmp_path):
    student = save_student(tmp_path / "student", kind)
    notes = Notes()
    assert train(training(store_folder, student), reporter=notes).finished
    [warning] = [note for note in notes.notes if note.startswith("Warning:")]
    assert warning.startswith("Warning: ")
    assert "longer than the 32 tokens of the student's context (the longest has 48)" in warning
    notes.notes.clear()
    evaluate(EvaluateConfig(str(student), str(store_folder), dump="heldout"), reporter=notes)
    assert [note[:8] for note in notes.notes] == ["Warning:"]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_context_that_is_just_long_enough(kind, store_folder, tmp_path):
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    student = save_student(tmp_path / "student", kind, **{name: 48})
    notes = Notes()
    assert train(training(store_folder, student), reporter=notes).finished
    evaluate(EvaluateConfig(str(student), str(store_folder), dump="heldout"), reporter=notes)
    assert not any(note.startswith("Warning:") for note in notes.notes)


def test_only_sequences_that_are_read_count(store_folder, tmp_path):
    """`evaluate --limit 1` reads the first."""
    first = int(KnowledgeStore.open(store_folder).sequences("train")["length"][0].as_py())
    student = save_student(tmp_path / "student", "gpt2", n_positions=first)
    notes = Notes()
    evaluate(EvaluateConfig(str(student), str(store_folder), dump="train", limit=1), reporter=notes)
    assert not any(note.startswith("Warning:") for note in notes.notes)
    with pytest.raises(InputError, match="no positions beyond"):
        evaluate(EvaluateConfig(str(student), str(store_folder), dump="train"), reporter=notes)
