"""The page of a store, asked as its script asks it: who is let in, and whether answers are those of the statements shown."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import commit, make_manifest, random_sequences, words, write_drawn_store

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from starlette.testclient import TestClient

from knowledge_store import DumpWriter, InputError, KnowledgeStore, QueryError
from knowledge_store.configuration import ServeConfig
from knowledge_store.format.sequences import sequence_id, tokens_table
from knowledge_store.page import answers
from knowledge_store.page.access import SESSION_SECONDS
from knowledge_store.page.app import page_app
from knowledge_store.page.browse import browse, host_names, listen, parse_address
from knowledge_store.page.questions import QUESTIONS, Asked, statement
from knowledge_store.page.served import PageServer
from knowledge_store.sql.excerpt import excerpt
from knowledge_store.sql.isolated import isolated_excerpt
from knowledge_store.sql.statement import Statement
from knowledge_store.storage.served.tokens import TokenFile

HOME = "http://127.0.0.1:8816"
HOSTS = ("127.0.0.1:8816", "localhost:8816")
TOKEN = "a token of more than a few letters"
SECRET = "0123456789abcdef0123456789abcdef"
COLUMN = "a \"name' of <b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dumps: `small` with draws, and `other` of three shards with a column of a name that no SQL takes as it is."""
    folder = write_drawn_store(tmp_path_factory.mktemp("page") / "store")
    manifest = make_manifest("other", shards=3, columns={COLUMN: "string"})
    writer = DumpWriter.open(folder, manifest, tokens_table(words(11), words(11)))
    for shard in range(3):
        commit(writer, shard, random_sequences(shard, 5), **{COLUMN: ["x", "y", None, "<i>", "x"]})
    return folder


@pytest.fixture(scope="module")
def student(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a student makes of each target of `small`, as `evaluate --keep-positions` writes it."""
    targets = KnowledgeStore.open(folder).sql(
        "SELECT dump, sequence_id, position, token_id FROM positions WHERE dump = 'small' AND is_target ORDER BY ALL"
    )
    random = np.random.default_rng(0)
    table = targets.append_column("logprob", pa.array(-random.random(len(targets)), pa.float32()))
    table = table.append_column("kl", pa.array(random.random(len(targets)), pa.float32()))
    table = table.append_column("likeliest_id", pa.array(random.integers(0, 11, len(targets)), pa.uint32()))
    path = tmp_path_factory.mktemp("student") / "positions.parquet"
    pq.write_table(table.append_column("confidence", pa.array(random.random(len(targets)), pa.float32())), path)
    return path


@pytest.fixture(scope="module")
def client(folder: Path, student: Path) -> TestClient:
    return TestClient(page_app(KnowledgeStore.open(folder), hosts=HOSTS, files={"pupil": student}), base_url=HOME)


def got(client: TestClient, path: str, **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/api/{path}", params=parameters)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def parts(found: Any) -> list[dict[str, Any]]:
    """All answers to statements in an answer of the page."""
    if isinstance(found, dict) and "sql" in found:
        return [found]
    values = found.values() if isinstance(found, dict) else []
    return [answer for value in values for answer in parts(value)]


# Who is let in


@pytest.mark.parametrize("path", ["/", "/api/store", "/static/main.js", "/nothing"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "rebound.example:8816"}, 421),
        ({"host": "127.0.0.1"}, 421),
        ({"host": "127.0.0.1:8816.example"}, 421),
        ({"origin": "http://example.com"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
    ],
)
def test_what_another_site_causes_is_refused(client, path, headers, status):
    response = client.get(path, headers=headers)
    assert response.status_code == status and "error" in response.json()
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_two_hosts_are_none(client):
    assert client.get("/api/store", headers=[("host", HOSTS[0]), ("host", HOSTS[0])]).status_code == 421


def test_a_link_from_elsewhere_leads_to_the_page_and_nowhere_else(client):
    linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=linked).status_code == 200
    assert client.get("/api/store", headers=linked).status_code == 403


def test_statements_are_taken_from_the_page_alone(client):
    sql = {"sql": "SELECT 1"}
    assert client.post("/api/sql", json=sql, headers={"origin": HOME}).status_code == 200
    assert client.post("/api/sql", json=sql, headers={"origin": "http://example.com"}).status_code == 403
    assert client.post("/api/sql", content=json.dumps(sql), headers={"content-type": "text/plain"}).status_code == 400
    assert client.post("/api/sql", data={"sql": "SELECT 1"}).status_code == 400
    assert client.post("/api/sql", json=["SELECT 1"]).status_code == 400
    assert client.post("/api/sql", json={"sql": "x" * 2_000_000}).status_code == 400
    assert client.get("/api/sql", params=sql).status_code == 405


def test_nothing_is_loaded_from_elsewhere(client):
    page = client.get("/").text
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert {"/static/main.js", "/static/style.css"} <= set(files)
    seen = set()
    while files:
        name = files.pop()
        if name in seen:
            continue
        seen.add(name)
        response = client.get(name)
        assert response.status_code == 200
        files += [f"/static/{other}" for other in re.findall(r'from "\./(\w+\.js)"', response.text)]
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", response.text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", response.text)
    assert len([name for name in seen if name.endswith(".js")]) > 5
    assert client.get("/static/..%2Fapp.py").status_code == 404


def test_a_token_is_asked_for_once_and_kept_in_a_cookie_that_scripts_cannot_read(folder):
    app = page_app(KnowledgeStore.open(folder), hosts=None, authenticator=lambda token: token == TOKEN)
    client = TestClient(app, base_url="https://page.example:8443")
    assert client.get("/").status_code == client.get("/static/main.js").status_code == 200
    for path in ("/api/store", "/api/sequence?dump=small&id=0"):
        assert client.get(path).status_code == 401
    assert client.get("/api/store", params={"token": TOKEN}).status_code == 401
    assert client.post("/api/sql", json={"sql": "SELECT 1"}).status_code == 401
    assert client.post("/sign-in", json={"token": TOKEN}, headers={"origin": "https://example.com"}).status_code == 403
    response = client.post("/sign-in", json={"token": TOKEN})
    cookie = response.headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Secure", "Path=/", f"Max-Age={SESSION_SECONDS}"))
    assert TOKEN not in cookie and TOKEN not in response.text
    assert client.get("/api/store").status_code == 200
    assert (
        TestClient(app, base_url="https://page.example:8443", cookies={"knowledge-store-8443": "x"})
        .get("/api/store")
        .status_code
        == 401
    )


def test_a_wrong_token_is_refused_after_a_while(folder, monkeypatch):
    monkeypatch.setattr("knowledge_store.page.app.REFUSED_AFTER", 0)
    app = page_app(KnowledgeStore.open(folder), hosts=HOSTS, authenticator=lambda token: token == TOKEN)
    client = TestClient(app, base_url=HOME)
    for token in ("", "wrong", TOKEN[:-1], 7):
        response = client.post("/sign-in", json={"token": token})
        assert response.status_code == 401 and "set-cookie" not in response.headers
    assert client.post("/sign-in", json={"token": TOKEN}).status_code == 200


def test_a_token_that_is_taken_back_ends_its_sessions(folder):
    tokens = {TOKEN}
    app = page_app(KnowledgeStore.open(folder), hosts=HOSTS, authenticator=lambda token: token in tokens)
    client = TestClient(app, base_url=HOME)
    client.post("/sign-in", json={"token": TOKEN})
    assert client.get("/api/store").status_code == 200
    tokens.clear()
    assert client.get("/api/store").status_code == 401


def test_serve_has_the_page_for_those_who_have_a_token(folder, tmp_path):
    (tmp_path / "tokens").write_text(f"{SECRET}\n")
    config = ServeConfig((str(folder),), tmp_path / "tokens", page="127.0.0.1:0")
    server = PageServer(folder, config, TokenFile(tmp_path / "tokens"))
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.address}api/store")
        body = json.dumps({"token": SECRET}).encode()
        signing = urllib.request.Request(f"{server.address}sign-in", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(signing) as response:
            cookie = response.headers["set-cookie"].partition(";")[0]
        asking = urllib.request.Request(f"{server.address}api/store", headers={"Cookie": cookie})
        with urllib.request.urlopen(asking) as response:
            assert json.load(response)["address"] == str(folder)
    finally:
        server.close()
    for changes, sentence in (({"page": "0.0.0.0:0"}, "without TLS"), ({"page": "nowhere"}, "--page")):
        with pytest.raises(InputError, match=sentence):
            PageServer(folder, replace(config, **changes), TokenFile(tmp_path / "tokens"))


def test_a_page_for_everybody_has_a_name(folder):
    with pytest.raises(InputError, match="has to ask for a token"):
        page_app(KnowledgeStore.open(folder), hosts=None)


# What is answered


def test_every_number_is_the_answer_to_the_statement_that_is_shown(client, folder, student):
    store = KnowledgeStore.open(folder)
    found = [
        got(client, "store"),
        *(got(client, "dump", dump=dump) for dump in store.dumps),
        *(got(client, "sequences", dump=dump, page=1) for dump in store.dumps),
        *(got(client, "sequence", dump="small", id=id) for id in (0, 65536)),
        got(client, "position", dump="small", id=0, position=3),
        got(client, "position", dump="other", id=0, position=1),
    ]
    shown = [answer for one in found for answer in parts(one)]
    assert len(shown) >= 20
    for answer in shown:
        expected = store.sql(answer["sql"], files={"pupil": student})
        assert answer["columns"] == [{"name": field.name, "type": str(field.type)} for field in expected.schema]
        again = excerpt(expected.schema, expected.to_batches())
        key = (lambda rows: rows) if "ORDER BY" in answer["sql"] else (lambda rows: sorted(rows, key=repr))
        assert key(answer["rows"]) == key(again["rows"]) and not answer["more"]


def test_the_store(client, folder):
    found = got(client, "store")
    assert [row[0] for row in found["dumps"]["rows"]] == ["other", "small"]
    assert found["facts"]["other"]["columns"] == [COLUMN] and found["students"] == {"pupil": {"dump": "small"}}
    assert set(found["questions"]) == set(QUESTIONS)


def test_a_closed_dump_is_named_and_what_is_committed_meanwhile_is_seen(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "store")
    (copy / "other/commits/00002.json").rename(tmp_path / "record")
    client = TestClient(page_app(KnowledgeStore.open(copy), hosts=HOSTS), base_url=HOME)
    assert got(client, "sequences", dump="other", page=1)["total"] == 10
    (tmp_path / "record").rename(copy / "other/commits/00002.json")
    got(client, "store")
    assert got(client, "sequences", dump="other", page=1)["total"] == 15
    shutil.move(copy / "small", copy / "renamed")
    found = got(client, "store")
    assert "renamed" in found["closed"] and list(found["facts"]) == ["other"]


def test_a_damaged_dump_hides_no_other(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "store")
    (copy / "small/manifest.json").write_text("{")
    client = TestClient(page_app(KnowledgeStore.open(copy), hosts=HOSTS), base_url=HOME)
    found = got(client, "store")
    assert "damaged" in found["closed"]["small"] and [row[0] for row in found["dumps"]["rows"]] == ["other"]
    assert got(client, "dump", dump="other") and got(client, "sequence", dump="other", id=0)["tokens"]["rows"]
    assert "damaged" in client.get("/api/dump", params={"dump": "small"}).json()["error"]


def test_files_are_refused_at_the_start(folder, student, tmp_path):
    (tmp_path / "text").write_text("no Parquet")
    for files, reason in (({"positions": student}, "has a relation"), ({"pupil": tmp_path / "text"}, "cannot be read")):
        with pytest.raises(InputError, match=reason):
            page_app(KnowledgeStore.open(folder), hosts=HOSTS, files=files)


def test_pages_of_sequences_are_all_of_them_and_read_no_other_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "SEQUENCES", 4)
    expected = KnowledgeStore.open(folder).sequences("other")["sequence_id"].to_pylist()
    copy = shutil.copytree(folder, tmp_path / "store")
    client = TestClient(page_app(KnowledgeStore.open(copy), hosts=HOSTS), base_url=HOME)
    for table in ("positions", "sequences"):  # of the last shard, which the first page is not of
        (copy / f"other/{table}/00002.parquet").rename(tmp_path / table)
    assert len(got(client, "sequences", dump="other", page=1)["sequences"]["rows"]) == 4
    assert got(client, "sequence", dump="other", id=0)["after"] == 65536
    for table in ("positions", "sequences"):
        (tmp_path / table).rename(copy / f"other/{table}/00002.parquet")
    pages = [got(client, "sequences", dump="other", page=page) for page in range(1, 5)]
    assert [row[0] for page in pages for row in page["sequences"]["rows"]] == expected
    assert {page["pages"] for page in pages} == {4} and {page["total"] for page in pages} == {15}
    beginnings = {row[0]: row[1] for page in pages for row in page["beginnings"]["rows"]}
    assert sorted(beginnings) == expected and all(text.startswith("w") for text in beginnings.values())
    assert client.get("/api/sequences", params={"dump": "other", "page": 5}).status_code == 400


def test_a_long_sequence_comes_in_parts(client, monkeypatch):
    whole = got(client, "sequence", dump="small", id=0)
    monkeypatch.setattr(answers, "POSITIONS", 3)
    length = len(whole["tokens"]["rows"])
    tokens = [
        row
        for start in range(0, length, 3)
        for row in got(client, "sequence", dump="small", id=0, **{"from": start})["tokens"]["rows"]
    ]
    assert tokens == whole["tokens"]["rows"]


def test_sequences_lead_to_those_beside_them(client, folder):
    ids = KnowledgeStore.open(folder).sequences("other")["sequence_id"].to_pylist()
    found = [got(client, "sequence", dump="other", id=id) for id in ids]
    assert [one["before"] for one in found] == [None, *ids[:-1]]
    assert [one["after"] for one in found] == [*ids[1:], None]


def test_a_position_has_candidates_tail_draws_and_the_student(client):
    found = got(client, "position", dump="small", id=0, position=3)
    names = [column["name"] for column in found["prediction"]["columns"]]
    prediction = dict(zip(names, found["prediction"]["rows"][0], strict=True))
    mass = sum(row[3] for row in found["candidates"]["rows"]) + prediction["tail"]
    assert mass == pytest.approx(1, abs=1e-6)
    assert found["draws"]["rows"] and all(row[1].startswith("w") for row in found["draws"]["rows"])
    names = [column["name"] for column in found["students"]["pupil"]["columns"]]
    assert names == ["probability", "kl", "likeliest_id", "confidence", "likeliest_text"]
    [row] = found["students"]["pupil"]["rows"]
    assert row[4] == f"w{row[2]}"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("dump?dump=none", "has no dump 'none'"),
        ("dump", "lacks 'dump'"),
        ("sequence?dump=small&id=7", "has no sequence 7"),
        ("sequence?dump=small&id=-7", "must be a whole number"),
        ("sequence?dump=small&id=99999999999999999999", "must be a whole number"),
        ("sequence?dump=small' OR 1=1 --&id=0", "has no dump"),
        ("position?dump=small&id=0&position=x", "must be a whole number"),
        ("question?dump=small&name=none", "there is no question 'none'"),
        ("question?dump=small&name=column&column=none", "has no column 'none'"),
        ("question?dump=small&name=student&other=none", "no student's file 'none'"),
        ("question?dump=small&name=text", "takes text"),
    ],
)
def test_what_cannot_be_answered_is_said(client, path, sentence):
    response = client.get(f"/api/{path}")
    assert response.status_code == 400 and sentence in response.json()["error"]


def test_damage_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "store")
    path = copy / "small/positions/00000.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    client = TestClient(page_app(KnowledgeStore.open(copy), hosts=HOSTS), base_url=HOME)
    response = client.get("/api/sequence", params={"dump": "small", "id": 0})
    assert response.status_code == 500 and "is damaged" in response.json()["error"]
    assert got(client, "sequence", dump="other", id=0)["tokens"]["rows"]


# Questions


def asked_of(name: str) -> Asked:
    needs = QUESTIONS[name].needs
    other = "pupil" if "student" in needs else "small" if "dumps" in needs else ""
    dump = "small" if "student" in needs else "other"
    column = COLUMN if "column" in needs else ""
    return Asked(dump, False, column, "W1" if "positions" in needs else "<I>", other, ("kl", "token_id"))


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_answered(name, client, folder, student):
    about = asked_of(name)
    sql = got(client, "question", name=name, dump=about.dump, column=about.column, text=about.text, other=about.other)["sql"]
    assert sql == statement(name, about) or name == "student-documents"
    store = KnowledgeStore.open(folder)
    rows = store.sql(sql.replace("HAVING count(*) >= 20", ""), files={"pupil": student}).to_pylist()
    assert rows or name == "teachers"
    if "sequence_id" in rows[:1][0] if rows else False:
        ids = set(store.sequences(about.dump)["sequence_id"].to_pylist())
        assert all(row["dump"] == about.dump and row["sequence_id"] in ids for row in rows)


def test_worst_positions_come_first(folder, student):
    store = KnowledgeStore.open(folder)
    worst = store.sql(statement("student", asked_of("student")), files={"pupil": student}).to_pylist()
    assert worst[0]["kl"] == pytest.approx(max(pq.read_table(student)["kl"].to_pylist()), abs=1e-3)
    surprised = store.sql(statement("surprised", asked_of("surprised")))["surprise"].to_pylist()
    least = store.sql("SELECT min(token_logprob) AS least FROM positions WHERE dump = 'other' AND is_target")["least"][
        0
    ].as_py()
    assert surprised == sorted(surprised, reverse=True) and surprised[0] == pytest.approx(-least, abs=0.01)


def test_a_student_of_another_dump_of_the_name_is_not_shown(folder, student, tmp_path):
    judged = pq.read_table(student)
    changed = judged.set_column(3, "token_id", pa.array([token + 1 for token in judged["token_id"].to_pylist()], pa.uint32()))
    pq.write_table(changed, tmp_path / "old.parquet")
    store = KnowledgeStore.open(folder)
    assert not store.sql(statement("student", asked_of("student")), files={"pupil": tmp_path / "old.parquet"}).num_rows


def test_two_teachers_are_compared_where_they_read_the_same(tmp_path):
    one, other = random_sequences(0, 3), random_sequences(1, 3)
    for arrays, as_read in zip(other[:2], one, strict=False):  # the second teacher read two of these texts, and not the third
        arrays.update({name: as_read[name] for name in as_read})
        arrays["tail_logprob"] = as_read["tail_logprob"]
    for dump, knowledge in (("one", one), ("other", other)):
        writer = DumpWriter.open(tmp_path, make_manifest(dump, shards=1), tokens_table(words(11), words(11)))
        commit(writer, 0, knowledge)
    rows = KnowledgeStore.open(tmp_path).sql(statement("teachers", Asked("one", other="other"))).to_pylist()
    assert {row["sequence_id"] for row in rows} == {sequence_id(0, 0), sequence_id(1, 0)}


def test_what_surprised_is_bounded_where_a_token_is_unknown(tmp_path):
    knowledge = random_sequences(2, 1, longest=60)
    while len(knowledge[0]["token_id"]) < 40:
        knowledge = random_sequences(len(knowledge[0]["token_id"]), 1, longest=60)
    [arrays] = knowledge
    true = -arrays["token_logprob"][1:].mean()
    unknown = (arrays["token_id"][:, None] != arrays["candidate_ids"]).all(axis=1)
    arrays["token_logprob"] = np.where(unknown, np.nan, arrays["token_logprob"]).astype(np.float32)
    manifest = make_manifest("small", shards=1)
    manifest = replace(manifest, kinds={"positions": {**manifest.kinds["positions"], "unknown_tokens": True}})
    commit(DumpWriter.open(tmp_path, manifest, tokens_table(words(11), words(11))), 0, knowledge)
    client = TestClient(page_app(KnowledgeStore.open(tmp_path), hosts=HOSTS), base_url=HOME)
    sql = got(client, "question", name="garbled", dump="small")["sql"]
    [row] = KnowledgeStore.open(tmp_path).sql(sql).to_pylist()
    known = -np.nanmean(arrays["token_logprob"][1:])
    assert row["targets"] == len(unknown) - 1 and known < row["surprise_at_least"] <= true + 0.07  # half a step


def test_a_text_is_found_across_tokens_and_quoted(folder):
    store = KnowledgeStore.open(folder)
    [row] = store.sql(
        "SELECT string_agg(token_text, '' ORDER BY position) AS text FROM positions WHERE dump = 'other' AND sequence_id = 0"
    ).to_pylist()
    found = store.sql(statement("text", Asked("other", text=row["text"].upper()))).to_pylist()
    assert 0 in [one["sequence_id"] for one in found] and row["text"] in found[0]["text"]
    assert not store.sql(statement("text", Asked("other", text="it's"))).num_rows


# SQL


def lines(client: TestClient, sql: str) -> list[dict[str, Any]]:
    response = client.post("/api/sql", json={"sql": sql})
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


def test_sql_is_answered_in_a_process_of_its_own(client):
    *_, last = lines(
        client,
        "SELECT count(*) AS targets, (SELECT count(*) FROM pupil) AS judged FROM positions WHERE is_target AND dump = 'small'",
    )
    assert last["answer"]["rows"][0][0] == last["answer"]["rows"][0][1] > 0 and last["seconds"] > 0


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("DROP TABLE positions", "only a SELECT statement"),
        ("SELECT * FROM '/etc/passwd'", "was not run"),
        ("SELECT 1; SELECT 2", "one SELECT"),
    ],
)
def test_sql_can_do_nothing_else(client, sql, sentence):
    *_, last = lines(client, sql)
    assert sentence in last["error"]


def test_a_statement_can_be_stopped_and_tells_how_far_it_is(folder):
    stopped, heard = threading.Event(), []

    def hear(read: int, of: int) -> None:
        heard.append((read, of))
        stopped.set()

    endless = "SELECT count(*) FROM positions, range(1000000000) AS one, range(1000000) AS other WHERE one.range % 7 = token_id"
    started = time.monotonic()
    assert isolated_excerpt(str(folder), Statement(endless, timeout=300), stopped, hear) is None
    assert heard and time.monotonic() - started < 200
    read, of = heard[0]
    assert 0 <= read <= of


def test_an_error_is_not_taken_for_a_stop(folder):
    with pytest.raises(QueryError, match="does not exist"):
        isolated_excerpt(str(folder), Statement("SELECT * FROM nothing"), threading.Event(), lambda read, of: None)


def test_an_excerpt_is_cut_and_is_json():
    table = pa.table(
        {
            "text": ["x" * 5000, None, "y"],
            "list": [[1.0] * 500, [float("inf")], []],
            "number": pa.array([2**63, 2**53, 1], pa.uint64()),
            "float": [float("nan"), float("-inf"), 0.5],
            "nested": [{"a": [b"\xff"]}, None, None],
        }
    )
    found = excerpt(table.schema, table.to_batches(), 2)
    json.dumps(found, allow_nan=False)
    assert found["more"] and len(found["rows"]) == 2
    text, numbers, number, value, _ = found["rows"][0]
    assert len(text) == 2001 and len(numbers) == 65 and number == str(2**63) and value == "NaN"
    assert found["rows"][1][1] == ["∞"] and found["rows"][1][2:4] == [2**53, "−∞"]
    assert not excerpt(table.schema, table.to_batches(), 3)["more"]


# The command


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "192.0.2.1:8816", "example.com:80", "127.0.0.1", "127.0.0.1:x", ":8816", "[::]:0"]
)
def test_the_page_is_for_this_machine_alone(address):
    with pytest.raises(InputError):
        listen(address)


def test_addresses():
    assert parse_address("[::1]:80") == ("::1", 80) and "localhost" in host_names(80) and "localhost" not in host_names(8816)
    with listen("127.0.0.1:0") as listening, pytest.raises(InputError, match="give another port"):
        listen(f"127.0.0.1:{listening.getsockname()[1]}")


def test_browse_serves_until_it_is_told_to_end(folder):
    command = [sys.executable, "-m", "knowledge_store.cli", "browse", str(folder), "--bind", "127.0.0.1:0", "--no-open"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())
        assert address
        with urllib.request.urlopen(f"{address[0]}api/store") as response:
            assert json.load(response)["address"] == str(folder)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0 and "Traceback" not in process.stderr.read()


def test_the_browser_is_opened_where_there_is_one(folder, monkeypatch):
    opened: list[str] = []
    before = set(threading.enumerate())

    def wait_for_the_browser(server, sockets) -> None:
        for thread in set(threading.enumerate()) - before:
            thread.join()

    monkeypatch.setattr("knowledge_store.page.browse.webbrowser.open", opened.append)
    monkeypatch.setattr("knowledge_store.page.browse.uvicorn.Server.run", wait_for_the_browser)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    store = KnowledgeStore.open(folder)
    for opens in (True, False):
        with listen("127.0.0.1:0") as listening:
            browse(store, listening, {}, lambda address: None, opens)
    assert len(opened) == 1 and opened[0].startswith("http://127.0.0.1:")
