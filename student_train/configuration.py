"""Options that several commands of `student-train` share. Imports no torch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from knowledge_store.options import option


@dataclass(frozen=True)
class BatchOptions:
    """Of a command that runs a model."""

    _: KW_ONLY
    batch_size: int = option(8, min=1, help="Sequences, or groups of answers, in one forward pass of one process.")
