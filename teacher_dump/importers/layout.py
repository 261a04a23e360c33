"""What a layout gives of its files: sequences, and the predictions that stand beside them, as they were written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from teacher_dump.importers.configuration import PREDICTS, ImportConfig

NO_CANDIDATE = -1
NO_LOGPROB = -999.0  # nats: programs that cannot leave a candidate out write such numbers, −1000 or −10⁹, or −∞
IGNORED = -100  # the label of a token that does not count for training


class BadLayout(ValueError):
    """A file, or a row of it, is not of its layout; the message says why, and ends a sentence that names the place."""


@dataclass(frozen=True)
class Predictions:
    """One sequence of T tokens, and R predictions of up to K candidates, in any order.

    Attributes:
        token_ids: int64 (T,).
        places: int64 (R,): which token each of them predicts, above 0, below T, ascending.
        candidate_ids: int64 (R, K), NO_CANDIDATE for none.
        candidate_logprobs: float32 or float64 (R, K), nats.
        is_target: bool (T,); None where all that is predicted counts.
        token_logprobs: float64 (T,), NaN where unknown; None for none but those of candidates.
        tail_logprobs: float64 (R,), nats; None where the tail is what candidates leave.
    """

    token_ids: np.ndarray
    places: np.ndarray
    candidate_ids: np.ndarray
    candidate_logprobs: np.ndarray
    is_target: np.ndarray | None = None
    token_logprobs: np.ndarray | None = None
    tail_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class LayoutRow:
    """A row of a file.

    Attributes:
        number: counted from 1.
        offset: where it begins, in bytes of uncompressed text; 0 in binary files.
        sequences: that it holds: one, or as many as texts were packed into it; none that is shorter than two tokens.
    """

    number: int
    offset: int
    sequences: list[Predictions] = field(default_factory=list)


class Layout(ABC):
    """A layout, as a configuration has it.

    Attributes:
        predicts: of PREDICTS, what row j predicts where nobody says otherwise.
        slack: by how much probabilities may sum to more than one.
        narrow_ids: whether ids stand in few bits, of which the upper ones may have been lost.
        token_beside: whether the standing token is listed beside k candidates where it is none of them.
    """

    predicts: ClassVar[str] = PREDICTS[0]
    slack: ClassVar[float] = 1e-3
    narrow_ids: ClassVar[bool] = False
    token_beside: ClassVar[bool] = False

    def __init__(self, config: ImportConfig):
        self.config = config
        self.shift = PREDICTS.index(config.row_predicts or self.predicts)

    @property
    def vocabulary_size(self) -> int | None:
        """What the files say of it, None where they say nothing."""
        return None

    @abstractmethod
    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """The rows of a file from number `first` on, which begins at `offset`.

        Raises:
            BadLayout, InputError: it is not of this layout.
        """

    def record(self) -> dict[str, Any]:
        """What else than the files decides what the predictions are, for the manifest."""
        return {}


def segments(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where each text of a row begins and ends, from a mask (T,) that is 0 on padding and differs from text to text."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(mask)) + 1, [len(mask)]])
    return [(int(start), int(end)) for start, end in pairwise(edges) if end > start and mask[start]]


def split(
    token_ids: np.ndarray,
    candidate_ids: np.ndarray,
    candidate_logprobs: np.ndarray,
    shift: int,
    *,
    mask: np.ndarray | None = None,
    is_target: np.ndarray | None = None,
    token_logprobs: np.ndarray | None = None,
    tail_logprobs: np.ndarray | None = None,
) -> list[Predictions]:
    """The sequences of a row in which row j of the predictions is of token j + `shift`.

    Args:
        mask: (T,), 0 on padding, on whichever side, and another number for each text that was packed into the row. What was
            predicted of a text's first token, from the end of the text before, is left out.
        token_logprobs, tail_logprobs: (R,), as the predictions stand.

    Raises:
        BadLayout: lengths do not fit.
    """
    length, rows = len(token_ids), len(candidate_ids)
    if candidate_ids.shape != candidate_logprobs.shape:
        raise BadLayout(
            f"it has {candidate_ids.shape} token ids of candidates and {candidate_logprobs.shape} log-probabilities"
        )
    if rows > length:
        raise BadLayout(f"it has {rows:,} predictions for {length:,} tokens")
    for name, array, expected in (
        ("mask", mask, length),
        ("list of targets", is_target, length),
        ("list of the tokens' log-probabilities", token_logprobs, rows),
        ("list of tails", tail_logprobs, rows),
    ):
        if array is not None and len(array) != expected:
            raise BadLayout(f"its {name} has {len(array):,} entries, and {expected:,} belong there")
    sequences = []
    for start, end in [(0, length)] if mask is None else segments(mask):
        if end - start < 2:
            continue
        first, last = max(start + 1 - shift, 0), min(end - shift, rows)
        part = slice(first, max(last, first))
        known = None
        if token_logprobs is not None:
            known = np.full(end - start, np.nan)
            known[part.start + shift - start : part.stop + shift - start] = token_logprobs[part]
        sequences.append(
            Predictions(
                token_ids[start:end],
                np.arange(part.start, part.stop) + shift - start,
                candidate_ids[part],
                candidate_logprobs[part],
                None if is_target is None else is_target[start:end],
                known,
                None if tail_logprobs is None else tail_logprobs[part],
            )
        )
    return sequences
