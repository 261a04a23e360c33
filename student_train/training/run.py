"""Training a student from a store, on a small subclass of `transformers.Trainer`.

The ecosystem's: mixed precision, accumulation, checkpoints, DDP and FSDP, experiment trackers. Ours: where batches come
from, what the loss is, and what an interrupted run remembers.

One optimiser step takes the next `batch_size × gradient_accumulation × world_size` sequences of the store's order, and
never reaches across the end of an epoch. Its loss is the sum over all their target positions divided by how many there
are, so the same sequences give the same gradient however they are cut into batches and ranks. Where a run stands is
therefore one number, its step; going on from a checkpoint reads nothing that was read before.

`run_folder` says what stands in a run's folder.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from knowledge_store.reporter import Advance
from knowledge_store.terminal.console import note
from knowledge_store.terminal.progress import progress_bar
from student_train.calibration.recalibration import configured
from student_train.evaluation.results import HISTORY_FILE, RUN_FILE, read_history
from student_train.losses.divergences import (
    Loss,
    Targets,
    cross_entropy,
    forward_kl,
    per_target,
    select_targets,
    step_loss,
    targets_of,
    units,
)
from student_train.losses.sliced import Share, has_plain_head, sliced_loss, sum_over_slices
from student_train.training.configuration import TrainConfig, check_config, check_knowledge, unused_columns
from student_train.training.data import (
    DistillationDataset,
    check_student,
    describe_dump,
    padding_batch,
    split_ordinals,
)
from student_train.training.models import load_model, load_tokenizer, quieten
from student_train.training.run_folder import (
    Checkpoint,
    check_output,
    last_checkpoint,
    prepare_output,
    run_identity,
    versions,
    write_json,
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        step, steps: where it stands, and where it ends.
        finished: whether `output` is the trained model; otherwise a checkpoint was saved to go on from.
        began_at: the step it went on from; 0 for a new run; equal to `steps` when there was nothing to do.
        seconds: spent training, evaluations included, over all the runs that led here.
        eval_loss: the last one, nats; None without evaluation.
    """

    output: Path
    step: int
    steps: int
    finished: bool
    began_at: int
    seconds: float
    eval_loss: float | None


def _check_ranks(snapshot: int, world_size: int) -> None:
    """Make sure that every process sees the same sequences: a dump may have grown while they opened it (InputError)."""
    snapshots: list[int | None] = [None] * world_size
    torch.distributed.all_gather_object(snapshots, snapshot)
    if len(set(snapshots)) > 1:
        raise InputError("the dump grew while the processes of this run opened it, one after the other: start them again")


def train(config: TrainConfig) -> TrainResult:
    """Train a student, or go on with a run that was interrupted.

    Run it again with the same configuration to go on from the last checkpoint in `output`; a finished run is left
    alone. Ctrl-C finishes the step, saves a checkpoint and returns. Under `torchrun` every process calls this.

    Raises:
        InputError: an option, the student or the store cannot be used, or `output` holds something else or a run with
            another configuration; nothing is written then.
    """
    quieten()
    loss = check_config(config)
    store = KnowledgeStore.open(config.store, cache_size=int(config.cache_size * 1e9))
    dump = store.dump(config.dump)
    check_knowledge(store, dump, config, loss)
    config, recalibrate, calibration_sha256 = configured(config, store.manifest(dump), loss)
    train_ordinals, eval_ordinals = split_ordinals(store, dump, eval_fraction=config.eval_fraction)
    arguments = _arguments(config)
    sequences_per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
    steps_per_epoch = math.ceil(len(train_ordinals) / sequences_per_step)
    steps = config.steps or math.ceil((config.epochs or 1.0) * steps_per_epoch)

    output = Path(config.output)
    identity = run_identity(config, store, dump, sequences_per_step, steps, calibration_sha256)
    check_output(output, identity)
    history = read_history(output)
    if history.get("finished"):
        last = _last(history["entries"], "eval_loss")
        return TrainResult(output, steps, steps, True, steps, history["seconds"], last)
    checkpoint = last_checkpoint(output)
    began_at = checkpoint.step if checkpoint else 0

    tokenizer = load_tokenizer(config.student, config.gguf_file)
    student = load_model(config.student, config.gguf_file)
    check_student(store, dump, student.config, tokenizer)

    distributed = arguments.world_size > 1
    if distributed:
        _check_ranks(store.snapshot(dump), arguments.world_size)  # nobody writes before everybody has looked
    if arguments.process_index == 0:
        prepare_output(output, checkpoint)
        if not (output / RUN_FILE).exists():
            facts = {
                "identity": identity,
                "config": asdict(config),
                "dump": describe_dump(store, dump, unused_columns(config, loss)),
                "sequences": {"train": len(train_ordinals), "eval": len(eval_ordinals)},
                "world_size": arguments.world_size,
                "parameters": student.num_parameters(),
                "versions": versions(),
            }
            write_json(output / RUN_FILE, facts)

    _schedule(arguments, config, steps, evaluate=bool(len(eval_ordinals)), fresh=began_at == 0)
    kinds = tuple(dict.fromkeys(("positions", *loss.kinds)))
    dataset = DistillationDataset(
        store,
        dump,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=arguments.process_index,
        world_size=arguments.world_size,
        epoch=began_at // steps_per_epoch,
        consumed=began_at % steps_per_epoch * sequences_per_step,
        ordinals=train_ordinals,
        endless=True,
        kinds=kinds,
    )
    evaluation = None
    if len(eval_ordinals):
        evaluation = DistillationDataset(
            store,
            dump,
            batch_size=config.batch_size,
            rank=arguments.process_index,
            world_size=arguments.world_size,
            ordinals=eval_ordinals,
            shuffle=False,
            kinds=kinds,
        )
    trainer = DistillationTrainer(
        student, arguments, config, loss, dataset, evaluation, steps_per_epoch, checkpoint, recalibrate
    )
    main = trainer.is_world_process_zero()
    if main and began_at:
        note(f"Going on with {output} from step {began_at:,} of {steps:,}.")
    if began_at < steps:
        title = f"training from step {began_at:,}" if began_at else "training"
        bar = progress_bar(title, steps - began_at, "steps") if main else nullcontext(None)
        with bar as trainer.advance, _stop_on_interrupt(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    else:
        assert checkpoint is not None  # stopped between its last step and the saving of the model
        trainer.model.load_state_dict(load_model(str(checkpoint.folder)).state_dict())
        trainer.state = TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))

    step = trainer.state.global_step
    finished = step >= steps
    if finished:
        trainer.save_model(str(output))
        if main:
            tokenizer.save_pretrained(output)
            (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says the same
            trainer.write_history(finished=True)
            for folder in output.glob("checkpoint-*"):
                shutil.rmtree(folder)
    return TrainResult(
        output=output,
        step=step,
        steps=steps,
        finished=finished,
        began_at=began_at,
        seconds=trainer.seconds,
        eval_loss=_last(trainer.state.log_history, "eval_loss"),
    )


class DistillationTrainer(Trainer):
    """`transformers.Trainer` fed by a store. `train` is the way to use it; see the head of this module."""

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
    ) -> None:
        self.config = config
        self.distillation = loss
        self.recalibrate = recalibrate
        self.steps_per_epoch = steps_per_epoch
        self.advance: Advance | None = None
        self.stop_asked = False
        self.stopping = False
        self.positions = 0  # of the current step, over all ranks
        self._seconds_before = checkpoint.seconds if checkpoint else 0.0
        self.logged_at = checkpoint.logged_at if checkpoint else 0
        self._unlogged: Tensor | float = checkpoint.unlogged_loss if checkpoint else 0.0
        self._started = time.monotonic()
        has_plain_head(student)  # looked up before anything wraps it
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=evaluation,
            callbacks=[_Conduct(self)],
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
        pin = self.args.device.type == "cuda"
        return DataLoader(dataset, batch_size=None, num_workers=self.config.workers, pin_memory=pin)

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
            sum(int(batch["attention_mask"][batch["sequence_id"] >= 0].sum()) for batch in batches),
            int(self.stop_asked),
        ]
        totals = torch.tensor(sums, device=device)
        # Ranks may be told to stop at different moments; they agree here, once a step.
        totals = self.accelerator.reduce(totals, reduction="sum")
        self.stopping = bool(totals[3])
        self.positions = int(totals[2])
        batches += [padding_batch(batches[0])] * (num_batches - len(batches))
        return batches, {"target": totals[0], "sequence": totals[1]}

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The library forgets its sum of losses with each session: this one goes into the checkpoints."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._unlogged = self._unlogged + loss.detach().float()
        return loss

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
            outputs = self._forward(model, inputs)
            loss = step_loss(self.distillation, outputs, inputs, counts, recalibrate=self.recalibrate, **options)
        else:
            function = per_target(self.distillation, **options)
            loss = sliced_loss(model, inputs, function, count=counts["target"], recalibrate=self.recalibrate)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Any:
        extra = {"output_hidden_states": True} if self.distillation.hidden_states else {}
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **extra)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the held-out documents, nats: the run's own loss, NLL of the text, and KL to the teacher.

        The last two are there for any loss, so that runs can be compared: `eval_nll` and `eval_kl` (candidates and
        tail as one more symbol, a lower bound; left out for a dump without candidates, which says nothing of it).
        """
        dataset: DistillationDataset = eval_dataset or self.eval_dataset
        sequences = dataset.store.sequences(dataset.dump)
        targets = int(sequences["targets"].to_numpy()[dataset.ordinals].sum())
        counts = {"target": targets, "sequence": dataset.sequences}
        totals = torch.zeros(3, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for batch in self._loader(dataset):
                totals += self._measured(self._prepare_inputs(batch), counts).double().cpu()
        self.model.train()
        summed = self.accelerator.reduce(totals.float().to(self.args.device), reduction="sum").tolist()
        names = ("loss", "nll", "kl")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in zip(names, summed, strict=True)}
        if not positions_of(dataset.store.manifest(dataset.dump)).selection.candidates:
            del metrics[f"{metric_key_prefix}_kl"]
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, batch: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
        """A held-out batch's shares of the loss, of the text's NLL and of the KL, (3,)."""
        options: dict[str, Any] = {"ce_weight": self.config.ce_weight, "options": self.config.loss_options()}
        function, whole = per_target(self.distillation, **options), self.distillation.whole_batch

        def prepare(vocabulary: int) -> Share:
            known = targets_of(batch, vocabulary)
            wanted = targets_of(batch, vocabulary, self.recalibrate)

            def share(logits: Tensor, rows: slice) -> Tensor:
                nll = cross_entropy(logits, known.part(rows)).sum()
                kl = forward_kl(logits, known.part(rows), tail="bucket").sum()
                own = torch.zeros_like(nll) if whole else function(logits, wanted.part(rows)).sum()
                return torch.stack([own, nll, kl])

            return share

        if not whole:
            return sum_over_slices(self.model, batch, prepare) / max(counts["target"], 1)
        outputs = self._forward(self.model, batch)
        logits, _ = select_targets(outputs.logits, batch)
        shares = prepare(logits.shape[-1])(logits, slice(0, len(logits))) / max(counts["target"], 1)
        return shares + step_loss(self.distillation, outputs, batch, counts, **options) * shares.new_tensor([1, 0, 0])

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
            record = {"finished": finished, "seconds": round(self.seconds, 3), "entries": entries}
            write_json(Path(self.args.output_dir) / HISTORY_FILE, record)


class _Conduct(TrainerCallback):
    """The run's manners: the bar, the last evaluation, Ctrl-C, and when a checkpoint counts as complete."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        self.figures: dict[str, str] = {}
        self.step_began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        now = time.monotonic()
        self.figures["positions/s"] = f"{self.trainer.positions / max(now - self.step_began, 1e-6):,.0f}"
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
        for name, label in (("loss", "loss"), ("eval_loss", "held_out")):
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


def _arguments(config: TrainConfig) -> TrainingArguments:
    """What does not depend on the number of steps. Finds the device and joins the other processes, if any."""
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    try:
        arguments = TrainingArguments(
            output_dir=config.output,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
            seed=config.seed,
            bf16=bf16,
            # Only when told so does the library join processes that share a CPU.
            use_cpu=not torch.accelerator.is_available(),
            max_steps=1,
            report_to=config.report_to,
            disable_tqdm=True,
            log_level="error",
            remove_unused_columns=False,
            # The dataset begins where the checkpoint ends: nothing is read to be thrown away.
            ignore_data_skip=True,
            # Every parameter of a causal language model takes part in every step.
            ddp_find_unused_parameters=False,
            save_strategy="steps",
            save_steps=config.save_steps,
            # The one before the last stays until the last is complete.
            save_total_limit=2,
        )
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # refuses here, before anything is written, when its package is missing
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    # Several GPUs are for torchrun: without it one is used, and a step's batch is what the options say.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _schedule(arguments: TrainingArguments, config: TrainConfig, steps: int, *, evaluate: bool, fresh: bool) -> None:
    """Fill in what depends on the number of steps."""
    arguments.max_steps = steps
    arguments.warmup_steps = round(config.warmup * steps)
    arguments.logging_steps = max(1, steps // 200)
    if evaluate:
        arguments.eval_strategy = IntervalStrategy.STEPS
        arguments.eval_steps = max(1, steps // config.evaluations)
        arguments.eval_on_start = fresh


@contextmanager
def _stop_on_interrupt(trainer: DistillationTrainer) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM, which schedulers send) asks for a checkpoint; the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if trainer.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if trainer.is_world_process_zero() and not trainer.stop_asked:
            note("Stopping after this step; Ctrl-C again stops at once, without a checkpoint.")
        trainer.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_processes() -> None:
    """Leave the group of processes that `train` joined under torchrun, if it did."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _last(entries: list[dict[str, Any]], name: str) -> float | None:
    return next((entry[name] for entry in reversed(entries) if name in entry), None)
