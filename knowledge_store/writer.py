"""Writing a dump: any number of writers, on any number of machines, with no coordinator.

A shard's content depends on nothing but the manifest, so two writers that make the same shard make the same rows, and
whichever publishes first wins. A shard is there once its commit record is; until then its files are ignored.
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.commits import CommitRecord, read_commit
from knowledge_store.errors import InputError, MismatchError, StoreError
from knowledge_store.kinds import KINDS, Arrays, Kind
from knowledge_store.layout import (
    COMMITS,
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SEQUENCES,
    STORE_FILE,
    TOKENS_FILE,
    check_dump_name,
    commit_path,
    table_path,
)
from knowledge_store.manifest import Manifest, read_manifest
from knowledge_store.parquet import FileRecord, publish_table
from knowledge_store.publication import TEMPORARY_PREFIX, make_folder, publish_bytes, remove_leftovers
from knowledge_store.records import seal
from knowledge_store.sequences import TOKENS_ENCODING, sequences_table
from knowledge_store.store import check_store

ROW_GROUP_POSITIONS = 32_768


def create_store(path: Path) -> None:
    """Make `path` a store, unless it is one.

    Raises:
        StoreError: it is a file, or a folder with something else in it.
    """
    # Listed before store.json is looked for: another writer may be making the same store, and makes that file first.
    others = path.is_dir() and any(not each.name.startswith(TEMPORARY_PREFIX) for each in path.iterdir())
    if others and not (path / STORE_FILE).exists():
        raise StoreError(f"{path} is a folder with something else in it: name a new or empty folder, or a store")
    if not path.exists() or (path.is_dir() and not (path / STORE_FILE).exists()):
        make_folder(path)
        publish_bytes(path / STORE_FILE, seal({"format": FORMAT_NAME, "version": FORMAT_VERSION}))
    check_store(path)


def row_groups(lengths: np.ndarray) -> list[int]:
    """How many sequences go into each row group: whole sequences, about ROW_GROUP_POSITIONS positions."""
    groups, count, positions = [], 0, 0
    for length in lengths.tolist():
        if count and positions + length > ROW_GROUP_POSITIONS:
            groups.append(count)
            count = positions = 0
        count += 1
        positions += length
    return [*groups, count] if count else groups


def _has_nan(table: pa.Table) -> bool:
    """Whether some number of a table is NaN, which means nothing in any kind of knowledge."""
    columns = [pc.list_flatten(column) if pa.types.is_list(column.type) else column for column in table.columns]
    return any(pc.any(pc.is_nan(column)).as_py() for column in columns if pa.types.is_floating(column.type))


class DumpWriter:
    """Publishes the shards of one dump."""

    def __init__(self, store: Path, manifest: Manifest):
        self.folder = store / manifest.dump
        self.manifest = manifest

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
            StoreError: `store` cannot be a store, or cannot be written.
        """
        check_dump_name(manifest.dump)
        unknown = sorted(set(manifest.kinds) - KINDS.keys())
        if unknown:
            raise InputError(f"dump {manifest.dump!r} cannot be made: unknown kinds of knowledge, {', '.join(unknown)}")
        create_store(store)
        folder = store / manifest.dump
        make_folder(folder)
        if not (folder / MANIFEST_FILE).exists():
            record, found_tokens = publish_table(folder / TOKENS_FILE, tokens, [len(tokens)], TOKENS_ENCODING)
            if not found_tokens.equals(tokens):
                raise MismatchError(
                    f"{folder / TOKENS_FILE} was left by an unfinished run with another vocabulary: delete {folder},"
                    " or give this dump another --name"
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

    def committed(self, shard: int) -> bool:
        """Whether a shard's commit record is there."""
        return commit_path(self.folder, shard).exists()

    def commit(
        self,
        shard: int,
        first_document: int,
        documents: int,
        sequences: list[dict[str, Any]],
        knowledge: dict[str, Arrays],
        skipped: list[dict[str, Any]],
        made_by: dict[str, Any],
    ) -> CommitRecord:
        """Publish a shard's files, then its commit record.

        Args:
            shard: its number in the plan.
            first_document, documents: what part of the plan it covers.
            sequences: rows of the `sequences` table, in order.
            knowledge: for each kind, its arrays over all rows of the shard (see each kind's `encode`).
            skipped: rows of the corpus that were left out: {"file", "row", "reason"}.
            made_by: versions, device, host, times.

        Returns:
            the record that stands in the store, whoever wrote it.

        Raises:
            InputError: the knowledge is not made of finite numbers; nothing is written.
            DamageError: a file of an unfinished run does not belong there; names it.
            StoreError: a file cannot be written; names it.
        """
        lengths = np.array([row["length"] for row in sequences], dtype=np.int64)
        ids = np.array([row["sequence_id"] for row in sequences], dtype=np.int64)
        groups = row_groups(lengths)
        tables = {SEQUENCES: (sequences_table(sequences, self.manifest), [len(sequences)])}
        for name in self.manifest.kinds:
            table, rows_in_groups = self._knowledge(KINDS[name], knowledge[name], ids, lengths, groups)
            if _has_nan(table) or not self._has_finite_statistics(KINDS[name], table):
                raise InputError(f"knowledge of shard {shard} of {self.manifest.dump!r} is NaN or infinite: it is not written")
            tables[name] = self._packed(KINDS[name], table, rows_in_groups), rows_in_groups
        files: dict[str, FileRecord] = {}
        statistics: dict[str, float] = {}
        for name, (table, rows_in_groups) in tables.items():
            files[name], published = publish_table(table_path(self.folder, name, shard), table, rows_in_groups)
            if name in KINDS:
                statistics.update(KINDS[name].statistics(KINDS[name].unpack(published, self.manifest), self.manifest))
        record = CommitRecord(
            dump=self.manifest.dump,
            shard=shard,
            first_document=first_document,
            documents=documents,
            files=files,
            statistics=statistics,
            skipped=skipped,
            made_by={**made_by, "committed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
        )
        path = commit_path(self.folder, shard)
        if publish_bytes(path, record.to_bytes()):
            return record
        return read_commit(path)

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
            start += count
        return pa.concat_tables(tables), rows_in_groups

    def _has_finite_statistics(self, kind: Kind, table: pa.Table) -> bool:
        try:
            return bool(np.isfinite(list(kind.statistics(table, self.manifest).values())).all())
        except ValueError:  # what it is made of is infinite
            return False

    def _packed(self, kind: Kind, table: pa.Table, rows_in_groups: list[int]) -> pa.Table:
        """What to store of a table, by row group too."""
        parts = [kind.stored_schema(self.manifest).empty_table()]
        start = 0
        for count in rows_in_groups:
            parts.append(kind.pack(table.slice(start, count), self.manifest))
            start += count
        return pa.concat_tables(parts)
