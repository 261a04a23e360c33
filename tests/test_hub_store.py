"""Stores in data sets of the hub, read from a small server of the hub's language on this machine."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from stores import write_store
from test_corpus_sources import connect
from test_storage import everything

from knowledge_store import DamageError, InputError, KnowledgeStore, StoreError, verify
from knowledge_store.storage import open_storage

COMMIT = "c" * 40
PAGE = 7  # files in an answer to a listing
TOKEN = "hf_5ecret"


class Hub:
    """Two commits of one data set, `keeper/lamps`."""

    def __init__(self) -> None:
        self.commits = {COMMIT: {}, "0" * 40: {}}
        self.names = {"main": COMMIT, "refs/old": "0" * 40}
        self.requests: Counter[str] = Counter()
        self.failing = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                hub.answer(self, unquote(url.path), parse_qs(url.query))

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, list[str]]) -> None:
        status, body, headers = self.found(path, query, request.headers.get("Range"))
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def found(self, path: str, query: dict[str, list[str]], range_asked: str | None) -> tuple[int, bytes, dict[str, str]]:
        if self.failing:
            self.failing -= 1
            return 503, b"", {}
        repository, _, rest = path.removeprefix("/api").removeprefix("/datasets/").partition("/lamps/")
        what, _, rest = rest.partition("/")
        self.requests[what] += what != ""  # huggingface_hub has questions of its own
        if repository != "keeper":
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if what == "revision":
            commit = self.names.get(rest, rest)
            if commit not in self.commits:
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            return 200, json.dumps({"id": "keeper/lamps", "sha": commit}).encode(), {}
        commit, _, rest = rest.partition("/")
        files = self.commits[commit]
        if what == "tree":
            names = [name for name in sorted(files) if name.startswith(f"{rest}/" if rest else "")]
            if not names:
                return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
            start = int(query.get("cursor", ["0"])[0])
            items = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
                for name in names[start : start + PAGE]
            ]
            following = f'<{self.address}{path}?cursor={start + PAGE}>; rel="next"' if len(names) > start + PAGE else ""
            return 200, json.dumps(items).encode(), {"Link": following} if following else {}
        first, last = range_asked.removeprefix("bytes=").split("-")
        return 206, files[rest][int(first) : int(last) + 1], {}


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def hub(running, tmp_path, monkeypatch) -> Hub:
    """The hub, which has a store of three shards under a path of its data set."""
    connect(monkeypatch, running.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    store = write_store(tmp_path / "local", shards=3)
    files = {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    running.commits[COMMIT] = {f"made/store/{name}": data for name, data in files.items()} | {"README.md": b"words"}
    running.requests.clear()
    return running


STORE = "hf://datasets/keeper/lamps/made/store"


def test_a_store_on_the_hub_is_read_as_in_a_folder(hub, tmp_path):
    opened = KnowledgeStore.open(STORE)
    assert +hub.requests == {"revision": 1, "tree": 2, "resolve": 5}  # store.json, the manifest and three records
    assert everything(opened) == everything(KnowledgeStore.open(tmp_path / "local"))
    assert verify(STORE).sound
    hub.requests.clear()
    assert KnowledgeStore.open(f"{STORE.replace('lamps', f'lamps@{COMMIT}')}").dumps == ("small",)
    assert hub.requests["resolve"] == 2  # the index is of the commit


def test_a_store_stays_at_the_commit_at_which_it_was_opened(hub):
    opened = KnowledgeStore.open(STORE)
    hub.names["main"] = "0" * 40
    try:
        assert pickle.loads(pickle.dumps(opened.storage)).address == f"hf://datasets/keeper/lamps@{COMMIT}/made/store"
        assert len(opened) == 12 and opened[0]["input_ids"].size
        with pytest.raises(StoreError, match="there is no store at"):
            KnowledgeStore.open(STORE)
    finally:
        hub.names["main"] = COMMIT


def test_damage_is_named(hub):
    [name] = [name for name in hub.commits[COMMIT] if name.endswith("positions/00001.parquet")]
    data = hub.commits[COMMIT][name]
    hub.commits[COMMIT][name] = data[:99] + bytes([data[99] ^ 1]) + data[100:]
    with pytest.raises(DamageError, match=r"hf://datasets/keeper/lamps@main/made/store/small/positions/00001\.parquet"):
        list(KnowledgeStore.open(STORE, cache_size=0).batches(batch_size=3))


def test_what_cannot_be_is_one_sentence_without_the_token(hub, monkeypatch):
    with pytest.raises(InputError, match="can only be read: write to a folder, and put it there by `hf upload keeper/lamps"):
        write_store(STORE)
    with pytest.raises(InputError, match="can only be read"):
        KnowledgeStore.open(STORE).remove("small")
    for text in ("hf://keeper/lamps", "hf://datasets/lamps", "hf://models/keeper/lamps", "hf://datasets/keeper/lamps?x=1"):
        with pytest.raises(InputError, match="give hf://datasets/OWNER/NAME@REVISION/PATH"):
            open_storage(text)
    for text in ("hf://datasets/other/lamps", "hf://datasets/keeper/lamps@none"):
        with pytest.raises(StoreError, match=r"there is no data set .* or HF_TOKEN is not of somebody who may read it"):
            KnowledgeStore.open(text)
    assert open_storage("hf://datasets/keeper/lamps@refs%2Fold").files("") == []
    storage = open_storage(STORE)
    storage.size("store.json")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.failing = 2
    assert len(storage.read("store.json")) == storage.size("store.json")
    hub.failing = 99
    with pytest.raises(
        StoreError, match=r"cannot read .*store\.json: the hub does not answer as it should \(HTTP 503\)"
    ) as caught:
        storage.read("store.json")
    hub.failing = 0
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
