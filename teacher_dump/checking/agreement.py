"""What the check of a kind of knowledge comes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER = "agrees", "damage", "another teacher", "another tokenizer"


@dataclass(frozen=True, kw_only=True)
class Agreement(ABC):
    """How far a teacher agrees with one kind of knowledge of a dump; that kind's checker has a class of its own.

    Attributes:
        dump, sequences: what was compared.
        verdict: one of AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER.
        reasons: what it rests on, one sentence each.
        notes: what else a person should know.
    """

    dump: str
    sequences: int
    verdict: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing but numeric noise was found."""
        return self.verdict == AGREES

    @property
    @abstractmethod
    def lines(self) -> list[str]:
        """The agreement in words, one sentence or row of a table each."""
