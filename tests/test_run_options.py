"""What a run passes on to the libraries under it: settings, a whole run in a file, adapters, precisions, sharded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from knowledge_store.errors import InputError
from student_train.training import arguments
from student_train.training.arguments import training_arguments, typed_settings
from student_train.training.configuration import TrainConfig, check_config
from student_train.training.run import train
from student_train.training.settings import settings_identity

Weights = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(output: str | Path, name: str = "model.safetensors") -> Weights:
    return load_file(Path(output) / name)


def furthest(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "history.json").read_text())["entries"]


# --- settings of the library --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(store_folder, student, tmp_path_factory) -> Path:
    """A run of three steps without any of this."""
    output = tmp_path_factory.mktemp("plain") / "run"
    options = {"batch_size": 4, "learning_rate": 1e-3, "steps": 3, "eval_fraction": 0.0}
    train(TrainConfig(store=str(store_folder), student=str(student), output=str(output), dump="train", **options))
    return output


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optim=adafactor", "adafactor"),
        ("adam-beta2=0.95", 0.95),
        ("gradient_checkpointing=true", True),
        ('optim_target_modules=["attn", "mlp"]', ["attn", "mlp"]),
        ('lr_scheduler_kwargs={"min_lr": 1e-5}', {"min_lr": 1e-5}),
        ("fsdp=true", True),
        ("fsdp=full_shard", "full_shard"),
        ("lr_scheduler_type=cosine_with_min_lr", "cosine_with_min_lr"),
    ],
)
def test_a_setting_has_the_type_that_the_library_gives_it(settings, word, value):
    name = word.partition("=")[0].replace("-", "_")
    assert typed_settings(TrainConfig(**settings, set=(word,))) == {name: value}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim"], "--set is 'optim'; it must be NAME=VALUE, such as optim=adafactor"),
        (["optim=sgd", "optim=adafactor"], "--set optim is given twice"),
        (["max_steps=3"], "--set max_steps is what the option --steps says: use that"),
        (["packing=true"], "--set packing cannot be used: documents are not packed"),
        (["load_best_model_at_end=true"], "a run keeps the checkpoints that it can resume from, and no others"),
        (["optm=sgd"], "--set optm is no setting of transformers.TrainingArguments: do you mean optim?"),
        (["optim=adam_w"], "--set optim cannot be 'adam_w': do you mean "),
        (["adam_beta1=high"], "--set adam_beta1 is 'high': invalid float value"),
        (["lr_scheduler_kwargs={min_lr"], "which is not JSON"),
        (["lr_scheduler_kwargs=3"], "it must be a JSON object"),
        (["lr_scheduler_type=cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (['lr_scheduler_kwargs={"slope": 2}'], "unexpected keyword argument 'slope'"),
        (["fsdp_config=absent.json"], "--set fsdp_config names the file absent.json, which does not exist"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_and_nothing_is_written(settings, words, message, tmp_path):
    with pytest.raises(InputError) as caught:
        train(TrainConfig(**settings, set=tuple(words)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_what_the_run_gives_the_library_itself_is_refused(settings, monkeypatch):
    given = {}
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **words: given.update(words) or TrainingArguments(**words))
    training_arguments(TrainConfig(**settings))
    defaults = {"lr_scheduler_type", "use_cpu", "log_level", "ddp_find_unused_parameters"}
    assert len(given) > 15 and defaults < given.keys()
    for name in given.keys() - defaults:
        with pytest.raises(InputError, match=f"--set {name} "):
            check_config(TrainConfig(**settings, set=(f"{name}=1",)))


def test_settings_reach_the_trainer(settings, plain, tmp_path, monkeypatch):
    """They are part of what makes a run this run, but for those that change no result."""
    seen = []
    save = Trainer._save_checkpoint

    def saving(self, *arguments):
        seen.append((self.optimizer, self.lr_scheduler))
        save(self, *arguments)

    monkeypatch.setattr(Trainer, "_save_checkpoint", saving)
    words = ("optim=sgd", "lr_scheduler_type=constant", "logging_steps=1", "dataloader_pin_memory=false")
    run = settings | {"steps": 3, "warmup": 0.0, "save_steps": 2, "weight_decay": 0.0}
    train(TrainConfig(**run, set=words))
    [(optimizer, scheduler), *_] = seen
    assert isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
    assert scheduler.get_last_lr()[0] == 1e-3
    assert [entry["step"] for entry in history(tmp_path / "run")] == [1, 2, 3]
    assert furthest(weights(tmp_path / "run"), weights(plain)) > 0
    assert train(TrainConfig(**run, set=(*words[:2], "logging_steps=2"))).began_at == 3
    with pytest.raises(InputError, match=r"--set was \{'lr_scheduler_type': 'constant', 'optim': 'sgd'\} and is now"):
        train(TrainConfig(**run, set=("optim=adafactor",)))


def test_a_setting_is_the_same_however_it_is_written(tmp_path):
    (tmp_path / "fsdp.json").write_text('{"version": 2}')
    same = [("weight=0.10", 'b={"x": 1}'), ('b={ "x":1 }', "weight=1e-1", "logging_dir=elsewhere")]
    assert settings_identity(same[0]) == settings_identity(same[1])
    before = settings_identity([f"fsdp_config={tmp_path}/fsdp.json"])
    (tmp_path / "fsdp.json").write_text('{"version": 1}')
    assert settings_identity([f"fsdp_config={tmp_path}/fsdp.json"]) != before


def test_gradient_checkpointing_changes_nothing(settings, plain, tmp_path):
    train(TrainConfig(**settings | {"steps": 3}, set=("gradient_checkpointing=true",)))
    assert furthest(weights(tmp_path / "run"), weights(plain)) == 0
    assert history(tmp_path / "run")[-1]["loss"] == history(plain)[-1]["loss"]
