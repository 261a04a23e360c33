"""The second input of a batch: the context again, a marker, and the rationale's tokens in the order of the text.

    first     context and answer, as the teacher saw them
    second    context · "\\nexplain: " · the rationale's tokens, which alone count

Distilling step-by-step (arXiv 2305.02301) puts `explain: ` before an encoder's input. Here it follows the context, so that a
beginning-of-sequence token stays first, and a decoder reads the same context for both tasks. The context are the tokens before
the last target that are none, so that of a conversation no answer stands in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knowledge_store.kinds import Arrays
from student_train.losses.rationale import COUNTED, IDS
from student_train.rationales.choice import Rationales

MARKER = "\nexplain: "


@dataclass(frozen=True)
class SecondInput:
    """Adds it to the batches of a store.

    Attributes:
        rationales: of the dumps, in the order in which they are read.
        marker: the marker's token ids.
    """

    rationales: Sequence[Rationales]
    marker: Sequence[int]

    @property
    def longest(self) -> int:
        """The most tokens that a second input has."""
        return max(each.longest + len(self.marker) + each.positions.shape[1] for each in self.rationales)

    def __call__(self, batch: Arrays) -> Arrays:
        """The batch with `rationale_ids` int64 (B, L), −1 after the end of a row, and `rationale_is_target` bool (B, L). A row
        of padding, and a sequence without a target, has no token."""
        places = batch.get("dump", np.zeros(len(batch["sequence_id"]), np.int64))
        rows: list[tuple[np.ndarray, int]] = []
        for row, (sequence, place) in enumerate(zip(batch["sequence_id"], places, strict=True)):
            rationales = self.rationales[max(int(place), 0)]
            [positions] = rationales.of(np.array([sequence], np.int64))
            if sequence < 0 or positions[0] < 0:
                rows.append((np.empty(0, np.int64), 0))
                continue
            tokens, is_target = batch["input_ids"][row], batch["is_target"][row]
            context = tokens[: np.flatnonzero(is_target)[-1]][~is_target[: np.flatnonzero(is_target)[-1]]]
            ids = np.concatenate([context, self.marker, tokens[positions]]).astype(np.int64)
            rows.append((ids, len(positions)))
        width = max(1, *(len(ids) for ids, _ in rows))
        second = np.full((len(rows), width), -1, np.int64)
        counted = np.zeros((len(rows), width), bool)
        for row, (ids, count) in enumerate(rows):
            second[row, : len(ids)] = ids
            counted[row, len(ids) - count : len(ids)] = True
        return {**batch, IDS: second, COUNTED: counted}
