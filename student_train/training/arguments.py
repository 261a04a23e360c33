"""A run's options as `transformers.TrainingArguments`."""

from __future__ import annotations

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from knowledge_store.errors import InputError
from student_train.training.configuration import TrainConfig


def training_arguments(config: TrainConfig) -> TrainingArguments:
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
            # It would log a loss that is not finite as one that is. The trainer looks at the loss itself, once a step.
            logging_nan_inf_filter=False,
            lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
            seed=config.seed,
            bf16=bf16,
            # Only with this option does the library join processes that share a CPU.
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


def schedule(arguments: TrainingArguments, config: TrainConfig, steps: int, *, evaluate: bool, fresh: bool) -> None:
    """Fill in what depends on the number of steps."""
    arguments.max_steps = steps
    arguments.warmup_steps = round(config.warmup * steps)
    arguments.logging_steps = max(1, steps // 200)
    if evaluate:
        arguments.eval_strategy = IntervalStrategy.STEPS
        arguments.eval_steps = max(1, steps // config.evaluations)
        arguments.eval_on_start = fresh
