"""The trainer of a run: a small subclass of `transformers.Trainer` that is fed by a store. `run.train` is the way to use it.

The ecosystem's: mixed precision, accumulation, checkpoints, DDP and FSDP, experiment trackers. Ours: where batches come
from, what the loss is, and what an interrupted run remembers.

One optimiser step takes the next `batch_size × gradient_accumulation × world_size` sequences of the store's order, and
never reaches across the end of an epoch. Its loss is the sum over all their target positions divided by how many there
are, so the same sequences give the same gradient however they are cut into batches and ranks. Where a run stands is
therefore one number, its step; a resume from a checkpoint reads nothing that was read before.

A step whose loss or gradient is no finite number is not made, and weights that give no finite loss are not saved: the run ends
with a `DivergenceError`, on all ranks alike.

`interruption` says what Ctrl-C does, and `run_folder` what stands in a run's folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from knowledge_store.reporter import Advance
from student_train.losses.divergences import forward_kl, token_nll
from student_train.losses.head import has_plain_head
from student_train.losses.sliced import Prepare, Share, sliced_loss, sum_over_slices
from student_train.losses.step import per_target, run_student, step_loss, token_count, units
from student_train.losses.table import TEXT, Loss
from student_train.losses.targets import Targets, predicting_logits, target_tokens, targets_of
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset, padding_batch
from student_train.training.divergence import DivergenceError
from student_train.training.run_folder import HISTORY_FILE, Checkpoint, write_json


class RunTrainer(Trainer):
    """`transformers.Trainer` fed by a store; see the head of this module.

    Args:
        student: the model, which is trained in place.
        arguments: see `arguments.training_arguments`.
        config, loss: the run's options, and the entry of `LOSSES` that they name.
        dataset, evaluation: to train on, endless, and held-out sequences, if any.
        steps_per_epoch: optimiser steps in an epoch.
        checkpoint: to resume from.
        recalibrate: what is done to the teacher's targets before the loss.
        measure_kl: whether the divergence from the teacher is measured too, which takes a dump with candidates.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        arguments: TrainingArguments,
        config: TrainConfig,
        loss: Loss,
        dataset: DistillationDataset,
        evaluation: DistillationDataset | None,
        steps_per_epoch: int,
        checkpoint: Checkpoint | None = None,
        recalibrate: Callable[[Targets], Targets] | None = None,
        measure_kl: bool = False,
    ) -> None:
        self.config = config
        self.distillation = loss
        self.recalibrate = recalibrate
        on_text = TEXT[0] in loss.inputs
        self.figures = ("loss", *(("nll",) if on_text else ()), *(("kl",) if on_text and measure_kl else ()))
        self.steps_per_epoch = steps_per_epoch
        self.advance: Advance | None = None
        self.stop_asked = False
        self.stopping = False
        self.tokens = 0  # of the current step, over all ranks
        self._seconds_before = checkpoint.seconds if checkpoint else 0.0
        self.logged_at = checkpoint.logged_at if checkpoint else 0
        self._unlogged: Tensor | float = checkpoint.unlogged_loss if checkpoint else 0.0
        self._step_loss: Tensor | float = 0.0
        self._last_batch: dict[str, Tensor] = {}
        self._started = time.monotonic()
        has_plain_head(student)  # looked up before anything wraps it
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=evaluation,
            callbacks=[_Progress(self)],
        )
        self.remove_callback(PrinterCallback)
        # compute_loss divides by the counts of the whole step itself.
        self.model_accepts_loss_kwargs = True

    @property
    def seconds(self) -> float:
        """Spent since the run first began, interruptions left out."""
        return self._seconds_before + time.monotonic() - self._started

    def get_train_dataloader(self) -> DataLoader:
        """The store's batches as they are: the dataset knows its rank, so accelerate must not shard it again."""
        return self._loader(self.train_dataset)

    def _loader(self, dataset: DistillationDataset) -> DataLoader:
        arguments, workers = self.args, self.config.workers
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context if workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The batches of one optimiser step, and how many targets and sequences they hold over all ranks.

        At the end of an epoch a step may have fewer batches; it is filled up with padding.
        """
        step = self.state.global_step % self.steps_per_epoch
        left = self.train_dataset.batches_per_epoch - step * num_batches
        batches = [next(epoch_iterator) for _ in range(min(num_batches, left))]
        counts = [units(batch) for batch in batches]
        sums = [
            sum(int(count["target"]) for count in counts),
            sum(int(count["sequence"]) for count in counts),
            sum(token_count(self.distillation, batch) for batch in batches),
            int(self.stop_asked),
        ]
        totals = torch.tensor(sums, device=device)
        # Ranks may be asked to stop at different moments; they agree here, once a step.
        totals = self.accelerator.reduce(totals, reduction="sum")
        self.stopping = bool(totals[3])
        self.tokens = int(totals[2])
        self._step_loss, self._last_batch = 0.0, batches[0]
        batches += [padding_batch(batches[0])] * (num_batches - len(batches))
        return batches, {"target": totals[0], "sequence": totals[1]}

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

    def _check_finite(self, figures: Mapping[str, Tensor], step: int) -> None:
        """Raises DivergenceError where a figure, which is the same on all ranks, is not finite."""
        for name, value in zip(figures, torch.stack(list(figures.values())).tolist(), strict=True):
            if not math.isfinite(value):
                raise DivergenceError(Path(self.args.output_dir), step, self.state.global_step, name, value)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save, unless the last update spoilt the weights: the next step's loss comes too late to keep this checkpoint from
        taking the place of a good one.

        Raises:
            DivergenceError: they give no finite loss.
        """
        batch = self._prepare_inputs(self._last_batch)
        counts = {unit: max(1, int(count)) for unit, count in units(batch).items()}
        self.model.eval()  # draws no random numbers, of which the next step would get others
        with torch.no_grad():
            loss = self._measured(batch, counts)[0].float()
        self.model.train()
        figures = {"loss after it": self.accelerator.reduce(loss, reduction="mean")}
        self._check_finite(figures, step=self.state.global_step)
        super()._save_checkpoint(model, trial)

    def unlogged_loss(self) -> float:
        """The sum of the losses of the steps since `logged_at`; every process must ask for it together."""
        total = torch.as_tensor(self._unlogged, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.reduce(total, reduction="mean"))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """This batch's share of the step's loss, times the number of ranks, since DDP averages over them."""
        counts = num_items_in_batch or units(inputs)
        options: dict[str, Any] = {"ce_weight": self.config.ce_weight, "options": self.config.loss_options()}
        outputs = None
        if self.distillation.whole_batch:
            outputs = run_student(model, self.distillation, inputs)
            loss = step_loss(self.distillation, outputs, inputs, counts, recalibrate=self.recalibrate, **options)
        else:
            function = per_target(self.distillation, **options)
            loss = sliced_loss(model, inputs, function, count=counts["target"], recalibrate=self.recalibrate)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the held-out documents, nats: `eval_loss`, the validation loss, which is that of the run's own objective;
        `eval_nll`, the loss on the text; `eval_kl`, the divergence from the teacher.

        The last two are the same for any loss, so that runs can be compared. Both are left out for a loss that does not run
        on the text, and `eval_kl` (candidates and tail as one more symbol, a lower bound) for a dump without candidates.

        Raises:
            DivergenceError: one of them is no finite number.
        """
        dataset: DistillationDataset = eval_dataset or self.eval_dataset
        sequences = dataset.store.sequences(dataset.dump)
        targets = int(sequences["targets"].to_numpy()[dataset.plan.ordinals].sum())
        counts = {"target": targets, "sequence": dataset.sequences}
        totals = torch.zeros(len(self.figures), dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for batch in self._loader(dataset):
                totals += self._measured(self._prepare_inputs(batch), counts).double().cpu()
        self.model.train()
        means = self.accelerator.reduce(totals.float().to(self.args.device), reduction="sum")
        named = dict(zip(self.figures, means, strict=True))
        self._check_finite({f"validation {name}": value for name, value in named.items()}, step=self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in named.items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, batch: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
        """A batch of held-out documents: its shares of `self.figures`, a tensor of as many numbers."""
        options: dict[str, Any] = {"ce_weight": self.config.ce_weight, "options": self.config.loss_options()}
        if not self.distillation.whole_batch:
            function = per_target(self.distillation, **options)
            return sum_over_slices(self.model, batch, self._shares(batch, function)) / max(counts["target"], 1)
        outputs = run_student(self.model, self.distillation, batch)
        loss = step_loss(self.distillation, outputs, batch, counts, **options)
        if len(self.figures) == 1:
            return loss.unsqueeze(0)
        logits = predicting_logits(outputs[self.distillation.inputs.index(TEXT[0])].logits, batch)
        text = self._shares(batch, None)(logits.shape[-1])(logits, slice(0, len(logits))) / max(counts["target"], 1)
        return torch.cat([loss.unsqueeze(0), text])

    def _shares(self, batch: dict[str, Tensor], function: Callable[[Tensor, Targets], Tensor] | None) -> Prepare:
        """What a slice of logits adds to the figures; without a function to all but the first, the run's own loss."""
        tokens = target_tokens(batch)

        def prepare(vocabulary_size: int) -> Share:
            known = targets_of(batch, vocabulary_size) if "kl" in self.figures else None
            learned = targets_of(batch, vocabulary_size, self.recalibrate) if function else None

            def share(logits: Tensor, rows: slice) -> Tensor:
                sums = [function(logits, learned.part(rows)).sum()] if function and learned else []
                sums.append(token_nll(logits, tokens[rows]).sum())
                if known:
                    sums.append(forward_kl(logits, known.part(rows), tail="bucket").sum())
                return torch.stack(sums)

            return share

        return prepare

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
            Checkpoint(state.global_step, folder, self.trainer.seconds, self.trainer.logged_at, unlogged_loss).write()
        self.step_began = time.monotonic()
