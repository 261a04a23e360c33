"""The contract of kinds: what every kind has to pass, those there are and toys shaped like those to come.

A kind is declared in one place, and everything else takes it from there. If one of these tests needs to know of a kind by name,
the declaration says too little.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_server import forked_command
from kinds import CASES, COMPLETIONS, HIDDEN, PREFERENCES, STATES, Case, explanations, fingerprint, print_fingerprint
from processes import Running
from served import assert_equal, served
from stores import assert_close, make_manifest, random_sequences, sequence_row, words

from knowledge_store import KINDS, DumpWriter, Field, InputError, Kind, KnowledgeStore, QueryError, Shard, StoreError, verify
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import Arrays, item_mask
from knowledge_store.kinds.field import KEYS
from student_train.training.dump_facts import describe_dump

TOKENS = tokens_table(words(11), words(11))
SHARDS, SIZE = 3, 7  # the last shard has no sequences
FLIPPED = 12  # of each file


def manifest_of(case: Case, dump: str = "d", **kinds):
    """The manifest of a dump of the kind alone, and of others beside it."""
    name = case.kind.name
    if case.rows is None:
        return make_manifest(dump, shards=SHARDS, **(case.parameters or {}), kinds=(name,))
    return make_manifest(dump, shards=SHARDS, kinds={name: case.parameters or {}, **kinds})


def knowledge_of(case: Case, shard: int) -> tuple[list[Arrays], list[Arrays]]:
    """The sequences of a shard (as positions), and what there is of the kind of each."""
    if shard == SHARDS - 1:
        return [], []
    tokens = case.sequences(shard, SIZE)
    if case.rows is None:
        return tokens, tokens
    random = np.random.default_rng(shard)
    knowledge = [case.rows(random, len(each["token_id"])) for each in tokens]
    given = {"token_id", "is_target"}.intersection(case.kind.takes(manifest_of(case)))
    knowledge = [{**arrays, **{name: each[name] for name in given}} for arrays, each in zip(knowledge, tokens, strict=True)]
    return tokens, knowledge


def write(folder: Path, case: Case, change=lambda arrays: None) -> Path:
    """A store with one dump of the kind."""
    writer = DumpWriter.open(folder, manifest_of(case), TOKENS)
    for shard in range(SHARDS):
        tokens, knowledge = knowledge_of(case, shard)
        rows = [sequence_row(100 * shard + index, each) for index, each in enumerate(tokens)]
        for each in knowledge:
            change(each)
        writer.commit(Shard(shard, 100 * shard, 100, rows, {case.kind.name: knowledge}))
    return folder


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> Case:
    found = CASES[request.param]
    monkeypatch.setitem(KINDS, found.kind.name, found.kind)
    return found


@pytest.fixture
def store(case, tmp_path, monkeypatch) -> Path:
    """A store of the kind: two shards of several row groups each, and an empty one."""
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 200 if case.kind.row_bytes is None else 12 * 2048)
    return write(tmp_path / "store", case)


def rows_of(case: Case) -> list[Arrays]:
    """What was written of each sequence of the store."""
    return [arrays for shard in range(SHARDS) for arrays in knowledge_of(case, shard)[1]]


def same(one, other) -> bool:
    """Whether rows are the same, whatever they are padded to: values of the wider one that the other has not do not count."""
    if not isinstance(one, np.ndarray):
        return one == other
    return one.dtype == other.dtype and np.array_equal(one[tuple(map(slice, other.shape))], other[tuple(map(slice, one.shape))])


def as_kept(rows, field: Field, place: int):
    """Row `place` of an extractor's array, as a list or a value; None for null."""
    value = rows[place]
    if value is None or value is np.ma.masked or (isinstance(value, np.ma.MaskedArray) and value.mask.all()):
        return None
    return list(value) if field.is_list else value


def test_what_is_written_is_kept(case, store):
    """Row for row, in order, by the row group, with keys that count; shards without a row are shards like others."""
    assert verify(store).damage == []
    opened, name, manifest = KnowledgeStore.open(store), case.kind.name, manifest_of(case)
    assert len(opened) == 2 * SIZE
    for ordinal, arrays in enumerate(rows_of(case)):
        table, _ = opened.stored(ordinal, name)
        assert table.schema.equals(case.kind.schema(manifest))
        count = {"position": len(random_lengths(case)[ordinal]), "sequence": 1}.get(
            case.kind.per, len(next(iter(arrays.values())))
        )
        assert len(table) == count
        if case.kind.per != "sequence":
            assert table[case.kind.per].to_pylist() == list(range(count))
        if case.rows is not None:
            for field in case.kind.fields(manifest):
                expected = [as_kept(arrays[field.name], field, place) for place in range(count)]
                assert table[field.name].equals(pa.chunked_array([pa.array(expected, field.column.type)])), field.name


def random_lengths(case: Case) -> list[np.ndarray]:
    return [each["token_id"] for shard in range(SHARDS) for each in knowledge_of(case, shard)[0]]


def test_random_access_equals_batches(case, store):
    """With padding as declared, whatever row groups the sequences of a batch are in."""
    opened, manifest, kind = KnowledgeStore.open(store, cache_size=0), manifest_of(case), case.kind
    lengths = [len(each) for each in random_lengths(case)]
    batches = list(opened.batches(batch_size=5, shuffle=False))
    assert len(batches) == 3
    for step, batch in enumerate(batches):
        names = {"position": ["attention_mask"], "item": [item_mask(kind.name)], "sequence": []}[kind.per]
        assert set(batch) == {"sequence_id", *names, *kind.arrays(manifest)}
        for row in range(5):
            ordinal = 5 * step + row
            one = opened[ordinal] if ordinal < len(opened) else None
            for name, padding in kind.arrays(manifest).items():
                array = batch[name]
                if one is None:
                    assert (
                        same(array[row], padding if kind.per == "sequence" else [])
                        if isinstance(array, list)
                        else (array[row] == padding).all()
                    )
                elif isinstance(array, list):
                    assert array[row] == one[name]
                else:
                    own = np.asarray(one[name])
                    count = own.shape[0] if kind.per != "sequence" else None
                    assert same(array[row], own)
                    rest = array[row].copy() if array[row].ndim else array[row]
                    if array[row].ndim:
                        inside = np.zeros(rest.shape, bool)
                        inside[tuple(map(slice, own.shape))] = True
                        assert (rest[~inside] == padding).all(), name
                    if kind.per == "position":
                        assert count == lengths[ordinal] and array.shape[1] == max(lengths[5 * step : 5 * step + 5])
                    if kind.per == "item":
                        assert batch[item_mask(kind.name)][row].sum() == count
                    table, _ = opened.stored(ordinal, kind.name)
                    decoded = kind.decode(table, manifest)[name]
                    assert same(own, decoded[0] if kind.per == "sequence" else decoded)


def test_a_served_store_gives_the_same(case, store):
    """Every sequence and every batch, decoded where it is served and put together here."""
    local = KnowledgeStore.open(store, cache_size=0)
    with served(store) as where, where.open() as opened:
        for _ in range(2):  # the second time from the server's cache, as far as there is one
            for ordinal in range(len(local)):
                assert_equal(opened[ordinal], local[ordinal])
            for batch, expected in zip(opened.batches(batch_size=3), local.batches(batch_size=3), strict=True):
                assert_equal(batch, expected)


def test_through_the_cache_in_another_process(case, store, tmp_path, request, monkeypatch):
    """Text never enters the cache; numbers come out of it as they are decoded."""
    expected = fingerprint(KnowledgeStore.open(store, cache_size=0))
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert fingerprint(KnowledgeStore.open(store)) == expected
    done = Running(print_fingerprint, request.node.callspec.params["case"], str(store), folder=tmp_path / "printed").wait()
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
    cached = [path for path in (cache / "knowledge-store/decoded").rglob("*") if path.is_file() and path.name != "used"]
    assert bool(cached) == (not case.kind.has_text(manifest_of(case)))


def test_beside_a_kind_with_the_same_names(case, store, monkeypatch):
    """An array of a batch has one owner, and so has a relation of SQL: both kinds are named."""
    taken = next(iter(case.kind.arrays(manifest_of(case))))
    arrays = Kind("twin", "sequence", lambda manifest: (Field(taken, pa.float32()),))
    relations = Kind("twin", "sequence", lambda manifest: (Field("t", pa.float32()),), relations={case.kind.name: "SELECT 1"})
    both = manifest_of(case, "both")
    both = both.__class__(**{**both.__dict__, "kinds": {**both.kinds, "twin": {}}})
    for twin in (arrays, relations):
        monkeypatch.setitem(KINDS, "twin", twin)
        with pytest.raises(StoreError, match=f"cannot hold the kinds '{case.kind.name}' and 'twin' together"):
            DumpWriter.open(store, both, TOKENS)
    monkeypatch.setitem(KINDS, "twin", Kind("twin", "sequence", lambda manifest: (Field("t", pa.float32()),)))
    DumpWriter.open(store, both, TOKENS)
    monkeypatch.setitem(KINDS, "twin", arrays)
    [reason] = KnowledgeStore.open(store).closed.values()
    assert "cannot hold the kinds" in reason


@pytest.mark.parametrize("name", ["sequence_id", "attention_mask", "labels", "input_ids", "is_target"])
def test_a_name_that_batches_have_for_themselves(tmp_path, monkeypatch, name):
    """Whoever trains finds there what is expected, or the kind is refused when a dump is opened."""
    monkeypatch.setitem(KINDS, "toy", Kind("toy", "sequence", lambda manifest: (Field("x", pa.float32()),)))
    DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=("toy",)), TOKENS)
    monkeypatch.setitem(KINDS, "toy", Kind("toy", "sequence", lambda manifest: (Field(name, pa.float32()),)))
    with pytest.raises(StoreError, match=f"cannot hold the kind 'toy': '{name}' is reserved, and cannot name an array"):
        DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=("toy",)), TOKENS)
    with pytest.raises(StoreError, match=f"'{name}' is reserved"):
        KnowledgeStore.open(tmp_path / "store").manifest()


@pytest.mark.parametrize("name", ["position", "item", "dump", "Sequence_ID", "Position", "ITEM", "Dump", "Labels"])
@pytest.mark.parametrize("per", ["position", "sequence", "item"])
def test_a_name_that_a_table_has_for_itself(tmp_path, monkeypatch, name, per):
    """Of a key, or of what relations add: in whatever case, since SQL tells no two cases apart."""
    monkeypatch.setitem(KINDS, "toy", Kind("toy", per, lambda manifest: (Field(name, pa.float32()),)))
    with pytest.raises(StoreError, match=rf"kind 'toy': '{name}' is reserved, and cannot name an? (column|array)"):
        DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=("toy",)), TOKENS)


@pytest.mark.parametrize("names", [("X", "x"), ("x", "x"), ("toy_mask", "x"), ("x", "Toy_Mask")])
def test_two_columns_or_arrays_of_one_name(tmp_path, monkeypatch, names):
    monkeypatch.setitem(KINDS, "toy", Kind("toy", "item", lambda manifest: tuple(Field(name, pa.float32()) for name in names)))
    with pytest.raises(StoreError, match=r"the kind 'toy': two of its (columns|arrays) are named .*choose other names"):
        DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=("toy",)), TOKENS)


def test_names_of_two_kinds_that_differ_in_case_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "one", Kind("one", "sequence", lambda manifest: (Field("x", pa.float32()),)))
    for other in (
        Kind("other", "sequence", lambda manifest: (Field("X", pa.float32()),)),
        Kind("other", "sequence", lambda manifest: (Field("y", pa.float32()),), relations={"One": "SELECT 1"}),
    ):
        monkeypatch.setitem(KINDS, "other", other)
        with pytest.raises(StoreError, match=r"'one' and 'other' together: .*'(x' and 'X|one' and 'One)', which SQL"):
            DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=("one", "other")), TOKENS)


@pytest.mark.parametrize("name", ["sequences", "tokens", "shards", "dumps", "commits"])
def test_a_name_that_sql_has_for_itself(tmp_path, monkeypatch, name):
    for kind in (
        Kind(name, "sequence", lambda manifest: ()),
        Kind("toy", "sequence", lambda m: (), relations={name: "SELECT 1"}),
    ):
        monkeypatch.setitem(KINDS, kind.name, kind)
        with pytest.raises(StoreError, match=f"'{name}' is reserved, and cannot name a relation"):
            DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=(kind.name,)), TOKENS)


def test_damage_is_found(case, store):
    random = np.random.default_rng(0)
    for path in sorted((store / "d" / case.kind.name).glob("*.parquet")):
        whole = path.read_bytes()
        for place in random.integers(0, len(whole), FLIPPED).tolist():
            harmed = bytearray(whole)
            harmed[place] ^= 1 << int(random.integers(0, 8))
            path.write_bytes(harmed)
            assert any(path.name in sentence for sentence in verify(store).damage)
        path.write_bytes(whole)
    assert verify(store).damage == []


def test_a_broken_invariant_is_found(case, store, tmp_path):
    if case.rows is None:
        rows = [sequence_row(index, each) for index, each in enumerate(case.sequences(0, SIZE))]
        knowledge = case.sequences(0, SIZE)
        case.break_invariant(knowledge[0])
        writer = DumpWriter.open(tmp_path / "broken", manifest_of(case), TOKENS)
        writer.commit(Shard(0, 0, 100, rows, {case.kind.name: knowledge}))
    else:
        write(tmp_path / "broken", case, case.break_invariant)
    assert any(case.complaint in sentence for sentence in verify(tmp_path / "broken").damage)


def test_checks_see_whole_sequences_a_row_group_at_a_time(case, store, monkeypatch):
    """A shard need not fit into memory when it is unpacked: no more than a row group is checked at once."""
    path, seen = store / "d" / case.kind.name / "00000.parquet", []

    def checks(table, sequences, manifest):
        seen.append((len(table), sequences["sequence_id"].to_pylist()))
        assert set(table["sequence_id"].to_pylist()) <= set(seen[-1][1])
        return iter(())

    monkeypatch.setitem(KINDS, case.kind.name, replace(case.kind, checks=checks))
    assert verify(store).damage == []
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert [rows for rows, _ in seen[: len(sizes)]] == sizes
    ids = pq.read_table(store / "d/sequences/00000.parquet")["sequence_id"].to_pylist()
    assert [number for _, numbers in seen[: len(sizes)] for number in numbers] == ids


def test_sql_has_the_same_rows(case, store):
    opened, name = KnowledgeStore.open(store), case.kind.name
    tables = [opened.stored(ordinal, name)[0] for ordinal in range(len(opened))]
    expected = pa.concat_tables(tables)
    key = "sequence_id" if case.kind.per == "sequence" else f'sequence_id, "{case.kind.per}"'
    rows = opened.sql(f"SELECT * FROM {name} ORDER BY {key}")
    assert set(rows["dump"].to_pylist()) == {"d"}
    found = rows.select(expected.column_names)
    wide = pa.schema([readable(column) for column in expected.schema])
    assert_close(found.cast(wide), expected.cast(wide))
    names = set(opened.sql("SHOW TABLES")["name"].to_pylist())
    assert {name, *case.kind.relations, "sequences", "shards", "dumps"} <= names
    for relation in case.kind.relations:
        opened.sql(f"SELECT * FROM {relation}")
    with duckdb.connect() as connection:
        connection.execute(opened.view())
        assert connection.sql(f"SELECT count(*) FROM {name}").fetchall() == [(len(expected),)]


def test_a_relation_that_is_no_sql(tmp_path, monkeypatch):
    """The relation and its kind are named; a struct in braces is SQL like any other."""
    relations = {
        "pairs": "SELECT {dump} AS dump, {'x': x, '{rows': 1} AS pair FROM {rows}",
        "wrong": "SELECT {dump} AS dump, * FROM {row}",
        "absent": "SELECT {dump} AS dump, y FROM {rows}",
    }
    monkeypatch.setitem(KINDS, "toy", Kind("toy", "sequence", lambda m: (Field("x", pa.int8()),), relations=relations))
    DumpWriter.open(tmp_path / "store", make_manifest("d", kinds=("toy",)), TOKENS)
    opened = KnowledgeStore.open(tmp_path / "store")
    assert opened.sql("SELECT pair.x FROM pairs").num_rows == 0
    for name in ("wrong", "absent"):
        with pytest.raises(QueryError, match=f"the relation '{name}' that the kind 'toy' declares is no SQL: "):
            opened.sql(f"SELECT * FROM {name}")


def readable(column: pa.Field) -> pa.Field:
    """DuckDB has no float16: SQL gives float32."""
    if pa.types.is_list(column.type):
        return column.with_type(pa.list_(readable(column.type.value_field)))
    return column.with_type(pa.float32()) if pa.types.is_float16(column.type) else column


def test_statistics_are_in_shards_dumps_and_info(case, store):
    opened, kind = KnowledgeStore.open(store), case.kind
    tables = pa.concat_tables([opened.stored(ordinal, kind.name)[0] for ordinal in range(len(opened))])
    numbers = {"rows": len(tables), **kind.measure(tables, manifest_of(case))}
    [summary] = opened.info()
    [dump] = opened.sql("SELECT * FROM dumps").to_pylist()
    shards = opened.sql("SELECT * FROM shards ORDER BY shard").to_pylist()
    assert len(shards) == SHARDS and shards[2][f"{kind.name}.rows"] == 0
    for name, value in numbers.items():
        column = f"{kind.name}.{name}"
        assert summary.statistics[column] == pytest.approx(value, abs=1e-6)
        assert dump[column] == pytest.approx(value, abs=1e-6)
        if name == "rows" or kind.statistics[name] is None:
            assert sum(row[column] for row in shards) == value
    assert summary.positions == sum(row["positions"] for row in shards) == sum(map(len, random_lengths(case)))
    assert all(isinstance(label, str) and isinstance(value, str) for label, value in summary.lines)


def test_an_extractor_that_gives_something_else_is_refused(case, store):
    """Rows too few, an array left out, or one too many: nothing is written."""
    tokens, knowledge = knowledge_of(case, 0)
    rows = [sequence_row(index, each) for index, each in enumerate(tokens)]
    writer = DumpWriter.open(store, manifest_of(case, "other"), TOKENS)
    name = case.kind.name
    extra = [{**each, "unheard_of": np.zeros(len(next(iter(each.values()))))} for each in knowledge]
    for wrong in (extra, [*knowledge[:-1], extra[-1]]):
        with pytest.raises(InputError, match=f"kind '{name}' .*no field declares the array 'unheard_of'"):
            writer.commit(Shard(0, 0, 100, rows, {name: wrong}))
    for missing in knowledge[0]:
        wrong = [*knowledge[:-1], {key: array for key, array in knowledge[-1].items() if key != missing}]
        with pytest.raises(InputError, match=f"kind '{name}' .*there is no array '{missing}'"):
            writer.commit(Shard(0, 0, 100, rows, {name: wrong}))
    for wrong in (knowledge[:-1], [{key: array[:-1] for key, array in each.items()} for each in knowledge]):
        if case.kind.per == "item" and len(wrong) == len(knowledge):
            continue
        with pytest.raises(InputError, match=r"belong there|there are 7"):
            writer.commit(Shard(0, 0, 100, rows, {name: wrong}))
    assert not (store / "other" / name / "00000.parquet").exists()


def test_what_is_no_number_is_refused(case, store):
    tokens, knowledge = knowledge_of(case, 0)
    rows = [sequence_row(index, each) for index, each in enumerate(tokens)]
    writer = DumpWriter.open(store, manifest_of(case, "other"), TOKENS)
    for arrays in knowledge:
        for array in arrays.values():
            for each in array if isinstance(array, list) else [array]:
                if isinstance(each, np.ndarray) and each.dtype.kind == "f" and len(each):
                    each[-1] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        writer.commit(Shard(0, 0, 100, rows, {case.kind.name: knowledge}))
    assert not (store / "other" / case.kind.name / "00000.parquet").exists()


def test_fields_that_nothing_can_be_kept_of():
    for wrong in (
        pa.list_(pa.list_(pa.int32())),
        pa.list_(pa.int32()),
        pa.struct([("a", pa.int32())]),
        pa.map_(pa.string(), pa.int8()),
    ):
        with pytest.raises(InputError, match="declare the type of one value"):
            Field("x", wrong)
    with pytest.raises(InputError, match="declare at least 1"):
        Field("x", pa.float32(), 0)
    with pytest.raises(InputError, match="a mean over a total"):
        Kind("x", "sequence", lambda manifest: (), statistics={"mean": "nothing"})


@pytest.mark.parametrize("per", ["positions", "items"])
def test_a_row_group_of_nulls_is_read(tmp_path, monkeypatch, per):
    """Of a field of fixed width: verified and read, and padding stands in the batch."""
    case = CASES[f"notes of {per}"]
    monkeypatch.setitem(KINDS, "notes", case.kind)
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 200)
    store = write(tmp_path / "store", case)
    path = store / "d/notes/00000.parquet"
    groups = [pq.ParquetFile(path).read_row_group(group)["pair"] for group in range(pq.read_metadata(path).num_row_groups)]
    assert {column.null_count == len(column) for column in groups} == {True, False}
    assert verify(store).damage == []
    for arrays, one in zip(rows_of(case), KnowledgeStore.open(store, cache_size=0), strict=True):
        assert np.array_equal(one["vector"], arrays["vector"].filled(-3.5))
        assert np.array_equal(one["count"], arrays["count"].filled(-7))
        assert one["pair"] == arrays["pair"]


def test_what_cannot_be_decoded_is_not_sound(case, store, monkeypatch):
    """Verify finds what a reader would fail at, whatever the other checks of the kind say."""

    def decode(self, table, manifest):
        raise ValueError("these rows stand for no arrays")

    monkeypatch.setattr(Kind, "decode", decode)
    damage = verify(store).damage
    assert len(damage) == SHARDS
    for shard, sentence in enumerate(damage):
        path = store / "d" / case.kind.name / f"0000{shard}.parquet"
        assert sentence == f"{path} cannot be read: these rows stand for no arrays"


def test_a_width_equal_to_the_length_is_not_taken_for_positions(tmp_path, monkeypatch):
    """A vector per sequence as wide as the batch is long stays a vector."""
    vectors = Kind("vectors", "sequence", lambda manifest: (Field("vector", pa.float32(), 4),))
    monkeypatch.setitem(KINDS, "vectors", vectors)
    writer = DumpWriter.open(tmp_path / "store", make_manifest(shards=1, kinds=("positions", "vectors")), TOKENS)
    knowledge = [
        {name: array[:4] for name, array in each.items()} for each in random_sequences(0, 6) if len(each["token_id"]) >= 4
    ]
    rows = [sequence_row(index, each) for index, each in enumerate(knowledge)]
    values = [{"vector": np.full((1, 4), index, np.float32)} for index in range(len(rows))]
    writer.commit(Shard(0, 0, 100, rows, {"positions": knowledge, "vectors": values}))
    [batch] = KnowledgeStore.open(tmp_path / "store").batches(batch_size=len(rows) + 1, shuffle=False)
    assert batch["input_ids"].shape == batch["vector"].shape == (len(rows) + 1, 4)
    assert batch["vector"][:, 0].tolist() == [*range(len(rows)), 0]


def test_kinds_together(tmp_path, monkeypatch):
    """All toys beside positions, in one dump and one batch; and each of them read alone."""
    toys = {"explanations": explanations("position"), "states": STATES, "completions": COMPLETIONS, "preferences": PREFERENCES}
    for name, kind in toys.items():
        monkeypatch.setitem(KINDS, name, kind)
    cases = {each.kind.name: each for each in CASES.values() if each.rows}
    cases["explanations"] = CASES["explanations of positions"]
    manifest = make_manifest(shards=1, kinds=("positions", *toys))
    manifest = manifest.__class__(**{**manifest.__dict__, "kinds": {**manifest.kinds, "states": {"layer": 1}}})
    writer = DumpWriter.open(tmp_path / "store", manifest, TOKENS)
    tokens, random = random_sequences(0, SIZE), np.random.default_rng(0)
    rows = [sequence_row(index, each) for index, each in enumerate(tokens)]
    knowledge = {name: [cases[name].rows(random, len(each["token_id"])) for each in tokens] for name in toys}
    writer.commit(Shard(0, 0, 100, rows, {"positions": tokens, **knowledge}))
    assert not verify(tmp_path / "store").damage
    opened = KnowledgeStore.open(tmp_path / "store")
    [batch] = opened.batches(batch_size=SIZE, shuffle=False)
    assert batch["state"].shape == (*batch["input_ids"].shape, HIDDEN) and batch["state"].dtype == np.float16
    assert batch["chosen"] == [each["chosen"][0] for each in knowledge["preferences"]]
    assert [len(each) for each in batch["completion"]] == batch["completions_mask"].sum(axis=1).tolist()
    assert opened.manifest().kinds["states"] == {"layer": 1}
    for name, kind in toys.items():
        [alone] = opened.batches(batch_size=SIZE, shuffle=False, kinds=(name,))
        for key in kind.arrays(manifest):
            assert same(alone[key], batch[key])
    with pytest.raises(InputError, match="holds no knowledge of kind 'dreams'"):
        opened.batches(kinds=("dreams",))


def test_a_relation_of_two_tables(tmp_path, monkeypatch):
    """A relation reads the table of another kind by its name, in the store's SQL as in the views for other programs."""
    relation = "SELECT {dump} AS dump, count(*) AS rows FROM {rows} JOIN {rows of states} USING (sequence_id)"
    monkeypatch.setitem(KINDS, "states", STATES)
    monkeypatch.setitem(KINDS, "preferences", replace(PREFERENCES, relations={"preferred": relation}))
    writer = DumpWriter.open(tmp_path / "s", make_manifest(shards=1, kinds={"preferences": {}, "states": {"layer": 1}}), TOKENS)
    tokens, random = random_sequences(0, SIZE), np.random.default_rng(0)
    knowledge = {
        name: [CASES[name].rows(random, len(each["token_id"])) for each in tokens] for name in ("preferences", "states")
    }
    writer.commit(Shard(0, 0, 100, [sequence_row(index, each) for index, each in enumerate(tokens)], knowledge))
    opened, expected = KnowledgeStore.open(tmp_path / "s"), sum(len(each["token_id"]) for each in tokens)
    assert opened.sql("SELECT rows FROM preferred")["rows"].to_pylist() == [expected]
    with duckdb.connect() as connection:
        connection.execute(opened.view())
        assert connection.sql("SELECT rows FROM preferred").fetchall() == [(expected,)]


def test_a_run_describes_its_dump_by_its_kinds(case, store):
    """What a run or an evaluation says of the dump that it used, and the bytes of the columns that it read."""
    opened, name = KnowledgeStore.open(store), case.kind.name
    facts = describe_dump(opened, "d")
    assert list(facts["kinds"]) == [name] and facts["sequences"] == len(opened) and facts["bytes_read"] == facts["bytes"]
    columns = {column: size for column, size in opened.info()[0].column_bytes.items() if column.startswith(f"{name}.")}
    assert describe_dump(opened, "d", {})["bytes_read"] == facts["bytes"] - sum(columns.values())
    keys = [field.name for field in KEYS[case.kind.per]]
    read = describe_dump(opened, "d", {name: ()})["bytes_read"]
    assert read == facts["bytes"] - sum(size for column, size in columns.items() if column.partition(".")[2] not in keys)


def test_parameters_are_part_of_the_identity(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "states", STATES)
    case = CASES["states"]
    DumpWriter.open(tmp_path / "store", manifest_of(case), TOKENS)
    with pytest.raises(StoreError, match="of states, the layer was 3 and is now 4"):
        DumpWriter.open(tmp_path / "store", make_manifest("d", shards=SHARDS, kinds={"states": {"layer": 4}}), TOKENS)


def test_who_does_not_know_a_kind_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "states", STATES)
    write(tmp_path / "store", CASES["states"])
    monkeypatch.delitem(KINDS, "states")
    with pytest.raises(StoreError, match="'states', which this knowledge-store does not know: install the version"):
        KnowledgeStore.open(tmp_path / "store").manifest()
    found = verify(tmp_path / "store")
    assert (found.damage, found.dumps, found.sound) == ([], 0, False)
    [sentence] = found.closed
    assert "which this knowledge-store does not know" in sentence
    answer = forked_command("knowledge_store", "verify", tmp_path / "store")
    assert answer.returncode == 1 and "Damage" not in answer.stderr and "--repair" not in answer.stderr
    assert f"Closed: {sentence}\n" in answer.stderr and "0 damaged, 1 closed and not checked" in answer.stderr
