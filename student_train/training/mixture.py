"""Which dumps a run trains on, and with what weights: from the words of its options to names. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.reading.mixture import weights_of
from student_train.training.configuration import TrainConfig

_PATTERN = frozenset("*?[")  # no name of a dump has one of them, nor any other character of `NAME=WEIGHT`
_SEPARATOR = ", "


@dataclass(frozen=True)
class Mixture:
    """The dumps of a run, in the order in which they were named.

    Attributes:
        weights: by name; all of them are None where none was given.
        teachers: whether they are several teachers of one corpus, each sequence of which is read with what all of them said.
            Otherwise the dumps together are the corpus.
    """

    weights: Mapping[str, float | None]
    teachers: bool = False

    @property
    def dumps(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self.weights)

    @property
    def corpus(self) -> tuple[str, ...]:
        """The dumps whose sequences are read: of several teachers that of the first, whose the others share."""
        return self.dumps[:1] if self.teachers else self.dumps

    @property
    def shares(self) -> dict[str, float] | None:
        """The weights, which sum to one; None where none was given."""
        given = [weight for weight in self.weights.values() if weight is not None]
        total = math.fsum(given)
        return {name: weight / total for name, weight in zip(self.weights, given, strict=True)} if given else None

    @property
    def identity(self) -> dict[str, str]:
        """What it is, as the words of the option that chooses it."""
        words = [name if weight is None else f"{name}={weight!r}" for name, weight in self.weights.items()]
        return {"teachers" if self.teachers else "dumps": _SEPARATOR.join(words)}

    @property
    def source(self) -> list[str] | dict[str, float]:
        """What `KnowledgeStore.batches` calls the dump, for training."""
        return list(self.corpus) if self.teachers or self.shares is None else self.shares

    @property
    def plan(self) -> dict[str, Any]:
        """The fields of `ReadPlan` that it decides."""
        return {"teachers": self.shares} if self.teachers else {}


def resolve_mixture(config: TrainConfig, store: KnowledgeStore, record: Mapping[str, Any]) -> Mixture:
    """The dumps that a run's `--dump` or `--teachers` names.

    Patterns are resolved once: a run that resumes with the same words goes on with the dumps that it began with.

    Args:
        config: the run's options.
        store: an open store.
        record: what the run in the output folder wrote of itself; empty where it has not begun.

    Raises:
        InputError: a word is not what it must be, there is no such dump, one is named twice, or some alone have weights.
        DamageError, StoreError: a dump is closed (see `KnowledgeStore.closed`).
    """
    if config.teachers is not None and config.dump:
        raise InputError("give --dump or --teachers, not both: --teachers names the dumps itself")
    began = record.get("config", {})
    if began.get("dump") == list(config.dump) and began.get("teachers") == config.teachers:
        words = record["identity"].get("dumps" if config.teachers is None else "teachers")
        if isinstance(words, str):
            return _mixture(words.split(_SEPARATOR), store, teachers=config.teachers is not None)
    if config.teachers is not None:
        return _mixture([word.strip() for word in config.teachers.split(",")], store, teachers=True)
    return _mixture(config.dump or [store.dump()], store, teachers=False)


def newer_dumps(config: TrainConfig, store: KnowledgeStore, mixture: Mixture) -> list[str]:
    """The dumps that match a run's patterns by now, and did not when it began."""
    patterns = [word for word in config.dump if _PATTERN & set(word)]
    return [name for name in store.dumps if name not in mixture.weights and any(fnmatchcase(name, word) for word in patterns)]


def _mixture(words: Iterable[str], store: KnowledgeStore, *, teachers: bool) -> Mixture:
    option = "--teachers" if teachers else "--dump"
    weights: dict[str, float | None] = {}
    for word in words:
        name, weight = _weighted(word, option)
        for dump in _named(name, weight, store, option):
            if dump in weights:
                raise InputError(
                    f"{option} names the dump {dump} twice: name it once, with a weight if it is to count for more"
                )
            weights[dump] = weight
    given = {name: weight for name, weight in weights.items() if weight is not None}
    if given:
        weights_of(given, "teacher" if teachers else "dump")
    if without := [name for name in weights if name not in given] if given else []:
        raise InputError(f"{option} gives no weight to {', '.join(without)}: give weights to all dumps, or to none")
    if len(weights) == 1:  # it is all there is, whatever its weight
        return Mixture(dict.fromkeys(weights))
    if teachers and not given:
        weights = dict.fromkeys(weights, 1.0)
    return Mixture(weights, teachers)


def _weighted(word: str, option: str) -> tuple[str, float | None]:
    """The name or pattern in a word, and its weight (InputError: it is no word of an option)."""
    if "^" in word:
        raise InputError(
            f"{option} {word}: a geometric mixture of teachers needs probabilities of tokens outside each one's own candidates,"
            f" which no dump keeps; give weights, as in {word.replace('^', '=')}, for the weighted sum of the teachers"
        )
    if "," in word and option == "--dump":
        parts = " ".join(f"--dump {part.strip()}" for part in word.split(","))
        raise InputError(f"--dump {word} names several dumps in one word: give {parts}")
    name, equals, number = word.partition("=")
    if not equals:
        return name, None
    try:
        weight = float(number)
    except ValueError:
        raise InputError(f"{option} {word}: {number!r} is no weight; give a number above 0, as in {name}=0.7") from None
    return name, weight


def _named(name: str, weight: float | None, store: KnowledgeStore, option: str) -> Sequence[str]:
    """The dumps that a name or pattern means."""
    if not _PATTERN & set(name):
        return [store.dump(name)]
    if option == "--teachers":
        raise InputError(f"--teachers {name} is a pattern: name each teacher's dump, the first with the sequences to read")
    if weight is not None:
        raise InputError(
            f"--dump {name}={weight:g} gives a weight to a pattern, which could be each dump's or all of theirs together: name"
            " the dumps that are to have weights"
        )
    # A folder that matches and is closed is not left out in silence: to ask for it says why it is.
    matching = [store.dump(dump) for dump in sorted((*store.dumps, *store.closed)) if fnmatchcase(dump, name)]
    if not matching:
        raise InputError(f"no dump of {store.address} matches {name!r} (it has {', '.join(store.dumps) or 'none'})")
    return matching
