"""Giving a file that is written its name, on file systems that differ in what they have for it.

A hard link gives a name that is free, and fails where it is taken. exFAT, most network drives and many mounts of clouds have no
hard links: there the file is renamed, while a lock on a file beside it keeps other processes from doing so at the same time.
Some clusters mount their disks without locks (`flock`); they have hard links, and need none.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
NAMES_LOCK = f"{TEMPORARY_PREFIX}names"

# What `link` and `flock` say on file systems that have no such thing.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
# What `fsync` says of a folder, where folders cannot be flushed.
_NOT_FLUSHED = (errno.EINVAL, errno.EBADF)


def give_name(temporary: Path, path: Path) -> bool:
    """Give a file its name, in its own folder, unless that name is taken; the old name may stay.

    Returns:
        whether it has the name.

    Raises:
        OSError: the disk refuses, or has neither hard links nor locks.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    with names_locked(path.parent) as locked:
        if not locked:
            raise OSError(errno.ENOTSUP, "its file system has neither hard links nor locks (flock)", str(path.parent))
        if os.path.lexists(path):
            return False
        temporary.rename(path)
    return True


@contextmanager
def names_locked(folder: Path) -> Iterator[bool]:
    """Hold the lock on the names of a folder, whose file is removed afterwards.

    Yields:
        False where the file system has no locks.

    Raises:
        OSError: the disk refuses.
    """
    lock = folder / NAMES_LOCK
    while True:
        # It is only read, since another user may have made it.
        with open(lock, "rb", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666)) as file:
            locked = lock_file(file)
            if locked and not is_at(lock, file.fileno()):
                continue  # whoever held it has removed it
            try:
                yield locked
            finally:
                lock.unlink(missing_ok=True)
                if locked:
                    fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may have it open for as long as it lives
            return


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has its name: what was locked may have been removed, and made again, before."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def lock_file(file: BinaryIO) -> bool:
    """Wait for the lock of a file, and hold it until the file is closed.

    Returns:
        False where the file system has no locks.

    Raises:
        OSError: the disk refuses.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FLUSHED:
            raise
    finally:
        os.close(descriptor)
