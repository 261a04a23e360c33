"""The sequences of a dump as what stands before the answer, and the answer. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from knowledge_store import KINDS, KnowledgeStore
from knowledge_store.errors import InputError

SALIENCY = "saliency"  # the kind, and its array in a batch
_TOKENS, _TARGETS = ("input_ids", "token_id"), ("is_target", "is_answer")  # what kinds call the tokens and the targets
_BATCH = 64


@dataclass(frozen=True)
class Context:
    """One sequence.

    Attributes:
        sequence_id: its id.
        token_ids: int64 (L,).
        is_target: bool (L,), the answer.
        shares: float32 (L,), of the saliency; None where it was not asked for.
        likeliest: int64 (L,), the token that the teacher finds likeliest at each target; None where it was not asked for.
    """

    sequence_id: int
    token_ids: np.ndarray
    is_target: np.ndarray
    shares: np.ndarray | None = None
    likeliest: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        """Positions of the context, int64 (N,): the tokens before the last target that are none; empty without a target."""
        last = int(np.flatnonzero(self.is_target)[-1]) if self.is_target.any() else 0
        return np.flatnonzero(~self.is_target[:last])


def check_saliency(store: KnowledgeStore, dump: str) -> None:
    """Raises InputError where a dump holds no saliency."""
    if SALIENCY not in store.manifest(dump).kinds:
        raise InputError(
            f"the dump {dump} holds no knowledge of kind {SALIENCY!r}, which says what the rationales are: name one that does"
            " with --rationale-dump, or make one with `teacher-dump run --kind saliency`"
        )


def contexts(
    store: KnowledgeStore, dump: str, *, shares: bool, likeliest: bool = False, ordinals: np.ndarray | None = None
) -> Iterator[Context]:
    """The sequences of a dump, in order.

    Args:
        store: an open store.
        dump: which dump.
        shares: whether to read the saliency, which the dump then holds.
        likeliest: whether to read the teacher's candidates, which the dump then holds.
        ordinals: of the sequences to read, int64 (N,); None for all.

    Raises:
        InputError: the dump does not hold the text, or not which tokens are targets.
    """
    manifest = store.manifest(dump)
    arrays = {kind: KINDS[kind].arrays(manifest) for kind in manifest.kinds}
    kinds = tuple(kind for kind, names in arrays.items() if set(_TOKENS) & names.keys() or (shares and kind == SALIENCY))
    known = {name for kind in kinds for name in arrays[kind]}
    tokens, targets = (next((name for name in names if name in known), None) for names in (_TOKENS, _TARGETS))
    if tokens is None or targets is None:
        raise InputError(f"the dump {dump} does not hold which tokens are targets: name one with `positions` or `saliency`")
    for batch in store.batches(dump, batch_size=_BATCH, shuffle=False, kinds=kinds, ordinals=ordinals):
        lengths = batch["attention_mask"].sum(axis=1)
        for row, (sequence, length) in enumerate(zip(batch["sequence_id"].tolist(), lengths.tolist(), strict=True)):
            if sequence >= 0:
                yield Context(
                    sequence,
                    batch[tokens][row, :length].astype(np.int64),
                    batch[targets][row, :length].astype(bool),
                    batch[SALIENCY][row, :length] if shares else None,
                    batch["candidate_ids"][row, :length, 0].astype(np.int64) if likeliest else None,
                )


def most_salient(context: Context, among: np.ndarray, count: int) -> np.ndarray:
    """Of some positions, int64 (N,), the `count` most salient in their order; of equals the first, as SQL ranks them."""
    assert context.shares is not None
    order = np.lexsort((among, -context.shares[among]))
    return np.sort(among[order[:count]])
