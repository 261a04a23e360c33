"""What a run passes on to the libraries under it: settings, a whole run in a file, adapters, precisions, sharded weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from processes import Notes, run_ranks
from ranks import train_sharded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.cli import app
from student_train.losses.divergences import forward_kl
from student_train.losses.head import has_plain_head
from student_train.losses.sliced import sliced_loss
from student_train.losses.targets import select_targets
from student_train.training import arguments, model_folder
from student_train.training.adapters import add_adapter
from student_train.training.arguments import training_arguments, typed_settings
from student_train.training.configuration import TrainConfig, check_config
from student_train.training.dataset import DistillationDataset
from student_train.training.models import load_model
from student_train.training.run import train
from student_train.training.run_trainer import RunTrainer
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
        (["optm=sgd"], "--set optm is no setting of transformers.TrainingArguments: do you mean optim or "),
        (["optim=nosuch"], "--set optim cannot be 'nosuch': choose one of adamw_torch, "),
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
    defaults = {"lr_scheduler_type", "use_cpu", "log_level", "ddp_find_unused_parameters", "dataloader_persistent_workers"}
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


# --- weights in bfloat16, and adapters ----------------------------------------------------------------------------------


def stopped_and_resumed(config: TrainConfig, monkeypatch, step: int) -> None:
    """A run that stops after a step, as at Ctrl-C, and is resumed to its end."""
    draw = RunTrainer.get_batch_samples

    def drawing(self, *arguments):
        self.stop_asked = self.state.global_step == step - 1
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "get_batch_samples", drawing)
        assert train(config).step == step
    assert train(config).began_at == step


def test_weights_in_bfloat16(settings, plain, tmp_path, monkeypatch):
    """All of it is bfloat16 but what positions are computed from; the run says what that means, and resumes."""
    reporter = Notes()
    run = settings | {"steps": 3, "precision": "bf16-weights"}
    monkeypatch.setattr("student_train.training.run.get_cpu_capability", lambda: "AVX2")
    train(TrainConfig(**run), reporter=reporter)
    assert any("CPUs with AVX-512, which this one lacks" in note for note in reporter.notes)
    assert any("the weights and the optimizer's moments are bfloat16" in note for note in reporter.notes)
    low = weights(tmp_path / "run")
    assert {tensor.dtype for tensor in low.values()} == {torch.bfloat16}
    assert 0 < furthest(low, weights(plain)) < 0.02
    assert load_model(str(tmp_path / "run")).dtype == torch.float32
    again = TrainConfig(**run | {"output": str(tmp_path / "again")})
    stopped_and_resumed(again, monkeypatch, 2)
    assert furthest(weights(tmp_path / "again"), low) == 0


@pytest.fixture(scope="module")
def adapted(store_folder, student, tmp_path_factory) -> Path:
    """A run of an adapter."""
    output = tmp_path_factory.mktemp("adapted") / "run"
    options = {"batch_size": 4, "learning_rate": 1e-2, "steps": 3, "eval_fraction": 0.0, "lora_rank": 4}
    train(TrainConfig(store=str(store_folder), student=str(student), output=str(output), dump="train", **options))
    return output


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # which peft asks transformers for
def test_an_adapter_is_saved_as_peft_saves_it(adapted, student, plain):
    assert not (adapted / "model.safetensors").exists() and not list(adapted.glob("*.bin"))
    saved = json.loads((adapted / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["r"], saved["lora_alpha"]) == (str(student), 4, 8)
    assert all(tensor.abs().max() > 0 for tensor in weights(adapted, "adapter_model.safetensors").values())
    ours = load_model(str(adapted))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapted)
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        logits = ours(tokens).logits
        torch.testing.assert_close(logits, peft(tokens).logits)
        assert (logits - load_model(str(student))(tokens).logits).abs().max() > 0.01
    assert ours.generation_config.eos_token_id == load_model(str(plain)).generation_config.eos_token_id
    run = json.loads((adapted / "run.json").read_text())
    assert 0 < run["trained_parameters"] < run["parameters"] / 10


def test_an_adapters_folder_is_evaluated_reported_and_trained_like_a_models(adapted, settings, plain, tmp_path):
    for words in (
        ("evaluate", settings["store"], "--model", adapted, "--dump", "heldout"),
        ("report", adapted, plain, "--output", tmp_path / "page.html"),
        ("run", settings["store"], "--student", adapted, "--output", tmp_path / "run", "--dump", "train", "--steps", 1),
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.stderr
    trained = json.loads((adapted / "run.json").read_text())["trained_parameters"]
    assert (tmp_path / "page.html").read_text().count(f"<small>{trained:,} trained</small>") == 1
    assert weights(tmp_path / "run").keys() == weights(plain).keys()


def test_an_adapter_over_other_weights_is_refused(adapted, student, plain, tmp_path):
    """As where the folder of its base was made again, of other layers."""
    folder, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(adapted, folder)
    shutil.copytree(student, base)
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": str(base)}))
    (base / "copy.gguf").write_bytes(b"GGUF")  # lies there too, as llama.cpp writes it
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text())))
    assert load_model(str(folder))  # it was moved, and is the same
    shutil.copyfile(plain / "model.safetensors", base / "model.safetensors")
    with pytest.raises(InputError, match=r"belongs to other weights than .*base has now"):
        load_model(str(folder))
    (folder / "run.json").write_text('{"by": "another program"}')
    assert load_model(str(folder))


def test_an_adapter_resumes(adapted, settings, tmp_path, monkeypatch):
    """After a step, and between the last step and the saving of the result."""
    run = settings | {"steps": 3, "learning_rate": 1e-2, "lora_rank": 4}
    stopped_and_resumed(TrainConfig(**run), monkeypatch, 2)
    whole = weights(adapted, "adapter_model.safetensors")
    assert furthest(weights(tmp_path / "run", "adapter_model.safetensors"), whole) == 0
    late = TrainConfig(**run | {"output": str(tmp_path / "late"), "save_steps": 3})
    save = RunTrainer.save_model

    def unsaved(self, output_dir=None, _internal_call=False):
        return save(self, output_dir, _internal_call) if _internal_call else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "save_model", unsaved)
        with pytest.raises(ZeroDivisionError):
            train(late)
    assert train(late).began_at == 3
    assert furthest(weights(tmp_path / "late", "adapter_model.safetensors"), whole) == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_in_slices_is_that_of_whole_logits_with_an_adapter(student, store_folder, checkpointing):
    [batch, *_] = DistillationDataset(KnowledgeStore.open(store_folder), "train", batch_size=4)
    model = add_adapter(load_model(str(student)), 4, base="student", seed=0).train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        torch.nn.init.normal_(weight, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    results = []
    for loss in (
        sliced_loss(model, batch, forward_kl),
        forward_kl(*select_targets(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch)).mean(),
    ):
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), {name: weight.grad.clone() for name, weight in trained.items()}))
    torch.testing.assert_close(*results)
    assert has_plain_head(model) and all("lora" in name for name in trained)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_a_model_that_puts_tokens_before_the_text_is_refused(student, store_folder):
    """Its logits are of other positions, in slices and as a whole; those with a prefix in the attention's cache are not."""
    [batch, *_] = DistillationDataset(KnowledgeStore.open(store_folder), "train", batch_size=4)

    def both_ways(kind: type) -> list:
        adapter = kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = get_peft_model(load_model(str(student)), adapter).eval()
        text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return [
            lambda: sliced_loss(model, batch, forward_kl),
            lambda: forward_kl(*select_targets(model(**text).logits, batch)).mean(),
        ]

    length = batch["input_ids"].shape[1]
    for kind in (PromptTuningConfig, PromptEncoderConfig):
        for way in both_ways(kind):
            message = f"answers at {length + 3} positions where a row of the batch has {length}.* prompt tuning .* train a LoRA"
            with pytest.raises(InputError, match=message):
                way()
    torch.testing.assert_close(*(way() for way in both_ways(PrefixTuningConfig)))


def test_an_adapter_on_weights_in_bfloat16_is_float32(settings, tmp_path):
    reporter = Notes()
    words = {"steps": 2, "lora_rank": 2, "precision": "bf16-weights", "set": ("gradient_checkpointing=true",)}
    train(TrainConfig(**settings | words), reporter=reporter)
    assert not any("the weights and the optimizer's moments are bfloat16" in note for note in reporter.notes)
    adapter = weights(tmp_path / "run", "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_an_adapter_that_cannot_be_made_or_loaded_is_refused(adapted, settings, tmp_path, monkeypatch):
    def refusal(run) -> str:
        with pytest.raises(InputError) as caught:
            run()
        return str(caught.value)

    run = TrainConfig(**settings, lora_rank=4)
    with monkeypatch.context() as patch:
        patch.setitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "llama", ["absent"])
        assert "--lora-rank finds no layers that can be adapted in a llama model" in refusal(lambda: train(run))
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "find_spec", lambda _: None)
        assert refusal(lambda: train(run)) == "--lora-rank needs peft: pip install 'knowledge-store[lora]'"
        assert "needs peft: pip install" in refusal(lambda: load_model(str(adapted)))
    assert "--lora-rank needs a student in safetensors" in refusal(lambda: train(replace(run, gguf_file="m.gguf")))
    chained = refusal(lambda: train(replace(run, student=str(adapted))))
    assert "is an adapter itself" in chained and f"student-train init --from {adapted} --keep-layers 0 --output" in chained
    assert not any(tmp_path.iterdir())
    folder = tmp_path / "adapter"
    shutil.copytree(adapted, folder)
    good = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "is an adapter of another kind than LoRA"),
        ({"base_model_name_or_path": None}, "does not name the model that the adapter belongs to"),
        ({"base_model_name_or_path": "/absent"}, "adapter_config.json cannot be used: there is no folder /absent"),
        ({"base_model_name_or_path": "/absent"}, "; write there in which folder the adapter's base model lies now"),
        ({"base_model_name_or_path": str(folder)}, "which is an adapter itself"),
        ({"r": 2}, "cannot be used: "),
        ({"target_modules": ["k_proj"]}, "cannot be used: "),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(good | change))
        assert message in refusal(lambda: load_model(str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps(good))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "without adapter_model.safetensors" in refusal(lambda: load_model(str(folder)))


# --- sharded weights ----------------------------------------------------------------------------------------------------


def test_weights_sharded_over_two_processes_are_trained_as_those_of_one(settings, tmp_path):
    """The same losses to rounding, with gradients clipped, a checkpoint in between, and a model that loads."""
    settings |= {"steps": 4, "eval_fraction": 0.2, "evaluations": 2}
    alone = settings | {"output": str(tmp_path / "alone")}
    train(TrainConfig(**alone))
    pair = settings | {"batch_size": 2, "set": ("fsdp=true", 'fsdp_config={"activation_checkpointing": true}')}
    ranks = run_ranks(2, train_sharded, pair, folder=tmp_path / "said")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    figures = ("step", "loss", "eval_loss", "eval_kl", "grad_norm")
    one, other = (
        [{name: entry[name] for name in figures if name in entry} for entry in history(tmp_path / folder)]
        for folder in ("alone", "run")
    )
    assert one == [pytest.approx(entry, rel=1e-5) for entry in other]
    # As loaded: of weights that were sharded the library saves the head too that is the embeddings.
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("alone", "run")]
    assert furthest(*models) < 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fsdp=true"], "Using fsdp only works in distributed training"),
        (["fsdp=true", 'fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}'], "which are read with pickles"),
        (["use_liger_kernel=true"], "needs a package that is not installed: pip install liger-kernel"),
    ],
)
def test_what_the_library_cannot_do_here_is_refused_and_nothing_is_written(settings, words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**settings, set=tuple(words)))
    assert not any(tmp_path.iterdir())


def test_a_printed_file_gives_the_same_run(settings, plain, tmp_path):
    """It is finished already: nothing of what makes it this run differs."""
    words = ["run", settings["store"], "--student", settings["student"], "--output", plain, "--batch-size", 4, "--steps", 3]
    words += ["--learning-rate", "1e-3", "--eval-fraction", 0, "--dump", "train", "--set", "logging_steps=2", "--print-config"]
    printed = CliRunner().invoke(app, [str(word) for word in words])
    (tmp_path / "run.yaml").write_text(printed.stdout)
    done = CliRunner().invoke(app, ["run", "--config", str(tmp_path / "run.yaml")])
    assert "is finished already: 3 steps" in done.stdout, done.stderr
    done = CliRunner().invoke(app, ["run", "--config", str(tmp_path / "run.yaml"), "--seed", "1"])
    assert done.exit_code == 2 and "--seed was 0 and is now 1" in done.stderr
