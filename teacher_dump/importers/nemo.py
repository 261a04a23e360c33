"""JSON lines of NeMo-Aligner: the k largest logits of each token's prediction, and the log-sum-exp of all of them.

`tokens` and `labels` are the same tokens, one apart: row j of `topk_logits`, `topk_token_ids` (T, k) and `log_sum_exp_logits`
(T,) predicts `labels[j]`, which counts where `loss_mask[j]` is 1. Rows are filled up on the right. Logits have their largest
taken off, so that they say nothing without the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from teacher_dump.importers.configuration import PREDICTS
from teacher_dump.importers.layout import BadLayout, Layout, LayoutRow, split
from teacher_dump.importers.rows import real_numbers, table_rows, wanted, whole_numbers

COLUMNS = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")


class NemoAligner(Layout):
    """The layout `nemo-aligner`."""

    predicts: ClassVar[str] = PREDICTS[1]
    slack: ClassVar[float] = 2e-2  # logits may be bfloat16

    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """See `Layout`."""
        for row in table_rows(path, first, offset, wanted(COLUMNS)):
            tokens, labels, mask = (whole_numbers(row.columns[name], name) for name in COLUMNS[:3])
            logits = real_numbers(row.columns["topk_logits"], "topk_logits", 2)
            ids = whole_numbers(row.columns["topk_token_ids"], "topk_token_ids", 2)
            total = real_numbers(row.columns["log_sum_exp_logits"], "log_sum_exp_logits")
            if not len(tokens) == len(labels) == len(mask) == len(logits) == len(total):
                raise BadLayout(f"row {row.number} has lists of several lengths, and one a token belongs there")
            end = int(np.flatnonzero(mask).max(initial=-1)) + 1  # what stands behind the last target is padding, or of no use
            if not end:
                yield LayoutRow(row.number, row.offset)
                continue
            if (tokens[1:end] != labels[: end - 1]).any():
                raise BadLayout(f"row {row.number} has labels that are not its tokens, one further")
            whole = np.concatenate([tokens[:end], labels[end - 1 : end]])
            targets = np.concatenate([[False], mask[:end] > 0])
            logprobs = (logits[:end].astype(np.float64) - total[:end, None]).astype(np.float32)  # as they were computed
            yield LayoutRow(row.number, row.offset, split(whole, ids[:end], logprobs, self.shift, is_target=targets))
