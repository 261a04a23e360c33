"""A dump's groups as pairs that TRL's DPOTrainer learns from, with what the dump's teacher, as the reference, thinks of them.

    FILE.parquet            a row for each group:
      prompt_ids              list<int64>, the tokens before the answers
      chosen_ids              list<int64>, those of the answer with the highest score, of equals the first: from where they
                              begin to count for training to the last that does
      rejected_ids            the same of the answer with the lowest score, of equals the last
      ref_chosen_logps        double, in nats: the sum of `token_logprob` over the tokens of `chosen_ids`
      ref_rejected_logps      the same over those of `rejected_ids`
      chosen_sequence_id, rejected_sequence_id   int64, the sequences in the dump

These are the columns that DPOTrainer makes of texts and that its collator reads. They are token ids, since nothing promises
that text made of tokens becomes the same tokens again, and log-probabilities of other tokens would be wrong without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.reading.groups import Groups
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage.new_file import new_file

ROWS = 1024  # of a row group
IDS = pa.list_(pa.int64())
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), IDS),
        **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), pa.float64()),
        **dict.fromkeys(("chosen_sequence_id", "rejected_sequence_id"), pa.int64()),
    }
)
NO_SCORE = "an answer has no score"
EQUAL = "the scores are equal"
SPLIT = "other tokens stand between an answer's targets"
APART = "the tokens before the two answers differ"
UNKNOWN = "the log-probability of a token is not known"


@dataclass(frozen=True)
class ExportedPairs:
    """How many pairs were written, and for each reason how many groups were left out."""

    pairs: int
    left_out: Counter[str] = field(default_factory=Counter)


class _Unfit(Exception):
    """A group cannot be written as a pair; says why."""


def export_dpo(
    groups: Groups, read: Callable[[int], tuple[int, Arrays]], output: Path, *, reporter: Reporter = SILENT
) -> ExportedPairs:
    """Write groups as pairs to a new Parquet file.

    Args:
        groups: of a dump.
        read: the id and the `positions` of a sequence, by its ordinal.
        output: the file; it has its name once it is whole.
        reporter: hears of the progress.

    Raises:
        InputError: no group can be written, or the file exists already or cannot be written.
        DamageError: a file of the store is not what was published.
    """
    left_out: Counter[str] = Counter()
    rows: list[dict[str, object]] = []
    pairs = 0
    with (
        new_file(output) as unfinished,
        pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer,
        reporter.progress("exporting pairs", len(groups.firsts), "groups") as advance,
    ):
        for first in groups.firsts[np.arange(len(groups.firsts))].tolist():
            members = groups.members(first)
            try:
                rows.append(_pair(members, groups.scores(members), read))
                pairs += 1
            except _Unfit as problem:
                left_out[str(problem)] += 1
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                rows = []
            advance(1)
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        if not pairs:
            reasons = "; ".join(f"of {count:,} {reason}" for reason, count in left_out.most_common())
            raise InputError(f"there is no group to write ({reasons or 'the dump has none yet'})")
    return ExportedPairs(pairs, left_out)


def _pair(members: np.ndarray, scores: np.ndarray, read: Callable[[int], tuple[int, Arrays]]) -> dict[str, object]:
    """The columns of a group (_Unfit: it cannot be written)."""
    if np.isnan(scores).any():
        raise _Unfit(NO_SCORE)
    if scores.max() == scores.min():
        raise _Unfit(EQUAL)
    last_lowest = len(scores) - 1 - np.argmin(scores[::-1])
    (chosen_id, chosen), (rejected_id, rejected) = (read(int(members[place])) for place in (np.argmax(scores), last_lowest))
    (prompt, *of_chosen), (other_prompt, *of_rejected) = _parts(chosen), _parts(rejected)
    if not np.array_equal(prompt, other_prompt):
        raise _Unfit(APART)
    return {
        "prompt_ids": prompt,
        **dict(zip(("chosen_ids", "ref_chosen_logps"), of_chosen, strict=True)),
        **dict(zip(("rejected_ids", "ref_rejected_logps"), of_rejected, strict=True)),
        "chosen_sequence_id": chosen_id,
        "rejected_sequence_id": rejected_id,
    }


def _parts(sequence: Arrays) -> tuple[np.ndarray, np.ndarray, float]:
    """The tokens before a sequence's targets, the targets, and the sum of their log-probabilities."""
    places = np.flatnonzero(sequence["is_target"])
    if not len(places) or places[-1] - places[0] + 1 != len(places):
        raise _Unfit(SPLIT)
    logprobs = sequence["token_logprob"][places].astype(np.float64)
    if not np.isfinite(logprobs).all():
        raise _Unfit(UNKNOWN)
    tokens = sequence["input_ids"].astype(np.int64)
    return tokens[: places[0]], tokens[places], float(logprobs.sum())
