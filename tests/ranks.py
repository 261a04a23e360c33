"""What a process of a training does in a test: `processes.run_ranks` starts one of these in each of several."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from student_train.training import run as training
from student_train.training import run_data, run_folder, run_trainer
from student_train.training.configuration import TrainConfig
from student_train.training.run_trainer import RunTrainer


def run_command(words: list[str]) -> None:
    """`student-train run` with these words."""
    from student_train import cli

    sys.argv = ["student-train", "run", *words]
    cli.main()


def diverge(words: list[str]) -> None:
    """The second process has an infinite loss in the third step."""
    compute = RunTrainer.compute_loss

    def spoilt(self: RunTrainer, *given: Any, **named: Any) -> Any:
        loss = compute(self, *given, **named)
        return loss + float("inf") if self.state.global_step == 2 and self.args.process_index == 1 else loss

    RunTrainer.compute_loss = spoilt
    run_command(words)


def begin_late(words: list[str]) -> None:
    """As if another run had begun after the first look at the lock."""
    run_folder.check_unlocked = lambda output: None
    run_command(words)


def die_at_a_checkpoint(words: list[str]) -> None:
    """SIGKILL, once a checkpoint is complete."""
    write = run_trainer.Checkpoint.write

    def write_and_die(checkpoint: run_folder.Checkpoint) -> None:
        write(checkpoint)
        os.kill(os.getpid(), signal.SIGKILL)

    run_trainer.Checkpoint.write = write_and_die
    run_command(words)


def pause(words: list[str], reached: Path) -> None:
    """Sleep in the first step, and make a file that says so."""

    def sleep(*arguments: Any) -> None:
        reached.touch()
        time.sleep(3600)

    RunTrainer.training_step = sleep
    run_command(words)


def choose_first(words: list[str]) -> None:
    """No process but the first may ask what is chosen."""
    choose = run_data.choose

    def choosing(*arguments: Any, **options: Any) -> Any:
        assert os.environ["RANK"] == "0"
        return choose(*arguments, **options)

    run_data.choose = choosing
    run_command(words)


def before_each_step(begin: Callable[[RunTrainer], None]) -> None:
    """Something to do before the batches of a step are read."""
    draw = RunTrainer.get_batch_samples

    def drawing(self: RunTrainer, *arguments: Any) -> Any:
        begin(self)
        return draw(self, *arguments)

    RunTrainer.get_batch_samples = drawing


def train(options: dict[str, Any], kill_at: int = -1) -> None:
    """A run; SIGKILL ends the last process before a step."""

    def kill(trainer: RunTrainer) -> None:
        if trainer.state.global_step == kill_at and trainer.args.process_index == trainer.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_step(kill)
    result = training.train(TrainConfig(**options))
    training.leave_processes()
    assert result.finished


def train_sharded(options: dict[str, Any]) -> None:
    """A run that stops after its second step and is resumed, with sharded weights.

    Accelerate leaves sharding out on CPUs, though torch has it there: here it is switched on.
    """
    from accelerate import state
    from accelerate.utils import DistributedType

    begin, stopping = state.AcceleratorState.__init__, True

    def sharding(self: Any, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def stop(trainer: RunTrainer) -> None:
        assert type(trainer.model).__name__.startswith("FSDP"), type(trainer.model)
        trainer.stop_asked = trainer.state.global_step == 1 and stopping

    state.AcceleratorState.__init__ = sharding
    before_each_step(stop)
    config = TrainConfig(**options)
    assert training.train(config).step == 2
    stopping = False
    assert training.train(config).began_at == 2
    training.leave_processes()


def train_in_three_ways(store_folder: str, student: str, folder: Path, shared: dict[str, Any]) -> None:
    """The same training by a plain trainer, by TRL's and by the command; writes the losses of each to curves.json."""
    from transformers import AutoModelForCausalLM, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from knowledge_store import KnowledgeStore
    from student_train import DistillationCollator, DistillationDataset, DistillationMixin, DistillationTrainer

    class SFTDistillation(DistillationMixin, SFTTrainer):
        pass

    os.chdir(folder)
    store = KnowledgeStore.open(store_folder)
    settings = {**shared, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    curves: dict[str, list[float]] = {}

    def note(name: str, entries: list[dict[str, float]]) -> None:
        curves[name] = [entry["loss"] for entry in entries if "loss" in entry]

    model = AutoModelForCausalLM.from_pretrained(student)
    trainer = DistillationTrainer(model, args=TrainingArguments("plain", **settings), store=store, dump="train")
    trainer.train()
    note("plain", trainer.state.log_history)
    heldout = DistillationDataset(store, "heldout", batch_size=3)
    rows = [{"input_ids": store["heldout", place]["input_ids"]} for place in range(store.sequence_count("heldout"))]
    trainer.data_collator = DistillationCollator(store, "heldout")
    curves["evaluations"] = [trainer.evaluate(data)["eval_loss"] for data in (heldout, rows)]
    arguments = SFTConfig("trl", bf16=False, gradient_checkpointing=False, **settings)
    trainer = SFTDistillation(student, args=arguments, store=store, dump="train")
    trainer.train()
    note("trl", trainer.state.log_history)
    steps = shared["max_steps"]
    options = {"batch_size": 1, "gradient_accumulation": 2, "learning_rate": shared["learning_rate"], "warmup": 1 / steps}
    options |= {"seed": shared["seed"], "steps": steps, "eval_fraction": 0.0, "precision": "fp32", "dump": "train"}
    training.train(TrainConfig(store=store_folder, student=student, output="run", **options))
    history = json.loads(Path("run/history.json").read_text())
    assert history["finished"] and Path("run/model.safetensors").exists()  # whichever process looks
    note("run", history["entries"])
    if trainer.is_world_process_zero():
        Path("curves.json").write_text(json.dumps(curves))
    training.leave_processes()


def without_a_hub(package: str, arguments: list) -> None:
    """A command where the hub of models may be asked, and nothing answers."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, "http://127.0.0.1:9"
    sys.argv = [package.replace("_", "-"), *map(str, arguments)]
    importlib.import_module(f"{package}.cli").main()
