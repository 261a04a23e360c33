"""Losses of hidden states: as they are defined, the same for any cut, with maps that are learnt, saved and taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, save_teacher, story_rows, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file
from test_student_training import assert_close, weights
from transformers import AutoModelForCausalLM, TrainingArguments

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train import DistillationDataset, DistillationTrainer, TrainConfig, train
from student_train.losses.head import has_plain_head
from student_train.losses.hidden import Projector, keeping_states, kept_positions, state_distances
from student_train.training.configuration import HiddenStates
from student_train.training.hidden_states import PROJECTOR_FILE
from student_train.training.run_trainer import RunTrainer
from teacher_dump import DumpConfig, dump

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32  # of the teacher
LOSSES = ("mse", "cosine")


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory, teacher_folder, loaded_teacher) -> Path:
    """The dumps `states` of the last layer, `two` of two layers at every other position, and `plain` without any."""
    folder = tmp_path_factory.mktemp("hidden")
    rows = [*story_rows(10), *({"prompt": "Who lit the lamp?", "completion": f" Number {row} did."} for row in range(6))]
    config = DumpConfig(
        str(teacher_folder), (write_jsonl(folder / "rows.jsonl", rows),), folder / "store", "states",
        kinds=("positions", "hidden"), max_length=48, batch_size=4, hidden_precision="float16",
    )  # fmt: skip
    dump(config, teacher=loaded_teacher)
    dump(replace(config, name="two", hidden_layers="0,-1", hidden_every=2), teacher=loaded_teacher)
    dump(replace(config, name="plain", kinds=("positions",), hidden_precision="int8"), teacher=loaded_teacher)
    return folder / "store"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A student of half the teacher's width."""
    return save_teacher(tmp_path_factory.mktemp("narrow") / "student", layers=1, seed=1, hidden_size=WIDTH // 2)


@pytest.fixture
def settings(store_folder, student, tmp_path) -> dict:
    return {
        "store": str(store_folder), "student": str(student), "output": str(tmp_path / "run"), "dump": "states",
        "batch_size": 4, "learning_rate": 1e-3, "steps": 3, "eval_fraction": 0.0, "hidden_weight": 0.3,
    }  # fmt: skip


def example() -> tuple[torch.nn.Module, dict[str, torch.Tensor], Projector]:
    """A model in float64, a batch of two layers' states with a row of padding, and maps to another width."""
    random = np.random.default_rng(0)
    model = make_model(40, layers=2, hidden_size=16).double()
    kept = torch.from_numpy(random.random((5, 7)) < 0.5)
    ids = torch.from_numpy(random.integers(0, 40, (5, 7)))
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "is_target": torch.ones_like(ids).bool(),
        "sequence_id": torch.tensor([0, 1, 2, 3, -1]), "has_hidden": kept,
        "hidden": torch.from_numpy(random.normal(size=(5, 7, 2 * 24)).astype(np.float32)),
    }  # fmt: skip
    projector = Projector(2, 16, 24, seed=0).double()
    return model, batch, projector


@pytest.mark.parametrize("loss", LOSSES)
def test_distances_and_gradients_as_they_are_defined(loss):
    """Against numpy's, in float64; the gradient of the maps against that of the same loss by transformers' own outputs."""
    model, batch, projector = example()
    with keeping_states(model, batch, (1, -1), projector) as states:
        model(batch["input_ids"])
    found = state_distances(states, batch, loss)
    found.sum().backward()
    gradients = [parameter.grad.clone() for parameter in (*projector.parameters(), *model.model.layers.parameters())]
    for parameter in (*projector.parameters(), *model.parameters()):
        parameter.grad = None

    outputs = model(batch["input_ids"], output_hidden_states=True).hidden_states
    kept = (batch["has_hidden"] & (batch["sequence_id"] >= 0)[:, None]).numpy()
    student = [outputs[layer] @ projector[index].weight.T + projector[index].bias for index, layer in enumerate((1, -1))]
    expected = []
    for row, place in zip(*np.nonzero(kept), strict=True):
        parts = []
        for index in range(2):
            s, t = student[index][row, place], batch["hidden"][row, place, 24 * index : 24 * (index + 1)].double()
            parts.append(((s - t) ** 2).mean() if loss == "mse" else 1 - s @ t / s.norm() / t.norm())
        expected.append(sum(parts) / 2)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    torch.stack(expected).sum().backward()
    for gradient, parameter in zip(gradients, (*projector.parameters(), *model.model.layers.parameters()), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_without_states_has_no_distance_and_a_gradient_of_nought():
    """Which every process of a group waits for."""
    model, batch, projector = example()
    batch |= {"has_hidden": torch.zeros(5, 7, dtype=torch.bool), "hidden": torch.zeros(5, 7, 0)}
    with keeping_states(model, batch, (1, -1), projector) as states:
        model(batch["input_ids"])
    assert kept_positions(batch).sum() == 0
    state_distances(states, batch, "mse").sum().backward()
    assert all((parameter.grad == 0).all() for parameter in projector.parameters())


def test_maps_begin_as_the_identity_or_keep_lengths():
    same, wider = Projector(2, 8, 8, seed=0), Projector(1, 8, 12, seed=0)
    states = torch.randn(5, 8)
    assert torch.equal(same[1](states), states)
    torch.testing.assert_close(wider[0](states).norm(dim=1), states.norm(dim=1))
    assert torch.equal(wider[0].weight, Projector(1, 8, 12, seed=0)[0].weight)


def entries(output: Path) -> list[dict]:
    return json.loads((output / "history.json").read_text())["entries"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_same_however_it_is_cut(settings, narrow, tmp_path, loss):
    """Sequences with more and with fewer kept positions in other batches; and the maps learn."""
    settings |= {"student": str(narrow), "hidden_projector": True, "hidden_loss": loss, "dump": "two", "hidden_layers": "0,-1"}
    found, maps = [], []
    for number, (batch_size, accumulation) in enumerate([(6, 1), (2, 3)]):
        output = tmp_path / str(number)
        train(
            TrainConfig(**settings | {"output": str(output), "batch_size": batch_size, "gradient_accumulation": accumulation})
        )
        found.append(weights(output))
        with safe_open(output / PROJECTOR_FILE, "pt") as file:
            assert file.metadata() == {"student_layers": "0,-1", "teacher_layers": "0,-1"}
            maps.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert_close(found[0], found[1])
    assert_close(maps[0], maps[1])
    assert sorted(maps[0]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert (maps[0]["0.weight"] - Projector(2, WIDTH // 2, WIDTH, seed=0)[0].weight).abs().max() > 1e-4
    # It is no part of the model.
    assert not any("projector" in name for name in found[0])
    AutoModelForCausalLM.from_pretrained(output)


def test_the_loss_is_the_mean_of_both_by_their_shares(settings, tmp_path):
    """The figures are those of the states themselves before the first step; and they come nearer to the teacher's."""
    found = {}
    for name, options in {"plain": {"hidden_weight": 0.0}, "both": {"steps": 12}}.items():
        output = tmp_path / name
        train(TrainConfig(**settings | options | {"output": str(output), "eval_fraction": 0.2, "evaluations": 1}))
        found[name] = [entry for entry in entries(output) if "eval_loss" in entry]
    first, last = found["both"][0], found["both"][-1]
    assert first["eval_loss"] == pytest.approx(0.7 * found["plain"][0]["eval_loss"] + 0.3 * first["eval_hidden"], rel=1e-5)
    assert last["eval_hidden"] < first["eval_hidden"]
    assert not (tmp_path / "both" / PROJECTOR_FILE).exists()


def test_a_run_resumes_with_its_maps(settings, narrow, tmp_path, monkeypatch):
    settings |= {"student": str(narrow), "hidden_projector": True, "save_steps": 2}
    train(TrainConfig(**settings | {"output": str(tmp_path / "whole")}))
    step = RunTrainer.training_step

    def stopping(self, *arguments):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunTrainer, "training_step", stopping)
        train(TrainConfig(**settings))
    assert (tmp_path / "run/checkpoint-2" / PROJECTOR_FILE).exists()
    assert train(TrainConfig(**settings)).began_at == 2
    assert_close(weights(tmp_path / "whole"), weights(tmp_path / "run"), 1e-7)
    assert_close(*(load_file(tmp_path / name / PROJECTOR_FILE) for name in ("whole", "run")), 1e-7)


def test_in_the_library_s_own_trainer(store_folder, narrow, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(narrow)
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True)
    source = {"store": KnowledgeStore.open(store_folder), "dump": "states"}
    trainer = DistillationTrainer(model, arguments, **source, hidden=HiddenStates(0.5, projector=True))
    before = trainer.projector[0].weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.projector[0].weight)
    with pytest.raises(InputError, match="does not go with torch_compile"):
        compiled = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, torch_compile=True)
        DistillationTrainer(model, compiled, **source, hidden=HiddenStates(0.5))


def test_what_the_library_s_own_trainer_refuses(store_folder):
    for arguments, says in (((1.5,), "weight of hidden states is 1.5"), ((0.5, "cos"), "no loss 'cos' of hidden states")):
        with pytest.raises(InputError, match=says):
            HiddenStates(*arguments)
    store = KnowledgeStore.open(store_folder)
    with pytest.raises(InputError, match="relational-distance is of all targets' hidden states"):
        DistillationTrainer(store=store, dump="states", loss="relational-distance", hidden=HiddenStates(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_model_has_its_own_maps(store_folder, narrow, tmp_path, dtype):
    """And an evaluation before the first step leaves the head and the loss together."""
    store = KnowledgeStore.open(store_folder)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_hidden",
        greater_is_better=True, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model, evaluation = AutoModelForCausalLM.from_pretrained(narrow, dtype=dtype), DistillationDataset(store, "states")
    hidden = HiddenStates(0.5, projector=True)
    trainer = DistillationTrainer(model, arguments, store=store, dump="states", eval_dataset=evaluation, hidden=hidden)
    trainer.evaluate()
    assert has_plain_head(trainer.model)
    trainer.train()
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / PROJECTOR_FILE) for step in (1, 2))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert_close(trainer.projector.state_dict(), first, 0)
    assert (first["0.weight"] - last["0.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_weight": 1.5}, "--hidden-weight is 1.5; it must be at least 0 and at most 1"),
        ({"hidden_weight": 0.0, "hidden_projector": True}, "--hidden-projector has no effect without --hidden-weight"),
        ({"hidden_layers": "last"}, "--hidden-layers is 'last'; it must be numbers"),
        ({"dump": "plain"}, "'plain' holds no knowledge of kind 'hidden': it has positions; name another, or make one"),
        ({"student": "narrow"}, "have 16 values, and those of the dump states 32: give --hidden-projector"),
        ({"hidden_layers": "2"}, r"--hidden-layers 2 is not one of the student's, which has 1: give --hidden-layers, with 0"),
        ({"hidden_layers": "1"}, r"--hidden-layers 1 is not one of the student's"),
        ({"hidden_layers": "0,-1"}, r"names 2 \(0, -1\), and the dump states keeps states of 1 \(-1\)"),
        ({"dump": ("states", "two")}, "states and two keep hidden states of other layers or widths"),
        ({"dump": (), "teachers": "states,two"}, "hidden states are those of one teacher"),
        ({"positions_where": "token_id > 3"}, "does not go with --positions-where"),
        ({"loss": "relational-distance"}, "the loss relational-distance does not go with --hidden-weight"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_a_model_is_loaded(settings, narrow, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("student_train.training.run.load_model", None)
    options = options | ({"student": str(narrow)} if options.get("student") == "narrow" else {})
    with pytest.raises(InputError, match=says):
        train(TrainConfig(**settings | options))
    assert not (tmp_path / "run").exists()
