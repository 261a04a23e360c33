"""The only room that touches a store's files: read, list, publish without replacing, remove, lock.

Nothing here knows what is in a file.
"""

from __future__ import annotations

from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.serving.address import is_served
from knowledge_store.storage.local import LocalStorage
from knowledge_store.storage.protocol import Entry, Storage, Write, contents

__all__ = ["Entry", "Storage", "StorePlace", "Write", "contents", "open_storage"]

StorePlace = str | Path | Storage  # what a store is opened by: its address or folder, or the storage that holds it


def open_storage(store: StorePlace, token_file: str | Path | None = None) -> Storage:
    """The storage of a store, from its folder or address; a storage stays as it is.

    Args:
        store: a folder, or `grpc+tls://host:port` where a store is served.
        token_file: of a served store, a file of the token; None takes it from the environment (see `serving.client`).

    Raises:
        InputError: it is an address such as `s3://bucket/store`, which no storage serves.
    """
    if is_served(store):
        from knowledge_store.serving.client import ServedStorage

        return ServedStorage(str(store), token_file)
    if isinstance(store, str) and "://" in store:
        raise InputError(f"stores in buckets are not served yet: give the path of a folder instead of {store}")
    return LocalStorage(store) if isinstance(store, str | Path) else store
