"""Workers that begin a dump look through its corpus together, once, and make the plan that one alone would make."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TEXT, story_rows, write_jsonl
from memory_storage import MemoryStorage, change, names_in, put, storage_of
from processes import Running
from stores import contents
from torture.heartbeat import PATIENCE, wait_until

from knowledge_store import DamageError, InputError, KnowledgeStore, verify
from knowledge_store.errors import MismatchError
from knowledge_store.storage.local import LocalStorage
from knowledge_store.writing.writer import DumpWriter
from teacher_dump import DumpConfig, dump
from teacher_dump.corpus import pieces
from teacher_dump.corpus.scan import Scanner
from teacher_dump.dumping import shared_scan
from teacher_dump.teachers import opening
from teacher_dump.teachers.local import load_teacher

PIECE_BYTES = 700
WORKERS = 3


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for name in ("MIN_PIECE_BYTES", "MAX_PIECE_BYTES"):
        monkeypatch.setattr(pieces, name, PIECE_BYTES)
    monkeypatch.setattr(shared_scan, "PATIENCE", 0.0)
    monkeypatch.setattr(shared_scan, "SLOWER", 0)
    monkeypatch.setattr(shared_scan, "LOOK_EVERY", 0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("corpus")
    first = write_jsonl(folder / "a.jsonl", [*story_rows(14), {"text": ""}, {"title": "x"}, *story_rows(6, start=3)])
    (folder / "b.txt").write_text(TEXT)
    return first, folder / "b.txt"


@pytest.fixture
def config(tmp_path, corpus, teacher_folder) -> DumpConfig:
    return DumpConfig(str(teacher_folder), corpus, tmp_path / "store", "d", max_length=40, shard_size=3, skip_bad_rows=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus, teacher_folder, loaded_teacher) -> dict[str, object]:
    """What one worker leaves that looks through the corpus at a stretch."""
    store = tmp_path_factory.mktemp("alone") / "store"
    whole = DumpConfig(str(teacher_folder), corpus, store, "d", max_length=40, shard_size=3, skip_bad_rows=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MIN_PIECE_BYTES", 1 << 20)
        dump(whole, teacher=loaded_teacher)
    return contents(store)


class Scanned:
    """Which pieces were scanned, in a file that several processes add to; `stop` is called before the piece of that number."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, stop_at: int = -1, stop=None):
        self.path, self._scan, self.number = path, Scanner.scan, 0

        def counted(scanner, piece, *arguments):
            if self.number == stop_at:
                stop()
            self.number += 1
            with open(path, "a") as file:
                file.write(f"{scanner.pieces.index(piece)}\n")
            return self._scan(scanner, piece, *arguments)

        patch.setattr(Scanner, "scan", counted)

    @property
    def pieces(self) -> Counter[int]:
        return Counter(map(int, self.path.read_text().split()))


def interrupt() -> None:
    raise KeyboardInterrupt


def _work(config: DumpConfig, rank: int, log: Path, dies: bool) -> None:
    patch = pytest.MonkeyPatch()
    for name in ("MIN_PIECE_BYTES", "MAX_PIECE_BYTES"):
        patch.setattr(pieces, name, PIECE_BYTES)
    patch.setattr(shared_scan, "LOOK_EVERY", 0.01)
    patch.setattr(shared_scan, "PATIENCE", PATIENCE)  # however busy the machine is, nobody is taken for dead
    Scanned(log, patch, *((2, lambda: os.kill(os.getpid(), signal.SIGKILL)) if dies else ()))
    dump(config, rank, WORKERS, load_teacher(config.teacher, device="cpu"))


def test_workers_at_once_look_through_a_corpus_once(config, alone, loaded_teacher, tmp_path):
    """And the pieces that one had done before it was killed are not done again; the one it had begun is taken by who loses
    patience, which is this process, once it is the only one that is missing."""
    log = tmp_path / "scanned"
    killed = Running(_work, config, 2, log, True, folder=tmp_path / "out").wait()
    assert killed.returncode == -signal.SIGKILL, killed
    workers = [Running(_work, config, rank, log, False, folder=tmp_path / "out") for rank in range(WORKERS)]
    count = len(pieces.cut_corpus(config.corpus, [file.stat().st_size for file in config.corpus]))
    wait_until(
        lambda: len(list(config.store.glob(".scan-*/*.json"))) == count - 1,
        lambda: all(worker.process.is_alive() for worker in workers),
    )
    with pytest.MonkeyPatch.context() as patch:
        Scanned(log, patch)
        dump(config, 0, WORKERS, loaded_teacher)
    ends = [worker.wait() for worker in workers]
    assert [end.returncode for end in ends] == [0, 0, 0], ends
    scanned = Counter(map(int, log.read_text().split()))
    assert count > 6 and scanned == dict.fromkeys(range(count), 1)
    assert contents(config.store) == alone


def test_a_scan_that_was_interrupted_goes_on_in_any_storage(config, alone, loaded_teacher, tmp_path, place):
    config = replace(config, store=place)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Scanned(tmp_path / "first", patch, 4, interrupt)
        dump(config, 1, 2, loaded_teacher)
    assert any(name.startswith(".scan-") for name in names_in(place))
    assert KnowledgeStore.open(place).info() == [] and verify(storage_of(place)).damage == []
    with pytest.MonkeyPatch.context() as patch:
        scanned = Scanned(tmp_path / "then", patch)
        dump(config, teacher=loaded_teacher)
        first, then = Counter(map(int, (tmp_path / "first").read_text().split())), scanned.pieces
    assert sum(first.values()) == 4 and not first & then and set(then.values()) == {1}
    assert not any(name.startswith(".scan-") for name in names_in(place))
    if not isinstance(place, MemoryStorage):
        assert contents(place) == alone


def test_what_was_found_of_another_corpus_is_not_used(config, loaded_teacher, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Scanned(tmp_path / "first", patch, 4, interrupt)
        dump(config, teacher=loaded_teacher)
    with pytest.MonkeyPatch.context() as patch:
        scanned = Scanned(tmp_path / "then", patch)
        dump(replace(config, max_length=41), teacher=loaded_teacher)
        assert set(scanned.pieces) >= {0, 1, 2, 3}


def test_a_refused_corpus_is_not_looked_through_twice(config, loaded_teacher, tmp_path):
    with pytest.raises(InputError, match="line 16"):
        dump(replace(config, skip_bad_rows=False), teacher=loaded_teacher)
    with pytest.MonkeyPatch.context() as patch:
        Scanned(tmp_path / "then", patch)
        dump(config, teacher=loaded_teacher)
    assert not (tmp_path / "then").exists()


def test_a_worker_that_waits_takes_the_plan_of_who_was_quicker(config, alone, loaded_teacher, monkeypatch):
    """All pieces were begun by somebody who is slow; meanwhile a third worker has made the whole dump."""
    monkeypatch.setattr(shared_scan, "PATIENCE", PATIENCE)
    create, quicker = LocalStorage.create, []
    monkeypatch.setattr(
        LocalStorage, "create", lambda storage, name, write: not name.endswith(".begun") and create(storage, name, write)
    )

    def sleep(seconds: float) -> None:
        monkeypatch.setattr(LocalStorage, "create", create)
        quicker.append(dump(config, teacher=loaded_teacher))

    monkeypatch.setattr(time, "sleep", sleep)
    assert dump(config, 1, 2, loaded_teacher).shards == 0
    assert len(quicker) == 1 and contents(config.store) == alone


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_damaged_piece_is_named_and_what_to_remove(config, loaded_teacher, tmp_path, suffix):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Scanned(tmp_path / "first", patch, 3, interrupt)
        dump(config, teacher=loaded_teacher)
    (piece,) = config.store.glob(f".scan-*/00001.{suffix}")
    change(config.store, str(piece.relative_to(config.store)), lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(DamageError, match=r"00001.* remove .*\.scan-[0-9a-f]{16}-d, and the corpus is looked through again"):
        dump(config, teacher=loaded_teacher)


def own_copy(config: DumpConfig, folder: Path) -> DumpConfig:
    """With a corpus that a test may change."""
    corpus = folder / "corpus.jsonl"
    corpus.write_bytes(config.corpus[0].read_bytes())
    return replace(config, corpus=(corpus,))


def grow(config: DumpConfig) -> None:
    with open(config.corpus[0], "a") as file:
        file.write('{"text": "One more."}\n')


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_corpus_that_grows_while_it_is_looked_through_is_refused(config, loaded_teacher, tmp_path, world_size):
    config = own_copy(config, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=r"corpus\.jsonl was changed while"):
        Scanned(tmp_path / "scanned", patch, 2, lambda: grow(config))
        dump(config, 0, world_size, teacher=loaded_teacher)
    assert not (config.store / "d").exists() and len(list(config.store.glob(".scan-*/*.json"))) == 2
    assert dump(config, teacher=loaded_teacher).counts.rows == len(config.corpus[0].read_bytes().splitlines())


def test_a_corpus_that_grows_while_the_teacher_is_opened_is_refused(config, loaded_teacher, tmp_path, monkeypatch):
    config = own_copy(config, tmp_path)

    def opened(*arguments, **named):
        grow(config)
        return loaded_teacher

    monkeypatch.setattr(opening, "open_teacher", opened)
    with pytest.raises(InputError, match=r"corpus\.jsonl was changed while"):
        dump(config)
    assert not (config.store / "d").exists()


def test_a_corpus_that_is_changed_under_a_dump_ends_it(config, loaded_teacher, tmp_path, monkeypatch):
    """Also where it has as many tokens as before. One that was written again as it was is no other."""
    config = own_copy(config, tmp_path)
    rows, publish = config.corpus[0].read_bytes(), DumpWriter.commit
    changes = [rows, rows.replace(b'"source": "a"', b'"source": "c"')]

    def commit(writer, shard):
        if changes:
            with config.corpus[0].open("r+b") as file:  # not cut short for a moment, in which it would be another
                file.write(changes.pop(0))
        return publish(writer, shard)

    monkeypatch.setattr(DumpWriter, "commit", commit)
    with pytest.raises(MismatchError, match=r"corpus\.jsonl was changed since the dump was begun"):
        dump(config, teacher=loaded_teacher)
    assert not changes
    config.corpus[0].write_bytes(rows)
    dump(config, teacher=loaded_teacher)
    assert verify(config.store).damage == []


def test_small_corpora_of_one_worker_leave_nothing_behind(config, loaded_teacher, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1 << 20)
    with pytest.raises(InputError):
        dump(replace(config, skip_bad_rows=False), teacher=loaded_teacher)
    assert not config.store.exists()


def test_a_scan_of_another_dump_is_left(config, loaded_teacher):
    name = f".scan-{'0' * 16}-other/00000.json"
    dump(replace(config, corpus=config.corpus[1:]), teacher=loaded_teacher)
    put(config.store, name, b"{}")
    dump(config=replace(config, name="more", corpus=config.corpus[1:]), teacher=loaded_teacher)
    assert name in names_in(config.store)
