"""Publishing a file so that a reader sees all of it or nothing, and nothing published is ever replaced.

A file is written under a temporary name, flushed to the disk, and then *linked* to its name: `link` fails when the
name is taken, where a rename would replace what stands there. The folder is flushed last, so that the name survives a
power cut. A writer that finds the name taken leaves what is there alone.

A process that is killed leaves its temporary file behind. Its writer holds an `flock` on it for as long as it lives, so
anyone can tell a file in use from a leftover, on any machine that shares the file system, with no clock and no
process ids. A folder is removed under a temporary name too, which any number of processes may go on with.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from knowledge_store.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Say what the disk refuses, and of which file, as "cannot DOING PATH: why" (StoreError)."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {doing} {error.filename or path}: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Create a folder (its parent exists or is created too), or find it there: either way it survives a power cut.

    Raises:
        StoreError: there is a file of that name, or a link to nothing, or the disk refuses.
    """
    with disk_errors("create the folder", folder):
        if not folder.is_dir():
            if not folder.parent.is_dir():
                make_folder(folder.parent)
            try:
                folder.mkdir(exist_ok=True)
            except FileExistsError:
                raise StoreError(f"{folder} is not a folder, where one of the store should be") from None
        # Also where it was found: whoever made it may have died before its name was flushed.
        try:
            fsync_folder(folder.parent)
        except PermissionError:  # the parent of a store may belong to others, and be unreadable: all disks are flushed instead
            os.sync()


def _open_temporary(folder: Path, name: str) -> tuple[Path, BinaryIO]:
    while True:
        path = folder / f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:12]}"
        file = open(path, "xb")  # noqa: SIM115 — the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else somebody tidied it away before it was locked
                return path, file
        except OSError:
            path.unlink(missing_ok=True)
            file.close()
            raise
        file.close()


def publish(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Write a file and give it its name, unless that name is taken.

    Args:
        path: the name; its folder must exist.
        write: writes the contents to the open file it is given.

    Returns:
        True when this call published the file; False when the name was taken, and what stands there is untouched.

    Raises:
        StoreError: the disk is full or otherwise refuses; the message names the file.
    """
    try:
        if path.exists():
            fsync_folder(path.parent)  # whoever published it may not have come so far
            return False
        temporary, file = _open_temporary(path.parent, path.name)
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                    published = True
                except FileExistsError:
                    published = False
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    return published


def publish_bytes(path: Path, data: bytes) -> bool:
    """`publish` for contents that are at hand."""
    return publish(path, lambda file: write_bytes(file, data))


def write_bytes(file: BinaryIO, data: bytes) -> None:
    """Write contents that are at hand."""
    file.write(data)


@contextmanager
def prepared(path: Path, write: Callable[[BinaryIO], None]) -> Iterator[Path]:
    """Write a file that is to take the place of a damaged one, and flush it to the disk.

    Yields:
        its temporary name, for `put_in_place`; what still has that name afterwards is removed.

    Raises:
        StoreError: the disk is full or otherwise refuses; the message names the file.
    """
    try:
        temporary, file = _open_temporary(path.parent, path.name)
        with file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def put_in_place(temporary: Path, path: Path) -> None:
    """Let a prepared file take the place of one that is damaged or gone.

    Raises:
        StoreError: the folder cannot be written.
    """
    try:
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same folder.

    Raises:
        StoreError: the folder cannot be opened, or its file system has no locks.
    """
    with disk_errors("lock", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with disk_errors("lock", folder):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, data: bytes) -> None:
    """Put a derived file in place of the one there is, at once; for files that may be lost at any time.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary, file = _open_temporary(path.parent, path.name)
    try:
        with file:
            file.write(data)
            file.flush()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it: it disappears at once, then its files are deleted.

    Raises:
        StoreError: it cannot be removed; says what is left.
    """
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}removed-{folder.name}-{uuid.uuid4().hex[:12]}")
    try:
        folder.rename(doomed)
        fsync_folder(folder.parent)
    except OSError as error:
        raise StoreError(f"cannot remove {folder}: {error.strerror}") from None
    shutil.rmtree(doomed, ignore_errors=True)
    if doomed.exists():
        raise StoreError(f"{folder} was removed, but some of its files could not be deleted: delete {doomed}")


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files in a folder whose writers are gone, and folders whose removal was cut off.

    Returns:
        how many there were.
    """
    removed = 0
    leftovers: list[Path] = []
    with suppress(OSError):  # a folder that cannot be listed now is tidied by a later run
        leftovers.extend(folder.glob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        try:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
                continue
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            removed += 1
        except OSError:  # in use, gone already, or somebody else's to remove
            continue
    return removed
