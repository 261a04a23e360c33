"""The rationales that a run learns from: of which dump, chosen when it begins, and what is told of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.rationales.choice import Of, Rationales, choose_rationales, identity_of
from student_train.rationales.contexts import check_saliency
from student_train.rationales.example import rationale_example
from student_train.training.configuration import TrainConfig
from student_train.training.mixture import Mixture


@dataclass(frozen=True)
class RunRationales:
    """Those of a run.

    Attributes:
        of_dumps: by the dumps whose sequences are read, in their order.
        identity: a hash of them.
        facts: what run.json has of them.
        lines: what is told of them, in sentences.
    """

    of_dumps: Mapping[str, Rationales]
    identity: Mapping[str, str]
    facts: Mapping[str, Any]
    lines: tuple[str, ...]


def check_rationale(config: TrainConfig, store: KnowledgeStore, mixture: Mixture) -> None:
    """Refuse a dump without saliency, where a run needs it.

    Raises:
        InputError: naming the dump.
    """
    if config.rationale_dump is not None:
        store.dump(config.rationale_dump)
        if len(mixture.corpus) > 1:
            raise InputError(
                f"--rationale-dump belongs to one dump, and the run trains on {', '.join(mixture.corpus)}: train on one, or on"
                " dumps that hold their saliency themselves"
            )
    if config.rationale in ("saliency", "masked"):
        for dump in mixture.corpus:
            check_saliency(store, config.rationale_dump or dump)


def check_trainer(weight: float, datasets: Iterable[Any]) -> None:
    """Refuse a share of a second task that is out of range, or of data sets whose batches have no rationales.

    Raises:
        InputError: it is; says what batches need.
    """
    if not 0 <= weight < 1:
        raise InputError(f"rationale_weight is {weight:g}; it must be at least 0 and below 1")
    if any(getattr(dataset, "prepare", None) is None for dataset in datasets):
        raise InputError(
            "rationale_weight belongs to batches with rationales: give train_dataset, and eval_dataset if there is one, as"
            " DistillationDataset(store, …, prepare=SecondInput(…)) with student_train.rationales"
        )


def joined_dumps(config: TrainConfig, mixture: Mixture) -> tuple[str, ...]:
    """The dumps of one corpus of which a sequence must have something in each: those of several teachers, and of saliency."""
    teachers = mixture.dumps if mixture.teachers else mixture.corpus[:1]
    return tuple(dict.fromkeys((*teachers, *((config.rationale_dump,) if config.rationale_dump is not None else ()))))


def choose_for_run(
    config: TrainConfig, store: KnowledgeStore, dumps: Sequence[str], parts: Sequence[Mapping[str, Any]]
) -> RunRationales | None:
    """The rationales of a run; None without any.

    Args:
        config: the run's options.
        store: an open store.
        dumps: those whose sequences are read.
        parts: ordinals to train on and to evaluate on, by dump.

    Raises:
        InputError: a context is too short.
    """
    if config.rationale == "none":
        return None
    of, found = cast(Of, config.rationale), {}
    ordinals = {dump: np.concatenate([np.asarray(part[dump]) for part in parts]) for dump in dumps}
    for dump, read in ordinals.items():
        ids = np.sort(store.sequences(dump, ["sequence_id"])["sequence_id"].to_numpy()[read])
        found[dump] = choose_rationales(
            store, dump, of, config.rationale_tokens, saliency_dump=config.rationale_dump, seed=config.seed, wanted=ids
        )
    count, whole = (sum(lengths) for lengths in (map(_count, found.values()), map(len, ordinals.values())))
    words = {
        "saliency": "the most salient of its context",
        "masked": "the most salient of its context that are not of the answer",
        "random": "any of its context",
    }
    lines = [f"A rationale is {config.rationale_tokens} tokens of a sequence, {words[of]}; {count:,} of {whole:,} have one."]
    first = next(iter(found))
    example = rationale_example(store, config.rationale_dump or first, found[first], shares=of != "random")
    facts = {
        "of": of,
        "tokens": config.rationale_tokens,
        "sequences": count,
        "dump": config.rationale_dump,
        "example": example,
    }
    return RunRationales(found, {"rationales": identity_of(found)}, facts, tuple(lines))


def _count(rationales: Rationales) -> int:
    return len(rationales.sequence_ids)
