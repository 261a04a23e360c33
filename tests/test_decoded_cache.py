"""The cache of decoded sequences: never seen in what is read, whatever happens to it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import commit, make_manifest, random_sequences, words, write_store
from torture.heartbeat import PATIENCE

from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.format.layout import NOWHERE, user_cache
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reading.cache import DecodedCache
from teacher_dump.fingerprints import file_sha256


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's folder, of this test alone; row groups are small, so that a shard has several."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 12 * 2048)
    return tmp_path / "cache" / "knowledge-store" / "decoded"


def epoch(folder: Path, **options) -> list[dict[str, np.ndarray]]:
    """All batches of a store that is opened for it."""
    return list(KnowledgeStore.open(folder, **options).batches(batch_size=3, seed=1))


def assert_same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert array.dtype == other[name].dtype and np.array_equal(array, other[name])


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*/*") if path.is_file())


def size(cache: Path) -> int:
    return sum(path.stat().st_size for path in files(cache))


def test_the_second_epoch_decodes_nothing_and_is_the_same(cache, tmp_path, monkeypatch):
    folder = write_store(tmp_path / "store", shards=3, size=6)
    standing = sorted(folder.rglob("*"))
    plain = epoch(folder, cache_size=0)
    assert not cache.exists()
    assert_same(epoch(folder), plain)
    assert len(files(cache)) > 3
    monkeypatch.setattr("knowledge_store.reading.reader.read_row_group", None)
    assert_same(epoch(folder), plain)
    store = KnowledgeStore.open(folder)
    assert store[4]["candidate_ids"].flags.writeable
    assert sorted(folder.rglob("*")) == standing


@settings(max_examples=20)
@given(
    opened_before=st.booleans(),
    damage=st.lists(
        st.tuples(st.sampled_from(["flip", "flip", "cut", "grow", "swap"]), st.integers(0, 10**6), st.integers(0, 10**6)),
        min_size=1,
        max_size=4,
    ),
)
def test_damage_anywhere_changes_nothing(cache, tmp_path, opened_before, damage):
    """Bytes flipped, a file cut, grown, or put in another's place; before or after it was opened."""
    folder = tmp_path / "store"
    if not folder.exists():
        write_store(folder, shards=2, size=6)
    plain = epoch(folder, cache_size=0)
    epoch(folder)
    opened = KnowledgeStore.open(folder)
    if opened_before:
        list(opened.batches(batch_size=3))
    there = files(cache)
    for what, which, where in damage:
        path = there[which % len(there)]
        contents = bytearray(path.read_bytes())
        if what == "flip" and contents:
            contents[where % len(contents)] ^= 1 + which % 255
        elif what == "cut":
            del contents[where % (len(contents) + 1) :]
        elif what == "grow":
            contents += b"more"
        elif what == "swap":
            contents = bytearray(there[where % len(there)].read_bytes())
        path.write_bytes(contents)
    assert_same(opened.batches(batch_size=3, seed=1), plain)
    assert_same(epoch(folder), plain)


@pytest.mark.parametrize("opened_before", [True, False])
def test_every_byte_is_checked(cache, opened_before):
    """One byte flipped at a time, whether the header was read before or is read now."""
    ids = np.arange(60, dtype=np.int64).reshape(20, 3)
    arrays = {"ids": ids, "candidate_ids": ids * (ids % 9 < 4), "logprobs": -np.arange(20, dtype=np.float32)}
    starts = np.array([0, 7, 20])
    kept = DecodedCache(make_manifest(), 10**9)
    kept.add("ab", 0, starts, arrays)
    [path] = files(cache)
    whole = path.read_bytes()
    for place in range(len(whole)):
        opened = DecodedCache(make_manifest(), 10**9)
        for changed in (whole, whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]):
            path.write_bytes(changed)
            found = [opened.read("ab", 0, item) for item in (0, 1)] if changed != whole or opened_before else []
            for each, start, end in zip(found, starts, starts[1:], strict=False):
                assert each is None or all(
                    np.array_equal(each.arrays()[name], array[start:end]) for name, array in arrays.items()
                )
        assert None in found or opened_before  # a header that is at hand was checked when it was read


def test_another_dump_of_that_name_and_other_code_find_nothing(cache, tmp_path, monkeypatch):
    folder = write_store(tmp_path / "store", shards=1)
    epoch(folder)
    shutil.rmtree(folder)
    writer = DumpWriter.open(folder, make_manifest(shards=1), tokens_table(words(11), words(11)))
    commit(writer, 0, random_sequences(77, 4))
    assert_same(epoch(folder), epoch(folder, cache_size=0))
    before = len(files(cache))
    monkeypatch.setattr("knowledge_store.reading.cache._decoders", lambda manifest: b"changed")
    epoch(folder)
    assert len(files(cache)) > before


def test_the_size_is_bounded_and_unused_dumps_make_room(cache, tmp_path):
    folders = [write_store(tmp_path / name, name, shards=2, size=6) for name in ("first", "second", "third")]
    epoch(folders[0])
    one = size(cache)
    limit = int(2.5 * one)
    epoch(folders[1], cache_size=limit)
    first, second = sorted((folder for folder in cache.iterdir() if folder.is_dir()), key=lambda each: each.stat().st_mtime_ns)
    reading = KnowledgeStore.open(folders[1], cache_size=limit)
    reading[0]
    os.utime(first)  # used later than the second, which is being read
    gc.collect()  # nobody reads the first any more
    assert_same(epoch(folders[2], cache_size=limit), epoch(folders[2], cache_size=0))
    assert size(cache) <= limit
    assert second.exists() and not first.exists()
    # One dump alone is too large: what fits stays and is used, the rest is decoded.
    shutil.rmtree(cache)
    for _ in range(2):
        assert_same(epoch(folders[0], cache_size=one // 2), epoch(folders[0], cache_size=0))
        assert one // 4 < size(cache) <= one // 2


def test_a_wrong_count_is_counted_again(cache, tmp_path):
    folder = write_store(tmp_path / "store", shards=2, size=6)
    epoch(folder)
    whole = size(cache)
    for wrong in ("", "0", "nonsense", "9" * 15):
        (cache / "used").write_text(wrong)
        files(cache)[0].unlink()
        epoch(folder, cache_size=whole)
        assert size(cache) == whole == int((cache / "used").read_text())


def test_deleted_while_it_is_read(cache, tmp_path):
    folder = write_store(tmp_path / "store", shards=2, size=6)
    plain = epoch(folder, cache_size=0)
    epoch(folder)
    found = []
    for step, batch in enumerate(KnowledgeStore.open(folder).batches(batch_size=3, seed=1)):
        found.append(batch)
        if step % 2:
            shutil.rmtree(cache)
    assert_same(found, plain)


@pytest.mark.parametrize("taken", ["XDG_CACHE_HOME", "decoded"])
def test_a_cache_that_cannot_be_written_is_done_without(cache, tmp_path, monkeypatch, taken):
    folder = write_store(tmp_path / "store")
    if taken == "decoded":
        cache.parent.mkdir(parents=True)
        cache.touch()
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(epoch(folder), epoch(folder, cache_size=0))


READ = """
import os, signal, sys
import numpy as np
from pathlib import Path
from knowledge_store import KnowledgeStore
if "kill" in sys.argv:
    written = []
    def replace(self, target):
        written.append(target)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.replace(self, target)
    Path.replace = replace
for seed in range(int(sys.argv[2])):
    for batch in KnowledgeStore.open(sys.argv[1]).batches(batch_size=3, seed=seed):
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            print(sequence, batch["candidate_ids"][row].sum(), batch["token_logprob"][row].tolist())
"""


def reader(folder: Path, epochs: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ, str(folder), str(epochs), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_killed_while_it_is_built(cache, tmp_path):
    folder = write_store(tmp_path / "store", shards=2, size=6)
    KnowledgeStore.open(folder)  # makes the index
    killed = reader(folder, 1, "kill")
    killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    assert len(files(cache)) == 2 and len(list(cache.glob("*/.tmp-*"))) == 1
    assert_same(epoch(folder), epoch(folder, cache_size=0))
    assert not list(cache.glob("*/.tmp-*"))
    assert size(cache) == int((cache / "used").read_text())


def test_readers_at_once_with_the_cache_deleted_under_them(cache, tmp_path):
    folder = write_store(tmp_path / "store", shards=2, size=6)
    KnowledgeStore.open(folder)  # makes the index
    readers = [reader(folder, 8) for _ in range(3)]
    while any(each.poll() is None for each in readers):
        shutil.rmtree(cache, ignore_errors=True)
        for each in readers:
            try:
                each.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
    assert [each.returncode for each in readers] == [0, 0, 0]
    outputs = [each.communicate()[0] for each in readers]
    expected = [
        f"{sequence} {batch['candidate_ids'][row].sum()} {batch['token_logprob'][row].tolist()}"
        for seed in range(8)
        for batch in KnowledgeStore.open(folder, cache_size=0).batches(batch_size=3, seed=seed)
        for row, sequence in enumerate(batch["sequence_id"].tolist())
    ]
    assert all(output.splitlines() == expected for output in outputs)


DTYPES = st.sampled_from(["int64", "int32", "uint8", "uint16", "float32", "float64", "bool"])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    fields=st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 3), max_size=2)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_arrays_come_back_as_they_were(cache, lengths, fields, seed):
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    low = int(random.choice([0, -5]))
    scale = float(random.choice([10, 300, 1e5, 1e12]))
    arrays = {
        f"field{number}": (random.random((starts[-1], *shape)) * scale + low).astype("int64").astype(dtype)
        for number, (dtype, shape) in enumerate(fields)
    }
    kept = DecodedCache(make_manifest(), 10**9)
    name = f"{seed:064d}"
    kept.add(name, 3, starts, arrays)
    for item, (start, end) in enumerate(pairwise(starts)):
        found = kept.read(name, 3, item).arrays()
        assert found is not None and found.keys() == arrays.keys()
        for key, array in found.items():
            assert array.dtype == arrays[key].dtype and array.shape == arrays[key][start:end].shape
            assert np.array_equal(array, arrays[key][start:end]) and array.flags.writeable
    assert kept.read(name, 4, 0) is None and kept.read(name[:-1] + "x", 3, 0) is None


@pytest.mark.parametrize("width", [1, 3, 300])
def test_lists_are_kept_without_their_padding_and_come_back_with_it(cache, width):
    random, starts = np.random.default_rng(0), np.array([0, 1, 40, 40, 200])
    filled = np.arange(width) < random.integers(0, 3, (200, 1))
    arrays = {
        "candidate_ids": np.where(filled, random.integers(0, 3, filled.shape), 0),  # where 0 is an id too
        "candidate_logprobs": np.where(filled, random.choice([-0.0, -1.5, -np.inf], filled.shape), -np.inf).astype(np.float32),
        "tail_logprob": random.random(200, np.float32),
    }
    kept = DecodedCache(make_manifest(), 10**9)
    kept.add("ab", 0, starts, arrays)
    for item, (start, end) in enumerate(pairwise(starts)):
        found = kept.read("ab", 0, item).arrays()
        assert found is not None
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array[start:end].shape
            assert found[name].tobytes() == array[start:end].tobytes()
    [path] = files(cache)
    assert path.stat().st_size < 200 * (4 + 2 * (2 + 5)) + 1000


def test_whoever_has_no_home_goes_without_a_cache(tmp_path, monkeypatch):
    """Ordinary in containers: no HOME, and a user that no file of users knows."""
    folder = write_store(tmp_path / "store")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    assert user_cache("index").is_relative_to(NOWHERE)
    assert_same(epoch(folder), epoch(folder, cache_size=0))
    assert len(KnowledgeStore.open(folder, rebuild_index=True).info()) == 1
    assert file_sha256(folder / "store.json") == hashlib.sha256((folder / "store.json").read_bytes()).hexdigest()
    assert not (tmp_path / "cache").exists() and NOWHERE.parent.is_char_device()


def test_a_header_of_another_program_is_not_read(cache, tmp_path):
    folder = write_store(tmp_path / "store")
    expected = epoch(folder)
    for path in files(cache):
        text = json.dumps({"name": path.name, "something": "else"}).encode()
        path.write_bytes(len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text)
    assert_same(epoch(folder), expected)
