"""Writing a dump: any number of writers, on any number of machines, with no coordinator.

A shard's content depends on nothing but the manifest, so two writers that make the same shard make the same rows, and
whichever publishes first wins. A shard is there once its commit record is; until then its files are ignored.
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from knowledge_store.errors import DamageError, InputError, MismatchError, MissingFileError, StoreError
from knowledge_store.format.commits import CommitRecord, commit_records, read_commit
from knowledge_store.format.layout import (
    COMMITS,
    FORMAT_NAME,
    FORMAT_VERSION,
    SEQUENCES,
    STORE_FILE,
    check_dump_name,
    commit_file,
    manifest_file,
    table_file,
    tokens_file,
)
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.parquet import (
    FileRecord,
    TableFile,
    check_whole,
    publish_table,
    read_table,
    same_rows,
    write_table,
)
from knowledge_store.format.records import seal
from knowledge_store.format.sequences import TOKENS_COLUMNS, TOKENS_SCHEMA
from knowledge_store.kinds import KINDS, Kind, check_kinds
from knowledge_store.kinds.statistics import added, measured, qualified
from knowledge_store.storage import Storage, Write, open_storage
from knowledge_store.store import check_store_file, occupied
from knowledge_store.writing.shard import Shard, StoredTable, pack_shard
from knowledge_store.writing.verification import shard_damage


def write_bytes(file: BinaryIO, data: bytes) -> None:
    """Write contents that are at hand."""
    file.write(data)


def create_store(storage: Storage) -> None:
    """Make a place a store, unless it is one.

    Raises:
        StoreError: it is a file, or has something else in it, or the storage refuses.
    """
    # Listed before store.json is looked for: another writer may be making the same store, and makes that file first.
    if occupied(storage):
        try:
            storage.size(STORE_FILE)
        except MissingFileError:
            raise StoreError(
                f"{storage.address} is a folder with something else in it: name a new or empty folder, or a store"
            ) from None
    storage.create(STORE_FILE, partial(write_bytes, data=seal({"format": FORMAT_NAME, "version": FORMAT_VERSION})))
    check_store_file(storage)


def repair_store_file(store: str | Path | Storage) -> bool:
    """Write a store's damaged or missing store.json again: nothing but the format's name and version is in it.

    Returns:
        whether it was damaged.

    Raises:
        StoreError: it cannot be read or written.
    """
    storage = open_storage(store)
    try:
        check_store_file(storage)
        return False
    except DamageError:
        data = seal({"format": FORMAT_NAME, "version": FORMAT_VERSION})
        storage.replace([(STORE_FILE, partial(write_bytes, data=data))])
        return True


def _same_rows(file: TableFile, packed: StoredTable) -> pa.Table:
    """A sound file as a table, which has the sequences and tokens of `packed` (MismatchError)."""
    standing = read_table(file)
    if not same_rows(standing, pa.concat_tables([packed.schema.empty_table(), *packed.row_groups]), packed.columns):
        raise MismatchError(
            f"{file.path} is sound, and what was made now has other tokens: repair the shard where the dump was made, with the"
            " same version of the tokenizer"
        )
    return standing


def _statistics(kind: Kind, stored: pa.Table, manifest: Manifest) -> dict[str, float]:
    """A kind's statistics over a stored table, by the names that commit records have."""
    return qualified(kind, added(kind, [measured(kind, kind.unpack(stored, manifest), manifest)]))


def _check_committed(storage: Storage, manifest: Manifest) -> None:
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


def repair_manifest(store: str | Path | Storage, manifest: Manifest) -> bool:
    """Take a damaged manifest away, so that `DumpWriter.open` makes it again.

    Args:
        store: the store.
        manifest: what the dump was made from, as far as whoever calls knows.

    Returns:
        whether it was damaged or missing.

    Raises:
        MismatchError: shards were committed that were made from something else.
        StoreError: the storage refuses.
    """
    storage = open_storage(store)
    with storage.exclusive_lock(manifest.dump):
        try:
            read_manifest(storage, manifest.dump)
            return False
        except DamageError:
            _check_committed(storage, manifest)
        storage.remove(manifest_file(manifest.dump))
        return True


class DumpWriter:
    """Publishes the shards of one dump."""

    def __init__(self, store: str | Path | Storage, manifest: Manifest):
        self.storage = open_storage(store)
        self.dump = manifest.dump
        self.manifest = manifest
        self._standing = self.storage.read(manifest_file(self.dump))
        self._lasting: set[int] = set()  # shards whose commit records are known to survive a power cut

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
            _check_committed(storage, manifest)
            name = tokens_file(dump)
            record, published = publish_table(storage, name, TOKENS_SCHEMA, [tokens], TOKENS_COLUMNS)
            if not published and not read_table(TableFile(storage, name, record, TOKENS_SCHEMA)).equals(tokens):
                raise MismatchError(
                    f"{storage.locate(name)} is from a run with another vocabulary, which is either beginning just now or was"
                    f" cut off: give this dump another --name, or, when nobody writes {storage.locate(dump)} any more, remove"
                    " that folder"
                ) from None
            complete = replace(manifest, derived={**manifest.derived, "tokens": record.as_dict()})
            storage.create(manifest_file(dump), partial(write_bytes, data=complete.to_bytes()))
        # What stands there decides, whoever wrote it: two writers may start the same dump at once.
        commit_records(storage, dump)  # DamageError now, rather than after a shard's work, where it is no folder
        standing = read_manifest(storage, dump)
        differences = standing.differences(manifest)
        if differences:
            raise MismatchError(
                f"dump {dump!r} in {storage.address} was made differently: {'; '.join(differences)}."
                " Use what it was made with, or give this dump another --name"
            )
        for prefix in ("", dump, *(f"{dump}/{table}" for table in (SEQUENCES, *manifest.kinds, COMMITS))):
            storage.remove_leftovers(prefix)
        return cls(storage, standing)

    def _check_standing(self) -> None:
        """Make sure that the dump is still the one that was opened: files of one dump must not end up in another.

        Raises:
            StoreError: it was removed, or removed and made anew from something else.
        """
        try:
            unchanged = self.storage.read(manifest_file(self.dump)) == self._standing
        except MissingFileError:
            raise StoreError(f"{self.address} was removed while it was being written") from None
        if not unchanged:
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
        if shard not in self._lasting:  # whoever published it may have died before its name was flushed
            recorded = set(commit_records(self.storage, self.dump))
            self.storage.make_lasting(f"{self.dump}/{COMMITS}")
            self._lasting = recorded
        return True

    def repair_tokens(self, tokens: pa.Table) -> bool:
        """Put a damaged tokens.parquet in order.

        The manifest is replaced after it where the file's bytes are not what they were, as another version of pyarrow makes
        them; what identifies the dump stays.

        Returns:
            whether it was damaged.

        Raises:
            StoreError: it cannot be written.
        """
        with self.storage.exclusive_lock(self.dump):
            self.manifest = read_manifest(self.storage, self.dump)
            if not self.tokens_damage():
                return False
            standing = self.manifest

            def write_tokens(file: BinaryIO) -> None:
                record = write_table(file, TOKENS_SCHEMA, [tokens], TOKENS_COLUMNS)
                self.manifest = replace(standing, derived={**standing.derived, "tokens": record.as_dict()})

            def write_manifest(file: BinaryIO) -> bool:
                file.write(self.manifest.to_bytes())
                return self.manifest != standing

            self.storage.replace([(tokens_file(self.dump), write_tokens), (manifest_file(self.dump), write_manifest)])
            self._standing = self.storage.read(manifest_file(self.dump))
            return True

    def tokens_damage(self) -> str | None:
        """What is damaged of tokens.parquet, in a sentence, if anything is (StoreError: it cannot be read)."""
        try:
            check_whole(self.storage, tokens_file(self.dump), FileRecord.from_dict(self.manifest.derived["tokens"]))
        except DamageError as error:
            return str(error)
        return None

    def damaged(self, shard: int) -> list[str]:
        """What is damaged of a committed shard, one sentence for each file; of one that is not committed, nothing."""
        return list(shard_damage(self.storage, self.manifest, shard).values()) if self.committed(shard) else []

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
                statistics |= _statistics(KINDS[name], standing, self.manifest)
        record = self._record(shard, files, statistics)
        self._check_standing()
        if self.storage.create(commit_file(self.dump, shard.number), partial(write_bytes, data=record.to_bytes())):
            return record
        return read_commit(self.storage, self.dump, shard.number)

    def repair(self, shard: Shard) -> CommitRecord:
        """Put what is damaged of a committed shard in order. What is sound of it stays as it is.

        Everything new is written and flushed first. Then files take their places, one by one, and a new commit record last;
        none is needed where they are what the old one says, byte for byte. Cut off in between, the shard is still damaged.

        Returns:
            the record that stands in the store.

        Raises:
            MismatchError: a sound file of the shard has other rows than these.
            InputError, StoreError: as for `commit`.
        """
        tables, statistics = pack_shard(shard, self.manifest)
        number, storage = shard.number, self.storage
        with storage.exclusive_lock(f"{self.dump}/{COMMITS}"):
            damage = shard_damage(storage, self.manifest, number)
            if not damage:
                return read_commit(storage, self.dump, number)  # another process was quicker
            standing = None if COMMITS in damage else read_commit(storage, self.dump, number)
            files: dict[str, FileRecord] = {}
            replaced: list[tuple[str, Write]] = []
            for name, packed in tables.items():
                file = table_file(self.dump, name, number)
                if standing is not None and name not in damage:
                    files[name] = standing.files[name]
                    sound = _same_rows(TableFile(storage, file, files[name], packed.schema), packed)
                    if name in KINDS:
                        statistics |= _statistics(KINDS[name], sound, self.manifest)
                else:
                    replaced.append((file, partial(self._write_table, name, packed, files)))

            def write_record(file: BinaryIO) -> bool:
                nonlocal standing
                if standing is not None and files == standing.files:
                    return False
                standing = self._record(shard, files, statistics)
                file.write(standing.to_bytes())
                return True

            storage.replace([*replaced, (commit_file(self.dump, number), write_record)])
            assert standing is not None
            return standing

    def _write_table(self, name: str, packed: StoredTable, files: dict[str, FileRecord], file: BinaryIO) -> None:
        files[name] = write_table(file, packed.schema, packed.row_groups, packed.columns)

    def _record(self, shard: Shard, files: dict[str, FileRecord], statistics: dict[str, float]) -> CommitRecord:
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
