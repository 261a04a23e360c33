"""Bundles: the commit records of many shards in one file, so that a store in a bucket is opened by few requests.

A bundle is derived: it says nothing that the records do not say, and may be missing, old or damaged. It lies beside them, so
that the listing which finds them finds it too, and says of each record which size and version a listing had for it while it was
read. A reader takes from it only what still stands there so, and reads every other record by itself. So a record that is not
listed is in no answer, whatever a bundle says, and one that was replaced since is read anew.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from knowledge_store.errors import DamageError
from knowledge_store.format.commits import CommitRecord, commit_of, misplaced
from knowledge_store.format.layout import COMMITS, FORMAT_NAME, FORMAT_VERSION, bundle_file, bundle_shards
from knowledge_store.format.manifest import Manifest, check_version
from knowledge_store.format.records import MAX_BYTES, SEAL, canonical_json, check_shape, json_sha256, unseal
from knowledge_store.storage import Entry, Storage

_SHAPE = {"dump": str, "identity": str, "records": [{"bytes": int, "version": str, "record": dict}]}
_GZIP = 16 + zlib.MAX_WBITS
ROOM = MAX_BYTES - 4096  # for the records of one bundle


@dataclass(frozen=True)
class Bundle:
    """A bundle as a listing has it.

    Attributes:
        name: of its file.
        size: in bytes.
        first, last: the least and the greatest number of the shards whose records it holds.
    """

    name: str
    size: int
    first: int
    last: int


def bundles(dump: str, entries: list[Entry]) -> list[Bundle]:
    """Those among the files of a dump's `commits`, the largest first."""
    found = []
    for entry in entries:
        shards = bundle_shards(entry.name)
        if shards is not None:
            found.append(Bundle(f"{dump}/{COMMITS}/{entry.name}", entry.size, *shards))
    return sorted(found, key=lambda bundle: (-bundle.size, bundle.name))


def bundled(manifest: Manifest, records: Mapping[int, tuple[Entry, CommitRecord]]) -> Iterator[tuple[str, bytes]]:
    """The bundles of some records of a dump, as their names and bytes: one, unless it would be too large to be read.

    Args:
        records: by shard: its record, and the file of it as a listing had it while it was read.
    """
    part: list[dict[str, object]] = []
    first = last = size = 0
    for shard in sorted(records):
        entry, commit = records[shard]
        item = {"bytes": entry.size, "version": entry.version, "record": commit.to_record()}
        length = len(canonical_json(item))
        if part and size + length > ROOM:
            yield _sealed(manifest, part, first, last)
            part, size = [], 0
        if length > ROOM:
            continue
        if not part:
            first = shard
        part.append(item)
        size += length + 1
        last = shard
    if part:
        yield _sealed(manifest, part, first, last)


def _sealed(manifest: Manifest, items: list[dict[str, object]], first: int, last: int) -> tuple[str, bytes]:
    record = {
        "format": FORMAT_NAME, "version": FORMAT_VERSION, "dump": manifest.dump, "identity": manifest.identity_sha256,
        "records": items,
    }  # fmt: skip
    sha256 = json_sha256(record)
    text = json.dumps({**record, SEAL: sha256}, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return bundle_file(manifest.dump, first, last, sha256), gzip.compress(text.encode(), 6, mtime=0)


def read_bundle(storage: Storage, manifest: Manifest, bundle: Bundle) -> dict[int, tuple[int, str, CommitRecord]]:
    """What a bundle holds, by shard: the size and the version that the record's file had, and the record.

    Raises:
        DamageError: it is missing, altered, of another dump, or not shaped as a bundle.
        StoreError: it is of another format version, or cannot be read.
    """
    path = storage.locate(bundle.name)
    data = storage.read(bundle.name, 0, MAX_BYTES + 1)
    inflating = zlib.decompressobj(_GZIP)
    try:
        text = inflating.decompress(data, MAX_BYTES + 1)
        if len(text) > MAX_BYTES or not inflating.eof or inflating.unused_data:
            raise zlib.error("it is cut off, or too large")
    except zlib.error as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    contents = unseal(text, path)
    check_version(contents, path)
    try:
        check_shape(contents, _SHAPE, "a bundle of commit records")
    except ValueError as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    found = {}
    for item in contents["records"]:
        commit = commit_of(item["record"], path)
        complaint = misplaced(commit, manifest, commit.shard, storage)
        if complaint or commit.shard in found:
            raise DamageError(f"{path} is damaged: it holds the record of another dump, or one twice")
        found[commit.shard] = (item["bytes"], item["version"], commit)
    return found
