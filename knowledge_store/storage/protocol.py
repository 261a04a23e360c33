"""What a store needs of the place that holds its files: a folder or a bucket.

Files have relative names with "/" between their parts (`books/commits/00017.json`). They are published whole and never changed,
except by repair. A bucket has no folders, no locks and no renames, and listing one is slow and costs money: `open` of a store
lists once, and once a dump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Write = Callable[[BinaryIO], object]  # writes the contents of a file to the open file that it is given


@dataclass(frozen=True)
class Entry:
    """A file of a listing.

    Attributes:
        name: its name without the prefix that was listed.
        size: in bytes.
        version: another text whenever the file is another one (a modification time, an etag); empty when it is unknown.
    """

    name: str
    size: int
    version: str


def contents(data: bytes) -> Write:
    """How bytes that are at hand are written."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    return write


class Storage(Protocol):
    """Holds the files of one store. Every method raises StoreError where the disk or the network refuses.

    Attributes:
        address: where it is, as people name it.
        cache_key: a name of its own, whatever it is called from where: what is cached of it has this name.
        forkable: whether a process that was forked from one that used it can use it too.
        at_once: how many calls it is worth while to have under way at the same time.
    """

    address: str
    forkable: bool
    at_once: int

    @property
    def cache_key(self) -> str: ...

    def locate(self, name: str) -> str:
        """How people find a file or folder: what messages call it."""
        ...

    def external_address(self, name: str) -> str:
        """What other programs, DuckDB for one, open a file by: an absolute path or a URL.

        Raises:
            InputError: no other program can.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            MissingFileError: there is no such file.
            DamageError: the name is that of something else than a file.
        """
        ...

    def version(self, name: str) -> str:
        """Another text whenever the file is another one, as in a listing's `Entry`, though not the same text.

        Raises:
            MissingFileError, DamageError: as of `size`.
        """
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file from one place to another, or to its end; fewer where it ends before.

        Raises:
            MissingFileError, DamageError: as of `size`.
        """
        ...

    def files(self, prefix: str) -> list[Entry]:
        """The files directly under `prefix/` by name, those that are still being written left out; none where there is no such
        folder."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """The names directly under `prefix/` (of the store, where it is empty) that stand for more files, sorted."""
        ...

    def probe(self) -> None:
        """Make sure that `create` keeps its promise here, before the first file is written.

        Raises:
            StoreError: it does not.
        """
        ...

    def create(self, name: str, write: Write) -> bool:
        """Publish a file, all of it or nothing, unless its name is taken.

        Returns:
            True when this call published it; False when the name was taken, and what stands there is untouched.
        """
        ...

    def replace(self, files: Sequence[tuple[str, Write]]) -> None:
        """Write all files aside, in order, then let each take the place of what has its name, in order. Where `write` returns
        False, what has that name stays.

        Raises:
            InputError: this storage replaces nothing, whatever the files, and if there are none; says what to do.
        """
        ...

    def make_lasting(self, prefix: str) -> None:
        """Make sure that the files under `prefix/` that can be seen now will not be lost, by a power cut say."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or find it gone."""
        ...

    def remove_folder(self, prefix: str) -> None:
        """Remove all files under `prefix/`."""
        ...

    def rename_folder(self, old: str, new: str) -> None:
        """Let all files under `old/` be under `new/`, at once.

        Raises:
            InputError: there are files under `new/`, or this storage cannot rename.
        """
        ...

    def exclusive_lock(self, prefix: str) -> AbstractContextManager[None]:
        """Wait until no other process holds this lock of the same name (a folder's), and hold it.

        Raises:
            InputError: this storage has no locks.
        """
        ...

    def leftovers(self, prefix: str) -> list[str]:
        """Names of temporary files and folders directly under `prefix/`: in use, or left by writers that died."""
        ...

    def remove_leftovers(self, prefix: str) -> None:
        """Remove those whose writers are gone."""
        ...

    def close(self) -> None:
        """Close what is kept open; it can be used again all the same."""
        ...


def concurrently(storage: Storage, call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What a call that asks a storage gives for some items, in order: as many are under way as are worth while there. The
    first error is raised."""
    places = list(items)
    if storage.at_once == 1 or len(places) < 2:
        return list(map(call, places))
    with ThreadPoolExecutor(min(storage.at_once, len(places))) as pool:
        return list(pool.map(call, places))
