"""What the three commands share when they talk to a person: where lines go, and how errors end.

Results go to standard output, so that they can be piped; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from knowledge_store.errors import KnowledgeStoreError
from knowledge_store.sql.answers import visible

output = Console(soft_wrap=True, highlight=False)
messages = Console(stderr=True, soft_wrap=True, highlight=False)

BAD_INPUT = 2
INTERRUPTED = 130


def note(text: str, strong: bool = False) -> None:
    """Say something to the person at the terminal (standard error, plain text, one line), in bold where it is `strong`."""
    messages.print(visible(text), markup=False, style="bold" if strong else None)


def end_at_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does."""

    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def command_errors() -> Iterator[None]:
    """Run a command's body: a user's mistake is one line and exit code 2, Ctrl-C is exit code 130."""
    try:
        yield
    except KnowledgeStoreError as error:
        note(f"Error: {' '.join(str(error).split())}")
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        note("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
