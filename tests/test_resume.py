"""Whatever stops a dump, and whoever resumes it, the store is the one that an uninterrupted run makes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import save_teacher, story_rows, write_jsonl
from processes import Command, Moment
from stores import contents

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError, MismatchError, StoreError
from knowledge_store.kinds import KINDS, Field, Kind
from knowledge_store.storage import local as publication
from knowledge_store.writing.verification import verify
from teacher_dump import DumpConfig, dump, fingerprints, repair
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.extraction import EXTRACTORS, Extractor
from teacher_dump.extraction.sampling import starts
from teacher_dump.teachers import local as teachers
from teacher_dump.teachers.local import load_teacher

SHARDS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Rows of which some cannot be used; the shard of rows 21 and 22 holds nothing at all."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = story_rows(2 * SHARDS)
    lines = write_jsonl(folder / "rows.jsonl", rows).read_text().splitlines()
    lines[20] = lines[21] = lines[6] = "broken"
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture
def config(tmp_path, corpus, teacher_folder) -> DumpConfig:
    return DumpConfig(
        str(teacher_folder), (corpus,), tmp_path / "store", "d", max_length=40, batch_size=4, shard_size=2, skip_bad_rows=True
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus, teacher_folder, loaded_teacher) -> dict[str, object]:
    """What one undisturbed run leaves."""
    store = tmp_path_factory.mktemp("whole") / "store"
    whole = DumpConfig(
        str(teacher_folder), (corpus,), store, "d", max_length=40, batch_size=4, shard_size=2, skip_bad_rows=True
    )
    assert dump(whole, teacher=loaded_teacher).shards == SHARDS
    return contents(store)


def arguments(config: DumpConfig, **more: object) -> list[object]:
    """The command line that says what `config` says."""
    options = {
        "teacher": config.teacher, "name": config.name, "max-length": config.max_length,
        "batch-size": config.batch_size, "shard-size": config.shard_size, **more,
    }  # fmt: skip
    line: list[object] = ["run", config.store, "--corpus", *config.corpus, "--skip-bad-rows"]
    return line + [word for name, value in options.items() for word in (f"--{name}", value)]


def commits(config: DumpConfig) -> int:
    return len(list(config.store.glob("d/commits/*.json")))


# --- ranks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 2), (1, 2)],
        [(2, 3), (0, 3), (1, 3)],
        [(1, 3), (0, 2), (0, 1)],
        [(1, 2), (1, 2), (2, 3), (0, 1)],
    ],
)
def test_any_ranks_in_any_order_make_the_same_store(config, loaded_teacher, uninterrupted, runs):
    shards = 0
    for rank, world_size in runs:
        report = dump(config, rank, world_size, teacher=loaded_teacher)
        assert report.shards + report.shards_existing == len(range(rank, SHARDS, world_size))
        shards += report.shards
    assert shards == SHARDS
    assert contents(config.store) == uninterrupted


def test_workers_at_once_make_the_same_store(config, uninterrupted, tmp_path):
    workers = [
        Command(*arguments(config, rank=rank, **{"world-size": world_size}), folder=tmp_path / f"log{rank}{world_size}")
        for rank, world_size in ((0, 2), (1, 2), (0, 1))
    ]
    results = [worker.wait() for worker in workers]
    assert [result.returncode for result in results] == [0, 0, 0], results
    assert contents(config.store) == uninterrupted


def test_more_workers_than_shards_leave_some_with_nothing_to_do(config, loaded_teacher):
    dump(config, teacher=loaded_teacher)
    assert dump(config, 99, 100, teacher=loaded_teacher).shards == 0


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0), (5, 3)])
def test_a_rank_that_is_none_is_refused(config, loaded_teacher, rank, world_size):
    with pytest.raises(InputError, match="--rank"):
        dump(config, rank, world_size, teacher=loaded_teacher)
    assert not config.store.exists()


# --- stopped ------------------------------------------------------------------------------------------------------------


def wait_until(command: Command, condition) -> None:
    """Wait for a moment in the life of a running command."""
    while not condition():
        assert command.process.is_alive(), command.wait()
        time.sleep(0.0005)


def before_the_manifest(store: Path) -> bool:
    return store.exists() and not (store / "d/manifest.json").exists()


def writing_knowledge(store: Path) -> bool:
    return any(store.glob("d/positions/.tmp-*")) and any(store.glob("d/commits/*.json"))


def between_knowledge_and_its_commit(store: Path) -> bool:
    return len(list(store.glob("d/positions/*.parquet"))) > len(list(store.glob("d/commits/*.json"))) > 3


def half_way(store: Path) -> bool:
    return len(list(store.glob("d/commits/*.json"))) > 10


@pytest.mark.parametrize("moment", [before_the_manifest, writing_knowledge, between_knowledge_and_its_commit, half_way])
def test_killed_at_any_moment_and_resumed_by_others(config, uninterrupted, tmp_path, loaded_teacher, moment):
    killed = Command(*arguments(config), folder=tmp_path / "log", at=Moment(config.store, moment)).wait()
    assert killed.returncode == -signal.SIGKILL, killed
    assert moment(config.store)
    assert commits(config) < SHARDS
    if (config.store / "d/manifest.json").exists():
        assert verify(config.store).damage == []
        assert KnowledgeStore.open(config.store).info()[0].shards == commits(config)
    for rank in range(2):
        dump(config, rank, 2, teacher=loaded_teacher)
    assert contents(config.store) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(config, uninterrupted, tmp_path, loaded_teacher, number):
    command = Command(*arguments(config), folder=tmp_path / "log")
    wait_until(command, lambda: commits(config) >= 2)
    os.kill(command.process.pid, number)
    result = command.wait()
    assert result.returncode == 130, result
    committed = commits(config)
    assert 2 <= committed < SHARDS
    assert f"Stopped: {committed} shards were committed by this run. The same command resumes the dump." in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(config.store.rglob(".tmp-*"))
    again = dump(config, teacher=loaded_teacher)
    assert (again.shards, again.shards_existing) == (SHARDS - committed, committed)
    assert contents(config.store) == uninterrupted


def test_an_error_in_the_reading_thread_is_the_dumps_and_leaves_no_thread(tmp_path, loaded_teacher, monkeypatch):
    """The first rows are fine, so that the error comes while the teacher works on an earlier shard."""
    config = DumpConfig(
        "tiny", (write_jsonl(tmp_path / "c.jsonl", story_rows(9)),), tmp_path / "s", max_length=30, shard_size=2
    )
    sequences = CorpusTokenizer.sequences
    seen: list[int] = []

    def gone(tokenizer, document):
        seen.append(document.number)
        if seen.count(6) > 1:  # the first time, the corpus is looked through
            raise InputError("the disk is gone")
        return sequences(tokenizer, document)

    with monkeypatch.context() as patch:
        patch.setattr(CorpusTokenizer, "sequences", gone)
        with pytest.raises(InputError, match="the disk is gone"):
            dump(config, teacher=loaded_teacher)
    assert {thread.name.split("_")[0] for thread in threading.enumerate()}.isdisjoint({"reader", "writer"})
    assert sorted(path.name for path in (tmp_path / "s/tiny-c/commits").iterdir()) == ["00000.json", "00001.json", "00002.json"]
    report = dump(config, teacher=loaded_teacher)
    assert (report.shards_existing, report.shards) == (3, 2)


def test_a_bad_row_is_found_before_anything_is_made(tmp_path, loaded_teacher):
    rows = [*story_rows(6), {"prompt": "The lamp " * 50, "completion": "x"}, *story_rows(2)]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=30, shard_size=2)
    with pytest.raises(InputError, match=r"c\.jsonl, line 7: the prompt leaves no room .*--skip-bad-rows"):
        dump(config, teacher=loaded_teacher)
    assert not config.store.exists()
    report = dump(replace(config, skip_bad_rows=True), teacher=loaded_teacher)
    assert (report.shards, report.counts.rows_left_out) == (5, 1)
    with pytest.raises(InputError, match=r"c\.jsonl, line 7"):
        dump(config, teacher=loaded_teacher)  # the manifest knows


def test_another_tokenisation_of_a_shard_is_refused(config, loaded_teacher, monkeypatch):
    """As by a version of transformers that renders a template otherwise."""
    assert dump(config, 0, 2, teacher=loaded_teacher).shards
    windows = CorpusTokenizer._windows
    with monkeypatch.context() as patch:
        patch.setattr(CorpusTokenizer, "_windows", lambda *arguments: windows(*arguments)[:1])
        with pytest.raises(MismatchError, match=r"shard \d has .* tokens, and had .* when the corpus was looked through"):
            dump(config, 1, 2, teacher=loaded_teacher)


def test_an_error_in_the_writing_thread_is_the_dumps_and_leaves_no_thread(config, loaded_teacher, uninterrupted, monkeypatch):
    write = publication.publish

    def full(path, contents):
        if path.name.startswith("00003"):
            raise StoreError(f"cannot write {path}: No space left on device")
        return write(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr("knowledge_store.storage.local.publish", full)
        with pytest.raises(StoreError, match=r"00003.*No space left on device"):
            dump(config, teacher=loaded_teacher)
    assert {thread.name.split("_")[0] for thread in threading.enumerate()}.isdisjoint({"reader", "writer"})
    assert sorted(path.name for path in config.store.glob("d/commits/*")) == ["00000.json", "00001.json", "00002.json"]
    dump(config, teacher=loaded_teacher)
    assert contents(config.store) == uninterrupted


# --- resumed by the wrong command ----------------------------------------------------------------------------------------


@pytest.fixture
def existing(config, loaded_teacher) -> DumpConfig:
    """A dump whose first half is there."""
    dump(config, 0, 2, teacher=loaded_teacher)
    return config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": 3}, "--top-k was 5 and is now 3"),
        ({"max_length": 41}, "--max-length was 40 and is now 41"),
        ({"shard_size": 3}, "--shard-size was 2 and is now 3"),
        ({"keep_context": True}, "--keep-context was False and is now True"),
    ],
)
def test_resuming_with_another_option_is_refused_and_changes_nothing(existing, loaded_teacher, change, named):
    before = contents(existing.store)
    with pytest.raises(MismatchError, match=r"'d' in .* was made differently") as caught:
        dump(replace(existing, **change), teacher=loaded_teacher)
    assert named in str(caught.value)
    assert contents(existing.store) == before


def test_resuming_with_other_kinds_is_refused_by_their_names_alone(existing, loaded_teacher, monkeypatch):
    monkeypatch.setitem(KINDS, "lengths", Kind("lengths", "sequence", lambda manifest: (Field("tokens", pa.int32()),)))
    monkeypatch.setitem(EXTRACTORS, "lengths", Extractor(frozenset(), lambda batch: []))
    with pytest.raises(MismatchError, match=r"differently: --kind lengths was not given and is now\. Use"):
        dump(replace(existing, kinds=("positions", "lengths")), teacher=loaded_teacher)
    both = r"--kind lengths was not given and is now; --kind positions was given and is not now"
    with pytest.raises(MismatchError, match=rf"differently: {both}\. Use"):
        dump(replace(existing, kinds=("lengths",)), teacher=loaded_teacher)


def test_resuming_with_another_corpus_is_refused_and_changes_nothing(existing, loaded_teacher, tmp_path, corpus):
    before = contents(existing.store)
    other = tmp_path / corpus.name
    other.write_bytes(corpus.read_bytes().replace(b"lamp", b"LAMP"))
    with pytest.raises(MismatchError, match=rf"differently: corpus file {corpus.name} has other contents\. Use"):
        dump(replace(existing, corpus=(other,)), teacher=loaded_teacher)
    with pytest.raises(MismatchError, match=rf"differently: corpus file .*{corpus.name} was not part of it\. Use"):
        dump(replace(existing, corpus=(corpus, other)), teacher=loaded_teacher)
    assert contents(existing.store) == before


def test_resuming_with_another_teacher_or_precision_is_refused(existing, tmp_path):
    before = contents(existing.store)
    other = save_teacher(tmp_path / "other", seed=7)
    for teacher, named in (
        (load_teacher(str(other), device="cpu"), "the teacher's file model.safetensors has other contents"),
        (load_teacher(existing.teacher, dtype="bfloat16", device="cpu"), "--dtype was float32 and is now bfloat16"),
    ):
        with pytest.raises(MismatchError) as caught:
            dump(existing, teacher=teacher)
        assert named in str(caught.value)
    assert contents(existing.store) == before


def test_teacher_and_corpus_may_be_moved_and_renamed(existing, tmp_path, corpus, uninterrupted):
    moved = shutil.copytree(existing.teacher, tmp_path / "elsewhere")
    renamed = shutil.copy(corpus, tmp_path / "renamed.jsonl")
    config = replace(existing, teacher=str(moved), corpus=(Path(renamed),))
    assert dump(config, teacher=load_teacher(str(moved), device="cpu")).shards == SHARDS // 2
    found = contents(existing.store)
    assert {name: data for name, data in found.items() if not name.endswith("manifest.json")} == {
        name: data for name, data in uninterrupted.items() if not name.endswith("manifest.json")
    }


# --- what is no part of a dump's identity -------------------------------------------------------------------------------


def logged_starts(patch) -> dict[int, list]:
    """Where draws start from here on, by sequence: one array for each time it is asked for."""
    logged: dict[int, list] = {}

    def log(sequence, length, seed):
        found = starts(sequence, length, seed)
        logged.setdefault(sequence, []).append(found)
        return found

    patch.setattr("teacher_dump.extraction.distributions.starts", log)
    return logged


def test_out_of_memory_a_dump_resumes_with_a_smaller_batch(config, loaded_teacher, uninterrupted, monkeypatch, tmp_path):
    """Its shards are those of an uninterrupted dump: tokens and draw points the same, values up to numeric noise."""
    predict = type(loaded_teacher).predict

    def small_device(teacher, token_ids, mask, **wanted):
        if len(token_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(teacher, token_ids, mask, **wanted)

    larger = replace(config, batch_size=8)
    dump(larger, 0, 2, teacher=loaded_teacher)
    half = commits(config)
    with monkeypatch.context() as patch:
        patch.setattr(type(loaded_teacher), "predict", small_device)
        with pytest.raises(InputError, match=r"give a smaller --batch-size \(now 8\); what is committed stays"):
            dump(larger, teacher=loaded_teacher)
        points = logged_starts(patch)
        resumed = dump(replace(config, batch_size=1), teacher=loaded_teacher)
    assert (resumed.shards_existing, resumed.shards) == (half, SHARDS - half)
    assert (config.store / "d/manifest.json").read_bytes() == uninterrupted["d/manifest.json"]
    for name in (f"d/sequences/{shard:05d}.parquet" for shard in range(SHARDS)):
        assert (config.store / name).read_bytes() == uninterrupted[name]
    with monkeypatch.context() as patch:
        whole = logged_starts(patch)
        dump(replace(config, store=tmp_path / "again"), teacher=loaded_teacher)
    for sequence, (drawn_at,) in points.items():
        np.testing.assert_array_equal(drawn_at, whole[sequence][0])
    ours, theirs = (
        KnowledgeStore.open(store).sql("SELECT * FROM positions ORDER BY sequence_id, position")
        for store in (config.store, tmp_path / "again")
    )
    assert ours["token_id"].equals(theirs["token_id"]) and len(ours) > 500
    differing = 0
    for one, other in zip(ours.to_pylist(), theirs.to_pylist(), strict=True):
        if one != other:  # a value on the edge between two steps, or two candidates that are nearly as likely
            differing += 1
            assert one["token_logprob"] == pytest.approx(other["token_logprob"], abs=0.26)
            assert one["candidate_logprobs"] == pytest.approx(other["candidate_logprobs"], abs=0.26)
    assert differing < 0.01 * len(ours)


def test_the_dtype_that_a_dump_was_begun_in_is_used_by_a_resume_and_a_repair(config, teacher_folder, monkeypatch):
    """What `auto` stands for depends on the device: here a dump that was begun where it was bfloat16."""
    dump(replace(config, dtype="bfloat16", device="cpu"), 0, 2)
    load, dtypes = teachers.load_teacher, []

    def noted(teacher, gguf_file, dtype, device, **options):
        dtypes.append(dtype)
        return load(teacher, gguf_file, dtype, device, **options)

    monkeypatch.setattr(teachers, "load_teacher", noted)
    assert config.dtype == "auto"
    assert dump(replace(config, device="cpu"), 1, 2).shards == SHARDS // 2
    (config.store / "d/positions/00001.parquet").unlink()
    assert repair(replace(config, device="cpu")).shards == 1
    assert dtypes == ["bfloat16", "bfloat16"]
    with pytest.raises(MismatchError, match=r"--dtype was bfloat16 and is now float32\. Leave --dtype out"):
        dump(replace(config, dtype="float32"))
    assert verify(config.store).damage == []


def test_a_complete_dump_is_left_alone(config, loaded_teacher, monkeypatch):
    dump(config, teacher=loaded_teacher)
    before = {path: path.stat().st_mtime_ns for path in config.store.rglob("*")}

    def nobody(*arguments):
        raise AssertionError("a complete dump's corpus needs no reading, and its teacher no asking")

    monkeypatch.setattr("teacher_dump.dumping.plan.read_documents", nobody)
    monkeypatch.setattr("teacher_dump.dumping.inspection.scan", nobody)
    monkeypatch.setattr(type(loaded_teacher), "predict", nobody)
    report = dump(config, teacher=loaded_teacher)
    assert (report.shards, report.shards_existing, report.positions) == (0, SHARDS, 0)
    assert {path: path.stat().st_mtime_ns for path in config.store.rglob("*")} == before


# --- hashes -------------------------------------------------------------------------------------------------------------


def test_a_file_is_hashed_once_until_its_size_or_time_changes(tmp_path, monkeypatch):
    hashed = []
    compute = fingerprints._hash
    monkeypatch.setattr(fingerprints, "_hash", lambda path, *more: hashed.append(path) or compute(path, *more))
    path = tmp_path / "f"
    path.write_bytes(b"one")
    first = fingerprints.file_sha256(path)
    assert fingerprints.file_sha256(path) == first and len(hashed) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert fingerprints.file_sha256(path) != first and len(hashed) == 2
    os.utime(path, ns=(2, 2))
    fingerprints.file_sha256(path)
    assert len(hashed) == 3


@pytest.mark.parametrize("kept", [b"", b"[]", b"{}", b'{"sha256": 5}', b"\xff"])
def test_a_damaged_cache_costs_time_and_nothing_else(tmp_path, kept):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    sha256 = fingerprints.file_sha256(path)
    fingerprints._cache_path(path.resolve()).write_bytes(kept)
    assert fingerprints.file_sha256(path) == sha256


def test_without_a_cache_folder_files_are_hashed_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    (tmp_path / "f").write_bytes(b"one")
    assert len(fingerprints.file_sha256(tmp_path / "f")) == 64
