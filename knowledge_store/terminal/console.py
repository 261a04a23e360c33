"""What the three commands share when they talk to a person: where lines go, and how errors end.

Results go to standard output, so that they can be piped; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
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


# What stands for the signs of these programs where an encoding lacks them.
ASCII_SIGNS = {"⟦": "[[", "⟧": "]]", "│": "|", "·": "_", "↵": "\\n", "⇥": "\\t", "✂": "--", "…": "...", "−": "-", "×": "x"}
_WITH_ASCII_SIGNS = "knowledge-store-ascii-signs"


def _ascii(error: UnicodeError) -> tuple[str, int]:
    """The characters that an encoding lacks as ASCII, which all encodings have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    signs = (ASCII_SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(signs), error.end


codecs.register_error(_WITH_ASCII_SIGNS, _ascii)


def show_in_any_encoding() -> None:
    """Let this program write to standard output and standard error whatever they are encoded in."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors=_WITH_ASCII_SIGNS)


@contextmanager
def output_errors() -> Iterator[None]:
    """Run a program: standard output that cannot be written is one line and exit code 2.

    A reader that closes a pipe is no fault, and ends the program in silence.
    """
    try:
        yield
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or (problem := _refused_output()) is None:  # it is of something else
            raise
        _discard_output()
        note(f"Error: standard output cannot be written: {problem}")
        sys.exit(BAD_INPUT)


def _discard_output() -> None:
    """Let what is left in buffers go nowhere, so that it is not tried again when the program ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused_output() -> str | None:
    """Why standard output takes no more; None where it does."""
    try:
        os.write(sys.stdout.fileno(), b"\n")  # what was refused is lost where nothing is buffered: only another byte tells
    except BrokenPipeError:
        return None
    except OSError as error:  # a stream that is no file has no number, and says so with one of these too
        return None if isinstance(error, io.UnsupportedOperation) else error.strerror
    return None


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
