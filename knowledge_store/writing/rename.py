"""Renaming a dump, where the storage can rename a folder at once. Cut off, the dump is closed until it is renamed again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from knowledge_store.errors import DamageError, InputError, MissingFileError, StoreError
from knowledge_store.format.commits import commit_records, misplaced, read_commit
from knowledge_store.format.layout import check_dump_name, commit_file, manifest_file
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.storage import Storage, Write
from knowledge_store.writing.writer import write_bytes


def rename_dump(storage: Storage, old: str, new: str) -> None:
    """Give a dump another name, or finish what was cut off: the folder is renamed at once, then its records say the new name.

    Raises:
        InputError: the new name cannot be used or is taken, there is no such dump, or the storage cannot rename.
        DamageError, StoreError: a record is damaged, or cannot be read or written.
    """
    check_dump_name(new)
    names = storage.folders("")
    folder = old if old in names else new
    if folder == new and (new not in names or _named(storage, new) != old):
        raise InputError(f"{storage.address} has no dump {old!r}")
    # Everything is read, checked and made before the folder moves: what is damaged has to be repaired under the old name.
    manifest = read_manifest(storage, folder, any_name=folder == new)
    files: list[tuple[str, Write]] = []
    for shard in commit_records(storage, folder):
        files.append((commit_file(new, shard), partial(write_bytes, data=_renamed(storage, manifest, folder, new, shard))))
    # The manifest is last: until then the folder has another name than its manifest, which closes it.
    files.append((manifest_file(new), partial(write_bytes, data=replace(manifest, dump=new).to_bytes())))
    if folder == old:
        storage.rename_folder(old, new)
    storage.replace(files)


def _renamed(storage: Storage, manifest: Manifest, folder: str, new: str, shard: int) -> bytes:
    """A shard's commit record under the new name, which it has already where a rename was cut off."""
    commit = read_commit(storage, folder, shard)
    named = replace(commit, dump=folder) if commit.dump in (manifest.dump, new) else commit
    complaint = misplaced(named, replace(manifest, dump=folder), shard, storage)
    if complaint:
        raise DamageError(f"{complaint} (nothing was renamed)")
    return replace(commit, dump=new).to_bytes()


def _named(storage: Storage, folder: str) -> str | None:
    """The name that the manifest in a folder says."""
    try:
        return read_manifest(storage, folder, any_name=True).dump
    except (MissingFileError, StoreError):
        return None
