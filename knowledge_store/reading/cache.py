"""Decoded sequences on the local disk, so that an epoch after the first pays for no decompression. Derived, and disposable.

It lies in the user's cache folder and not beside the store: that folder is local where stores may be shared, slow or
read-only, and copies of a store, and its size, stay what they are. One file for each row group of a shard:

    CACHE/DUMP/SHARD-GROUP    DUMP hashes the manifest and the code that decodes, SHARD is the file's hash in its commit record

so that nothing stale has a name that is looked for. A file holds a header and then each sequence's arrays, one sequence after
the other, in few bytes (`packed`), with a checksum of each in the header and one of the header. Every read is checked: what is
missing, torn or altered is decoded from its shard again. Files are written aside and renamed. They are read with plain reads
rather than mapped: a file that is cut off under a map kills the process.

Once the folder is full, dumps that nobody reads make room, the one unused for longest first; a dump that is being read keeps
what it has, and gains nothing: least-recently-used would find nothing at all in a cache smaller than an epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import weakref
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store import kinds as kinds_package
from knowledge_store.errors import StoreError
from knowledge_store.format.layout import user_cache
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading import packed
from knowledge_store.reading.packed import PLAIN, Layout, Packed, PackedRows
from knowledge_store.storage.local import make_folder, remove_folder, remove_leftovers, replace_bytes

CACHE_SIZE = 10_000_000_000
HEADERS = 1024  # kept in memory, a few kB each, or some 80 kB where sequences have 16 tokens
OPEN_FILES = 64
USED_FILE = "used"  # how many bytes the folder holds: written under a lock by whoever adds to it


@dataclass(frozen=True)
class _Group:
    """The header of one file.

    Attributes:
        data: where the first sequence begins.
        starts: first row of each sequence, and the end.
        checksums: CRC-32 of each sequence's bytes.
        layout: of each sequence.
        first_values: of each array that is stored as lists, first value of each sequence, and the end.
    """

    data: int
    starts: array[int]
    checksums: array[int]
    layout: Layout
    first_values: dict[str, array[int]]

    def read(self, descriptor: int, item: int) -> Packed | None:
        """One sequence, or None when it is not what was written.

        Raises:
            OSError: the file cannot be read.
        """
        rows, layout = self.starts[item + 1] - self.starts[item], self.layout
        begin, size = self.data + self.starts[item] * layout.row_bytes, rows * layout.row_bytes
        for name, starts in self.first_values.items():
            first, end, value_bytes = starts[item], starts[item + 1], layout.lists[name].value_bytes
            begin, size = begin + first * value_bytes, size + (end - first) * value_bytes
        record = bytearray(size)
        os.preadv(descriptor, [record], begin)
        packed = Packed(layout, rows, record, self.checksums[item])
        return packed if packed.sound else None


class _File:
    """A file that is closed when nobody holds it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def _contents(name: str, starts: np.ndarray, arrays: Arrays, fillers: Mapping[str, Any]) -> bytes:
    """The bytes of a file: lengths and checksum of the header, the header, and the sequences."""
    packed = PackedRows(arrays, fillers)
    records = packed.records(starts)
    header = {
        "name": name,
        "starts": starts.tolist(),
        "checksums": [zlib.crc32(record) for record in records],
        "layout": packed.layout.to_record(),
        "first_values": {key: firsts.tolist() for key, firsts in packed.first_values(starts).items()},
    }
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(4, "little"), zlib.crc32(text).to_bytes(4, "little"), text, *records])


def _read_group(path: str, fillers: Mapping[str, Any]) -> _Group | None:
    """The header of a file, or None when it cannot be trusted."""
    try:
        with open(path, "rb") as file:
            length, checksum = (int.from_bytes(file.read(4), "little") for _ in range(2))
            text = file.read(min(length, os.fstat(file.fileno()).st_size))
    except OSError:
        return None
    if len(text) != length or not length or zlib.crc32(text) != checksum:
        return None
    try:
        header = json.loads(text)
        if header["name"] != Path(path).name:
            return None
        layout = Layout.from_record(header["layout"], fillers)
        first_values = {name: array("q", header["first_values"][name]) for name in layout.lists}
        return _Group(8 + length, array("q", header["starts"]), array("q", header["checksums"]), layout, first_values)
    except (KeyError, TypeError, ValueError):  # another program's
        return None


def _decoders(manifest: Manifest) -> bytes:
    """The code of everything that decodes, the layout of files included, and what the kinds of a dump declare."""
    folders = [Path(folder) for folder in kinds_package.__path__]
    declared = repr({name: KINDS[name].fields(manifest) for name in manifest.kinds}).encode()
    sources = [Path(__file__), Path(packed.__file__), *(path for folder in folders for path in _sources(folder))]
    return b"".join([declared, *(path.read_bytes() for path in sources)])


def _sources(folder: Path) -> list[Path]:
    """Python files, or compiled ones where there are no others."""
    return sorted(folder.rglob("*.py")) or sorted(folder.rglob("*.pyc"))


class DecodedCache:
    """The decoded sequences of one dump, as far as they are there.

    Args:
        manifest: of the dump.
        size: the most bytes that the cached sequences of all dumps may take; 0 for no cache.
    """

    def __init__(self, manifest: Manifest, size: int):
        self.root = user_cache("decoded")
        self.folder = self.root / hashlib.sha256(manifest.to_bytes() + _decoders(manifest)).hexdigest()[:32]
        self._size = size
        self.fillers = {name: filler for kind in manifest.kinds for name, filler in KINDS[kind].arrays(manifest).items()}
        self._groups: dict[str, _Group] = {}
        self._file = lru_cache(OPEN_FILES)(_File)
        self._adding = size > 0
        self._counted = False
        self._held = False
        if size > 0:
            self._hold()

    def holds(self, sha256: str, group: int) -> bool:
        """Whether a row group seems to be there (see `read`)."""
        path = self._path(sha256, group)
        return self._size > 0 and (path in self._groups or os.path.exists(path))  # noqa: PTH110 — asked very often

    def read(self, sha256: str, group: int, item: int) -> Packed | None:
        """One sequence, which belongs to the caller, or None when it has to be decoded.

        Args:
            sha256: of the shard's file.
            group: number of the row group in it.
            item: number of the sequence in that.
        """
        if not self._size:
            return None
        path = self._path(sha256, group)
        if path not in self._groups:
            header = _read_group(path, self.fillers)
            if header is None:
                return None
            if len(self._groups) >= HEADERS:
                self._groups.clear()
            self._groups[path] = header
        try:
            sequence = self._groups[path].read(self._file(path).descriptor, item)
        except OSError:
            sequence = None
        if sequence is None:  # gone, altered, or no longer the file whose header this is
            del self._groups[path]
            self._file.cache_clear()
        return sequence

    def add(self, sha256: str, group: int, starts: np.ndarray, arrays: Arrays) -> None:
        """Keep a decoded row group, unless there is no room for it or the folder cannot be written.

        Args:
            sha256, group: as above.
            starts: first row of each sequence in the arrays, and the end.
            arrays: of the whole row group.
        """
        if not self._adding or any(array.dtype.kind not in PLAIN for array in arrays.values()):
            return
        path = Path(self._path(sha256, group))
        try:
            make_folder(self.folder)
            self._hold()
            contents = _contents(path.name, starts, arrays, self.fillers)
            self._adding = self._reserve(len(contents))
            if self._adding:
                replace_bytes(path, contents)
        except (OSError, StoreError):  # a cache that cannot be written costs time, nothing else
            self._adding = False

    def _path(self, sha256: str, group: int) -> str:
        return f"{self.folder}/{sha256}-{group:05d}"

    def _hold(self) -> None:
        """Mark the folder as used now, and by this process for as long as it lives."""
        if self._held:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(self.folder)
            self._held = True

    def _reserve(self, count: int) -> bool:
        """Count so many bytes more; False when there is no room for them. A process that is killed before it writes them leaves
        the count too high, never too low; the next process to add anything counts again."""
        with open(self.root / USED_FILE, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            used = int(text) if self._counted and text.isdecimal() else self._count()
            self._counted = True
            limit = min(self._size, used + shutil.disk_usage(self.root).free // 2)
            if used + count > limit:
                used = self._make_room(limit - count)
            room = used + count <= limit
            file.seek(0)
            file.truncate()
            file.write(str(used + count if room else used))
            return room

    def _count(self) -> int:
        """Bytes in all the folders; what killed processes left behind is removed first."""
        remove_leftovers(self.root)
        remove_leftovers(self.folder)
        return sum(_folder_bytes(folder) for folder in self.root.iterdir() if folder.is_dir())

    def _make_room(self, limit: int) -> int:
        """Remove dumps that nobody reads, the one unused for longest first, until `limit` bytes are left or none can go.

        Returns:
            how many bytes are left.
        """
        used = self._count()
        others = [folder for folder in self.root.iterdir() if folder.is_dir() and folder != self.folder]
        for folder in sorted(others, key=lambda folder: folder.stat().st_mtime_ns):
            if used <= limit:
                break
            size = _folder_bytes(folder)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(folder)
                used -= size
            except BlockingIOError:  # being read
                continue
            finally:
                os.close(descriptor)
        return used


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, some of which may be gone by the time they are looked at."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total
