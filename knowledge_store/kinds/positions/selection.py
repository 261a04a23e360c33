"""Selection: the rule that picks what is kept of a teacher's distribution.

    top-k              the k likeliest tokens
    top-p              the fewest likeliest tokens whose probability reaches `p`, at most `max_k` of them
    random-sampling    no candidates: draws from the whole distribution (RS-KD, Sparse Logit Sampling, ACL 2025)

The first two may add draws from the tail, the tokens that are not candidates. A drawn token stands for tail / draws of
probability each time it was drawn, so that candidates and draws together are an unbiased target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knowledge_store.errors import InputError

NAMES = ("top-k", "top-p", "random-sampling")
MAX_DRAWS = 2**16 - 1  # counts are stored as uint16


@dataclass(frozen=True)
class Selection:
    """A selection.

    Attributes:
        name: one of `NAMES`.
        candidates: most candidates at a position: k, max_k, or 0.
        draws: from the tail (from the whole distribution where there are no candidates), with replacement.
        p: the probability that the candidates of top-p reach; 1 for the others.
    """

    name: str = "top-k"
    candidates: int = 5
    draws: int = 0
    p: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"there is no selection {self.name!r}: choose one of {', '.join(NAMES)}")
        if (self.candidates == 0) != (self.name == "random-sampling") or not 0 <= self.candidates < 2**31:
            raise InputError(f"the selection {self.name} cannot have {self.candidates} candidates at most")
        if not 0 <= self.draws <= MAX_DRAWS or (self.name == "random-sampling" and not self.draws):
            raise InputError(f"{self.draws} draws cannot be made: at least {int(not self.candidates)}, at most {MAX_DRAWS:,}")
        if not 0 < self.p <= 1:
            raise InputError(f"the candidates' probability is {self.p}; it must be above 0 and at most 1")

    def to_record(self) -> dict[str, Any]:
        """The selection as the manifest has it."""
        if self.name == "random-sampling":
            return {"name": self.name, "draws": self.draws}
        size = {"k": self.candidates} if self.name == "top-k" else {"p": self.p, "max_k": self.candidates}
        return {"name": self.name, **size, **({"tail_draws": self.draws} if self.draws else {})}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Selection:
        """The selection of a manifest.

        Raises:
            ValueError: it is not one.
        """
        shapes = {
            "top-k": ({"name", "k"}, {"tail_draws"}),
            "top-p": ({"name", "p", "max_k"}, {"tail_draws"}),
            "random-sampling": ({"name", "draws"}, set()),
        }
        name = record.get("name", "")
        required, optional = shapes.get(name, (set(), set()))
        if name not in shapes or not required <= record.keys() <= required | optional:
            raise ValueError(f"its selection, {record}, is not one that is known here")
        whole = {key: value for key, value in record.items() if key not in ("name", "p")}
        if any(not isinstance(value, int) or isinstance(value, bool) for value in whole.values()):
            raise ValueError("its selection does not count in whole numbers")
        p = record.get("p", 1.0)
        if not isinstance(p, int | float) or isinstance(p, bool):
            raise ValueError("its selection has a p that is not a number")
        draws = record.get("tail_draws", record.get("draws", 0))
        try:
            return cls(name, record.get("k", record.get("max_k", 0)), draws, float(p))
        except InputError as error:
            raise ValueError(str(error)) from None

    def __str__(self) -> str:
        if self.name == "random-sampling":
            return f"random-sampling, {self.draws} draws"
        size = f"top-k {self.candidates}" if self.name == "top-k" else f"top-p {self.p:g}, at most {self.candidates}"
        return f"{size} + {self.draws} tail draws" if self.draws else size


def difference(dump: str, rule: Selection, other_dump: str, other: Selection) -> str:
    """What two dumps keep of the distribution, where that is not the same, in a sentence."""
    if (rule.name, rule.candidates, rule.p) != (other.name, other.candidates, other.p):
        return f"the selection of positions is {rule} in {dump} and {other} in {other_dump}"
    kept, other_kept = (f"{draws} draws a position" if draws else None for draws in (rule.draws, other.draws))
    return f"{dump} keeps {kept or 'no draws'} and {other_dump} keeps {other_kept or 'none'}"
