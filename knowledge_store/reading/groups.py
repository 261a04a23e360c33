"""Sequences that are answers to one prompt: a group is read whole, and an order is one of groups.

What an order moves is the first chosen sequence of each group, by its ordinal; reading puts the others behind it.
"""

from __future__ import annotations

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.reading.ordinals import Chosen, Listed


class Groups:
    """The groups of a dump, as far as their sequences are chosen.

    Args:
        dump: its name.
        documents: of each sequence of the dump, int64 (N,), ascending: those of one document are a group.
        scores: of each sequence, float64 (N,), NaN where there is none.
        chosen: the sequences that are read.

    Attributes:
        firsts: the first chosen ordinal of each group. Groups are in the order in which `chosen` first names one of theirs;
            within one, sequences are in the order in which they are stored.

    Raises:
        InputError: of a group fewer than two sequences are chosen, or one is chosen twice.
    """

    def __init__(self, dump: str, documents: np.ndarray, scores: np.ndarray, chosen: Chosen):
        listed = np.asarray(chosen)
        self._ordinals, self._scores = np.unique(listed), scores
        if len(self._ordinals) < len(listed):
            raise InputError(
                f"of dump {dump!r} some ordinals are chosen more than once, and groups are read once: name each of them once"
            )
        of_chosen = documents[self._ordinals]
        self._bounds = np.flatnonzero(np.diff(of_chosen, prepend=-1, append=-1))
        self._firsts = self._ordinals[self._bounds[:-1]]
        if short := int((np.diff(self._bounds) < 2).sum()):
            raise InputError(
                f"of {short:,} of the {len(self._firsts):,} groups of dump {dump!r} fewer than two answers are chosen: choose"
                " at least two of each group or none, or read its sequences without groups"
            )
        _, named = np.unique(documents[listed], return_index=True)
        self.firsts = Listed(self._firsts[np.argsort(named)], len(documents))

    def members(self, first: int) -> np.ndarray:
        """The ordinals of the group that begins with the ordinal `first`, ascending, int64."""
        group = int(np.searchsorted(self._firsts, first))
        return self._ordinals[self._bounds[group] : self._bounds[group + 1]]

    def scores(self, ordinals: np.ndarray) -> np.ndarray:
        """Of sequences by their ordinals, float64."""
        found: np.ndarray = self._scores[ordinals]
        return found


def check_groups(manifests: list[Manifest]) -> None:
    """Refuse to read groups of a dump that has none (InputError)."""
    for manifest in manifests:
        if not manifest.has_groups:
            raise InputError(
                f"dump {manifest.dump!r} has no groups: its corpus has no `chosen` and `rejected`, and no `completions`; read"
                " it without groups, or dump a corpus of preferences"
            )
