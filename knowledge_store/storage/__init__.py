"""The only room that touches a store's files: read, list, publish without replacing, remove, lock.

Nothing here knows what is in a file.
"""

from __future__ import annotations

from pathlib import Path

from knowledge_store.storage.local import LocalStorage
from knowledge_store.storage.protocol import Entry, Storage, Write, contents

__all__ = ["Entry", "Storage", "Write", "contents", "open_storage"]


def open_storage(store: str | Path | Storage) -> Storage:
    """The storage of a store, from its folder; a storage stays as it is."""
    return LocalStorage(store) if isinstance(store, str | Path) else store
