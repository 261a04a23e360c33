"""A dump's knowledge for other programs: the views that any DuckDB runs, and Parquet files of plain columns."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import duckdb
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from stores import make_manifest, words, write_store
from torture.heartbeat import PATIENCE
from typer.testing import CliRunner

from knowledge_store import DumpWriter, InputError, KnowledgeStore, QueryError
from knowledge_store.cli import app
from knowledge_store.format.sequences import tokens_table

RELATIONS = ("sequences", "tokens", "positions", "candidates")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> KnowledgeStore:
    """Two dumps, in a folder whose name SQL has to quote."""
    folder = tmp_path_factory.mktemp("export") / "it's a store"
    write_store(folder, "plain")
    write_store(folder, "other", seed=1)
    return KnowledgeStore.open(folder)


@pytest.mark.parametrize("relation", RELATIONS)
def test_duckdb_alone_answers_as_the_store_does(store, relation):
    with duckdb.connect() as connection:
        connection.execute(store.view("other"))
        found = connection.sql(f"SELECT * FROM {relation} ORDER BY ALL").to_arrow_table()
    expected = store.sql(f"SELECT * FROM {relation} WHERE dump = 'other' ORDER BY ALL")
    assert found.column_names == expected.column_names
    assert found.to_pylist() == expected.to_pylist()


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_dump_without_shards_has_empty_views(tmp_path, relation):
    folder = write_store(tmp_path / "store", "full")
    DumpWriter.open(folder, make_manifest("begun"), tokens_table(words(11), words(11)))
    store = KnowledgeStore.open(folder)
    answers = {}
    for dump in ("full", "begun"):
        with duckdb.connect() as connection:
            connection.execute(store.view(dump))
            answers[dump] = connection.sql(f"SELECT * FROM {relation}").to_arrow_table()
    assert answers["begun"].schema == answers["full"].schema
    assert len(answers["begun"]) == (11 if relation == "tokens" else 0)


def test_an_export_holds_the_rows_of_the_relation(store, tmp_path):
    count = store.export(tmp_path / "all.parquet", "other")
    table = pq.read_table(tmp_path / "all.parquet")
    assert count == len(table) > 0
    assert table.to_pylist() == store.sql("SELECT * FROM positions WHERE dump = 'other'").to_pylist()


def test_an_export_takes_a_condition_that_asks_other_relations(store, tmp_path):
    where = "is_target AND sequence_id IN (SELECT sequence_id FROM sequences WHERE length > 6) -- the longer ones"
    store.export(tmp_path / "some.parquet", "other", where=where)
    keys = [("sequence_id", "ascending"), ("position", "ascending")]
    own = where.replace("WHERE length", "WHERE dump = 'other' AND length")  # of the dump alone is what the export asks
    expected = store.sql(f"SELECT * FROM positions WHERE dump = 'other' AND ({own}\n)").sort_by(keys).to_pylist()
    assert 0 < len(expected) < len(store.sql("SELECT * FROM positions WHERE dump = 'other'"))
    assert pq.read_table(tmp_path / "some.parquet").sort_by(keys).to_pylist() == expected


def test_an_existing_file_is_never_replaced(store, tmp_path):
    path = tmp_path / "there.parquet"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        store.export(path, "other")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"where": "tail_probability > 0"}, QueryError, "tail_logprob"),
        ({"where": "is_target)"}, QueryError, "does not parse"),
        ({"kind": "vectors"}, InputError, "it has positions"),
        ({"dump": "third"}, InputError, "has no dump 'third'"),
    ],
)
def test_what_is_refused_leaves_no_file(store, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        store.export(tmp_path / "none.parquet", **{"dump": "other", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_the_commands(store, tmp_path):
    run = CliRunner()
    shown = run.invoke(app, ["view", store.storage.address, "plain"])
    assert shown.exit_code == 0
    assert shown.stdout.strip() == store.view("plain")
    file = tmp_path / "plain.parquet"
    written = run.invoke(app, ["export", store.storage.address, "plain", "--output", str(file), "--where", "is_target"])
    assert written.exit_code == 0
    targets = store.sql("SELECT count(*) AS n FROM positions WHERE dump = 'plain' AND is_target").to_pylist()[0]["n"]
    assert f"{targets} rows" in written.stdout
    assert pq.read_metadata(file).num_rows == targets
    again = run.invoke(app, ["export", store.storage.address, "plain", "--output", str(file)])
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_a_statement_from_a_file_or_standard_input(store, tmp_path):
    run = CliRunner()
    sql = "SELECT count(*) AS n FROM sequences"
    (tmp_path / "q.sql").write_text(f"-- how many\n{sql}")
    expected = run.invoke(app, ["sql", store.storage.address, sql, "--format", "csv"]).stdout
    asked = ["sql", store.storage.address, "--file", str(tmp_path / "q.sql"), "--format", "csv"]
    assert run.invoke(app, asked).stdout == expected
    assert run.invoke(app, ["sql", store.storage.address, "-", "--format", "csv"], input=sql).stdout == expected
    for arguments in ([], [sql, "--file", str(tmp_path / "q.sql")], ["--file", str(tmp_path / "missing.sql")]):
        refused = run.invoke(app, ["sql", store.storage.address, *arguments])
        assert refused.exit_code == 2
        assert len(refused.stderr.splitlines()) == 1


def test_errors_name_what_there_is(store):
    with pytest.raises(QueryError, match=r'Candidate bindings: .*"tail_logprob"'):
        store.sql("SELECT tail_probability FROM positions")
    with pytest.raises(
        QueryError, match="sequences, tokens, positions, candidates, saliency, rationales, vectors, hidden, dumps, shards"
    ):
        store.sql("SELECT * FROM position")


@pytest.mark.parametrize("isolated", [False, True])
def test_parameters_of_a_statement(store, isolated):
    by_place = "SELECT count(*) AS n FROM sequences WHERE dump = ? AND length > ?"
    by_name = "SELECT count(*) AS n FROM sequences WHERE dump = $dump AND length > $length"
    expected = store.sql("SELECT count(*) AS n FROM sequences WHERE dump = 'plain' AND length > 6").to_pylist()
    assert store.sql(by_place, ["plain", 6], isolated=isolated).to_pylist() == expected
    assert store.sql(by_name, {"dump": "plain", "length": 6}, isolated=isolated).to_pylist() == expected
    assert store.sql(by_place, ["' OR true --", 6], isolated=isolated).to_pylist() == [{"n": 0}]
    for parameters in (None, [], ["plain"], ["plain", 6, 7], {"dump": "plain"}):
        with pytest.raises(QueryError):
            store.sql(by_place, parameters, isolated=isolated)


def test_info_as_json(store):
    shown = CliRunner().invoke(app, ["info", store.storage.address, "--json"])
    assert shown.exit_code == 0
    dumps = json.loads(shown.stdout)
    assert [dump["dump"] for dump in dumps] == ["other", "plain"]
    rows = {row["dump"]: row for row in store.sql("SELECT * FROM dumps").to_pylist()}
    for dump in dumps:
        row = rows[dump["dump"]]
        flat = {**dump, **dump["facts"], **dump["statistics"]}
        assert {name: flat[name] for name in row} == row


ENDED_EXPORT = """
import os, signal, sys
import pyarrow.parquet as pq
from knowledge_store.cli import main

class Writer(pq.ParquetWriter):
    def write_batch(self, *arguments):
        super().write_batch(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

pq.ParquetWriter = Writer
main()
"""


def test_an_export_that_is_ended_leaves_nothing(store, tmp_path):
    command = [sys.executable, "-c", ENDED_EXPORT, "export", store.address, "other", "--output", tmp_path / "some.parquet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (130, "Interrupted."), ended.stderr
    assert list(tmp_path.iterdir()) == []
