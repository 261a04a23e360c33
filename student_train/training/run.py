"""A training run from beginning to end: everything is checked, then the student is trained, or a run resumed.

`run_trainer` says what a step is, `interruption` what Ctrl-C does, and `run_folder` what stands in a run's folder.
"""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.table import TEXT
from student_train.rationales.second_input import MARKER, SecondInput
from student_train.training.adapters import add_adapter
from student_train.training.arguments import schedule, training_arguments
from student_train.training.calibration import configured
from student_train.training.choice import choose, choose_once
from student_train.training.configuration import TrainConfig
from student_train.training.context import check_context, context_length, continues
from student_train.training.dataset import DistillationDataset
from student_train.training.dump_facts import describe_dump, dump_shares, reading_lines
from student_train.training.endings import stop_at_ending
from student_train.training.interruption import stop_on_interrupt
from student_train.training.knowledge import check_mixture, check_run, columns_read, kinds_read
from student_train.training.length_groups import tell_padding
from student_train.training.mixture import newer_dumps
from student_train.training.model_folder import model_sha256
from student_train.training.models import first_line, hold_in_bfloat16, load_model, load_tokenizer, quieten
from student_train.training.rationale import RunRationales, choose_for_run, joined_dumps
from student_train.training.run_folder import (
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
from student_train.training.split import split_dumps
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
        padding: the share of what the student ran on in training that was padding.
    """

    output: Path
    step: int
    steps: int
    finished: bool
    began_at: int
    seconds: float
    eval_loss: float | None
    padding: float


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
    store, mixture, loss = check_run(config)
    manifests = [store.manifest(dump) for dump in mixture.dumps]
    config, recalibrate, calibration_sha256 = configured(config, manifests[0], loss)
    not_held_out, eval_ordinals = split_dumps(store, mixture.corpus, eval_fraction=config.eval_fraction)
    lacking: dict[str, int] = {}
    if len(joined := joined_dumps(config, mixture)) > 1:
        lacking, left_out = store.lacking(joined)
        not_held_out = {dump: ordinals.without(left_out) for dump, ordinals in not_held_out.items()}
        eval_ordinals = {dump: np.setdiff1d(ordinals, left_out) for dump, ordinals in eval_ordinals.items()}
    arguments = training_arguments(config)
    first_reporter = reporter if arguments.process_index == 0 else SILENT
    choice = choose_once(
        arguments.process_index,
        arguments.world_size,
        lambda: choose(config, store, mixture.corpus, not_held_out, reporter=first_reporter),
    )
    train_ordinals = choice.ordinals
    rationales = choose_once(
        arguments.process_index,
        arguments.world_size,
        lambda: choose_for_run(config, store, mixture.corpus, (train_ordinals, eval_ordinals)),
    )
    train_count, eval_count = (sum(map(len, ordinals.values())) for ordinals in (train_ordinals, eval_ordinals))
    sequences_per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
    steps_per_epoch = math.ceil(train_count / sequences_per_step)
    steps = config.steps or math.ceil((config.epochs or 1.0) * steps_per_epoch)

    output = Path(config.output)
    student_sha256 = model_sha256(config.student)
    identity = run_identity(config, store, mixture, sequences_per_step, steps, student_sha256, calibration_sha256)
    identity |= {**choice.identity, **(rationales.identity if rationales else {})}
    if result := _finished(output, identity, steps):
        return result
    shares = dump_shares(store, mixture, train_ordinals, sequences_per_step, steps)
    last_checkpoint(output)  # refuses one that is not to be loaded

    tokenizer = load_tokenizer(config.student, config.gguf_file)
    student = load_model(config.student, config.gguf_file)
    for dump in mixture.dumps:
        check_student(store, dump, student.config, tokenizer, reporter=first_reporter)
    if TEXT[0] in loss.inputs:
        for dump in mixture.corpus:
            check_context(store, dump, student, reporter=first_reporter)
    second_input = _second_input(rationales, tokenizer, student, first_reporter)
    stop_at_ending(student, tokenizer, store, mixture.corpus, keep_eos=config.keep_eos, reporter=first_reporter)
    generation = student.generation_config
    student = _prepared(student, config, first_reporter)

    _begin_alone(output, [store.snapshot(dump) for dump in mixture.dumps], arguments, reporter, held)
    # What stands there may have changed until now, and does no more.
    if result := _finished(output, identity, steps):
        return result
    checkpoint = last_checkpoint(output)
    began_at = checkpoint.step if checkpoint else 0
    schedule(arguments, config, steps, evaluate=eval_count > 0, fresh=began_at == 0)
    shared: dict[str, Any] = {
        "batch_size": config.batch_size,
        "rank": arguments.process_index,
        "world_size": arguments.world_size,
        "kinds": kinds_read(manifests[0], loss),
        "prepare": second_input,
        **mixture.plan,
    }
    dataset = DistillationDataset(
        store,
        mixture.source,
        seed=config.seed,
        order=config.order,
        ordinals=train_ordinals,
        targets=choice.targets,
        group_by_length=config.group_by_length,
        global_batch=sequences_per_step if config.group_by_length else None,
        **shared,
    )
    evaluation = None
    if eval_count:
        corpus = [dump for dump in mixture.corpus if len(eval_ordinals[dump])]
        held_out = {dump: eval_ordinals[dump] for dump in corpus}
        evaluation = DistillationDataset(store, corpus, ordinals=held_out, shuffle=False, **shared)
    try:
        trainer = RunTrainer(student, arguments, config, dataset, evaluation, steps_per_epoch, checkpoint, recalibrate)
    except (ValueError, RuntimeError, ImportError) as error:  # what `--set` asks for, and the library cannot do here
        raise InputError(first_line(error)) from error
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise InputError("--set fsdp has no effect on CPUs, where accelerate does not shard: leave it out")
    if arguments.process_index == 0:
        tidy_output(output)
        if not (output / RUN_FILE).exists():
            facts = {
                "identity": identity,
                "config": asdict(config),
                "dumps": [
                    {
                        **describe_dump(store, dump, columns_read(store.manifest(dump), config, loss)),
                        "weight": (mixture.shares or {}).get(dump),
                        "snapshot": store.snapshot(dump),
                        "read": asdict(shares[dump]) if dump in shares else None,
                    }
                    for dump in mixture.dumps
                ],
                "several_teachers": mixture.teachers,
                "choice": choice.facts,
                **({"rationale": rationales.facts} if rationales else {}),
                "sequences": {"train": train_count, "eval": eval_count},
                "world_size": arguments.world_size,
                "parameters": student.num_parameters(),
                "trained_parameters": student.num_parameters(only_trainable=True),
                "versions": versions(),
            }
            write_json(output / RUN_FILE, facts)

    tell_padding(dataset, config.group_by_length, reporter=first_reporter)
    first_process = trainer.is_world_process_zero()
    if first_process and began_at:
        reporter.note(f"Resuming {output} from step {began_at:,} of {steps:,}.")
        for dump in newer_dumps(config, store, mixture):
            reporter.note(f"The dump {dump} matches --dump by now, and is left out: the run goes on with those it began with.")
    elif first_process:
        remarks = check_mixture(store, mixture, config, loss)
        remarks += [
            f"Sequences that not all {'teachers' if mixture.teachers else 'dumps'} have are left out: {dump} lacks {count:,}."
            for dump, count in lacking.items()
            if count
        ]
        for sentence in [
            *remarks,
            *choice.lines,
            *(rationales.lines if rationales else ()),
            *reading_lines(mixture, shares, steps, steps_per_epoch),
        ]:
            reporter.note(sentence)
    if began_at < steps:
        title = f"training from step {began_at:,}" if began_at else "training"
        progress = reporter.progress(title, steps - began_at, "steps") if first_process else nullcontext(None)
        with progress as trainer.advance, stop_on_interrupt(trainer, reporter):
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    else:
        assert checkpoint is not None  # stopped between its last step and the saving of the model
        if config.lora_rank is None:
            trainer.model.load_state_dict(load_model(str(checkpoint.folder)).state_dict())
        else:
            trainer._load_from_checkpoint(str(checkpoint.folder))
        trainer.is_fsdp_enabled = False  # of a model that was never wrapped
        trainer.state = TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))

    step = trainer.state.global_step
    finished = step >= steps
    if finished:
        trainer.save_model(str(output))
        if first_process:
            tokenizer.save_pretrained(output)
            if config.lora_rank is not None and generation is not None:
                generation.save_pretrained(output)  # not saved with an adapter
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
        padding=trainer.padding,
    )


def _second_input(
    rationales: RunRationales | None, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, reporter: Reporter
) -> SecondInput | None:
    """What adds the second task to batches (InputError: the student's context is too short for it, or it cannot be marked)."""
    if rationales is None:
        return None
    marker = tuple(tokenizer(MARKER, add_special_tokens=False)["input_ids"])
    if not marker:
        raise InputError(
            f"the student's tokenizer has no token for {MARKER!r}, which marks the second task: leave --rationale out"
        )
    second = SecondInput(tuple(rationales.of_dumps.values()), marker)
    limit = context_length(student)
    if limit is not None and second.longest > limit:
        too_long = (
            f"a context with its rationale takes up to {second.longest:,} tokens, and the student's context has {limit:,}"
        )
        if not continues(student, second.longest - 1):
            raise InputError(
                f"{too_long}: leave long sequences out with --where, or use --eval-fraction 0 where they are held out"
            )
        reporter.note(f"Warning: {too_long}. It computes its positions and goes on beyond.")
    return second


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
    return TrainResult(output, steps, steps, True, steps, history["seconds"], eval_loss, history["padding"])


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
