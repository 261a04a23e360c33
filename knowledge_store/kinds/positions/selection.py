"""Selection: the rule that picks what is kept of a teacher's distribution.

    top-k        the k likeliest tokens
    top-p        the fewest likeliest tokens whose probability reaches `p`, at most `max_k` of them
    threshold    every token whose probability is at least the draw weight

Draws come from the tail, the tokens that are not candidates. Each stands for the same probability τ, the draw weight, at every
position: they lie τ apart on the running sum of the tail's probabilities, from a random start. So a token of probability q is
drawn q / τ times on average, candidates and draws together are an unbiased target, and a position has as many draws as its tail
is large (systematic sampling with probability proportional to size; Horvitz and Thompson 1952 for the weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from knowledge_store.errors import InputError

NAMES = ("top-k", "top-p", "threshold")
DRAW_WEIGHT = 0.05  # of a dump of which nothing else is said
MIN_DRAW_WEIGHT = 2.0**-16  # so many draws a position are still held in memory
MAX_DRAW_SEED = 2**32 - 1
ROUNDING = 1e-6  # by which float32 probabilities may sum to more than one


def most_above(probability: float) -> int:
    """How many tokens of a distribution can have at least so much probability."""
    return int((1 + ROUNDING) / probability)


@dataclass(frozen=True)
class Selection:
    """A selection.

    Attributes:
        name: one of `NAMES`.
        candidates: most candidates at a position: k, max_k, or as many as can reach the threshold (`threshold` counts them).
        draw_weight: the probability that each draw stands for; 0 for no draws.
        draw_seed: decides, with the sequence and the position, where draws start.
        p: the probability that the candidates of top-p reach; 1 for the others.
    """

    name: str = "top-k"
    candidates: int = 5
    draw_weight: float = 0.0
    draw_seed: int = 0
    p: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"there is no selection {self.name!r}: choose one of {', '.join(NAMES)}")
        if self.draw_weight and not MIN_DRAW_WEIGHT <= self.draw_weight < 1:
            limits = f"at least 1/{1 / MIN_DRAW_WEIGHT:,.0f} and below 1, or 0 for no draws"
            raise InputError(f"the draw weight is {self.draw_weight}; it must be {limits}")
        if self.name == "threshold" and not self.draw_weight:
            raise InputError("the selection threshold needs a draw weight above 0: what is less likely is drawn")
        if not 0 <= self.draw_seed <= MAX_DRAW_SEED or (self.draw_seed and not self.draw_weight):
            raise InputError(
                f"the draw seed is {self.draw_seed}; it must be 0 to {MAX_DRAW_SEED:,}, and 0 where nothing is drawn"
            )
        if not 0 < self.candidates < 2**31 or (self.name == "threshold" and self.candidates != most_above(self.draw_weight)):
            raise InputError(f"the selection {self.name} cannot have {self.candidates} candidates at most")
        if not 0 < self.p <= 1:
            raise InputError(f"the candidates' probability is {self.p}; it must be above 0 and at most 1")

    @classmethod
    def threshold(cls, draw_weight: float, draw_seed: int = 0) -> Selection:
        """The selection `threshold`.

        Raises:
            InputError: the draw weight is out of range.
        """
        candidates = most_above(draw_weight) if draw_weight >= MIN_DRAW_WEIGHT else 1
        return cls("threshold", candidates, draw_weight, draw_seed)

    def to_record(self) -> dict[str, Any]:
        """The selection as the manifest has it."""
        sizes: dict[str, dict[str, Any]] = {"top-k": {"k": self.candidates}, "top-p": {"p": self.p, "max_k": self.candidates}}
        draws = {"draw_weight": self.draw_weight, "draw_seed": self.draw_seed} if self.draw_weight else {}
        return {"name": self.name, **sizes.get(self.name, {}), **draws}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Selection:
        """The selection of a manifest.

        Raises:
            ValueError: it is not one.
        """
        sizes = {"top-k": {"k"}, "top-p": {"p", "max_k"}, "threshold": set()}
        name, draws = record.get("name", ""), {"draw_weight", "draw_seed"}
        keys = record.keys() - {"name"}
        if name not in sizes or keys - draws != sizes[name] or keys & draws not in (draws, set()):
            raise ValueError(f"its selection, {record}, is not one that is known here")
        whole = {key: value for key, value in record.items() if key in ("k", "max_k", "draw_seed")}
        if any(not isinstance(value, int) or isinstance(value, bool) for value in whole.values()):
            raise ValueError("its selection does not count in whole numbers")
        for key in ("p", "draw_weight"):
            if not isinstance(record.get(key, 1.0), int | float) or isinstance(record.get(key), bool):
                raise ValueError(f"its selection has a {key} that is not a number")
        if "draw_weight" in record and not record["draw_weight"]:
            raise ValueError("its selection has draws that stand for nothing")
        weight, seed = float(record.get("draw_weight", 0)), record.get("draw_seed", 0)
        try:
            if name == "threshold":
                return cls.threshold(weight, seed)
            return cls(name, record.get("k", record.get("max_k", 0)), weight, seed, float(record.get("p", 1)))
        except InputError as error:
            raise ValueError(str(error)) from None

    def __str__(self) -> str:
        draws = f"draws of weight {self.draw_weight:g}{f', seed {self.draw_seed}' if self.draw_seed else ''}"
        if self.name == "threshold":
            return f"threshold {self.draw_weight:g} + {draws}"
        size = f"top-k {self.candidates}" if self.name == "top-k" else f"top-p {self.p:g}, at most {self.candidates}"
        return f"{size} + {draws}" if self.draw_weight else size


def difference(dump: str, rule: Selection, other_dump: str, other: Selection) -> str:
    """What two dumps keep of the distribution, where that is not the same, in a sentence."""
    if (rule.name, rule.candidates, rule.p) != (other.name, other.candidates, other.p):
        return f"the selection of positions is {rule} in {dump} and {other} in {other_dump}"
    if rule.draw_weight == other.draw_weight:
        return f"{dump} draws with seed {rule.draw_seed} and {other_dump} with seed {other.draw_seed}"
    kept, other_kept = (f"draws of weight {weight:g}" if weight else None for weight in (rule.draw_weight, other.draw_weight))
    return f"{dump} keeps {kept or 'no draws'} and {other_dump} keeps {other_kept or 'none'}"
