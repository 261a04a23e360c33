"""People's own tokenised rows, joined with what a store holds of the same tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import token_hash
from student_train.training.dataset import IGNORED, tensors

Row = Mapping[str, Any]

_SEVERAL = -1
MASKS = ("completion_mask", "assistant_masks", "loss_mask")


class DistillationCollator:
    """Makes a batch, as `DistillationDataset` yields it, of rows of tokens that a teacher has seen.

    Give it to a `DataLoader` or a `Trainer` whose data set is your own. A row has `input_ids` (T,), a list, an array or a
    tensor, and may have

        attention_mask  (T,)  0 where the row is padded, on either side; the batch is padded on the right
        labels          (T,)  `input_ids`, or −100 where a token is not to be learnt
        completion_mask, assistant_masks, loss_mask
                        (T,)  0 where a token is not to be learnt, as TRL and the chat templates of transformers write them
        sequence_id           of the sequence in the dump; without it the sequence is found by the hash of its tokens, which
                              must not be those of several sequences with other targets

    A position counts where it is a target of the dump and neither the row's label nor one of its masks takes it away.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        kinds: which kinds of knowledge; None for all.

    Raises:
        InputError: there is no such dump.
    """

    def __init__(self, store: KnowledgeStore, dump: str | None = None, *, kinds: tuple[str, ...] | None = None):
        self.store = store
        self.dump = store.dump(dump)
        self.kinds = kinds
        self._opened = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    @cached_property
    def _index(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Ids and hashes of the sequences, sorted, each with the ordinals that they are of: `_SEVERAL` for a hash of sequences
        with other numbers of targets, of which tokens do not say which one is meant."""
        columns = ["sequence_id", "token_hash"]
        sequences = self.store.sequences(self.dump, [*columns, "targets"])
        index = {name: _sorted(sequences[name].to_numpy()) for name in columns}
        hashes, ordinals = index["token_hash"]
        targets = sequences["targets"].to_numpy()[ordinals]
        differing = hashes[1:][(hashes[1:] == hashes[:-1]) & (targets[1:] != targets[:-1])]
        ordinals[np.isin(hashes, differing)] = _SEVERAL
        return index

    def missing(self, rows: Iterable[Row]) -> list[int]:
        """The numbers, counted from 0, of the rows that the dump does not hold (InputError: nobody can tell of one of them)."""
        return [number for number, row in enumerate(rows) if self._ordinal(row) is None]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of rows.

        Raises:
            InputError: the dump does not hold some of them, or a row is not what it must be; names the row by its number or its
                tokens.
        """
        if os.getpid() != self._opened:  # a forked worker must not share open files with its parent
            self.store, self._opened = copy.copy(self.store), os.getpid()
        found = [self._ordinal(row) for row in rows]
        ordinals = [ordinal for ordinal in found if ordinal is not None]
        if len(ordinals) < len(rows):
            first = found.index(None)
            raise InputError(
                f"{len(rows) - len(ordinals)} of {len(rows)} rows of a batch are not in the dump {self.dump}; the first is row"
                f" {first}, {_shown(rows[first])}: leave such rows out (`missing` gives their numbers), or make a dump of them"
            )
        # A row may stand in a batch twice, where a loader fills up its last one.
        distinct, places = np.unique(np.array(ordinals, np.int64), return_inverse=True)
        [read] = self.store.batches(self.dump, batch_size=len(distinct), ordinals=distinct, shuffle=False, kinds=self.kinds)
        batch = {name: _taken(value, places) for name, value in tensors(read).items()}
        if "input_ids" in batch:
            for number, row in enumerate(rows):
                self._apply(batch, number, row)
            batch["labels"] = torch.where(batch["is_target"], batch["input_ids"], IGNORED)
        return batch

    def _ordinal(self, row: Row) -> int | None:
        """Of the sequence that a row is; None where the dump has none."""
        if row.get("sequence_id") is not None:
            return _find(self._index["sequence_id"], np.int64(row["sequence_id"]))
        if "input_ids" not in row:
            raise InputError(
                f"a row has neither input_ids nor sequence_id, only {', '.join(row) or 'nothing'}: tokenise it first"
            )
        ordinal = _find(self._index["token_hash"], np.uint64(token_hash(_unpadded(row, "input_ids"))))
        if ordinal == _SEVERAL:
            raise InputError(
                f"several sequences of the dump {self.dump} have the tokens of a row, {_shown(row)}, and not the same targets:"
                " give the row the sequence_id of the one that is meant"
            )
        return ordinal

    def _apply(self, batch: dict[str, Any], number: int, row: Row) -> None:
        """Check a row's tokens against the batch's, and take away the targets that it does not want."""
        length = int(batch["attention_mask"][number].sum())
        stored = batch["input_ids"][number, :length].numpy()
        if "input_ids" in row and not np.array_equal(_unpadded(row, "input_ids"), stored):
            raise InputError(
                f"row {number} of a batch has the sequence_id {row.get('sequence_id')}, and not the tokens that the dump"
                f" {self.dump} has under it, {_shown(row)}: leave sequence_id out, and rows are found by their tokens"
            )
        for name in MASKS:
            if row.get(name) is None:
                continue
            if len(mask := _unpadded(row, name)) != length:
                raise InputError(f"row {number} of a batch has a {name} of {len(mask)} tokens, and is of {length}")
            batch["is_target"][number, :length] &= torch.from_numpy(mask == 1)
        if row.get("labels") is None:
            return
        labels = _unpadded(row, "labels")
        wanted = labels != IGNORED
        if len(labels) != length or (labels[wanted] != stored[wanted]).any():
            raise InputError(
                f"row {number} of a batch has labels that are neither its input_ids nor {IGNORED}: labels are not"
                " shifted, and as long as the row"
            )
        batch["is_target"][number, :length] &= torch.from_numpy(wanted)


def _sorted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values, kind="stable")
    return values[order], order


def _find(index: tuple[np.ndarray, np.ndarray], value: Any) -> int | None:
    values, order = index
    place = int(np.searchsorted(values, value))
    return int(order[place]) if place < len(values) and values[place] == value else None


def _unpadded(row: Row, name: str) -> np.ndarray:
    values = np.asarray(row[name], dtype=np.int64)
    if row.get("attention_mask") is None:
        return values
    return values[np.asarray(row["attention_mask"], dtype=bool)]


def _shown(row: Row) -> str:
    if "input_ids" not in row:
        return f"of sequence_id {row['sequence_id']}"
    tokens = _unpadded(row, "input_ids")
    return f"of {len(tokens)} tokens that begin with {', '.join(map(str, tokens[:5]))}"


def _taken(values: Any, places: np.ndarray) -> Any:
    if isinstance(values, Tensor):
        return values[torch.from_numpy(places)]
    return [values[place] for place in places]
