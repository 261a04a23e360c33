"""A store in a folder: a reader sees all of a file or nothing, and nothing published is ever replaced.

A file is written under a temporary name, flushed to the disk, and then given its name, unless that is taken (see `naming`). The
folder is flushed last, so that the name survives a power cut. A writer that finds the name taken leaves what is there alone.

A process that is killed leaves its temporary file behind. Its writer holds an `flock` on it for as long as it lives, so
anyone can tell a file in use from a leftover, on any machine that shares the file system, with no clock and no
process ids. A folder is removed under a temporary name too, and any number of processes may resume its removal.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from knowledge_store.errors import DamageError, InputError, KnowledgeStoreError, MissingFileError, StoreError
from knowledge_store.storage.naming import NAMES_LOCK, TEMPORARY_PREFIX, fsync_folder, give_name, is_at, lock_file, names_locked
from knowledge_store.storage.protocol import Entry, Write

OPEN_FILES = 64


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
            lock_file(file)
            if is_at(path, file.fileno()):  # else somebody tidied it away before it was locked
                return path, file
        except OSError:
            path.unlink(missing_ok=True)
            file.close()
            raise
        file.close()


def publish(path: Path, write: Write) -> bool:
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
                published = give_name(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    return published


@contextmanager
def prepared(path: Path, write: Write) -> Iterator[Path | None]:
    """Write a file that is to take the place of a damaged one, and flush it to the disk.

    Yields:
        its temporary name, for `put_in_place`; what still has that name afterwards is removed. None where
        `write` returned False.

    Raises:
        StoreError: the disk is full or otherwise refuses; the message names the file.
    """
    try:
        temporary, file = _open_temporary(path.parent, path.name)
        with file:
            try:
                complete = write(file) is not False
                file.flush()
                os.fsync(file.fileno())
                yield temporary if complete else None
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
        with names_locked(path.parent):  # without hard links, a publisher that found the name free would replace it
            temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


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
                if not is_at(path, file.fileno()):  # another process has the file that is there now
                    continue
                path.unlink(missing_ok=True)
            removed += 1
        except OSError:  # in use, gone already, or somebody else's to remove
            continue
    return removed


def _regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file, as `open` takes it for its `opener`. To open a pipe as others do would be to wait for a writer.

    Raises:
        DamageError: it is a pipe, a folder or a device.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamageError(f"{path} is damaged: it is not a file")
    return descriptor


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _OpenFile:
    """An open file that is closed when nobody holds it."""

    def __init__(self, path: str):
        self.descriptor = _regular(path)
        weakref.finalize(self, os.close, self.descriptor)
        self.state = _state(os.fstat(self.descriptor))

    def read(self, start: int, end: int | None) -> bytes:
        """Bytes of the file, fewer where it ends before."""
        if end is None:
            end = os.fstat(self.descriptor).st_size
        parts = []
        while start < end and (part := os.pread(self.descriptor, end - start, start)):
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class LocalStorage:
    """The folder of a store (see `Storage`). The files that were read last are kept open; a copy opens its own.

    Args:
        root: the folder; it is made when the first file is published.
    """

    forkable = True
    at_once = 1  # a disk that is near answers before another thread is awake

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.address = str(self.root)
        self._files: dict[str, _OpenFile] = {}  # by path, the one used last at the end
        self._lasting: set[Path] = set()  # folders that are known to survive a power cut

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[Path]]:
        return LocalStorage, (self.root,)

    @property
    def cache_key(self) -> str:
        """The folder, however it is named."""
        return os.path.realpath(self.root)

    def locate(self, name: str) -> str:
        """The path of a file."""
        return str(self.root / name)

    def external_address(self, name: str) -> str:
        """The absolute path of a file."""
        return str((self.root / name).absolute())

    def _unreadable(self, path: str, error: OSError) -> KnowledgeStoreError:
        # Not `Path.is_symlink`, which raises where the disk refuses this call too.
        if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):  # noqa: PTH114
            return DamageError(f"{path} is damaged: it cannot be read ({error.strerror})")
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return MissingFileError(f"{path} is missing")
        return StoreError(f"cannot read {path}: {error.strerror or error}")

    def _status(self, name: str) -> os.stat_result:
        path = self.locate(name)
        try:
            status = Path(path).stat()
        except OSError as error:
            raise self._unreadable(path, error) from None
        if not stat.S_ISREG(status.st_mode):
            raise DamageError(f"{path} is damaged: it is not a file")
        return status

    def size(self, name: str) -> int:
        """Bytes of a file (MissingFileError, DamageError, StoreError)."""
        return self._status(name).st_size

    def version(self, name: str) -> str:
        """Its place on the disk, size and modification time (MissingFileError, DamageError, StoreError)."""
        return " ".join(map(str, _state(self._status(name))))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file (MissingFileError, DamageError, StoreError)."""
        path = self.locate(name)
        try:
            opened = self._files.pop(path, None)
            if opened is None or opened.state != _state(Path(path).stat()):  # replaced since, by repair
                opened = _OpenFile(path)
            self._files[path] = opened
            while len(self._files) > OPEN_FILES:
                self._files.pop(list(self._files)[0], None)  # noqa: RUF015 — another thread may change it meanwhile
            return opened.read(start, end)
        except OSError as error:
            raise self._unreadable(path, error) from None

    def files(self, prefix: str) -> list[Entry]:
        """The files directly under `prefix/`, by name (DamageError: it is no folder; StoreError)."""
        return sorted((entry for entry in self._entries(prefix) if isinstance(entry, Entry)), key=lambda entry: entry.name)

    def folders(self, prefix: str) -> list[str]:
        """The names of folders directly under `prefix/`, sorted (DamageError: it is no folder; StoreError)."""
        return sorted(entry for entry in self._entries(prefix) if isinstance(entry, str))

    def _entries(self, prefix: str) -> Iterator[Entry | str]:
        """Files, and names of folders, temporary ones left out."""
        folder = self.locate(prefix)
        with disk_errors("read", Path(folder)):
            try:
                listing = os.scandir(folder)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                if os.path.lexists(folder) and not Path(folder).is_dir():  # else another writer has just made it
                    raise DamageError(f"{folder} is damaged: it is not a folder") from None
                return
            with listing:
                for entry in listing:
                    if entry.name.startswith(TEMPORARY_PREFIX):
                        continue
                    try:
                        status = entry.stat()
                    except OSError:
                        if os.path.lexists(entry.path):  # a link to nothing: whoever reads it hears why
                            yield Entry(entry.name, 0, "")
                        continue  # removed since its name was read
                    if stat.S_ISDIR(status.st_mode):
                        yield entry.name
                    else:
                        yield Entry(entry.name, status.st_size, str(status.st_mtime_ns))

    def _make_folder(self, folder: Path) -> None:
        if folder in self._lasting:
            return
        if self.root not in (folder, folder.parent) and not folder.parent.is_dir():
            raise StoreError(f"cannot write in {folder}: {folder.parent} was removed")
        make_folder(folder)
        self._lasting.add(folder)

    def probe(self) -> None:
        """A file system that cannot give a free name to a file says so itself, in `create`."""

    def create(self, name: str, write: Write) -> bool:
        """Publish a file unless its name is taken; its folder is made (StoreError: the disk is full or otherwise refuses)."""
        path = self.root / name
        self._make_folder(path.parent)
        return publish(path, write)

    def replace(self, files: Sequence[tuple[str, Write]]) -> None:
        """Write files and flush them, then let each take its place (StoreError: the disk is full or otherwise refuses)."""
        with ExitStack() as stack:
            ready = [(stack.enter_context(prepared(self.root / name, write)), self.root / name) for name, write in files]
            for temporary, path in ready:
                if temporary is not None:
                    put_in_place(temporary, path)

    def remove(self, name: str) -> None:
        """Remove a file, or find it gone (StoreError)."""
        path = self.root / name
        with disk_errors("remove", path):
            path.unlink(missing_ok=True)
            fsync_folder(path.parent)

    def remove_folder(self, prefix: str) -> None:
        """Remove a folder: it disappears at once, then its files are deleted (StoreError: says what is left)."""
        self._lasting.clear()
        remove_folder(self.root / prefix)

    def rename_folder(self, old: str, new: str) -> None:
        """Rename a folder at once (InputError: the new name is taken; StoreError)."""
        if os.path.lexists(self.root / new):
            raise InputError(f"{self.root / old} cannot be renamed: there is a {self.root / new}")
        with disk_errors("rename", self.root / old):
            (self.root / old).rename(self.root / new)
            fsync_folder(self.root)

    @contextmanager
    def exclusive_lock(self, prefix: str) -> Iterator[None]:
        """Wait until no other process holds the lock of this folder, and hold it (StoreError: it has no locks)."""
        folder = self.root / prefix
        with disk_errors("lock", folder):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with disk_errors("lock", folder):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def leftovers(self, prefix: str) -> list[str]:
        """Names of temporary files and folders in a folder, sorted; a lock is none of them."""
        with suppress(OSError):
            names = (path.name for path in (self.root / prefix).glob(f"{TEMPORARY_PREFIX}*"))
            return sorted(name for name in names if name != NAMES_LOCK)
        return []

    def remove_leftovers(self, prefix: str) -> None:
        """Remove those whose writers are gone."""
        remove_leftovers(self.root / prefix)

    def close(self) -> None:
        """Close the files that are kept open."""
        self._files.clear()

    def make_lasting(self, prefix: str) -> None:
        """Make the names in a folder survive a power cut: whoever published them may have died before."""
        with disk_errors("read", self.root / prefix), suppress(FileNotFoundError):
            fsync_folder(self.root / prefix)
