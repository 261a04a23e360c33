"""What a run trains on of its dumps: the sequences of `--where`, and of these the targets of `--positions-where`.

Sequences that are held out for validation are not asked about: they are all read, with all their targets, so that runs can be
compared. Imports no torch before several processes have to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError, KnowledgeStoreError, QueryError
from knowledge_store.kinds.positions import knows_tokens
from knowledge_store.reading.target_mask import TargetMask
from knowledge_store.reporter import SILENT, Reporter
from student_train.training.configuration import TrainConfig

Made = TypeVar("Made")

WHERE, POSITIONS_WHERE = "--where", "--positions-where"


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        ordinals: the sequences to train on, by dump, ascending.
        targets: which of their targets count, by dump; None for all of them.
        identity: a hash of the chosen ids and one of the chosen targets, as far as they were asked for.
        facts: how many of how many, by option, for the report.
        lines: the same in sentences.
    """

    ordinals: Mapping[str, Any]
    targets: Mapping[str, TargetMask] | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    lines: Sequence[str] = ()


def check_choice(config: TrainConfig, store: KnowledgeStore, dumps: Sequence[str]) -> None:
    """Refuse at once what does not run, whatever it would choose: `choose` asks about all there is.

    Args:
        config: the run's options.
        store: an open store.
        dumps: those whose sequences are read.

    Raises:
        InputError, QueryError: naming the option.
    """
    if config.where is not None:
        with _named(WHERE):
            store.check_choice(config.where, None, dumps)
    if config.positions_where is not None:
        with _named(POSITIONS_WHERE):
            store.check_choice(None, config.positions_where, dumps)


def _unknown_tokens(config: TrainConfig, store: KnowledgeStore, dumps: Sequence[str]) -> Iterator[str]:
    """What a condition on the log-probability of tokens does not meet."""
    manifests = [store.manifest(dump) for dump in dumps]
    unknown = [one.dump for one in manifests if "positions" in one.kinds and not knows_tokens(one)]
    for option, condition in ((WHERE, config.where), (POSITIONS_WHERE, config.positions_where)):
        if unknown and condition is not None and "token_logprob" in condition.lower():
            yield (
                f"Warning: {option} asks for token_logprob, which {unknown[0]} does not know of tokens that are no candidate:"
                " a comparison with it is not met there. The most that it can be is coalesce(token_logprob, tail_logprob)."
            )


def choose(
    config: TrainConfig,
    store: KnowledgeStore,
    dumps: Sequence[str],
    train: Mapping[str, Any],
    *,
    reporter: Reporter = SILENT,
) -> Choice:
    """Choose from the sequences that are not held out.

    Args:
        config: the run's options.
        store: an open store.
        dumps: those whose sequences are read.
        train: of each, the ordinals that are not held out, ascending.
        reporter: hears of the progress.

    Returns:
        the choice, from which sequences without a target that counts are left out.

    Raises:
        InputError, QueryError: naming the option; nothing is left to train on, too.
    """
    if config.where is None and config.positions_where is None:
        return Choice(train)
    ordinals = {dump: np.asarray(train[dump]) for dump in dumps}
    targets: Mapping[str, TargetMask] | None = None
    identity: dict[str, str] = {}
    facts: dict[str, dict[str, int]] = {}
    lines = [*_unknown_tokens(config, store, dumps)]
    if config.where is not None:
        with _named(WHERE):
            sequences = store.choose_sequences(config.where, dumps, reporter=reporter)
            before = _count(ordinals)
            ordinals = {dump: np.intersect1d(ordinals[dump], sequences.ordinals[dump]) for dump in dumps}
            count = _count(ordinals)
            if not count:
                raise InputError(
                    f"all of the {sequences.count:,} sequences that it gives are held out for the validation loss: choose more,"
                    " or use --eval-fraction 0"
                )
        identity["chosen sequences"] = sequences.sha256
        facts["where"] = {"sequences": count, "of": before}
        lines.append(f"{WHERE} chooses {count:,} of {before:,} sequences to train on.")
    if config.positions_where is not None:
        with _named(POSITIONS_WHERE):
            found = store.choose_targets(config.positions_where, dumps, reporter=reporter)
            counts = {dump: found.masks[dump].counts()[ordinals[dump]] for dump in dumps}
            total = sum(int(found.targets[dump][ordinals[dump]].sum()) for dump in dumps)
            before, met = _count(ordinals), sum(int(counts[dump].sum()) for dump in dumps)
            if not met:
                raise InputError(f"none of the {total:,} targets to train on meets it: choose another condition")
        ordinals = {dump: ordinals[dump][counts[dump] > 0] for dump in dumps}
        targets = found.masks
        left_out = before - _count(ordinals)
        identity["chosen targets"] = found.sha256
        facts["positions_where"] = {"targets": met, "of": total, "sequences_left_out": left_out}
        lines.append(f"{POSITIONS_WHERE} chooses {met:,} of {total:,} targets, {met / total:.1%}.")
        if unmet := [dump for dump in dumps if not counts[dump].any()]:
            lines.append(
                f"No target of {', '.join(unmet)} meets it; a column that a dump does not keep is null in all its rows."
            )
        if left_out:
            lines.append(f"{left_out:,} of {before:,} sequences have no target that counts, and are left out.")
    return Choice(ordinals, targets, identity, facts, lines)


def choose_once(process: int, processes: int, make: Callable[[], Made]) -> Made:
    """What the first of a run's processes chooses, for all of them: it may have to read all of a store, which is not done once
    for each. What it raises, all raise.

    Args:
        process: the rank of this one.
        processes: how many there are; several are in torch's group of processes.
        make: makes the choice.
    """
    if processes == 1:
        return make()
    import torch

    outcome: list[Any] = [None]
    if process == 0:
        try:
            outcome = [make()]
        except KnowledgeStoreError as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    [result] = outcome
    if isinstance(result, KnowledgeStoreError):
        raise result
    return cast(Made, result)


def _count(ordinals: Mapping[str, np.ndarray]) -> int:
    return sum(map(len, ordinals.values()))


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Errors of what was given begin with the option that gave it."""
    try:
        yield
    except (InputError, QueryError) as error:
        raise type(error)(f"{option}: {error}") from None
