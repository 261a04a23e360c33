"""A store needs nothing of the place that holds it but the calls of `Storage`: all works in memory, with no folder at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from memory_storage import PLACES, MemoryStorage, change, new_place, storage_of
from stores import commit, make_manifest, random_sequences, words, write_store

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, MismatchError, StoreError, verify
from knowledge_store.errors import MissingFileError
from knowledge_store.format.sequences import tokens_table
from knowledge_store.storage.local import OPEN_FILES, LocalStorage
from knowledge_store.writing.copy import copy
from knowledge_store.writing.repair import damaged_files

TOKENS = tokens_table(words(11), words(11))


def everything(store: KnowledgeStore) -> tuple:
    """What is read of a store's dump `small` in every way there is."""
    batches = [{name: array.tobytes() for name, array in batch.items()} for batch in store.batches("small", batch_size=3)]
    rows = store.sql("SELECT * FROM positions ORDER BY sequence_id, position").to_pylist()
    facts = store.sql("SELECT * EXCLUDE (committed_at) FROM shards ORDER BY shard").to_pylist()
    kept, _ = store.stored(0, "positions", "small")
    return batches, rows, facts, kept, store.tokens("small"), store.sequences("small")


# The calls


def test_files_are_published_once_and_read_in_parts(place):
    storage = storage_of(place)
    assert storage.files("") == [] and storage.folders("") == []
    assert storage.create("a/zero", lambda file: file.write(b""))
    assert storage.create("a/b/one", lambda file: file.write(b"first"))
    assert not storage.create("a/b/one", lambda file: file.write(b"second"))
    assert (storage.read("a/b/one"), storage.size("a/b/one")) == (b"first", 5)
    assert (storage.read("a/b/one", 1, 3), storage.read("a/b/one", 3), storage.read("a/b/one", 3, 99)) == (b"ir", b"st", b"st")
    assert (storage.folders(""), storage.folders("a"), storage.folders("a/b")) == (["a"], ["b"], [])
    [entry] = storage.files("a/b")
    assert (entry.name, entry.size) == ("one", 5)
    storage.replace([("a/b/one", lambda file: file.write(b"third!")), ("a/b/two", lambda file: False)])
    assert storage.read("a/b/one") == b"third!"
    [changed] = storage.files("a/b")
    assert changed.version != entry.version
    storage.remove("a/b/one")
    storage.remove("a/b/one")
    for missing in ("a/b/one", "a/b/two", "nowhere/one"):
        with pytest.raises(MissingFileError, match=f"{storage.locate(missing)} is missing"):
            storage.read(missing)
        with pytest.raises(MissingFileError):
            storage.size(missing)


def test_a_failed_write_publishes_nothing(place):
    storage = storage_of(place)

    def fail(file):
        file.write(b"half")
        raise DamageError("nothing good")

    with pytest.raises(DamageError):
        storage.create("a/one", fail)
    with pytest.raises(DamageError):
        storage.replace([("a/one", lambda file: file.write(b"whole")), ("a/two", fail)])
    assert storage.files("a") == []


def test_files_that_are_kept_open_are_forgotten_when_they_are_replaced(tmp_path):
    storage = LocalStorage(tmp_path)
    for number in range(OPEN_FILES + 9):
        storage.create(f"{number}", lambda file, number=number: file.write(b"%d" % number))
    expected = [b"%d" % number for number in range(OPEN_FILES + 9)]
    for _ in range(2):
        assert [storage.read(f"{number}", 0, 9) for number in range(OPEN_FILES + 9)] == expected
    links = {os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()}
    opened = [link for link in links if link.startswith(f"{tmp_path}/")]
    assert 0 < len(opened) <= OPEN_FILES
    storage.replace([("70", lambda file: file.write(b"new"))])
    assert storage.read("70", 0, 9) == b"new"
    (tmp_path / "70").unlink()
    with pytest.raises(MissingFileError):
        storage.read("70", 0, 9)


# A store in either place


def test_a_store_is_the_same_in_memory(place, tmp_path):
    write_store(place, shards=3)
    opened = KnowledgeStore.open(place)
    assert everything(opened) == everything(KnowledgeStore.open(write_store(tmp_path / "other", shards=3)))
    assert everything(opened) == everything(pickle.loads(pickle.dumps(opened)))
    found = verify(place)
    assert (found.damage, found.notes, found.shards) == ([], [], 3)


def test_listings_are_few(tmp_path):
    place = MemoryStorage()
    for number in range(4):
        write_store(place, f"dump{number}", shards=5)
    place.listings = place.reads = 0
    KnowledgeStore.open(place)
    assert place.listings <= 2 * 4 + 1
    place.listings = place.reads = 0
    opened = KnowledgeStore.open(place)
    assert place.listings <= 2 * 4 + 1
    assert place.reads == 1 + 4  # store.json and the manifests: the index holds what commit records say
    place.listings = 0
    list(opened.batches("dump0"))
    opened.sql("SELECT count(*) FROM positions")
    assert place.listings == 0


def test_dumps_resume_and_damage_is_named_and_repaired(place):
    writer = DumpWriter.open(place, make_manifest(shards=2), TOKENS)
    commit(writer, 0, random_sequences(0, 4))
    assert (writer.committed(0), writer.committed(1)) == (True, False)
    assert any("1 of 2 shards still to be dumped" in note for note in verify(place).notes)
    writer = DumpWriter.open(place, make_manifest(shards=2), TOKENS)
    commit(writer, 1, random_sequences(1, 4))
    before = everything(KnowledgeStore.open(place))
    for name in ("small/positions/00001.parquet", "small/commits/00000.json"):
        change(place, name, lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:])
    change(place, "small/sequences/00001.parquet", None)
    assert sorted(damaged_files(writer, 1)) == sorted(sentence for sentence in verify(place).damage if "00001" in sentence)
    assert len(verify(place).damage) == 3
    for shard in (0, 1):
        commit(writer, shard, random_sequences(shard, 4), repair=True)
    assert verify(place).damage == []
    assert everything(KnowledgeStore.open(place)) == before


def test_a_dump_is_removed(place):
    write_store(place, "first")
    write_store(place, "second")
    opened = KnowledgeStore.open(place)
    opened.remove("first")
    assert opened.dumps == KnowledgeStore.open(place).dumps == ("second",)
    assert storage_of(place).folders("") == ["second"]


def opened_below(folder: Path) -> list[str]:
    """The files of a folder that this process has open."""
    links = (os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir())
    return [link for link in links if link.startswith(f"{folder}/")]


def test_nothing_is_left_open_and_a_store_says_what_it_holds(place):
    write_store(place, shards=2)
    with KnowledgeStore.open(place) as store:
        assert len(store) == 8
        assert store[0] and store.sql("SELECT count(token_id) FROM positions")
        assert isinstance(place, MemoryStorage) or opened_below(place)
        assert repr(store) == f"KnowledgeStore({store.address!r}: small: 8 sequences, {store.info()[0].positions} positions)"
    assert isinstance(place, MemoryStorage) or not opened_below(place)


# One dump that cannot be used


def as_copied(storage, tmp_path):
    for name in ("manifest.json", "tokens.parquet", "commits/00000.json", "positions/00000.parquet", "sequences/00000.parquet"):
        data = storage.read(f"small/{name}")
        storage.create(f"small copy/{name}", lambda file, data=data: file.write(data))


def test_a_copy_under_another_name_is_closed_and_the_store_is_open(place, tmp_path):
    write_store(place)
    before = everything(KnowledgeStore.open(place))
    as_copied(storage_of(place), tmp_path)
    opened = KnowledgeStore.open(place)
    assert (opened.dumps, set(opened.closed)) == (("small",), {"small copy"})
    assert "belongs to a dump named 'small'" in opened.closed["small copy"]
    with pytest.warns(UserWarning, match="not asked: .*small copy is closed: .*belongs to a dump named 'small'"):
        assert everything(opened) == before
    assert "small copy: closed" in repr(opened)
    with pytest.raises(StoreError, match="belongs to a dump named 'small'"):
        opened.dump("small copy")
    with pytest.raises(InputError, match=r"name a dump of .*small; small copy is closed: .*belongs to a dump named 'small'"):
        opened.dump()
    found = verify(place)
    [sentence] = found.closed
    assert not found.damage and not found.sound and found.dumps == 1
    assert "small copy/manifest.json belongs to a dump named 'small'" in sentence
    opened.remove("small copy")
    assert not KnowledgeStore.open(place).closed and verify(place).sound


def test_a_damaged_manifest_closes_its_dump_and_sql(place):
    """SQL over all dumps must not answer as if one were not there."""
    write_store(place, "sound")
    write_store(place, "harmed")
    change(place, "harmed/manifest.json", lambda data: data.replace(b"numbers", b"letters"))
    opened = KnowledgeStore.open(place)
    assert (opened.dumps, set(opened.closed)) == (("sound",), {"harmed"})
    assert len(list(opened.batches("sound"))) == 1 and len(opened.info()) == 1
    with pytest.raises(DamageError, match=r"harmed/manifest\.json is damaged"):
        opened.manifest("harmed")
    with pytest.raises(DamageError, match=r"harmed/manifest\.json is damaged"):
        opened.sql("SELECT count(*) FROM positions")
    opened.remove("harmed")
    assert opened.sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 8}]


@pytest.mark.parametrize("fresh", [False, True])
def test_an_altered_commit_record_closes_its_dump_and_sql(place, tmp_path, fresh):
    write_store(place, "sound")
    write_store(place, "harmed", shards=3)
    if not fresh:
        KnowledgeStore.open(place)
    change(place, "harmed/commits/00001.json", lambda data: data[::-1] + b" ")
    for _ in range(2):
        opened = KnowledgeStore.open(place)
        assert (opened.dumps, list(opened.closed)) == (("sound",), ["harmed"])
        assert len(list(opened.batches("sound"))) == 1 and [each.dump for each in opened.info()] == ["sound"]
        advice = r"harmed/commits/00001\.json is damaged.*`knowledge-store verify` .*`teacher-dump run … --repair`"
        for ask in (opened.manifest, opened.sequences, lambda dump, store=opened: store.batches(dump)):
            with pytest.raises(DamageError, match=advice):
                ask("harmed")
        with pytest.raises(DamageError, match=f"{advice}.*SQL is refused"):
            opened.sql("SELECT count(*) FROM positions")
        with pytest.raises(DamageError, match=f"{advice}.*not counted"):
            len(opened)
        with pytest.raises(InputError, match=r"name a dump .*sound; harmed is closed"):
            opened.dump()
    [sentence] = verify(place).damage
    assert "harmed/commits/00001.json is damaged" in sentence
    for name in (None, "harmed"):  # what is sound is copied, and then the damage is told
        with pytest.raises(DamageError, match=r"harmed/commits/00001\.json is damaged"):
            copy(place, tmp_path / "copy", name)
    copied = {each.dump: each.shards for each in KnowledgeStore.open(tmp_path / "copy").info()}
    assert copied == {"sound": 2, "harmed": 2}
    write_store(place, "other")
    KnowledgeStore.open(place).remove("other")
    opened = KnowledgeStore.open(place, rebuild_index=True)
    assert (opened.dumps, list(opened.closed)) == (("sound",), ["harmed"])
    opened.remove("harmed")
    assert opened.sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 8}]


# Renaming and copying


def test_rename(tmp_path):
    store = write_store(tmp_path / "store", "old", shards=3)
    write_store(store, "other")
    opened = KnowledgeStore.open(store)
    before = [opened["old", ordinal]["input_ids"].tolist() for ordinal in range(12)]
    refused = [("old", "other", "there is a"), ("no", "new", "no dump 'no'"), ("old", "a b", "cannot name a dump")]
    for old, new, message in refused:
        with pytest.raises(InputError, match=message):
            opened.rename(old, new)
    opened.rename("old", "new")
    assert opened.dumps == KnowledgeStore.open(store).dumps == ("new", "other")
    assert [opened["new", ordinal]["input_ids"].tolist() for ordinal in range(12)] == before
    assert not verify(store).damage
    DumpWriter.open(store, make_manifest("new", shards=3), TOKENS)
    memory = MemoryStorage()
    write_store(memory)
    with pytest.raises(InputError, match="cannot rename"):
        KnowledgeStore.open(memory).rename("small", "new")


def test_a_rename_that_is_cut_off_is_finished(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store", "old")
    places = []

    def cut(temporary, path):
        if len(places) == 1:
            raise KeyboardInterrupt
        places.append(path)
        temporary.replace(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("knowledge_store.storage.local.put_in_place", cut)
        KnowledgeStore.open(store).rename("old", "new")
    opened = KnowledgeStore.open(store)
    assert (opened.dumps, set(opened.closed)) == ((), {"new"})
    opened.rename("old", "new")
    assert opened.dumps == ("new",) and not opened.closed
    assert not verify(store).damage


@pytest.mark.parametrize("harm", ["altered", "of another shard"])
def test_nothing_is_renamed_where_a_record_cannot_be_used(tmp_path, harm):
    store = write_store(tmp_path / "store", "old", shards=3)
    opened = KnowledgeStore.open(store)
    record = store / "old/commits/00002.json"
    other = (store / "old/commits/00001.json").read_bytes()
    record.write_bytes(record.read_bytes()[::-1] if harm == "altered" else other)
    with pytest.raises(DamageError, match=r"old/commits/00002\.json is damaged"):
        opened.rename("old", "new")
    assert storage_of(store).folders("") == ["old"]


def test_a_copy_removes_what_one_that_died_left(tmp_path):
    source, target = write_store(tmp_path / "source"), tmp_path / "target"
    copy(source, target)
    left = [
        target / folder / ".tmp-00001-0" for folder in (".", "small", "small/positions", "small/sequences", "small/commits")
    ]
    for path in left:
        path.write_bytes(b"half")
    copy(source, target)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("other", PLACES)
def test_copy(place, other, tmp_path):
    write_store(place, "first", shards=3)
    write_store(place, "second")
    target = new_place(other, tmp_path / "target")
    done = copy(place, target, "first")
    assert (done.dumps, done.shards, done.existing) == (("first",), 3, 0)
    assert KnowledgeStore.open(target).dumps == ("first",)
    change(target, "first/commits/00001.json", None)  # as if it had been cut off
    change(target, "first/commits/00002.json", None)
    change(target, "first/positions/00002.parquet", None)
    assert (copy(place, target).shards, copy(place, target).shards) == (4, 0)
    assert copy(place, target).existing == 5
    assert not verify(target).damage and not verify(target).notes
    one, two = (KnowledgeStore.open(each) for each in (place, target))
    query = "SELECT * FROM positions ORDER BY dump, sequence_id, position"
    assert one.sql(query).equals(two.sql(query))
    assert isinstance(one.sql(query), pa.Table)


@pytest.mark.parametrize("lost", [False, True])
def test_a_copy_checks_what_is_there_already(place, lost, tmp_path):
    """And says what to do, which helps."""
    source = write_store(tmp_path / "source")
    copy(source, place)
    name = "small/positions/00001.parquet"
    change(place, name, None if lost else lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:])
    record = storage_of(place).locate("small/commits/00001.json")
    advice = f"delete {record}" if lost else f"delete that file and {record}"
    with pytest.raises(DamageError, match=rf"positions/00001\.parquet is .*; {advice}, and copy again"):
        copy(source, place)
    if not lost:
        change(place, name, None)
    change(place, "small/commits/00001.json", lambda data: data[::-1])
    with pytest.raises(DamageError, match=r"00001\.json is damaged: .*; delete that file, and copy again"):
        copy(source, place)
    change(place, "small/commits/00001.json", None)
    done = copy(source, place)
    assert (done.shards, done.existing) == (1, 1)
    assert not verify(place).damage


def test_what_is_damaged_is_not_copied(place, tmp_path):
    write_store(place, shards=2)
    change(place, "small/positions/00001.parquet", lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:])
    with pytest.raises(DamageError, match=r"positions/00001\.parquet is damaged"):
        copy(place, tmp_path / "target")
    assert not verify(tmp_path / "target").damage
    assert KnowledgeStore.open(tmp_path / "target").info()[0].shards == 1
    with pytest.raises(InputError, match="no dump 'nothing'"):
        copy(place, tmp_path / "target", "nothing")
    write_store(tmp_path / "third", k=2)
    with pytest.raises(MismatchError, match="made differently"):
        copy(place, tmp_path / "third")


def test_sql_that_no_other_process_can_answer():
    """The storage is named, and what to do."""
    storage = MemoryStorage()
    write_store(storage)
    opened = KnowledgeStore.open(storage)
    with pytest.raises(InputError, match=f"SQL over {storage.address} cannot be isolated: no other program can .*copy"):
        opened.sql("SELECT 1", isolated=True)
    assert opened.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]


@pytest.mark.parametrize("kind", ["the same", "another way"])
def test_a_copy_into_itself(tmp_path, kind):
    write_store(tmp_path / "store")
    (tmp_path / "link").symlink_to("store")
    with pytest.raises(InputError, match="cannot be copied into itself: give another store"):
        copy(tmp_path / "store", tmp_path / ("store" if kind == "the same" else "link"))
    storage = MemoryStorage()
    write_store(storage)
    with pytest.raises(InputError, match="cannot be copied into itself"):
        copy(storage, storage)
