"""`--set NAME=VALUE`: what a run passes on to `transformers.TrainingArguments` as it is. Imports no torch.

Here stands what a run decides itself, and why, and which settings change no result: those may be others when it is resumed. How
a value is read is the library's business (`arguments`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError

# Settings that have an option of their own.
_OPTIONS = {
    "output_dir": "--output",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "learning_rate": "--learning-rate",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "weight_decay": "--weight-decay",
    "max_grad_norm": "--max-grad-norm",
    "label_smoothing_factor": "--loss label-smoothing",
    "seed": "--seed",
    "data_seed": "--seed",
    "bf16": "--precision",
    "fp16": "--precision",
    "bf16_full_eval": "--precision",
    "fp16_full_eval": "--precision",
    "eval_strategy": "--evaluations",
    "eval_steps": "--evaluations",
    "eval_delay": "--evaluations",
    "eval_on_start": "--evaluations",
    "save_strategy": "--save-steps",
    "save_steps": "--save-steps",
    "report_to": "--report-to",
    "dataloader_num_workers": "--workers",
    "dataloader_persistent_workers": "--workers",
    "train_sampling_strategy": "--group-by-length",
    "group_by_length": "--group-by-length",
    "length_column_name": "--group-by-length",
}

_PACKING = (
    "documents are not packed: in a packed row they would have to be hidden from each other, which few models can do;"
    " --group-by-length keeps padding small (TRAINERS.md, `Padding`)"
)
_OWN_BATCHES = "the store's order says what a batch holds"
_OWN_EVALUATION = "a run measures its held-out documents itself"
_OWN_CHECKPOINTS = "a run keeps the checkpoints that it can resume from, and no others"
_OWN_DISPLAY = "a run shows its progress itself"

# Settings that a run decides, or has no use for.
_REASONS = {
    **dict.fromkeys(("packing", "padding_free", "packing_strategy", "eval_packing"), _PACKING),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_in_order"), _OWN_BATCHES),
    **dict.fromkeys(("remove_unused_columns", "label_names", "auto_find_batch_size", "ignore_data_skip"), _OWN_BATCHES),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"), _OWN_EVALUATION),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), _OWN_EVALUATION),
    **dict.fromkeys(("save_total_limit", "save_only_model", "enable_jit_checkpoint"), _OWN_CHECKPOINTS),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _OWN_CHECKPOINTS),
    **dict.fromkeys(("resume_from_checkpoint", "restore_callback_states_from_checkpoint"), "the same command resumes a run"),
    **dict.fromkeys(("disable_tqdm", "logging_strategy", "include_num_input_tokens_seen"), _OWN_DISPLAY),
    "logging_nan_inf_filter": "a run ends at the first loss that is no finite number",
    "average_tokens_across_devices": "a step's loss is always the mean over the targets of all processes",
    "use_cache": "training keeps no cache of keys and values",
    "parallelism_config": "each process reads sequences of its own",
    "local_rank": "torchrun says which process is which",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "`run` trains, and `evaluate` evaluates"),
}

# What changes no result. Recomputing activations costs time and saves memory, and a run that has too little may be resumed so.
_FREE = (
    *("logging_", "log_", "run_name", "project", "trackio_", "push_to_hub", "hub_", "debug", "skip_memory_metrics"),
    *("dataloader_", "ddp_timeout", "save_on_each_node", "torch_empty_cache_steps", "gradient_checkpointing"),
    "activation_checkpointing",
)

# Settings whose value may be the name of a JSON file.
_FILES = ("fsdp_config", "deepspeed", "accelerator_config")

# Settings that need a package of their own, where the library would find that out too late.
_PACKAGES = {"deepspeed": "deepspeed", "use_liger_kernel": "liger-kernel"}


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """The settings that words of the form NAME=VALUE give, as text.

    Raises:
        InputError: a word has another form, a name is given twice or is one that the run decides, or a file is missing.
    """
    settings: dict[str, str] = {}
    for word in words:
        written, equals, value = word.partition("=")
        name = written.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(f"--set is {word!r}; it must be NAME=VALUE, such as optim=adafactor")
        if name in _OPTIONS:
            raise InputError(f"--set {name} is what the option {_OPTIONS[name]} says: use that")
        if name in _REASONS:
            raise InputError(f"--set {name} cannot be used: {_REASONS[name]}")
        if name in settings:
            raise InputError(f"--set {name} is given twice")
        if name in _FILES and not value.lstrip().startswith("{") and not Path(value).is_file():
            raise InputError(f"--set {name} names the file {value}, which does not exist")
        if name in _PACKAGES and find_spec(_PACKAGES[name].replace("-", "_")) is None:
            raise InputError(f"--set {name} needs a package that is not installed: pip install {_PACKAGES[name]}")
        settings[name] = value
    return settings


def settings_identity(words: Sequence[str]) -> dict[str, Any]:
    """What of the settings belongs to a run's identity: those that may change its result, by name."""
    return {name: _identity(value) for name, value in sorted(parse_settings(words).items()) if not name.startswith(_FREE)}


def _identity(value: str) -> Any:
    """The same for every way to write a value; of a file, its contents."""
    try:
        return json.loads(value)
    except ValueError:
        is_file = value.endswith(".json") and Path(value).is_file()
        return f"SHA-256 {hashlib.sha256(Path(value).read_bytes()).hexdigest()}" if is_file else value
