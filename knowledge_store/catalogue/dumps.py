"""The dumps of a store as they stood when it was opened: those that can be used, and why the others cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store import errors
from knowledge_store.catalogue.index import Index, refresh
from knowledge_store.errors import DamageError, InputError, KnowledgeStoreError, MissingFileError, StoreError
from knowledge_store.format.integrity import FileRecord, TableFile
from knowledge_store.format.layout import table_file, tokens_file
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.format.parquet import read_table
from knowledge_store.format.sequences import TOKENS_SCHEMA
from knowledge_store.format.store_file import check_store
from knowledge_store.kinds import check_kinds
from knowledge_store.storage import Storage, repairing
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.client import ServedStorage


@dataclass(frozen=True)
class Dumps:
    """The dumps of a store.

    Attributes:
        storage: of the store.
        manifests: of the dumps that are open, by name.
        index: of their committed shards.
        closed: why the dump of a folder cannot be used, by the folder's name.
    """

    storage: Storage
    manifests: Mapping[str, Manifest]
    index: Index
    closed: Mapping[str, KnowledgeStoreError] = field(default_factory=dict)

    def name(self, dump: str | None = None) -> str:
        """The dump that a name means; None means the only one, where no folder is closed.

        Raises:
            InputError: there is no such dump, or there are several, closed ones counted, and none was named.
            DamageError, StoreError: it is closed.
        """
        names = ", ".join(self.manifests) or "none"
        if dump is None:
            candidates = [*self.manifests, *self.closed]
            if len(candidates) != 1:
                reasons = "".join(f"; {folder} is closed: {error}" for folder, error in self.closed.items())
                raise InputError(f"name a dump of {self.storage.address} (it has {names}{reasons})")
            dump = candidates[0]
        if dump in self.manifests:
            return dump
        if dump in self.closed:
            raise _again(self.closed[dump])
        raise InputError(f"{self.storage.address} has no dump {dump!r} (it has {names})")

    def manifest(self, dump: str | None = None) -> Manifest:
        """The manifest of a dump (raises as `name`)."""
        return self.manifests[self.name(dump)]

    def only(self, dump: str) -> Dumps:
        """One of the dumps alone."""
        return replace(self, manifests={dump: self.manifests[dump]}, closed={})

    def part(self, dump: str, first: int, last: int) -> Dumps:
        """One of the dumps, with its committed shards from one number to another alone."""
        within = (pc.field("dump") == dump) & (pc.field("shard") >= first) & (pc.field("shard") <= last)
        return replace(self.only(dump), index=Index(self.index.shards.filter(within), self.index.files.filter(within)))

    def files(self, manifest: Manifest, table: str, schema: pa.Schema) -> dict[int, TableFile]:
        """The committed files of one table of one dump, by shard."""
        files = self.index.files.filter((pc.field("dump") == manifest.dump) & (pc.field("table") == table))
        columns = (files[name].to_pylist() for name in ("shard", "bytes", "sha256", "footer_sha256", "rows"))
        return {
            shard: TableFile(
                self.storage,
                table_file(manifest.dump, table, shard),
                FileRecord(size, sha256, footer_sha256, count, {}),
                schema,
            )
            for shard, size, sha256, footer_sha256, count in zip(*columns, strict=True)
        }

    def file_sizes(self) -> dict[str, int]:
        """The bytes of each committed file, by its name in the storage."""
        columns = (self.index.files[name].to_pylist() for name in ("dump", "table", "shard", "bytes"))
        return {table_file(dump, table, shard): size for dump, table, shard, size in zip(*columns, strict=True)}

    def tokens(self, manifest: Manifest) -> pa.Table:
        """A dump's `tokens` table (schema TOKENS_SCHEMA).

        Raises:
            DamageError: the file is not the one the manifest names, or holds something else.
        """
        record = FileRecord.from_dict(manifest.derived["tokens"])
        return read_table(TableFile(self.storage, tokens_file(manifest.dump), record, TOKENS_SCHEMA))

    def check_all_known(self, consequence: str) -> None:
        """Make sure that no dump is damaged: no answer over all dumps would be true.

        Raises:
            DamageError: one is; says the consequence.
        """
        for error in self.closed.values():
            if isinstance(error, DamageError):
                raise DamageError(f"{error}; {consequence} until that dump is repaired or removed")

    def check_answerable(self) -> None:
        """Make sure that SQL over all dumps has something to answer from.

        Raises:
            DamageError: a manifest or a commit record is damaged: SQL does not answer as if its dump were not there.
            DamageError, StoreError: every dump is closed.
        """
        self.check_all_known("SQL is refused")
        if not self.manifests:
            for error in self.closed.values():
                raise _again(error)

    @property
    def remarks(self) -> list[str]:
        """What SQL does not ask, though it is in the store: one sentence for each closed folder."""
        return [f"not asked: {self.storage.locate(name)} is closed: {error}" for name, error in self.closed.items()]


def open_dumps(storage: Storage, *, rebuild_index: bool = False) -> Dumps:
    """The dumps of a store.

    Args:
        storage: of the store.
        rebuild_index: read every commit record, whatever the index says.

    Raises:
        StoreError: there is no store, or one of another format version.
        DamageError: its store.json is altered.
    """
    if isinstance(storage, ServedStorage):
        return _served_dumps(storage)
    check_store(storage)
    manifests: dict[str, Manifest] = {}
    closed: dict[str, KnowledgeStoreError] = {}
    for name in storage.folders(""):
        try:
            manifest = read_manifest(storage, name)
            check_kinds(manifest, storage.address)
            manifests[name] = manifest
        except MissingFileError:
            continue
        except (DamageError, StoreError, InputError) as error:
            closed[name] = error
    index, unusable = refresh(storage, list(manifests.values()), rebuild=rebuild_index)
    usable = {name: manifest for name, manifest in manifests.items() if name not in unusable}
    closed |= unusable
    return Dumps(storage, usable, index, {name: _advised(error, storage) for name, error in sorted(closed.items())})


def _served_dumps(storage: ServedStorage) -> Dumps:
    """The dumps of a served store as they stand now.

    Raises:
        KnowledgeStoreError: what the server said, or it does not answer.
    """
    facts, *tables = storage.called(messages.OPEN, {"version": messages.VERSION})
    said = json.loads(facts)
    if said.get("version") != messages.VERSION:
        raise StoreError(
            f"{storage.address} is served by another version of knowledge-store (it speaks {said.get('version')}, and this one"
            f" {messages.VERSION}): install the same on both machines"
        )
    shards, files = (pa.ipc.open_stream(table).read_all() for table in tables)
    manifests = {name: read_manifest(storage, name) for name in said["dumps"]}
    closed = {name: getattr(errors, kind, StoreError)(sentence) for name, (kind, sentence) in said["closed"].items()}
    return Dumps(storage, manifests, Index(shards, files), closed)


def _again(error: KnowledgeStoreError) -> KnowledgeStoreError:
    """The same error, to be raised: one that was raised before would keep its traceback."""
    return type(error)(str(error))


def _advised(error: KnowledgeStoreError, storage: Storage) -> KnowledgeStoreError:
    """Why a dump is closed, with what to do where it is damaged."""
    if not isinstance(error, DamageError):
        return error
    return type(error)(
        f"{error}: `knowledge-store verify` names all that is damaged, and it is made again by {repairing(storage)}"
    )
