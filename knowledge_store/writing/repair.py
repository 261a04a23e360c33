"""Repair: what `verify` names is made again, and what is sound stays as it is.

Only a repair replaces files of a store. Everything new is written first and takes its place in order, a record last.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from knowledge_store.errors import DamageError, MismatchError
from knowledge_store.format.commits import CommitRecord, read_commit
from knowledge_store.format.integrity import FileRecord, TableFile, check_whole
from knowledge_store.format.layout import (
    COMMITS,
    STORE_FILE,
    commit_file,
    manifest_file,
    table_file,
    tokens_file,
)
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.parquet import read_table, same_rows, write_table
from knowledge_store.format.sequences import TOKENS_COLUMNS, TOKENS_SCHEMA
from knowledge_store.format.store_file import check_store_file, store_contents
from knowledge_store.kinds import KINDS
from knowledge_store.storage import Storage, Write, open_storage
from knowledge_store.writing.shard import Shard, StoredTable, pack_shard
from knowledge_store.writing.verification import shard_damage
from knowledge_store.writing.writer import DumpWriter, check_committed, stored_statistics


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
        storage.replace([(STORE_FILE, store_contents())])
        return True


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
            check_committed(storage, manifest)
        storage.remove(manifest_file(manifest.dump))
        return True


def repair_tokens(writer: DumpWriter, tokens: pa.Table) -> bool:
    """Put a damaged tokens.parquet in order.

    The manifest is replaced after it where the file's bytes are not what they were, as another version of pyarrow makes
    them; what identifies the dump stays.

    Returns:
        whether it was damaged.

    Raises:
        StoreError: it cannot be written.
    """
    with writer.storage.exclusive_lock(writer.dump):
        standing = repaired = read_manifest(writer.storage, writer.dump)
        writer.refresh(standing)
        if not tokens_damage(writer):
            return False

        def write_tokens(file: BinaryIO) -> None:
            nonlocal repaired
            record = write_table(file, TOKENS_SCHEMA, [tokens], TOKENS_COLUMNS)
            repaired = replace(standing, derived={**standing.derived, "tokens": record.as_dict()})

        def write_manifest(file: BinaryIO) -> bool:
            file.write(repaired.to_bytes())
            return repaired != standing

        writer.storage.replace([(tokens_file(writer.dump), write_tokens), (manifest_file(writer.dump), write_manifest)])
        writer.refresh(repaired)
        return True


def tokens_damage(writer: DumpWriter) -> str | None:
    """What is damaged of tokens.parquet, in a sentence, if anything is (StoreError: it cannot be read)."""
    try:
        check_whole(writer.storage, tokens_file(writer.dump), FileRecord.from_dict(writer.manifest.derived["tokens"]))
    except DamageError as error:
        return str(error)
    return None


def damaged_files(writer: DumpWriter, shard: int) -> list[str]:
    """What is damaged of a committed shard, one sentence for each file; of one that is not committed, nothing."""
    return list(shard_damage(writer.storage, writer.manifest, shard).values()) if writer.committed(shard) else []


def repair_shard(writer: DumpWriter, shard: Shard) -> CommitRecord:
    """Put what is damaged of a committed shard in order. What is sound of it stays as it is.

    Everything new is written and flushed first. Then files take their places, one by one, and a new commit record last;
    none is needed where they are what the old one says, byte for byte. Cut off in between, the shard is still damaged.

    Returns:
        the record that stands in the store.

    Raises:
        MismatchError: a sound file of the shard has other rows than these.
        InputError, StoreError: as for `commit`.
    """
    tables, statistics = pack_shard(shard, writer.manifest)
    number, storage = shard.number, writer.storage
    with storage.exclusive_lock(f"{writer.dump}/{COMMITS}"):
        damage = shard_damage(storage, writer.manifest, number)
        if not damage:
            return read_commit(storage, writer.dump, number)  # another process was quicker
        standing = None if COMMITS in damage else read_commit(storage, writer.dump, number)
        files: dict[str, FileRecord] = {}
        replaced: list[tuple[str, Write]] = []
        for name, packed in tables.items():
            file = table_file(writer.dump, name, number)
            if standing is not None and name not in damage:
                files[name] = standing.files[name]
                sound = _same_rows(TableFile(storage, file, files[name], packed.schema), packed)
                if name in KINDS:
                    statistics |= stored_statistics(KINDS[name], sound, writer.manifest)
            else:
                replaced.append((file, partial(_write_table, name, packed, files)))

        def write_record(file: BinaryIO) -> bool:
            nonlocal standing
            if standing is not None and files == standing.files:
                return False
            standing = writer.record(shard, files, statistics)
            file.write(standing.to_bytes())
            return True

        storage.replace([*replaced, (commit_file(writer.dump, number), write_record)])
        assert standing is not None
        return standing


def _same_rows(file: TableFile, packed: StoredTable) -> pa.Table:
    """A sound file as a table, which has the sequences and tokens of `packed` (MismatchError)."""
    standing = read_table(file)
    if not same_rows(standing, pa.concat_tables([packed.schema.empty_table(), *packed.row_groups]), packed.columns):
        raise MismatchError(
            f"{file.path} is sound, and what was made now has other tokens: repair the shard where the dump was made, with the"
            " same version of the tokenizer"
        )
    return standing


def _write_table(name: str, packed: StoredTable, files: dict[str, FileRecord], file: BinaryIO) -> None:
    files[name] = write_table(file, packed.schema, packed.row_groups, packed.columns)
