"""A store's batches as tensors, and the split into training and evaluation.

The store decides the order, a pure function of (seed, epoch), and gives any step of it at once; this module only carries
it. Worker processes of a `DataLoader` take every so-manyth step, in the order in which the loader asks them, so no batch
is lost, repeated or reordered for any number of workers, and none is read twice.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.positions import positions_of
from knowledge_store.reading.batches import check_snapshot

IGNORED = -100  # the label that every library's cross-entropy leaves out


class DistillationDataset(IterableDataset[dict[str, Any]]):
    """Batches of a dump as dictionaries of tensors; give it to a `DataLoader` with `batch_size=None`.

    Each batch has every column that `KnowledgeStore.batches` gives (see there for shapes), as tensors (texts as lists), and
    `labels` (B, T): `input_ids` where a position counts, −100 elsewhere. Rows of padding, whose `sequence_id` is −1, attend
    to their first token so that no model divides by an empty softmax; none of their positions counts.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        batch_size: sequences per batch and rank.
        seed: of the order.
        rank, world_size: this process among those that train together.
        epoch, consumed: where to begin: items of that epoch which all ranks together have taken already. `state_after`
            gives both.
        ordinals: read only these sequences (positions in the dump's order), as `split_ordinals` gives them.
        shuffle: False reads in the dump's order.
        endless: continue with the next epoch instead of stopping. Such a dataset has no length.
        kinds: read only these kinds of knowledge; None for all that the dump holds.
        snapshot: of the dump when the order was begun, which must be the same still; `state_after` gives it too.
    """

    def __init__(
        self,
        store: KnowledgeStore,
        dump: str | None = None,
        *,
        batch_size: int = 8,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        consumed: int = 0,
        ordinals: np.ndarray | None = None,
        shuffle: bool = True,
        endless: bool = False,
        kinds: tuple[str, ...] | None = None,
        snapshot: int | None = None,
    ) -> None:
        super().__init__()
        self.store = store
        self.dump = store.dump(dump)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.consumed = consumed
        self.ordinals = ordinals
        self.shuffle = shuffle
        self.endless = endless
        self.kinds = kinds
        self.snapshot = store.snapshot(self.dump)
        check_snapshot(self.dump, self.snapshot, snapshot)
        self.sequences = store.sequence_count(self.dump) if ordinals is None else len(ordinals)
        if not self.sequences:
            raise InputError(f"there is no sequence to read in the dump {self.dump}")

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank takes in a whole epoch."""
        return -(-self.sequences // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        if self.endless:
            raise TypeError("an endless DistillationDataset has no length")
        return self._batches_left(self.consumed)

    def state_after(self, batches: int) -> dict[str, int]:
        """Where to begin again after each rank took `batches` batches from here: seed, epoch, consumed and snapshot."""
        epoch, consumed = self.epoch, self.consumed
        while batches >= self._batches_left(consumed):
            batches -= self._batches_left(consumed)
            epoch, consumed = epoch + 1, 0
        consumed += batches * self.batch_size * self.world_size
        return {"seed": self.seed, "epoch": epoch, "consumed": consumed, "snapshot": self.snapshot}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # A forked worker must not share open files with its parent, and must not see shards that were committed meanwhile.
        store = copy.copy(self.store) if info else self.store
        taken = 0  # batches of this rank before this epoch, over all workers
        epoch, consumed = self.epoch, self.consumed
        while True:
            left = self._batches_left(consumed)
            batches = store.batches(
                self.dump,
                batch_size=self.batch_size,
                seed=self.seed,
                epoch=epoch,
                rank=self.rank,
                world_size=self.world_size,
                consumed=consumed,
                ordinals=self.ordinals,
                shuffle=self.shuffle,
                kinds=self.kinds,
            )
            # The loader takes batches from its workers in turn: the rank's batch number `taken + step` is that of
            # worker (taken + step) mod workers.
            for step in range((worker - taken) % workers, left, workers):
                yield tensors(batches[step])
            if not self.endless:
                return
            taken += left
            epoch, consumed = epoch + 1, 0

    def _batches_left(self, consumed: int) -> int:
        return max(0, -(-(self.sequences - consumed) // (self.batch_size * self.world_size)))


def tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of arrays as tensors, with `labels` where it has the text. Lists, which hold texts, stay as they are."""
    result = {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }
    if "input_ids" in result:
        result["attention_mask"] = result["attention_mask"].long()
        result["attention_mask"][result["sequence_id"] < 0, :1] = 1
        result["labels"] = torch.where(result["is_target"], result["input_ids"], IGNORED)
    return result


def padding_batch(like: dict[str, Any]) -> dict[str, Any]:
    """A batch of one row of padding, with the columns of another: takes part in a step and adds nothing to it."""
    result = {name: value[:1].clone() if isinstance(value, Tensor) else value[:1] for name, value in like.items()}
    result["sequence_id"].fill_(-1)
    if "input_ids" in result:
        result["is_target"].fill_(False)
        result["labels"].fill_(IGNORED)
        result["attention_mask"].fill_(0)[:, :1] = 1
    return result


def split_ordinals(store: KnowledgeStore, dump: str | None = None, *, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Divide a dump's sequences into those to train on and those to evaluate on, by document.

    A row of the corpus goes to one side whole, with all its parts and windows, chosen by a hash of its file and row:
    the same rows on every machine, in every run, and for every teacher's dump of that corpus.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        eval_fraction: share of the rows to evaluate on, in [0, 1). Above 0 it is at least one row.

    Returns:
        Two ascending int64 arrays of ordinals; the second is empty for a fraction of 0.

    Raises:
        InputError: the fraction is out of range, or nothing would be left to train on.
    """
    if not 0 <= eval_fraction < 1:
        raise InputError(f"--eval-fraction must be at least 0 and below 1, not {eval_fraction}")
    name = store.dump(dump)
    table = store.sequences(name).select(["file", "row"])
    rows = list(zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True))
    ranked = sorted(set(rows), key=lambda row: hashlib.sha256(f"{row[0]}\n{row[1]}".encode()).digest())
    count = max(1, round(eval_fraction * len(ranked))) if eval_fraction else 0
    if count >= len(ranked):
        raise InputError(
            f"the dump {name} has {len(ranked)} document(s), so --eval-fraction {eval_fraction} leaves none to train"
            " on: use --eval-fraction 0"
        )
    held_out = set(ranked[:count])
    chosen = np.fromiter((row in held_out for row in rows), dtype=bool, count=len(rows))
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def describe_dump(store: KnowledgeStore, dump: str, unused: Collection[str] = ()) -> dict[str, Any]:
    """The facts of a dump that a run or an evaluation keeps beside its results.

    Args:
        store: an open store.
        dump: which dump.
        unused: columns of the table `positions` that `bytes_read` leaves out; `bytes` is of everything but the vocabulary.
    """
    manifest = store.manifest(dump)
    sequences = store.sequences(dump)
    summary = next(summary for summary in store.info() if summary.dump == dump)
    left_out, kept = 0, None
    if "positions" in manifest.kinds:
        kept = positions_of(manifest)
        kind = KINDS["positions"]
        needed = kind.stored_columns(set(kind.schema(manifest).names) - set(unused), manifest)
        left_out = sum(summary.column_bytes[f"positions.{name}"] for name in set(kind.stored_schema(manifest).names) - needed)
    return {
        "name": dump,
        "store": store.address,
        "teacher": manifest.teacher.get("name", ""),
        "vocabulary_size": manifest.vocabulary_size,
        "selection": str(kept.selection) if kept else "",
        "top_k": kept.selection.candidates if kept else 0,
        "quantisation_step": kept.quantisation_step if kept else 0.0,
        "sequences": sequences.num_rows,
        "positions": int(np.sum(sequences["length"].to_numpy())),
        "targets": int(np.sum(sequences["targets"].to_numpy())),
        "bytes": summary.bytes,
        "bytes_read": summary.bytes - left_out,
    }
