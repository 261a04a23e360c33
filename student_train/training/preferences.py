"""What a loss of preferences is given of each answer beside its text: a reference's log-probability, and a score.

Both are asked of dumps once, when a run begins, one number a sequence, and are put into batches by the sequences' ids. Imports
no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from knowledge_store.format.manifest import in_words
from knowledge_store.format.sequences import SCORE
from knowledge_store.kinds import Arrays
from knowledge_store.model_files import hub_folder
from knowledge_store.quantities import counted
from knowledge_store.reading.teachers import corpus_change
from student_train.losses.table import Loss
from student_train.training.configuration import TrainConfig
from student_train.training.mixture import Mixture
from student_train.training.positions import answer_logprobs, check_tokens_known

REFERENCE = "reference_logprob"
_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Preferences:
    """Adds to the batches of a dump of groups what was asked of other dumps; the `prepare` of a `DistillationDataset`.

    Attributes:
        sequence_ids: of the dump, int64 (N,), ascending.
        reference: ln p of each answer under the reference, float64 (N,) nats, the sum over its targets; None without one.
        scores: of each answer, float64 (N,), in place of the corpus's; None leaves these.
    """

    sequence_ids: np.ndarray
    reference: np.ndarray | None = None
    scores: np.ndarray | None = None

    def __call__(self, batch: Arrays) -> Arrays:
        """The batch with `reference_logprob` and `score`, float64 (R,), as far as there are any; 0 and NaN for padding."""
        ids = batch["sequence_id"]
        places = np.minimum(np.searchsorted(self.sequence_ids, ids), len(self.sequence_ids) - 1)
        real = ids >= 0
        if (self.sequence_ids[places[real]] != ids[real]).any():
            raise InputError("these preferences are those of another dump: ask for them with the dump that is read")
        added = {}
        if self.reference is not None:
            added[REFERENCE] = np.where(real, self.reference[places], 0.0)
        if self.scores is not None:
            added[SCORE] = np.where(real, self.scores[places], np.nan)
        return {**batch, **added}


def preferences(
    store: KnowledgeStore, dump: str | None = None, *, reference: str | None = None, scores: str | None = None
) -> Preferences:
    """What other dumps of the same corpus say of a dump's answers.

    Args:
        store: an open store.
        dump: whose groups are read; None for the only one.
        reference: a dump by the starting student, for `dpo`.
        scores: a dump whose teacher scores the answers: by the mean of its log-probability over an answer's targets.

    Raises:
        InputError: there is no such dump, it is of another corpus, plan or tokenizer, does not know how likely each token is,
            or lacks a sequence.
    """
    name = store.dump(dump)
    ids = store.sequences(name, ["sequence_id"])["sequence_id"].to_numpy()
    order = np.argsort(ids)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for option, other in (("reference", reference), ("scores", scores)):
        if other is not None:
            check_same_corpus(store, name, other, option)
            if missing := len(store.lacking((name, other))[1]) if other != name else 0:
                raise InputError(
                    f"the dump {other}, given as {option}, lacks {missing:,} of the {len(ids):,} sequences of {name}, or"
                    " has other tokens there: finish it, or dump the same corpus again with the same options"
                )
            found[option] = _asked(store, other, ids[order])
    sums, lengths = found.get("scores", (None, None))
    return Preferences(
        ids[order],
        found["reference"][0] if "reference" in found else None,
        None if sums is None or lengths is None else sums / lengths,
    )


def _asked(store: KnowledgeStore, dump: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sequences by their ids, ascending: the log-probability of each under a dump, float64, and how many targets it has."""
    table = answer_logprobs(store, dump)
    asked = table["sequence_id"].to_numpy()
    order = np.argsort(asked)
    found = np.searchsorted(asked, ids, sorter=order)
    places = order[np.minimum(found, len(asked) - 1)] if len(asked) else found
    if not len(asked) or (asked[places] != ids).any():
        raise InputError(f"the dump {dump} has an answer without a target: leave it out with --where")
    return table["logprob"].to_numpy()[places], table["targets"].to_numpy()[places]


def check_same_corpus(store: KnowledgeStore, dump: str, other: str, option: str) -> None:
    """Refuse a dump that cannot say anything of another's sequences.

    Args:
        store: an open store.
        dump: whose sequences are read.
        other: which is asked about them.
        option: that names it, for the message.

    Raises:
        InputError: there is no such dump, it is of another corpus, plan or tokenizer, or does not know how likely tokens are.
    """
    first, manifest = store.manifest(store.dump(dump)), store.manifest(store.dump(other))
    if change := corpus_change(first, manifest):
        name, one, two = change
        raise InputError(
            f"{option}: the dumps {dump} and {other} are not of one corpus, tokenizer and plan: {in_words(name)} is {one} in"
            f" the first and {two} in the second; dump the same corpus with the same options"
        )
    check_tokens_known(manifest, option)


def check_preferences(config: TrainConfig, store: KnowledgeStore, mixture: Mixture, loss: Loss) -> None:
    """Refuse what shows before anything is read.

    Raises:
        InputError: a loss has no reference and needs one, there are several dumps, or one cannot be asked.
    """
    if loss.reference and config.reference is None:
        raise InputError(
            f"the loss {config.loss} needs --reference: a dump of the same corpus by the student that the run begins with"
            " (`teacher-dump run … --teacher STUDENT`)"
        )
    for option in ("reference", "scores"):
        if (other := getattr(config, option)) is None:
            continue
        if len(mixture.dumps) > 1:
            raise InputError(f"--{option} belongs to one dump, and the run trains on {', '.join(mixture.dumps)}: train on one")
        check_same_corpus(store, mixture.dumps[0], other, f"--{option}")


@dataclass(frozen=True)
class RunPreferences:
    """Those of a run.

    Attributes:
        held_out: the ordinals of `run_data`, without groups that say nothing.
        groups: how many there are to train on and to evaluate on, by dump.
        prepare: what adds the numbers to batches; None where the corpus has them all.
        facts: what run.json has of them.
        lines: what is told of them, in sentences.
    """

    held_out: Mapping[str, np.ndarray]
    groups: Mapping[str, Mapping[str, int]]
    prepare: Preferences | None
    facts: Mapping[str, Any]
    lines: tuple[str, ...]


def preferences_for_run(
    config: TrainConfig,
    store: KnowledgeStore,
    mixture: Mixture,
    loss: Loss,
    train: Mapping[str, Any],
    held_out: Mapping[str, np.ndarray],
) -> RunPreferences | None:
    """The preferences that a run learns from; None for a loss of no groups.

    Args:
        config: the run's options.
        store, mixture: its dumps.
        loss: what it learns.
        train, held_out: ordinals to train on and to evaluate on, by dump.

    Raises:
        InputError: a group is left with fewer than two answers, one of them is cut, or scores are not known or all equal; says
            how many, and what to do.
    """
    if loss.unit != "group":
        return None
    prepare = None
    if config.reference is not None or config.scores is not None:
        prepare = preferences(store, mixture.dumps[0], reference=config.reference, scores=config.scores)
    evaluated: dict[str, np.ndarray] = {}
    counts: dict[str, dict[str, int]] = {"train": {}, "eval": {}}
    lines: list[str] = []
    for dump in mixture.dumps:
        answers = _Answers(store, dump, prepare)
        counts["train"][dump] = _check_answers(config, dump, answers.of(np.asarray(train[dump])))
        kept = answers.of(held_out[dump]).telling()
        evaluated[dump], counts["eval"][dump] = kept.ordinals, len(kept.sizes)
        left_out = len(answers.of(held_out[dump]).sizes) - len(kept.sizes)
        if left_out:
            lines.append(
                f"Of {dump}, {counted(left_out, 'group', 'groups')} held out for validation whose scores are equal or not known"
                " can say nothing, and are not read."
            )
    if config.reference is not None:
        lines += reference_lines(config, store.manifest(config.reference))
    facts = {"reference": config.reference, "scores": config.scores, "groups": {k: sum(v.values()) for k, v in counts.items()}}
    return RunPreferences(evaluated, counts, prepare, facts, tuple(lines))


class _Answers:
    """The answers of a dump: of each of its sequences the group, the score, and whether it was cut."""

    def __init__(self, store: KnowledgeStore, dump: str, prepare: Preferences | None):
        table = store.sequences(dump, ["sequence_id", "document", "truncated", SCORE])
        self._documents = table["document"].to_numpy()
        self._truncated = table["truncated"].to_numpy()
        self._scores = table[SCORE].to_numpy()  # null becomes NaN
        if prepare is not None and prepare.scores is not None:
            self._scores = prepare.scores[np.searchsorted(prepare.sequence_ids, table["sequence_id"].to_numpy())]

    def of(self, ordinals: np.ndarray) -> _Chosen:
        """Those of some ordinals, ascending."""
        return _Chosen(ordinals, self._documents[ordinals], self._scores[ordinals], self._truncated[ordinals])


@dataclass(frozen=True)
class _Chosen:
    """Some answers, by ordinal: (N,) each."""

    ordinals: np.ndarray
    documents: np.ndarray
    scores: np.ndarray
    truncated: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each group begins."""
        return np.flatnonzero(np.diff(self.documents, prepend=-1))

    @property
    def sizes(self) -> np.ndarray:
        """How many answers each group has."""
        return np.diff(self.starts, append=len(self.documents))

    def groups_with(self, condition: np.ndarray) -> int:
        """How many groups have an answer that meets a condition, bool (N,)."""
        return len(np.unique(self.documents[condition]))

    @property
    def equal(self) -> np.ndarray:
        """Of which groups all scores are equal, bool."""
        if not len(self.starts):
            return np.empty(0, bool)
        return np.maximum.reduceat(self.scores, self.starts) == np.minimum.reduceat(self.scores, self.starts)

    def telling(self) -> _Chosen:
        """Without the groups whose scores are not known or all equal, or that have one answer."""
        known = ~np.isnan(np.add.reduceat(self.scores, self.starts)) if len(self.starts) else np.empty(0, bool)
        kept = np.repeat(known & ~self.equal & (self.sizes > 1), self.sizes)
        return _Chosen(self.ordinals[kept], self.documents[kept], self.scores[kept], self.truncated[kept])


def _check_answers(config: TrainConfig, dump: str, chosen: _Chosen) -> int:
    """How many groups there are (InputError: a loss cannot learn from all of them)."""
    count, alone = len(chosen.sizes), int((chosen.sizes < 2).sum())
    if alone:
        raise InputError(
            f"{alone:,} of the {count:,} groups of {dump} have fewer than two answers to train on: choose two or more of each"
            " group with --where, or none"
        )
    if cut := chosen.groups_with(chosen.truncated):
        raise InputError(
            f"{cut:,} of the {count:,} groups of {dump} have an answer that is cut, whose likelihood is not the whole's: dump"
            " the corpus with a larger --max-length, or leave them out with --where"
        )
    if unknown := chosen.groups_with(np.isnan(chosen.scores)):
        raise InputError(
            f"{unknown:,} of the {count:,} groups of {dump} have no scores: give them in the corpus, or --scores DUMP, whose"
            " teacher's likelihood of the answers is taken"
        )
    if equal := int(chosen.equal.sum()):
        raise InputError(
            f"all scores are equal in {equal:,} of the {count:,} groups of {dump}, from which nothing can be learnt: leave them"
            " out with --where (LOSSES.md, `Preferences`, has the query)"
        )
    return count


def reference_lines(config: TrainConfig, manifest: Manifest) -> list[str]:
    """A warning where the reference is not known to be the student that the run begins with."""
    stated = {name: digest for name, digest in manifest.teacher.get("files", {}).items() if name.endswith(_WEIGHTS)}
    if not stated:
        return [
            f"Warning: the reference {manifest.dump} does not say which weights it is of. If they are not those of"
            f" {config.student}, the student is held to another model than the one it begins as."
        ]
    folder = Path(config.student)
    if not folder.is_dir():
        folder = hub_folder(config.student, config.gguf_file)
    found = {}
    for path in sorted(folder.glob("*")):
        if path.suffix in _WEIGHTS and (config.gguf_file is None or path.name == config.gguf_file):
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if found == stated:
        return []
    return [
        f"Warning: the reference {manifest.dump} is of other weights than {config.student} ({', '.join(sorted(stated))}): the"
        " student is held to another model than the one it begins as, and its margins do not begin at 0."
    ]
