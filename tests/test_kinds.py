"""The seam for later kinds of knowledge: a schema and one line in a dict, and everything in the store takes it unchanged."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_command
from stores import joined, make_manifest, random_sequences, sequence_row, words

from knowledge_store import KINDS, DumpWriter, InputError, Kind, KnowledgeStore, Shard, StoreError, verify
from knowledge_store.format.sequences import tokens_table

WIDTH = 4


def toy_damage(table: pa.Table, manifest):
    """The one rule of the toy kind."""
    if not np.isfinite(table["vector"].combine_chunks().flatten().to_numpy()).all():
        yield "a vector is not finite"


VECTORS = Kind(
    name="vectors",
    per="sequence",
    schema=lambda manifest: pa.schema(
        [
            ("sequence_id", pa.int64()),
            ("vector", pa.list_(pa.field("element", pa.float32()))),
            ("norm", pa.float64()),
        ]
    ),
    statistics=lambda table, manifest: {"mean_norm": float(np.mean(table["norm"].to_numpy())) if len(table) else 0.0},
    damage=toy_damage,
)

SURPRISES = Kind(
    name="surprises",
    per="position",
    schema=lambda manifest: pa.schema([("sequence_id", pa.int64()), ("position", pa.int32()), ("surprise", pa.float32())]),
    padding={"surprise": -1.0},
    relations={"peaks": "SELECT {dump} AS dump, sequence_id, max(surprise) AS peak FROM {rows} GROUP BY sequence_id"},
)


def toys(seed: int, knowledge) -> dict:
    """What two extractors hand over: a vector and a number for each sequence, a number for each position."""
    random = np.random.default_rng(seed)
    vectors = random.normal(0, 1, (len(knowledge), WIDTH)).astype(np.float32)
    positions = sum(len(each["token_id"]) for each in knowledge)
    return {
        "vectors": {"vector": vectors, "norm": np.linalg.norm(vectors.astype(np.float64), axis=1)},
        "surprises": {"surprise": random.random(positions).astype(np.float32)},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dump of the toy kinds beside positions, one of a toy kind alone, and one of positions alone."""
    monkeypatch.setitem(KINDS, "vectors", VECTORS)
    monkeypatch.setitem(KINDS, "surprises", SURPRISES)
    monkeypatch.setattr("knowledge_store.writing.writer.ROW_GROUP_POSITIONS", 12)  # several row groups
    for name, kinds in (("all", ("positions", "vectors", "surprises")), ("alone", ("vectors",)), ("plain", ("positions",))):
        manifest = make_manifest(name, shards=2, kinds=kinds)
        writer = DumpWriter.open(tmp_path / "store", manifest, tokens_table(words(11), words(11)))
        for shard in range(2):
            knowledge = random_sequences(shard, 5)
            rows = [sequence_row(100 * shard + index, each) for index, each in enumerate(knowledge)]
            arrays = {"positions": joined(knowledge), **toys(shard, knowledge)}
            writer.commit(Shard(shard, 100 * shard, 100, rows, {kind: arrays[kind] for kind in kinds}))
    return tmp_path / "store"


def expected(kind: str, name: str) -> np.ndarray:
    return np.concatenate([toys(shard, random_sequences(shard, 5))[kind][name] for shard in range(2)])


def test_layout_schema_and_verify(folder):
    path = folder / "all/vectors/00001.parquet"
    table = pq.read_table(path)
    assert [str(kind) for kind in table.schema.types] == ["int64", "list<element: float>", "double"]
    assert pq.read_metadata(path).num_row_groups > 1
    found = verify(folder)
    assert (found.damage, found.dumps, found.shards) == ([], 3, 6)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert [str(path) in sentence for sentence in verify(folder).damage] == [True]


def test_its_own_rules_are_checked(folder, monkeypatch):
    monkeypatch.setitem(KINDS, "vectors", Kind("vectors", "sequence", VECTORS.schema, damage=lambda *_: iter(["no good"])))
    assert len([sentence for sentence in verify(folder).damage if sentence.endswith("vectors/00000.parquet: no good")]) == 2


def test_sequences_and_batches(folder):
    store = KnowledgeStore.open(folder)
    vectors = expected("vectors", "vector")
    for dump in ("all", "alone"):
        for ordinal in range(10):
            assert np.array_equal(store[dump, ordinal]["vector"], vectors[ordinal])
            assert store[dump, ordinal]["norm"] == expected("vectors", "norm")[ordinal]
    lengths = [len(each["token_id"]) for shard in range(2) for each in random_sequences(shard, 5)]
    surprises = np.split(expected("surprises", "surprise"), np.cumsum(lengths)[:-1])
    batches = list(store.batches("all", batch_size=4, shuffle=False))
    assert [each["vector"].shape for each in batches] == [(4, WIDTH)] * 3
    ordinals = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for batch, numbers in zip(batches, ordinals, strict=True):
        for row, ordinal in enumerate(numbers):
            assert np.array_equal(batch["vector"][row], vectors[ordinal])
            assert np.array_equal(batch["surprise"][row][: lengths[ordinal]], surprises[ordinal])
            assert (batch["surprise"][row][lengths[ordinal] :] == -1).all()
    assert batches[2]["sequence_id"].tolist()[2:] == [-1, -1]
    assert not batches[2]["vector"][2:].any()


def test_a_part_of_the_kinds(folder):
    store = KnowledgeStore.open(folder)
    assert set(store.batches("all", kinds=("vectors",))[0]) == {"sequence_id", "vector", "norm"}
    assert set(store.batches("all", kinds=("surprises",))[0]) == {"sequence_id", "surprise", "attention_mask"}
    assert "vector" not in store.batches("all", kinds=("positions",))[0]
    with pytest.raises(InputError, match="holds no knowledge of kind 'vectors'"):
        store.batches("plain", kinds=("vectors",))


def test_sql(folder):
    store = KnowledgeStore.open(folder)
    found = store.sql("SELECT vector FROM vectors WHERE dump = 'alone' ORDER BY sequence_id")["vector"].to_pylist()
    assert np.array_equal(np.array(found, np.float32), expected("vectors", "vector"))
    assert store.sql("SELECT * FROM vectors").column_names == ["dump", "sequence_id", "vector", "norm"]
    assert store.sql("SELECT DISTINCT dump FROM vectors ORDER BY 1")["dump"].to_pylist() == ["all", "alone"]
    assert store.sql("SELECT dump FROM surprises").num_rows == len(expected("surprises", "surprise"))
    assert store.sql("SELECT max(peak) AS n FROM peaks")["n"][0].as_py() == expected("surprises", "surprise").max()
    assert store.sql("SELECT count(*) AS n FROM candidates WHERE dump = 'alone'")["n"][0].as_py() == 0
    names = store.sql("SHOW TABLES")["name"].to_pylist()
    assert {"vectors", "surprises", "peaks", "positions"} <= set(names)


def test_statistics_reach_the_index(folder):
    store = KnowledgeStore.open(folder)
    [row] = store.sql("SELECT mean_norm FROM shards WHERE dump = 'alone' AND shard = 1").to_pylist()
    assert row["mean_norm"] == pytest.approx(expected("vectors", "norm")[5:].mean())
    summary = next(each for each in store.info() if each.dump == "alone")
    assert (summary.sequences, summary.positions, summary.mean_nll) == (10, 0, None)
    assert summary.column_bytes["vectors.vector"] > 0


def test_who_does_not_know_a_kind_refuses_it(folder, monkeypatch):
    monkeypatch.delitem(KINDS, "vectors")
    with pytest.raises(StoreError, match="'vectors', unknown here"):
        KnowledgeStore.open(folder)
    assert all("unknown here" in sentence for sentence in verify(folder).damage)
    answer = run_command("knowledge_store", "info", folder)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
