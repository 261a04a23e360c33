"""What axolotl's distillation plugin prepares: rows of token ids, labels, and padded lists of the teacher's likeliest tokens.

`target_token_ids` and `target_logprobs` are (T, k), and `target_mask` is 0 where they are padding: −∞ or −10⁹. axolotl's loss
holds row j against the student's prediction of token j + 1; lists that were shorter than the tokens were filled up on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from teacher_dump.importers.configuration import PREDICTS
from teacher_dump.importers.layout import IGNORED, NO_CANDIDATE, BadLayout, Layout, LayoutRow, split
from teacher_dump.importers.rows import real_numbers, table_rows, wanted, whole_numbers

REQUIRED = ("input_ids", "target_token_ids", "target_logprobs")
OPTIONAL = ("labels", "attention_mask", "target_mask")


class Axolotl(Layout):
    """The layout `axolotl`."""

    predicts: ClassVar[str] = PREDICTS[1]
    slack: ClassVar[float] = 1e-2  # it makes probabilities sum to one in float32, or keeps those of bfloat16

    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """See `Layout`."""

        def columns(names: Sequence[str]) -> list[str]:
            if "target_logprobs" not in names and ("messages" in names or "logprobs" in names):
                raise BadLayout("it was not prepared: run `axolotl preprocess` on it, and import what that writes")
            return wanted(REQUIRED, OPTIONAL)(names)

        for row in table_rows(path, first, offset, columns, fill=-np.inf):
            found = row.columns
            ids = whole_numbers(found["input_ids"], "input_ids")
            candidates = whole_numbers(found["target_token_ids"], "target_token_ids", 2)
            logprobs = real_numbers(found["target_logprobs"], "target_logprobs", 2)
            labels, mask = found.get("labels"), found.get("attention_mask")
            if (valid := found.get("target_mask")) is not None and candidates.shape == logprobs.shape:
                places = real_numbers(valid, "target_mask", 2)
                if places.shape == logprobs.shape and labels is None:  # with labels it says no more than they do
                    candidates = np.where(places > 0, candidates, NO_CANDIDATE)
            yield LayoutRow(
                row.number,
                row.offset,
                split(
                    ids,
                    candidates,
                    logprobs,
                    self.shift,
                    mask=None if mask is None else whole_numbers(mask, "attention_mask"),
                    is_target=None if labels is None else whole_numbers(labels, "labels") != IGNORED,
                ),
            )
