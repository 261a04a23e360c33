"""Copying dumps from one store to another, between any two storages, checked on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from knowledge_store.catalogue.dumps import open_dumps
from knowledge_store.errors import DamageError, InputError, MismatchError, MissingFileError, StoreError
from knowledge_store.format.commits import commit_records, read_commit_of
from knowledge_store.format.integrity import MAX_READ, FileRecord, check_whole
from knowledge_store.format.layout import COMMITS, SEQUENCES, STORE_FILE, commit_file, manifest_file, table_file, tokens_file
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.store_file import check_store_file, store_contents
from knowledge_store.kinds import check_kinds
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import Storage, concurrently, contents, open_storage
from knowledge_store.writing.bundles import publish_bundles
from knowledge_store.writing.verification import shard_damage
from knowledge_store.writing.writer import check_committed, create_store, remove_leftovers

AT_ONCE = 4  # shards, each of which may be in memory whole on its way into a bucket


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        dumps: their names.
        shards: copied now.
        existing: shards that were in the destination already, all of whose bytes are those that were published there.
        bytes: of the shards copied now.
    """

    dumps: tuple[str, ...]
    shards: int
    existing: int
    bytes: int


def copy(
    source: str | Path | Storage,
    destination: str | Path | Storage,
    dump: str | None = None,
    reporter: Reporter = SILENT,
    *,
    repair: bool = False,
) -> Copied:
    """Copy the committed shards of dumps. What was cut off resumes: shards that are in the destination stay as they are.

    The digest of every file is checked, of what is copied on the way, and of what is in the destination already by reading it.
    A commit record comes after the files of its shard.

    Args:
        source, destination: stores; the destination is made if need be.
        dump: which one; None for all.
        reporter: hears of progress in shards.
        repair: whether what is damaged in the destination is removed, a record before what it vouches for, and copied again.
            Nobody else may write there meanwhile: this is how a store in a bucket is repaired, where nothing is replaced.

    Raises:
        InputError: the source has no such dump, or the destination is the source.
        MismatchError: the destination has another dump of that name.
        DamageError: shards of the source are damaged: none of them is copied, and all others are. Or something in the
            destination is; says what to do.
        StoreError: the source is no store, the destination cannot be one, or one of them cannot be read or written.
    """
    origin, target = open_storage(source), open_storage(destination)
    if origin.cache_key == target.cache_key:
        raise InputError(f"{origin.address} cannot be copied into itself: give another store as the destination")
    dumps = open_dumps(origin)
    manifests = {**dumps.manifests, **_readable(origin, dumps.closed)}
    if dump is not None and dump not in manifests:
        dumps.name(dump)
    names = tuple(sorted(manifests)) if dump is None else (dump,)
    for name, reason in dumps.closed.items() if dump is None else ():
        if name not in manifests:
            reporter.note(f"{name} is not copied: {reason}")
    if repair:
        _repair_store_file(target)
    create_store(target)
    records = {name: commit_records(origin, name) for name in names}
    for name in names:
        if (there := len(records[name])) < (planned := manifests[name].shard_count):
            reporter.note(
                f"{name} is not complete: it has {there:,} of its {planned:,} shards, and these are copied; copy it again once"
                " it has the others"
            )
    copied: list[int] = []  # bytes of each shard
    damage: list[DamageError] = []
    existing = 0
    with reporter.progress("copying", sum(map(len, records.values())), "shards") as advance:
        for name in names:
            manifest = manifests[name]
            _copy_beginning(origin, target, manifest, repair)
            remove_leftovers(target, manifest)
            committed = commit_records(target, name)

            def copy_one(shard: int, manifest: Manifest = manifest, committed: Container[int] = committed) -> int | None:
                """Its bytes, where it is copied now."""
                if shard in committed and not repair:
                    _check_shard(target, manifest, shard)
                    return None
                if shard in committed and not _remove_damaged_shard(target, manifest, shard):
                    return None
                return _copy_shard(origin, target, manifest, shard, repair)

            for shards in _batched(records[name], AT_ONCE):
                for size in concurrently(_farther(origin, target), _damage_kept(copy_one, damage), shards):
                    if size is None:
                        existing += 1
                    elif size >= 0:
                        copied.append(size)
                    advance(1)
            with suppress(DamageError, StoreError):  # nothing but speed depends on it
                publish_bundles(target, manifest)
    if damage:
        others = f" ({len(damage)} shards are damaged and left out; all others are copied)" if len(damage) > 1 else ""
        raise DamageError(f"{damage[0]}{others}")
    return Copied(names, len(copied), existing, sum(copied))


def _batched(shards: Iterable[int], size: int) -> Iterator[list[int]]:
    remaining = iter(shards)
    while taken := list(islice(remaining, size)):
        yield taken


def _farther(one: Storage, other: Storage) -> Storage:
    return one if one.at_once > other.at_once else other


def _damage_kept(copy_one: Callable[[int], int | None], damage: list[DamageError]) -> Callable[[int], int | None]:
    """Copies a shard; −1 where that finds damage, which is kept."""

    def kept(shard: int) -> int | None:
        try:
            return copy_one(shard)
        except DamageError as error:
            damage.append(type(error)(str(error)))
            return -1

    return kept


def _readable(origin: Storage, closed: Iterable[str]) -> dict[str, Manifest]:
    """The manifests of dumps that are closed for a damaged commit record alone: their other shards can be copied."""
    found = {}
    for name in closed:
        with suppress(DamageError, StoreError, InputError):
            manifest = read_manifest(origin, name)
            check_kinds(manifest, origin.address)
            commit_records(origin, name)
            found[name] = manifest
    return found


def _repair_store_file(target: Storage) -> None:
    try:
        check_store_file(target)
    except MissingFileError:
        return
    except DamageError:
        target.remove(STORE_FILE)
        target.create(STORE_FILE, store_contents())


def _remove_damaged_shard(target: Storage, manifest: Manifest, shard: int) -> bool:
    """Take a shard of the destination away where it is damaged: its record, then its files. Returns whether it was."""
    damage = shard_damage(target, manifest, shard)
    if damage:
        target.remove(commit_file(manifest.dump, shard))
        for table in (SEQUENCES, *manifest.kinds):
            if table in damage or COMMITS in damage:
                target.remove(table_file(manifest.dump, table, shard))
    return bool(damage)


def _copy_beginning(origin: Storage, target: Storage, manifest: Manifest, repair: bool) -> None:
    """The vocabulary and the manifest, unless they are there."""
    try:
        existing = read_manifest(target, manifest.dump)
        if repair:
            check_whole(target, tokens_file(manifest.dump), FileRecord.from_dict(existing.derived["tokens"]))
    except DamageError as error:
        if not (repair or isinstance(error, MissingFileError)):
            raise
        if repair:
            check_committed(target, manifest)
            target.remove(manifest_file(manifest.dump))
        record = FileRecord.from_dict(manifest.derived["tokens"])
        _copy_file(origin, target, tokens_file(manifest.dump), record, repair)
        target.create(manifest_file(manifest.dump), contents(manifest.to_bytes()))
        existing = read_manifest(target, manifest.dump)
    differences = existing.differences(manifest)
    if differences:
        raise MismatchError(
            f"{target.address} has a dump {manifest.dump!r} that was made differently: {'; '.join(differences)}. Rename one of"
            " the two"
        )


def _copy_shard(origin: Storage, target: Storage, manifest: Manifest, shard: int, repair: bool) -> int:
    """One committed shard. Returns its bytes."""
    commit = read_commit_of(origin, manifest, shard)
    for table, record in commit.files.items():
        _copy_file(origin, target, table_file(manifest.dump, table, shard), record, repair)
    target.create(commit_file(manifest.dump, shard), contents(commit.to_bytes()))
    return sum(record.bytes for record in commit.files.values())


def _check_shard(target: Storage, manifest: Manifest, shard: int) -> None:
    """Make sure that a shard of the destination is what was published there.

    Raises:
        DamageError: it is not.
    """
    record_file = target.locate(commit_file(manifest.dump, shard))
    try:
        commit = read_commit_of(target, manifest, shard)
    except DamageError as error:
        raise DamageError(f"{error}; delete that file, and copy again") from None
    for table, record in commit.files.items():
        try:
            check_whole(target, table_file(manifest.dump, table, shard), record)
        except MissingFileError as error:
            raise DamageError(f"{error}; delete {record_file}, and copy again") from None
        except DamageError as error:
            raise DamageError(f"{error}; delete that file and {record_file}, and copy again") from None


def _copy_file(origin: Storage, target: Storage, name: str, record: FileRecord, repair: bool) -> None:
    def write(file: BinaryIO) -> None:
        whole = hashlib.sha256()
        size = origin.size(name)
        for start in range(0, size, MAX_READ):
            data = origin.read(name, start, min(start + MAX_READ, size))
            whole.update(data)
            file.write(data)
        if (size, whole.hexdigest()) != (record.bytes, record.sha256):
            raise DamageError(f"{origin.locate(name)} is damaged: its contents are not those that were published")

    if not target.create(name, write):  # of a copy that was cut off
        try:
            check_whole(target, name, record)
        except DamageError as error:
            if not repair:
                raise DamageError(f"{error}; delete that file, and copy again") from None
            target.remove(name)
            target.create(name, write)
            check_whole(target, name, record)
