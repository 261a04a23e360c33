"""The facts of a dump that runs and evaluations keep beside their results, for the report. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.catalogue.summary import DumpSummary
from knowledge_store.kinds.field import KEYS
from knowledge_store.quantities import counted
from knowledge_store.reading.order import epoch_shares
from student_train.training.mixture import Mixture


def describe_dump(store: KnowledgeStore, dump: str, columns: Mapping[str, Collection[str]] | None = None) -> dict[str, Any]:
    """The facts of a dump, whatever its kinds.

    Args:
        store: an open store.
        dump: which dump.
        columns: those that are read, by kind of knowledge; None for all.

    Returns:
        name, store, teacher, vocabulary_size; sequences, positions (all their tokens), targets; `kinds`, what each states of
        itself by its name, and `lines`, what each tells a person, [label, value]; `bytes` of everything but the vocabulary, and
        `bytes_read`, which leaves out the columns that are not read.
    """
    manifest = store.manifest(dump)
    summary = next(summary for summary in store.info() if summary.dump == dump)
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in manifest.kinds}
    for name, fact in summary.facts.items():
        kind, _, label = name.partition(".")
        kinds[kind][label] = fact
    return {
        "name": dump,
        "store": store.address,
        "teacher": summary.teacher,
        "vocabulary_size": summary.vocabulary_size,
        "kinds": kinds,
        "lines": [list(line) for line in summary.lines],
        "sequences": summary.sequences,
        "positions": summary.positions,
        "targets": int(store.sequences(dump)["targets"].to_numpy().sum()),
        "bytes": summary.bytes,
        "bytes_read": summary.bytes - (0 if columns is None else _bytes_left_out(summary, manifest, columns)),
    }


def _bytes_left_out(summary: DumpSummary, manifest: Manifest, columns: Mapping[str, Collection[str]]) -> int:
    """The bytes of the stored columns from which none of the columns that are read is made."""
    left_out = 0
    for name in manifest.kinds:
        kind = KINDS[name]
        stored = set(kind.stored_schema(manifest).names)
        if name in columns:
            keys = [key.name for key in KEYS[kind.per]]
            stored -= kind.stored_columns({*keys, *columns[name]}, manifest)
        left_out += sum(summary.column_bytes.get(f"{name}.{column}", 0) for column in stored)
    return left_out


@dataclass(frozen=True)
class DumpShare:
    """What a run reads of one of its dumps.

    Attributes:
        sequences: that are trained on; of a loss of groups, the groups.
        epoch: how many of them an epoch has.
        run: how many of them the whole run has, about.
        tokens: in these, about.
        unit: what they are, "sequences" or "groups".
    """

    sequences: int
    epoch: int
    run: int
    tokens: int
    unit: str = "sequences"

    def __str__(self) -> str:
        if not self.sequences:
            return f"none of its {self.unit} is trained on"
        epoch = f"{self.epoch:,} {self.unit} in an epoch, {self.epoch / self.sequences:.2f} times its {self.sequences:,}"
        if self.epoch == self.sequences:
            epoch = f"all of its {self.sequences:,} {self.unit} in an epoch"
        return f"{epoch}; in the run about {self.run:,} {self.unit} and {self.tokens:,} tokens"


def dump_shares(
    store: KnowledgeStore,
    mixture: Mixture,
    ordinals: Mapping[str, Any],
    sequences_per_step: int,
    steps: int,
    groups: Mapping[str, int] | None = None,
) -> dict[str, DumpShare]:
    """What a run reads of each dump of its corpus, by its name.

    Args:
        store: an open store.
        mixture: the run's dumps.
        ordinals: of the sequences to train on, by dump.
        sequences_per_step, steps: of the run; of a loss of groups, groups in a step.
        groups: how many groups the sequences make up, by dump; None where groups are not what is read.

    Raises:
        InputError: a dump with a weight has no sequence to train on, or gets none of an epoch.
    """
    counts = dict(groups) if groups is not None else {dump: len(ordinals[dump]) for dump in mixture.corpus}
    unit = "sequences" if groups is None else "groups"
    shares = epoch_shares(counts, None if mixture.teachers else mixture.shares)
    total = sum(counts.values())
    epochs, rest = divmod(steps, math.ceil(total / sequences_per_step))
    read = epochs * total + min(rest * sequences_per_step, total)
    result = {}
    for (dump, count), share in zip(counts.items(), shares, strict=True):
        lengths = store.sequences(dump)["length"].to_numpy()[np.asarray(ordinals[dump])]
        of_run = round(read * share / total)
        tokens = round(of_run * float(lengths.sum()) / count) if count else 0
        result[dump] = DumpShare(count, share, of_run, tokens, unit)
    return result


def reading_lines(mixture: Mixture, shares: Mapping[str, DumpShare], steps: int, steps_per_epoch: int) -> list[str]:
    """What a run reads, for a person."""
    length = f"An epoch has {counted(steps_per_epoch, 'step', 'steps')}, and the run {steps:,}."
    if len(mixture.dumps) == 1:
        [(dump, share)] = shares.items()
        return [f"{length} Of {dump} it reads {share}."]
    if mixture.teachers:
        weights = ", ".join(f"{dump} {weight:.3g}" for dump, weight in (mixture.shares or {}).items())
        lines = [
            f"Each sequence of {mixture.dumps[0]} is read with what {len(mixture.dumps)} teachers said, by weights: {weights}."
        ]
    else:
        lines = [f"{len(mixture.dumps)} dumps are read as one corpus."]
    lines.append(f"{length} Of each dump it reads:")
    return lines + [f"{dump}: {share}." for dump, share in shares.items()]
