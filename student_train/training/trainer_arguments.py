"""What cannot be asked of a trainer that learns from a store: refused, in one line, before anything is trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from knowledge_store.errors import InputError


def check_arguments(arguments: TrainingArguments, named: dict[str, Any], *, from_store: bool) -> None:
    """Refuse what would be left unheard, or would make another loss of it.

    Args:
        arguments: of the trainer, TRL's too.
        named: what else the trainer was given, by name.
        from_store: whether the rows are the store's, in its order, and not people's own.

    Raises:
        InputError: naming the argument, and what to do instead.
    """
    refused = {
        "compute_loss_func": (named.get("compute_loss_func"), "the loss is chosen by `loss`, from LOSSES"),
        "label_smoothing_factor": (arguments.label_smoothing_factor, 'choose loss="label-smoothing"'),
        "packing": (_of(arguments, "packing"), "sequences are read one to a row, as the teacher saw them"),
        "eval_packing": (_of(arguments, "eval_packing"), "sequences are read one to a row, as the teacher saw them"),
        "padding_free": (_of(arguments, "padding_free"), "sequences are read one to a row, as the teacher saw them"),
        "loss_type": (_of(arguments, "loss_type") == "dft", "the loss is chosen by `loss`, from LOSSES"),
        "average_tokens_across_devices=False": (
            arguments.world_size > 1 and not arguments.average_tokens_across_devices,
            "a step's loss is the mean over the targets of all processes",
        ),
        "several GPUs in one process": (arguments.n_gpu > 1, "start one process a GPU, with torchrun or accelerate launch"),
    }
    if from_store:
        accelerator, strategy = arguments.accelerator_config, arguments.train_sampling_strategy
        refused |= {
            "dataloader_drop_last": (arguments.dataloader_drop_last, "an epoch of the store has every sequence once"),
            "dataloader_in_order=False": (not arguments.dataloader_in_order, "the store's order is what a resume goes on with"),
            f"train_sampling_strategy={strategy!r}": (
                strategy not in ("random", "sequential"),
                "the store decides the order, shuffled (random) or as it is stored (sequential); group_by_length=N of the"
                " trainer itself sorts by length",
            ),
            "split_batches": (accelerator.split_batches, "each process reads batches of its own"),
            "completion_only_loss=False": (
                _of(arguments, "completion_only_loss") is False,
                "the dump says which tokens are targets",
            ),
            "assistant_only_loss": (_of(arguments, "assistant_only_loss"), "the dump says which tokens are targets"),
        }
    for name, (given, reason) in refused.items():
        if given:
            raise InputError(f"{name} does not go with learning from a store: {reason}")


def _of(arguments: TrainingArguments, name: str) -> Any:
    """An argument that only TRL knows."""
    return getattr(arguments, name, None)
