"""Damage of any file is named, and what reads it says so instead of answering something else."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_command
from stores import apart, make_manifest, random_sequences, sealed_json, sequence_row, words, write_store

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, Shard, StoreError, verify
from knowledge_store.format.layout import FORMAT_VERSION
from knowledge_store.format.records import seal
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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("verify") / "store")


@pytest.fixture
def store(sound, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "store"))


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def footer_length(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[-8:-4], "little") + 8


def assert_named(store: Path, name: str) -> None:
    damage = verify(store).damage
    assert damage
    assert any(str(store / name) in sentence for sentence in damage), damage


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
    assert found.bytes == sum(path.stat().st_size for path in store.glob("small/*/*.parquet"))


@pytest.mark.parametrize("name", ["store.json", "small/manifest.json", "small/commits/00001.json"])
def test_a_newer_version_is_no_damage(store, name):
    flip(store / "small/positions/00000.parquet", 100)
    record = sealed_json(store / name)
    (store / name).write_bytes(seal({**record, "version": FORMAT_VERSION + 1, "something": "new"}))
    refusal = f"{name} has format version {FORMAT_VERSION + 1}, and this is knowledge-store for version {FORMAT_VERSION}"
    with pytest.raises(StoreError, match=refusal):
        verify(store)
    answer = run_command("knowledge_store", "verify", store)
    assert answer.returncode == 2
    assert refusal in answer.stderr and "--repair" not in answer.stderr


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_in_any_place(store, name):
    path = store / name
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
    path = store / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep].rstrip(b"\n"))
    if whole.rstrip(b"\n") != path.read_bytes():
        assert_named(store, name)
    else:
        assert not verify(store).damage  # only the last line's end was lost


@pytest.mark.parametrize("name", [name for name in FILES if "commits" not in name])
def test_deleted_files(store, name):
    (store / name).unlink()
    assert_named(store, name)
    assert "is missing" in " ".join(verify(store).damage)


def test_a_deleted_commit_record_is_a_shard_not_dumped_yet(store):
    (store / "small/commits/00001.json").unlink()
    found = verify(store)
    assert found.damage == []
    assert [str(store / "small/positions/00001.parquet") in note for note in found.notes].count(True) == 1
    assert any("1 of 2 shards still to be dumped" in note for note in found.notes)
    assert len(KnowledgeStore.open(store)) == 4


@pytest.mark.parametrize("table", ["positions", "sequences", "commits"])
def test_two_shards_files_swapped(store, table):
    suffix = "json" if table == "commits" else "parquet"
    first, second = (store / f"small/{table}/0000{shard}.{suffix}" for shard in (0, 1))
    spare = store / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    for shard in (0, 1):
        assert_named(store, f"small/{table}/0000{shard}.{suffix}")
    with pytest.raises(DamageError):
        everything(store)


def test_the_command_names_the_file_and_exits_with_1(store):
    answer = run_command("knowledge_store", "verify", store)
    found = verify(store)
    sound = f"Sound: 1 dumps, 2 shards, {found.positions} positions, {found.bytes / 1000:.1f} kB\n"
    assert (answer.returncode, answer.stdout) == (0, sound)
    path = store / "small/positions/00001.parquet"
    flip(path, 40)
    answer = run_command("knowledge_store", "verify", store)
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
def test_commits_that_are_no_folder(store, what):
    """Nothing of such a dump can be found, so it must not pass for one that was only begun."""
    shutil.rmtree(store / "small/commits")
    take_the_place_of_commits(store / "small", what)
    assert verify(store).damage == [f"{store / 'small/commits'} is damaged: it is not a folder"]
    with pytest.raises(DamageError, match="small/commits is damaged: it is not a folder"):
        KnowledgeStore.open(store).dump()
    with pytest.raises(DamageError, match="small/commits is damaged: it is not a folder"):
        DumpWriter.open(store, make_manifest(), tokens_table(words(11), words(11)))


@pytest.mark.parametrize("what", LINKS)
def test_commits_that_are_no_folder_beside_no_manifest(store, what):
    (store / "foo").mkdir()
    take_the_place_of_commits(store / "foo", what)
    assert verify(store).damage == [f"{store / 'foo/commits'} is damaged: it is not a folder"]
    ended = run_command("knowledge_store", "verify", store)
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)
    assert len(KnowledgeStore.open(store)) == 8


def test_every_damaged_file_is_named_not_only_the_first(store):
    names = ["tokens.parquet", "positions/00000.parquet", "sequences/00000.parquet", "commits/00001.json"]
    for name in names:
        flip(store / "small" / name, 40)
    found = verify(store)
    for name in names:
        assert sum(str(store / "small" / name) in sentence for sentence in found.damage) == 1, name
    assert (len(found.damage), found.shards) == (len(names), 0)


def test_damaged_store_json(store):
    flip(store / "store.json", 5)
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


def everything(store: Path) -> tuple:
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


def page_bytes(path: Path) -> list[int]:
    """The places of bytes of page contents: the last two of each column chunk, which are never a page's header."""
    metadata = pq.read_metadata(path)
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
    path = store / "small/positions/00001.parquet"
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
    path = store / "small/positions/00001.parquet"
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
    path = store / "small/positions/00001.parquet"
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if harm == "cut" else path.read_bytes() + b"x")
    with pytest.raises(DamageError) as raised:
        READERS[reader](KnowledgeStore.open(store, cache_size=0))
    assert str(path) in str(raised.value)


def test_sound_shards_stay_readable(store):
    (store / "small/positions/00001.parquet").unlink()
    opened = KnowledgeStore.open(store)
    assert opened[3]["input_ids"].tolist() == random_sequences(0, 4)[3]["token_id"].tolist()
    assert opened.sql("SELECT count(*) AS n FROM sequences").to_pylist() == [{"n": 8}]
    assert opened.info()[0].shards == 2


def test_damaged_tokens(store):
    flip(store / "small/tokens.parquet", 30)
    opened = KnowledgeStore.open(store)
    with pytest.raises(DamageError, match=r"tokens\.parquet"):
        opened.tokens()
    with pytest.raises(DamageError, match=r"tokens\.parquet"):
        opened.sql("SELECT token_text FROM positions")
    (store / "small/tokens.parquet").unlink()
    with pytest.raises(DamageError, match=r"tokens\.parquet is missing"):
        opened.tokens()


def broken_rule(change) -> str:
    """What verify says of a shard that was written whole and says something impossible."""

    def build(folder: Path) -> list[str]:
        knowledge = random_sequences(3, 4)
        rows = [sequence_row(index, each) for index, each in enumerate(knowledge)]
        arrays = joined(knowledge)
        change(arrays, rows)
        writer = DumpWriter.open(folder, make_manifest(shards=1), tokens_table(words(11), words(11)))
        writer.commit(Shard(0, 0, 100, rows, {"positions": apart(arrays, rows)}))
        return verify(folder).damage

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
        (drop_knowledge_of_a_target, "a target has no candidates"),
        (knowledge_at_position_0, "position 0, which nothing predicts"),
        (double_a_candidate, "stands twice"),
        (other_tokens, "do not match its token_hash"),
        (other_targets, "does not have"),
        (other_order, "not have its sequences in order"),
    ],
)
def test_rules_of_the_format(tmp_path, change, complaint):
    """A writer with a bug makes files that are whole and wrong; hashes cannot tell."""
    damage = broken_rule(change)(tmp_path / "store")
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
def test_numbers_that_are_not_finite_are_not_written(tmp_path, change):
    with pytest.raises(InputError, match="NaN or infinite"):
        broken_rule(change)(tmp_path / "store")
    assert [path for path in (tmp_path / "store").glob("small/*/*") if path.is_file()] == []


@pytest.mark.parametrize(
    "change", [one("candidate_logprobs", -9.0, 2), one("tail_logprob", -20.0), one("tail_logprob", -np.inf)]
)
def test_predictions_that_do_not_sum_to_one_are_not_written(tmp_path, change):
    with pytest.raises(InputError, match="do not sum to one"):
        broken_rule(change)(tmp_path / "store")
    assert [path for path in (tmp_path / "store").glob("small/*/*") if path.is_file()] == []
