"""A disk that refuses is one line that names a file, and costs nothing that was committed (`make torture` tries every call)."""

from __future__ import annotations

import math
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest
from conftest import skip_for, story_rows, write_jsonl
from stores import commit, make_manifest, random_sequences, rewrite, table_file_of, words, write_store
from torture import disk_errors, journal_disk
from torture.heartbeat import PATIENCE

from knowledge_store import DumpWriter, StoreError
from knowledge_store.format.integrity import describe
from knowledge_store.format.parquet import read_table
from knowledge_store.format.sequences import tokens_table
from knowledge_store.writing.repair import repair_manifest, repair_tokens
from teacher_dump import DumpConfig, dump
from teacher_dump.dumping.publishing import ShardPublisher


def test_a_disk_that_refuses_calls_of_chance(tmp_path):
    skip_for(disk_errors.unavailable(tmp_path))
    counts = disk_errors.run(seed=1, minutes=math.inf, folder=tmp_path, trials=2)
    assert counts["calls"] == 2
    assert counts["refused"] > 0
    assert counts["survived"] == counts["faults"]
    assert counts["silent"] == 0
    skip_for(journal_disk.unavailable(tmp_path))  # of short writes and full disks
    assert counts["short_writes"] == counts["full_disks"] == 2


def test_a_writer_that_dies_stops_the_dump_at_the_next_batch(tmp_path, loaded_teacher, monkeypatch):
    died, noted, asked = threading.Event(), threading.Event(), []
    predict, work = type(loaded_teacher).predict, ShardPublisher._work

    def dies(*arguments):
        died.set()
        raise MemoryError("the writer's")

    def asks(teacher, *arguments, **wanted):
        asked.append(died.is_set())
        if died.is_set():
            noted.wait(PATIENCE)  # the dump may know from now on
        return predict(teacher, *arguments, **wanted)

    def works(publisher):
        work(publisher)
        noted.set()

    monkeypatch.setattr(DumpWriter, "commit", dies)
    monkeypatch.setattr(ShardPublisher, "_work", works)
    monkeypatch.setattr(type(loaded_teacher), "predict", asks)
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(32))
    with pytest.raises(MemoryError, match="the writer's"):
        dump(DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=48, batch_size=1, shard_size=16), teacher=loaded_teacher)
    assert sum(asked) <= 1  # of 16 batches of the second shard
    assert {thread.name.split("_")[0] for thread in threading.enumerate()}.isdisjoint({"reader", "writer"})


@contextmanager
def no_more_files() -> Iterator[None]:
    """The process has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("read", [lambda file: describe(file.storage, file.name), read_table])
def test_what_cannot_be_opened_is_not_called_damaged(tmp_path, read):
    path = tmp_path / "a.parquet"
    record = rewrite(path, pa.table({"a": [1, 2]}))
    file = table_file_of(path, record)
    read(file)
    file.storage.__init__(tmp_path)  # nothing is open any more
    with no_more_files(), pytest.raises(StoreError, match=r"cannot read .*a\.parquet: Too many open files"):
        read(file)


def test_a_lock_that_cannot_be_opened_is_named(tmp_path):
    store, tokens = write_store(tmp_path / "store"), tokens_table(words(11), words(11))
    writer = DumpWriter.open(store, make_manifest(), tokens)
    knowledge = random_sequences(0, 4)
    calls = {
        "small/commits": lambda: commit(writer, 0, knowledge, repair=True),
        "small": lambda: repair_tokens(writer, tokens),
        "store/small": lambda: repair_manifest(store, make_manifest()),
    }
    for folder, call in calls.items():
        with no_more_files(), pytest.raises(StoreError, match=f"cannot lock .*{folder}: Too many open files"):
            call()


def test_what_cannot_be_found_out_is_not_called_uncommitted(tmp_path):
    store = write_store(tmp_path / "store")
    writer = DumpWriter.open(store, make_manifest(), tokens_table(words(11), words(11)))
    assert writer.committed(0) and not writer.committed(2)
    shutil.rmtree(store / "small/commits")
    assert not writer.committed(0)
    (store / "small/commits").symlink_to("commits")
    with pytest.raises(StoreError, match=r"cannot read .*small/commits/00000\.json"):
        writer.committed(0)
