"""One sequence with its rationale, for a person to look at. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from knowledge_store import KnowledgeStore
from student_train.rationales.choice import Rationales
from student_train.rationales.contexts import contexts

SHOWN = 240  # tokens, the last of them the answer's last


def rationale_example(store: KnowledgeStore, dump: str, rationales: Rationales, *, shares: bool) -> dict[str, Any] | None:
    """The middle one of the sequences that have a rationale; None where none has.

    Args:
        store: an open store.
        dump: that holds the tokens, and the saliency where there is any.
        rationales: of the sequences.
        shares: whether to read the saliency.

    Returns:
        sequence_id; tokens, the texts of at most SHOWN tokens up to the answer's last; cut, how many stand before these;
        rationale and answer, places in `tokens`; with saliency shares, of each token its share of the sequence's, 0 of the
        answer's.
    """
    if not len(rationales.sequence_ids):
        return None
    middle = len(rationales.sequence_ids) // 2
    sequence, positions = int(rationales.sequence_ids[middle]), rationales.positions[middle]
    ids = store.sequences(dump, ["sequence_id"])["sequence_id"].to_numpy()
    [context] = contexts(store, dump, shares=shares, ordinals=np.flatnonzero(ids == sequence))
    end = int(np.flatnonzero(context.is_target)[-1]) + 1
    start = max(0, end - SHOWN)
    texts = store.tokens(dump)["text"].to_pylist()
    shown = context.token_ids[start:end].tolist()
    return {
        "sequence_id": sequence,
        "cut": start,
        "tokens": [text if (text := texts[token]) is not None else f"[{token}]" for token in shown],
        "rationale": [int(position) - start for position in positions if position >= start],
        "answer": np.flatnonzero(context.is_target[start:end]).tolist(),
        **({"shares": [round(float(share), 5) for share in context.shares[start:end]]} if context.shares is not None else {}),
    }
