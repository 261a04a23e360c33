"""A run's options as `transformers.TrainingArguments`."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import fields
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from knowledge_store.errors import InputError
from knowledge_store.options import advice
from student_train.training.configuration import TrainConfig
from student_train.training.models import first_line
from student_train.training.settings import parse_settings


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """What does not depend on the number of steps. Finds the device and joins the other processes, if any."""
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    settings = typed_settings(config)
    try:
        with warnings.catch_warnings():
            # That a name of `--set` will be another one in a later release is no concern of a run that works.
            warnings.simplefilter("ignore", FutureWarning)
            arguments = TrainingArguments(
                output_dir=config.output,
                per_device_train_batch_size=config.batch_size,
                gradient_accumulation_steps=config.gradient_accumulation,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                # It would log a loss that is not finite as one that is. The trainer looks at the loss itself, once a step.
                logging_nan_inf_filter=False,
                seed=config.seed,
                bf16=bf16,
                max_steps=1,
                report_to=config.report_to,
                disable_tqdm=True,
                remove_unused_columns=False,
                save_strategy="steps",
                save_steps=config.save_steps,
                # The one before the last stays until the last is complete.
                save_total_limit=2,
                dataloader_num_workers=config.workers,
                **{**_defaults(config), **settings},
            )
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
        # These refuse here, before anything is written, what is unknown to them or whose package is missing.
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        _try_scheduler(arguments)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise InputError(first_line(error)) from error
    if arguments.fsdp and "FULL" not in str((arguments.fsdp_config or {}).get("state_dict_type", "FULL_STATE_DICT")):
        raise InputError(
            "--set fsdp_config asks for checkpoints in parts, which are read with pickles, and those can run code: leave its"
            " state_dict_type out, or make it FULL_STATE_DICT"
        )
    # Several GPUs are for torchrun: without it one is used, and a step's batch is what the options say.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def typed_settings(config: TrainConfig) -> dict[str, Any]:
    """The values of `--set`, of the types that the library gives them.

    Raises:
        InputError: the library knows no such setting, or a value is none of its type.
    """
    settings = parse_settings(config.set)
    if not settings:
        return {}
    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in settings:
        if name not in known:
            raise InputError(f"--set {name} is no setting of transformers.TrainingArguments{advice(name, known)}")
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions if action.dest in settings}
    return {name: _typed(parser, actions[name], value) for name, value in settings.items()}


def _typed(parser: HfArgumentParser, action: argparse.Action, value: str) -> Any:
    name = action.dest
    if value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except ValueError as error:
            raise InputError(f"--set {name} is {value!r}, which is not JSON: {error}") from None
    if name.endswith("_kwargs"):
        raise InputError(f"--set {name} is {value!r}; it must be a JSON object")
    if action.choices and value not in action.choices:
        choices = [str(choice) for choice in action.choices]
        remedy = advice(value, choices) or f": choose one of {', '.join(choices)}"
        raise InputError(f"--set {name} cannot be {value!r}{remedy}")
    if action.const is True and value.lower() == "true":
        return True
    try:
        return getattr(parser.parse_args([f"--{name}={value}"]), name)
    except (argparse.ArgumentError, TypeError) as error:
        raise InputError(f"--set {name} is {value!r}: {first_line(error).partition(': ')[2] or error}") from None


def _defaults(config: TrainConfig) -> dict[str, Any]:
    """What `--set` may change."""
    return {
        "lr_scheduler_type": config.schedule if config.schedule != "constant" else "constant_with_warmup",
        # Only with this setting does the library join processes that share a CPU.
        "use_cpu": not torch.accelerator.is_available(),
        "log_level": "error",
        "dataloader_persistent_workers": config.workers > 0,
        # Every parameter of a causal language model takes part in every step.
        "ddp_find_unused_parameters": False,
    }


def _try_scheduler(arguments: TrainingArguments) -> None:
    """Refuse a scheduler's settings that do not fit it, with an optimizer of one number."""
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
        num_warmup_steps=1,
        num_training_steps=100,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


def schedule(arguments: TrainingArguments, config: TrainConfig, steps: int, *, evaluate: bool, fresh: bool) -> None:
    """Fill in what depends on the number of steps."""
    arguments.max_steps = steps
    arguments.warmup_steps = round(config.warmup * steps)
    if "logging_steps" not in parse_settings(config.set):
        arguments.logging_steps = max(1, steps // 200)
    if evaluate:
        arguments.eval_strategy = IntervalStrategy.STEPS
        arguments.eval_steps = max(1, steps // config.evaluations)
        arguments.eval_on_start = fresh
