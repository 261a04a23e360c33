"""A storage with nothing but the protocol's calls, kept in memory: no folder, no lock, no rename. Listings are counted."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from knowledge_store.errors import InputError, MissingFileError
from knowledge_store.storage import Entry, Storage, Write, open_storage


class MemoryStorage:
    """Files by name. What opens a path instead of asking this finds nothing there."""

    def __init__(self) -> None:
        self.address = f"memory:{uuid.uuid4().hex[:8]}"
        self.contents: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.listings = 0
        self.reads = 0

    @property
    def cache_key(self) -> str:
        return self.address

    def locate(self, name: str) -> str:
        return f"{self.address}/{name}"

    def external_address(self, name: str) -> str:
        raise InputError(f"no other program can open {self.locate(name)}: copy the store into a folder")

    def _file(self, name: str) -> bytes:
        if name not in self.contents:
            raise MissingFileError(f"{self.locate(name)} is missing")
        return self.contents[name]

    def size(self, name: str) -> int:
        return len(self._file(name))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        self.reads += 1
        return self._file(name)[start:end]

    def _under(self, prefix: str) -> dict[str, str]:
        """Names of all files under a prefix, and what is left of them without it."""
        start = f"{prefix}/" if prefix else ""
        return {name: name.removeprefix(start) for name in sorted(self.contents) if name.startswith(start)}

    def files(self, prefix: str) -> list[Entry]:
        self.listings += 1
        return [
            Entry(rest, len(self.contents[name]), str(self.versions[name]))
            for name, rest in self._under(prefix).items()
            if "/" not in rest
        ]

    def folders(self, prefix: str) -> list[str]:
        self.listings += 1
        return sorted({rest.split("/")[0] for rest in self._under(prefix).values() if "/" in rest})

    def _write(self, name: str, data: bytes) -> None:
        self.contents[name] = data
        self.versions[name] = self.versions.get(name, 0) + 1

    def create(self, name: str, write: Write) -> bool:
        if name in self.contents:
            return False
        file = io.BytesIO()
        write(file)
        if name in self.contents:  # somebody was quicker
            return False
        self._write(name, file.getvalue())
        return True

    def replace(self, files: Sequence[tuple[str, Write]]) -> None:
        ready = []
        for name, write in files:
            file = io.BytesIO()
            if write(file) is not False:
                ready.append((name, file.getvalue()))
        for name, data in ready:
            self._write(name, data)

    def make_lasting(self, prefix: str) -> None:
        pass

    def remove(self, name: str) -> None:
        self.contents.pop(name, None)

    def remove_folder(self, prefix: str) -> None:
        for name in self._under(prefix):
            del self.contents[name]

    def rename_folder(self, old: str, new: str) -> None:
        raise InputError(f"{self.address} cannot rename {old}: copy it, and remove what it was")

    def exclusive_lock(self, prefix: str) -> AbstractContextManager[None]:
        return nullcontext()  # there is one process

    def leftovers(self, prefix: str) -> list[str]:
        return []

    def remove_leftovers(self, prefix: str) -> None:
        pass

    def close(self) -> None:
        pass


PLACES = ["folder", "memory"]


def new_place(place: str, folder: Path) -> Path | MemoryStorage:
    """Where to put a store: in a folder, or nowhere but in memory."""
    return folder if place == "folder" else MemoryStorage()


def storage_of(place: Path | MemoryStorage) -> Storage:
    """The storage of a place."""
    return open_storage(place)


def change(place: Path | MemoryStorage, name: str, edit: Callable[[bytes], bytes] | None) -> None:
    """Edit a file of a store behind its back, or remove it."""
    if isinstance(place, MemoryStorage):
        if edit is None:
            del place.contents[name]
        else:
            place.contents[name] = edit(place.contents[name])
    elif edit is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(edit((place / name).read_bytes()))
