"""Writing a dump: any number of writers, on any number of machines, with no coordinator.

A shard's content depends on nothing but the manifest, so two writers that make the same shard make the same rows, and
whichever publishes first wins. A shard is there once its commit record is; until then its files are ignored.
"""

from __future__ import annotations

import datetime
import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import DamageError, InputError, MismatchError, StoreError
from knowledge_store.format.commits import CommitRecord, files_in_commits, read_commit
from knowledge_store.format.layout import (
    COMMITS,
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SEQUENCES,
    STORE_FILE,
    TOKENS_FILE,
    check_dump_name,
    commit_path,
    commit_shard,
    table_path,
)
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.parquet import (
    FileRecord,
    check_whole,
    describe,
    publish_table,
    read_file,
    same_rows,
    write_readable,
    write_table,
)
from knowledge_store.format.records import seal
from knowledge_store.format.sequences import TOKENS_ENCODING, sequences_table
from knowledge_store.kinds import KINDS, Arrays, Kind, check_kinds
from knowledge_store.kinds.kind import check_lists
from knowledge_store.kinds.positions import positions_of
from knowledge_store.storage.local import (
    TEMPORARY_PREFIX,
    disk_errors,
    exclusive_lock,
    fsync_folder,
    make_folder,
    prepared,
    publish_bytes,
    put_in_place,
    remove_leftovers,
    write_bytes,
)
from knowledge_store.store import check_store, check_store_file
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


def create_store(path: Path) -> None:
    """Make `path` a store, unless it is one.

    Raises:
        StoreError: it is a file, or a folder with something else in it, or the disk refuses.
    """
    with disk_errors("read", path):
        # Listed before store.json is looked for: another writer may be making the same store, and makes that file first.
        others = path.is_dir() and any(not each.name.startswith(TEMPORARY_PREFIX) for each in path.iterdir())
        if others and not (path / STORE_FILE).exists():
            raise StoreError(f"{path} is a folder with something else in it: name a new or empty folder, or a store")
        possible = not path.exists() or path.is_dir()
    if possible:
        make_folder(path)
        publish_bytes(path / STORE_FILE, seal({"format": FORMAT_NAME, "version": FORMAT_VERSION}))
    check_store(path)


def repair_store_file(path: Path) -> bool:
    """Write a store's damaged or missing store.json anew: nothing but the format's name and version is in it.

    Returns:
        whether it was damaged.

    Raises:
        StoreError: it cannot be read or written.
    """
    place = path / STORE_FILE
    try:
        check_store_file(place)
        return False
    except DamageError:
        data = seal({"format": FORMAT_NAME, "version": FORMAT_VERSION})
        with prepared(place, partial(write_bytes, data=data)) as temporary:
            put_in_place(temporary, place)
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


def _same_rows(path: Path, record: FileRecord, table: pa.Table) -> pa.Table:
    """A sound file as a table, which has the sequences and tokens of `table` (MismatchError)."""
    found = read_file(path, record)
    if not same_rows(found, table):
        raise MismatchError(
            f"{path} is sound, and what was made now has other tokens: mend the shard where the dump was made, with the same"
            " version of the tokenizer"
        )
    return found


def _check_committed(folder: Path, manifest: Manifest) -> None:
    """Make sure that a manifest may be published in a folder: no shard was committed there that was made from something else.

    Raises:
        MismatchError: a shard was made from something else, or does not say from what.
        DamageError, StoreError: the commit records cannot be listed, or one is of another format version.
    """
    shards = [shard for path in files_in_commits(folder) if (shard := commit_shard(path.name)) is not None]
    found: dict[int, CommitRecord] = {}
    for shard in shards:
        try:
            found[shard] = read_commit(commit_path(folder, shard))
        except DamageError:  # to be repaired
            continue
    others = [shard for shard, record in found.items() if record.identity != manifest.identity_sha256]
    if others or (shards and not found):
        path = commit_path(folder, min(others or shards))
        raise MismatchError(
            f"{folder} has lost its {MANIFEST_FILE}, and {path} was made from something else than this, or does not say from"
            " what: put back a copy of that file, or give this dump another --name"
        )


def repair_manifest(store: Path, manifest: Manifest) -> bool:
    """Take a damaged manifest away, so that `DumpWriter.open` makes it again.

    Args:
        store: the store's folder.
        manifest: what the dump was made from, as far as whoever calls knows.

    Returns:
        whether it was damaged or missing.

    Raises:
        MismatchError: shards were committed that were made from something else.
        StoreError: the disk refuses.
    """
    folder = store / manifest.dump
    with exclusive_lock(folder):
        try:
            read_manifest(folder)
            return False
        except DamageError:
            _check_committed(folder, manifest)
        with disk_errors("remove", folder / MANIFEST_FILE):
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            fsync_folder(folder)
        return True


class DumpWriter:
    """Publishes the shards of one dump."""

    def __init__(self, store: Path, manifest: Manifest):
        self.folder = store / manifest.dump
        self.manifest = manifest
        with disk_errors("read", self.folder / MANIFEST_FILE):
            self._standing = (self.folder / MANIFEST_FILE).read_bytes()
        self._lasting: set[str] = set()  # names of commit records that are known to survive a power cut

    @classmethod
    def open(cls, store: Path, manifest: Manifest, tokens: pa.Table) -> DumpWriter:
        """Create the store and the dump, or go on with the dump of that name.

        Args:
            store: the store's folder, made if need be.
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
        check_kinds(manifest, str(store))
        create_store(store)
        folder = store / manifest.dump
        make_folder(folder)
        with disk_errors("read", folder):
            standing = (folder / MANIFEST_FILE).exists()
        if not standing:
            _check_committed(folder, manifest)
            record, found_tokens = publish_table(folder / TOKENS_FILE, tokens, [len(tokens)], TOKENS_ENCODING)
            if not found_tokens.equals(tokens):
                raise MismatchError(
                    f"{folder / TOKENS_FILE} is from a run with another vocabulary, which is either beginning just now or was"
                    f" cut off: give this dump another --name, or, when nobody writes {folder} any more, remove that folder"
                )
            complete = replace(manifest, derived={**manifest.derived, "tokens": record.as_dict()})
            publish_bytes(folder / MANIFEST_FILE, complete.to_bytes())
        # What stands there decides, whoever wrote it: two writers may start the same dump at once.
        found = read_manifest(folder)
        differences = found.differences(manifest)
        if differences:
            raise MismatchError(
                f"dump {manifest.dump!r} in {store} was made differently: {'; '.join(differences)}."
                " Use what it was made with, or give this dump another --name"
            )
        tables = [folder / table for table in (SEQUENCES, *manifest.kinds, COMMITS)]
        for table in tables:
            make_folder(table)
        for each in (store, folder, *tables):
            remove_leftovers(each)
        return cls(store, found)

    def _check_standing(self) -> None:
        """Make sure that the dump is still the one that was opened: files of one dump must not end up in another.

        Raises:
            StoreError: it was removed, or removed and made anew from something else.
        """
        with disk_errors("read", self.folder / MANIFEST_FILE):
            try:
                unchanged = (self.folder / MANIFEST_FILE).read_bytes() == self._standing
            except FileNotFoundError:
                raise StoreError(f"{self.folder} was removed while it was being written") from None
        if not unchanged:
            raise StoreError(f"{self.folder} was removed, and made anew from something else, while it was being written")

    def committed(self, shard: int) -> bool:
        """Whether a shard's commit record is there, to stay.

        Raises:
            StoreError: the disk refuses.
        """
        path = commit_path(self.folder, shard)
        with disk_errors("read", path):
            try:
                os.lstat(path)  # a link to nothing is a damaged record
            except (FileNotFoundError, NotADirectoryError):
                return False
            if path.name not in self._lasting:  # whoever published it may have died before its name was flushed
                found = {each.name for each in path.parent.iterdir()}
                fsync_folder(path.parent)
                self._lasting = found
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
        path, manifest_path = self.folder / TOKENS_FILE, self.folder / MANIFEST_FILE
        with exclusive_lock(self.folder), ExitStack() as stack:
            self.manifest = read_manifest(self.folder)
            record = FileRecord.from_dict(self.manifest.derived["tokens"])
            if not self.tokens_damage():
                return False
            write = partial(write_table, tokens, row_groups=[len(tokens)], encoding=TOKENS_ENCODING)
            ready = [(stack.enter_context(prepared(path, write)), path)]
            found = describe(ready[0][0])
            if found != record:
                self.manifest = replace(self.manifest, derived={**self.manifest.derived, "tokens": found.as_dict()})
                write = partial(write_bytes, data=self.manifest.to_bytes())
                ready.append((stack.enter_context(prepared(manifest_path, write)), manifest_path))
            for temporary, place in ready:
                put_in_place(temporary, place)
            with disk_errors("read", manifest_path):
                self._standing = manifest_path.read_bytes()
            return True

    def tokens_damage(self) -> str | None:
        """What is damaged of tokens.parquet, in a sentence, if anything is (StoreError: it cannot be read)."""
        try:
            check_whole(self.folder / TOKENS_FILE, FileRecord.from_dict(self.manifest.derived["tokens"]))
        except DamageError as error:
            return str(error)
        return None

    def damaged(self, shard: int) -> list[str]:
        """What is damaged of a committed shard, one sentence for each file; of one that is not committed, nothing."""
        return list(shard_damage(self.folder, self.manifest, shard).values()) if self.committed(shard) else []

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
                files[name], published = publish_table(table_path(self.folder, name, shard.number), table, rows_in_groups)
            except DamageError:  # of a dump that was removed meanwhile, no file is where it was
                self._check_standing()
                raise
            if name in KINDS and published is not table:  # another writer's
                statistics.update(KINDS[name].statistics(KINDS[name].unpack(published, self.manifest), self.manifest))
        record = self._record(shard, files, statistics)
        path = commit_path(self.folder, shard.number)
        self._check_standing()
        if publish_bytes(path, record.to_bytes()):
            return record
        return read_commit(path)

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
        path = commit_path(self.folder, shard.number)
        with exclusive_lock(path.parent), ExitStack() as stack:
            damage = shard_damage(self.folder, self.manifest, shard.number)
            if not damage:
                return read_commit(path)  # another process was quicker
            standing = None if COMMITS in damage else read_commit(path)
            files: dict[str, FileRecord] = {}
            ready: list[tuple[Path, Path]] = []
            for name, (table, rows_in_groups) in tables.items():
                place = table_path(self.folder, name, shard.number)
                if standing is not None and name not in damage:
                    files[name], sound = standing.files[name], _same_rows(place, standing.files[name], table)
                    if name in KINDS:
                        statistics.update(KINDS[name].statistics(KINDS[name].unpack(sound, self.manifest), self.manifest))
                else:
                    write = partial(write_readable, table, row_groups=rows_in_groups)
                    temporary = stack.enter_context(prepared(place, write))
                    files[name] = describe(temporary)
                    ready.append((temporary, place))
            if standing is None or files != standing.files:
                standing = self._record(shard, files, statistics)
                write = partial(write_bytes, data=standing.to_bytes())
                ready.append((stack.enter_context(prepared(path, write)), path))
            for temporary, place in ready:
                put_in_place(temporary, place)
            return standing

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
