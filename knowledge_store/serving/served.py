"""A store as a server holds it open: its dumps, and their readers, each used by one call at a time.

A client that opens a store sees its shards as they are committed then, as one that opens a folder does. So the store is looked
at again for each that opens it, and those who opened it before go on with the sequences that they know: by its snapshot, which
comes with every request, the dump is found as it was, as long as the server has it. A server that was started again has no
older ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from knowledge_store.catalogue.dumps import Dumps, open_dumps
from knowledge_store.errors import InputError, MissingFileError, StoreError
from knowledge_store.kinds.kind import check_held
from knowledge_store.reading.cache import CACHE_SIZE
from knowledge_store.reading.reader import DumpReader
from knowledge_store.reading.readers import Readers
from knowledge_store.storage import Entry, StorePlace, open_storage

OPENINGS = 4  # of a store, kept
FRESH = 1.0  # seconds for which a store is not looked at again
READER_MEMORY = 16 * 2**20  # bytes of decoded row groups of all dumps, beside the last one of each


class _Opening:
    """A store as it stood once."""

    def __init__(self, dumps: Dumps, cache_size: int):
        self.dumps = dumps
        self.readers = Readers(dumps, cache_size, READER_MEMORY // max(len(dumps.manifests), 1))
        self.lock = threading.Lock()

    def same(self, other: Dumps) -> bool:
        """Whether a store stands now as it stood then."""
        one = self.dumps
        return (
            dict(one.manifests) == dict(other.manifests)
            and one.index.files.equals(other.index.files)
            and {name: str(error) for name, error in one.closed.items()}
            == {name: str(error) for name, error in other.closed.items()}
        )


class ServedStore:
    """A store that is served.

    Args:
        store: its folder or address.
        cache_size: the most bytes of decoded sequences in the cache of whoever runs the server.

    Raises (on construction):
        StoreError: there is no store, or one of another format version.
        DamageError: its store.json is altered.
    """

    def __init__(self, store: StorePlace, cache_size: int = CACHE_SIZE):
        self.storage = open_storage(store)
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._openings: list[_Opening] = []
        self._looked = 0.0
        self.number = 0  # another one whenever the store stands otherwise
        self.open()

    def open(self) -> Dumps:
        """Its dumps as they stand now, but for a second.

        Raises:
            StoreError, DamageError: as above.
        """
        with self._lock:
            if not self._openings or time.monotonic() - self._looked > FRESH:
                dumps = open_dumps(self.storage)
                if not self._openings or not self._openings[0].same(dumps):
                    self._openings = [_Opening(dumps, self._cache_size), *self._openings][:OPENINGS]
                    self.number += 1
                self._looked = time.monotonic()
            return self._openings[0].dumps

    @contextmanager
    def reader(self, dump: str, snapshot: int) -> Iterator[DumpReader]:
        """The reader of a dump as a client knows it, which no other call uses meanwhile.

        Raises:
            InputError: there is no such dump.
            StoreError: it has other sequences than the client knows.
        """
        with self._lock:
            openings = list(self._openings)
        for opening in openings:
            if dump not in opening.dumps.manifests:
                continue
            with opening.lock:
                reader = opening.readers.of_dump(dump)
                if reader.snapshot == snapshot:
                    yield reader
                    return
        openings[0].dumps.name(dump)
        raise StoreError(
            f"dump {dump!r} has other sequences than when the store was opened (it may have grown, and the server was started"
            " again): open it again"
        )

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a file (see `Storage.read`; MissingFileError: there is no such file in a store)."""
        return self.storage.read(_checked(name), start, end)

    def size(self, name: str) -> int:
        """Bytes of a file (see `Storage.size`; MissingFileError: there is no such file in a store)."""
        return self.storage.size(_checked(name))

    def files(self, prefix: str) -> list[Entry]:
        """The files of a listing (see `Storage.files`)."""
        return self.storage.files(_checked(prefix) if prefix else "")

    def folders(self, prefix: str) -> list[str]:
        """The folders of a listing (see `Storage.folders`)."""
        return self.storage.folders(_checked(prefix) if prefix else "")


def _checked(name: str) -> str:
    """A name that leads nowhere but into a store. One that begins with a dot is no file of it."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or any(not part or part[0] == "." or "\\" in part or "\0" in part for part in parts):
        raise MissingFileError(f"there is no file {name!r} in a store")
    return name


def check_kinds(reader: DumpReader, kinds: Sequence[str]) -> None:
    """Refuse kinds that a dump does not hold (InputError)."""
    if len(set(kinds)) != len(kinds) or not kinds:
        raise InputError("name at least one kind of knowledge, and none twice")
    for kind in kinds:
        check_held(reader.manifest, kind)


def row_groups_bytes(reader: DumpReader) -> bytes:
    """First ordinal of each row group, and the end, int64, little-endian."""
    return np.asarray(reader.row_groups, "<i8").tobytes()


def table_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
