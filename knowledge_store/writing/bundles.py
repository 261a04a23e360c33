"""Publishing bundles: what lets others open a store in a bucket by few requests (see `format.bundles`)."""

from __future__ import annotations

from knowledge_store.errors import DamageError
from knowledge_store.format.bundles import bundled, bundles
from knowledge_store.format.commits import CommitRecord, commit_entries, read_commit_of
from knowledge_store.format.layout import COMMITS
from knowledge_store.format.manifest import Manifest
from knowledge_store.storage import Entry, Storage, concurrently, contents


def publish_bundles(storage: Storage, manifest: Manifest) -> int:
    """Bundle the commit records of a dump that is complete, unless that was done, or it is in a folder, where it saves nothing.

    Returns:
        how many records are bundled now by this call.

    Raises:
        DamageError, StoreError: the records cannot be listed or read, or a bundle cannot be written.
    """
    if storage.at_once == 1:
        return 0
    entries = storage.files(f"{manifest.dump}/{COMMITS}")
    records, standing = commit_entries(entries), bundles(manifest.dump, entries)
    if len(records) < max(manifest.shard_count, 2):
        return 0
    if all(any(bundle.first <= shard <= bundle.last for bundle in standing) for shard in records):
        return 0
    made = _made(storage, manifest, records)
    return len(records) if [name for name, data in made.items() if storage.create(name, contents(data))] else 0


def replace_bundles(storage: Storage, manifest: Manifest) -> int:
    """Bundle the commit records that a dump has now, and remove the bundles that it had: they may be damaged, or out of date.

    Returns:
        how many records are bundled.

    Raises:
        DamageError, StoreError: as of `publish_bundles`.
    """
    entries = storage.files(f"{manifest.dump}/{COMMITS}")
    made = _made(storage, manifest, commit_entries(entries)) if storage.at_once > 1 else {}
    # Readers do without in between. One that stands under the right name may be damaged all the same.
    for bundle in bundles(manifest.dump, entries):
        if made.get(bundle.name) is None or storage.read(bundle.name) != made[bundle.name]:
            storage.remove(bundle.name)
    for name, data in made.items():
        storage.create(name, contents(data))
    return len(commit_entries(entries)) if made else 0


def _made(storage: Storage, manifest: Manifest, before: dict[int, Entry]) -> dict[str, bytes]:
    """Bundles of the records of a listing, by their names; those that cannot be used, or were replaced meanwhile, left out."""

    def read(shard: int) -> CommitRecord | None:
        try:
            return read_commit_of(storage, manifest, shard)
        except DamageError:
            return None

    records = dict(zip(before, concurrently(storage, read, before), strict=True))
    after = commit_entries(storage.files(f"{manifest.dump}/{COMMITS}"))
    sound = {
        shard: (before[shard], commit)
        for shard, commit in records.items()
        if commit is not None and after.get(shard) == before[shard]
    }
    return dict(bundled(manifest, sound))
