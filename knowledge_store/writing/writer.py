"""Writing a dump: any number of writers, on any number of machines, with no coordinator.

A shard's content depends on nothing but the manifest, so two writers that make the same shard make the same rows, and
whichever publishes first wins. A shard is there once its commit record is; until then its files are ignored.
"""

from __future__ import annotations

import datetime
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from knowledge_store.errors import DamageError, InputError, MismatchError, MissingFileError, StoreError
from knowledge_store.format.commits import CommitRecord, commit_records, read_commit
from knowledge_store.format.integrity import FileRecord, TableFile
from knowledge_store.format.layout import (
    COMMITS,
    SEQUENCES,
    STORE_FILE,
    check_dump_name,
    commit_file,
    manifest_file,
    scanned_dump,
    table_file,
    tokens_file,
)
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.parquet import publish_table, read_table
from knowledge_store.format.sequences import TOKENS_COLUMNS, TOKENS_SCHEMA
from knowledge_store.format.store_file import check_store_file, occupied, store_contents
from knowledge_store.kinds import KINDS, Kind, check_kinds
from knowledge_store.kinds.statistics import added, measured, qualified
from knowledge_store.storage import Storage, contents, open_storage
from knowledge_store.writing.bundles import publish_bundles
from knowledge_store.writing.shard import Shard, pack_shard


def create_store(storage: Storage) -> None:
    """Make a place a store, unless it is one.

    Raises:
        StoreError: it is a file, or has something else in it, or the storage refuses, or does not publish as it should.
    """
    # Listed before store.json is looked for: another writer may be making the same store, and makes that file first.
    if occupied(storage):
        try:
            storage.size(STORE_FILE)
        except MissingFileError:
            raise StoreError(
                f"{storage.address} is a folder with something else in it: name a new or empty folder, or a store"
            ) from None
    storage.probe()
    storage.create(STORE_FILE, store_contents())
    check_store_file(storage)


def remove_leftovers(storage: Storage, manifest: Manifest) -> None:
    """Remove what writers of a dump that died left behind, and what they found in the corpus: the manifest has it."""
    dump = manifest.dump
    for folder in storage.folders(""):
        if scanned_dump(folder) == dump:
            with suppress(StoreError):  # another worker has just removed it
                storage.remove_folder(folder)
    for prefix in ("", dump, *(f"{dump}/{table}" for table in (SEQUENCES, *manifest.kinds, COMMITS))):
        storage.remove_leftovers(prefix)


def stored_statistics(kind: Kind, stored: pa.Table, manifest: Manifest) -> dict[str, float]:
    """A kind's statistics over a stored table, by the names that commit records have."""
    return qualified(kind, added(kind, [measured(kind, kind.unpack(stored, manifest), manifest)]))


def check_committed(storage: Storage, manifest: Manifest) -> None:
    """Make sure that a manifest may be published: no shard was committed that was made from something else.

    Raises:
        MismatchError: a shard was made from something else, or no record says from what.
        DamageError, StoreError: the commit records cannot be listed, or one is of another format version.
    """
    shards = list(commit_records(storage, manifest.dump))
    records: dict[int, CommitRecord] = {}
    for shard in shards:
        try:
            records[shard] = read_commit(storage, manifest.dump, shard)
        except DamageError:  # to be repaired
            continue
    others = [shard for shard, record in records.items() if record.identity != manifest.identity_sha256]
    if others or (shards and not records):
        path = storage.locate(commit_file(manifest.dump, min(others or shards)))
        raise MismatchError(
            f"{storage.locate(manifest_file(manifest.dump))} is lost, and {path} was made from something else than this, or"
            " does not say from what: put back a copy of the manifest, or give this dump another --name"
        )


class DumpWriter:
    """Publishes the shards of one dump."""

    def __init__(self, store: str | Path | Storage, manifest: Manifest):
        self.storage = open_storage(store)
        self.dump = manifest.dump
        self.refresh(manifest)
        self._lasting: set[int] = set()  # shards whose commit records are known to survive a power cut

    def refresh(self, manifest: Manifest) -> None:
        """Resume with the manifest as it stands in the store now, since it was repaired."""
        self.manifest = manifest
        self._version = self.storage.version(manifest_file(self.dump))
        self._standing = self.storage.read(manifest_file(self.dump))

    @property
    def address(self) -> str:
        """Where the dump is, as people name it."""
        return self.storage.locate(self.dump)

    @classmethod
    def open(cls, store: str | Path | Storage, manifest: Manifest, tokens: pa.Table) -> DumpWriter:
        """Create the store and the dump, or resume the dump of that name.

        Args:
            store: the store's folder or storage, made if need be.
            manifest: what the dump is to be; `derived["tokens"]` is filled in here.
            tokens: the `tokens` table.

        Raises:
            InputError: the dump's name cannot be used.
            MismatchError: a dump of that name was made from something else; says what differs.
            DamageError: a file that an unfinished run left cannot be used, or the manifest is damaged.
            StoreError: `store` cannot be a store, or cannot be written.
        """
        check_dump_name(manifest.dump)
        unknown = sorted(set(manifest.kinds) - KINDS.keys())
        if unknown:
            raise InputError(f"dump {manifest.dump!r} cannot be made: unknown kinds of knowledge, {', '.join(unknown)}")
        storage, dump = open_storage(store), manifest.dump
        check_kinds(manifest, storage.address)
        create_store(storage)
        try:
            storage.size(manifest_file(dump))
        except MissingFileError:
            check_committed(storage, manifest)
            name = tokens_file(dump)
            record, published = publish_table(storage, name, TOKENS_SCHEMA, [tokens], TOKENS_COLUMNS)
            if not published and not read_table(TableFile(storage, name, record, TOKENS_SCHEMA)).equals(tokens):
                raise MismatchError(
                    f"{storage.locate(name)} is from a run with another vocabulary, which is either beginning just now or was"
                    f" cut off: give this dump another --name, or, when nobody writes {storage.locate(dump)} any more, remove"
                    " that folder"
                ) from None
            complete = replace(manifest, derived={**manifest.derived, "tokens": record.as_dict()})
            storage.create(manifest_file(dump), contents(complete.to_bytes()))
        # What stands there decides, whoever wrote it: two writers may start the same dump at once.
        commit_records(storage, dump)  # DamageError now, rather than after a shard's work, where it is no folder
        standing = read_manifest(storage, dump)
        differences = standing.differences(manifest)
        if differences:
            raise MismatchError(
                f"dump {dump!r} in {storage.address} was made differently: {'; '.join(differences)}."
                " Use what it was made with, or give this dump another --name"
            )
        remove_leftovers(storage, standing)
        return cls(storage, standing)

    def _check_standing(self) -> None:
        """Make sure that the dump is still the one that was opened: files of one dump must not end up in another.

        Raises:
            StoreError: it was removed, or removed and made again from something else.
        """
        name = manifest_file(self.dump)
        try:
            version = self.storage.version(name)  # a manifest may have megabytes, and this is asked for each file
            if version != self._version and self.storage.read(name) == self._standing:
                self._version = version
        except MissingFileError:
            raise StoreError(f"{self.address} was removed while it was being written") from None
        if version != self._version:
            raise StoreError(f"{self.address} was removed, and made again from something else, while it was being written")

    def committed(self, shard: int) -> bool:
        """Whether a shard's commit record is there, to stay.

        Raises:
            StoreError: the disk refuses.
        """
        try:
            self.storage.size(commit_file(self.dump, shard))
        except MissingFileError:
            return False
        except DamageError:  # a record that is a link to nothing, say, is to be repaired
            return True
        if shard not in self._lasting:
            self.storage.make_lasting(f"{self.dump}/{COMMITS}")  # as of `committed_shards`
            self._lasting.add(shard)
        return True

    def committed_shards(self) -> set[int]:
        """The shards whose commit records are there, to stay, from one listing.

        Raises:
            DamageError: `commits` is not a folder.
            StoreError: the disk refuses.
        """
        recorded = set(commit_records(self.storage, self.dump))
        self.storage.make_lasting(f"{self.dump}/{COMMITS}")  # whoever published one may have died before its name was flushed
        self._lasting = recorded
        return recorded

    def finish(self) -> set[int]:
        """The shards that are committed when a writer has done its part. Where they are all, and in a bucket, their commit
        records are bundled, for whoever opens the store.

        Raises:
            DamageError, StoreError: as of `committed_shards`.
        """
        committed = self.committed_shards()
        if len(committed) == self.manifest.shard_count:
            with suppress(DamageError, StoreError):  # others open it all the same, by a request for each shard
                publish_bundles(self.storage, self.manifest)
        return committed

    def commit(self, shard: Shard) -> CommitRecord:
        """Publish a shard's files, then its commit record.

        Returns:
            the record that stands in the store, whoever wrote it.

        Raises:
            InputError: the knowledge is not made of finite numbers; nothing is written.
            DamageError: a file of an unfinished run does not belong there; names it.
            StoreError: a file cannot be written (names it), or the dump was removed.
        """
        tables, statistics = pack_shard(shard, self.manifest)
        files: dict[str, FileRecord] = {}
        for name, packed in tables.items():
            self._check_standing()
            try:
                file = table_file(self.dump, name, shard.number)
                files[name], published = publish_table(self.storage, file, packed.schema, packed.row_groups, packed.columns)
            except DamageError:  # of a dump that was removed meanwhile, no file is where it was
                self._check_standing()
                raise
            if name in KINDS and not published:  # another writer's
                standing = read_table(TableFile(self.storage, file, files[name], packed.schema))
                statistics |= stored_statistics(KINDS[name], standing, self.manifest)
        record = self.record(shard, files, statistics)
        self._check_standing()
        if self.storage.create(commit_file(self.dump, shard.number), contents(record.to_bytes())):
            return record
        return read_commit(self.storage, self.dump, shard.number)

    def record(self, shard: Shard, files: dict[str, FileRecord], statistics: dict[str, float]) -> CommitRecord:
        """The record of a shard that is committed now."""
        return CommitRecord(
            dump=self.manifest.dump,
            shard=shard.number,
            identity=self.manifest.identity_sha256,
            first_document=shard.first_document,
            documents=shard.documents,
            files=files,
            statistics=statistics,
            skipped=shard.skipped,
            made_by={**shard.made_by, "committed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
        )
