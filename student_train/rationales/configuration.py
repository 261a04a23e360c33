"""What `student-train rationales` is asked to do. Imports no torch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from knowledge_store.configuration import DumpOptions, StoreOptions
from knowledge_store.options import option


@dataclass(frozen=True)
class RationalesConfig(DumpOptions, StoreOptions):
    """An analysis of rationales; each field is an option of `student-train rationales`."""

    _: KW_ONLY
    rationale_tokens: int = option(5, min=1, help="Tokens of a rationale.")
    rationale_dump: str | None = option(
        None, names_dump=True, help="Dump of the same corpus that holds the saliency, where the other does not."
    )
    chance: float | None = option(
        None,
        min=0,
        max=1,
        help="Share of answers that are right by guessing, such as 0.2 for five options. Without it, that of always giving the"
        " commonest answer.",
    )
