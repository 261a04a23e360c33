"""The trainer of a run: `DistillationTrainer` with what an interrupted run remembers. `run.train` is the way to use it.

The library's: mixed precision, accumulation, checkpoints, DDP and FSDP, trackers, and which batches a resume goes on with. The
mixin's: where batches come from, what the loss is, and how a step is counted. Here: history.json, figures of progress, the stop
that Ctrl-C asks for, and the end of a run that diverges.

A step whose loss or gradient is no finite number is not made, and weights that give no finite loss are not saved: the run ends
with a `DivergenceError`, on all ranks alike.

`interruption` says what Ctrl-C does, and `run_folder` what stands in a run's folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from knowledge_store import KnowledgeStore
from knowledge_store.reporter import Advance
from student_train.losses.step import token_count
from student_train.losses.targets import Batch, Targets
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.divergence import DivergenceError
from student_train.training.mixin import DistillationTrainer
from student_train.training.mixture import Mixture
from student_train.training.run_folder import HISTORY_FILE, Checkpoint, write_json


class RunTrainer(DistillationTrainer):
    """`DistillationTrainer` of a run; see the head of this module.

    Args:
        student: the model, which is trained in place.
        arguments: see `arguments.training_arguments`.
        config: the run's options.
        dataset, evaluation: to train on, and held-out sequences, if any.
        steps_per_epoch: optimiser steps in an epoch.
        checkpoint: to resume from.
        recalibrate: what is done to the teacher's targets before the loss.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        arguments: TrainingArguments,
        config: TrainConfig,
        dataset: DistillationDataset,
        evaluation: DistillationDataset | None,
        steps_per_epoch: int,
        checkpoint: Checkpoint | None = None,
        recalibrate: Callable[[Targets], Targets] | None = None,
    ) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.advance: Advance | None = None
        self.stop_asked = False
        self.stopping = False
        self.tokens = 0  # of the current step, over all ranks
        self._seconds_before = checkpoint.seconds if checkpoint else 0.0
        self.logged_at = checkpoint.logged_at if checkpoint else 0
        self._unlogged: Tensor | float = checkpoint.unlogged_loss if checkpoint else 0.0
        self._step_loss: Tensor | float = 0.0
        self._last_batch: Batch = {}
        self._started = time.monotonic()
        super().__init__(
            student,
            arguments,
            train_dataset=dataset,
            eval_dataset=evaluation,
            loss=config.loss,
            ce_weight=config.ce_weight,
            rationale_weight=config.rationale_weight if config.rationale != "none" else None,
            hidden=config.hidden_states(),
            loss_options=config.loss_options(),
            recalibrate=recalibrate,
            callbacks=[_Progress(self)],
        )
        self.remove_callback(PrinterCallback)

    def _check_model(self, store: KnowledgeStore, mixture: Mixture) -> None:
        """The run has looked at it, with its tokenizer, before anything was written."""

    @property
    def seconds(self) -> float:
        """Spent since the run first began, interruptions left out."""
        return self._seconds_before + time.monotonic() - self._started

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, Tensor]]:
        """The batches of one optimiser step, and how many targets, sequences and tokens they hold over all ranks."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Ranks may be asked to stop at different moments; they agree here, once a step.
        self.stopping = bool(counts["stops"])
        self.tokens = int(counts["tokens"])
        self._step_loss, self._last_batch = 0.0, batches[0]
        return batches, counts

    def step_counts(self, batches: Sequence[Batch], device: torch.device, **more: int) -> dict[str, Tensor]:
        """As of the mixin, and the tokens, and the processes that were asked to stop."""
        tokens = sum(token_count(self.distillation, batch) for batch in batches)
        return super().step_counts(batches, device, tokens=tokens, stops=int(self.stop_asked), **more)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The library forgets its sum of losses with each session: this one goes into the checkpoints."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._unlogged = self._unlogged + loss.detach().float()
        self._step_loss = self._step_loss + loss.detach().float()
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """The norm of the step's gradient, which the library asks for before each update.

        Raises:
            DivergenceError: it is no finite number, or the step's loss is not.
        """
        norm: Tensor | float | None = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.as_tensor(self._step_loss, device=self.args.device)
        figures = {"loss": self.accelerator.reduce(loss, reduction="mean")}
        if norm is not None:  # DeepSpeed does not always know it
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded weights
            figures["norm of the gradient"] = torch.as_tensor(norm, dtype=torch.float32, device=self.args.device)
        self._check_finite(figures, step=self.state.global_step + 1)
        return norm

    def _check_finite(self, figures: Mapping[str, Tensor | float], step: int) -> None:
        """Raises DivergenceError where a figure, which is the same on all ranks, is not finite."""
        for name, figure in figures.items():
            if not math.isfinite(value := float(figure)):
                raise DivergenceError(Path(self.args.output_dir), step, self.state.global_step, name, value)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save, unless the last update spoilt the weights: the next step's loss comes too late to keep this checkpoint from
        taking the place of a good one.

        Raises:
            DivergenceError: they give no finite loss.
        """
        batch = self._prepare_inputs(self._last_batch)
        self.model.eval()  # draws no random numbers, of which the next step would get others
        with torch.no_grad():
            loss = self._measured(self.model, batch)[0][0].float()
        self.model.train()
        figures = {"loss after it": self.accelerator.reduce(loss, reduction="mean")}
        self._check_finite(figures, step=self.state.global_step)
        super()._save_checkpoint(model, trial)

    def unlogged_loss(self) -> float:
        """The sum of the losses of the steps since `logged_at`; every process must ask for it together."""
        total = torch.as_tensor(self._unlogged, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.reduce(total, reduction="mean"))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of `DistillationMixin` alone, over the held-out documents.

        Raises:
            DivergenceError: one of them is no finite number.
        """
        loader = self.get_eval_dataloader(eval_dataset)
        output = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True, metric_key_prefix=metric_key_prefix)
        metrics: dict[str, float] = {f"{metric_key_prefix}_{name}": 0.0 for name in self.figures}
        metrics = {name: output.metrics[name] for name in metrics}
        figures = {f"validation {name}": metrics[f"{metric_key_prefix}_{name}"] for name in self.figures}
        self._check_finite(figures, step=self.state.global_step)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds spent so far, count epochs by steps, and keep history.json up to date.

        `loss` is the mean over the steps since it was last logged, in this session or in one before it.
        """
        if "loss" in logs:
            logs["loss"] = self.unlogged_loss() / (self.state.global_step - self.logged_at)
            self._unlogged, self.logged_at = 0.0, self.state.global_step
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        logs["seconds"] = round(self.seconds, 3)
        super().log(logs, start_time)
        self.write_history(finished=False)

    def write_history(self, *, finished: bool) -> None:
        """Write history.json (first process only)."""
        if self.is_world_process_zero():
            # The last entry of a run is the library's own summary, whose figures count this session only.
            entries = [entry for entry in self.state.log_history if "train_runtime" not in entry]
            record = {
                "finished": finished,
                "seconds": round(self.seconds, 3),
                "step": self.state.global_step,
                "tokens": self.state.num_input_tokens_seen,
                "entries": entries,
            }
            write_json(Path(self.args.output_dir) / HISTORY_FILE, record)


class _Progress(TrainerCallback):
    """At each step: figures for the progress bar, an evaluation after the last one, and the stop that Ctrl-C asked for. At each
    checkpoint: the record that makes it complete."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.figures: dict[str, str] = {}
        self.step_began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        state.num_input_tokens_seen += self.trainer.tokens  # which the library keeps in its checkpoints
        now = time.monotonic()
        self.figures["tokens/s"] = f"{self.trainer.tokens / max(now - self.step_began, 1e-6):,.0f}"
        self.step_began = now
        if self.trainer.advance:
            self.trainer.advance(1, **self.figures)
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, label in (("loss", "loss"), ("eval_loss", "validation")):
            if logs and name in logs:
                self.figures[label] = f"{logs[name]:.3f}"
        if self.trainer.advance:
            self.trainer.advance(0, **self.figures)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_began = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each rank writes its own random state
        unlogged_loss = self.trainer.unlogged_loss()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            trainer = self.trainer
            Checkpoint(state.global_step, folder, trainer.seconds, trainer.logged_at, unlogged_loss).write()
        self.step_began = time.monotonic()
