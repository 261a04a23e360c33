"""Which sequences are trained on, and which are held out for the validation loss. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from knowledge_store.quantities import counted
from knowledge_store.reading.ordinals import AllBut

TrainOrdinals = dict[str, AllBut]  # by dump
EvalOrdinals = dict[str, np.ndarray]  # by dump: int64, ascending


def split_ordinals(store: KnowledgeStore, dump: str | None = None, *, eval_fraction: float) -> tuple[AllBut, np.ndarray]:
    """Divide a dump's sequences into those to train on and those to evaluate on, by document.

    A row of the corpus goes to one side whole, with all its parts and windows, chosen by a hash of its file and row:
    the same rows on every machine, in every run, and for every teacher's dump of that corpus.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        eval_fraction: share of the rows to evaluate on, in [0, 1). Above 0 it is at least one row.

    Returns:
        The ordinals to train on, as all but the others, and the others, ascending, int64; none for a fraction of 0.

    Raises:
        InputError: the fraction is out of range, or nothing would be left to train on.
    """
    name = store.dump(dump)
    train, held_out = split_dumps(store, [name], eval_fraction=eval_fraction)
    return train[name], held_out[name]


def split_dumps(store: KnowledgeStore, dumps: Sequence[str], *, eval_fraction: float) -> tuple[TrainOrdinals, EvalOrdinals]:
    """Divide the sequences of several dumps as `split_ordinals` divides those of each.

    A row that is held out of one dump is held out of all that have it, so that nothing is evaluated on that was trained on in
    another dump: by its number in a file of the same contents, or by its tokens, such as in a copy of another type. So a text
    that a corpus has several times goes to one side whole.

    Returns:
        by dump, the ordinals to train on, and those to evaluate on.

    Raises:
        InputError: the fraction is out of range, or nothing of a dump would be left to train on.
    """
    if not 0 <= eval_fraction < 1:
        raise InputError(f"--eval-fraction must be at least 0 and below 1, not {eval_fraction}")
    if not eval_fraction:
        return {dump: AllBut(store.sequence_count(dump)) for dump in dumps}, {dump: np.empty(0, np.int64) for dump in dumps}
    ranked = _rank(store, dumps)
    first = []
    for ranks, _ in ranked.values():
        texts = np.unique(ranks)
        first.append(texts[: max(1, round(eval_fraction * len(texts)))])
    chosen = np.concatenate(first)
    train: TrainOrdinals = {}
    held_out: EvalOrdinals = {}
    for dump, (ranks, rows) in ranked.items():
        is_chosen = np.isin(ranks, chosen)
        if is_chosen.all():
            different = len(np.unique(ranks))
            repeated = f", {different} of them different" if different < len(ranks) else ""
            raise InputError(
                f"the dump {dump} has {counted(len(ranks), 'document', 'documents')}{repeated}, so --eval-fraction"
                f" {eval_fraction} leaves none to train on: use --eval-fraction 0"
            )
        held_out[dump] = np.flatnonzero(is_chosen[rows])
        train[dump] = AllBut(len(rows), held_out[dump])
    return train, held_out


def _rank(store: KnowledgeStore, dumps: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By dump, a number for each row of the corpus by which rows are ranked, uint64, and which of them each sequence is of.
    Rows of the same text, by a file of the same contents and their number there or by their tokens, have that of the first."""
    rows = {dump: _rows(store.sequences(dump, ["file", "row", "token_hash"]), _hashes(store.manifest(dump))) for dump in dumps}
    keys, sources, texts = (np.concatenate([row[part] for row in rows.values()]) for part in range(3))
    groups = [np.unique(values, return_inverse=True)[1] for values in (sources, texts)]
    first, before = np.arange(len(keys)), None
    while before is None or not np.array_equal(first, before):  # what is the same as the same is the same
        before = first
        for group in groups:
            least = np.full(group.max(initial=-1) + 1, len(keys))
            np.minimum.at(least, group, first)
            first = least[group]
    ranks, ends = keys[first], np.cumsum([len(row[0]) for row in rows.values()])
    return {dump: (ranks[end - len(row[0]) : end], row[3]) for (dump, row), end in zip(rows.items(), ends, strict=True)}


def _hashes(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of the corpus's files, by their names."""
    return {str(file["name"]): str(file["sha256"]) for file in manifest.corpus.get("files", ()) if "sha256" in file}


def _rows(sequences: pa.Table, hashes: dict[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Numbers for the name of the file and the number of each row of the corpus, for the contents of the file and that number,
    and for its tokens, all uint64; and which of the rows each sequence is of."""
    files, row = sequences["file"].combine_chunks().dictionary_encode(), sequences["row"].to_numpy()
    file = files.indices.to_numpy(zero_copy_only=False)
    changes = np.flatnonzero((np.diff(file, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0))  # in the order of documents
    counts, numbers = np.diff(changes, append=len(row)), row[changes]
    names = [name.as_py() for name in files.dictionary]
    digests = (_digest(f"{names[code]}\n{number}") for code, number in zip(file[changes], numbers, strict=True))
    contents = np.array([_digest(hashes.get(name, name)) for name in names], np.uint64)
    sources = contents[file[changes]] + numbers.astype(np.uint64)
    places = np.arange(len(row)) - np.repeat(changes, counts)
    texts = np.add.reduceat(sequences["token_hash"].to_numpy() * (2 * places + 1).astype(np.uint64), changes)
    return np.fromiter(digests, np.uint64, len(changes)), sources, texts, np.repeat(np.arange(len(changes)), counts)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
