"""Nothing published is ever replaced, whoever else writes, dies or fails at the same time.

Of `tmp_path` is what a disk alone has: other processes, temporary files, folders. All else holds in any place.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from memory_storage import file_in, names_in, put, storage_of
from stores import commit, make_manifest, random_sequences, stored_table, words, write_store
from torture.heartbeat import PATIENCE

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, MismatchError, StoreError, verify
from knowledge_store.format.integrity import TableFile
from knowledge_store.format.parquet import publish_table, read_table, write_table
from knowledge_store.format.sequences import TOKENS_COLUMNS, tokens_table
from knowledge_store.storage import contents
from knowledge_store.storage.local import make_folder, publish, remove_leftovers

TOKENS = tokens_table(words(11), words(11))


def python(code: str, *arguments: object, **options) -> subprocess.Popen[str]:
    """A Python process of its own that can import this project and the helpers of the tests."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


HOLD = """
import sys, time
from pathlib import Path
from knowledge_store.storage.local import publish
def write(file):
    file.write(b"half a file")
    file.flush()
    print("writing", flush=True)
    while True:
        time.sleep(1)
publish(Path(sys.argv[1]), write)
"""


def writer_in_the_middle(path: Path) -> subprocess.Popen[str]:
    """A process that has begun to write a file, and goes no further."""
    process = python(HOLD, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def test_a_name_is_given_once(tmp_path):
    path = tmp_path / "file"
    assert publish(path, contents(b"first"))
    assert not publish(path, contents(b"second"))
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_taken_while_writing(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"slow")
        publish(path, contents(b"quick"))

    assert not publish(path, write)
    assert path.read_bytes() == b"quick"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path):
    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_a_living_writer_keeps_its_file_and_a_killed_one_does_not(tmp_path):
    store = write_store(tmp_path / "store")
    writer = DumpWriter.open(store, make_manifest(shards=2), TOKENS)
    process = writer_in_the_middle(store / "small/positions/00002.parquet")
    try:
        [temporary] = temporary_files(store)
        assert remove_leftovers(store / "small/positions") == 0
        DumpWriter.open(store, make_manifest(shards=2), TOKENS)
        assert temporary.read_bytes() == b"half a file"
    finally:
        stop(process)
    # A leftover disturbs no reader, …
    assert len(KnowledgeStore.open(store)) == 8
    assert not verify(store).damage
    assert temporary.exists()
    # … and the next writer tidies it away.
    DumpWriter.open(store, writer.manifest, TOKENS)
    assert temporary_files(store) == []


def test_leftovers_of_commit_records_are_no_commits(tmp_path):
    store = write_store(tmp_path / "store")
    process = writer_in_the_middle(store / "small/commits/00002.json")
    stop(process)
    assert len(temporary_files(store)) == 1
    assert KnowledgeStore.open(store, rebuild_index=True).info()[0].shards == 2
    found = verify(store)
    assert found.damage == []
    assert any(".tmp-" in note for note in found.notes)


def test_a_store_whose_making_was_cut_off_is_made_after_all(tmp_path):
    (tmp_path / "store").mkdir()
    stop(writer_in_the_middle(tmp_path / "store/store.json"))
    write_store(tmp_path / "store")
    assert len(KnowledgeStore.open(tmp_path / "store")) == 8
    assert temporary_files(tmp_path / "store") == []


def test_files_of_an_uncommitted_shard_are_committed_as_they_stand(place, tmp_path):
    """A twin on another machine may differ in the last digit: what stands there counts, in its statistics as well."""
    writer = DumpWriter.open(place, make_manifest(shards=1), TOKENS)
    knowledge = random_sequences(0, 4)
    twin = [{**each, "token_logprob": each["token_logprob"] - 1} for each in random_sequences(0, 4)]
    for each in twin:  # where the token is no candidate, its log-probability is free to differ
        among = (each["candidate_ids"] == each["token_id"][:, None]).any(axis=1)
        each["token_logprob"] += among
    other = write_store(tmp_path / "other", shards=1)
    other_writer = DumpWriter.open(tmp_path / "twin", make_manifest(shards=1), TOKENS)
    commit(other_writer, 0, twin)
    standing = (Path(other_writer.address) / "positions/00000.parquet").read_bytes()
    assert standing != (other / "small/positions/00000.parquet").read_bytes()
    writer.storage.create("small/positions/00000.parquet", lambda file: file.write(standing))

    commit(writer, 0, knowledge)
    assert file_in(place, "small/positions/00000.parquet").read_bytes() == standing
    assert verify(place).damage == []
    summaries = [KnowledgeStore.open(each).info()[0] for each in (place, tmp_path / "twin", other)]
    assert (
        summaries[0].statistics["positions.mean_nll"]
        == summaries[1].statistics["positions.mean_nll"]
        != summaries[2].statistics["positions.mean_nll"]
    )


def test_a_standing_commit_record_wins(place):
    writer = DumpWriter.open(place, make_manifest(shards=1), TOKENS)
    late = DumpWriter.open(place, make_manifest(shards=1), TOKENS)
    knowledge = random_sequences(0, 4)
    assert not late.committed(0)
    commit(writer, 0, knowledge)
    assert late.committed(0)
    before = {name: file_in(place, name).read_bytes() for name in names_in(place)}
    commit(late, 0, knowledge)
    assert {name: file_in(place, name).read_bytes() for name in names_in(place)} == before


@pytest.mark.parametrize("what", ["other rows", "garbage"])
def test_a_leftover_that_does_not_belong_is_refused(place, what):
    writer = DumpWriter.open(place, make_manifest(shards=1), TOKENS)
    name, other, file = "small/positions/00000.parquet", pa.table({"a": [1, 2]}), io.BytesIO()
    write_table(file, other.schema, [other])
    put(place, name, b"PAR1 nothing of ours PAR1" if what == "garbage" else file.getvalue())
    with pytest.raises(DamageError) as raised:
        commit(writer, 0, random_sequences(0, 4))
    assert writer.storage.locate(name) in str(raised.value)
    assert not writer.committed(0)


def test_another_vocabulary_of_a_run_that_was_cut_off(place):
    """tokens.parquet comes before the manifest: a run killed between them must not lend its vocabulary to the next dump."""
    store, file = write_store(place), io.BytesIO()
    other = tokens_table([f"v{token}" for token in range(11)], words(11))
    write_table(file, other.schema, [other], TOKENS_COLUMNS)
    put(store, "other/tokens.parquet", file.getvalue())
    with pytest.raises(MismatchError, match="another vocabulary"):
        DumpWriter.open(store, make_manifest("other"), TOKENS)
    assert "other/manifest.json" not in names_in(store)
    DumpWriter.open(store, make_manifest("other"), other)


def test_a_dump_made_otherwise_is_refused_and_left_alone(place):
    store = write_store(place)
    before = names_in(store)
    with pytest.raises(MismatchError, match="of positions, the selection k was 3 and is now 4"):
        DumpWriter.open(store, make_manifest(k=4), TOKENS)
    assert names_in(store) == before


CREATE = """
import sys
from pathlib import Path
from stores import write_store
from knowledge_store import KnowledgeStore
print("ready", flush=True)
sys.stdin.readline()
store = write_store(Path(sys.argv[1]), shards=3)
assert len(KnowledgeStore.open(store)) == 12
"""


def test_processes_that_create_one_dump_at_once_agree(tmp_path):
    for attempt in range(2):
        store = tmp_path / f"store{attempt}"
        processes = [python(CREATE, store, stdin=subprocess.PIPE) for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
        assert verify(store).damage == []
        assert temporary_files(store) == []
        assert len(KnowledgeStore.open(store)) == 12


FULL_DISK = """
import resource, sys
from pathlib import Path
from stores import *
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
from knowledge_store import KnowledgeStoreError
try:
    write_store(Path(sys.argv[1]), shards=1)
except KnowledgeStoreError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_disk_that_takes_no_more(tmp_path):
    """A real limit on file sizes stands for a full disk: one sentence that names the file, and nothing half-written."""
    output, errors = python(FULL_DISK, tmp_path / "store").communicate(timeout=PATIENCE)
    assert errors == ""
    assert output.startswith(f"StoreError: cannot write {tmp_path}/store/small/")
    assert output.endswith(": File too large\n")
    assert output.count("\n") == 1
    names = {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert names <= {"store.json", "tokens.parquet"}
    assert temporary_files(tmp_path) == []


def test_files_where_folders_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file, not a store"):
        DumpWriter.open(tmp_path / "file", make_manifest(), TOKENS)
    with pytest.raises(StoreError, match="is not a folder, where one of the store should be"):
        DumpWriter.open(tmp_path / "file/store", make_manifest(), TOKENS)
    store = write_store(tmp_path / "store")
    (store / "other").write_text("mine")
    with pytest.raises(StoreError, match="other is not a folder"):
        DumpWriter.open(store, make_manifest("other"), TOKENS)
    with pytest.raises(StoreError, match="cannot write"):
        publish(tmp_path / "nowhere/file", contents(b""))
    assert (tmp_path / "file").read_text() == (store / "other").read_text() == "mine"


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_bytes(b"...")
    with pytest.raises(StoreError, match="something else in it"):
        DumpWriter.open(tmp_path / "photos", make_manifest(), TOKENS)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]


ODD_NAMES = ["", ".", "..", "../up", "a/b", "a\\b", ".hidden", "-x", "a b", "naïve", "a\n", "x" * 101, "a'b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_cannot_be_folders(place, name):
    with pytest.raises(InputError, match="cannot name a dump"):
        DumpWriter.open(place, make_manifest(name), TOKENS)
    assert names_in(place) == []


def test_the_name_of_the_store_s_own_file(place):
    with pytest.raises(InputError, match="has a file of that name"):
        DumpWriter.open(place, make_manifest("store.json"), TOKENS)


def test_odd_but_allowed_names(place):
    for name in ("index", "tokens", "commits", "7", "A.b_c-d", "manifest.json", "select"):
        write_store(place, name, shards=1)
    opened = KnowledgeStore.open(place)
    assert set(opened.dumps) == {"index", "tokens", "commits", "7", "A.b_c-d", "manifest.json", "select"}
    assert opened.sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 28}]
    assert verify(place).damage == []


def test_an_unknown_kind_is_refused(place):
    with pytest.raises(InputError, match="unknown kinds of knowledge, dreams"):
        DumpWriter.open(place, make_manifest(kinds=("positions", "dreams")), TOKENS)


def test_removing_a_dump(place):
    store = write_store(place, "first")
    write_store(store, "second")
    opened = KnowledgeStore.open(store)
    with pytest.raises(InputError, match="no dump 'third'"):
        opened.remove("third")
    opened.remove("first")
    assert opened.dumps == KnowledgeStore.open(store).dumps == ("second",)
    assert {name.split("/")[0] for name in names_in(store)} == {"second", "store.json"}
    assert {row["dump"] for row in opened.sql("SELECT dump FROM shards").to_pylist()} == {"second"}
    assert len(opened) == 8


def test_a_removal_that_was_cut_off(tmp_path):
    """The dump is gone for every reader; the next writer finishes the work."""
    store = write_store(tmp_path / "store", "first")
    write_store(store, "second")
    (store / "first").rename(store / ".tmp-removed-first-0123456789ab")
    assert KnowledgeStore.open(store).dumps == ("second",)
    found = verify(store)
    assert found.damage == []
    assert any("was removed" in note for note in found.notes)
    DumpWriter.open(store, make_manifest("second"), TOKENS)
    assert temporary_files(store) == []


def test_a_dump_removed_and_made_anew(place):
    store = write_store(place, k=3)
    KnowledgeStore.open(store).remove("small")
    write_store(store, k=2)
    assert KnowledgeStore.open(store)[0]["candidate_ids"].shape[1] == 2


def test_made_folders_and_leftovers_in_none(tmp_path):
    make_folder(tmp_path / "a/b/c")
    make_folder(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    assert remove_leftovers(tmp_path / "nowhere") == 0


def test_a_published_shard_is_whole(place):
    """What a name stands for is complete from the moment it is there."""
    store = write_store(place, shards=1)
    table = stored_table(store, "positions")
    expected = np.concatenate([each["token_id"] for each in random_sequences(0, 4)])
    assert np.array_equal(table["token_id"].to_numpy(), expected)


def test_many_equal_values_in_few_bytes_are_read(place):
    """Draws of a teacher that is sure of one token, five million of them in a few hundred bytes."""
    rows, draws = 32_768, 160
    ids = pa.ListArray.from_arrays(np.arange(0, rows * draws + 1, draws, np.int32), np.ones(rows * draws, np.uint32))
    table = pa.table({"tail_ids": ids})
    storage = storage_of(place)
    record, _ = publish_table(storage, "draws.parquet", table.schema, [table])
    assert record.bytes < 10_000
    assert read_table(TableFile(storage, "draws.parquet", record, table.schema)).equals(table)
