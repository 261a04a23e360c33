"""The command `knowledge-store`, as a person types it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_command
from stores import index_of, random_sequences, write_store
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.cli import app
from knowledge_store.format.layout import FORMAT_VERSION
from knowledge_store.format.records import seal


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k is the whole vocabulary, so that tails are −∞; nobody may change it."""
    return write_store(tmp_path_factory.mktemp("command") / "store", vocabulary=5, k=5)


def knowledge_store(*arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Call the command in this process: one of its own would take a second to start."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, words, input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def good(*arguments: object) -> str:
    answer = knowledge_store(*arguments)
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


@pytest.mark.parametrize("command", ["info", "sql", "verify", "reindex", "remove", "sequence"])
def test_help_has_an_example(command):
    text = good(command, "--help")
    assert "Example: knowledge-store " + command in " ".join(text.split())


def test_help_lists_the_commands():
    text = good("--help")
    for command in ("info", "sql", "verify", "reindex", "remove", "sequence"):
        assert f" {command} " in text


def test_info(store):
    text = good("info", store)
    facts = KnowledgeStore.open(store).info()[0]
    assert text.startswith("small  2 of 2 shards, complete\n")
    for piece in (
        "numbers (vocabulary 5)",
        "top-k 5, log-probabilities in steps of 0.125 nats",
        f"{facts.statistics['positions.predictions']:,.0f} positions with knowledge",
        "1.0000 on average",
        f"{facts.bytes_per_position:.2f} bytes a position",
        "positions.candidate_ids",
    ):
        assert piece in text


def test_info_says_where_means_are_of_context_too(tmp_path):
    text = good("info", write_store(tmp_path / "store", keep_context=True))
    assert " positions with knowledge, of targets and of context; the means below are over both\n" in text


def test_info_of_an_incomplete_dump(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    (copy / "small/commits/00001.json").unlink()
    assert "1 of 2 shards, incomplete: run the same `teacher-dump run` again" in good("info", copy)
    for record in (copy / "small/commits").iterdir():
        record.unlink()
    text = good("info", copy)
    assert "0 of 2 shards, incomplete" in text and "bytes a position" not in text


def test_info_of_a_closed_dump(tmp_path):
    store = write_store(tmp_path / "store", "first")
    shutil.copytree(store / "first", store / "second")
    facts = json.loads(knowledge_store("info", store, "--json").stdout)
    assert [(each["dump"], each["closed"] is None) for each in facts] == [("first", True), ("second", False)]
    assert "belongs to a dump named 'first'" in facts[1]["closed"]


QUERY = """
    SELECT sequence_id, position, tail_logprob, token_logprob, candidate_ids, token_text || chr(10) || ', "é"' AS odd,
           sum(position) OVER () AS total, NULL AS nothing, is_target, 'nan'::DOUBLE AS nan, DATE '2024-02-29' AS day
    FROM positions WHERE sequence_id = 0 ORDER BY position"""


def test_sql_as_json(store):
    rows = json.loads(good("sql", store, QUERY, "--format", "json"))
    expected = random_sequences(0, 4, 5, 5)[0]
    assert [row["position"] for row in rows] == list(range(len(expected["token_id"])))
    assert [row["odd"] for row in rows] == [f'w{token}\n, "é"' for token in expected["token_id"]]
    assert {row["tail_logprob"] for row in rows} == {None}  # −∞ and null alike
    assert rows[0]["candidate_ids"] is None
    assert rows[1]["candidate_ids"] == expected["candidate_ids"][1].tolist()
    assert (rows[0]["is_target"], rows[1]["is_target"]) == (False, True)
    assert rows[0]["total"] == sum(range(len(rows)))
    assert (rows[0]["nothing"], rows[0]["nan"], rows[0]["day"]) == (None, None, "2024-02-29")


@pytest.mark.parametrize("count", [0, 1, 2, 25_000])
def test_json_is_one_array_of_any_length(store, count):
    text = good("sql", store, f"SELECT range AS n FROM range({count})", "--format", "json")
    assert json.loads(text) == [{"n": n} for n in range(count)]
    assert text.endswith("]\n")


def test_json_tells_a_terminal_nothing(store):
    odd = "\x1b[2J \x7f \x9b2J \x85 \u202e \u2028 \U000e0001 é🙂"
    codes = " || ".join(f"chr({ord(character)})" for character in odd)
    text = good("sql", store, f'SELECT {codes} AS "a\x9bb"', "--format", "json")
    assert text.removesuffix("\n").isprintable()
    assert r"\u009b" in text
    assert "é🙂" in text
    assert json.loads(text) == [{"a\x9bb": odd}]


@pytest.mark.parametrize("comment", ["-- what there is\n", "--x\n", "--a=b c\n", "-- a=b\n"])
def test_a_statement_may_begin_with_a_comment(store, comment):
    assert good("sql", store, f"{comment}SELECT 1 AS one", "--format=csv") == "one\n1\n"
    assert good("sql", "--format", "csv", "--", store, f"{comment}SELECT 1 AS one") == "one\n1\n"


def test_an_option_that_is_none_is_refused(store):
    assert "no such option: --fromat" in knowledge_store("sql", store, "SELECT 1", "--fromat", "csv").stderr


def test_sql_as_csv(store):
    header, *rows = csv.reader(io.StringIO(good("sql", store, QUERY, "--format", "csv")))
    assert header[:6] == ["sequence_id", "position", "tail_logprob", "token_logprob", "candidate_ids", "odd"]
    assert len(rows) == len(random_sequences(0, 4, 5, 5)[0]["token_id"])
    assert all(row[5].endswith('\n, "é"') for row in rows)
    assert good("sql", store, "SELECT 1 AS a WHERE false", "--format", "csv") == "a\n"


def test_sql_over_files_of_ones_own(store, tmp_path):
    """Two of them, beside the store; one that is no Parquet file is refused where it is asked for."""
    for name, values in (("a.parquet", [1, 2]), ("b.parquet", [2, 3])):
        pq.write_table(pa.table({"n": values}), tmp_path / name)
    (tmp_path / "other.txt").write_text("n")
    files = [f"--with={path.stem}={path}" for path in sorted(tmp_path.iterdir())]
    assert good("sql", store, "SELECT n FROM a JOIN b USING (n)", "--format", "csv", *files) == "n\n2\n"
    assert_refused(knowledge_store("sql", store, "SELECT * FROM other", *files), "other.txt cannot be read as a Parquet file")


def test_sql_as_a_table(store):
    query = "SELECT 'a' || chr(10) || 'b' AS text, 'é🙂' AS wide, 0.1::FLOAT AS n UNION ALL VALUES ('x', '', 2)"
    text = good("sql", store, query)
    assert text == "text  wide  n\na\\nb  é🙂   0.1\nx           2\n"
    answer = knowledge_store("sql", store, "SELECT range AS n FROM range(1000)")
    assert answer.returncode == 0
    assert len(answer.stdout.splitlines()) == 201
    assert answer.stderr == "200 of 1,000 rows shown: --format csv or json gives all\n"


def test_names_of_columns_cannot_command_a_terminal(store):
    text = good("sql", store, 'SELECT 1 AS "\x1b[31mred\r\n", 2 AS "é"')
    assert text == "\\x1b[31mred\\r\\n  é\n1                2\n"


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_values_without_a_plain_form(store, form):
    query = """SELECT INTERVAL 1 DAY AS i, MAP {'a': 1.5} AS m, {'x': [1, NULL]} AS s, '\\x00'::BLOB AS b, now() AS t,
                      170141183460469231731687303715884105727::HUGEINT AS h, 'a'::VARCHAR AS a, a, 1.25::DECIMAL(5, 2) AS d"""
    text = good("sql", store, query, "--format", form)
    if form == "json":
        [row] = json.loads(text)
        assert row["h"] == 170141183460469231731687303715884105727
        assert (row["d"], row["m"], row["s"]) == (1.25, [["a", 1.5]], {"x": [1, None]})
        assert (row["a"], row["a_1"]) == ("a", "a")


def test_sequence(store):
    ids = KnowledgeStore.open(store).sequences()["sequence_id"].to_pylist()
    header, *lines = good("sequence", store, ids[5]).splitlines()
    assert header.split() == ["position", "token", "probability", "what", "the", "teacher", "expected"]
    expected = random_sequences(1, 4, 5, 5)[1]
    assert len(lines) == len(expected["token_id"])
    assert lines[0].split() == ["0", f"w{expected['token_id'][0]}"]
    for position, line in list(enumerate(lines))[1:]:
        number, token, probability, first = line.split()[:4]
        assert (number, token) == (str(position), f"w{expected['token_id'][position]}")
        assert abs(float(probability.rstrip("%")) / 100 - math.exp(expected["token_logprob"][position])) < 0.07
        assert first == f"w{expected['candidate_ids'][position][0]}"
        assert "(others 0%)" in line


def test_reindex(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    good("info", copy)
    index_of(copy).write_bytes(b"rubbish")
    assert good("reindex", copy) == "Indexed 2 shards of 1 dumps\n"
    assert index_of(copy).stat().st_size > 1000


def test_remove_asks(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    for reply in ("n\n", "\n", ""):
        answer = knowledge_store("remove", copy, "small", input=reply)
        assert (answer.returncode, "Removed" in answer.stdout) == (1, False)
        assert "Remove small: " in answer.stderr
        assert "Traceback" not in answer.stderr
        assert len(KnowledgeStore.open(copy)) == 8
    answer = knowledge_store("remove", copy, "small", input="y\n")
    assert (answer.returncode, "Removed small" in answer.stdout) == (0, True)
    assert not (copy / "small").exists()
    assert "holds no dump yet" in knowledge_store("info", copy).stderr


def test_remove_without_asking(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    assert good("remove", copy, "small", "--yes") == "Removed small\n"
    assert sorted(path.name for path in copy.iterdir()) == ["store.json"]


def assert_refused(answer, text: str) -> None:
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("Error: ")
    assert answer.stderr.count("\n") == 1
    assert text in answer.stderr


COMMANDS = [["info"], ["sql", "SELECT 1"], ["verify"], ["reindex"], ["remove", "small"], ["sequence", "0"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_store(tmp_path, command):
    name, *more = command
    assert_refused(knowledge_store(name, tmp_path / "nowhere", *more), "there is no store at")
    (tmp_path / "letter.txt").write_text("Dear all")
    assert_refused(knowledge_store(name, tmp_path / "letter.txt", *more), "is a file, not a store")
    assert_refused(knowledge_store(name, tmp_path / "letter.txt/inside", *more), "there is no store at")
    assert_refused(knowledge_store(name, tmp_path, *more), "is not a knowledge store: it has no store.json")
    (tmp_path / "store.json").write_bytes(seal({"format": "knowledge-store", "version": FORMAT_VERSION + 1}))
    assert_refused(knowledge_store(name, tmp_path, *more), "install a newer knowledge-store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", "store.json"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["remove", "other"], "has no dump 'other' (it has small)"),
        (["remove", "../small"], "has no dump '../small'"),
        (["sequence", "0", "--dump", "other"], "has no dump 'other'"),
        (["sequence", "1"], "has no sequence 1"),
        (["sequence", "99999999999"], "has no sequence 99999999999"),
        (["sql", "DROP TABLE positions"], "only a SELECT statement is answered, and this is DROP"),
        (["sql", "COPY dumps TO 'x.csv'"], "only a SELECT statement is answered, and this is COPY"),
        (["sql", "SELCT 1"], "does not parse"),
        (["sql", "SELECT\nnothing\nFROM positions"], "nothing"),
        (["sql", ""], "give one SELECT statement"),
        (["sql", "SELECT 1; SELECT 2"], "give one SELECT statement: this has 2"),
        (["sql", "SELECT * FROM read_text('/etc/hostname')"], "was not run"),
        (["sql", "SELECT TIMESTAMP 'infinity'"], "cast it to VARCHAR"),
        (["sql", "SELECT '\udcff'"], "does not parse"),
        (["sql", "SELECT 1", "--with", "absent.parquet"], "--with takes NAME=FILE"),
        (["sql", "SELECT 1", "--with", "a=x", "--with", "a=y"], "--with gives the name 'a' to two files"),
        (["sql", "SELECT 1", "--with", "a=absent.parquet"], "there is no file absent.parquet"),
    ],
)
def test_bad_input(store, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    name, *more = arguments
    assert_refused(knowledge_store(name, store, *more), text)
    assert list(tmp_path.iterdir()) == []
    assert len(KnowledgeStore.open(store)) == 8


def test_sequence_needs_a_dump_and_positions(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    write_store(copy, "second")
    assert_refused(knowledge_store("sequence", copy, 0), "name a dump")
    assert good("sequence", copy, 0, "--dump", "second").startswith("position")


def test_damage_is_one_line(store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    (copy / "small/positions/00000.parquet").unlink()
    assert_refused(knowledge_store("sequence", copy, 0), "positions/00000.parquet is missing")
    assert_refused(knowledge_store("sql", copy, "SELECT count(*) FROM positions"), "positions/00000.parquet is missing")
    (copy / "small/manifest.json").write_text("{}")
    assert_refused(knowledge_store("info", copy), "manifest.json is damaged")


def test_as_a_process_of_its_own(store, tmp_path):
    """What the other tests cannot see: entry point, exit codes and streams as a shell has them."""
    answer = run_command("knowledge_store", "sql", store, "SELECT 'é🙂' AS text", "--format", "json", cwd=tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, '[{"text": "é🙂"}]\n', "")
    assert_refused(run_command("knowledge_store", "sql", store, "SELCT 1", cwd=tmp_path), "does not parse")
    assert_refused(run_command("knowledge_store", "info", tmp_path), "there is no store at")
    assert run_command("knowledge_store", "dance", cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_copy_and_rename(tmp_path):
    source, destination = write_store(tmp_path / "source", "first"), tmp_path / "destination"
    write_store(source, "second", seed=1)
    run = CliRunner()

    def invoke(*words: object) -> Any:
        return run.invoke(app, [str(word) for word in words])

    copied = invoke("copy", source, destination, "--dump", "first")
    assert copied.exit_code == 0
    assert copied.stdout.startswith("Copied first: 2 shards")
    again = invoke("copy", source, destination)
    assert again.exit_code == 0
    assert again.stdout.startswith("Copied first, second: 2 shards") and "2 existed already" in again.stdout
    assert invoke("verify", destination).exit_code == 0
    renamed = invoke("rename", destination, "second", "other")
    assert renamed.exit_code == 0
    sql = "SELECT * EXCLUDE (dump) FROM positions WHERE dump = '{}' ORDER BY ALL"
    before, after = KnowledgeStore.open(source), KnowledgeStore.open(destination)
    assert after.dumps == ("first", "other")
    assert after.sql(sql.format("other")).equals(before.sql(sql.format("second")))
    assert invoke("verify", destination).exit_code == 0
    for words, reason in [
        (("rename", destination, "third", "x"), "has no dump 'third' (it has first, other)"),
        (("rename", destination, "first", "other"), "other"),
        (("rename", destination, "first", "a/b"), "cannot name a dump"),
        (("copy", tmp_path / "nowhere", destination), "there is no store"),
        (("copy", source, destination, "--dump", "third"), "has no dump 'third'"),
    ]:
        refused = invoke(*words)
        assert refused.exit_code == 2 and reason in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_copy_says_which_dump_is_left_out(tmp_path):
    source = write_store(tmp_path / "source", "first")
    write_store(source, "second", seed=1)
    (source / "second" / "manifest.json").write_text("{}")
    copied = CliRunner().invoke(app, ["copy", str(source), str(tmp_path / "destination")])
    assert copied.exit_code == 0
    assert "second is not copied" in copied.stderr
    assert KnowledgeStore.open(tmp_path / "destination").dumps == ("first",)


def test_a_copy_says_that_a_dump_is_not_complete(tmp_path):
    source = write_store(tmp_path / "source", "first")
    (source / "first" / "commits" / "00001.json").unlink()
    copied = CliRunner().invoke(app, ["copy", str(source), str(tmp_path / "destination")])
    assert copied.exit_code == 0 and copied.stdout.startswith("Copied first: 1 shards")
    assert "first is not complete: it has 1 of its 2 shards, and these are copied" in copied.stderr


def test_sql_says_which_dump_it_does_not_ask(tmp_path):
    """A folder that was copied by hand is left out of answers, and never in silence; alone, it makes them impossible."""
    store = write_store(tmp_path / "store", "first")
    shutil.copytree(store / "first", store / "first copy")
    asked = CliRunner().invoke(app, ["sql", str(store), "SELECT count(*) AS n FROM shards", "--format", "csv"])
    assert (asked.exit_code, asked.stdout) == (0, "n\n2\n")
    assert "not asked" in asked.stderr and "first copy" in asked.stderr
    shutil.rmtree(store / "first")
    refused = CliRunner().invoke(app, ["sql", str(store), "SELECT count(*) AS n FROM shards"])
    assert refused.exit_code == 2 and "first copy" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_dump_renamed_by_hand_can_be_renamed_by_the_command(tmp_path):
    store = write_store(tmp_path / "store", "train")
    (store / "train").rename(store / "mytrain")
    verified = knowledge_store("verify", store)
    assert verified.returncode == 1 and "--repair" not in verified.stderr
    assert "rename the folder back" in verified.stderr and "sound: 0 dumps" in verified.stderr
    command = re.search("`knowledge-store (rename [^`]*)`", verified.stderr)
    good(*command[1].split())
    assert KnowledgeStore.open(store).dumps == ("mytrain",)
    assert "Sound: 1 dumps" in knowledge_store("verify", store).stdout


def test_a_statement_that_cannot_be_read(store, tmp_path):
    absent, latin = tmp_path / "absent.sql", tmp_path / "latin.sql"
    latin.write_bytes("SELECT 'é'".encode("latin-1"))
    for given, reason in (
        (absent, f"{absent}: No such file or directory"),
        (tmp_path, f"{tmp_path}: Is a directory"),
        (latin, f"{latin}: its byte 8 is not UTF-8; save it as UTF-8"),
    ):
        answer = knowledge_store("sql", store, "--file", given)
        assert (answer.returncode, answer.stderr) == (2, f"Error: the statement cannot be read from {reason}\n")
    with latin.open("rb") as file:
        answer = run_command("knowledge_store", "sql", store, "-", stdin=file)
    assert answer.returncode == 2
    assert answer.stderr.endswith("cannot be read from standard input: its byte 8 is not UTF-8; save it as UTF-8\n")
