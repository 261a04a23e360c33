"""A training run from beginning to end: everything is checked, then the student is trained, or a run resumed.

`run_data` says what it reads, `run_trainer` what a step is, `interruption` what Ctrl-C does, and `run_folder` what stands in a
run's folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.backends.cpu import get_cpu_capability
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.table import TEXT
from student_train.rationales.second_input import MARKER
from student_train.training.adapters import add_adapter
from student_train.training.arguments import schedule, training_arguments
from student_train.training.calibration import configured
from student_train.training.chat_template import note_template
from student_train.training.configuration import TrainConfig
from student_train.training.context import check_context, context_length, continues
from student_train.training.endings import stop_at_ending
from student_train.training.interruption import stop_on_interrupt
from student_train.training.knowledge import check_run
from student_train.training.mixture import newer_dumps
from student_train.training.model_folder import model_sha256, weights_sha256
from student_train.training.models import first_line, hold_in_bfloat16, load_model, load_tokenizer, quieten
from student_train.training.ranks import rank_and_world_size
from student_train.training.run_data import RunData, run_data
from student_train.training.run_folder import (
    BASE_WEIGHTS,
    RUN_FILE,
    check_output,
    last_checkpoint,
    read_history,
    run_identity,
    tidy_output,
    versions,
    write_json,
)
from student_train.training.run_lock import locked
from student_train.training.run_trainer import RunTrainer
from student_train.training.vocabulary import check_student


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        step, steps: where it stands, and where it ends.
        finished: whether `output` is the trained model; otherwise the checkpoint of `step` was saved, to resume from.
        began_at: the step it was resumed from; 0 for a new run; equal to `steps` when there was nothing to do.
        seconds: spent training, evaluations included, over all the runs that led here.
        eval_loss: the last validation loss, nats; None without evaluation.
    """

    output: Path
    step: int
    steps: int
    finished: bool
    began_at: int
    seconds: float
    eval_loss: float | None


def train(config: TrainConfig, *, reporter: Reporter = SILENT) -> TrainResult:
    """Train a student, or resume a run that was interrupted.

    The same configuration resumes from the last checkpoint in `output`; a finished run is left alone. Ctrl-C saves a
    checkpoint and returns (see `interruption`). Under `torchrun` every process calls this.

    Args:
        config: the run's options.
        reporter: hears of progress and of a resume, in the first process alone.

    Raises:
        InputError: an option, the student or the store cannot be used, or `output` holds something else or a run with
            another configuration, or another process is training into it; nothing is written then.
        DivergenceError: a loss or a gradient is no finite number; the last checkpoint is kept.
    """
    with ExitStack() as held:
        return _train(config, reporter, held)


def _train(config: TrainConfig, reporter: Reporter, held: ExitStack) -> TrainResult:
    """As `train`; `held` gets the lock of the output folder."""
    quieten()
    rank, _ = rank_and_world_size()
    store, mixture, loss = check_run(config, reporter if rank == 0 else SILENT)
    config, recalibrate, calibration_sha256 = configured(config, store.manifest(mixture.dumps[0]), loss)
    arguments = training_arguments(config)
    first_process = arguments.process_index == 0
    first_reporter = reporter if first_process else SILENT
    data = run_data(config, store, mixture, loss, arguments, reporter=first_reporter)
    output, steps = Path(config.output), data.steps
    student_sha256 = model_sha256(config.student)
    identity = run_identity(config, store, mixture, data.sequences_per_step, steps, student_sha256, calibration_sha256)
    identity |= {**data.choice.identity, **(data.rationales.identity if data.rationales else {})}
    if result := _finished(output, identity, steps):
        return result
    _ = data.shares, last_checkpoint(output)  # refuse what cannot be read, or is not to be loaded

    tokenizer = load_tokenizer(config.student, config.gguf_file)
    student = _checked_student(data, tokenizer, first_reporter)
    marker = _marker(data, tokenizer, student, first_reporter)
    student = _prepared(student, config, first_reporter)
    if config.loss == "first" and not config.ce_weight:
        first_reporter.note(
            "Warning: FIRST's loss has next to no gradient where a student gives the candidates next to no probability: in our"
            " study of questions three of five students learnt nothing by it alone, and did with --ce-weight 0.3"
        )
    if config.precision.startswith("bf16") and arguments.device.type == "cpu" and get_cpu_capability() == "AVX2":
        first_reporter.note(
            "Warning: PyTorch is fast in bfloat16 only on CPUs with AVX-512, which this one lacks, and takes several times"
            " as long as with --precision fp32"
        )

    _begin_alone(output, [store.snapshot(dump) for dump in mixture.dumps], arguments, reporter, held)
    # What stands there may have changed until now, and does no more.
    if result := _finished(output, identity, steps):
        return result
    checkpoint = last_checkpoint(output)
    began_at = checkpoint.step if checkpoint else 0
    evaluation = data.validation(marker)
    parameters = {
        "parameters": student.num_parameters(),
        "trained_parameters": student.num_parameters(only_trainable=True),
    }
    schedule(arguments, config, steps, evaluate=evaluation is not None, fresh=began_at == 0)
    try:
        trainer = RunTrainer(
            student, arguments, config, data.training(marker), evaluation, data.steps_per_epoch, checkpoint, recalibrate
        )
    except (ValueError, RuntimeError, ImportError) as error:  # what `--set` asks for, and the library cannot do here
        raise InputError(first_line(error)) from error
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise InputError("--set fsdp has no effect on CPUs, where accelerate does not shard: leave it out")
    if first_process:
        tidy_output(output)
        if not (output / RUN_FILE).exists():
            facts = {"identity": identity, "config": asdict(config), **data.facts(), **parameters, "versions": versions()}
            if config.lora_rank is not None:
                facts[BASE_WEIGHTS] = weights_sha256(config.student)
            write_json(output / RUN_FILE, facts)
        for sentence in _resume_lines(data, began_at) if began_at else data.lines():
            reporter.note(sentence)
    if began_at < steps:
        title = f"training from step {began_at:,}" if began_at else "training"
        progress = reporter.progress(title, steps - began_at, "steps") if first_process else nullcontext(None)
        with progress as trainer.advance, stop_on_interrupt(trainer, reporter):
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        trainer.callback_handler.train_dataloader = None  # its workers end now: as garbage they take 5 seconds each
    else:
        assert checkpoint is not None  # stopped between its last step and the saving of the model
        _take_up(trainer, checkpoint.folder)
    step = trainer.state.global_step
    finished = step >= steps
    if finished:
        trainer.save_model(str(output))
        if first_process:
            tokenizer.save_pretrained(output)
            (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says the same
            trainer.write_history(finished=True)
            for folder in output.glob("checkpoint-*"):
                shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()  # whoever returns finds the trained model
    eval_loss = _last(trainer.state.log_history, "eval_loss")
    return TrainResult(output, step, steps, finished, began_at, trainer.seconds, eval_loss)


def _checked_student(data: RunData, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> PreTrainedModel:
    """The student as it was saved, which can learn from the dumps and stops where they end (InputError: it cannot)."""
    config, store, corpus = data.config, data.store, data.mixture.corpus
    student = load_model(config.student, config.gguf_file)
    for dump in data.mixture.dumps:
        check_student(store, dump, student.config, tokenizer, reporter=reporter)
    if TEXT[0] in data.loss.inputs:
        for dump in corpus:
            check_context(store, dump, student, reporter=reporter)
    stop_at_ending(student, tokenizer, store, corpus, keep_eos=config.keep_eos, reporter=reporter)
    note_template(tokenizer, store, corpus, reporter=reporter)
    return student


def _marker(data: RunData, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, reporter: Reporter) -> Sequence[int]:
    """The tokens that mark a second task, none without one (InputError: the student has no room for it, or no such tokens)."""
    if data.rationales is None:
        return ()
    marker = tuple(tokenizer(MARKER, add_special_tokens=False)["input_ids"])
    if not marker:
        raise InputError(f"the student's tokenizer has no token for {MARKER!r}, which marks a rationale: leave --rationale out")
    second, limit = data.second_input(data.mixture.corpus, marker), context_length(student)
    if second is not None and limit is not None and second.longest > limit:
        too_long = f"a context and its rationale take up to {second.longest:,} tokens, and the student's context has {limit:,}"
        if not continues(student, second.longest - 1):
            raise InputError(f"{too_long}: leave long ones out with --where, and --eval-fraction 0 where they are held out")
        reporter.note(f"Warning: {too_long}. It computes its positions and goes on beyond.")
    return marker


def _resume_lines(data: RunData, began_at: int) -> list[str]:
    """What a person should know of a run that goes on."""
    newer = newer_dumps(data.config, data.store, data.mixture)
    return [
        f"Resuming {data.config.output} from step {began_at:,} of {data.steps:,}.",
        *(
            f"The dump {dump} matches --dump by now, and is left out: the run goes on with those it began with."
            for dump in newer
        ),
    ]


def _take_up(trainer: RunTrainer, checkpoint: Path) -> None:
    """Give a trainer the model and the state of a checkpoint, without training on."""
    if trainer.config.lora_rank is None:
        with trainer.projector_apart():
            trainer.model.load_state_dict(load_model(str(checkpoint)).state_dict())
        trainer.load_projector(str(checkpoint))
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    trainer.is_fsdp_enabled = False  # of a model that was never wrapped
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _prepared(student: PreTrainedModel, config: TrainConfig, reporter: Reporter) -> PreTrainedModel:
    """The student with weights of the precision that is asked for, and with an adapter where one is to be trained."""
    if config.precision == "bf16-weights":
        student = hold_in_bfloat16(student)
        if config.lora_rank is None:
            reporter.note(
                "Warning: the weights and the optimizer's moments are bfloat16, and an update smaller than about 1/512 of a"
                " weight is lost: --precision bf16 keeps both in float32"
            )
    if config.lora_rank is None:
        return student
    base = str(Path(config.student).resolve()) if Path(config.student).is_dir() else config.student
    return add_adapter(student, config.lora_rank, base=base, seed=config.seed)


def _finished(output: Path, identity: dict[str, Any], steps: int) -> TrainResult | None:
    """The result of the run that an output holds, if that is finished (InputError: it holds something else)."""
    check_output(output, identity)
    history = read_history(output)
    if not history.get("finished"):
        return None
    eval_loss = _last(history["entries"], "eval_loss")
    return TrainResult(output, steps, steps, True, steps, history["seconds"], eval_loss)


def _begin_alone(output: Path, snapshots: list[int], arguments: TrainingArguments, reporter: Reporter, held: ExitStack) -> None:
    """Lock the output, in the first process, once every process has looked at it, and make sure that all see the same
    sequences: a dump may have grown while they opened it.

    Raises:
        InputError: on all of them, where another run holds the lock, or they do not see the same.
    """

    def gathered(value: Any) -> list[Any]:
        values = [value] * arguments.world_size
        if arguments.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    if len(set(gathered(tuple(snapshots)))) > 1:
        raise InputError("a dump grew while the processes of this run opened it, one after the other: start them again")
    refusal = None
    if arguments.process_index == 0:
        try:
            held.enter_context(locked(output, reporter))
        except InputError as error:
            refusal = str(error)
    [refusal, *_] = gathered(refusal)
    if refusal:
        raise InputError(refusal)


def leave_processes() -> None:
    """Leave the group of processes that `train` joined under torchrun, if it did."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _last(entries: list[dict[str, Any]], name: str) -> float | None:
    return next((entry[name] for entry in reversed(entries) if name in entry), None)
