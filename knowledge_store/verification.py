"""`verify`: read everything, and name every file that is not what was published or breaks a rule of the format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from knowledge_store.commits import CommitRecord, misplaced, read_commit
from knowledge_store.errors import DamageError, StoreError
from knowledge_store.kinds import KINDS
from knowledge_store.layout import (
    COMMITS,
    MANIFEST_FILE,
    SEQUENCES,
    TOKENS_FILE,
    commit_path,
    commit_shard,
    dump_folders,
    table_path,
)
from knowledge_store.manifest import Manifest, read_manifest
from knowledge_store.parquet import FileRecord, describe, read_file, row_group_ends
from knowledge_store.publication import TEMPORARY_PREFIX
from knowledge_store.sequences import TOKENS_SCHEMA, sequences_schema, token_hash
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
    found = describe(path)
    if found.sha256 != record.sha256:
        raise DamageError(f"{path} is damaged: its contents are not those that were published")
    if found != record:
        raise DamageError(f"{path} does not match its commit record")
    table = read_file(path, record)
    if not table.schema.equals(schema):
        raise DamageError(f"{path} does not have the columns of its table")
    return table


def _check_files(files: dict[str, tuple[Path, FileRecord, pa.Schema]], found: Verification) -> dict[str, pa.Table]:
    """The tables of the files that are sound; the others are noted as damage, each by itself."""
    tables = {}
    for name, (path, record, schema) in files.items():
        try:
            tables[name] = _check_file(path, record, schema)
        except (DamageError, StoreError) as error:
            found.damage.append(str(error))
        except _UNSOUND as error:
            found.damage.append(f"{path} is damaged: {error}")
    return tables


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


def _check_shard(folder: Path, manifest: Manifest, commit: CommitRecord, found: Verification) -> None:
    expected = {SEQUENCES, *manifest.kinds}
    if set(commit.files) != expected:
        raise DamageError(f"{commit_path(folder, commit.shard)} does not list the files {sorted(expected)}")
    schemas = {SEQUENCES: sequences_schema(manifest), **{name: KINDS[name].stored_schema(manifest) for name in manifest.kinds}}
    files = {name: (table_path(folder, name, commit.shard), commit.files[name], schema) for name, schema in schemas.items()}
    tables = _check_files(files, found)
    if len(tables) < len(files):
        return
    sequences, sequences_path = tables[SEQUENCES], files[SEQUENCES][0]
    ids = sequences["sequence_id"].to_numpy()
    if (np.diff(ids) <= 0).any():
        raise DamageError(f"{sequences_path} does not have its sequences in order")
    positions = 0
    statistics: dict[str, float] = {}
    for name in manifest.kinds:
        kind = KINDS[name]
        path, record, _ = files[name]
        try:
            table = kind.unpack(tables[name], manifest)
        except ValueError as error:
            raise DamageError(f"{path}: {error}") from None
        _check_alignment(sequences, table, kind.per, path, record)
        if name == "positions":
            _check_tokens(sequences, table, path)
            positions = len(table)
        for complaint in kind.damage(table, manifest):
            raise DamageError(f"{path}: {complaint}")
        statistics.update(kind.statistics(table, manifest))
    stated = commit.statistics
    if statistics.keys() != stated.keys() or any(abs(statistics[name] - stated[name]) > 1e-6 for name in stated):
        raise DamageError(f"{commit_path(folder, commit.shard)} states other statistics than its shard has")
    found.shards += 1
    found.positions += positions
    found.bytes += sum(record.bytes for record in commit.files.values())


def _check_dump(folder: Path, found: Verification, shard_done: Callable[[int], None]) -> None:
    try:
        manifest = read_manifest(folder)
        unknown = set(manifest.kinds) - KINDS.keys()
        if unknown:
            raise StoreError(f"{folder} holds knowledge of kinds unknown here: {sorted(unknown)}")
    except (DamageError, StoreError) as error:
        found.damage.append(str(error))
        return
    _check_files({TOKENS_FILE: (folder / TOKENS_FILE, FileRecord.from_dict(manifest.derived["tokens"]), TOKENS_SCHEMA)}, found)
    committed: set[int] = set()
    for path in sorted((folder / COMMITS).iterdir()) if (folder / COMMITS).is_dir() else []:
        shard = commit_shard(path.name)
        if shard is None:
            found.notes.append(f"{path} is a leftover of an unfinished run")
            continue
        committed.add(shard)
        try:
            commit = read_commit(path)
            complaint = misplaced(commit, manifest, shard, path)
            if complaint:
                raise DamageError(complaint)
            _check_shard(folder, manifest, commit, found)
        except (DamageError, StoreError) as error:
            found.damage.append(str(error))
        except _UNSOUND as error:
            found.damage.append(f"shard {shard} of {folder} is damaged: {error}")
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
    for commits in sorted(path.glob(f"*/{COMMITS}")):
        if commits.parent in dumps:
            continue
        if commits.parent.name.startswith(TEMPORARY_PREFIX):
            found.notes.append(f"{commits.parent} is a leftover of a dump that was removed")
            continue
        if (commits.parent / MANIFEST_FILE).exists():
            found.notes.append(f"{commits.parent} was begun meanwhile, and is not checked")
        elif any(commit_shard(record.name) is not None for record in commits.iterdir()):
            found.damage.append(f"{commits.parent / MANIFEST_FILE} is missing")
        else:
            found.notes.append(f"{commits.parent} was cut off before its manifest")
    return found
