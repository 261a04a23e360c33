"""A loss of another shape, end to end: pairs of texts in a kind of their own, on which the student runs one after the other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_tokenizer, save_teacher
from stores import DOCUMENTS, MADE_BY, make_manifest
from torch.nn import functional

from knowledge_store import KINDS, DumpWriter, Field, Kind, Shard
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import sequence_id, token_hash, tokens_table
from student_train.evaluation.configuration import EvaluateConfig, check_evaluation
from student_train.evaluation.run import evaluate
from student_train.losses.step import model_inputs, run_student, step_loss
from student_train.losses.table import LOSSES, Loss
from student_train.training.configuration import TrainConfig
from student_train.training.run import train
from student_train.training.run_folder import read_history

PAIRS = Kind(
    name="pairs",
    per="sequence",
    fields=lambda manifest: tuple(
        Field(name, pa.int32(), shape="ragged", padding=-1) for name in ("chosen_ids", "rejected_ids")
    ),
)


def log_likelihood(outputs, batch, name: str) -> torch.Tensor:
    """Of each text, (B,) nats."""
    inputs = model_inputs(batch, name)
    logprobs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (logprobs * inputs["attention_mask"][:, 1:]).sum(-1)


def prefer(chosen, rejected, batch) -> torch.Tensor:
    """−log σ of how much likelier the chosen text is than the rejected one, (B,)."""
    return -functional.logsigmoid(log_likelihood(chosen, batch, "chosen_ids") - log_likelihood(rejected, batch, "rejected_ids"))


PREFER = Loss(prefer, kinds=("pairs",), inputs=("chosen_ids", "rejected_ids"), whole_batch=True, unit="sequence")


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A dump of pairs alone: no positions, and so no text."""
    monkeypatch.setitem(KINDS, "pairs", PAIRS)
    monkeypatch.setitem(LOSSES, "prefer", PREFER)
    vocabulary = make_tokenizer().get_vocab()
    names: list[str | None] = sorted(vocabulary, key=vocabulary.__getitem__)
    manifest = make_manifest("pairs", vocabulary=len(names), shards=2, kinds=("pairs",))
    writer = DumpWriter.open(tmp_path / "store", manifest, tokens_table(names, names))
    random = np.random.default_rng(0)
    for shard in range(2):
        chosen, rejected = ([random.integers(5, 300, length) for length in random.integers(2, 9, 6)] for _ in range(2))
        rows = [
            {
                "sequence_id": sequence_id(DOCUMENTS * shard + index, 0),
                "document": DOCUMENTS * shard + index,
                "file": "pairs.jsonl",
                "row": DOCUMENTS * shard + index + 1,
                "part": 0,
                "window": 0,
                "length": len(tokens),
                "targets": 0,
                "truncated": False,
                "token_hash": token_hash(tokens),
            }
            for index, tokens in enumerate(chosen)
        ]
        knowledge = [{"chosen_ids": [one], "rejected_ids": [other]} for one, other in zip(chosen, rejected, strict=True)]
        writer.commit(Shard(shard, DOCUMENTS * shard, DOCUMENTS, rows, {"pairs": knowledge}, made_by=MADE_BY))
    return tmp_path / "store"


def test_it_trains(store, tmp_path):
    student = save_teacher(tmp_path / "student", seed=1)
    config = TrainConfig(
        store=str(store), student=str(student), output=str(tmp_path / "run"), loss="prefer",
        steps=20, batch_size=2, gradient_accumulation=2, learning_rate=3e-3, eval_fraction=0.3, evaluations=2,
    )  # fmt: skip
    assert train(config).finished
    entries = read_history(tmp_path / "run")["entries"]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 10, 20]
    assert not any(name in entry for entry in entries for name in ("eval_nll", "eval_kl"))  # it does not run on the text


def test_each_text_is_run_as_if_it_stood_alone():
    """Padding behind a text, and rows of padding, change nothing."""
    model = torch.nn.Module()
    torch.manual_seed(0)
    table = torch.randn(9, 9)

    def forward(input_ids, attention_mask, use_cache):
        assert not use_cache and attention_mask[:, 0].all()
        return SimpleNamespace(logits=table[input_ids])

    model.forward = forward
    chosen, rejected = (
        torch.tensor([[3, 4, -1, -1], [5, 6, 7, 8], [-1, -1, -1, -1]]),
        torch.tensor([[1, 2, 3], [2, -1, -1], [-1, -1, -1]]),
    )
    batch = {"sequence_id": torch.tensor([0, 1, -1]), "chosen_ids": chosen, "rejected_ids": rejected}
    counts = {"target": 0, "sequence": 2}
    whole = step_loss(PREFER, run_student(model, PREFER, batch), batch, counts)
    alone = []
    for row in range(2):
        texts = {name: batch[name][row][batch[name][row] >= 0][None] for name in PREFER.inputs}
        single = {"sequence_id": batch["sequence_id"][row, None], **texts}
        alone.append(step_loss(PREFER, run_student(model, PREFER, single), single, counts))
    torch.testing.assert_close(whole, sum(alone))


def test_what_does_not_fit_is_refused(store, tmp_path, store_folder, teacher_folder):
    settings = {"student": str(teacher_folder), "output": str(tmp_path / "run"), "loss": "prefer"}
    with pytest.raises(InputError, match="needs the kind 'pairs', and the dump train holds positions"):
        train(TrainConfig(store=str(store_folder), dump="train", **settings))
    with pytest.raises(InputError, match="needs the kind 'positions', and the dump pairs holds pairs"):
        train(TrainConfig(store=str(store), **{**settings, "loss": "forward-kl"}))
    with pytest.raises(InputError, match="does not run the student on the text, so it takes no --ce-weight"):
        train(TrainConfig(store=str(store), ce_weight=0.5, **settings))
    for refused in (check_evaluation, evaluate):
        with pytest.raises(InputError, match="the dump pairs holds pairs, which no figures exist for"):
            refused(EvaluateConfig(str(teacher_folder), str(store)))
    with pytest.raises(ValueError, match="give whole_batch=True for other inputs"):
        Loss(prefer, inputs=("chosen_ids",))
    assert not (tmp_path / "run").exists()
