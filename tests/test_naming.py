"""Names are given once on file systems without hard links, without locks, or whose folders cannot be flushed."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from stores import contents as files_of
from stores import write_store

from knowledge_store import InputError, KnowledgeStore, StoreError, verify
from knowledge_store.storage import contents, naming
from knowledge_store.storage.local import LocalStorage, publish, remove_leftovers
from knowledge_store.storage.new_file import new_file
from knowledge_store.writing.rename import rename_dump

NAMES, WRITERS = 60, 8


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    """Let a function of the system answer as on a file system that has no such thing."""

    def refused(*arguments, **named):
        raise OSError(code, os.strerror(code))

    module, name = function.split(".")
    monkeypatch.setattr(getattr(naming, module), name, refused)


@pytest.fixture(params=["EPERM", "ENOTSUP", "ENOSYS", "EACCES"])
def no_links(request, monkeypatch) -> None:
    refuse(monkeypatch, "os.link", getattr(errno, request.param))


def test_a_name_is_given_once_without_hard_links(no_links, tmp_path):
    path = tmp_path / "file"
    assert publish(path, contents(b"first"))
    assert not publish(path, contents(b"second"))

    def write(file):
        file.write(b"slow")
        assert publish(tmp_path / "other", contents(b"quick"))

    assert not publish(tmp_path / "other", write)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"file": b"first", "other": b"quick"}


def test_of_many_writers_at_once_one_gives_each_name(monkeypatch, tmp_path):
    refuse(monkeypatch, "os.link", errno.EPERM)
    ready, winners = threading.Barrier(WRITERS), [[] for _ in range(NAMES)]

    def work(writer: int) -> None:
        for name in range(NAMES):
            temporary = tmp_path / f"{writer}-{name}"
            temporary.write_text(str(writer))
            ready.wait()
            if naming.give_name(temporary, tmp_path / f"name-{name}"):
                winners[name].append(writer)
            temporary.unlink(missing_ok=True)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(each) for each in winners} == {1} and len(list(tmp_path.iterdir())) == NAMES
    assert [(tmp_path / f"name-{name}").read_text() for name in range(NAMES)] == [str(winner) for (winner,) in winners]


def test_a_lock_whose_holder_was_killed_is_taken_and_tidied_away(monkeypatch, tmp_path):
    refuse(monkeypatch, "os.link", errno.EPERM)
    (tmp_path / naming.NAMES_LOCK).touch()
    assert publish(tmp_path / "file", contents(b"first"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / naming.NAMES_LOCK).touch()
    assert remove_leftovers(tmp_path) == 1


class Paused:
    """The thread of one name stops where it has found a name free, until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.there, self.go_on, lexists = threading.Event(), threading.Event(), os.path.lexists

        def found(path) -> bool:
            taken = lexists(path)
            if threading.current_thread().name == "paused":
                self.there.set()
                self.go_on.wait()
            return taken

        monkeypatch.setattr(naming.os.path, "lexists", found)


def test_the_lock_of_another_is_no_leftover(monkeypatch, tmp_path):
    """Who tidies up has opened a lock that is removed and made again before it is locked."""
    refuse(monkeypatch, "os.link", errno.EPERM)
    paused, flock, opened, removed = Paused(monkeypatch), fcntl.flock, threading.Event(), threading.Event()

    def late(file, operation: int) -> None:
        if threading.current_thread().name == "tidy":
            opened.set()
            removed.wait()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    (tmp_path / naming.NAMES_LOCK).touch()
    found: dict[str, object] = {}
    tidy = threading.Thread(target=lambda: found.update(tidied=remove_leftovers(tmp_path)), name="tidy")
    tidy.start()
    opened.wait()
    assert publish(tmp_path / "another", contents(b""))  # takes the lock that was opened, and removes it
    first = threading.Thread(target=lambda: found.update(first=publish(tmp_path / "file", contents(b"first"))), name="paused")
    first.start()
    paused.there.wait()
    removed.set()
    tidy.join()
    second = threading.Thread(target=lambda: found.update(second=publish(tmp_path / "file", contents(b"second"))))
    second.start()
    paused.go_on.set()
    first.join()
    second.join()
    assert found == {"tidied": 0, "first": True, "second": False} and (tmp_path / "file").read_bytes() == b"first"


def test_a_file_that_is_put_in_place_is_not_replaced_by_a_late_publisher(monkeypatch, tmp_path):
    refuse(monkeypatch, "os.link", errno.EPERM)
    paused = Paused(monkeypatch)
    publisher = threading.Thread(target=publish, args=(tmp_path / "file", contents(b"published")), name="paused")
    publisher.start()
    paused.there.wait()
    repair = threading.Thread(target=LocalStorage(tmp_path).replace, args=([("file", contents(b"repaired"))],))
    repair.start()
    paused.go_on.set()
    publisher.join()
    repair.join()
    assert (tmp_path / "file").read_bytes() == b"repaired" and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    """It has the file open as this process has."""
    with naming.names_locked(tmp_path):
        lock = os.path.realpath(tmp_path / naming.NAMES_LOCK)
        (held,) = (int(each.name) for each in Path("/proc/self/fd").iterdir() if os.path.realpath(each) == lock)
        copy = os.dup(held)
    with open(f"/proc/self/fd/{copy}", "rb") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(copy)


def test_a_store_is_the_same_without_hard_links(monkeypatch, tmp_path):
    with_links = write_store(tmp_path / "with")
    refuse(monkeypatch, "os.link", errno.EPERM)
    without = write_store(tmp_path / "without")
    assert files_of(without) == files_of(with_links) and verify(without).damage == []
    assert not list(without.rglob(".tmp-*"))


def test_an_export_without_hard_links_replaces_nothing(monkeypatch, tmp_path):
    refuse(monkeypatch, "os.link", errno.ENOTSUP)
    with new_file(tmp_path / "out") as unfinished:
        unfinished.write_text("one")
    with pytest.raises(InputError, match="out exists already"), new_file(tmp_path / "out"):
        pass
    with pytest.raises(InputError, match="late exists already"), new_file(tmp_path / "late") as unfinished:
        unfinished.write_text("mine")
        (tmp_path / "late").write_text("another's")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "one", "late": "another's"}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_hard_links_are_enough(monkeypatch, tmp_path, code):
    refuse(monkeypatch, "fcntl.flock", code)
    store = write_store(tmp_path / "store")
    assert verify(store).damage == [] and not list(store.rglob(".tmp-*"))
    (tmp_path / ".tmp-file-0123456789ab").write_bytes(b"half")
    assert remove_leftovers(tmp_path) == 0  # nobody can tell whether its writer lives
    rename_dump(LocalStorage(store), "small", "other")
    assert [dump.dump for dump in KnowledgeStore.open(store).info()] == ["other"]
    refuse(monkeypatch, "os.link", errno.EPERM)
    with pytest.raises(StoreError, match=r"cannot write .*file: its file system has neither hard links nor locks \(flock\)"):
        publish(tmp_path / "file", contents(b"first"))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed_is_none_that_fails(monkeypatch, tmp_path, code, raised):
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(naming.os, "fsync", refused)
    if raised:
        with pytest.raises(StoreError, match=r"cannot write .*file: Input/output error"):
            publish(tmp_path / "file", contents(b"first"))
    else:
        assert publish(tmp_path / "file", contents(b"first"))
