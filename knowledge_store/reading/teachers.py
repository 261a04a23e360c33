"""Several teachers of one corpus, read together: each sequence of the first with what the others said of the same tokens.

Dumps of one corpus, tokenizer and plan have the same shards and sequence ids; that a sequence is the same is known by the hash
of its tokens. Where a shard holds the same in all dumps, which is the rule, a number for each shard is all that is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest, in_words
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading.collate import SEPARATOR
from knowledge_store.reading.mixture import Taken, taken
from knowledge_store.reading.reader import DumpReader


def corpus_change(first: Manifest, other: Manifest) -> tuple[str, Any, Any] | None:
    """Something that the corpora, tokenizers or plans of two dumps differ in: its dotted name and both values. None: they were
    given the same sequences."""
    for name, (one, two) in first.changes(other).items():
        # Where nothing is a conversation, no template was rendered.
        unused = name == "tokenizer.chat_template_sha256" and "chat" not in first.plan
        if name.startswith(("corpus.", "tokenizer.", "plan.")) and not unused:
            return name, one, two
    return None


def check_one_corpus(manifests: Sequence[Manifest]) -> None:
    """Refuse teachers that were not given the same sequences.

    Raises:
        InputError: names what their corpora, tokenizers or plans differ in.
    """
    first = manifests[0]
    for other in manifests[1:]:
        if change := corpus_change(first, other):
            name, one, two = change
            raise InputError(
                f"dumps {first.dump!r} and {other.dump!r} are not two teachers of one corpus: {in_words(name)} is {one} in the"
                f" first and {two} in the second; name them as dumps instead, or dump the same corpus with the same options"
            )


class _Matched:
    """The sequences of one dump as another has them.

    Attributes:
        missing: ordinals in the first dump of those that the other lacks, ascending, int64.
        surplus: how many sequences the other has and the first lacks.
    """

    def __init__(self, first: DumpReader, other: DumpReader):
        self._starts: list[int] = []
        self._shifts: list[int] = []
        self._tables: dict[int, np.ndarray] = {}  # of the shards that do not hold the same in both, by place
        missing, matched = [np.empty(0, np.int64)], 0
        for place, shard in enumerate(first.shards):
            start, ids, hashes = first.identities(shard)
            other_start, other_ids, other_hashes = other.identities(shard)
            self._starts.append(start)
            self._shifts.append(other_start - start)
            if np.array_equal(ids, other_ids) and np.array_equal(hashes, other_hashes):
                matched += len(ids)
                continue
            _, here, there = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
            same = hashes[here] == other_hashes[there]
            table = np.full(len(ids), -1, np.int64)
            table[here[same]] = other_start + there[same]
            self._tables[place] = table
            missing.append(start + np.flatnonzero(table < 0))
            matched += int(same.sum())
        self.missing = np.concatenate(missing)
        self.surplus = len(other) - matched

    def __getitem__(self, ordinal: int) -> int:
        """The ordinal in the other dump of a sequence that is not missing there."""
        place = bisect_right(self._starts, ordinal) - 1
        if place in self._tables:
            return int(self._tables[place][ordinal - self._starts[place]])
        return ordinal + self._shifts[place]


class TeachersReader:
    """The sequences that all teachers have, by their ordinals in the first one's dump.

    Args:
        readers: of the teachers' dumps; the first one's sequences are read.

    Attributes:
        manifests: of the dumps.
        lacking: how many sequences each dump lacks: of the first's each other one, and of any one of the others the first. They
            are left out.
        left_out: their ordinals in the first dump, ascending, int64.

    Raises (on construction):
        InputError: they are not of one corpus, or have no sequence in common.
        DamageError: a file of the store is not what was published.
    """

    def __init__(self, readers: Mapping[str, DumpReader]):
        self._readers = list(readers.values())
        self.manifests = [reader.manifest for reader in self._readers]
        check_one_corpus(self.manifests)
        self.manifest = self.manifests[0]
        self._matched = [_Matched(self._readers[0], reader) for reader in self._readers[1:]]
        self.left_out = np.unique(np.concatenate([np.empty(0, np.int64), *(each.missing for each in self._matched)]))
        surplus = max((each.surplus for each in self._matched), default=0)
        self.lacking = dict(zip(readers, [surplus, *(len(each.missing) for each in self._matched)], strict=True))
        if len(self.left_out) == len(self):
            raise InputError(f"{' and '.join(readers)} have no sequence in common: name them as dumps instead")

    def __len__(self) -> int:
        return len(self._readers[0])

    @property
    def snapshots(self) -> dict[str, int]:
        """Of each dump (see `DumpReader.snapshot`)."""
        return {name: snapshot for reader in self._readers for name, snapshot in reader.snapshots.items()}

    def lengths(self, ordinals: np.ndarray) -> np.ndarray:
        """Of sequences of the first dump (see `DumpReader.lengths`)."""
        return self._readers[0].lengths(ordinals)

    @property
    def scored_documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the first dump (see `DumpReader.scored_documents`)."""
        return self._readers[0].scored_documents

    @property
    def row_groups(self) -> np.ndarray:
        """Of the first dump (see `DumpReader.row_groups`)."""
        return self._readers[0].row_groups

    def keep(self, groups: int) -> None:
        """Of every dump (see `DumpReader.keep`)."""
        for reader in self._readers:
            reader.keep(groups)

    @property
    def ahead(self) -> int:
        """Of every dump (see `DumpReader.ahead`)."""
        return self._readers[0].ahead

    def sequences(
        self, ordinals: Sequence[int], kinds: tuple[str, ...], upcoming: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, dict[str, Arrays]]]:
        """Sequences by their ordinals in the first dump (see `DumpReader.sequences`): the kinds of the first teacher under
        their names, and those of the teacher m after it under `m/KIND`."""
        own = tuple(kind for kind in kinds if SEPARATOR not in kind)
        found = self._readers[0].sequences(ordinals, own, upcoming)
        for number, (reader, matched) in enumerate(zip(self._readers[1:], self._matched, strict=True), 1):
            prefix = f"{number}{SEPARATOR}"
            of_teacher = tuple(kind.removeprefix(prefix) for kind in kinds if kind.startswith(prefix))
            here, later = [matched[ordinal] for ordinal in ordinals], [[matched[item] for item in batch] for batch in upcoming]
            for (_, knowledge), (_, known) in zip(found, reader.sequences(here, of_teacher, later), strict=True):
                knowledge |= {prefix + kind: arrays for kind, arrays in known.items()}
        return found


def taken_of_teachers(manifests: Sequence[Manifest], kinds: tuple[str, ...] | None) -> Taken:
    """What is read of several teachers of one corpus: all arrays of the first, and of the others those that are not of the text
    (raises as `mixture.taken`)."""
    common = taken(manifests, kinds)
    arrays = {kind: KINDS[kind].arrays(manifests[0]) for kind in common.kinds}
    for number, manifest in enumerate(manifests[1:], 1):
        for kind in common.kinds:
            known = {name: value for name, value in KINDS[kind].arrays(manifest).items() if name not in KINDS[kind].of_text}
            if known:
                arrays[f"{number}{SEPARATOR}{kind}"] = known
    return Taken(arrays, {}, common.differences)
