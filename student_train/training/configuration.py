"""What a training run is asked to do: one field for each option of `student-train run`, and whether a dump can serve it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from knowledge_store.reading.cache import CACHE_SIZE
from student_train.losses.divergences import LOSSES, TAILS, Loss


@dataclass(frozen=True)
class TrainConfig:
    """A training run; each field is an option of `student-train run`.

    Attributes:
        store: folder of the store.
        student: folder or hub id of the model to train.
        output: folder of the run.
        dump: which dump; may be left out when the store has one.
        loss: a name in `LOSSES`.
        ce_weight: share of cross-entropy in the mix, in [0, 1].
        temperature: of the losses that take one.
        first_c: scale of probabilities of the loss `first`, in (0, 1].
        tail: what the loss forward-kl does outside the candidates: draws, bucket, or auto (see `forward_kl`).
        beta: the teacher's share in the mixture of the loss jensen-shannon, between 0 and 1.
        skew: share of the other side in the mixture of the skewed losses, between 0 and 1.
        smoothing: what the likeliest candidate gives up in the loss label-smoothing, at least 0 and below 1.
        calibration: file that re-calibrates the teacher's targets (of `teacher-dump calibrate` or `student-train calibrate`).
        epochs: passes over the training sequences; 1 when neither this nor `steps` is given.
        steps: optimiser steps, instead of epochs.
        batch_size: sequences in one forward pass of one process.
        gradient_accumulation: forward passes in one optimiser step.
        learning_rate: at its highest.
        warmup: share of the steps during which the learning rate rises.
        schedule: how it falls afterwards: cosine, linear or constant.
        weight_decay: of AdamW, not applied to biases and norms.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        seed: of the order of sequences, and of anything random in the student.
        eval_fraction: share of the documents kept out of training to follow the loss on, in [0, 1).
        evaluations: how many times in the run to evaluate on them, besides before the first step.
        precision: auto, fp32 or bf16 (mixed); auto is bf16 on a GPU that has it, else fp32.
        save_steps: optimiser steps between checkpoints.
        workers: processes that read batches ahead; 0 reads them in turn with training.
        cache_size: the most disk, GB, that decoded sequences of all stores may take in the user's cache folder; 0 for none.
        report_to: an experiment tracker of transformers, such as tensorboard or wandb; none for none.
        gguf_file: name of a GGUF file in the student's folder.
    """

    store: str
    student: str
    output: str
    dump: str | None = None
    loss: str = "forward-kl"
    ce_weight: float = 0.0
    temperature: float = 1.0
    first_c: float = 0.28
    tail: str = "auto"
    beta: float = 0.5
    skew: float = 0.1
    smoothing: float = 0.1
    calibration: str | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 3e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_fraction: float = 0.02
    evaluations: int = 10
    precision: str = "auto"
    save_steps: int = 200
    workers: int = 0
    cache_size: float = CACHE_SIZE / 1e9
    report_to: str = "none"
    gguf_file: str | None = None

    def loss_options(self) -> dict[str, float | str]:
        """Keyword arguments for the chosen loss."""
        return {name: getattr(self, _FIELDS[name]) for name in LOSSES[self.loss].options if name in _FIELDS}


# Which field holds each keyword argument of a loss.
_FIELDS = {
    "temperature": "temperature",
    "c": "first_c",
    "tail": "tail",
    "beta": "beta",
    "skew": "skew",
    "smoothing": "smoothing",
}


def check_config(config: TrainConfig) -> Loss:
    """The chosen loss, once every value is in range.

    Raises:
        InputError: naming the option and what it may be.
    """
    if config.loss not in LOSSES:
        raise InputError(f"there is no loss {config.loss!r}: choose one of {', '.join(LOSSES)}")
    loss = LOSSES[config.loss]
    demands = [
        (0 <= config.ce_weight <= 1, "--ce-weight must be between 0 and 1"),
        (config.temperature > 0, "--temperature must be above 0"),
        (0 < config.first_c <= 1, "--first-c must be above 0 and at most 1"),
        (config.tail in TAILS, f"--tail must be {', '.join(TAILS[:-1])} or {TAILS[-1]}"),
        (0 < config.beta < 1, "--beta must be above 0 and below 1"),
        (0 < config.skew < 1, "--skew must be above 0 and below 1"),
        (0 <= config.smoothing < 1, "--smoothing must be at least 0 and below 1"),
        (config.epochs is None or config.epochs > 0, "--epochs must be above 0"),
        (config.steps is None or config.steps > 0, "--steps must be at least 1"),
        (config.epochs is None or config.steps is None, "give --epochs or --steps, not both"),
        (config.batch_size > 0, "--batch-size must be at least 1"),
        (config.gradient_accumulation > 0, "--gradient-accumulation must be at least 1"),
        (config.learning_rate > 0, "--learning-rate must be above 0"),
        (0 <= config.warmup < 1, "--warmup is a share of the steps: at least 0 and below 1"),
        (config.schedule in ("cosine", "linear", "constant"), "--schedule must be cosine, linear or constant"),
        (config.weight_decay >= 0, "--weight-decay must be at least 0"),
        (config.max_grad_norm >= 0, "--max-grad-norm must be at least 0"),
        (0 <= config.eval_fraction < 1, "--eval-fraction must be at least 0 and below 1"),
        (config.evaluations > 0, "--evaluations must be at least 1"),
        (config.precision in ("auto", "fp32", "bf16"), "--precision must be auto, fp32 or bf16"),
        (config.save_steps > 0, "--save-steps must be at least 1"),
        (config.workers >= 0, "--workers must be at least 0"),
        (0 <= config.cache_size < math.inf, "--cache-size must be at least 0"),
        *(
            (
                getattr(config, field) == getattr(TrainConfig, field) or name in loss.options,
                f"the loss {config.loss} takes no --{field.replace('_', '-')}",
            )
            for name, field in _FIELDS.items()
        ),
        (
            config.tail != "draws" or config.temperature == 1,
            "--tail draws serves --temperature 1 alone, which the tokens were drawn at",
        ),
    ]
    for met, demand in demands:
        if not met:
            raise InputError(demand)
    return loss


_KNOWLEDGE = frozenset(
    ("token_logprob", "candidate_ids", "candidate_logprobs", "tail_logprob", "tail_ids", "tail_counts", "tail_logsumexp")
)


def unused_columns(config: TrainConfig, loss: Loss) -> frozenset[str]:
    """Columns of the table `positions` that a run has no use for; none are known of a loss of whole batches."""
    if loss.whole_batch:
        return frozenset()
    used = set(loss.columns)
    tempered = config.calibration is not None and config.loss != "first"
    if tempered:
        used.add("tail_logsumexp")
    elif loss.takes_draws and config.tail != "bucket" and config.temperature == 1:
        used |= {"tail_ids", "tail_counts"}
    return _KNOWLEDGE - used


def check_knowledge(store: KnowledgeStore, dump: str, config: TrainConfig, loss: Loss) -> None:
    """Refuse a dump that does not hold what a loss needs.

    Raises:
        InputError: naming the kinds or columns that are missing, or that there are no draws or no candidates.
    """
    name, manifest = config.loss, store.manifest(dump)
    kinds = manifest.kinds
    missing = [kind for kind in loss.kinds if kind not in kinds]
    if missing:
        raise InputError(f"the loss {name} needs the kind {missing[0]!r}, and the dump {dump} holds {', '.join(kinds)}")
    columns = next(iter(store.batches(dump, batch_size=1, shuffle=False)))
    missing = [column for column in loss.columns if column not in columns]
    if missing:
        raise InputError(f"the loss {name} needs {', '.join(missing)}, which the dump {dump} does not hold")
    if "positions" not in loss.kinds:
        return
    rule = positions_of(manifest).selection
    if config.tail == "draws" and not rule.draws:
        raise InputError(f"--tail draws: the dump {dump} keeps no draws from the tail ({rule}); use --tail bucket")
    if rule.candidates or "candidate_ids" not in loss.columns:
        return
    nothing = f"the dump {dump} has no candidates, only draws ({rule})"
    if not loss.takes_draws:
        usable = [each for each, entry in LOSSES.items() if entry.takes_draws or not entry.columns]
        raise InputError(f"{nothing}: the loss {name} cannot use it; choose {' or '.join(usable)}")
    if config.tail == "bucket":
        raise InputError(f"{nothing}: --tail bucket has nothing to learn from it; use --tail draws")
    if config.temperature != 1:
        raise InputError(f"{nothing}: draws serve --temperature 1 alone")
