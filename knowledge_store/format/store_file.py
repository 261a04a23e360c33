"""store.json, which makes a place a store: the format's name and version, and nothing else."""

from __future__ import annotations

from knowledge_store.errors import DamageError, MissingFileError, StoreError
from knowledge_store.format.layout import FORMAT_NAME, FORMAT_VERSION, STORE_FILE
from knowledge_store.format.manifest import check_version
from knowledge_store.format.records import read_record, seal
from knowledge_store.storage import Storage, Write, contents


def store_contents() -> Write:
    """How a store.json is written."""
    return contents(seal({"format": FORMAT_NAME, "version": FORMAT_VERSION}))


def check_store(storage: Storage) -> None:
    """Make sure that a storage holds a store that this version can read.

    Raises:
        StoreError: nothing is there, or it is some other folder, or of another format version, or cannot be read.
        DamageError: its store.json is altered.
    """
    try:
        check_store_file(storage)
    except MissingFileError:
        if occupied(storage):
            raise StoreError(f"{storage.address} is not a knowledge store: it has no {STORE_FILE}") from None
        raise StoreError(f"there is no store at {storage.address}: `teacher-dump run {storage.address}` makes one") from None


def occupied(storage: Storage) -> bool:
    """Whether anything is in a place for a store (StoreError: it is a file)."""
    try:
        return bool(storage.files("") or storage.folders(""))
    except DamageError:
        raise StoreError(f"{storage.address} is a file, not a store: a store is a folder") from None


def check_store_file(storage: Storage) -> None:
    """Make sure that a store's store.json is one, of a version this one can read.

    Raises:
        StoreError: it has another format version, or cannot be read.
        DamageError: it is altered, missing, or some other file of a store.
    """
    record = read_record(storage, STORE_FILE)
    check_version(record, storage.locate(STORE_FILE))
    if record.keys() != {"format", "version"}:
        raise DamageError(f"{storage.locate(STORE_FILE)} is damaged: it is some other file of a store")
