"""A store from a stranger: whatever its files claim, reading them ends with an answer or one line, and takes little memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import commit, drawn_sequences, joined, make_manifest, read_whole, words, write_drawn_store, write_store
from test_records import JSON, altered
from torture import hostile_files

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, StoreError, verify
from knowledge_store.catalogue.index import _load, refresh, standing_records
from knowledge_store.errors import MAX_CHARACTERS, KnowledgeStoreError
from knowledge_store.format.manifest import read_manifest
from knowledge_store.format.pages import chunk_pages, parse_footer
from knowledge_store.format.parquet import describe
from knowledge_store.format.records import MAX_BYTES, MAX_DEPTH, read_record, seal, unseal
from knowledge_store.format.sequences import tokens_table


def test_a_thousand_hostile_files(tmp_path):
    """A short run of the long loop: bombs of every sort, spoilt records and spoilt Parquet files, hashes put right."""
    counts = hostile_files.run(seed=1, minutes=5, folder=tmp_path, trials=1000)
    assert counts["faults"] == counts["survived"] == 1000
    assert counts["silent"] == 0
    assert min(counts[sort] for sort in ("json", "parquet")) > 100 and counts["bombs"] == 15
    assert counts["refused"] > counts["faults"] / 3  # else what is tried is hardly hostile


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_record_or_damage(data):
    try:
        assert isinstance(unseal(data, Path("record.json")), dict)
    except DamageError as error:
        assert str(error).startswith("record.json is damaged")


class Unchecked:
    """Bytes in place of a file."""

    def __init__(self, data: bytes):
        self.data = data

    def read_at(self, start: int, end: int) -> bytes:
        return self.data[start:end]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_pages_or_refused(data, size):
    try:
        pages = list(chunk_pages(Unchecked(data), 0, size))
    except ValueError:
        return
    assert all(page.start + page.compressed <= size for page in pages)


def nested(depth: int) -> dict:
    value: dict = {"sure": 1}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_deep_records_are_refused_and_shallow_ones_read(tmp_path):
    for depth in (MAX_DEPTH - 1, MAX_DEPTH, 300):
        data = seal(nested(depth))
        if depth < MAX_DEPTH:
            assert unseal(data, tmp_path) == nested(depth)
        else:
            with pytest.raises(DamageError, match=f"nested more than {MAX_DEPTH} deep"):
                unseal(data, tmp_path)


def test_records_too_large_to_hold(tmp_path):
    path = tmp_path / "manifest.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole: a terabyte on no disk
    with pytest.raises(DamageError, match=f"more than {MAX_BYTES:,} bytes"):
        read_record(path)
    with pytest.raises(InputError, match="--shard-size"):
        seal({"skipped": ["x" * 1000] * (MAX_BYTES // 1000)})


def test_pipes_and_devices_are_no_files(tmp_path):
    """To open a pipe is to wait until somebody writes to it."""
    store = write_store(tmp_path / "store", shards=1)
    for name in ("small/manifest.json", "small/commits/00000.json"):
        path = store / name
        path.rename(tmp_path / "kept")
        os.mkfifo(path)
        with pytest.raises(StoreError, match="it is not a file"):
            KnowledgeStore.open(store, rebuild_index=True)
        assert verify(store).damage
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(StoreError, match="it is not a file"):
            KnowledgeStore.open(store, rebuild_index=True)
        path.unlink()
        (tmp_path / "kept").rename(path)
    for name in ("small/tokens.parquet", "small/positions/00000.parquet"):
        path = store / name
        path.unlink()
        os.mkfifo(path)
        assert any(f"{path} is damaged: it is not a file" in sentence for sentence in verify(store).damage)
        with pytest.raises(DamageError):
            KnowledgeStore.open(store).sql("SELECT token_text FROM positions")


def test_no_record_names_a_file_outside(tmp_path, monkeypatch):
    """The hash of a shard names its file in the user's cache, so a path in its place would be written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = write_store(tmp_path / "store", shards=1)
    path = store / "small/commits/00000.json"
    for value in ("../../../../escaped", "/tmp/escaped", "0" * 63, "G" * 64):
        altered(path, ["files", "positions", "sha256"], value)
        with pytest.raises(DamageError, match="SHA-256 is not 64 hexadecimal digits"):
            KnowledgeStore.open(store, rebuild_index=True)
    altered(path, ["files", "positions", "sha256"], "0" * 64)
    altered(path, ["files", "../../../outside"], json.loads(path.read_text())["files"]["positions"])
    opened = KnowledgeStore.open(store)  # a table that no kind has is never opened
    assert opened[0] and opened.sql("SELECT count(*) FROM positions")
    assert "does not list the files" in verify(store).damage[0]
    assert not list(tmp_path.rglob("*escaped*"))


def test_an_index_that_came_with_a_store_is_not_believed(tmp_path, monkeypatch):
    """Fresh by its records' sizes and times, and made to lie: names of files elsewhere, and views without end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = write_store(tmp_path / "store", shards=1)
    sound = refresh(store, [read_manifest(store / "small")])
    for lie in (
        "UPDATE files SET sha256 = '../../../../escaped'",
        "UPDATE files SET footer_sha256 = ''",
        "CREATE VIEW more AS SELECT 1",
        "ALTER TABLE shards RENAME TO old; CREATE VIEW shards AS SELECT * FROM old, range(1000000000000)",
        "UPDATE shards SET committed_at = repeat('x', 1000000)",
    ):
        with duckdb.connect(str(store / "index.duckdb")) as connection:
            connection.execute(lie)
        assert refresh(store, [read_manifest(store / "small")]).files.equals(sound.files)
        assert len(KnowledgeStore.open(store)[0]["input_ids"]) > 1
    assert not list(tmp_path.rglob("*escaped*"))


# What each does to a sound index of one shard. The schema of one that is made anew is that of the sound one.
HOSTILE_INDEXES = {
    "endless view": "DROP TABLE about; CREATE VIEW about AS SELECT 'x' AS value FROM range(100000000), range(100000000)",
    "many compressed rows": "INSERT INTO about SELECT value FROM about, range(20000000)",
    "endless view beside": "CREATE VIEW more AS SELECT 1 AS x FROM range(100000000), range(100000000)",
    "another column": "ALTER TABLE shards ADD COLUMN x VARCHAR; UPDATE shards SET x = repeat('x', 100000000)",
    "column with a default": "ALTER TABLE shards ALTER COLUMN bytes SET DEFAULT 5",
    "virtual column": "DROP TABLE about;"
    " CREATE TABLE about (v BOOLEAN, value VARCHAR GENERATED ALWAYS AS (repeat('x', 1000)) VIRTUAL);"
    " INSERT INTO about VALUES (true)",
    "another type": "ALTER TABLE shards ALTER COLUMN documents SET DATA TYPE VARCHAR",
    "many shards": "INSERT INTO shards SELECT shards.* FROM shards, range(200000)",
    "many files": "INSERT INTO files SELECT files.* FROM files, range(200000)",
    "long text": "PRAGMA force_compression = 'zstd'; UPDATE shards SET committed_at = repeat('x', 100000000)",
    "much text": "INSERT INTO files SELECT files.* REPLACE (repeat('x', 1000) AS dump,"
    " repeat('x', 1000) AS \"table\") FROM files, range(30)",
    "long column names": "UPDATE shards SET column_bytes = map_from_entries(list_transform(range(1000),"
    " lambda n: struct_pack(k := repeat('x', 990) || n, v := n)))",
    "many column names": "UPDATE shards SET column_bytes = map_from_entries(list_transform(range(100000),"
    " lambda n: struct_pack(k := n::VARCHAR, v := n)))",
    "statistic of no name": 'ALTER TABLE shards ADD COLUMN "statistic a""b" DOUBLE',
    "functions of its own": "CREATE MACRO strlen(x) AS 1; CREATE MACRO max(x) AS 1; CREATE MACRO sum(x) AS 1;"
    " CREATE MACRO duckdb_views() AS TABLE SELECT 1 WHERE false; UPDATE shards SET committed_at = repeat('x', 1000000)",
}

OPEN = """
import resource, sys
from knowledge_store import KnowledgeStore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
opened = KnowledgeStore.open(sys.argv[1], cache_size=0)
print(len(opened), opened.info()[0].shards, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("sort", HOSTILE_INDEXES)
def test_hostile_indexes(tmp_path, sort):
    """Each ends soon, with the right answers, in little memory, and is made anew."""
    store = write_store(tmp_path / "store", shards=1)
    expected = KnowledgeStore.open(store)
    standing, path = standing_records(store, ["small"]), store / "index.duckdb"
    assert _load(path, standing) is not None
    with duckdb.connect(str(path), config={"memory_limit": "2GB"}) as connection:
        connection.execute(HOSTILE_INDEXES[sort])
    assert _load(path, standing) is None
    command = [sys.executable, "-c", OPEN, str(store)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    sequences, shards, taken = map(int, answer.stdout.split())
    assert (sequences, shards) == (len(expected), 1)
    assert taken < 200 * (1024 if sys.platform == "linux" else 2**20)
    assert _load(path, standing) is not None


WRONG = [
    (["kinds"], {}, "lists no kind of knowledge"),
    (["teacher", "vocabulary_size"], 2**40, "vocabulary size"),
    (["teacher", "vocabulary_size"], 0, "vocabulary size"),
    (["teacher", "files"], 5, "files is not an object"),
    (["kinds", "positions", "quantisation_step"], 1e-300, "quantisation step"),
    (["plan", "max_length"], 2**40, "maximum length"),
    (["derived", "shards"], [{}], "where each begins"),
    (["derived", "shards"], [[]], "where each begins"),
    (["derived", "tokens", "bytes"], -1, "size or number of rows"),
    (["derived", "tokens", "sha256"], "x", "64 hexadecimal"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_manifests_that_nothing_can_be_made_of(tmp_path, place, value, message):
    store = write_store(tmp_path / "store", shards=1)
    if place == ["teacher", "files"]:
        altered(store / "small/manifest.json", ["teacher", "files"], {})
    altered(store / "small/manifest.json", place, value)
    with pytest.raises(DamageError, match=message):
        KnowledgeStore.open(store)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["statistics"], {"SELECT": 1, "a b": 2}),
        (["statistics"], {f"s{n}": 1 for n in range(1000)}),
        (["statistics", "predictions"], 1e300),
        (["documents"], -5),
        (["files", "positions", "bytes"], 2**62),
        (["files", "positions", "column_bytes"], {str(n): 1 for n in range(5000)}),
        (["made_by", "committed_at"], "x" * 1000),
    ],
)
def test_commit_records_that_nothing_can_be_made_of(tmp_path, place, value):
    store = write_store(tmp_path / "store", shards=1)
    altered(store / "small/commits/00000.json", place, value)
    with pytest.raises(DamageError):
        KnowledgeStore.open(store)


def test_the_commands_end_with_one_line(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    altered(store / "small/manifest.json", ["kinds", "positions", "selection"], {"name": "\x1b[2J" + "x" * 100_000})
    for verb, code in (("info", 2), ("verify", 1)):
        result = run_command("knowledge_store", verb, store)
        assert result.returncode == code
        assert "Traceback" not in result.stderr and "\x1b" not in result.stderr + result.stdout
        assert "its selection" in result.stderr
        assert all(len(line) < MAX_CHARACTERS + 200 for line in result.stderr.splitlines())


def test_what_a_store_calls_itself_cannot_command_a_terminal(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    altered(store / "small/manifest.json", ["teacher", "name"], "\x1b]0;owned\x07\x1b[2J")
    result = run_command("knowledge_store", "info", store)
    assert result.returncode == 0 and "\x1b" not in result.stdout and "\\x1b[2J" in result.stdout


def resealed(store: Path, table: str, data: bytes) -> Path:
    """Put bytes in the place of a table, and make its commit record say that they were published."""
    path = store / f"small/{table}/00000.parquet"
    path.write_bytes(data)
    record = describe(path)
    altered(store / "small/commits/00000.json", ["files", table], record.as_dict())
    return path


def test_a_page_without_a_checksum_is_refused(tmp_path):
    """A header that states none would have the page read unchecked."""
    store = write_store(tmp_path / "store", shards=1)
    table = pq.read_table(store / "small/positions/00000.parquet")
    path = resealed(store, "positions", hostile_files.written(table, write_page_checksum=False))
    with pytest.raises(DamageError, match="has no checksum"):
        KnowledgeStore.open(store)[0]
    assert any(str(path) in sentence for sentence in verify(store).damage)


@pytest.mark.parametrize("codec", ["snappy", "gzip"])
def test_other_compressions_are_refused(tmp_path, codec):
    store = write_store(tmp_path / "store", shards=1)
    table = pq.read_table(store / "small/positions/00000.parquet")
    resealed(store, "positions", hostile_files.written(table, compression=codec))
    with pytest.raises(DamageError, match="compressed with"):
        KnowledgeStore.open(store)[0]


def test_row_groups_and_lengths_that_do_not_fit(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    positions = pq.read_table(store / "small/positions/00000.parquet")
    sequences = pq.read_table(store / "small/sequences/00000.parquet")
    sound = {name: (store / f"small/{name}/00000.parquet").read_bytes() for name in ("positions", "sequences")}
    lengths = sequences["length"].to_numpy()

    def with_lengths(changed: np.ndarray) -> bytes:
        at = sequences.schema.get_field_index("length")
        return hostile_files.written(sequences.set_column(at, "length", pa.array(changed, pa.int32())))

    for name, data in (
        ("positions", hostile_files.written(positions, row_group_size=1)),
        ("positions", hostile_files.written(positions.slice(1))),
        ("sequences", with_lengths(lengths * 1000)),
        ("sequences", with_lengths(-lengths)),
        ("sequences", with_lengths(np.full(len(lengths), 2**31 - 1, np.int32))),
        ("sequences", hostile_files.written(sequences.drop_columns(["length"]))),
    ):
        resealed(store, name, data)
        with pytest.raises(DamageError, match=r"\.parquet is damaged"):
            KnowledgeStore.open(store, cache_size=0)[0]
        assert verify(store).damage
        resealed(store, name, sound[name])
    assert not verify(store).damage


def test_tables_of_other_columns_are_refused(tmp_path):
    store = write_drawn_store(tmp_path / "store")
    sound = pq.read_table(store / "small/positions/00000.parquet")
    for table in (
        sound.drop_columns(["tail_steps"]),
        sound.rename_columns(["x", *sound.column_names[1:]]),
        sound.set_column(2, "token_id", sound["token_id"].cast(pa.int64())),
        sound.select(sound.column_names[::-1]),
    ):
        resealed(store, "positions", hostile_files.written(table))
        with pytest.raises(DamageError, match="does not have the columns and rows of its table"):
            KnowledgeStore.open(store, cache_size=0)[0]
        assert "does not have the columns of its table" in verify(store).damage[0]


def test_a_value_in_a_list_is_never_null(tmp_path):
    """numpy makes NaN of it, and of that a token id."""
    store = write_drawn_store(tmp_path / "store")
    table = pq.read_table(store / "small/positions/00000.parquet")
    for name in [field.name for field in table.schema if pa.types.is_list(field.type)]:
        values = table[name].combine_chunks()
        holes = pa.array([None] * len(values.flatten()), values.type.value_type)
        column = pa.ListArray.from_arrays(values.offsets, holes, mask=values.is_null()).cast(values.type)
        spoilt = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        resealed(store, "positions", hostile_files.written(spoilt, write_statistics=False))
        opened = KnowledgeStore.open(store, cache_size=0)
        for read in (lambda opened=opened: opened[0], lambda opened=opened: opened.kept(0)):
            with pytest.raises(DamageError, match=f"{name} has a null among its values"):
                read()
        assert f"{name} has a null among its values" in verify(store).damage[0]


def test_a_column_begins_where_a_reader_begins():
    """Arrow skips a field of another type than it knows, and reads from the data page where that is before the dictionary."""
    file = io.BytesIO()
    pq.write_table(pa.table({"a": np.arange(1000)}), file, compression="none")
    data = file.getvalue()
    footer = data[-(int.from_bytes(data[-8:-4], "little") + 8) :]
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    [chunk] = parse_footer(footer, len(data)).groups[0].chunks
    assert chunk.start == column.dictionary_page_offset == 4
    page = column.data_page_offset
    # Fields 9 and 11, numbers of 64 bits: data page and dictionary.
    places = b"\x26" + bytes([2 * page % 128 | 128, 2 * page >> 7]) + b"\x26\x08"
    assert footer.count(places) == 1
    for instead, message in (
        (b"\x26\x80\x00\x26\x08", "a column lies outside of the file"),
        (places[:3] + b"\x25\x08", "a field is of another type"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_footer(footer.replace(places, instead), len(data))


def test_columns_that_lie_over_each_other():
    """Each would be looked through anew, and a file of some megabytes could have ten thousands of them."""
    file = io.BytesIO()
    numbers = np.random.default_rng(0).integers(0, 2**62, 1000)
    pq.write_table(pa.table({"a": numbers, "b": numbers}), file, compression="none", use_dictionary=False)
    data = file.getvalue()
    footer = data[-(int.from_bytes(data[-8:-4], "little") + 8) :]
    one, other = parse_footer(footer, len(data)).groups[0].chunks
    assert one.start == 4
    place = b"\x26" + bytes([2 * other.start % 128 | 128, 2 * other.start >> 7])
    assert footer.count(place) == 1  # field 9, a number of 64 bits
    over = footer.replace(place, b"\x26\x88\x00")
    assert {chunk.start for chunk in parse_footer(over, len(data)).groups[0].chunks} == {4}
    with pytest.raises(ValueError, match="its columns state more bytes than its 10,000"):
        parse_footer(over, 10_000)


def test_a_long_list_among_short_ones(tmp_path):
    """Decoding pads: a million draws at one position of some thousand would take ten gigabytes."""
    manifest = make_manifest(shards=1, selection={"name": "top-k", "k": 3, "tail_draws": 2}, plan={"max_length": 30_000})
    writer = DumpWriter.open(tmp_path / "store", manifest, tokens_table(words(11), words(11)))
    knowledge = joined(drawn_sequences(0, 300))
    commit(writer, 0, [{name: array for name, array in knowledge.items() if name != "tail_logsumexp"}])
    path = tmp_path / "store/small/positions/00000.parquet"
    table = pq.read_table(path)
    offsets = np.full(len(table) + 1, 1_000_000, np.int32)
    offsets[0] = 0
    drawn = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.arange(1_000_000, dtype=np.uint32)))
    table = table.set_column(table.schema.get_field_index("tail_ids"), table.schema.field("tail_ids"), drawn)
    resealed(tmp_path / "store", "positions", hostile_files.written(table, row_group_size=len(table)))
    with pytest.raises(DamageError, match="a list of 1,000,000 values stands among lists of few"):
        KnowledgeStore.open(tmp_path / "store", cache_size=0)[0]
    with pytest.raises(DamageError, match="a list of 1,000,000 values stands among lists of few"):
        KnowledgeStore.open(tmp_path / "store", cache_size=0).kept(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> hostile_files.World:
    return hostile_files.World(tmp_path_factory.mktemp("world"), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        ("many_rows", "it stands for [0-9,]+ bytes, too many for its"),
        ("many_row_groups", "2,000 row groups for 0 rows"),
        ("compressed_zeros", "it stands for 300,000,[0-9]+ bytes, too many for its"),
        ("counted_zeros", "it stands for [0-9,]+ bytes, too many for its"),
        ("prefixed_text", "encoded as no writer"),
        ("repeated_text", "texts stand for"),
    ],
)
def test_bombs_are_refused_by_what_they_are(world, bomb, message):
    """Also where Arrow's datasets, which believe page headers, are what reads them: in SQL, in this very process."""
    data = world.bombs()["positions", bomb]
    with pytest.raises(DamageError, match=message):
        world.read_file("positions", data)()
    with pytest.raises(DamageError, match=message):
        world.read_table("positions", data, "sql")()


def test_a_large_honest_row_group_is_read(tmp_path):
    """Bounds on what a file may stand for are no bounds on what a teacher knows: much of one token, and very long lists."""
    rows = 60_000
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(0, 100 * rows + 1, 100), pa.int32()),
        pa.array(np.random.default_rng(0).integers(0, 50_000, 100 * rows), pa.uint32()),
    )
    table = pa.table({"token_id": pa.array(np.zeros(rows, np.uint32)), "ids": lists, "text": ["same"] * rows})
    path = tmp_path / "table.parquet"
    path.write_bytes(hostile_files.written(table, row_group_size=rows))
    assert read_whole(path).equals(table)


def test_every_error_has_an_end():
    assert len(str(KnowledgeStoreError("x" * 10**6))) == MAX_CHARACTERS + 1


def test_nothing_that_reads_runs_code():
    """No pickle, eval or exec in the packages (but the mention of a pickle that is removed)."""
    root = Path(__file__).parent.parent
    words = ("import pickle", "torch.load(", " eval(", "=eval(", "exec(", "marshal")
    for package in ("knowledge_store", "teacher_dump", "student_train"):
        for path in (root / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                code = line.split("#")[0]
                assert not any(word in code for word in words), path


def test_a_store_copied_whole_still_reads(tmp_path):
    """What is refused is what a stranger made, not what was moved."""
    shutil.copytree(write_drawn_store(tmp_path / "store"), tmp_path / "copy")
    assert not verify(tmp_path / "copy").damage and KnowledgeStore.open(tmp_path / "copy")[0]
