"""What decides, beside a row and the tokenizer, which tokens a conversation has and which of them are targets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date
from typing import Any

TRAIN_ON = ("all", "last")


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered, as a manifest keeps it.

    Attributes:
        date: ISO date (2026-01-31) that a template is given when it asks for today's (`strftime_now`).
        train_on: `all` assistant messages are targets, or the `last` one alone.
        template: text of a chat template that stands in for the tokenizer's; None for the tokenizer's.
    """

    date: str
    train_on: str = "all"
    template: str | None = None

    @classmethod
    def today(cls, train_on: str = "all", template: str | None = None) -> ChatOptions:
        """The options of a dump that begins today."""
        return cls(date.today().isoformat(), train_on, template)

    def to_record(self) -> dict[str, Any]:
        """As a manifest says it."""
        record: dict[str, Any] = {"date": self.date, "train_on": self.train_on}
        if self.template is not None:
            record["template"] = self.template
            record["template_sha256"] = hashlib.sha256(self.template.encode()).hexdigest()
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ChatOptions:
        """The options that a manifest says."""
        return cls(record["date"], record["train_on"], record.get("template"))

    def clock(self) -> dict[str, str]:
        """What each directive of strftime gives at the beginning of `date`."""
        day = date.fromisoformat(self.date)
        names = [f"%{letter}" for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"]
        return {name: day.strftime(name) for name in [*(f"%-{letter}" for letter in "dHIjmMSyU"), *names]}
