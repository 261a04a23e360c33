"""SQL over a store: what it offers, that it answers what is there, and that it can do nothing else."""

from __future__ import annotations

import datetime
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_storage import PLACES, MemoryStorage, new_place
from stores import commit, make_manifest, random_sequences, words, write_store

from knowledge_store import DumpWriter, InputError, KnowledgeStore, QueryError
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import joined

SEQUENCES = [
    *("dump", "sequence_id", "document", "file", "row", "part", "window", "length", "targets", "truncated", "token_hash"),
]
COLUMNS = {
    "positions": [
        *("dump", "sequence_id", "position", "token_id", "is_target", "token_logprob", "candidate_ids"),
        *("candidate_logprobs", "tail_logprob", "token_text", "teacher_entropy"),
    ],
    "candidates": ["dump", "sequence_id", "position", "rank", "token_id", "token_text", "logprob"],
    "sequences": SEQUENCES,
    "tokens": ["dump", "token_id", "text", "token"],
    "shards": [
        *("dump", "shard", "first_document", "documents", "sequences", "positions"),
        *("positions.mean_nll", "positions.mean_top_1_accuracy", "positions.mean_top_k_mass", "positions.predictions"),
        *("positions.rows", "skipped_rows", "bytes", "committed_at"),
    ],
    "dumps": [
        *("dump", "teacher", "max_length", "vocabulary_size", "documents"),
        *("documents_planned", "shards", "shards_planned", "complete", "skipped_rows", "sequences", "positions"),
        *("bytes", "bytes_per_position", "positions.selection", "positions.draw_weight"),
        *("positions.quantisation_step", "positions.dense_bytes"),
        *("positions.ratio", "positions.rows", "positions.predictions", "positions.mean_nll", "positions.mean_top_k_mass"),
        "positions.mean_top_1_accuracy",
    ],
    "saliency": ["dump"],  # no dump of these has any
    "rationales": ["dump"],
    "hidden": ["dump"],
    "vectors": ["dump"],
}


def new_dump(folder, name: str, columns: dict[str, str], vocabulary: int = 11) -> DumpWriter:
    """A dump of one shard whose corpus has these columns."""
    manifest = make_manifest(name, vocabulary, shards=1, columns=columns)
    return DumpWriter.open(folder, manifest, tokens_table(words(vocabulary), words(vocabulary)))


@pytest.fixture(scope="module", params=PLACES)
def folder(request, tmp_path_factory: pytest.TempPathFactory):
    """Two dumps whose corpora have columns in common, of other types, and of their own."""
    folder = new_place(request.param, tmp_path_factory.mktemp("sql") / "store")
    first = new_dump(folder, "first", {"source": "string", "score": "double"})
    commit(first, 0, random_sequences(0, 4), source=["a", "b", "a", None], score=[0.5, 1.5, None, 2.0])
    second = new_dump(folder, "second", {"score": "int64", "length": "string"})
    commit(second, 0, random_sequences(1, 3), score=[7, 8, 9], length=["short", "long", None])
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return KnowledgeStore.open(folder)


def rows(store: KnowledgeStore, query: str) -> list[dict]:
    return store.sql(query).to_pylist()


@pytest.mark.parametrize("relation", COLUMNS)
def test_relations_and_their_columns(store, relation):
    columns = store.sql(f"SELECT * FROM {relation}").column_names
    if relation == "sequences":
        assert columns == [*SEQUENCES, "source", "score", "corpus_length"]
    else:
        assert columns == COLUMNS[relation]


def test_show_tables_lists_relations_and_nothing_else(store):
    assert [row["name"] for row in rows(store, "SHOW TABLES")] == sorted(COLUMNS)
    described = [row["column_name"] for row in rows(store, "DESCRIBE positions")]
    assert described == COLUMNS["positions"]


def test_positions_are_what_was_given(store):
    expected = joined(random_sequences(0, 4))
    found = store.sql("SELECT * FROM positions WHERE dump = 'first' ORDER BY sequence_id, position")
    assert found["token_id"].to_pylist() == expected["token_id"].tolist()
    assert found["token_text"].to_pylist() == [f"w{token}" for token in expected["token_id"]]
    kept = expected["has_knowledge"]
    assert [each is not None for each in found["candidate_ids"].to_pylist()] == kept.tolist()
    stored = np.array(found["token_logprob"].to_pylist(), dtype=float)[kept]
    assert np.abs(stored - expected["token_logprob"][kept]).max() <= 0.0625 + 1e-6


def test_candidates_are_positions_unrolled(store):
    found = store.sql("SELECT * FROM candidates ORDER BY dump, sequence_id, position, rank").to_pylist()
    expected = [
        {
            **{name: row[name] for name in ("dump", "sequence_id", "position")},
            "rank": rank,
            "token_id": token,
            "token_text": f"w{token}",
            "logprob": logprob,
        }
        for row in rows(store, "SELECT * FROM positions ORDER BY dump, sequence_id, position")
        if row["candidate_ids"] is not None
        for rank, (token, logprob) in enumerate(zip(row["candidate_ids"], row["candidate_logprobs"], strict=True), 1)
    ]
    assert found == expected


def test_dumps_with_other_columns_are_put_together(store):
    found = rows(store, "SELECT dump, source, score, corpus_length FROM sequences ORDER BY dump, sequence_id")
    assert found == [
        {"dump": "first", "source": "a", "score": 0.5, "corpus_length": None},
        {"dump": "first", "source": "b", "score": 1.5, "corpus_length": None},
        {"dump": "first", "source": "a", "score": None, "corpus_length": None},
        {"dump": "first", "source": None, "score": 2.0, "corpus_length": None},
        {"dump": "second", "source": None, "score": 7.0, "corpus_length": "short"},
        {"dump": "second", "source": None, "score": 8.0, "corpus_length": "long"},
        {"dump": "second", "source": None, "score": 9.0, "corpus_length": None},
    ]


def test_columns_of_clashing_types_and_odd_names(tmp_path):
    odd = {"meta.source": "string", 'say "hi"': "double", "naïve {rows}": "int64", "": "string", "Source": "string"}
    first = new_dump(tmp_path / "store", "1.a-b_c", odd)
    commit(first, 0, random_sequences(0, 2), **{name: [None, None] for name in odd})
    second = new_dump(tmp_path / "store", "select", {"source": "double", "Dump": "string", "Token_Hash": "bool"})
    commit(second, 0, random_sequences(1, 1), source=[1.5], Dump=["mine"], Token_Hash=[True])
    third = new_dump(tmp_path / "store", "third", {"source": "string", "SOURCE": "int64"})
    commit(third, 0, random_sequences(1, 1), source_2=["b"], SOURCE=[3])
    store = KnowledgeStore.open(tmp_path / "store")
    assert rows(store, "SELECT count(*) AS n FROM sequences") == [{"n": 4}]
    query = """SELECT "meta.source", "say ""hi\""", "naïve {rows}", source, corpus_dump, corpus_token_hash
               FROM sequences WHERE dump = 'select'"""
    source = {"BIGINT": None, "DOUBLE": 1.5, "VARCHAR": None}
    assert [tuple(row.values()) for row in rows(store, query)] == [(None, None, None, source, "mine", True)]
    names = store.sql("SELECT DISTINCT dump FROM positions ORDER BY 1")["dump"].to_pylist()
    assert names == ["1.a-b_c", "select", "third"]
    assert store.sequences("third").column_names[-2:] == ["source_2", "SOURCE"]  # SQL does not tell the two names apart
    assert rows(store, "SELECT source_2, source.BIGINT AS other FROM sequences WHERE dump = 'third'") == [
        {"source_2": "b", "other": 3}
    ]


def test_a_column_of_several_types_keeps_its_values(tmp_path):
    """As text 9 would come after 10, and as a double 2⁶⁰ + 1 is 2⁶⁰."""
    large = [2**60 + 1, 2**60 + 2, None]
    numbers = new_dump(tmp_path / "store", "numbers", {"score": "double", "id": "int64", "good": "bool", "": "int64"})
    commit(numbers, 0, random_sequences(0, 3), score=[9.0, 10.0, -1.0], id=large, good=[True, False, None], **{"": [1, 2, 3]})
    texts = new_dump(tmp_path / "store", "texts", {"Score": "string", "id": "string", "good": "int64", "": "string"})
    commit(texts, 0, random_sequences(1, 2), Score=["good", None], id=["7", "a"], good=[1, 0], **{"": ["a", "b"]})
    store = KnowledgeStore.open(tmp_path / "store")
    of_numbers = "FROM sequences WHERE dump = 'numbers'"
    best = rows(store, f"SELECT score.DOUBLE AS score {of_numbers} QUALIFY row_number() OVER (ORDER BY score DESC) = 1")
    assert best == [{"score": 10.0}]
    assert [row["id"] for row in rows(store, f"SELECT id.BIGINT AS id {of_numbers} ORDER BY sequence_id")] == large
    assert rows(store, f"SELECT id, good {of_numbers} ORDER BY sequence_id")[1:] == [
        {"id": {"BIGINT": 2**60 + 2, "VARCHAR": None}, "good": {"BIGINT": None, "BOOLEAN": False}},
        {"id": None, "good": None},
    ]
    assert rows(store, "SELECT dump FROM sequences WHERE id.VARCHAR = '7' AND score.VARCHAR = 'good'") == [{"dump": "texts"}]
    for query in ("SELECT avg(score) FROM sequences", "FROM sequences WHERE id > 7", "FROM sequences WHERE id = 'a'"):
        with pytest.raises(QueryError, match=r'ask for "score".DOUBLE or "score".VARCHAR or "id"'):
            store.sql(query)


def test_integers_that_another_dump_has_with_fractions(tmp_path):
    whole = new_dump(tmp_path / "store", "whole", {"id": "int64", "score": "int64"})
    commit(whole, 0, random_sequences(0, 2), id=[2**60 + 1, 1], score=[2**53, None])
    parts = new_dump(tmp_path / "store", "parts", {"id": "double", "score": "double"})
    commit(parts, 0, random_sequences(1, 1), id=[0.5], score=[0.5])
    store = KnowledgeStore.open(tmp_path / "store")
    assert rows(store, "SELECT sum(score) AS sum, count(*) AS times FROM sequences") == [{"sum": 2**53 + 0.5, "times": 3}]
    assert rows(store, "SELECT max(id) AS id FROM sequences WHERE dump = 'parts'") == [{"id": 0.5}]
    with pytest.raises(QueryError, match="the column id of the dump whole has integers that no DOUBLE holds"):
        store.sql("SELECT id FROM sequences")


def test_odd_texts_of_tokens(tmp_path):
    texts = ["'", '"', "{dump}", "a\nb", "", None, "é🙂", "\x00", "--", "NULL", "%"]
    manifest = make_manifest(shards=1)
    commit(DumpWriter.open(tmp_path / "store", manifest, tokens_table(texts, texts)), 0, random_sequences(0, 4))
    store = KnowledgeStore.open(tmp_path / "store")
    assert store.sql("SELECT text FROM tokens ORDER BY token_id")["text"].to_pylist() == texts
    found = rows(store, "SELECT DISTINCT token_id, token_text FROM positions")
    assert all(row["token_text"] == texts[row["token_id"]] for row in found)


def test_token_ids_near_the_edge_of_32_bits(tmp_path):
    """No text is known for such an id; its row is answered all the same."""
    top = 2**32 - 1
    knowledge = random_sequences(0, 1)[0]
    knowledge = {**knowledge, "candidate_ids": (top - knowledge["candidate_ids"].astype(np.int64)).astype(np.uint32)}
    manifest = make_manifest(vocabulary=2**32, shards=1)
    writer = DumpWriter.open(tmp_path / "store", manifest, tokens_table(words(3), words(3)))
    commit(writer, 0, [knowledge])
    store = KnowledgeStore.open(tmp_path / "store")
    found = store.sql("SELECT token_id, token_text FROM candidates ORDER BY position, rank")
    assert found["token_id"].to_pylist() == knowledge["candidate_ids"][1:].reshape(-1).tolist()
    assert set(found["token_text"].to_pylist()) == {None}
    assert store[0]["candidate_ids"][1:].tolist() == knowledge["candidate_ids"][1:].tolist()


def test_shards_and_dumps_need_no_shard(tmp_path):
    """They answer from the index alone: on a laptop that has the commit records and nothing else."""
    folder = write_store(tmp_path / "store", shards=3)
    queries = ["SELECT * FROM shards", "SELECT * FROM dumps", "SELECT dump, sum(s.positions) AS n FROM shards s GROUP BY 1"]
    before = [rows(KnowledgeStore.open(folder), query) for query in queries]
    assert [row["shard"] for row in before[0]] == [0, 1, 2]
    assert before[1][0]["positions"] == before[2][0]["n"] == sum(row["positions"] for row in before[0])
    for table in ("positions", "sequences"):
        shutil.rmtree(folder / "small" / table)
    (folder / "small/tokens.parquet").unlink()
    opened = KnowledgeStore.open(folder)
    for query, expected in zip(queries, before, strict=True):
        assert rows(opened, query) == expected
    assert opened.info()[0].shards == 3


def test_statistics_are_those_of_the_positions(store):
    [facts] = rows(store, "SELECT * FROM dumps WHERE dump = 'first'")
    [computed] = rows(
        store,
        """SELECT count(*) AS positions, count(token_logprob) AS predictions, -avg(token_logprob) AS nll,
                  avg((candidate_ids[1] = token_id)::INTEGER) FILTER (candidate_ids IS NOT NULL) AS accuracy,
                  avg(mass / (mass + exp(tail_logprob))) AS mass
           FROM (SELECT *, list_sum(list_transform(candidate_logprobs, lambda x: exp(x::DOUBLE))) AS mass FROM positions)
           WHERE dump = 'first'""",
    )
    assert (facts["positions"], facts["positions.predictions"]) == (computed["positions"], computed["predictions"])
    for ours, theirs in (("mean_nll", "nll"), ("mean_top_k_mass", "mass"), ("mean_top_1_accuracy", "accuracy")):
        assert facts[f"positions.{ours}"] == pytest.approx(computed[theirs], abs=1e-6)
    assert facts["positions.dense_bytes"] == facts["positions.predictions"] * 11 * 4


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("WITH positions AS (SELECT 5 AS a) SELECT a FROM positions", [{"a": 5}]),
        ("WITH shards AS (SELECT 5 AS a), dumps AS (SELECT 6 AS b) SELECT * FROM shards, dumps", [{"a": 5, "b": 6}]),
        ("SELECT positions.n FROM (SELECT 1 AS n) AS positions", [{"n": 1}]),
        ("SELECT count(*) AS positions FROM dumps", [{"positions": 2}]),
        ("SELECT count(*) AS n FROM POSITIONS WHERE Position = 0", [{"n": 7}]),
        ('SELECT count(*) AS n FROM "positions" WHERE "position" = 0', [{"n": 7}]),
        ('SELECT count(*) AS n FROM "Sequences"', [{"n": 7}]),
        ("FROM DUMPS SELECT dump ORDER BY dump", [{"dump": "first"}, {"dump": "second"}]),
        ("SELECT count(*) AS n FROM main.sequences", [{"n": 7}]),
        ("SELECT 1 AS one;", [{"one": 1}]),
        ("/* positions */ SELECT 'positions' AS word -- candidates", [{"word": "positions"}]),
        ("SELECT count(*) AS n FROM sequences WHERE token_hash = 18446744073709551615", [{"n": 0}]),
        ("SELECT count(*) AS n FROM positions WHERE tail_logprob = '-inf'::FLOAT OR isnan(token_logprob)", [{"n": 0}]),
        ("VALUES (1)", [{"col0": 1}]),
    ],
)
def test_queries_people_write(store, query, expected):
    assert rows(store, query) == expected


def test_columns_of_one_name_are_kept_apart(store):
    query = """SELECT a.dump, b.dump, 1 AS dump_1, 2 AS x, 3 AS x FROM dumps a, dumps b ORDER BY ALL LIMIT 2"""
    found = store.sql(query)
    assert found.column_names == ["dump", "dump_2", "dump_1", "x", "x_1"]
    assert found.to_pylist()[1] == {"dump": "first", "dump_2": "second", "dump_1": 1, "x": 2, "x_1": 3}


def test_pushed_down_filters_answer_the_same(store):
    """DuckDB hands filters on to Arrow, which skips row groups by their statistics."""
    everything = rows(store, "SELECT * FROM positions")
    for condition, keep in [
        ("sequence_id = 65536", lambda row: row["sequence_id"] == 65_536),
        ("sequence_id > 65536 AND position < 3", lambda row: row["sequence_id"] > 65_536 and row["position"] < 3),
        ("token_id IN (3, 5)", lambda row: row["token_id"] in (3, 5)),
        ("is_target AND tail_logprob < -1.5", lambda row: row["is_target"] and row["tail_logprob"] < -1.5),
        ("token_logprob IS NULL", lambda row: row["token_logprob"] is None),
        ("dump = 'second' AND token_text = 'w3'", lambda row: (row["dump"], row["token_text"]) == ("second", "w3")),
    ]:
        found = rows(store, f"SELECT * FROM positions WHERE {condition} ORDER BY dump, sequence_id, position")
        assert found == [row for row in everything if keep(row)], condition
        assert found, condition


REFUSED = [
    "INSERT INTO positions VALUES (1)",
    "UPDATE sequences SET length = 0",
    "DELETE FROM positions",
    "TRUNCATE positions",
    "DROP VIEW positions",
    "ALTER TABLE dumps ADD COLUMN x INTEGER",
    "CREATE TABLE mine (a INTEGER)",
    "CREATE TEMP TABLE mine AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "CREATE SECRET s (TYPE s3)",
    "WITH x AS (INSERT INTO store_tables.dumps VALUES (1) RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM dumps RETURNING *) SELECT * FROM x",
    "COPY dumps TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/out.parquet' (FORMAT parquet)",
    "EXPLAIN ANALYZE COPY dumps TO '{folder}/out.csv'",
    "EXPLAIN SELECT 1",
    "EXPORT DATABASE '{folder}/out'",
    "IMPORT DATABASE '{folder}/out'",
    "ATTACH '{folder}/out.duckdb'",
    "ATTACH ':memory:' AS other",
    "DETACH memory",
    "USE store_tables",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '1GB'",
    "RESET memory_limit",
    "SET enable_external_access = true",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "COMMIT",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SELECT * FROM read_text('{folder}/store.json')",
    "SELECT * FROM read_blob('{folder}/store.json')",
    "SELECT * FROM read_csv('{folder}/store.json')",
    "SELECT * FROM read_json('{folder}/store.json')",
    "SELECT * FROM read_parquet('{folder}/first/tokens.parquet')",
    "SELECT * FROM '{folder}/first/tokens.parquet'",
    "SELECT * FROM '{folder}/first/positions/*.parquet'",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM parquet_metadata('{folder}/first/tokens.parquet')",
    "SELECT * FROM sniff_csv('{folder}/store.json')",
    "SELECT * FROM read_text('https://example.org')",
    "SELECT * FROM 'https://example.org/x.parquet'",
    "SELECT getenv('HOME')",
    "SELECT * FROM query('CREATE TABLE mine AS SELECT 1')",
    "FROM enable_logging(storage = 'file', storage_config = {{'path': '{folder}/log'}})",
    "SELECT * FROM folder",
    "SELECT * FROM store",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW positions",
    "",
    "   ",
    "-- nothing",
    ";",
    "SELCT 1",
    "SELECT FROM WHERE",
    "SELECT (((",
    "SELECT 'no end",
    "SELECT nothing FROM positions",
    "SELECT * FROM nowhere",
    "SELECT error('mine')",
    "SELECT '\udcff'",
    "SELECT CAST('x' AS INTEGER)",
]


def contents(folder) -> dict:
    """Every file beside and in a store, and when it was written."""
    if isinstance(folder, MemoryStorage):
        return dict(folder.versions)
    return {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}


@pytest.mark.parametrize("query", REFUSED)
def test_everything_else_is_refused(store, folder, query):
    before = contents(folder)
    with pytest.raises(QueryError) as raised:
        store.sql(query.format(folder=folder) if "{folder}" in query else query)
    assert str(raised.value).strip()
    assert "\n" not in str(raised.value)
    assert contents(folder) == before
    assert rows(store, "SELECT count(*) AS n FROM sequences") == [{"n": 7}]


def test_python_variables_are_out_of_reach(store):
    secret = store.sql("SELECT 1 AS a")
    assert secret.num_rows == 1
    with pytest.raises(QueryError, match="secret does not exist"):
        store.sql("SELECT * FROM secret")


def test_a_store_without_dumps(tmp_path):
    folder = write_store(tmp_path / "store")
    KnowledgeStore.open(folder).remove("small")
    store = KnowledgeStore.open(folder)
    for relation in COLUMNS:
        found = store.sql(f"SELECT * FROM {relation}")
        assert found.num_rows == 0
        assert found.column_names[0] == "dump"
    assert store.info() == []
    assert len(store) == 0


def test_the_folder_for_temporary_files_is_no_way_out(store, tmp_path, monkeypatch):
    """DuckDB allows reading its folder for temporary files, by default .tmp below the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".tmp" / "secret.txt").write_text("secret")
    for path in (".tmp/secret.txt", tmp_path / ".tmp" / "secret.txt"):
        with pytest.raises(QueryError):
            store.sql(f"SELECT * FROM read_text('{path}')")
    found = store.sql("SELECT value FROM duckdb_settings() WHERE name = 'allowed_directories'")
    assert found["value"].to_pylist() == ["[]"]


@pytest.mark.parametrize("isolated", [False, True])
def test_numbers_of_numpy_are_parameters(tmp_path, isolated):
    opened = KnowledgeStore.open(write_store(tmp_path / "store"))
    given = {"a": np.int64(2**60 + 1), "b": np.float32(0.5), "c": [np.uint8(7), None], "d": np.bool_(True), "e": "x"}
    row = opened.sql("SELECT $a AS a, $b AS b, $c AS c, $d AS d, $e AS e", given, isolated=isolated).to_pylist()
    assert row == [{"a": 2**60 + 1, "b": 0.5, "c": [7, None], "d": True, "e": "x"}]
    assert opened.sql("SELECT ? + ? AS n", (np.int16(1), 2), isolated=isolated).to_pylist() == [{"n": 3}]


@pytest.mark.parametrize("value", [datetime.date(2024, 2, 29), b"bytes", [datetime.datetime(2024, 2, 29)]])
def test_parameters_that_another_process_cannot_be_given(tmp_path, value):
    opened = KnowledgeStore.open(write_store(tmp_path / "store"))
    assert len(opened.sql("SELECT ? AS value", [value])) == 1
    with pytest.raises(InputError, match=r"no parameter of type \w+: give it as text"):
        opened.sql("SELECT ? AS value", [value], isolated=True)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_closed_folder_that_is_not_damaged_is_named(tmp_path, isolated):
    store = write_store(tmp_path / "store")
    write_store(store, "train")
    (store / "train").rename(store / "mytrain")
    with pytest.warns(UserWarning, match="not asked: .*mytrain is closed: .*belongs to a dump named 'train'"):
        answer = KnowledgeStore.open(store).sql("SELECT dump FROM dumps", isolated=isolated)
    assert answer.to_pylist() == [{"dump": "small"}]


@pytest.mark.parametrize("isolated", [False, True])
def test_parquet_files_are_relations_by_the_names_that_they_are_given(tmp_path, isolated):
    opened = KnowledgeStore.open(write_store(tmp_path / "store"))
    ids = opened.sequences()["sequence_id"]
    pq.write_table(pa.table({"sequence_id": ids, "score": list(range(len(ids)))}), tmp_path / "scores.parquet")
    query = "SELECT sequence_id, score FROM sequences JOIN scores USING (sequence_id) ORDER BY score"
    answer = opened.sql(query, files={"Scores": tmp_path / "scores.parquet"}, isolated=isolated)
    assert answer["score"].to_pylist() == list(range(len(ids))) and answer["sequence_id"].to_pylist() == ids.to_pylist()
    with pytest.raises(QueryError, match="was not run"):  # by its path no file is read, not even one that has a name
        path = tmp_path / "scores.parquet"
        opened.sql(f"SELECT * FROM read_parquet('{path}')", files={"scores": path}, isolated=isolated)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"scores": "absent.parquet"}, "there is no file absent.parquet, which scores was to name"),
        ({"scores": "."}, "there is no file ., which scores was to name"),
        ({"scores": "other.txt"}, "other.txt cannot be read as a Parquet file"),
        ({"Positions": "other.txt"}, "the store has a relation 'positions' itself"),
        ({"shards": "other.txt"}, "the store has a relation 'shards' itself"),
        ({"a-b": "other.txt"}, "'a-b' is no name for a file in SQL"),
        ({"a": "other.txt", "A": "other.txt"}, "two files have the name 'a'"),
    ],
)
def test_files_that_cannot_be_relations(tmp_path, monkeypatch, files, message):
    opened = KnowledgeStore.open(write_store(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("plain text")
    with pytest.raises(InputError, match=re.escape(message)):
        opened.sql("SELECT count(*) FROM scores", files=files)
