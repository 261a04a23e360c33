"""The index is derived: deleted, cut, garbled or out of date, the answers are the same."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
from conftest import ROOT
from memory_storage import Place, change, names_in, put
from stores import commit, commit_of, index_of, make_manifest, manifest_of, random_sequences, words, write_store
from torture.heartbeat import PATIENCE

from knowledge_store import DamageError, DumpWriter, KnowledgeStore
from knowledge_store.catalogue.index import INDEX_SCHEMA
from knowledge_store.format.commits import commit_records
from knowledge_store.format.sequences import tokens_table
from knowledge_store.storage.local import LocalStorage, remove_folder

QUERY = "SELECT * EXCLUDE (committed_at) FROM shards ORDER BY dump, shard"


def answers(store: Place) -> tuple:
    opened = KnowledgeStore.open(store)
    return opened.info(), opened.sql(QUERY).to_pylist(), len(opened), opened[len(opened) - 1]["input_ids"].tolist()


@pytest.fixture
def store(place) -> Place:
    return write_store(place, shards=3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store for what only a disk has: links, things that are no folder, files that go while they are listed."""
    return write_store(tmp_path / "store", shards=3)


def test_deleted(store):
    before = answers(store)
    index_of(store).unlink()
    assert answers(store) == before
    assert index_of(store).is_file()


@pytest.mark.parametrize("harm", ["empty", "text", "cut", "tail", "folder", "other schema", "no tables"])
def test_harmed(store, harm):
    before = answers(store)
    path = index_of(store)
    data = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm == "other schema":
        with duckdb.connect(str(path)) as connection:
            connection.execute("CREATE TABLE about AS SELECT 'format 99' AS value")
    elif harm == "no tables":
        with duckdb.connect(str(path)) as connection:
            connection.execute("CREATE TABLE about AS SELECT ? AS value", [INDEX_SCHEMA])
            connection.execute("CREATE TABLE shards AS SELECT 1 AS dump; CREATE TABLE files AS SELECT 2 AS dump")
    else:
        path.write_bytes({"empty": b"", "text": b"not a database" * 99, "cut": data[:5000], "tail": data[5000:]}[harm])
    assert answers(store) == before
    assert answers(store) == before


def test_flipped_bits(store):
    before = answers(store)
    path = index_of(store)
    data = path.read_bytes()
    chance = random.Random(1)
    for _ in range(12):
        harmed = bytearray(data)
        harmed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(harmed)
        assert answers(store) == before


def test_a_new_commit_is_seen_and_only_it_is_read(place):
    writer = DumpWriter.open(place, make_manifest(shards=3), tokens_table(words(11), words(11)))
    commit(writer, 1, random_sequences(1, 4))
    opened = KnowledgeStore.open(place)
    assert (len(opened), opened.info()[0].complete) == (4, False)
    commit(writer, 0, random_sequences(0, 4))
    assert len(opened) == 4  # as it stood when it was opened
    change_unseen(place, "small/commits/00001.json", lambda data: data[::-1])
    opened = KnowledgeStore.open(place)  # what the index holds of shard 1 still stands: its record is not read again
    assert [row["shard"] for row in opened.sql(QUERY).to_pylist()] == [0, 1]
    assert opened[0]["input_ids"].tolist() == random_sequences(0, 4)[0]["token_id"].tolist()
    with pytest.raises(DamageError, match=r"00001\.json"):
        KnowledgeStore.open(place, rebuild_index=True).dump()


def change_unseen(place: Place, name: str, edit: Callable[[bytes], bytes]) -> None:
    """Edit a file so that a listing shows the same size and version."""
    if isinstance(place, Path):
        status = (place / name).stat()
        change(place, name, edit)
        os.utime(place / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        place.contents[name] = edit(place.contents[name])


def test_shards_with_other_statistics(store):
    before = KnowledgeStore.open(store).info()[0]
    last = commit_of(store, 2)
    manifest = manifest_of(store)
    larger = replace(manifest, derived=make_manifest(shards=4).derived | {"tokens": manifest.derived["tokens"]})
    put(store, "small/manifest.json", larger.to_bytes())
    other = replace(last, shard=3, statistics={"positions.predictions": 5, "other.mean": 0.5})
    put(store, "small/commits/00003.json", other.to_bytes())
    for rebuild in (False, False, True):  # merged into the index, read from it, and made anew
        opened = KnowledgeStore.open(store, rebuild_index=rebuild)
        rows = opened.sql('SELECT "positions.mean_nll", "other.mean" FROM shards ORDER BY shard').to_pylist()
        assert [row["other.mean"] for row in rows] == [None, None, None, 0.5]
        assert [row["positions.mean_nll"] is None for row in rows] == [False, False, False, True]
        facts = opened.info()[0]
        assert facts.statistics["positions.predictions"] == before.statistics["positions.predictions"] + 5
        assert facts.statistics["positions.mean_nll"] == pytest.approx(
            before.statistics["positions.mean_nll"]
        )  # of the shards that have one
        assert facts.column_bytes["positions.token_id"] > before.column_bytes["positions.token_id"]


def test_no_shard_is_opened(store):
    for name in names_in(store):
        if name.startswith(("small/positions/", "small/sequences/")):
            change(store, name, None)
    opened = KnowledgeStore.open(store, rebuild_index=True)
    assert opened.info()[0].shards == 3


def test_commits_are_found_whatever_else_lies_there(store):
    before = answers(store)
    for name in (".tmp-00003.json-0", "00003.json.bak", "3.json", "000003.json", "note.txt", "٠٠٠٠٣.json"):
        put(store, f"small/commits/{name}", b"{}")
    assert answers(store) == before
    put(store, "small/commits/00003.json", b"{}")
    with pytest.raises(DamageError, match=r"00003\.json"):
        KnowledgeStore.open(store).dump()


def test_shard_numbers_of_more_than_five_digits(place):
    """Names sort as text; shards sort as numbers."""
    writer = DumpWriter.open(place, make_manifest(shards=100_001), tokens_table(words(11), words(11)))
    for shard in (100_000, 99_999, 7):
        commit(writer, shard, random_sequences(shard, 1))
    opened = KnowledgeStore.open(place)
    assert [row["shard"] for row in opened.sql(QUERY).to_pylist()] == [7, 99_999, 100_000]
    expected = [random_sequences(shard, 1)[0]["token_id"].tolist() for shard in (7, 99_999, 100_000)]
    assert [opened[ordinal]["input_ids"].tolist() for ordinal in range(3)] == expected


OPEN_OFTEN = """
import sys
from knowledge_store import KnowledgeStore
from knowledge_store.catalogue.index import index_path
from knowledge_store.storage.local import LocalStorage
for turn in range(9):
    opened = KnowledgeStore.open(sys.argv[1], rebuild_index=turn % 3 == 0)
    assert opened.info()[0].shards == len(opened.sql("SELECT * FROM shards")) >= 3
    if turn % 5 == 0:
        index_path(LocalStorage(sys.argv[1])).unlink(missing_ok=True)
"""


def test_several_processes_refresh_it_at_once(tmp_path):
    store = tmp_path / "store"
    writer = DumpWriter.open(store, make_manifest(shards=8), tokens_table(words(11), words(11)))
    for shard in range(3):
        commit(writer, shard, random_sequences(shard, 2))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPEN_OFTEN, str(store)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    for shard in range(3, 8):
        commit(writer, shard, random_sequences(shard, 2))
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    assert KnowledgeStore.open(store).info()[0].complete
    assert [path.name for path in store.iterdir() if path.name.startswith(".tmp-")] == []


def test_links_among_commit_records(folder):
    """What stands in a folder after a link to nothing stands there all the same."""
    link = folder / "small/commits/00003.json"
    for target in ("/nonexistent", link.name):
        link.symlink_to(target)
        with pytest.raises(DamageError, match=r"00003\.json is damaged: it cannot be read"):
            KnowledgeStore.open(folder).dump()
        link.unlink()


def test_what_is_no_folder_of_commit_records(folder, tmp_path):
    commits = folder / "small/commits"
    commits.rename(tmp_path / "kept")
    assert KnowledgeStore.open(folder).info()[0].shards == 0
    makers = (
        commits.touch,
        lambda: os.mkfifo(commits),
        lambda: commits.symlink_to("commits"),
        lambda: commits.symlink_to("no"),
    )
    for make in makers:
        make()
        with pytest.raises(DamageError, match=f"{commits} is damaged: it is not a folder"):
            KnowledgeStore.open(folder).dump()
        commits.unlink()


@pytest.mark.parametrize("whole", [False, True])
def test_records_that_are_removed_while_they_are_looked_for(folder, monkeypatch, whole):
    """A dump that is removed has no shards, and a record that is removed is not there; neither is an error."""
    storage, scandir = LocalStorage(folder), os.scandir

    def later(path):
        monkeypatch.undo()
        entries = list(scandir(path))
        if whole:
            remove_folder(folder / "small")
        else:
            (folder / "small/commits/00001.json").unlink()
        return Listing(entries)

    monkeypatch.setattr("knowledge_store.storage.local.os.scandir", later)
    assert set(commit_records(storage, "small")) == (set() if whole else {0, 2})


class Listing:
    """Entries as os.scandir has them: a context, and an iterator."""

    def __init__(self, entries):
        self.entries = entries

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return iter(self.entries)


def test_it_lies_in_the_cache_of_the_user_and_a_store_may_be_read_only(folder, monkeypatch, tmp_path):
    before = answers(folder)
    assert not list(folder.rglob("*.duckdb"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder: nothing can be kept")
    assert answers(folder) == before
    assert (tmp_path / "file").read_text() == "no folder: nothing can be kept"


def test_a_store_has_one_index_whatever_it_is_called_from(folder, monkeypatch):
    expected = index_of(folder)
    monkeypatch.chdir(folder.parent)
    assert index_of(Path("store")) == index_of(Path("../") / folder.parent.name / "store") == expected
    assert index_of(folder.parent) != expected


def test_a_store_in_the_place_of_another(store, tmp_path):
    KnowledgeStore.open(store)
    if isinstance(store, Path):
        shutil.rmtree(store)
    else:
        store.contents.clear()
    write_store(store, shards=3, seed=9, corpus={"files": []})
    assert answers(store)[1:] == answers(write_store(tmp_path / "same", shards=3, seed=9, corpus={"files": []}))[1:]
