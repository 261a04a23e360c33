"""One progress bar for everything that takes long: rate, time left, and a few live figures.

On a terminal it is a live bar; anywhere else (a log file, CI) it is a plain line every ten seconds, so that a log
shows progress without thousands of lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from knowledge_store.quantities import duration
from knowledge_store.reporter import Advance, Reporter
from knowledge_store.terminal.console import messages, note

LOG_SECONDS = 10.0


def _figures(figures: dict[str, str]) -> str:
    return " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())


@contextmanager
def progress_bar(title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show progress towards `total` while the body runs.

    Args:
        title: what is being done (`"dumping"`).
        total: how much there is to do, in any unit; None when unknown.
        unit: shown behind counts; empty for a bar of percentages alone.
    """
    if messages.is_terminal:
        with _live_bar(title, total, unit) as advance:
            yield advance
    else:
        with _log_lines(title, total, unit) as advance:
            yield advance


@contextmanager
def _live_bar(title: str, total: float | None, unit: str) -> Iterator[Advance]:
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    if unit:
        columns += [MofNCompleteColumn(), TextColumn(unit)]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}")]
    with Progress(*columns, console=messages) as progress:
        task = progress.add_task(title, total=total, figures="")

        def advance(amount: float, **figures: str) -> None:
            if figures:
                progress.update(task, advance=amount, figures=_figures(figures))
            else:
                progress.advance(task, amount)

        yield advance


@contextmanager
def _log_lines(title: str, total: float | None, unit: str) -> Iterator[Advance]:
    started = printed = time.monotonic()
    done = 0.0
    latest: dict[str, str] = {}

    def line(now: float) -> str:
        spent = now - started
        parts = [f"{title}:"]
        if total:
            parts.append(f"{100 * done / total:.0f}%")
        if unit:
            parts.append(f"{done:,.0f}{f' of {total:,.0f}' if total else ''} {unit}")
        parts.append(f"in {duration(spent)}")
        if total and 0 < done < total:
            parts.append(f"({duration(spent * (total - done) / done)} left)")
        if latest:
            parts.append(f"· {_figures(latest)}")
        return " ".join(parts)

    def advance(amount: float, **figures: str) -> None:
        nonlocal done, printed
        done += amount
        latest.update(figures)
        now = time.monotonic()
        if now - printed >= LOG_SECONDS:
            printed = now
            messages.print(line(now), markup=False)

    yield advance
    messages.print(line(time.monotonic()), markup=False)


class TerminalReporter(Reporter):
    """Tells the person at the terminal, on standard error."""

    def note(self, sentence: str) -> None:
        note(sentence)

    @contextmanager
    def progress(self, title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        with progress_bar(title, total, unit) as advance:
            yield advance
