"""A few of the faults of torture/damage.py, and what a random fault would seldom hit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_storage import PLACES, Place, change, copied, file_in, new_place, put, storage_of
from stores import commit, make_manifest, published_file, random_sequences, record_of, words, write_store
from torture.damage import page_places, try_faults

from knowledge_store import DamageError, DumpWriter, KnowledgeStore, verify
from knowledge_store.format.integrity import BLOCK_BYTES, DIGEST_BYTES, DIGESTS_KEY, CheckedFile
from knowledge_store.format.parquet import publish_table, read_table
from knowledge_store.format.sequences import SEQUENCES_COLUMNS, tokens_table
from knowledge_store.kinds import KINDS


def test_no_fault_is_silent(tmp_path):
    counts = try_faults(20, range(26), tmp_path, step=1997)
    assert counts["leftovers"] == 2
    assert counts["silent"] == 0
    assert counts["faults"] == counts["survived"] > 100
    assert counts["refused by name"] > 100
    assert counts["readings"] >= 12


@pytest.fixture(scope="module", params=PLACES)
def sound(request, tmp_path_factory) -> Place:
    return write_store(new_place(request.param, tmp_path_factory.mktemp("damage") / "store"), vocabulary=3000, k=40, size=99)


def test_digests_are_those_of_the_format(sound):
    """What FORMAT.md says of them, computed by hand."""
    data = file_in(sound, "small/positions/00000.parquet").read_bytes()
    before = data[: -8 - int.from_bytes(data[-8:-4], "little")]
    assert len(before) > 2 * BLOCK_BYTES  # a short one at the end, too
    expected = [
        hashlib.sha256(before[at : at + BLOCK_BYTES]).hexdigest()[: 2 * DIGEST_BYTES]
        for at in range(0, len(before), BLOCK_BYTES)
    ]
    assert pq.read_metadata(pa.BufferReader(data)).metadata == {DIGESTS_KEY: "".join(expected).encode()}


def test_any_stretch_of_a_file(sound):
    name = "small/positions/00000.parquet"
    data = file_in(sound, name).read_bytes()
    file = CheckedFile(published_file(sound, name))
    random = np.random.default_rng(0)
    for start in [0, 1, BLOCK_BYTES - 1, len(data) - 9, len(data), *random.integers(0, len(data), 40).tolist()]:
        for count in (0, 1, 8, BLOCK_BYTES, BLOCK_BYTES + 1, len(data)):
            file.seek(start)
            assert bytes(file.read(count)) == data[start : start + count]
            assert file.tell() == min(start + count, len(data))
    file.seek(-8, 2)
    assert bytes(file.read()) == data[-8:]


def test_a_page_header_that_still_parses(sound, tmp_path):
    """Page checksums do not cover headers: the bit that names the encoding turns every value of a page into another."""
    store = copied(sound, tmp_path / "store")
    path = file_in(store, "small/positions/00001.parquet")
    whole, published = path.read_bytes(), published_file(store, "small/positions/00001.parquet")
    flips = [(place, bit) for place in reversed(page_places(whole)) for bit in range(8 * 24)]
    for place, bit in flips:
        harmed = bytearray(whole)
        harmed[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        with pytest.raises(DamageError, match="contents are not those"):
            CheckedFile(published).read()
        if pyarrow_believes(bytes(harmed), whole):
            break
    else:
        pytest.fail("pyarrow believed none of them: this test shows nothing")
    with pytest.raises(DamageError, match=r"positions/00001\.parquet is damaged"):
        KnowledgeStore.open(store).sql("SELECT * FROM positions")
    path.write_bytes(whole)


def pyarrow_believes(harmed: bytes, whole: bytes) -> bool:
    """Whether pyarrow, checking pages, reads something else from the file as it is, and no error."""
    try:
        found = pq.ParquetFile(pa.BufferReader(harmed), page_checksum_verification=True).read()
        return not found.equals(pq.read_table(pa.BufferReader(whole)))
    except (OSError, ValueError):
        return False


def test_damage_while_a_store_is_open(sound, tmp_path):
    """What was checked once is checked again when it is read again."""
    store = copied(sound, tmp_path / "store")
    opened = KnowledgeStore.open(store, cache_size=0)
    path = file_in(store, "small/positions/00001.parquet")
    assert opened[0]["input_ids"].shape
    opened.sql("SELECT sum(tail_logprob) FROM positions")
    data = bytearray(path.read_bytes())
    data[page_places(bytes(data))[-1] + 3] ^= 4
    if isinstance(path, Path):  # in place, as a disk decays: a file that is kept open has the damage too
        with open(path, "r+b") as file:
            file.write(data)
    else:
        path.write_bytes(bytes(data))
    for read in (
        lambda: opened[150],
        lambda: list(opened.batches(batch_size=64)),
        lambda: opened.sql("SELECT * FROM positions"),
    ):
        with pytest.raises(DamageError, match=r"positions/00001\.parquet is damaged"):
            read()


def test_a_store_json_of_something_else(sound, tmp_path):
    store = copied(sound, tmp_path / "store")
    put(store, "store.json", file_in(store, "small/manifest.json").read_bytes())
    assert any("store.json" in sentence for sentence in verify(store).damage)
    with pytest.raises(DamageError, match=r"store\.json"):
        KnowledgeStore.open(store)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A dump of the name of `sound`'s, of as many shards, made from another text."""
    corpus = {"files": [{"name": "numbers.jsonl", "bytes": 2, "sha256": "01"}]}
    return write_store(tmp_path_factory.mktemp("damage") / "stranger", vocabulary=3000, k=40, size=99, seed=5, corpus=corpus)


@pytest.mark.parametrize("known", [True, False], ids=["indexed before", "not indexed"])
@pytest.mark.parametrize("table", [None, "positions", "manifest"])
def test_files_of_another_store(sound, stranger, tmp_path, known, table):
    """A whole shard with its record, a table alone, or the manifest: of a dump with the same name."""
    store = copied(sound, tmp_path / "store")
    if known:
        KnowledgeStore.open(store)
    names = {
        None: ["positions/00001.parquet", "sequences/00001.parquet", "commits/00001.json"],
        "positions": ["positions/00001.parquet"],
        "manifest": ["manifest.json", "tokens.parquet"],
    }[table]
    for name in names:
        put(store, f"small/{name}", (stranger / "small" / name).read_bytes())
    for read in (
        lambda: KnowledgeStore.open(store)[150],
        lambda: list(KnowledgeStore.open(store).batches(batch_size=64)),
        lambda: KnowledgeStore.open(store).sql("SELECT sum(tail_logprob) FROM positions"),
    ):
        with pytest.raises(DamageError, match=r"small/(commits|positions)/0000[01]\.(json|parquet) (is damaged|does not)"):
            read()
    assert verify(store).damage


def test_shards_of_one_plan_may_come_from_two_stores(sound, tmp_path):
    """Dumped in two places from the same manifest, and copied together."""
    store = copied(sound, tmp_path / "store")
    twin = write_store(tmp_path / "twin", vocabulary=3000, k=40, size=99)
    for name in ("positions/00001.parquet", "sequences/00001.parquet", "commits/00001.json"):
        put(store, f"small/{name}", (twin / "small" / name).read_bytes())
    assert not verify(store).damage
    assert len(KnowledgeStore.open(store)) == len(KnowledgeStore.open(sound))


def uncommitted(sound: Place, folder: Path) -> Place:
    """A store whose worker was killed when shard 1 had its files, and no commit record yet."""
    store = copied(sound, folder / "store")
    change(store, "small/commits/00001.json", None)
    return store


def go_on(store: Place) -> None:
    writer = DumpWriter.open(store, make_manifest(vocabulary=3000, k=40), tokens_table(words(3000), words(3000)))
    commit(writer, 1, random_sequences(1, 99, 3000, 40))


@pytest.mark.parametrize("table", ["positions", "sequences"])
def test_what_an_unfinished_run_left_is_not_believed(sound, tmp_path, table):
    """No record vouches for it yet. Any bit of its footer: it is refused, or it reads as if nothing were."""
    store = uncommitted(sound, tmp_path)
    storage, name = storage_of(store), f"small/{table}/00001.parquet"
    path = file_in(store, name)
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little") + 8
    expected = pq.read_table(pa.BufferReader(whole))
    columns = SEQUENCES_COLUMNS if table == "sequences" else KINDS[table].columns(make_manifest())
    refused = 0
    for bit in np.random.default_rng(0).integers(8 * (len(whole) - length), 8 * len(whole), 150).tolist():
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        try:
            record, published = publish_table(storage, name, expected.schema, [expected], columns)
        except DamageError as error:
            assert f"{path} has no commit record" in str(error) and "delete that file" in str(error)
            refused += 1
            continue
        assert (record, published) == (record_of(path), False)
        assert read_table(published_file(store, name)).equals(expected)
    assert refused > 75


def test_an_unfinished_run_left_statistics_of_other_rows(sound, tmp_path):
    """SQL leaves out row groups by them, so one bit there would lose sequences."""
    store = uncommitted(sound, tmp_path)
    path = file_in(store, "small/positions/00001.parquet")
    whole = path.read_bytes()
    least = pq.read_metadata(pa.BufferReader(whole)).row_group(0).column(0).statistics.min
    place = whole.rindex(least.to_bytes(8, "little"))
    path.write_bytes(whole[: place + 5] + b"\x01" + whole[place + 6 :])
    with pytest.raises(DamageError, match="its statistics are not those of its rows"):
        go_on(store)
    path.unlink()
    go_on(store)
    assert not verify(store).damage


def test_an_unfinished_run_left_other_tokens(sound, stranger, tmp_path):
    store = uncommitted(sound, tmp_path)
    put(store, "small/positions/00001.parquet", (stranger / "small/positions/00001.parquet").read_bytes())
    with pytest.raises(DamageError, match="does not have the rows that belong there"):
        go_on(store)
