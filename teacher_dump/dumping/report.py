"""What one call of `dump` or `repair` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DumpReport:
    """What one call of `dump` or `repair` did.

    Attributes:
        dump: its name.
        shards: committed by this call; shards_planned: in the whole dump.
        shards_existing: of this rank's, those that needed nothing.
        positions, seconds: of this call.
        skipped: by reason, how many rows of this call's shards were skipped.
        truncated: how many sequences of this call's shards were cut off at the maximum length.
    """

    dump: str
    shards: int
    shards_existing: int
    shards_planned: int
    positions: int = 0
    seconds: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0

    @property
    def skipped_rows(self) -> int:
        """How many rows of this call's shards were skipped."""
        return sum(self.skipped.values())
