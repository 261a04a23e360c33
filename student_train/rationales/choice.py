"""Which tokens of each sequence are its rationale: chosen once, before a run begins, as a few positions a sequence. Imports no
torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import token_hash
from student_train.rationales.contexts import Context, check_saliency, contexts, most_salient
from student_train.rationales.spans import AnswerPlaces

Of = Literal["saliency", "random", "masked"]


@dataclass(frozen=True)
class Rationales:
    """Of the sequences of one dump.

    Attributes:
        sequence_ids: of those that have one, int64 (N,), ascending.
        positions: of each its k tokens, int32 (N, k), ascending in a row.
        longest: the most tokens of context that any of them has.
    """

    sequence_ids: np.ndarray
    positions: np.ndarray
    longest: int

    def of(self, sequence_ids: np.ndarray) -> np.ndarray:
        """The positions of some sequences, int64 (B, k); −1 where one has no rationale."""
        if not len(self.sequence_ids):
            return np.full((len(sequence_ids), self.positions.shape[1]), -1, np.int64)
        places = np.searchsorted(self.sequence_ids, sequence_ids).clip(max=len(self.sequence_ids) - 1)
        found = self.sequence_ids[places] == sequence_ids
        return np.where(found[:, None], self.positions[places], -1).astype(np.int64)

    @property
    def sha256(self) -> str:
        """A hash of all of them."""
        return hashlib.sha256(self.sequence_ids.tobytes() + self.positions.tobytes()).hexdigest()


def choose_rationales(
    store: KnowledgeStore,
    dump: str,
    of: Of,
    count: int,
    *,
    saliency_dump: str | None = None,
    seed: int = 0,
    wanted: np.ndarray | None = None,
) -> Rationales:
    """Choose a rationale for each sequence that has a target.

    Args:
        store: an open store.
        dump: whose sequences are read.
        of: `saliency` takes the most salient tokens of the context; `masked` the same without those of the answer, wherever the
            whole answer stands in the context; `random` any tokens of the context, a pure function of the seed and the
            sequence's tokens, with no saliency read.
        count: tokens of a rationale.
        saliency_dump: the dump of the same corpus that holds the saliency; None for `dump` itself.
        seed: of `random`.
        wanted: ids of the sequences that must have one; the others are not read. None for all.

    Raises:
        InputError: there is no saliency, the two dumps are not of one corpus, or a context is shorter than `count`.
    """
    source = dump
    if of != "random":
        source = saliency_dump or dump
        check_saliency(store, source)
        if source != dump:
            store.lacking([dump, source])  # sequences of one corpus have the same ids; others are refused
    answers = AnswerPlaces(store.tokens(source)["text"].to_pylist()) if of == "masked" else None
    ids: list[int] = []
    positions: list[np.ndarray] = []
    short: list[tuple[int, int]] = []
    longest = 0
    ordinals = None
    if wanted is not None:
        ordinals = np.flatnonzero(np.isin(store.sequences(source, ["sequence_id"])["sequence_id"].to_numpy(), wanted))
    empty = ordinals is not None and not len(ordinals)
    for context in () if empty else contexts(store, source, shares=of != "random", ordinals=ordinals):
        if not context.is_target.any():
            continue
        places = context.places
        longest = max(longest, len(places))
        if answers is not None:
            places = places[~answers.places(context, answers.answers(context))]
        if len(places) < count:
            short.append((context.sequence_id, len(places)))
            continue
        ids.append(context.sequence_id)
        positions.append(_drawn(context, places, count, seed) if of == "random" else most_salient(context, places, count))
    if short:
        sequence, length = short[0]
        without = " that is not the answer's" if of == "masked" else ""
        raise InputError(
            f"{len(short):,} of {len(short) + len(ids):,} sequences of the dump {dump} have fewer than {count} tokens of"
            f" context{without}, and sequence {sequence} has {length}: use a lower --rationale-tokens, or leave such ones out"
            " with --where, and --eval-fraction 0 where they are held out"
        )
    order = np.argsort(np.array(ids, np.int64))
    chosen = np.array(positions, np.int32).reshape(len(ids), count)
    return Rationales(np.array(ids, np.int64)[order], chosen[order], longest)


def _drawn(context: Context, places: np.ndarray, count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng((seed % 2**32, int(token_hash(context.token_ids))))
    return np.sort(generator.choice(places, count, replace=False))


def identity_of(rationales: Mapping[str, Rationales]) -> str:
    """A hash of the rationales of several dumps."""
    return hashlib.sha256("".join(each.sha256 for each in rationales.values()).encode()).hexdigest()
