"""Decoded sequences on the local disk, so that an epoch after the first pays for no decompression. Derived, and disposable.

It lies in the user's cache folder and not beside the store: that folder is local where stores may be shared, slow or
read-only, and copies of a store, and its size, stay what they are. One file for each row group of a shard:

    CACHE/DUMP/SHARD-GROUP    DUMP hashes the manifest and the code that decodes, SHARD is the file's hash in its commit record

so that nothing stale has a name that is looked for. A file holds a header and then each sequence's arrays, one sequence after
the other, with a checksum of each in the header and one of the header. Integers take as few bytes as they need, and rows that
were padded to the widest of the row group, as draws are, are kept without the padding. Every read is checked: what is missing,
torn or altered is decoded from its shard again. Files are written aside and renamed. They are read with plain reads rather than
mapped: a file that is cut off under a map kills the process.

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
from knowledge_store.kinds.columns import list_mask
from knowledge_store.storage.local import make_folder, remove_folder, remove_leftovers, replace_bytes

CACHE_SIZE = 10_000_000_000
PLAIN = "biuf"  # kinds of number types: what is written is what is read
HEADERS = 1024  # kept in memory, a few kB each, or some 80 kB where sequences have 16 tokens
OPEN_FILES = 64
USED_FILE = "used"  # how many bytes the folder holds: written under a lock by whoever adds to it


@dataclass(frozen=True)
class _Lists:
    """An array (N, K) whose rows are stored without the fillers at their ends, side by side.

    Attributes:
        dtype: of the array.
        width: K.
        filler: what stands behind a row's values.
        starts: first value of each sequence, and the end.
        counts: dtype of how many values each row has.
        value_bytes: stored bytes of a value.
    """

    dtype: np.dtype
    width: int
    filler: Any
    starts: array[int]
    counts: np.dtype
    value_bytes: int

    def padded(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The rows of a sequence."""
        rows: np.ndarray = np.full((len(counts), self.width), self.filler, self.dtype)
        rows[np.arange(self.width, dtype=counts.dtype) < counts[:, None]] = values
        return rows


@dataclass(frozen=True)
class _Group:
    """The header of one file.

    Attributes:
        data: where the first sequence begins.
        starts: first row of each sequence, and the end.
        checksums: CRC-32 of each sequence's bytes.
        fields: of each array: name, dtype, dtype as stored, shape of a stored entry (a row, or a value of a list), its bytes.
        lists: those of the arrays that are stored as lists; how many values their rows have stands behind all arrays.
        row_bytes: what a row takes beside the values of lists.
    """

    data: int
    starts: array[int]
    checksums: array[int]
    fields: list[tuple[str, np.dtype, np.dtype, tuple[int, ...], int]]
    lists: dict[str, _Lists]
    row_bytes: int

    def read(self, descriptor: int, item: int) -> Arrays | None:
        """The arrays of one sequence, or None when they are not what was written.

        Raises:
            OSError: the file cannot be read.
        """
        rows = self.starts[item + 1] - self.starts[item]
        begin, size = self.data + self.starts[item] * self.row_bytes, rows * self.row_bytes
        entries = {}
        for name, lists in self.lists.items():
            first, end = lists.starts[item], lists.starts[item + 1]
            entries[name] = end - first
            begin, size = begin + first * lists.value_bytes, size + (end - first) * lists.value_bytes
        record = bytearray(size)
        os.preadv(descriptor, [record], begin)
        if zlib.crc32(record) != self.checksums[item]:
            return None
        arrays = {}
        at = 0
        for name, dtype, stored, shape, entry_bytes in self.fields:
            count = entries.get(name, rows)
            values: np.ndarray = np.ndarray((count, *shape), stored, record, at)
            arrays[name] = values if dtype == stored else values.astype(dtype)
            at += count * entry_bytes
        for name, lists in self.lists.items():
            arrays[name] = lists.padded(arrays[name], np.ndarray(rows, lists.counts, record, at))
            at += rows * lists.counts.itemsize
        return arrays


class _File:
    """A file that is closed when nobody holds it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Integers in the fewest bytes that hold them; anything else as it is."""
    if array.dtype.kind not in "iu" or not array.size:
        return array
    lowest, highest = int(array.min()), int(array.max())
    return array.astype(np.min_scalar_type(highest if lowest >= 0 else min(lowest, -highest - 1)))


def _as_lists(rows: np.ndarray, filler: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows (N, K) without the fillers at their ends: values side by side, and how many each row has; None: it saves nothing."""
    if rows.ndim != 2 or not rows.size:
        return None
    bits = np.dtype(f"u{rows.itemsize}")  # −0 is not 0
    other = rows.view(bits) != np.full(1, filler, rows.dtype).view(bits)
    if other[:, -1].all():
        return None
    width = rows.shape[1]
    counts = np.where(other.any(axis=1), width - other[:, ::-1].argmax(axis=1), 0).astype(np.min_scalar_type(width))
    values = _narrow(rows[list_mask(counts, width)])
    return (values, counts) if values.nbytes + counts.nbytes < _narrow(rows).nbytes else None


def _contents(name: str, starts: np.ndarray, arrays: Arrays, fillers: Mapping[str, Any]) -> bytes:
    """The bytes of a file: lengths and checksum of the header, the header, and the sequences."""
    narrow, counted = {}, {}
    for key, rows in arrays.items():
        lists = _as_lists(rows, fillers[key]) if key in fillers else None
        if lists is None:
            narrow[key] = _narrow(rows)
        else:
            narrow[key], counted[key] = lists
    firsts = {key: np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[starts] for key, counts in counted.items()}
    # Wide elements first: every array is aligned then.
    order = sorted(narrow, key=lambda key: -narrow[key].itemsize)
    parts = [(narrow[key], firsts.get(key, starts)) for key in order] + [(counts, starts) for counts in counted.values()]
    records = [
        b"".join(values[begins[item] : begins[item + 1]].tobytes() for values, begins in parts)
        for item in range(len(starts) - 1)
    ]
    header = {
        "name": name,
        "starts": starts.tolist(),
        "checksums": [zlib.crc32(record) for record in records],
        "fields": [(key, arrays[key].dtype.str, narrow[key].dtype.str, narrow[key].shape[1:]) for key in order],
        "lists": [(key, arrays[key].shape[1], firsts[key].tolist(), counted[key].dtype.str) for key in counted],
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
        fields = []
        for name, dtype, stored, shape in header["fields"]:
            kept = np.dtype(stored)
            fields.append((name, np.dtype(dtype), kept, tuple(shape), kept.itemsize * int(np.prod(shape, dtype=np.int64))))
        types = {name: (dtype, stored) for name, dtype, stored, _, _ in fields}
        lists = {}
        for name, width, starts, counts in header["lists"]:
            dtype, stored = types[name]
            lists[name] = _Lists(dtype, width, fillers[name], array("q", starts), np.dtype(counts), stored.itemsize)
        row_bytes = sum(size for name, *_, size in fields if name not in lists)
        row_bytes += sum(of_array.counts.itemsize for of_array in lists.values())
        return _Group(8 + length, array("q", header["starts"]), array("q", header["checksums"]), fields, lists, row_bytes)
    except (KeyError, TypeError, ValueError):  # another program's
        return None


def _decoders(manifest: Manifest) -> bytes:
    """The code of everything that decodes, this file's layout included, and what the kinds of a dump declare."""
    folders = [Path(folder) for folder in kinds_package.__path__]
    declared = repr({name: KINDS[name].fields(manifest) for name in manifest.kinds}).encode()
    sources = [Path(__file__), *(path for folder in folders for path in _sources(folder))]
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
        try:
            self.root = user_cache("decoded")
        except RuntimeError:  # whoever runs this has no home
            self.root, size = Path(os.devnull), 0
        self.folder = self.root / hashlib.sha256(manifest.to_bytes() + _decoders(manifest)).hexdigest()[:32]
        self._size = size
        self._fillers = {name: filler for kind in manifest.kinds for name, filler in KINDS[kind].arrays(manifest).items()}
        self._groups: dict[str, _Group] = {}
        self._file = lru_cache(OPEN_FILES)(_File)
        self._adding = size > 0
        self._counted = False
        self._held = False
        if size > 0:
            self._hold()

    def read(self, sha256: str, group: int, item: int) -> Arrays | None:
        """Arrays of one sequence, which belong to the caller, or None when they have to be decoded.

        Args:
            sha256: of the shard's file.
            group: number of the row group in it.
            item: number of the sequence in that.
        """
        if not self._size:
            return None
        path = self._path(sha256, group)
        if path not in self._groups:
            header = _read_group(path, self._fillers)
            if header is None:
                return None
            if len(self._groups) >= HEADERS:
                self._groups.clear()
            self._groups[path] = header
        try:
            arrays = self._groups[path].read(self._file(path).descriptor, item)
        except OSError:
            arrays = None
        if arrays is None:  # gone, altered, or no longer the file whose header this is
            del self._groups[path]
            self._file.cache_clear()
        return arrays

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
            contents = _contents(path.name, starts, arrays, self._fillers)
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
