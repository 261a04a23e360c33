"""Any number of workers on one store, killed and started again, with clocks that are off: every shard once, and whole."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
from conftest import save_teacher, story_rows, write_jsonl
from processes import Command, Moment
from stores import commit, make_manifest, random_sequences, words, write_store
from torture import workers
from torture.heartbeat import wait_until

from knowledge_store import DumpWriter, InputError, KnowledgeStore, StoreError, verify
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reporter import Reporter

TOKENS = tokens_table(words(11), words(11))


def test_killed_workers_of_changing_worlds_and_their_readers(tmp_path):
    (tmp_path / "round").mkdir()
    counts = workers.disturbed_dump(random.Random(2), tmp_path / "round", kills=5, shards=12, clocks=False)
    assert counts["kills"] > 0


@pytest.mark.skipif(workers.FAKETIME is None, reason="libfaketime is not installed (Debian: apt-get install libfaketime)")
def test_a_worker_and_a_reader_whose_clocks_are_a_year_off(tmp_path):
    store, stop, passes = tmp_path / "store", tmp_path / "stop", tmp_path / "passes"
    arguments, before = (str(store), 0, 1, 4, 0, 0.0), time.time()
    reader = workers.Elsewhere(workers.read, (str(store), str(passes), str(stop), str(tmp_path / "cache")), "-365d")
    assert workers.ended(workers.Elsewhere(workers.work, arguments, "+365d")) == "done"
    workers.check_complete(store, tmp_path, 4, {0})
    years = {time.gmtime(moment + 365 * 24 * 3600).tm_year for moment in (before, time.time())}
    times = KnowledgeStore.open(store).sql("SELECT committed_at FROM shards")["committed_at"].to_pylist()
    assert {int(each[:4]) for each in times} <= years  # or the clock was not off at all
    wait_until(passes.exists, lambda: reader.process.poll() is None)
    stop.touch()
    workers.ended(reader)


@pytest.mark.parametrize("difference", ["nothing", "teacher", "vocabulary"])
def test_dumps_of_one_name_started_at_once(tmp_path, difference):
    workers.race_for_a_name(difference, tmp_path, racers=3)


def test_workers_of_a_dump_that_is_removed_and_made_anew_stop(tmp_path):
    (tmp_path / "round").mkdir()
    workers.removed_and_made_anew(random.Random(1), tmp_path / "round", shards=8)


@pytest.mark.parametrize("anew", [False, True])
def test_a_worker_does_not_write_into_a_dump_that_is_another_by_now(tmp_path, anew):
    store = write_store(tmp_path / "store", shards=1)
    late = DumpWriter.open(store, make_manifest(shards=2), TOKENS)
    KnowledgeStore.open(store).remove("small")
    if anew:
        DumpWriter.open(store, make_manifest(shards=2, plan={"max_length": 32}), TOKENS)
    message = "removed, and made again from something else," if anew else "was removed while"
    with pytest.raises(StoreError, match=message):
        commit(late, 1, random_sequences(1, 4))
    assert not list(store.glob("small/*/0*"))


def test_a_dump_begun_while_a_store_is_verified_is_no_damage(tmp_path):
    store = write_store(tmp_path / "store", "first", shards=1)

    class Beginner(Reporter):
        @contextmanager
        def progress(self, title, total, unit=""):
            yield lambda amount, **figures: write_store(store, "second", shards=1) and None

    found = verify(store, Beginner())
    assert found.damage == []
    assert any("second was begun meanwhile" in note for note in found.notes)
    assert not verify(store).notes


def grow(store, shards):
    writer = DumpWriter.open(store, make_manifest(shards=4), TOKENS)
    for shard in shards:
        commit(writer, shard, random_sequences(shard, 4))


def test_copies_of_an_open_store_see_the_shards_it_sees(tmp_path):
    grow(tmp_path / "store", [1, 3])
    opened = KnowledgeStore.open(tmp_path / "store")
    before = [each["sequence_id"].tolist() for each in opened.batches(batch_size=3)]
    grow(tmp_path / "store", [0, 2])  # other ordinals for those opened later
    for each in (opened, copy.copy(opened), pickle.loads(pickle.dumps(opened))):
        assert [batch["sequence_id"].tolist() for batch in each.batches(batch_size=3)] == before
        assert each.sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 8}]
        assert each.info()[0].shards == 2
    assert len(KnowledgeStore.open(tmp_path / "store")) == 16


def test_an_order_is_not_gone_on_with_in_a_dump_that_has_grown(tmp_path):
    grow(tmp_path / "store", [1, 3])
    opened = KnowledgeStore.open(tmp_path / "store")
    batches = opened.batches(batch_size=3)
    next(iter(batches))
    state = {**batches.state, "consumed": 3}
    grow(tmp_path / "store", [0])
    rest = [item for batch in opened.batches(batch_size=3, **state) for item in batch["sequence_id"].tolist() if item >= 0]
    assert len(rest) == 5
    with pytest.raises(InputError, match="has other sequences than when this order was begun"):
        KnowledgeStore.open(tmp_path / "store").batches(batch_size=3, **state)


def test_an_order_is_not_gone_on_with_in_a_dump_of_as_many_other_sequences(tmp_path):
    grow(tmp_path / "store", [1, 3])
    state = KnowledgeStore.open(tmp_path / "store").batches(batch_size=3).state
    (tmp_path / "store/small/commits/00003.json").unlink()
    grow(tmp_path / "store", [2])
    opened = KnowledgeStore.open(tmp_path / "store")
    assert len(opened) == 8
    with pytest.raises(InputError, match="has other sequences than when this order was begun"):
        opened.batches(batch_size=3, **state)


def four_shards(store):
    return len(list(store.glob("d/commits/*.json"))) >= 4


def test_training_on_a_dump_that_goes_on(tmp_path, teacher_folder, monkeypatch):
    """The same student as from a copy of the store with the shards there were at the start."""
    from student_train.training.configuration import TrainConfig
    from student_train.training.run import RunTrainer, train

    corpus = write_jsonl(tmp_path / "rows.jsonl", story_rows(60))
    store, frozen = tmp_path / "store", tmp_path / "frozen"
    options = ["--name", "d", "--max-length", "32", "--batch-size", "2", "--shard-size", "2"]
    arguments = ["run", store, "--teacher", teacher_folder, "--corpus", corpus, *options]
    dump = Command(*arguments, folder=tmp_path / "log", at=Moment(store, four_shards, signal.SIGSTOP))
    dump.wait_until_stopped()
    settings = {
        "student": str(save_teacher(tmp_path / "student", layers=1, seed=1)), "steps": 4, "batch_size": 4, "eval_fraction": 0.0,
        "workers": 2,
    }  # fmt: skip
    draw = RunTrainer.get_batch_samples

    def drawing(self, *arguments):
        assert len(list(store.glob("d/commits/*.json"))) == 4 or self.state.global_step
        os.kill(dump.process.pid, signal.SIGCONT)  # it goes on while the student is trained
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "get_batch_samples", drawing)
        result = train(TrainConfig(store=str(store), output=str(tmp_path / "run"), **settings))
    assert result.finished
    assert dump.wait().returncode == 0
    assert verify(store).damage == []

    seen = json.loads((tmp_path / "run/run.json").read_text())["sequences"]["train"]
    counts = KnowledgeStore.open(store).sql("SELECT shard, sequences FROM shards ORDER BY shard").to_pylist()
    shutil.copytree(store, frozen)
    for shard in counts:  # one worker commits them in order
        seen -= shard["sequences"]
        if seen < 0:
            (frozen / f"d/commits/{shard['shard']:05d}.json").unlink()
    train(TrainConfig(store=str(frozen), output=str(tmp_path / "again"), **settings))
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
