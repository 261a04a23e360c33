"""Bundles of commit records: whatever becomes of them, a store is opened as if there were none, by fewer requests."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from memory_storage import MemoryStorage
from stores import commit_of, make_manifest, write_store

from knowledge_store import DamageError, DumpWriter, KnowledgeStore, verify
from knowledge_store.catalogue import index as index_module
from knowledge_store.catalogue.dumps import Dumps, open_dumps
from knowledge_store.format import bundles as bundles_module
from knowledge_store.format.commits import CommitRecord, commit_records
from knowledge_store.format.layout import NOWHERE, commit_file, manifest_file
from knowledge_store.format.manifest import read_manifest
from knowledge_store.storage import open_storage
from knowledge_store.writing.bundles import publish_bundles, replace_bundles
from knowledge_store.writing.copy import copy

SHARDS = 6


@pytest.fixture
def storage() -> MemoryStorage:
    storage = MemoryStorage()
    write_store(storage, shards=SHARDS)
    return storage


def opened_anew(storage: MemoryStorage) -> Dumps:
    """The store as a machine opens it that has never seen it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "index_path", lambda storage: NOWHERE)
        return open_dumps(storage)


def bundles_of(storage: MemoryStorage) -> list[str]:
    return [name for name in storage.contents if name.endswith(".gz")]


def same_as_without(storage: MemoryStorage) -> bool:
    """Whether a first opening finds what the commit records say, each read by itself."""
    found = opened_anew(storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "bundles", lambda dump, entries: [])
        expected = opened_anew(storage)
    assert found.closed.keys() == expected.closed.keys()
    return same_rows(found, expected)


def same_rows(found: Dumps, expected: Dumps) -> bool:
    if len(found.index.shards) == len(expected.index.shards) == 0:  # of a closed dump, the columns are what was read first
        return True
    return found.index.shards.equals(expected.index.shards) and found.index.files.equals(expected.index.files)


def test_a_complete_dump_is_opened_by_few_requests(storage):
    writer = DumpWriter(storage, read_manifest(storage, "small"))
    assert writer.finish() == set(range(SHARDS)) and len(bundles_of(storage)) == 1
    before = dict(storage.contents)
    assert writer.finish() == set(range(SHARDS)) and storage.contents == before
    storage.reads = storage.listings = 0
    assert opened_anew(storage).index.shards.num_rows == SHARDS
    assert (storage.reads, storage.listings) == (3, 2)  # store.json, the manifest, the bundle
    assert same_as_without(storage) and verify(storage).sound


def test_what_is_not_complete_or_in_a_folder_is_not_bundled(storage, tmp_path):
    storage.remove(commit_file("small", 3))
    assert publish_bundles(storage, read_manifest(storage, "small")) == 0 and bundles_of(storage) == []
    assert replace_bundles(storage, read_manifest(storage, "small")) == SHARDS - 1
    assert same_as_without(storage) and verify(storage).sound
    folder = open_storage(write_store(tmp_path / "store", shards=3))
    assert publish_bundles(folder, read_manifest(folder, "small")) == 0


def test_copies_are_bundled_and_bundles_are_not_copied(storage, tmp_path):
    publish_bundles(storage, read_manifest(storage, "small"))
    copy(storage, tmp_path / "folder")
    assert not list(tmp_path.rglob("*.gz"))
    other = MemoryStorage()
    copy(tmp_path / "folder", other)
    assert len(bundles_of(other)) == 1 and same_as_without(other)


@pytest.mark.parametrize("room", [3000, 500])
def test_what_is_too_large_for_one_bundle_is_in_several_or_in_none(storage, monkeypatch, room):
    monkeypatch.setattr(bundles_module, "ROOM", room)
    publish_bundles(storage, read_manifest(storage, "small"))
    assert len(bundles_of(storage)) == (SHARDS / 2 if room == 3000 else 0)
    assert same_as_without(storage) and verify(storage).sound


def test_a_record_that_is_replaced_while_it_is_read_is_not_bundled(storage):
    manifest, first = read_manifest(storage, "small"), commit_of(storage, 0)
    read = storage.read

    def read_later(name: str, start: int = 0, end: int | None = None) -> bytes:
        if name == commit_file("small", 0):
            storage._write(name, replace(first, statistics={}).to_bytes())
        return read(name, start, end)

    storage.read = read_later
    publish_bundles(storage, manifest)
    storage.read = read
    [bundle] = bundles_module.bundles("small", storage.files("small/commits"))
    assert bundles_module.read_bundle(storage, manifest, bundle).keys() == set(range(1, SHARDS))
    assert same_as_without(storage)


def test_a_bundle_that_is_damaged_is_not_believed_and_is_named(storage):
    manifest = read_manifest(storage, "small")
    publish_bundles(storage, manifest)
    [name] = bundles_of(storage)
    data, chance = storage.contents[name], random.Random(1)
    harmed = [b"", data[:-1], data + b"x", data[::-1], bundles_module.gzip.compress(b"{}")]
    harmed += [flipped(data, chance.randrange(80, 8 * len(data))) for _ in range(12)]  # not in the head, which says nothing
    for other in harmed:
        storage._write(name, other)
        assert same_as_without(storage)
        with pytest.raises(DamageError, match=name):
            bundles_module.read_bundle(storage, manifest, bundles_module.Bundle(name, len(other), 0, 5))
    storage._write(name, b"")
    [damage] = verify(storage).damage
    assert name in damage and "delete that file" in damage
    assert replace_bundles(storage, manifest) == SHARDS
    assert storage.contents[name] == data and verify(storage).sound


def test_a_bundle_that_says_another_thing_is_found_by_verify(storage):
    manifest = read_manifest(storage, "small")
    entries = commit_records(storage, "small")
    commits = {shard: (entries[shard], replace(commit_of(storage, shard), documents=99)) for shard in entries}
    [(name, data)] = bundles_module.bundled(manifest, commits)
    storage._write(name, data)
    [damage] = verify(storage).damage
    assert name in damage and "says another thing of shard 0 than its commit record" in damage


def flipped(data: bytes, place: int) -> bytes:
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def test_any_history_of_records_and_bundles_is_opened_as_without_bundles(storage):
    """Shards that are committed, lost, repaired and damaged, bundles made at any time, and a dump that is made again."""
    chance = random.Random(7)
    commits = {shard: commit_of(storage, shard) for shard in range(SHARDS)}
    manifest = read_manifest(storage, "small")

    def record(shard: int) -> CommitRecord:
        return replace(commits[shard], identity=manifest.identity_sha256, documents=chance.randrange(3))

    def put_record() -> None:
        shard = chance.randrange(SHARDS)
        if chance.random() < 0.5:
            storage.remove(commit_file("small", shard))
        storage.create(commit_file("small", shard), lambda file: file.write(record(shard).to_bytes()))

    def remove_record() -> None:
        storage.remove(commit_file("small", chance.randrange(SHARDS)))

    def harm() -> None:
        names = [*bundles_of(storage), *(name for name in storage.contents if chance.random() < 0.1 and "/commits/" in name)]
        if names:
            name = chance.choice(names)
            storage._write(name, flipped(storage.contents[name], chance.randrange(8 * len(storage.contents[name]))))

    def make_again() -> None:
        nonlocal manifest
        manifest = replace(
            make_manifest(shards=SHARDS, teacher={"name": f"numbers {chance.random()}", "vocabulary_size": 11}),
            derived=manifest.derived,
        )
        if chance.random() < 0.5:  # a removal that leaves nothing; else one that was cut off
            storage.remove_folder("small")
        storage._write(manifest_file("small"), manifest.to_bytes())
        for shard in range(SHARDS):
            storage._write(commit_file("small", shard), record(shard).to_bytes())

    actions = [put_record, put_record, remove_record, harm, make_again]
    actions += [lambda: publish_bundles(storage, manifest), lambda: replace_bundles(storage, manifest)] * 2
    used = 0
    for _ in range(60):
        chance.choice(actions)()
        assert same_as_without(storage)
        used += len(bundles_of(storage)) > 0
        if chance.random() < 0.1:
            KnowledgeStore.open(storage)
            chance.choice(actions)()
            found, expected = open_dumps(storage), open_dumps(storage, rebuild_index=True)  # with an index from before
            assert same_rows(found, expected)
    assert used > 20
