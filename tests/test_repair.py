"""`--repair` makes the damaged shards again and leaves sound ones alone; wherever it is cut off, it can be done again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import story_rows, write_jsonl
from memory_storage import MemoryFile, MemoryStorage, Place, file_in, names_in
from processes import Command, Notes
from stores import (
    apart,
    commit,
    commit_of,
    make_manifest,
    random_sequences,
    read_whole,
    rewrite,
    sealed_json,
    sequence_row,
    words,
    write_store,
)
from test_resume import arguments, contents

from knowledge_store import (
    DamageError,
    DumpWriter,
    InputError,
    KnowledgeStore,
    MismatchError,
    Shard,
    StoreError,
    verify,
)
from knowledge_store.format.layout import FORMAT_VERSION
from knowledge_store.format.records import seal
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import joined
from knowledge_store.storage import local as publication
from knowledge_store.writing import repair as repairing
from teacher_dump import DumpConfig, dump, repair

TABLES = {"positions": "parquet", "sequences": "parquet", "commits": "json"}


@pytest.fixture(scope="module")
def dumped(tmp_path_factory, teacher_folder, loaded_teacher) -> DumpConfig:
    """A dump of three shards, which nobody may change."""
    folder = tmp_path_factory.mktemp("repair")
    corpus = write_jsonl(folder / "c.jsonl", story_rows(6))
    config = DumpConfig(str(teacher_folder), (corpus,), folder / "store", "d", max_length=40, batch_size=4, shard_size=2)
    dump(config, teacher=loaded_teacher)
    return config


@pytest.fixture
def config(dumped, tmp_path) -> DumpConfig:
    """A copy to damage."""
    return replace(dumped, store=Path(shutil.copytree(dumped.store, tmp_path / "store")))


def flip(path: Path | MemoryFile) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def identities(store: Path) -> dict[str, tuple[int, int]]:
    """Which file, and written when, stands under each name."""
    return {str(path.relative_to(store)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.rglob("*.*")}


@pytest.mark.parametrize("call", [dump, repair])
@pytest.mark.parametrize("name", ["d/manifest.json", "d/commits/00002.json"])
def test_what_a_newer_version_wrote_is_refused_and_stays(config, name, call):
    (config.store / name).write_bytes(seal({**sealed_json(config.store / name), "version": FORMAT_VERSION + 1}))
    (config.store / "d/commits/00001.json").unlink()
    before = identities(config.store)
    versions = f"{name} has format version {FORMAT_VERSION + 1}, and this is knowledge-store for version {FORMAT_VERSION}"
    with pytest.raises(StoreError, match=versions):  # whoever's shard it is, and before a teacher is loaded
        call(replace(config, teacher="a-teacher/that-is-not-here"), 0, 2)
    assert identities(config.store) == before


def test_only_the_damaged_shards_are_dumped_again(config, dumped, loaded_teacher):
    (config.store / "d/positions/00000.parquet").unlink()
    flip(config.store / "d/sequences/00002.parquet")
    before = identities(config.store)
    report = repair(config, teacher=loaded_teacher)
    assert report.shards == 2
    assert verify(config.store).damage == []
    assert contents(config.store) == contents(dumped.store)
    after = identities(config.store)
    changed = {name for name in after if after[name] != before.get(name)}
    # Made again byte for byte, they are what their records say: those stay too.
    assert changed == {"d/positions/00000.parquet", "d/sequences/00002.parquet"}
    assert repair(replace(config, teacher="a-teacher/that-is-not-here")).shards == 0  # none is loaded for nothing


def test_ranks_share_the_damaged_shards(config, dumped, loaded_teacher):
    for shard in range(3):
        flip(config.store / f"d/commits/{shard:05d}.json")
    assert repair(config, 1, 2, teacher=loaded_teacher).shards == 1
    assert len(verify(config.store).damage) == 2
    assert repair(config, 0, 2, teacher=loaded_teacher).shards == 2
    assert contents(config.store) == contents(dumped.store)


def test_a_missing_shard_is_not_a_damaged_one(config, loaded_teacher):
    (config.store / "d/commits/00001.json").unlink()
    assert repair(config, teacher=loaded_teacher).shards == 0
    assert dump(config, teacher=loaded_teacher).shards == 1


def test_vocabulary_and_store_file(config, dumped, loaded_teacher):
    flip(config.store / "d/tokens.parquet")
    flip(config.store / "store.json")
    assert repair(config, teacher=loaded_teacher).shards == 0
    assert verify(config.store).damage == []
    assert contents(config.store) == contents(dumped.store)


def test_a_vocabulary_that_another_version_writes_otherwise(config, loaded_teacher, monkeypatch):
    flip(config.store / "d/tokens.parquet")
    monkeypatch.setattr("knowledge_store.format.parquet.COMPRESSION_LEVEL", 1)
    repair(config, teacher=loaded_teacher)
    assert verify(config.store).damage == []
    assert dump(config, teacher=loaded_teacher).shards_existing == 3  # the same dump still


def test_what_cannot_be_repaired_is_said_at_once(config, loaded_teacher):
    with pytest.raises(InputError, match="no dump 'other'"):
        repair(replace(config, name="other"))


@pytest.mark.parametrize("call", [dump, repair])
def test_commits_that_are_no_folder_are_said_at_once(config, call):
    shutil.rmtree(config.store / "d/commits")
    (config.store / "d/commits").touch()
    with pytest.raises(DamageError, match="d/commits is damaged: it is not a folder"):
        call(replace(config, teacher="a-teacher/that-is-not-here"))


@pytest.mark.parametrize("lost", [True, False])
def test_a_manifest_is_made_again_by_what_made_it(config, dumped, loaded_teacher, lost):
    """Every shard's record says what it was made from, so a manifest of something else cannot take its place."""
    path = config.store / "d/manifest.json"
    flip(path)
    if lost:
        path.unlink()
    flip(config.store / "d/positions/00001.parquet")
    for call in (repair, dump) if lost else (repair,):
        with pytest.raises(MismatchError, match=r"commits/0000\d\.json was made from something else"):
            call(replace(config, max_length=39), teacher=loaded_teacher)
    assert path.exists() != lost
    reporter = Notes()
    assert repair(config, teacher=loaded_teacher, reporter=reporter).shards == 1
    assert f"Repaired: {path} was damaged, and is written again" in reporter.notes
    assert verify(config.store).damage == []
    assert contents(config.store) == contents(dumped.store)


def test_files_that_are_sound_and_do_not_belong_together(config, dumped, loaded_teacher):
    """What `verify` names, a repair makes again: here a shard committed with tokens of another text."""
    other = config.store / "d"
    record = commit_of(config.store, 1, "d")
    sequences = read_whole(other / "sequences/00001.parquet")
    hashes = pa.array([value + 1 for value in sequences["token_hash"].to_pylist()], pa.uint64())
    changed = sequences.set_column(sequences.schema.get_field_index("token_hash"), "token_hash", hashes)
    files = record.files | {"sequences": rewrite(other / "sequences/00001.parquet", changed)}
    (other / "commits/00001.json").write_bytes(replace(record, files=files).to_bytes())
    [sentence] = verify(config.store).damage
    assert "do not match its token_hash" in sentence
    assert repair(config, teacher=loaded_teacher).shards == 1
    assert contents(config.store) == contents(dumped.store)


def test_the_command(config, dumped, tmp_path):
    flip(config.store / "d/positions/00001.parquet")
    finished = Command(*arguments(config), "--repair", folder=tmp_path / "log").wait()
    assert finished.returncode == 0, finished.stderr
    assert f"Damage: {config.store}/d/positions/00001.parquet is damaged" in finished.stderr
    assert "d: 1 of 3 shards repaired;" in finished.stderr
    assert contents(config.store) == contents(dumped.store)


# With shards of numpy


def repair_shard(store: Place, shard: int, change=lambda arrays: None) -> None:
    """Repair a shard of `write_store`, its knowledge changed before."""
    tokens = tokens_table(words(11), words(11))
    writer = DumpWriter.open(store, make_manifest(), tokens)
    knowledge = random_sequences(shard, 4)
    arrays = joined(knowledge)
    change(arrays)
    rows = [sequence_row(100 * shard + index, each) for index, each in enumerate(knowledge)]
    repairing.repair_shard(
        writer, Shard(shard, 100 * shard, 100, rows, {"positions": apart(arrays, rows)}, made_by={"host": "elsewhere"})
    )


def versions(store: Place) -> dict[str, object]:
    """What changes of each file when it is written again."""
    return dict(store.versions) if isinstance(store, MemoryStorage) else identities(store)


def other_digits(arrays) -> None:
    """As another device may round: one log-probability, of a token that is no candidate, is a step lower."""
    among = (arrays["candidate_ids"] == arrays["token_id"][:, None]).any(axis=1)
    [place, *_] = (arrays["has_knowledge"] & ~among).nonzero()[0]
    arrays["token_logprob"][place] -= 0.125


def other_tokens(arrays) -> None:
    arrays["token_id"][:] = 0


@pytest.mark.parametrize("damaged", TABLES)
def test_other_digits_get_a_record_of_their_own(place, damaged):
    store = write_store(place)
    flip(file_in(store, f"small/{damaged}/00001.{TABLES[damaged]}"))
    before = versions(store)
    repair_shard(store, 1, other_digits)
    assert verify(store).damage == []
    after = versions(store)
    changed = {name for name in after if after[name] != before[name]}
    sound_positions = damaged == "sequences"  # are kept, whatever a repair makes of them
    assert ("small/positions/00001.parquet" in changed) == (not sound_positions)
    assert ("small/commits/00001.json" in changed) == (not sound_positions)
    assert not [name for name in changed if "00000" in name]
    assert len(KnowledgeStore.open(store).sql("SELECT * FROM positions")) > 0


def test_other_tokens_beside_sound_files_are_refused(place):
    store = write_store(place)
    flip(file_in(store, "small/sequences/00001.parquet"))
    with pytest.raises(MismatchError, match=r"positions/00001\.parquet is sound"):
        repair_shard(store, 1, other_tokens)
    assert len(verify(store).damage) == 1
    assert not any(".tmp-" in name for name in names_in(store))


def test_a_sound_shard_is_left_alone(place):
    store = write_store(place)
    before = versions(store)
    repair_shard(store, 1, other_digits)
    assert versions(store) == before


class Cut(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("damaged", [["positions"], ["sequences"], ["commits"], ["positions", "sequences", "commits"]])
def test_cut_off_anywhere(tmp_path, monkeypatch, damaged):
    """At each rename and each flush: what is left is damage that is named, or the repaired shard; and it can be done again."""
    sound = write_store(tmp_path / "sound")
    states = set()
    for call in range(40):
        store = Path(shutil.copytree(sound, tmp_path / f"{call}"))
        for table in damaged:
            flip(store / f"small/{table}/00001.{TABLES[table]}")
        calls = 0

        def counted(function):
            def wrapper(*arguments):
                nonlocal calls
                calls += 1
                if calls == call + 1:  # noqa: B023
                    raise Cut
                return function(*arguments)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(publication.os, "fsync", counted(publication.os.fsync))
            patch.setattr(Path, "replace", counted(Path.replace))
            try:
                repair_shard(store, 1, other_digits)
                done = True
            except Cut:
                done = False
        sentences = verify(store).damage
        states.add(bool(sentences))
        assert all("00001" in each for each in sentences)
        assert sentences or KnowledgeStore.open(store).info()[0].complete
        if done:
            assert not sentences
            break
        repair_shard(store, 1)
        assert verify(store).damage == []
        assert not list(store.rglob(".tmp-*"))
    else:
        raise AssertionError("it never came to its end")
    assert states == {True, False}


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store")
    flip(store / "small/positions/00001.parquet")
    before = identities(store)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("knowledge_store.storage.local.fsync_folder", lambda folder: None)
        patch.setattr(publication.os, "fsync", full)
        with pytest.raises(StoreError, match=r"cannot write .*positions/00001\.parquet: No space left"):
            repair_shard(store, 1)
    assert identities(store) == before


def test_a_store_open_meanwhile_answers_from_before_or_says_so(place):
    store = write_store(place)
    opened = KnowledgeStore.open(store, cache_size=0)
    expected = opened[7]["candidate_logprobs"].tolist()
    flip(file_in(store, "small/positions/00001.parquet"))
    repair_shard(store, 1, other_digits)
    assert opened[7]["candidate_logprobs"].tolist() == expected
    with pytest.raises(DamageError, match="positions/00001"):
        opened.sql("SELECT * FROM positions")
    assert len(KnowledgeStore.open(store).sql("SELECT * FROM positions")) > 0
    commit(DumpWriter.open(store, make_manifest(), tokens_table(words(11), words(11))), 0, random_sequences(0, 4))
