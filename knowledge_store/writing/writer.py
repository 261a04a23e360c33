"""Writing a dump: any number of writers, on any number of machines, with no coordinator.

A shard's content depends on nothing but the manifest, so two writers that make the same shard make the same rows, and
whichever publishes first wins. A shard is there once its commit record is; until then its files are ignored.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
from knowledge_store.format.sequences import TOKENS_ENCODING, TOKENS_SCHEMA, sequences_table
from knowledge_store.kinds import KINDS, Arrays, Kind, check_kinds
from knowledge_store.kinds.kind import check_lists
from knowledge_store.kinds.positions import positions_of
from knowledge_store.storage import Storage, Write, open_storage
from knowledge_store.store import check_store_file, occupied
from knowledge_store.writing.verification import shard_damage

ROW_GROUP_POSITIONS = 32_768
ROW_GROUP_VALUES = 2**24  # of lists, filled up to the longest: readers take them all into memory


@dataclass(frozen=True)
class Shard:
    """All there is to publish of a shard.

    Attributes:
        number: in the plan.
        first_document, documents: what part of the plan it covers.
        sequences: rows of the `sequences` table, in order.
        knowledge: for each kind, its arrays over all rows of the shard (see each kind's `encode`).
        skipped: rows of the corpus that were left out: {"file", "row", "reason"}.
        made_by: versions, device, host, times.
    """

    number: int
    first_document: int
    documents: int
    sequences: list[dict[str, Any]]
    knowledge: dict[str, Arrays]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)


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


def row_groups(lengths: np.ndarray, values: int = 1) -> list[int]:
    """How many sequences go into each row group: whole sequences, about ROW_GROUP_POSITIONS positions, or fewer where one has
    lists of up to so many `values`."""
    most = min(ROW_GROUP_POSITIONS, ROW_GROUP_VALUES // max(values, 1))
    groups, count, positions = [], 0, 0
    for length in lengths.tolist():
        if count and positions + length > most:
            groups.append(count)
            count = positions = 0
        count += 1
        positions += length
    return [*groups, count] if count else groups


def _has_nan(table: pa.Table) -> bool:
    """Whether some number of a table is NaN, which means nothing in any kind of knowledge."""
    columns = [pc.list_flatten(column) if pa.types.is_list(column.type) else column for column in table.columns]
    return any(pc.any(pc.is_nan(column)).as_py() for column in columns if pa.types.is_floating(column.type))


def _same_rows(file: TableFile, table: pa.Table) -> pa.Table:
    """A sound file as a table, which has the sequences and tokens of `table` (MismatchError)."""
    standing = read_table(file)
    if not same_rows(standing, table):
        raise MismatchError(
            f"{file.path} is sound, and what was made now has other tokens: repair the shard where the dump was made, with the"
            " same version of the tokenizer"
        )
    return standing


def _row_groups(table: pa.Table, rows_in_groups: list[int]) -> Iterator[pa.Table]:
    start = 0
    for rows in rows_in_groups:
        yield table.slice(start, rows)
        start += rows


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
            record, published = publish_table(storage, name, TOKENS_SCHEMA, [tokens], TOKENS_ENCODING)
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
                record = write_table(file, TOKENS_SCHEMA, [tokens], TOKENS_ENCODING)
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
        tables, statistics = self._tables(shard)
        files: dict[str, FileRecord] = {}
        for name, (table, rows_in_groups) in tables.items():
            self._check_standing()
            try:
                file = table_file(self.dump, name, shard.number)
                files[name], published = publish_table(self.storage, file, table.schema, _row_groups(table, rows_in_groups))
            except DamageError:  # of a dump that was removed meanwhile, no file is where it was
                self._check_standing()
                raise
            if name in KINDS and not published:  # another writer's
                standing = read_table(TableFile(self.storage, file, files[name], table.schema))
                statistics.update(KINDS[name].statistics(KINDS[name].unpack(standing, self.manifest), self.manifest))
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
        tables, statistics = self._tables(shard)
        number, storage = shard.number, self.storage
        with storage.exclusive_lock(f"{self.dump}/{COMMITS}"):
            damage = shard_damage(storage, self.manifest, number)
            if not damage:
                return read_commit(storage, self.dump, number)  # another process was quicker
            standing = None if COMMITS in damage else read_commit(storage, self.dump, number)
            files: dict[str, FileRecord] = {}
            replaced: list[tuple[str, Write]] = []
            for name, (table, rows_in_groups) in tables.items():
                file = table_file(self.dump, name, number)
                if standing is not None and name not in damage:
                    files[name] = standing.files[name]
                    sound = _same_rows(TableFile(storage, file, files[name], table.schema), table)
                    if name in KINDS:
                        statistics.update(KINDS[name].statistics(KINDS[name].unpack(sound, self.manifest), self.manifest))
                else:
                    replaced.append((file, partial(self._write_table, name, table, rows_in_groups, files)))

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

    def _write_table(
        self, name: str, table: pa.Table, rows_in_groups: list[int], files: dict[str, FileRecord], file: BinaryIO
    ) -> None:
        files[name] = write_table(file, table.schema, _row_groups(table, rows_in_groups))

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

    def _tables(self, shard: Shard) -> tuple[dict[str, tuple[pa.Table, list[int]]], dict[str, float]]:
        """The tables of a shard as they are stored, with how many rows go into each row group, and the shard's statistics.

        Raises:
            InputError: the knowledge is not made of finite numbers.
        """
        lengths = np.array([row["length"] for row in shard.sequences], dtype=np.int64)
        ids = np.array([row["sequence_id"] for row in shard.sequences], dtype=np.int64)
        groups = row_groups(lengths, self._values())
        tables = {SEQUENCES: (sequences_table(shard.sequences, self.manifest), [len(shard.sequences)])}
        statistics: dict[str, float] = {}
        for name in self.manifest.kinds:
            table, rows_in_groups = self._knowledge(KINDS[name], shard.knowledge[name], ids, lengths, groups)
            numbers = self._statistics(KINDS[name], table)
            if _has_nan(table) or not np.isfinite(list(numbers.values())).all():
                what = f"knowledge of shard {shard.number} of {self.manifest.dump!r}"
                raise InputError(f"{what} is NaN or infinite: it is not written")
            tables[name] = self._packed(KINDS[name], table, rows_in_groups), rows_in_groups
            statistics.update(numbers)
        return tables, statistics

    def _values(self) -> int:
        """Of the longest list of one position."""
        if "positions" not in self.manifest.kinds:
            return 1
        rule = positions_of(self.manifest).selection
        return max(rule.candidates, rule.draws)

    def _knowledge(
        self, kind: Kind, arrays: Arrays, ids: np.ndarray, lengths: np.ndarray, groups: list[int]
    ) -> tuple[pa.Table, list[int]]:
        """The table of one kind, and how many rows go into each row group, from the numbers of sequences that do."""
        keys = pa.table({"sequence_id": pa.array(ids)})
        rows_in_groups = groups
        if kind.per == "position":
            positions = [np.arange(length, dtype=np.int32) for length in lengths]
            keys = pa.table(
                {
                    "sequence_id": pa.array(np.repeat(ids, lengths)),
                    "position": pa.array(np.concatenate(positions) if positions else np.empty(0, np.int32)),
                }
            )
            ends = np.cumsum(groups)
            rows_in_groups = [int(lengths[end - count : end].sum()) for end, count in zip(ends, groups, strict=True)]
        # By row group: one Arrow list array cannot hold the values of a large shard.
        tables = [kind.schema(self.manifest).empty_table()]
        start = 0
        for count in rows_in_groups:
            part = {name: array[start : start + count] for name, array in arrays.items()}
            tables.append(kind.table(keys.slice(start, count), part, self.manifest))
            try:
                check_lists(tables[-1])
            except ValueError as error:
                raise InputError(f"a row group could not be read again: {error}; give a smaller --max-length") from None
            start += count
        return pa.concat_tables(tables), rows_in_groups

    def _statistics(self, kind: Kind, table: pa.Table) -> dict[str, float]:
        """A table's statistics; not a number, where what it is made of is infinite."""
        try:
            return kind.statistics(table, self.manifest)
        except ValueError:
            return {"": np.nan}

    def _packed(self, kind: Kind, table: pa.Table, rows_in_groups: list[int]) -> pa.Table:
        """What to store of a table, by row group too."""
        parts = [kind.stored_schema(self.manifest).empty_table()]
        start = 0
        for count in rows_in_groups:
            parts.append(kind.pack(table.slice(start, count), self.manifest))
            start += count
        return pa.concat_tables(parts)
