"""One run at a time in an output folder: its first process holds a lock on a file there for as long as it lives.

The lock is an `flock`, as a store's writers hold it: the system takes it back from a process that dies, however it dies, so
none is ever left behind. The file itself means nothing, and is removed when a run ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.reporter import Reporter
from knowledge_store.storage.naming import TEMPORARY_PREFIX, is_at

LOCK_FILE = f"{TEMPORARY_PREFIX}lock"

# Whoever looks whether there is a lock holds it together with others, for a moment: a run that begins then tries again.
_ATTEMPTS, _PAUSE = 20, 0.05

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked process, such as one that reads batches ahead, would hold the lock on when its parent is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _refusal(output: Path) -> InputError:
    return InputError(f"another process is training into {output}: wait until it ends, or choose another --output")


def check_unlocked(output: Path) -> None:
    """Refuse an output that another run is writing to (InputError)."""
    try:
        descriptor = os.open(output / LOCK_FILE, os.O_RDONLY)
    except OSError:  # there is none, or what is wrong with the folder is found by others
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(output) from None
    except OSError:  # a file system without locks
        return
    finally:
        os.close(descriptor)


@contextmanager
def locked(output: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of an output folder while the body runs; a folder that it makes is removed if it stays empty.

    Args:
        output: the folder.
        reporter: hears of a file system that has no locks; the body runs without one there.

    Raises:
        InputError: another process holds it, or the folder cannot be written.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = _take(output, reporter)
    except OSError as error:
        raise InputError(f"cannot create {error.filename or output}: {error.strerror}") from error
    _held.add(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            # Unless the folder was removed meanwhile, and made again for another run.
            if is_at(output / LOCK_FILE, descriptor):
                (output / LOCK_FILE).unlink()
                if made:
                    output.rmdir()  # nothing was written: a run that was refused leaves no folder
        _held.discard(descriptor)
        os.close(descriptor)


def _take(output: Path, reporter: Reporter) -> int:
    for _ in range(_ATTEMPTS):
        descriptor = os.open(output / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            time.sleep(_PAUSE)
            continue
        except OSError as error:
            reporter.note(f"Warning: {output} cannot be locked ({error.strerror}): start no other run with this --output.")
            return descriptor
        if os.fstat(descriptor).st_nlink:  # else a run that has just ended removed it
            return descriptor
        os.close(descriptor)
    raise _refusal(output)
