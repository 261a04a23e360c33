"""`verify`: read everything, and name every file that is not what was published or breaks a rule of the format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from knowledge_store.errors import DamageError, NewerVersionError, StoreError
from knowledge_store.format.commits import CommitRecord, files_in_commits, misplaced, read_commit
from knowledge_store.format.layout import (
    COMMITS,
    MANIFEST_FILE,
    SEQUENCES,
    TOKENS_FILE,
    commit_path,
    commit_shard,
    dump_folders,
    table_path,
)
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.parquet import FileRecord, describe, read_with_statistics, row_group_ends
from knowledge_store.format.sequences import TOKENS_SCHEMA, sequences_schema, token_hash
from knowledge_store.kinds import KINDS, check_kinds
from knowledge_store.kinds.kind import check_lists
from knowledge_store.storage.local import TEMPORARY_PREFIX
from knowledge_store.store import check_store

# How a file of good hashes and bad contents fails in the code that looks into it.
_UNSOUND = (OSError, ArithmeticError, LookupError, MemoryError, TypeError, ValueError, pa.ArrowException)


@dataclass
class Verification:
    """What was found.

    Attributes:
        damage: one sentence for each thing that is wrong; each names its file.
        notes: things that are no damage: uncommitted files, shards not dumped yet.
        dumps, shards, positions, bytes: how much was checked.
    """

    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dumps: int = 0
    shards: int = 0
    positions: int = 0
    bytes: int = 0


def _check_file(path: Path, record: FileRecord, schema: pa.Schema) -> pa.Table:
    if path.is_file() and path.stat().st_size != record.bytes:  # before it is hashed: a sparse file may be of any size
        raise DamageError(f"{path} is damaged: it has {path.stat().st_size:,} bytes and was published with {record.bytes:,}")
    found = describe(path)
    if found.sha256 != record.sha256:
        raise DamageError(f"{path} is damaged: its contents are not those that were published")
    if found != record:
        raise DamageError(f"{path} does not match its commit record")
    return read_with_statistics(path, record, schema)


def _check_alignment(sequences: pa.Table, knowledge: pa.Table, per: str, path: Path, record: FileRecord) -> None:
    """The rows of a kind are those of its sequences: all of them, in order, positions counted from 0."""
    ids, lengths = sequences["sequence_id"].to_numpy(), sequences["length"].to_numpy()
    if min(lengths, default=1) < 1 or (per == "position" and lengths.sum(dtype=np.int64) != len(knowledge)):
        raise DamageError(f"{path} does not have the rows of its sequences")
    expected = np.repeat(ids, lengths) if per == "position" else ids
    if not np.array_equal(knowledge["sequence_id"].to_numpy(), expected):
        raise DamageError(f"{path} does not have the rows of its sequences")
    ends = np.cumsum(lengths) if per == "position" else np.arange(1, len(ids) + 1)
    if not np.isin(row_group_ends(path, record), [0, *ends]).all():
        raise DamageError(f"{path} does not have whole sequences in its row groups")
    if per == "position":
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        if not np.array_equal(knowledge["position"].to_numpy(), np.arange(len(knowledge)) - starts):
            raise DamageError(f"{path} does not count positions from 0 in each sequence")


def _check_tokens(sequences: pa.Table, positions: pa.Table, path: Path) -> None:
    """Token hashes and numbers of targets are those of the positions."""
    ends = np.cumsum(sequences["length"].to_numpy())
    tokens = positions["token_id"].to_numpy()
    targets = positions["is_target"].to_numpy()
    rows = zip(*(sequences[name].to_pylist() for name in ("sequence_id", "length", "targets", "token_hash")), strict=True)
    for (sequence, length, target_count, expected), end in zip(rows, ends, strict=True):
        if token_hash(tokens[end - length : end]) != expected:
            raise DamageError(f"{path}: the token ids of sequence {sequence} do not match its token_hash")
        if int(targets[end - length : end].sum()) != target_count:
            raise DamageError(f"{path}: sequence {sequence} does not have {target_count} targets")


def shard_damage(folder: Path, manifest: Manifest, shard: int) -> dict[str, str]:
    """Read all of a shard that has a commit record, and find what is damaged of it.

    Args:
        folder: the dump's.
        manifest: of the dump.
        shard: its number.

    Returns:
        a sentence for the name of each table whose file is missing, or not what its record says, or not as the format has it;
        for COMMITS alone where the record cannot be used, or the files, each of them sound, do not belong together. Nothing
        for a sound shard.

    Raises:
        StoreError: a file cannot be read, or is of a newer format version.
    """
    path = commit_path(folder, shard)
    schemas = {SEQUENCES: sequences_schema(manifest), **{name: KINDS[name].stored_schema(manifest) for name in manifest.kinds}}
    try:
        commit = read_commit(path)
        complaint = misplaced(commit, manifest, shard, path)
        if complaint is None and set(commit.files) != schemas.keys():
            complaint = f"{path} does not list the files {sorted(schemas)}"
        if complaint:
            raise DamageError(complaint)
    except DamageError as error:
        return {COMMITS: str(error)}
    tables, found = {}, {}
    for name, schema in schemas.items():
        file = table_path(folder, name, shard)
        try:
            tables[name] = _check_file(file, commit.files[name], schema)
        except DamageError as error:
            found[name] = str(error)
        except _UNSOUND as error:
            found[name] = f"{file} is damaged: {error}"
    if found:
        return found
    try:
        _check_contents(folder, manifest, commit, tables)
    except DamageError as error:
        return {COMMITS: str(error)}
    except _UNSOUND as error:
        return {COMMITS: f"shard {shard} of {folder} is damaged: {error}"}
    return {}


def _check_contents(folder: Path, manifest: Manifest, commit: CommitRecord, tables: dict[str, pa.Table]) -> None:
    """The tables of a shard belong together, and its record says of them what is so (DamageError)."""
    sequences = tables[SEQUENCES]
    if (np.diff(sequences["sequence_id"].to_numpy()) <= 0).any():
        raise DamageError(f"{table_path(folder, SEQUENCES, commit.shard)} does not have its sequences in order")
    longest = max(sequences["length"].to_pylist(), default=0)
    if longest > manifest.plan["max_length"]:
        raise DamageError(f"{table_path(folder, SEQUENCES, commit.shard)} has a sequence of {longest:,} tokens")
    statistics: dict[str, float] = {}
    for name in manifest.kinds:
        kind = KINDS[name]
        path = table_path(folder, name, commit.shard)
        try:
            table = kind.unpack(tables[name], manifest)
            check_lists(table)
        except ValueError as error:
            raise DamageError(f"{path}: {error}") from None
        _check_alignment(sequences, table, kind.per, path, commit.files[name])
        if name == "positions":
            _check_tokens(sequences, table, path)
        for complaint in kind.damage(table, manifest):
            raise DamageError(f"{path}: {complaint}")
        statistics.update(kind.statistics(table, manifest))
    stated = commit.statistics
    if statistics.keys() != stated.keys() or any(abs(statistics[name] - stated[name]) > 1e-6 for name in stated):
        raise DamageError(f"{commit_path(folder, commit.shard)} states other statistics than its shard has")


def _check_dump(folder: Path, found: Verification, shard_done: Callable[[int], None]) -> None:
    try:
        manifest = read_manifest(folder)
        check_kinds(manifest, str(folder.parent))
    except NewerVersionError:
        raise
    except (DamageError, StoreError) as error:
        found.damage.append(str(error))
        return
    try:
        _check_file(folder / TOKENS_FILE, FileRecord.from_dict(manifest.derived["tokens"]), TOKENS_SCHEMA)
    except (DamageError, StoreError) as error:
        found.damage.append(str(error))
    except _UNSOUND as error:
        found.damage.append(f"{folder / TOKENS_FILE} is damaged: {error}")
    try:
        recorded = files_in_commits(folder)
    except (DamageError, StoreError) as error:
        found.damage.append(str(error))
        return
    committed: set[int] = set()
    for path in recorded:
        shard = commit_shard(path.name)
        if shard is None:
            found.notes.append(f"{path} is a leftover of an unfinished run")
            continue
        committed.add(shard)
        try:
            damage = list(shard_damage(folder, manifest, shard).values())
        except NewerVersionError:
            raise
        except StoreError as error:
            damage = [str(error)]
        found.damage += damage
        if not damage:
            files = read_commit(path).files
            found.shards += 1
            found.positions += files["positions"].rows if "positions" in files else 0
            found.bytes += sum(file.bytes for file in files.values())
        shard_done(1)
    for table in (SEQUENCES, *manifest.kinds):
        for path in sorted((folder / table).glob("*.parquet")):
            if not path.stem.isdecimal() or int(path.stem) not in committed:
                found.notes.append(f"{path} is not committed: a run was cut off before its commit record")
    missing = manifest.shard_count - len(committed)
    if missing:
        found.notes.append(f"dump {manifest.dump!r} has {missing} of {manifest.shard_count} shards still to be dumped")


def verify(path: Path, shard_done: Callable[[int], None] = lambda count: None) -> Verification:
    """Check every file of a store: hashes, counts, schemas and the invariants of each kind.

    Args:
        path: the store's folder.
        shard_done: called with 1 after each shard.

    Raises:
        StoreError: `path` is no store at all.
        NewerVersionError: a file has a newer format version. What is there cannot be judged.
    """
    found = Verification()
    try:
        check_store(path)
    except DamageError as error:
        found.damage.append(str(error))
        return found
    dumps = dump_folders(path)
    for folder in dumps:
        found.dumps += 1
        _check_dump(folder, found, shard_done)
    for folder in sorted(path.glob("*")):
        if folder in dumps or not os.path.lexists(folder / COMMITS):
            continue
        if folder.name.startswith(TEMPORARY_PREFIX):
            found.notes.append(f"{folder} is a leftover of a dump that was removed")
            continue
        if (folder / MANIFEST_FILE).exists():
            found.notes.append(f"{folder} was begun meanwhile, and is not checked")
            continue
        try:
            recorded = files_in_commits(folder)
        except (DamageError, StoreError) as error:
            found.damage.append(str(error))
            continue
        if any(commit_shard(record.name) is not None for record in recorded):
            found.damage.append(f"{folder / MANIFEST_FILE} is missing")
        else:
            found.notes.append(f"{folder} was cut off before its manifest")
    return found
