"""A storage with nothing but the protocol's calls, kept in memory: no folder, no lock, no rename. Listings are counted."""

from __future__ import annotations

import io
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from knowledge_store.errors import InputError, MissingFileError
from knowledge_store.storage import Entry, Storage, Write, open_storage


class MemoryStorage:
    """Files by name. What opens a path instead of asking this finds nothing there."""

    forkable = True
    at_once = 4

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

    def version(self, name: str) -> str:
        self._file(name)
        return str(self.versions[name])

    def probe(self) -> None:
        pass

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
Place = Path | MemoryStorage


class MemoryFile:
    """A file of a storage in memory, as tests look at one and change it behind the store's back."""

    def __init__(self, storage: MemoryStorage, name: str):
        self._storage, self._name = storage, name

    def __str__(self) -> str:
        return self._storage.locate(self._name)

    def read_bytes(self) -> bytes:
        return self._storage.contents[self._name]

    def write_bytes(self, data: bytes) -> None:
        self._storage._write(self._name, data)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def unlink(self) -> None:
        del self._storage.contents[self._name]

    def exists(self) -> bool:
        return self._name in self._storage.contents


def new_place(place: str, folder: Path) -> Place:
    """Where to put a store: in a folder, or nowhere but in memory."""
    return folder if place == "folder" else MemoryStorage()


def copied(place: Place, folder: Path) -> Place:
    """The same files in another place of the same sort."""
    if isinstance(place, Path):
        return Path(shutil.copytree(place, folder))
    other = MemoryStorage()
    for name, data in place.contents.items():
        other._write(name, data)
    return other


def storage_of(place: Place) -> Storage:
    """The storage of a place."""
    return open_storage(place)


def file_in(place: Place, name: str) -> Path | MemoryFile:
    """A file of a store."""
    return place / name if isinstance(place, Path) else MemoryFile(place, name)


def names_in(place: Place) -> list[str]:
    """The names of all files of a store, sorted."""
    if isinstance(place, MemoryStorage):
        return sorted(place.contents)
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def put(place: Place, name: str, data: bytes) -> None:
    """Put a file into a store behind its back."""
    if isinstance(place, Path):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
    file_in(place, name).write_bytes(data)


def change(place: Place, name: str, edit: Callable[[bytes], bytes] | None) -> None:
    """Edit a file of a store behind its back, or remove it."""
    file = file_in(place, name)
    if edit is None:
        file.unlink()
    else:
        file.write_bytes(edit(file.read_bytes()))
