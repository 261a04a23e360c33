"""Ctrl-C at any moment of a dump: what it says was committed is what was committed. Events place the signals, not time."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from conftest import story_rows, write_jsonl
from processes import Notes
from stores import contents

from knowledge_store import DumpWriter
from knowledge_store.errors import StoreError
from teacher_dump import DumpConfig, dump, repair
from teacher_dump.dumping import publishing, teacher_pass
from teacher_dump.dumping import repair as repair_module
from teacher_dump.dumping.publishing import ShardPublisher

SHARDS = 4


@pytest.fixture
def config(tmp_path, teacher_folder) -> DumpConfig:
    corpus = write_jsonl(tmp_path / "rows.jsonl", story_rows(2 * SHARDS))
    return DumpConfig(str(teacher_folder), (corpus,), tmp_path / "store", "d", max_length=40, batch_size=4, shard_size=2)


def press() -> None:
    """Press Ctrl-C: in the main thread it falls right here, in another one wherever the main thread is."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def check_stopped(config: DumpConfig, teacher, expected: int, call=dump) -> None:
    """Ctrl-C ends the call, which says how many shards it committed; another call resumes."""
    reporter = Notes()
    with pytest.raises(KeyboardInterrupt):
        call(config, teacher=teacher, reporter=reporter)
    assert "writer" not in {thread.name for thread in threading.enumerate()}
    committed = len(list(config.store.glob("d/commits/*.json")))
    if call is dump:
        assert committed == expected
    assert reporter.notes[-1] == (f"Stopped: {expected} shards were committed by this run. The same command resumes the dump.")


class Jobs(SimpleQueue):
    """A publisher's queue in which Ctrl-C falls before or after a certain shard is handed over."""

    def __init__(self, number: int, before: bool):
        self.number, self.before, self.handed_over = number, before, 0

    def put(self, job) -> None:
        """Hand over, and press Ctrl-C."""
        self.handed_over += job is not None
        pressed = job is not None and self.handed_over == self.number
        if pressed and self.before:
            press()
        super().put(job)
        if pressed:
            press()


@pytest.mark.parametrize(("before", "number", "expected"), [(True, 1, 0), (True, 3, 2), (False, 1, 1), (False, 3, 3)])
def test_while_a_shard_is_handed_over(config, loaded_teacher, monkeypatch, before, number, expected):
    made = iter([Jobs(number, before), SimpleQueue()])
    monkeypatch.setattr(publishing, "SimpleQueue", lambda: next(made))
    check_stopped(config, loaded_teacher, expected)


@pytest.mark.parametrize("presses", [1, 3])
@pytest.mark.parametrize("call", [dump, repair])
def test_while_the_last_shard_is_published_and_waited_for(config, loaded_teacher, monkeypatch, call, presses):
    """The main thread has nothing left to do but wait, so that each signal falls into its waiting; the shard is committed."""
    if call is repair:
        dump(config, teacher=loaded_teacher)
        for path in config.store.glob("d/positions/*.parquet"):
            path.unlink()
    monkeypatch.setattr(publishing, "LONGEST_WAIT", 0.05)
    waits, wait = threading.Semaphore(0), ShardPublisher._wait
    home, name = (DumpWriter, "commit") if call is dump else (repair_module, "repair_shard")
    publish = getattr(home, name)

    def waited(publisher) -> None:
        waits.release()
        wait(publisher)

    def pressing(writer, shard):
        if shard.number == SHARDS - 1:
            while waits.acquire(blocking=False):
                pass  # waits for earlier shards
            for _ in range(presses):
                waits.acquire()
                press()
                waits.acquire()  # the signal was met, and the main thread waits again
        return publish(writer, shard)

    monkeypatch.setattr(ShardPublisher, "_wait", waited)
    monkeypatch.setattr(home, name, pressing)
    check_stopped(config, loaded_teacher, SHARDS, call)


def test_while_the_pool_of_the_reader_shuts_down(config, loaded_teacher, monkeypatch):
    shutdown = ThreadPoolExecutor.shutdown

    def interrupted(pool, *arguments, **options):
        shutdown(pool, *arguments, **options)
        press()

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", interrupted)
    check_stopped(config, loaded_teacher, SHARDS)


def test_while_the_teacher_is_asked_and_a_shard_is_published(config, loaded_teacher, monkeypatch):
    """The teacher works on the third shard while the second one is published: that one is committed, and counted."""
    publishing_second, interrupted = threading.Event(), threading.Event()
    commit, take = DumpWriter.commit, teacher_pass._take

    def waits(writer, shard):
        if shard.number == 1:
            publishing_second.set()
            interrupted.wait()
        return commit(writer, shard)

    def presses(config, shard, *more):
        if shard.shard == 2:
            publishing_second.wait()
            interrupted.set()
            press()
        return take(config, shard, *more)

    monkeypatch.setattr(DumpWriter, "commit", waits)
    monkeypatch.setattr(teacher_pass, "_take", presses)
    check_stopped(config, loaded_teacher, 2)


def test_an_error_of_the_writer_is_told_even_where_ctrl_c_came_first(config, loaded_teacher, monkeypatch):
    commit = DumpWriter.commit

    def fails(writer, shard):
        if shard.number == 1:
            press()
            raise StoreError("cannot write it: No space left on device")
        return commit(writer, shard)

    monkeypatch.setattr(DumpWriter, "commit", fails)
    reporter = Notes()
    with pytest.raises(StoreError, match="No space left on device"):
        dump(config, teacher=loaded_teacher, reporter=reporter)
    assert len(list(config.store.glob("d/commits/*.json"))) == 1


def test_what_was_stopped_is_resumed_to_what_an_uninterrupted_run_makes(config, loaded_teacher, monkeypatch, tmp_path: Path):
    with monkeypatch.context() as patch:
        made = iter([Jobs(2, False), SimpleQueue()])
        patch.setattr(publishing, "SimpleQueue", lambda: next(made))
        check_stopped(config, loaded_teacher, 2)
    assert dump(config, teacher=loaded_teacher).shards == SHARDS - 2
    stopped = contents(config.store)
    config.store.rename(tmp_path / "stopped")
    dump(config, teacher=loaded_teacher)
    assert contents(config.store) == stopped
