"""What long calls of the libraries tell while they work. Libraries never print: a caller passes a reporter, or hears nothing.

`terminal.progress.TerminalReporter` is the one that the commands pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called when `amount` units more are done; `figures` are shown beside them (`coverage="0.62"`)."""

    def __call__(self, amount: float, **figures: str) -> None: ...


class Reporter:
    """Hears of notes and of progress. This one stays silent; others override its two methods."""

    def note(self, sentence: str) -> None:
        """Something that a person should know."""

    @contextmanager
    def progress(self, title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        """Progress towards `total` while the body runs.

        Args:
            title: what is being done (`"dumping"`).
            total: how much there is to do, in any unit; None when unknown.
            unit: of what is counted; empty where only shares matter.
        """
        yield lambda amount, **figures: None


SILENT = Reporter()
