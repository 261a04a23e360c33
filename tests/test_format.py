"""The physical format, pinned: whoever reads a store without this code relies on every line of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_storage import Place, file_in, names_in
from stores import (
    assert_close,
    commit,
    knowledge_of,
    log_softmax,
    make_manifest,
    random_sequences,
    record_of,
    sequence_row,
    stored_table,
    words,
    write_store,
)

from knowledge_store import DumpWriter, InputError, KnowledgeStore, Shard, verify
from knowledge_store.format.integrity import FileRecord
from knowledge_store.format.sequences import corpus_column, sequence_id, stored_columns, token_hash, tokens_table
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.columns import list_offsets
from knowledge_store.kinds.positions import damage
from knowledge_store.kinds.positions.packing import quantise
from knowledge_store.writing.row_groups import group_sizes

POSITIONS_SCHEMA = """\
required group field_id=-1 schema {
  optional int64 field_id=-1 sequence_id;
  optional int32 field_id=-1 position;
  optional int32 field_id=-1 token_id (Int(bitWidth=32, isSigned=false));
  optional boolean field_id=-1 is_target;
  optional float field_id=-1 token_steps;
  optional binary field_id=-1 candidate_ids;
  optional group field_id=-1 gap_steps (List) {
    repeated group field_id=-1 list {
      optional float field_id=-1 element;
    }
  }
  optional float field_id=-1 tail_steps;
}"""


def logical(store: Place, **changes) -> pa.Table:
    """The table that the first file of positions stands for."""
    return KINDS["positions"].unpack(stored_table(store, "positions"), make_manifest(**changes))


def parquet_schema(path: Path) -> str:
    return str(pq.read_metadata(path).schema).split("\n", 1)[1].strip()


def small_dump(folder: Place, **changes) -> DumpWriter:
    manifest = make_manifest(**changes)
    size = manifest.vocabulary_size
    return DumpWriter.open(folder, manifest, tokens_table(words(size), words(size)))


def test_physical_schema_of_positions(tmp_path):
    store = write_store(tmp_path / "store")
    path = store / "small/positions/00001.parquet"
    assert parquet_schema(path) == POSITIONS_SCHEMA
    metadata = pq.read_metadata(path)
    assert set(metadata.metadata) == {b"knowledge-store.blocks"}  # neither a serialised Arrow schema nor anything of pandas
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(column) for column in range(metadata.num_columns)]
        assert {column.compression for column in columns} == {"ZSTD"}


def test_physical_schema_of_sequences_and_tokens(tmp_path):
    columns = {"source": "string", "score": "double", "length": "int64", "kept": "bool"}
    writer = small_dump(tmp_path / "store", columns=columns, shards=1)
    knowledge = random_sequences(0, 2)
    commit(writer, 0, knowledge, source=["a", None], score=[0.5, None], length=[7, 8], kept=[True, None])
    sequences = pq.read_table(Path(writer.address) / "sequences/00000.parquet")
    assert list(zip(sequences.schema.names, map(str, sequences.schema.types), strict=True)) == [
        ("sequence_id", "int64"),
        ("document", "int64"),
        ("file", "string"),
        ("row", "int64"),
        ("part", "int32"),
        ("window", "int32"),
        ("length", "int32"),
        ("targets", "int32"),
        ("truncated", "bool"),
        ("token_hash", "uint64"),
        ("source", "string"),
        ("score", "double"),
        ("corpus_length", "int64"),  # the store has a `length` of its own
        ("kept", "bool"),
    ]
    assert sequences["corpus_length"].to_pylist() == [7, 8]
    assert sequences["length"].to_pylist() == [len(each["token_id"]) for each in knowledge]
    tokens = pq.read_table(Path(writer.address) / "tokens.parquet")
    assert [str(kind) for kind in tokens.schema.types] == ["uint32", "string", "string"]
    assert tokens.schema.names == ["token_id", "text", "token"]


def test_every_page_has_a_checksum(tmp_path):
    """A page without one would let damage through, and Parquet writers leave it out unless asked."""
    store = write_store(tmp_path / "store", shards=1)
    for path in sorted(store.glob("small/**/*.parquet")):
        data = bytearray(path.read_bytes())
        column = pq.read_metadata(path).row_group(0).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        data[start + column.total_compressed_size - 1] ^= 1  # the last byte of the last page's contents
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"CRC|checksum"):
            pq.ParquetFile(path, page_checksum_verification=True).read(columns=[column.path_in_schema])


def test_layout_of_a_store(place):
    store = write_store(place)
    KnowledgeStore.open(store)
    assert names_in(store) == [
        "small/commits/00000.json",
        "small/commits/00001.json",
        "small/manifest.json",
        "small/positions/00000.parquet",
        "small/positions/00001.parquet",
        "small/sequences/00000.parquet",
        "small/sequences/00001.parquet",
        "small/tokens.parquet",
        "store.json",
    ]


def test_json_files(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    folder = store / "small"
    for path in (store / "store.json", folder / "manifest.json", folder / "commits/00000.json"):
        record = json.loads(path.read_text())
        stated = record.pop("sha256")
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(canonical.encode()).hexdigest() == stated
        assert (record["format"], record["version"]) == ("knowledge-store", 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {
        *("format", "version", "sha256", "dump", "kinds", "teacher", "tokenizer", "corpus"),
        *("plan", "derived"),
    }
    commit_record = json.loads((folder / "commits/00000.json").read_text())
    assert set(commit_record) == {
        *("format", "version", "sha256", "dump", "shard", "identity", "first_document", "documents", "files"),
        *("statistics", "skipped", "made_by"),
    }
    identity = {
        "kinds.positions": "kept",
        "teacher.vocabulary_size": 11,
        "tokenizer.size": 11,
        "corpus.files[0].bytes": 1,
        "corpus.files[0].sha256": "00",
        "kinds.positions.selection.name": "top-k",
        "kinds.positions.selection.k": 3,
        "kinds.positions.quantisation_step": 0.125,
        "kinds.positions.keep_context": False,
        "kinds.positions.tail_entropy": False,
        "plan.max_length": 64,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert commit_record["identity"] == hashlib.sha256(canonical.encode()).hexdigest()
    for table in ("sequences", "positions"):
        path = folder / table / "00000.parquet"
        data, stated = path.read_bytes(), commit_record["files"][table]
        footer = int.from_bytes(data[-8:-4], "little") + 8
        assert stated["bytes"] == len(data)
        assert stated["sha256"] == hashlib.sha256(data).hexdigest()
        assert stated["footer_sha256"] == hashlib.sha256(data[-footer:]).hexdigest()
        assert stated["rows"] == pq.read_metadata(path).num_rows
        assert sum(stated["column_bytes"].values()) == len(data) - footer - len(b"PAR1")


def test_row_groups_hold_whole_sequences(place, monkeypatch):
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 20 * 2048)
    store = write_store(place, shards=1, size=30)
    lengths = stored_table(store, "sequences")["length"].to_pylist()
    metadata = pq.read_metadata(pa.BufferReader(file_in(store, "small/positions/00000.parquet").read_bytes()))
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert len(rows) > 5
    assert max(rows) <= 20
    ends = set(np.cumsum(lengths).tolist())
    assert set(np.cumsum(rows).tolist()) <= ends
    opened = KnowledgeStore.open(store)
    for ordinal, expected in enumerate(random_sequences(0, 30)):
        assert opened[ordinal]["input_ids"].tolist() == expected["token_id"].tolist()
    assert not verify(store).damage


def test_row_groups_of_lengths():
    def sizes(*lengths: int, k: int = 3) -> list[int]:
        kind, manifest = KINDS["positions"], make_manifest(vocabulary=2048, k=k)
        return group_sizes(kind, [{}] * len(lengths), np.array(lengths, np.int64), manifest)

    assert sizes() == []
    assert sizes(40_000, 1, 2) == [1, 2]  # a longer sequence has a group to itself
    assert sizes(*[512] * 65) == [64, 1]
    assert sizes(*[512] * 65, k=1024) == [32, 32, 1]  # decoded, lists are padded


def test_decoded_values_by_hand(place):
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 at position 1; k = 2: everything can be worked out on paper."""
    probabilities = np.array([0.25, 0.5, 0.0625, 0.125, 0.0625])
    writer = small_dump(place, vocabulary=5, k=2, shards=1)
    commit(writer, 0, [knowledge_of(np.array([4, 3]), np.log(np.stack([probabilities, probabilities])), 2)])
    [none, one] = stored_table(place, "positions").to_pylist()
    assert none == {
        "sequence_id": 0,
        "position": 0,
        "token_id": 4,
        "is_target": False,
        **dict.fromkeys(["token_steps", "candidate_ids", "gap_steps", "tail_steps"]),
    }
    assert one == {
        "sequence_id": 0,
        "position": 1,
        "token_id": 3,
        "is_target": True,
        "token_steps": 2**23 + 17,  # ln(1/8) = −2.079 is nearest to −2.125
        "candidate_ids": b"\x00\x01\x00\x00",
        "gap_steps": [2**23 + 6],  # ln 2 = 0.693 is nearest to 0.75
        "tail_steps": 2**23 + 128 + 9,  # ln(1/4 / 3/4) = −1.099 is nearest to −1.125, 17.125 below 16
    }
    stored = logical(place, vocabulary=5, k=2).to_pylist()
    first = -np.log(1 + np.exp(-1.125)) - np.log(1 + np.exp(-0.75))  # 0.513 of the whole
    assert stored == [
        {
            "sequence_id": 0,
            "position": 0,
            "token_id": 4,
            "is_target": False,
            "token_logprob": None,
            "candidate_ids": None,
            "candidate_logprobs": None,
            "tail_logprob": None,
        },
        {
            "sequence_id": 0,
            "position": 1,
            "token_id": 3,
            "is_target": True,
            "token_logprob": -2.125,
            "candidate_ids": [1, 0],
            "candidate_logprobs": [np.float32(first), np.float32(first - 0.75)],
            "tail_logprob": np.float32(-np.log(1 + np.exp(1.125))),  # the tail is 1/4 as well: 0.245
        },
    ]
    read = KnowledgeStore.open(place)[0]
    np.testing.assert_allclose(read["candidate_logprobs"][1], [first, first - 0.75], rtol=1e-6)
    np.testing.assert_allclose(read["tail_logprob"][1], -np.log(1 + np.exp(1.125)), rtol=1e-6)
    assert read["token_logprob"].tolist() == [0, -2.125]
    # Without knowledge all mass is in the tail.
    assert (read["candidate_logprobs"][0].tolist(), read["tail_logprob"][0]) == ([-np.inf, -np.inf], 0)
    assert read["has_knowledge"].tolist() == [False, True]


def test_position_t_is_the_prediction_of_token_t(place):
    """An off-by-one here would ruin every student without a sound."""
    random = np.random.default_rng(3)
    vocabulary, k = 13, 4
    tokens = random.integers(0, vocabulary, 12)
    logits = random.normal(0, 3, (12, vocabulary))  # row t is a model's output after tokens 0 … t
    writer = small_dump(place, vocabulary=vocabulary, k=k, shards=1)
    commit(writer, 0, [knowledge_of(tokens, logits, k)])
    rows = logical(place, vocabulary=vocabulary, k=k).to_pylist()
    read = KnowledgeStore.open(place)[0]
    for t in range(1, 12):
        weights = np.exp(logits[t - 1])
        logprobs = np.log(weights / weights.sum())
        assert rows[t]["token_id"] == tokens[t]
        assert abs(rows[t]["token_logprob"] - logprobs[tokens[t]]) <= 0.125 + 1e-6
        assert rows[t]["candidate_ids"] == np.argsort(-logprobs)[:k].tolist() == read["candidate_ids"][t].tolist()
        assert np.abs(rows[t]["candidate_logprobs"] - np.sort(logprobs)[::-1][:k]).max() <= 0.125 + 1e-6
        assert abs(rows[t]["tail_logprob"] - np.log(np.exp(np.sort(logprobs)[:-k]).sum())) <= 0.0625 + 1e-6


VOCABULARIES = st.one_of(st.integers(1, 40), st.sampled_from([65_536, 65_537, 131_072, 131_073, 2**32 - 1, 2**32]))


@settings(max_examples=60)
@given(
    vocabulary=VOCABULARIES,
    k=st.integers(1, 9),
    length=st.integers(2, 12),
    step=st.sampled_from([0.125, 0.0625, 1.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_encode_and_decode(vocabulary, k, length, step, seed, data):
    """Any k, any vocabulary that token ids of 32 bits allow, context without knowledge: what is read is what was meant."""
    random = np.random.default_rng(seed)
    k = min(k, vocabulary)
    kept = np.array([False, *data.draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))])
    # Candidates among all of a large vocabulary, its last id included; the rest of the mass is the tail.
    ids = np.array([random.choice(min(vocabulary, 1000), k, replace=False) for _ in range(length)], np.uint64)
    ids = (vocabulary - 1 - ids).astype(np.uint32)
    logits = log_softmax(random.normal(0, 3, (length, k + (k < vocabulary))))
    order = np.argsort(-logits[:, :k], axis=1)
    logprobs = np.take_along_axis(logits[:, :k], order, axis=1).astype(np.float32)
    tail = (logits[:, k] if k < vocabulary else np.full(length, -np.inf)).astype(np.float32)
    arrays = {
        "token_id": ids[:, 0],
        "is_target": kept,
        "has_knowledge": kept,
        "token_logprob": logprobs[:, 0],
        "candidate_ids": ids,
        "candidate_logprobs": logprobs,
        "tail_logprob": tail,
    }
    manifest = make_manifest(vocabulary=vocabulary, k=k, quantisation_step=step)
    keys = pa.table({"sequence_id": np.zeros(length, np.int64), "position": np.arange(length, dtype=np.int32)})
    kind = KINDS["positions"]
    packed = kind.pack(keys, arrays, manifest)
    assert packed.schema.equals(kind.stored_schema(manifest))
    table = kind.unpack(packed, manifest)
    assert list(damage(table, manifest)) == []
    assert kind.unpack(packed.slice(length // 2), manifest).equals(table.slice(length // 2))
    assert_close(plain_sql(packed, kind.view(manifest), table.schema), table)

    stored = [np.array(row, np.float64) for row in table["candidate_logprobs"].to_pylist() if row is not None]
    # Half a step each by its own gap, by the other gaps through their sum, and by the tail's log-odds.
    most = 1.5 * step + 1e-6 * max(1, np.abs(logprobs).max())
    for row, meant in zip(stored, logprobs[kept], strict=True):
        assert np.abs(row - meant).max() <= most
    assert table["candidate_ids"].to_pylist() == [row.tolist() if keep else None for row, keep in zip(ids, kept, strict=True)]

    read = kind.decode(table, manifest)
    assert np.array_equal(read["has_knowledge"], kept)
    assert np.array_equal(read["input_ids"], ids[:, 0])
    if kept.any():
        assert np.array_equal(read["candidate_ids"][kept], ids[kept])
        mass = np.exp(read["candidate_logprobs"].astype(np.float64)).sum(axis=1) + np.exp(read["tail_logprob"])
        np.testing.assert_allclose(mass, 1, atol=1e-5)
        assert np.abs(read["candidate_logprobs"][kept] - logprobs[kept]).max() <= 1.5 * step + 1e-5 * max(
            1, np.abs(logprobs).max()
        )
    assert np.isneginf(read["tail_logprob"][kept]).all() == (k == vocabulary or not kept.any())
    assert np.all(read["tail_logprob"][~kept] == 0)


def test_quantise_keeps_infinity_and_has_no_minus_zero():
    rounded = quantise(np.array([-np.inf, -0.01, -0.07, -3.3], np.float32), 0.125)
    assert rounded.tolist() == [-np.inf, 0, -0.125, -3.25]
    assert not np.signbit(rounded[1])


def test_more_values_than_an_arrow_list_holds_are_refused():
    """Offsets are 32 bits wide: they would wrap, and candidates would stand at the wrong positions."""
    assert list_offsets(np.array([2, 0, 3])).to_pylist() == [0, 2, 2, 5]
    with pytest.raises(InputError, match=r"2\^31"):
        list_offsets(np.full(3, 2**30))


def plain_sql(stored: pa.Table, view: str, schema: pa.Schema) -> pa.Table:
    """What a DuckDB of its own makes of a stored table."""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("stored", stored)
        return connection.sql(view.format(rows="stored")).to_arrow_table().cast(schema)


def test_the_sql_that_the_format_s_text_prints(tmp_path):
    """Whoever reads FORMAT.md pastes it into DuckDB, and has what the store itself says."""
    store = write_store(tmp_path / "store")
    own = KnowledgeStore.open(store)
    text = (ROOT / "knowledge_store/FORMAT.md").read_text().replace("STORE/DUMP", f"{store}/small")
    [view] = re.findall(r"^ +CREATE VIEW (?:.+\n)+", text, re.MULTILINE)
    probabilities, candidates = re.findall(r"^ +SELECT (?:.+\n)+", text.replace(view, ""), re.MULTILINE)
    with duckdb.connect() as connection:
        connection.execute(view)
        positions = connection.sql("SELECT * FROM positions ORDER BY sequence_id, position").to_arrow_table()
        ours = own.sql("SELECT * EXCLUDE (dump, token_text, teacher_entropy) FROM positions ORDER BY sequence_id, position")
        assert positions.to_pylist() == ours.to_pylist()
        ranks = connection.sql(f"{candidates} ORDER BY ALL").to_arrow_table()
        ours = own.sql("SELECT sequence_id, position, rank, token_id, logprob FROM candidates ORDER BY ALL")
        assert ranks.to_pylist() == ours.to_pylist()
        for row in connection.sql(probabilities).to_arrow_table().to_pylist():
            assert row["tail"] is None or sum(row["probabilities"]) + row["tail"] == pytest.approx(1)


def test_a_masked_token_lies_as_far_below_as_can_be(tmp_path):
    """A logit of −10³⁸ has probability 0, as a candidate too, and its steps fit a float."""
    logits = np.array([[0.0, -1e38, -3e38]])
    knowledge = knowledge_of(np.array([0, 2]), np.repeat(logits, 2, axis=0), 2)
    knowledge["tail_logprob"][1] = -3e38  # a log-sum-exp gives this, the helper's sum of exponentials −∞
    writer = small_dump(tmp_path / "store", vocabulary=3, k=2, shards=1)
    commit(writer, 0, [knowledge])
    assert not verify(tmp_path / "store").damage
    [row] = KnowledgeStore.open(tmp_path / "store").sql("SELECT * FROM positions WHERE is_target").to_pylist()
    assert (row["candidate_ids"], row["candidate_logprobs"]) == ([0, 1], [0.0, -(2.0**19)])
    assert row["token_logprob"] == -(2.0**19)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("candidate_ids", b"\x00\x01\x00", "not of 2 bytes each"),
        ("candidate_ids", b"\x00\x01", "do not pair up"),
        ("gap_steps", [2**23], "do not pair up"),
        ("gap_steps", None, "do not pair up"),
        ("tail_steps", 2.0**22 + 0.5, "no whole numbers"),
        ("tail_steps", 2.0**25, "no whole numbers"),
        ("token_steps", float("nan"), "no whole numbers"),
        ("tail_steps", None, "tail_steps is null although"),
        ("tail_steps", 2.0**23 - 1, "below 0"),
        ("gap_steps", [2.0**23, None], "a null among its values"),
        ("gap_steps", [2.0**23 - 10_000, 2.0**23], "do not have a finite sum"),
        ("token_steps", None, "token_steps is null although"),
    ],
)
def test_what_cannot_be_unpacked(tmp_path, column, value, complaint):
    store = write_store(tmp_path / "store", shards=1)
    manifest = KnowledgeStore.open(store).manifest()
    stored = pq.read_table(store / "small/positions/00000.parquet")
    rows = stored.to_pylist()
    place = next(index for index, row in enumerate(rows) if row["token_steps"] is not None)
    rows[place][column] = value
    with pytest.raises(ValueError, match=complaint):
        KINDS["positions"].unpack(pa.Table.from_pylist(rows, schema=stored.schema), manifest)


def test_no_id_outside_the_vocabulary_s_bytes_is_packed():
    arrays = random_sequences(0, 1)[0]
    arrays["candidate_ids"][1, 0] = 65_536
    length = len(arrays["token_id"])
    keys = pa.table({"sequence_id": np.zeros(length, np.int64), "position": np.arange(length, dtype=np.int32)})
    with pytest.raises(InputError, match="65536, is far above the vocabulary size, 11"):
        KINDS["positions"].pack(keys, arrays, make_manifest())


def test_ids_and_hashes():
    assert [sequence_id(0, 0), sequence_id(0, 3), sequence_id(2, 1)] == [0, 3, 131_073]
    # SHA-256 of 01 00 00 00 02 00 01 00
    assert token_hash(np.array([1, 65_538])) == int.from_bytes(hashlib.sha256(b"\1\0\0\0\2\0\1\0").digest()[:8], "little")


def test_corpus_columns_never_collide():
    names = ["dump", "Dump", "length", "corpus_length", "corpus_corpus_length", "corpus_source", "source", "meta.source"]
    stored = [corpus_column(name) for name in names]
    assert stored == [
        *("corpus_dump", "corpus_Dump", "corpus_length", "corpus_corpus_length", "corpus_corpus_corpus_length"),
        *("corpus_source", "source", "meta.source"),
    ]
    assert len({name.lower() for name in stored}) == len({name.lower() for name in names})


CASES = ["source", "Source", "SOURCE", "source_2", "Source_2", "length", "Length", "corpus_length"]


@given(st.sets(st.sampled_from(CASES)))
def test_columns_that_sql_does_not_tell_apart_are_stored_apart(names):
    stored = stored_columns(names)
    assert stored == stored_columns(sorted(names, reverse=True))
    assert len({name.lower() for name in stored.values()}) == len(names)
    assert stored_columns(["source", "Source"]) == {"Source": "Source", "source": "source_2"}


def test_a_shard_without_sequences(place):
    """All its rows were left out: it must commit, verify and read like any other."""
    store = place
    writer = small_dump(store, shards=3)
    commit(writer, 0, [])
    commit(writer, 1, random_sequences(1, 2))
    skipped = [{"file": "numbers.jsonl", "row": row, "reason": "no text"} for row in range(201, 205)]
    record = writer.commit(Shard(2, 200, 100, [], {"positions": []}, skipped))
    assert (record.files["positions"].rows, record.statistics["positions.predictions"]) == (0, 0)
    found = verify(store)
    assert (found.damage, found.shards) == ([], 3)
    opened = KnowledgeStore.open(store)
    assert opened.info()[0].complete
    assert (len(opened), opened.info()[0].skipped_rows) == (2, 4)
    assert opened[0]["input_ids"].tolist() == random_sequences(1, 2)[0]["token_id"].tolist()
    assert opened.sequences()["document"].to_pylist() == [100, 101]
    assert opened.sql("SELECT count(DISTINCT sequence_id) AS n FROM positions").to_pylist() == [{"n": 2}]
    assert len(opened.batches(batch_size=2)) == 1


def test_context_without_knowledge_and_with_it(place):
    random = np.random.default_rng(5)
    tokens, logits = random.integers(0, 11, 6), random.normal(0, 1, (6, 11))
    targets = np.array([False, False, False, True, True, True])
    dropped = knowledge_of(tokens, logits, 3, targets)
    kept = {**knowledge_of(tokens, logits, 3, targets), "has_knowledge": np.arange(6) > 0}
    writer = small_dump(place, shards=1)
    rows = [sequence_row(0, dropped), sequence_row(1, kept)]
    writer.commit(Shard(0, 0, 100, rows, {"positions": [dropped, kept]}))
    assert not verify(place).damage
    opened = KnowledgeStore.open(place)
    assert opened[0]["has_knowledge"].tolist() == [False, False, False, True, True, True]
    assert opened[1]["has_knowledge"].tolist() == [False, True, True, True, True, True]
    assert opened[0]["is_target"].tolist() == opened[1]["is_target"].tolist() == targets.tolist()
    assert np.array_equal(opened[0]["candidate_ids"][3:], opened[1]["candidate_ids"][3:])


def test_a_record_survives_json(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    record = record_of(store / "small/positions/00000.parquet")
    assert FileRecord.from_dict(json.loads(json.dumps(dataclasses.asdict(record)))) == record
