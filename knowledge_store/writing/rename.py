"""Renaming a dump, where the storage can rename a folder at once. Cut off, the dump is closed until it is renamed again."""

from __future__ import annotations

from dataclasses import replace
from typing import BinaryIO

from knowledge_store.errors import InputError, MissingFileError, StoreError
from knowledge_store.format.commits import commit_records, read_commit
from knowledge_store.format.layout import check_dump_name, commit_file, manifest_file
from knowledge_store.format.manifest import read_manifest
from knowledge_store.storage import Storage, Write


def rename_dump(storage: Storage, old: str, new: str) -> None:
    """Give a dump another name, or finish what was cut off: the folder is renamed at once, then its records say the new name.

    Raises:
        InputError: the new name cannot be used or is taken, there is no such dump, or the storage cannot rename.
        DamageError, StoreError: a record is damaged, or cannot be read or written.
    """
    check_dump_name(new)
    names = storage.folders("")
    if old in names:
        read_manifest(storage, old)  # DamageError, before anything is done
        storage.rename_folder(old, new)
    elif new not in names or _named(storage, new) != old:
        raise InputError(f"{storage.address} has no dump {old!r}")
    # The manifest is last: until then the folder has another name than its manifest, which closes it.
    files: list[tuple[str, Write]] = []
    for shard in commit_records(storage, new):
        files.append((commit_file(new, shard), _bytes(replace(read_commit(storage, new, shard), dump=new).to_bytes())))
    manifest = replace(read_manifest(storage, new, any_name=True), dump=new)
    storage.replace([*files, (manifest_file(new), _bytes(manifest.to_bytes()))])


def _bytes(data: bytes) -> Write:
    def write(file: BinaryIO) -> None:
        file.write(data)

    return write


def _named(storage: Storage, folder: str) -> str | None:
    """The name that the manifest in a folder says."""
    try:
        return read_manifest(storage, folder, any_name=True).dump
    except (MissingFileError, StoreError):
        return None
