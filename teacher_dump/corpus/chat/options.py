"""What decides, beside a row and the tokenizer, which tokens a conversation has and which of them are targets."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError

TRAIN_ON = ("all", "last")


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered.

    Attributes:
        date: ISO date (2026-01-31) that a template is given when it asks for today's (`strftime_now`).
        train_on: `all` assistant messages are targets, or the `last` one alone.
        template: text of a chat template that stands in for the tokenizer's; None for the tokenizer's.
    """

    date: str
    train_on: str = "all"
    template: str | None = None

    @classmethod
    def asked(cls, file: Path | None, train_on: str | None, date: str | None, kept: dict[str, Any]) -> ChatOptions:
        """What a command asks for.

        Args:
            file: of a chat template.
            train_on, date: as above; None where the command does not say.
            kept: the record of the dump that exists, which says what the command does not; empty without one.

        Raises:
            InputError: the file cannot be used.
        """
        return cls(
            date or kept.get("date") or today(),
            train_on or kept.get("train_on") or TRAIN_ON[0],
            kept.get("template") if file is None else template_text(file),
        )

    def record(self, dated: bool) -> dict[str, Any]:
        """As a manifest keeps it.

        Args:
            dated: whether the template may ask for the date.
        """
        record: dict[str, Any] = {"train_on": self.train_on, **({"date": self.date} if dated else {})}
        if self.template is None:
            return record
        sha256 = hashlib.sha256(self.template.encode()).hexdigest()
        return {**record, "template": self.template, "template_sha256": sha256}

    def clock(self) -> dict[str, str]:
        """What each directive of strftime gives at the beginning of `date`."""
        day = date.fromisoformat(self.date)
        names = [*(f"%-{letter}" for letter in "dHIjmMSyU"), *(f"%{letter}" for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ")]
        return {name: day.strftime(name) for name in names}


def today() -> str:
    """Today's date, as ISO writes it."""
    return date.today().isoformat()


def check_date(text: str) -> None:
    """Make sure that a date is one.

    Raises:
        InputError: it is not.
    """
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text) is None:
            raise ValueError
        date.fromisoformat(text)
    except ValueError:
        raise InputError(f"--template-date {text} is no date: write it as 2026-01-31") from None


def template_text(file: Path) -> str:
    """The chat template of a file.

    Raises:
        InputError: it cannot be read, or has no text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read --chat-template {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"--chat-template {file} is not UTF-8") from None
    if not text.strip():
        raise InputError(f"--chat-template {file} is empty")
    return text
