"""Damage of any file is named, and what reads it says so instead of answering something else."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_server import forked_command
from memory_storage import PLACES, MemoryFile, MemoryStorage, Place, copied, file_in, names_in, new_place, storage_of
from stores import apart, make_manifest, random_sequences, sequence_row, words, write_store

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, Shard, StoreError, verify
from knowledge_store.format.layout import FORMAT_VERSION
from knowledge_store.format.records import read_record, seal
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import joined
from knowledge_store.reporter import Reporter

FILES = [
    "small/manifest.json",
    "small/tokens.parquet",
    "small/positions/00000.parquet",
    "small/positions/00001.parquet",
    "small/sequences/00001.parquet",
    "small/commits/00001.json",
]


@pytest.fixture(scope="module", params=PLACES)
def sound(request, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_store(new_place(request.param, tmp_path_factory.mktemp("verify") / "store"))


@pytest.fixture
def store(sound, tmp_path) -> Place:
    """A copy to damage."""
    return copied(sound, tmp_path / "store")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store for what only a disk has (links, files in the place of folders), or another process (a command)."""
    return write_store(tmp_path / "store")


def flip(path: Path | MemoryFile, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def footer_length(path: Path | MemoryFile) -> int:
    return int.from_bytes(path.read_bytes()[-8:-4], "little") + 8


def assert_named(store: Place, name: str) -> None:
    damage = verify(store).damage
    assert damage
    assert any(str(file_in(store, name)) in sentence for sentence in damage), damage


class Hearer(Reporter):
    """Adds up what it hears of progress."""

    @contextmanager
    def progress(self, title, total, unit=""):
        self.total, self.done = total, 0

        def advance(amount, **figures):
            self.done += amount

        yield advance


def test_a_sound_store(store):
    hearer = Hearer()
    found = verify(store, hearer)
    assert (found.damage, found.notes) == ([], [])
    assert (found.dumps, found.shards, hearer.total, hearer.done) == (1, 2, 2, 2)
    assert found.positions == sum(len(each["token_id"]) for shard in (0, 1) for each in random_sequences(shard, 4))
    shards = [name for name in names_in(store) if name.count("/") == 2 and name.endswith(".parquet")]
    assert found.bytes == sum(len(file_in(store, name).read_bytes()) for name in shards)


@pytest.mark.parametrize("name", ["store.json", "small/manifest.json", "small/commits/00001.json"])
def test_a_newer_version_is_no_damage(store, name):
    flip(file_in(store, "small/positions/00000.parquet"), 100)
    record = read_record(storage_of(store), name)
    file_in(store, name).write_bytes(seal({**record, "version": FORMAT_VERSION + 1, "something": "new"}))
    refusal = f"{name} has format version {FORMAT_VERSION + 1}, and this is knowledge-store for version {FORMAT_VERSION}"
    with pytest.raises(StoreError, match=refusal):
        verify(store)
    if isinstance(store, MemoryStorage):  # which no other process sees
        return
    answer = forked_command("knowledge_store", "verify", store)
    assert answer.returncode == 2
    assert refusal in answer.stderr and "--repair" not in answer.stderr


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_in_any_place(store, name):
    path = file_in(store, name)
    whole = path.read_bytes()
    if name.endswith(".json"):  # a flip within white space could leave JSON as it was; anywhere else is noticed
        places = [whole.index(b'"dump"') + 2, whole.index(b'"sha256": "') + 12, 0, len(whole) - 3]
    else:
        places = [0, 5, len(whole) // 3, len(whole) - footer_length(path) - 1, len(whole) - footer_length(path) + 3]
        places += [len(whole) - 6, len(whole) - 1]
    for number, place in enumerate(places):
        flip(path, place, number % 7)
        assert_named(store, name)
        path.write_bytes(whole)
    assert not verify(store).damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_truncated_files(store, name, keep):
    path = file_in(store, name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep].rstrip(b"\n"))
    if whole.rstrip(b"\n") != path.read_bytes():
        assert_named(store, name)
    else:
        assert not verify(store).damage  # only the last line's end was lost


@pytest.mark.parametrize("name", [name for name in FILES if "commits" not in name])
def test_deleted_files(store, name):
    file_in(store, name).unlink()
    assert_named(store, name)
    assert "is missing" in " ".join(verify(store).damage)


def test_a_deleted_commit_record_is_a_shard_not_dumped_yet(store):
    file_in(store, "small/commits/00001.json").unlink()
    found = verify(store)
    assert found.damage == []
    assert [str(file_in(store, "small/positions/00001.parquet")) in note for note in found.notes].count(True) == 1
    assert any("1 of 2 shards still to be dumped" in note for note in found.notes)
    assert len(KnowledgeStore.open(store)) == 4


@pytest.mark.parametrize("table", ["positions", "sequences", "commits"])
def test_two_shards_files_swapped(store, table):
    suffix = "json" if table == "commits" else "parquet"
    first, second = (file_in(store, f"small/{table}/0000{shard}.{suffix}") for shard in (0, 1))
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    for shard in (0, 1):
        assert_named(store, f"small/{table}/0000{shard}.{suffix}")
    with pytest.raises(DamageError):
        everything(store)


def test_the_command_names_the_file_and_exits_with_1(folder):
    answer = forked_command("knowledge_store", "verify", folder)
    found = verify(folder)
    sound = f"Sound: 1 dumps, 2 shards, {found.positions} positions, {found.bytes / 1000:.1f} kB\n"
    assert (answer.returncode, answer.stdout) == (0, sound)
    path = folder / "small/positions/00001.parquet"
    flip(path, 40)
    answer = forked_command("knowledge_store", "verify", folder)
    assert answer.returncode == 1
    assert f"Damage: {path} is damaged: its contents are not those that were published\n" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


LINKS = {"a file": None, "a link to itself": "commits", "a link to nothing": "nowhere"}


def take_the_place_of_commits(dump: Path, what: str) -> None:
    if LINKS[what] is None:
        (dump / "commits").touch()
    else:
        (dump / "commits").symlink_to(LINKS[what])


@pytest.mark.parametrize("what", LINKS)
def test_commits_that_are_no_folder(folder, what):
    """Nothing of such a dump can be found, so it must not pass for one that was only begun."""
    shutil.rmtree(folder / "small/commits")
    take_the_place_of_commits(folder / "small", what)
    assert verify(folder).damage == [f"{folder / 'small/commits'} is damaged: it is not a folder"]
    with pytest.raises(DamageError, match="small/commits is damaged: it is not a folder"):
        KnowledgeStore.open(folder).dump()
    with pytest.raises(DamageError, match="small/commits is damaged: it is not a folder"):
        DumpWriter.open(folder, make_manifest(), tokens_table(words(11), words(11)))


@pytest.mark.parametrize("what", LINKS)
def test_commits_that_are_no_folder_beside_no_manifest(folder, what):
    (folder / "foo").mkdir()
    take_the_place_of_commits(folder / "foo", what)
    assert verify(folder).damage == [f"{folder / 'foo/commits'} is damaged: it is not a folder"]
    ended = forked_command("knowledge_store", "verify", folder)
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)
    assert len(KnowledgeStore.open(folder)) == 8


def test_every_damaged_file_is_named_not_only_the_first(store):
    names = ["tokens.parquet", "positions/00000.parquet", "sequences/00000.parquet", "commits/00001.json"]
    for name in names:
        flip(file_in(store, f"small/{name}"), 40)
    found = verify(store)
    for name in names:
        assert sum(str(file_in(store, f"small/{name}")) in sentence for sentence in found.damage) == 1, name
    assert (len(found.damage), found.shards) == (len(names), 0)


def test_damaged_store_json(store):
    flip(file_in(store, "store.json"), 5)
    assert_named(store, "store.json")
    with pytest.raises(DamageError, match=r"store\.json"):
        KnowledgeStore.open(store)


def test_no_store_at_all(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        verify(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="there is no store"):
        verify(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="not a knowledge store"):
        verify(tmp_path)


def everything(store: Place) -> tuple:
    """All that three ways of reading say."""
    opened = KnowledgeStore.open(store)
    sequences = [{name: array.tobytes() for name, array in opened[item].items()} for item in range(len(opened))]
    batches = [{name: array.tobytes() for name, array in batch.items()} for batch in opened.batches(batch_size=3)]
    return sequences, batches, opened.sql("SELECT * FROM positions ORDER BY sequence_id, position").to_pylist()


READERS = {
    "item": lambda store: [store[item]["input_ids"].sum() for item in range(len(store))],
    "batches": lambda store: list(store.batches(batch_size=3)),
    "sql": lambda store: store.sql("SELECT * FROM positions"),
    "candidates": lambda store: store.sql("SELECT * FROM candidates"),
}


def page_bytes(path: Path | MemoryFile) -> list[int]:
    """The places of bytes of page contents: the last two of each column chunk, which are never a page's header."""
    metadata = pq.read_metadata(pa.BufferReader(path.read_bytes()))
    places = []
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            start = column.data_page_offset
            if column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            end = start + column.total_compressed_size
            places += [end - 1, end - 2]
    return places


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_answers_from_damaged_pages(store, reader):
    path = file_in(store, "small/positions/00001.parquet")
    whole = path.read_bytes()
    for number, place in enumerate(page_bytes(path)):
        flip(path, place, number % 8)
        opened = KnowledgeStore.open(store, cache_size=0)
        if reader == "candidates" and number not in (0, 1, 10, 11, 12, 13):
            continue  # the other columns are not read
        with pytest.raises(DamageError) as raised:
            READERS[reader](opened)
        assert str(path) in str(raised.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_answers_from_a_damaged_footer(store, reader):
    path = file_in(store, "small/positions/00001.parquet")
    whole = path.read_bytes()
    for place in range(len(whole) - footer_length(path), len(whole), 97):
        flip(path, place, place % 8)
        with pytest.raises(DamageError) as raised:
            READERS[reader](KnowledgeStore.open(store, cache_size=0))
        assert str(path) in str(raised.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm", ["cut", "gone", "longer"])
def test_no_reader_answers_from_a_file_of_another_length(store, reader, harm):
    path = file_in(store, "small/positions/00001.parquet")
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if harm == "cut" else path.read_bytes() + b"x")
    with pytest.raises(DamageError) as raised:
        READERS[reader](KnowledgeStore.open(store, cache_size=0))
    assert str(path) in str(raised.value)


def test_sound_shards_stay_readable(store):
    file_in(store, "small/positions/00001.parquet").unlink()
    opened = KnowledgeStore.open(store)
    assert opened[3]["input_ids"].tolist() == random_sequences(0, 4)[3]["token_id"].tolist()
    assert opened.sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 8}]
    assert opened.info()[0].shards == 2


def test_damaged_tokens(store):
    flip(file_in(store, "small/tokens.parquet"), 30)
    opened = KnowledgeStore.open(store)
    with pytest.raises(DamageError, match=r"tokens\.parquet"):
        opened.tokens()
    with pytest.raises(DamageError, match=r"tokens\.parquet"):
        opened.sql("SELECT token_text FROM positions")
    file_in(store, "small/tokens.parquet").unlink()
    with pytest.raises(DamageError, match=r"tokens\.parquet is missing"):
        opened.tokens()


def broken_rule(change) -> str:
    """What verify says of a shard that was written whole and says something impossible."""

    def build(place: Place) -> list[str]:
        knowledge = random_sequences(3, 4)
        rows = [sequence_row(index, each) for index, each in enumerate(knowledge)]
        arrays = joined(knowledge)
        change(arrays, rows)
        writer = DumpWriter.open(place, make_manifest(shards=1), tokens_table(words(11), words(11)))
        writer.commit(Shard(0, 0, 100, rows, {"positions": apart(arrays, rows)}))
        return verify(place).damage

    return build


def swap_first_candidates(arrays, rows):
    for name in ("candidate_ids", "candidate_logprobs"):
        arrays[name][:, [0, 2]] = arrays[name][:, [2, 0]]


def one(name: str, value: float, column: int | None = None):
    def change(arrays, rows):
        place = int(np.flatnonzero(arrays["has_knowledge"])[2])
        arrays[name][place if column is None else (place, column)] = value

    return change


def drop_knowledge_of_a_target(arrays, rows):
    arrays["has_knowledge"] = arrays["has_knowledge"].copy()
    arrays["has_knowledge"][np.flatnonzero(arrays["is_target"])[0]] = False


def knowledge_at_position_0(arrays, rows):
    arrays["has_knowledge"] = arrays["has_knowledge"].copy()
    arrays["has_knowledge"][0] = True
    arrays["candidate_logprobs"][0], arrays["tail_logprob"][0] = np.log(0.25), np.log(0.25)


def double_a_candidate(arrays, rows):
    arrays["candidate_ids"][:, 1] = arrays["candidate_ids"][:, 0]


def other_tokens(arrays, rows):
    arrays["token_id"][0] = (arrays["token_id"][0] + 1) % 11


def other_targets(arrays, rows):
    rows[1]["targets"] += 1


def other_order(arrays, rows):
    rows[1]["sequence_id"] = 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (swap_first_candidates, "not sorted"),
        (one("token_logprob", 0.5), "above zero"),
        (one("candidate_ids", 11, 0), "not below the vocabulary size"),
        (drop_knowledge_of_a_target, "a target has no knowledge"),
        (knowledge_at_position_0, "position 0, which nothing predicts"),
        (double_a_candidate, "stands twice"),
        (other_tokens, "do not match its token_hash"),
        (other_targets, "does not have"),
        (other_order, "not have its sequences in order"),
    ],
)
def test_rules_of_the_format(place, change, complaint):
    """A writer with a bug makes files that are whole and wrong; hashes cannot tell."""
    damage = broken_rule(change)(place)
    assert len(damage) == 1
    assert complaint in damage[0]
    assert "00000.parquet" in damage[0]


@pytest.mark.parametrize(
    "change",
    [
        one("tail_logprob", np.nan),
        one("candidate_logprobs", np.nan, 0),
        one("token_logprob", -np.inf),
        one("token_logprob", np.nan),
    ],
)
def test_numbers_that_are_not_finite_are_not_written(place, change):
    with pytest.raises(InputError, match="NaN or infinite"):
        broken_rule(change)(place)
    assert names_in(place) == ["small/manifest.json", "small/tokens.parquet", "store.json"]


@pytest.mark.parametrize(
    "change", [one("candidate_logprobs", -9.0, 2), one("tail_logprob", -20.0), one("tail_logprob", -np.inf)]
)
def test_predictions_that_do_not_sum_to_one_are_not_written(place, change):
    with pytest.raises(InputError, match="do not sum to one"):
        broken_rule(change)(place)
    assert names_in(place) == ["small/manifest.json", "small/tokens.parquet", "store.json"]
