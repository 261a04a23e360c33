"""The only room that touches a store's files: read, list, publish without replacing, remove, lock.

Nothing here knows what is in a file.
"""

from __future__ import annotations

import re
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage.bucket import BucketStorage
from knowledge_store.storage.bucket_address import SCHEMES, BucketAddress, is_bucket_address
from knowledge_store.storage.hub import SCHEME as HUB
from knowledge_store.storage.hub import HubStorage
from knowledge_store.storage.local import LocalStorage
from knowledge_store.storage.protocol import Entry, Storage, Write, concurrently, contents
from knowledge_store.storage.served.address import is_served
from knowledge_store.storage.served.client import ServedStorage

__all__ = [
    "BucketStorage",
    "Entry",
    "Storage",
    "StorePlace",
    "Write",
    "at_endpoint",
    "concurrently",
    "contents",
    "is_bucket_address",
    "open_storage",
    "repairing",
]

StorePlace = str | Path | Storage  # what a store is opened by: its address or folder, or the storage that holds it


def open_storage(store: StorePlace, token_file: str | Path | None = None, reporter: Reporter = SILENT) -> Storage:
    """The storage of a store, from its folder or address; a storage stays as it is.

    Args:
        store: a folder, `s3://bucket/prefix` (also gs:// and az://, see `bucket_address`), `hf://datasets/owner/name@revision/path`
            (see `hub`), or `grpc+tls://host:port` where a store is served.
        token_file: of a served store, a file of the token; None takes it from the environment (see `served.client`).
        reporter: hears when a server is waited for.

    Raises:
        InputError: it is an address that no storage serves, or obstore, which serves it, is not installed.
    """
    if is_served(store):
        return ServedStorage(str(store), token_file, reporter)
    if isinstance(store, str) and store.startswith(HUB):
        return HubStorage(store)
    if isinstance(store, str) and "://" in store:
        return BucketStorage(store)
    if isinstance(store, str | Path) and re.match(rf"({'|'.join(SCHEMES)}):", str(store), re.IGNORECASE):
        raise InputError(f"{store} is a path, which has lost a /: give the address of a bucket as a text, s3://BUCKET/PREFIX")
    return LocalStorage(store) if isinstance(store, str | Path) else store


def at_endpoint(store: StorePlace, endpoint: str) -> StorePlace:
    """The address of a bucket with an endpoint, unless it has one; anything else as it is.

    Raises:
        InputError: the endpoint is no URL of a service.
    """
    if isinstance(store, str) and is_bucket_address(store):
        return str(BucketAddress.parse(store).at(endpoint))
    return store


def repairing(store: StorePlace) -> str:
    """What makes damaged shards of a store again, as the end of a sentence; quoted, since ? is a pattern in a shell."""
    address = store if isinstance(store, str | Path) else store.address
    if is_bucket_address(str(address)):
        return (
            f"`knowledge-store copy '{address}' FOLDER`, `teacher-dump run FOLDER …` (or import) with what made the dump, and"
            f" `knowledge-store copy FOLDER '{address}' --repair`"
        )
    return "`teacher-dump run … --repair` (or import), with what made the dump"
