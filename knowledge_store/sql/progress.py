"""How far a statement has read the files of a store: DuckDB does not say so of what it reads through Arrow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from knowledge_store.storage import Storage

EVERY = 0.2  # seconds


class ReadStorage:
    """A storage that keeps in mind how far each of its files has been read.

    Row groups are read one after the other, whichever of their columns are asked for: so the place in a file says how much of
    its rows are done.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._ends: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """As of the storage."""
        if end is not None:
            self._ends[name] = max(self._ends.get(name, 0), end)
        return self._storage.read(name, start, end)

    def passed(self, sizes: dict[str, int]) -> tuple[int, int]:
        """How many bytes of the files of some sizes have been passed, and how many there are, in the folders of which anything
        was read. A read that goes to a file's end is one of its footer, and does not count."""
        ends = {name: end for name, end in dict(self._ends).items() if name in sizes and end < sizes[name]}
        folders = {name.rpartition("/")[0] for name in ends}
        return sum(ends.values()), sum(size for name, size in sizes.items() if name.rpartition("/")[0] in folders)


@contextmanager
def reported(storage: ReadStorage, sizes: dict[str, int], report: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Report `read` and `of`, in bytes, now and then while the body runs (see `ReadStorage.passed`)."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(EVERY):
            read, of = storage.passed(sizes)
            report({"read": read, "of": of})

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        yield
    finally:
        done.set()
        telling.join()
