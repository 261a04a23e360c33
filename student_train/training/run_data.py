"""What a run reads: which sequences of its dumps, in how many steps, and the data sets of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import TrainingArguments

from knowledge_store import KnowledgeStore
from knowledge_store.kinds import Arrays
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.table import TEXT, Loss
from student_train.rationales.second_input import SecondInput
from student_train.training.choice import Choice, choose, choose_once
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.dump_facts import DumpShare, describe_dump, dump_shares, reading_lines
from student_train.training.knowledge import check_mixture, columns_read, kinds_read
from student_train.training.mixture import Mixture
from student_train.training.preferences import RunPreferences, preferences_for_run
from student_train.training.rationale import RunRationales, choose_for_run, joined_dumps
from student_train.training.split import split_dumps

PADDING = 0.1  # a share of it above which the run says what makes it less


@dataclass(frozen=True)
class RunData:
    """What one process of a run reads.

    Attributes:
        config: the run's options.
        store, mixture: its dumps.
        loss: what it learns.
        choice: what it trains on.
        held_out: the ordinals that are read for validation, by dump, ascending int64.
        lacking: of dumps that are joined, how many sequences each lacks, which are left out.
        rationales: of the sequences, for a second task; None without one.
        preferences: between the sequences of a group; None for a loss of no groups.
        rank, world_size: which process it is, of how many.
    """

    config: TrainConfig
    store: KnowledgeStore
    mixture: Mixture
    loss: Loss
    choice: Choice
    held_out: Mapping[str, np.ndarray]
    lacking: Mapping[str, int]
    rationales: RunRationales | None
    preferences: RunPreferences | None
    rank: int
    world_size: int

    @property
    def sequences(self) -> dict[str, int]:
        """How many sequences are trained on, and how many evaluated on, of all dumps."""
        parts = {"train": self.choice.ordinals, "eval": self.held_out}
        return {name: sum(map(len, ordinals.values())) for name, ordinals in parts.items()}

    @property
    def sequences_per_step(self) -> int:
        """Of an optimiser step, over all processes; of a loss of groups, how many groups it has."""
        return self.config.batch_size * self.config.gradient_accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the last may be short."""
        items = self.sequences["train"] if self._groups is None else sum(self._groups.values())
        return math.ceil(items / self.sequences_per_step)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.steps or math.ceil((self.config.epochs or 1.0) * self.steps_per_epoch)

    @cached_property
    def shares(self) -> dict[str, DumpShare]:
        """What is read of each dump (InputError: nothing, of one with a weight)."""
        return dump_shares(self.store, self.mixture, self.choice.ordinals, self.sequences_per_step, self.steps, self._groups)

    @property
    def _groups(self) -> Mapping[str, int] | None:
        """How many groups are trained on, by dump; None for a loss of no groups."""
        return None if self.preferences is None else self.preferences.groups["train"]

    def training(self, marker: Sequence[int] = ()) -> DistillationDataset:
        """The sequences to train on, in the run's order; `marker` are the tokens that mark a second task."""
        grouped = self.config.group_by_length
        return DistillationDataset(
            self.store,
            self.mixture.source,
            seed=self.config.seed,
            order=self.config.order,
            ordinals=self.choice.ordinals,
            targets=self.choice.targets,
            group_by_length=grouped,
            global_batch=self.sequences_per_step if grouped else None,
            prepare=self._prepare(self.mixture.corpus, marker),
            **self._plan,
        )

    def validation(self, marker: Sequence[int] = ()) -> DistillationDataset | None:
        """The sequences to evaluate on, if there are any; `marker` as of `training`."""
        held_out = {dump: ordinals for dump, ordinals in self.held_out.items() if len(ordinals)}
        if not held_out:
            return None
        prepare = self._prepare(tuple(held_out), marker)
        return DistillationDataset(self.store, list(held_out), ordinals=held_out, shuffle=False, prepare=prepare, **self._plan)

    def _prepare(self, dumps: Sequence[str], marker: Sequence[int]) -> Callable[[Arrays], Arrays] | None:
        """What is made of the batches of some dumps."""
        return self.second_input(dumps, marker) if self.preferences is None else self.preferences.prepare

    def second_input(self, dumps: Sequence[str], marker: Sequence[int]) -> SecondInput | None:
        """What adds the second task to batches of some dumps; None without one."""
        if self.rationales is None:
            return None
        return SecondInput(tuple(self.rationales.of_dumps[dump] for dump in dumps), marker)

    @property
    def _plan(self) -> dict[str, Any]:
        kinds = kinds_read(self.store.manifest(self.mixture.dumps[0]), self.loss, self.config.hidden_states())
        division = {"batch_size": self.config.batch_size, "rank": self.rank, "world_size": self.world_size}
        groups = {} if self.preferences is None else {"groups": True}
        return {"kinds": kinds, **division, **groups, **self.mixture.plan}

    def facts(self) -> dict[str, Any]:
        """What the run writes of it, for the report."""
        dumps = [
            {
                **describe_dump(self.store, dump, columns_read(self.store.manifest(dump), self.config, self.loss)),
                "weight": (self.mixture.shares or {}).get(dump),
                "snapshot": self.store.snapshot(dump),
                "read": asdict(self.shares[dump]) if dump in self.shares else None,
            }
            for dump in self.mixture.dumps
        ]
        return {
            "dumps": dumps,
            "several_teachers": self.mixture.teachers,
            "choice": self.choice.facts,
            **({"rationale": self.rationales.facts} if self.rationales else {}),
            **({"preferences": self.preferences.facts} if self.preferences else {}),
            "sequences": self.sequences,
            "world_size": self.world_size,
        }

    def lines(self) -> list[str]:
        """What a person should know before the run begins, in sentences."""
        joined = "teachers" if self.mixture.teachers else "dumps"
        missing = [
            f"Sequences that not all {joined} have are left out: {dump} lacks {count:,}."
            for dump, count in self.lacking.items()
            if count
        ]
        lines = [*check_mixture(self.store, self.mixture, self.config, self.loss), *missing, *self.choice.lines]
        lines += self.rationales.lines if self.rationales else ()
        lines += self.preferences.lines if self.preferences else ()
        lines += reading_lines(self.mixture, self.shares, self.steps, self.steps_per_epoch)
        if TEXT[0] in self.loss.inputs:
            share = self.training().padding_share()
            remedy = "; --group-by-length makes it less" if self.config.group_by_length is None and share > PADDING else ""
            lines.append(f"{share:.1%} of the batches is padding{remedy}.")
        return lines


def run_data(
    config: TrainConfig,
    store: KnowledgeStore,
    mixture: Mixture,
    loss: Loss,
    arguments: TrainingArguments,
    *,
    reporter: Reporter = SILENT,
) -> RunData:
    """Divide the sequences of a run's dumps, and choose what it trains on; every process of the run calls this.

    Args:
        config: the run's options.
        store, mixture: its dumps.
        loss: what it learns.
        arguments: which say which process this is.
        reporter: hears of the progress of choosing.

    Raises:
        InputError, QueryError: nothing is left to train on, or an option cannot be used; names it.
    """
    train, held_out = split_dumps(store, mixture.corpus, eval_fraction=config.eval_fraction)
    lacking: dict[str, int] = {}
    if len(joined := joined_dumps(config, mixture)) > 1:
        lacking, left_out = store.lacking(joined)
        train = {dump: ordinals.without(left_out) for dump, ordinals in train.items()}
        held_out = {dump: np.setdiff1d(ordinals, left_out) for dump, ordinals in held_out.items()}
    rank, world_size = arguments.process_index, arguments.world_size
    choice = choose_once(rank, world_size, lambda: choose(config, store, mixture.corpus, train, reporter=reporter))
    parts = (choice.ordinals, held_out)
    rationales = choose_once(rank, world_size, lambda: choose_for_run(config, store, mixture.corpus, parts))
    preferences = choose_once(
        rank, world_size, lambda: preferences_for_run(config, store, mixture, loss, choice.ordinals, held_out)
    )
    held_out = held_out if preferences is None else dict(preferences.held_out)
    return RunData(config, store, mixture, loss, choice, held_out, lacking, rationales, preferences, rank, world_size)
