"""`verify`: read everything, and name every file that is not what was published or breaks a rule of the format."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import DamageError, NewerVersionError, StoreError
from knowledge_store.format.bundles import bundles, read_bundle
from knowledge_store.format.commits import CommitRecord, commit_entries, commit_records, read_commit, read_commit_of
from knowledge_store.format.integrity import FileRecord, TableFile, check_whole
from knowledge_store.format.layout import (
    COMMITS,
    SEQUENCES,
    commit_file,
    manifest_file,
    table_file,
    tokens_file,
)
from knowledge_store.format.manifest import Manifest, manifest_exists, read_manifest
from knowledge_store.format.parquet import open_table, read_row_groups
from knowledge_store.format.records import json_sha256
from knowledge_store.format.sequences import (
    POSITIONS_STATISTIC,
    SCORE,
    TOKENS_SCHEMA,
    sequences_schema,
    sequences_statistics,
)
from knowledge_store.format.store_file import check_store
from knowledge_store.kinds import KINDS, check_kinds
from knowledge_store.kinds.columns import check_lists, row_counts
from knowledge_store.kinds.statistics import added, measured, qualified
from knowledge_store.reporter import SILENT, Advance, Reporter
from knowledge_store.storage import Storage, open_storage

# How a file of good hashes and bad contents fails in the code that looks into it.
_UNSOUND = (OSError, ArithmeticError, LookupError, TypeError, ValueError, pa.ArrowException)


@dataclass
class Verification:
    """What was found.

    Attributes:
        damage: one sentence for each thing that is wrong; each names its file.
        closed: one sentence for each dump that cannot be used here, though nothing is known to be damaged (a kind of knowledge
            that is not known, a folder of another name). It says what to do; a repair does not help. Its files are not checked.
        notes: things that are no damage: uncommitted files, shards not dumped yet.
        dumps, shards, positions, bytes: how much is sound.
    """

    damage: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dumps: int = 0
    shards: int = 0
    positions: int = 0
    bytes: int = 0

    @property
    def sound(self) -> bool:
        """Whether all of the store was checked, and none of it is damaged."""
        return not self.damage and not self.closed


def _check_file(file: TableFile) -> list[pa.Table]:
    """A file's row groups, when all of it is what was published (DamageError)."""
    check_whole(file.storage, file.name, file.record)
    return list(read_row_groups(open_table(file)))


def _check_alignment(sequences: pa.Table, groups: list[pa.Table], per: str, path: str) -> list[int]:
    """The rows of a kind are those of its sequences: all of them, in order, positions and items counted from 0, and whole
    sequences in each row group.

    Returns:
        the first sequence of each row group, and the end.
    """
    ids, lengths = sequences["sequence_id"].to_numpy(), sequences["length"].to_numpy()
    rows = np.concatenate([np.zeros(0, np.int64), *(group["sequence_id"].to_numpy() for group in groups)])
    counts = {"position": lengths, "sequence": np.ones_like(lengths), "item": row_counts(rows, ids)}[per]
    if (
        min(lengths, default=1) < 1
        or counts.sum(dtype=np.int64) != len(rows)
        or not np.array_equal(rows, np.repeat(ids, counts))
    ):
        raise DamageError(f"{path} does not have the rows of its sequences")
    ends = np.cumsum(counts)
    group_ends = np.cumsum([len(group) for group in groups], dtype=np.int64)
    if not np.isin(group_ends, [0, *ends]).all():
        raise DamageError(f"{path} does not have whole sequences in its row groups")
    expected = np.arange(len(rows)) - np.repeat(ends - counts, counts)
    if per != "sequence" and not np.array_equal(np.concatenate([expected[:0], *(group[per] for group in groups)]), expected):
        raise DamageError(f"{path} does not count {per}s from 0 in each sequence")
    return [0, *np.searchsorted(ends, group_ends[:-1], side="right").tolist(), len(ids)]


def shard_damage(storage: Storage, manifest: Manifest, shard: int) -> dict[str, str]:
    """Read all of a shard that has a commit record, and find what is damaged of it.

    Args:
        storage: of the store.
        manifest: of the dump.
        shard: its number.

    Returns:
        a sentence for the name of each table whose file is missing, or not what its record says, or not as the format has it;
        for COMMITS alone where the record cannot be used, or the files, each of them sound, do not belong together. Nothing
        for a sound shard.

    Raises:
        StoreError: a file cannot be read, or is of a newer format version.
    """
    dump = manifest.dump
    schemas = {SEQUENCES: sequences_schema(manifest), **{name: KINDS[name].stored_schema(manifest) for name in manifest.kinds}}
    try:
        commit = read_commit_of(storage, manifest, shard)
        if set(commit.files) != schemas.keys():
            raise DamageError(f"{storage.locate(commit_file(dump, shard))} does not list the files {sorted(schemas)}")
    except DamageError as error:
        return {COMMITS: str(error)}
    files = {
        name: TableFile(storage, table_file(dump, name, shard), commit.files[name], schema) for name, schema in schemas.items()
    }
    tables: dict[str, list[pa.Table]] = {}
    damage: dict[str, str] = {}
    for name, file in files.items():
        try:
            tables[name] = _check_file(file)
        except DamageError as error:
            damage[name] = str(error)
        except MemoryError:
            raise
        except _UNSOUND as error:
            damage[name] = f"{file.path} is damaged: {error}"
    if damage:
        return damage
    try:
        _check_contents(manifest, commit, files, tables)
    except DamageError as error:
        return {COMMITS: str(error)}
    except MemoryError:
        raise
    except _UNSOUND as error:
        return {COMMITS: f"shard {shard} of {storage.locate(dump)} is damaged: {error}"}
    return {}


def _check_contents(
    manifest: Manifest, commit: CommitRecord, files: dict[str, TableFile], tables: dict[str, list[pa.Table]]
) -> None:
    """The tables of a shard belong together, and its record says of them what is so (DamageError)."""
    sequences = pa.concat_tables([files[SEQUENCES].schema.empty_table(), *tables[SEQUENCES]])
    if (np.diff(sequences["sequence_id"].to_numpy()) <= 0).any():
        raise DamageError(f"{files[SEQUENCES].path} does not have its sequences in order")
    longest = max(sequences["length"].to_pylist(), default=0)
    if longest > manifest.plan["max_length"]:
        raise DamageError(f"{files[SEQUENCES].path} has a sequence of {longest:,} tokens")
    if manifest.has_groups:
        _check_groups(sequences, files[SEQUENCES].path)
    statistics: dict[str, float] = sequences_statistics(sequences)
    for name in manifest.kinds:
        kind = KINDS[name]
        path = files[name].path
        groups = tables[name] or [files[name].schema.empty_table()]
        first = _check_alignment(sequences, groups, kind.per, path)
        parts = []
        for stored, (start, end) in zip(groups, pairwise(first), strict=True):  # as they are written and read
            try:
                group = kind.unpack(stored, manifest)
                check_lists(group)
            except ValueError as error:
                raise DamageError(f"{path}: {error}") from None
            for complaint in kind.checks(group, sequences.slice(start, end - start), manifest):
                raise DamageError(f"{path}: {complaint}")
            try:
                kind.decode(group, manifest)
            except MemoryError:
                raise
            except _UNSOUND as error:
                raise DamageError(f"{path} cannot be read: {error}") from None
            parts.append(measured(kind, group, manifest))
        statistics |= qualified(kind, added(kind, parts))
    recorded = commit.statistics
    if statistics.keys() != recorded.keys() or any(abs(statistics[name] - recorded[name]) > 1e-6 for name in recorded):
        path = files[SEQUENCES].storage.locate(commit_file(manifest.dump, commit.shard))
        raise DamageError(f"{path} states other statistics than its shard has")


def _check_groups(sequences: pa.Table, path: str) -> None:
    """Each group of a shard has at least two answers, none of them cut, and scores that are numbers (DamageError)."""
    _, counts = np.unique(sequences["document"].to_numpy(), return_counts=True)
    if (counts < 2).any():
        raise DamageError(f"{path} has a group of one answer")
    if pc.any(sequences["truncated"]).as_py():
        raise DamageError(f"{path} has an answer of a group that is cut")
    if pc.any(pc.invert(pc.is_finite(sequences[SCORE]))).as_py():
        raise DamageError(f"{path} has a score that is not finite")


def _check_dump(storage: Storage, dump: str, result: Verification, advance: Advance) -> None:
    try:
        manifest = read_manifest(storage, dump)
        check_kinds(manifest, storage.address)
        sequences_schema(manifest)
    except NewerVersionError:
        raise
    except (DamageError, StoreError) as error:
        (result.damage if isinstance(error, DamageError) else result.closed).append(str(error))
        return
    tokens = TableFile(storage, tokens_file(dump), FileRecord.from_dict(manifest.derived["tokens"]), TOKENS_SCHEMA)
    advance(0, reading=f"the vocabulary of {dump}")
    try:
        _check_file(tokens)
    except (DamageError, StoreError) as error:
        result.damage.append(str(error))
    except MemoryError:
        raise
    except _UNSOUND as error:
        result.damage.append(f"{tokens.path} is damaged: {error}")
    try:
        entries = storage.files(f"{dump}/{COMMITS}")
        committed = commit_entries(entries)
    except (DamageError, StoreError) as error:
        result.damage.append(str(error))
        return
    result.notes += [
        f"{storage.locate(f'{dump}/{COMMITS}/{name}')} is a leftover of an unfinished run"
        for name in storage.leftovers(f"{dump}/{COMMITS}")
    ]
    records: dict[int, str] = {}  # the SHA-256 of each sound one
    for shard in committed:
        advance(0, reading=f"shard {shard} of {dump}")
        try:
            damage = list(shard_damage(storage, manifest, shard).values())
        except NewerVersionError:
            raise
        except StoreError as error:
            damage = [str(error)]
        result.damage += damage
        if not damage:
            commit = read_commit(storage, dump, shard)
            result.shards += 1
            result.positions += int(commit.statistics[POSITIONS_STATISTIC])
            result.bytes += sum(file.bytes for file in commit.files.values())
            records[shard] = json_sha256(commit.to_record())
        advance(1)
    for bundle in bundles(dump, entries):
        try:
            for shard, (size, version, commit) in read_bundle(storage, manifest, bundle).items():
                standing = committed.get(shard)
                same = records.get(shard) in (None, json_sha256(commit.to_record()))
                if standing is not None and (standing.size, standing.version) == (size, version) and not same:
                    path = storage.locate(bundle.name)
                    raise DamageError(f"{path} says another thing of shard {shard} than its commit record")
        except NewerVersionError:
            raise
        except (DamageError, StoreError) as error:
            result.damage.append(f"{error}; delete that file: nothing but speed depends on it")
    for table in (SEQUENCES, *manifest.kinds):
        for entry in storage.files(f"{dump}/{table}"):
            stem = entry.name.removesuffix(".parquet")
            if stem != entry.name and (not stem.isdecimal() or int(stem) not in committed):
                path = storage.locate(f"{dump}/{table}/{entry.name}")
                result.notes.append(f"{path} is not committed: a run was cut off before its commit record")
    missing = manifest.shard_count - len(committed)
    if missing:
        result.notes.append(f"dump {manifest.dump!r} has {missing} of {manifest.shard_count} shards still to be dumped")


def _check_folder(storage: Storage, name: str, result: Verification) -> None:
    """A folder of a store that had no manifest when the dumps were looked for."""
    if manifest_exists(storage, name):
        result.notes.append(f"{storage.locate(name)} was begun meanwhile, and is not checked")
        return
    try:
        shards = commit_records(storage, name)
    except (DamageError, StoreError) as error:
        result.damage.append(str(error))
        return
    if shards:
        result.damage.append(f"{storage.locate(manifest_file(name))} is missing")
    elif COMMITS in storage.folders(name) or storage.files(name):
        result.notes.append(f"{storage.locate(name)} was cut off before its manifest")


def verify(store: str | Path | Storage, reporter: Reporter = SILENT) -> Verification:
    """Check every file of a store: hashes, counts, schemas and the invariants of each kind, and that each row group can be
    decoded.

    Args:
        store: the store's folder or storage.
        reporter: hears of progress in shards, and which one is being read.

    A store from somebody else is read with limits by `verify_isolated`, as the command does.

    Raises:
        MemoryError: there is not enough for a shard; that is no damage.
        StoreError: there is no store at all.
        NewerVersionError: a file has a newer format version. What is there cannot be judged.
    """
    storage = open_storage(store)
    result = Verification()
    try:
        check_store(storage)
    except DamageError as error:
        result.damage.append(str(error))
        return result
    dumps = [name for name in storage.folders("") if manifest_exists(storage, name)]
    shards = 0
    for dump in dumps:
        with suppress(DamageError, StoreError):  # told when the dump is checked
            shards += len(commit_records(storage, dump))
    with reporter.progress("verifying", max(shards, 1), "shards") as advance:
        for dump in dumps:
            before = len(result.damage) + len(result.closed)
            _check_dump(storage, dump, result, advance)
            result.dumps += len(result.damage) + len(result.closed) == before
    for name in storage.folders(""):
        if name not in dumps:
            _check_folder(storage, name, result)
    result.notes += [f"{storage.locate(name)} is a leftover of a dump that was removed" for name in storage.leftovers("")]
    return result
