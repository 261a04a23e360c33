"""What `student-train run` and `student-train init` are asked to do: one field for each option. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from knowledge_store.configuration import GgufOptions, StoreOptions
from knowledge_store.errors import InputError
from knowledge_store.options import check_options, option
from knowledge_store.reading.cache import CACHE_SIZE
from knowledge_store.reading.plan import ORDERS
from student_train.configuration import BatchOptions
from student_train.losses.table import LOSSES, TAILS, Loss
from student_train.training.model_folder import check_adaptable, check_peft
from student_train.training.settings import parse_settings

HIDDEN_LOSSES = ("mse", "cosine")
RATIONALES = ("none", "saliency", "random", "masked")

# What transformers can report to.
TRACKERS = (
    *("none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow"),
    *("neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)


@dataclass(frozen=True)
class HiddenStates:
    """How a student is to have the teacher's hidden states.

    Attributes:
        weight: share in the loss, from 0 to 1.
        loss: one of HIDDEN_LOSSES; see `losses.hidden`.
        layers: of the student, one for each of the dump's; None for those of the same numbers.
        projector: whether linear maps from the student's states to the teacher's are learnt.

    Raises (on construction):
        InputError: the weight is out of range, or there is no such loss.
    """

    weight: float
    loss: str = HIDDEN_LOSSES[0]
    layers: tuple[int, ...] | None = None
    projector: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"the weight of hidden states is {self.weight:g}; it must be at least 0 and at most 1")
        if self.loss not in HIDDEN_LOSSES:
            raise InputError(f"there is no loss {self.loss!r} of hidden states: choose one of {', '.join(HIDDEN_LOSSES)}")


@dataclass(frozen=True)
class InitialiseConfig(GgufOptions):
    """A student that keeps some layers of a model; each field is an option of `student-train init`."""

    source: str = option(flag="--from", help="Folder or hub id of the model to copy.")
    keep_layers: str = option(help="Numbers of the layers to keep, counted from 0 and separated by commas: 0,6,12.")
    output: str = option(metavar="<path>", help="Folder of the new model.")


@dataclass(frozen=True)
class TrainConfig(BatchOptions, GgufOptions, StoreOptions):
    """A training run; each field is an option of `student-train run`. In Python, `dump` may be one name as it is."""

    PANELS: ClassVar[Mapping[str, Sequence[str]]] = {
        "What to learn from": ("dump", "teachers", "where", "positions_where", "eval_fraction", "evaluations"),
        "Loss": ("loss", "ce_weight", "temperature", "tail", "calibration", "beta", "skew", "smoothing", "first_c"),
        "Preferences": ("reference", "scores"),
        "Rationales": ("rationale", "rationale_weight", "rationale_tokens", "rationale_dump"),
        "Hidden states": ("hidden_weight", "hidden_loss", "hidden_layers", "hidden_projector"),
        "Steps": ("epochs", "steps", "batch_size", "gradient_accumulation", "group_by_length", "order", "seed"),
        "Optimisation": (
            *("learning_rate", "warmup", "schedule", "weight_decay", "max_grad_norm", "precision", "lora_rank", "set"),
        ),
        "Folder, reading and reports": ("save_steps", "keep_eos", "workers", "cache_size", "token_file", "report_to"),
    }

    student: str = option(help="Folder or hub id of the model to train.")
    output: str = option(metavar="<path>", help="Folder of the run, which becomes the trained model.")
    _: KW_ONLY
    dump: tuple[str, ...] = option(
        (),
        metavar="NAME[=WEIGHT]",
        names_dump=True,
        help="Dump to train on, maybe with its share of an epoch as a weight. It may be given several times, be a pattern such"
        " as 'news-*', and be left out when the store has only one.",
    )
    teachers: str | None = option(
        None,
        metavar="NAME=WEIGHT,...",
        help="Dumps of several teachers of one corpus, to learn from the weighted sum of the teachers, instead of --dump.",
    )
    where: str | None = option(
        None,
        metavar="SELECT",
        help="SELECT statement that gives dump and sequence_id of the sequences to train on.",
    )
    positions_where: str | None = option(
        None,
        metavar="CONDITION",
        help="Condition in SQL on the columns of positions and candidates: of the targets, only those that meet it count.",
    )
    loss: str = option("forward-kl", metavar="LOSS", help=f"The loss to minimise: {', '.join(LOSSES)}.")
    ce_weight: float = option(0.0, min=0, max=1, help="Share of cross-entropy in the loss, from 0 to 1.")
    rationale: str = option(
        "none",
        choices=RATIONALES,
        help="A second task: to write the tokens of the context that decided the answer. saliency takes those that the dump's"
        " saliency ranks first; random any, and masked the first that are not of the answer, are for comparison.",
    )
    rationale_weight: float = option(0.2, min=0, below=1, help="Share of the second task in the loss, from 0 to below 1.")
    rationale_tokens: int = option(5, min=1, help="Tokens of a rationale.")
    rationale_dump: str | None = option(
        None, names_dump=True, help="Dump of the same corpus that holds the saliency, where the dump to train on does not."
    )
    hidden_weight: float = option(
        0.0, min=0, max=1, help="Share of a loss on hidden states in the loss, from 0 to 1. The dump must hold some."
    )
    hidden_loss: str = option(
        HIDDEN_LOSSES[0], choices=HIDDEN_LOSSES, help="What sets the student's hidden states apart from the teacher's."
    )
    hidden_layers: str | None = option(
        None,
        metavar="LAYER,...",
        help="Layers of the student, one for each of the dump's: 0 are the embeddings, 1 the first, -1 the last. They are those"
        " of the same numbers without it.",
    )
    hidden_projector: bool = option(
        False,
        help="Learn a linear map from the student's states to the teacher's, saved beside the student. Other widths need one.",
    )
    temperature: float = option(1.0, above=0, help="Temperature of the divergences and of top-k-renormalised.")
    first_c: float = option(0.28, above=0, max=1, help="Scale of the probabilities in the loss first, at most 1.")
    tail: str = option(
        "auto",
        choices=TAILS,
        help="How forward-kl treats the tail: draws, bucket, or auto, which takes draws where the dump has them.",
    )
    beta: float | None = option(
        None,
        above=0,
        help="Of jensen-shannon the teacher's share in the mixture, between 0 and 1; it is 0.5 unless given. Of dpo how"
        " strongly the student is held to the reference; it is 0.1 unless given.",
    )
    reference: str | None = option(
        None,
        names_dump=True,
        metavar="DUMP",
        help="Dump of the same corpus by the student that the run begins with: what dpo holds it to.",
    )
    scores: str | None = option(
        None,
        names_dump=True,
        metavar="DUMP",
        help="Dump of the same corpus whose teacher scores the answers of dpo, rrhf and pro, by the mean of its log-probability"
        " over an answer's tokens. Without it the scores are the corpus's own.",
    )
    skew: float = option(0.1, above=0, below=1, help="Share mixed into the reference of the skewed losses, between 0 and 1.")
    smoothing: float = option(0.1, min=0, below=1, help="Probability that label-smoothing takes off the likeliest candidate.")
    calibration: str | None = option(
        None,
        metavar="<path>",
        help="File of a calibration that re-calibrates the teacher's targets. The tail is treated as a bucket then.",
    )
    epochs: float | None = option(None, above=0, help="Passes over the training sequences. It is 1 unless --steps is given.")
    steps: int | None = option(None, min=1, help="Number of optimiser steps, instead of --epochs.")
    gradient_accumulation: int = option(1, min=1, help="Forward passes in one optimiser step.")
    group_by_length: int | None = option(
        None,
        min=1,
        metavar="N",
        help="Sort so many sequences of the order by length at a time, so that batches have less padding: as many as an"
        " optimiser step has leave each step its sequences. They are not sorted without it.",
    )
    learning_rate: float = option(3e-4, above=0, help="Highest learning rate.")
    warmup: float = option(0.05, min=0, below=1, help="Share of the steps during which the learning rate rises.")
    schedule: str = option(
        "cosine",
        choices=("cosine", "linear", "constant"),
        help="How the learning rate falls after the warm-up: cosine, linear, or constant, which means not at all.",
    )
    weight_decay: float = option(0.01, min=0, help="AdamW weight decay. It is not applied to biases and norms.")
    max_grad_norm: float = option(1.0, min=0, help="Norm that gradients are clipped to. 0 means no clipping.")
    seed: int = option(0, help="Seed of the order of sequences, and of anything random in the student.")
    order: str = option(
        "global",
        choices=ORDERS,
        help="global has any sequence after any other. blocks shuffles row groups, and sequences within windows of them: it"
        " needs no cache, for stores that are larger than a disk.",
    )
    eval_fraction: float = option(
        0.02, min=0, below=1, help="Share of the documents that is kept out of training, for the validation loss."
    )
    evaluations: int = option(10, min=1, help="Number of evaluations on them during the run, after one before the first step.")
    precision: str = option(
        "auto",
        choices=("auto", "fp32", "bf16", "bf16-weights"),
        help="fp32, bf16 (mixed precision: the weights are fp32), bf16-weights (weights, gradients and the optimizer's moments"
        " are bf16 too), or auto, which takes bf16 on a GPU that supports it.",
    )
    lora_rank: int | None = option(
        None, min=1, help="Train a LoRA adapter of this rank, and not the student itself. The adapter is what is saved."
    )
    save_steps: int = option(200, min=1, help="Number of optimiser steps between checkpoints.")
    workers: int = option(0, min=0, help="Number of processes that read batches ahead. 0 reads them in the training process.")
    cache_size: float = option(
        CACHE_SIZE / 1e9,
        min=0,
        max=1_000_000,
        help="Disk space in GB for decoded sequences in the user's cache folder, which is safe to delete. 0 means no cache.",
    )
    token_file: str | None = option(
        None,
        metavar="<path>",
        help="File of the token for a served store; without it, KNOWLEDGE_STORE_TOKEN has the token.",
    )
    keep_eos: bool = option(
        False,
        help="Leave the student's generation settings and tokenizer as they are where the dump's targets end with another token"
        " than those they stop at.",
    )
    report_to: str = option(
        "none",
        choices=TRACKERS,
        metavar="TRACKER",
        help="Experiment tracker that transformers reports to, such as tensorboard or wandb.",
    )

    set: tuple[str, ...] = option(
        (),
        metavar="NAME=VALUE",
        help="A setting of the TrainingArguments of transformers, such as optim=adafactor; JSON for dictionaries and lists. May"
        " be repeated.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.dump, str):
            object.__setattr__(self, "dump", (self.dump,))

    def hidden_states(self) -> HiddenStates | None:
        """How the student is to have the teacher's hidden states, if it is (InputError: the layers are no numbers)."""
        if not self.hidden_weight:
            return None
        layers = None if self.hidden_layers is None else parse_layers("--hidden-layers", self.hidden_layers)
        return HiddenStates(self.hidden_weight, self.hidden_loss, layers, self.hidden_projector)

    def loss_options(self) -> dict[str, float | str]:
        """Keyword arguments for the chosen loss."""
        given = {name: getattr(self, _FIELDS[name]) for name in LOSSES[self.loss].options if name in _FIELDS}
        return {name: value for name, value in given.items() if value is not None}


HIDDEN_OPTIONS = ("hidden_loss", "hidden_layers", "hidden_projector")
PREFERENCE_OPTIONS = ("reference", "scores")
RATIONALE_OPTIONS = ("rationale_weight", "rationale_tokens", "rationale_dump")

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
    """The chosen loss, once every value is in range and the options fit each other.

    Raises:
        InputError: naming the option and what it may be.
    """
    if config.loss not in LOSSES:
        raise InputError(f"there is no loss {config.loss!r}: choose one of {', '.join(LOSSES)}")
    check_options(config)
    loss = LOSSES[config.loss]
    for name, field in _FIELDS.items():
        if name not in loss.options and getattr(config, field) != getattr(TrainConfig, field):
            raise InputError(f"the loss {config.loss} takes no --{field.replace('_', '-')}")
    if config.loss == "jensen-shannon" and (config.beta or 0) >= 1:
        raise InputError(f"--beta is {config.beta:g}; of jensen-shannon it must be below 1")
    _check_groups(config, loss)
    if "lr_scheduler_type" in parse_settings(config.set) and config.schedule != TrainConfig.schedule:
        raise InputError("give --schedule or --set lr_scheduler_type, not both")
    if config.lora_rank is not None:
        check_peft("--lora-rank")
        if config.gguf_file:
            raise InputError("--lora-rank needs a student in safetensors files, which an adapter can name as its base")
        check_adaptable(config.student)
    if config.rationale == "none":
        given = [name for name in RATIONALE_OPTIONS if getattr(config, name) != getattr(TrainConfig, name)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} says what --rationale learns: choose one with --rationale too")
    elif config.positions_where is not None:
        raise InputError(
            "--rationale takes the context from all targets, so it does not go with --positions-where: leave one out"
        )
    if not config.hidden_weight:
        given = [name for name in HIDDEN_OPTIONS if getattr(config, name) != getattr(TrainConfig, name)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} has no effect without --hidden-weight: give one above 0 too")
    elif config.positions_where is not None:
        raise InputError("--hidden-weight takes all states that the dump keeps, so it does not go with --positions-where")
    elif loss.hidden_states or "input_ids" not in loss.inputs:
        raise InputError(f"the loss {config.loss} does not go with --hidden-weight: choose one of the text's tokens")
    config.hidden_states()
    if loss.hidden_states and config.positions_where is not None:
        raise InputError(
            f"the loss {config.loss} compares means over all targets, so it does not go with --positions-where: leave one out"
        )
    if config.rationale == "random" and config.rationale_dump is not None:
        raise InputError("--rationale random reads no saliency: leave --rationale-dump out")
    if config.rationale != "none" and "input_ids" not in loss.inputs:
        raise InputError(f"the loss {config.loss} does not run the student on the text, so it takes no --rationale")
    if config.epochs is not None and config.steps is not None:
        raise InputError("give --epochs or --steps, not both")
    if config.tail == "draws" and config.temperature != 1:
        raise InputError("--tail draws works at --temperature 1 only, which the tokens were drawn at")
    if config.ce_weight and "input_ids" not in loss.inputs:
        raise InputError(f"the loss {config.loss} does not run the student on the text, so it takes no --ce-weight")
    return loss


def _check_groups(config: TrainConfig, loss: Loss) -> None:
    """Raises InputError where options do not go with a loss of groups, or with a loss of none."""
    if loss.unit != "group":
        given = [name for name in PREFERENCE_OPTIONS if getattr(config, name) is not None]
        if given:
            names = ", ".join(name for name, entry in LOSSES.items() if entry.unit == "group")
            raise InputError(f"the loss {config.loss} takes no --{given[0]}: losses of preferences do ({names})")
        return
    if not loss.reference and config.reference is not None:
        raise InputError(f"the loss {config.loss} takes no --reference: it holds the student to none")
    reasons = {
        "ce_weight": "which would be of the text of all answers, the worse ones too",
        "teachers": "since it learns from scores, and not from teachers' distributions: use --dump, and --scores",
        "positions_where": "since it is of whole answers",
        "hidden_weight": "since its steps are means over groups",
    }
    for name, reason in reasons.items():
        if getattr(config, name) != getattr(TrainConfig, name):
            raise InputError(f"the loss {config.loss} takes no --{name.replace('_', '-')}, {reason}")
    if config.rationale != "none":
        raise InputError(f"the loss {config.loss} takes no --rationale, since its steps are means over groups")


def check_loss(
    loss: str, ce_weight: float, options: Mapping[str, float | str], **dumps: str | None
) -> tuple[TrainConfig, Loss]:
    """A loss, its share of cross-entropy, keyword arguments of its function, and `reference` and `scores`, as a run's options,
    and its entry in `LOSSES`.

    Raises:
        InputError: there is no such loss, it has no such argument, or a value is out of range.
    """
    known = LOSSES[loss].options if loss in LOSSES else tuple(_FIELDS)
    for name in options:
        if name not in known:
            raise InputError(f"the loss {loss} takes no {name!r}: it takes {', '.join(known) or 'no options'}")
    fields = {_FIELDS[name]: value for name, value in options.items() if name in _FIELDS}
    config = TrainConfig("", "", "", loss=loss, ce_weight=ce_weight, **fields, **dumps)  # type: ignore[arg-type]
    return config, check_config(config)


def parse_layers(option: str, layers: str) -> tuple[int, ...]:
    """The numbers in an option that names layers (InputError: it is something else)."""
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError:
        raise InputError(f"{option} is {layers!r}; it must be numbers separated by commas, such as 0,6,12") from None
