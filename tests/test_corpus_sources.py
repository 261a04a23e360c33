"""A corpus named by a data set of the hub, or a folder of `datasets`, becomes files; no connection is told at once."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_command, write_jsonl
from processes import Notes
from row_files import JSON_WRITERS

from knowledge_store.errors import InputError
from knowledge_store.reporter import Reporter
from teacher_dump import DumpConfig
from teacher_dump.corpus.documents import file_names, read_documents
from teacher_dump.corpus.hub import HubAddress, hub_address
from teacher_dump.corpus.rows import Start
from teacher_dump.corpus.sources import with_local_corpus

NOWHERE = "http://127.0.0.1:9"
COMMIT, OLDER = "a" * 40, "b" * 40


class Hub:
    """A hub of one data set, on loopback."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, "refs/convert/parquet": OLDER}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        from urllib.parse import unquote

        self.asked.append(request.path)
        path = unquote(request.path.partition("?")[0])
        listing, _, revision = path.partition("/revision/")
        status, body, headers = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if listing == "/api/datasets/keeper/lamps":
            headers = {"X-Error-Code": "RevisionNotFound"}
            if commit := self.commits.get(revision):
                files = [{"rfilename": name} for name in self.files]
                status, body = 200, json.dumps({"id": "keeper/lamps", "sha": commit, "siblings": files}).encode()
        elif path.startswith("/datasets/keeper/lamps/resolve/"):
            commit, _, name = path.removeprefix("/datasets/keeper/lamps/resolve/").partition("/")
            status, body = 200, self.files[name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    import huggingface_hub

    served = Hub()
    threading.Thread(target=served.server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    connect(monkeypatch, served.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    huggingface_hub.utils.disable_progress_bars()
    yield served
    huggingface_hub.utils.enable_progress_bars()
    served.server.shutdown()
    served.server.server_close()


def connect(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let the hub's client ask at an address."""
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)


def local(corpus: str, reporter: Reporter | None = None) -> DumpConfig:
    return with_local_corpus(DumpConfig("teacher", corpus, "store"), reporter=reporter or Reporter())


def texts(config: DumpConfig) -> list[str | None]:
    return [document.text for document in read_documents(config.corpus, Start(0, 0, 1, 0, 0), 1000)]


def test_a_data_set_of_the_hub_is_downloaded_once_and_read_as_files(hub, tmp_path, monkeypatch):
    for number in range(2):
        write_jsonl(tmp_path / "one.jsonl", [{"text": f"row {number}"}])
        hub.files[f"data/train-0000{number}-of-00002.jsonl"] = (tmp_path / "one.jsonl").read_bytes()
    hub.files["README.md"] = b"words"
    config = local("hf://datasets/keeper/lamps")
    assert texts(config) == ["row 0", "row 1"]
    assert config.dump_name == DumpConfig("teacher", "hf://datasets/keeper/lamps", "store").dump_name == "teacher-lamps"
    assert all(f"/snapshots/{COMMIT}/data/" in str(path) for path in config.corpus)
    assert file_names(config.corpus) == [f"keeper/lamps@{COMMIT}/data/train-0000{number}-of-00002.jsonl" for number in range(2)]
    asked = len(hub.asked)
    assert local("hf://datasets/keeper/lamps").corpus == config.corpus
    assert len(hub.asked) == asked + 1  # what `main` is now
    connect(monkeypatch, NOWHERE)
    notes = Notes()
    assert local("hf://datasets/keeper/lamps", notes).corpus == config.corpus
    assert notes.notes == [
        f"hf://datasets/keeper/lamps@main is taken as it was last seen, at commit {COMMIT}: the hub at {NOWHERE} cannot be"
        " reached (ConnectError)"
    ]
    with pytest.raises(InputError, match=r"@v1 cannot be read: the hub at .* cannot be reached"):
        local("hf://datasets/keeper/lamps@v1")


def test_a_download_that_was_not_finished_is_no_smaller_corpus(hub, tmp_path, monkeypatch):
    hub.files |= {f"train-{number}.jsonl": b'{"text": "x"}\n' for number in range(3)}
    first = local("hf://datasets/keeper/lamps/train-1.jsonl")
    assert [path.name for path in first.corpus] == ["train-1.jsonl"]
    connect(monkeypatch, NOWHERE)
    with pytest.raises(InputError, match=r"2 of its 3 files are not in the hub's cache, and the hub at .* cannot be reached"):
        local("hf://datasets/keeper/lamps")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "hf://datasets/keeper/lamps",
            r"several sorts of files: name one, as in '.*@main/test.jsonl', of test.jsonl, train-\*",
        ),
        ("hf://datasets/keeper/lamps/nothing", r"names no file that can be read: it has test.jsonl, train-\*.parquet"),
        ("hf://datasets/keeper/lamps@v9", "the data set has no revision v9"),
        ("hf://datasets/keeper/oil", "the hub has no data set of that name that can be read from here"),
        ("hf://keeper/lamps", "hf://keeper/lamps is not the address of a data set: give hf://datasets/OWNER/NAME"),
        ("hf://datasets/lamps", "hf://datasets/lamps is not the address of a data set"),
    ],
)
def test_addresses_that_cannot_be_meant_say_what_can(hub, address, message):
    hub.files |= {"test.jsonl": b"", "train-00000-of-00002.parquet": b"", "train-00001-of-00002.parquet": b"", "a.csv": b""}
    with pytest.raises(InputError, match=message):
        local(address)


def test_patterns_folders_and_revisions_choose_files(hub):
    hub.files |= dict.fromkeys(("data/b-1.jsonl", "data/b-0.jsonl", "data/c.jsonl", "other/d.json"), b'{"text": "x"}\n')

    def names(address: str) -> list[str]:
        return [path.name for path in local(address).corpus]

    assert names("hf://datasets/keeper/lamps/data/b-*") == ["b-0.jsonl", "b-1.jsonl"]
    assert names("hf://datasets/keeper/lamps/*.json*") == ["b-0.jsonl", "b-1.jsonl", "c.jsonl", "d.json"]
    assert names("hf://datasets/keeper/lamps/other") == ["d.json"]
    assert f"/snapshots/{OLDER}/" in str(local("hf://datasets/keeper/lamps@v1/other").corpus[0])
    assert hub_address(Path("hf://datasets/keeper/lamps@refs/convert/parquet/default/*")) == HubAddress(
        "keeper/lamps", "refs/convert/parquet", "default/*"
    )
    assert hub_address(Path("hf://datasets/keeper/lamps@refs%2Fpr%2F1")) == HubAddress("keeper/lamps", "refs/pr/1", "")
    assert hub_address(Path("data/hf.jsonl")) is None


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": NOWHERE}, f"the hub at {NOWHERE} cannot be reached (ConnectError)"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps the hub from being asked"),
    ],
)
def test_without_a_connection_that_is_one_line_and_no_second_try(environment, reason, teacher_folder, tmp_path, monkeypatch):
    for name, value in {**environment, "HF_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    # Whoever tries again waits before that.
    no_waiting = "import time\ndef sleep(seconds):\n    raise SystemError('waited')\ntime.sleep = sleep\n"
    (tmp_path / "sitecustomize.py").write_text(no_waiting)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    done = run_command("teacher_dump", "run", "store", "--teacher", teacher_folder, "--corpus", "hf://datasets/keeper/lamps")
    known = "what it holds is not known from an earlier run"
    message = f"Error: hf://datasets/keeper/lamps@main cannot be read: {reason}, and {known}\n"
    assert (done.returncode, done.stderr) == (2, message)


# --- folders of `datasets` ------------------------------------------------------------------------------------------------


def test_a_folder_that_datasets_saved_is_read_in_order(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"text": f"row {number}"} for number in range(25)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved", num_shards=12)
    config = local(str(tmp_path / "saved"))
    assert texts(config) == [row["text"] for row in rows] and len(config.corpus) == 12
    assert config.dump_name == "teacher-saved"
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"splits has several splits: name the folder of one, as in .*splits/train"):
        local(str(tmp_path / "splits"))
    assert texts(local(str(tmp_path / "splits/test"))) == [row["text"] for row in rows]
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(InputError, match="saved cannot be read as a folder of `datasets`"):
        local(str(tmp_path / "saved"))


def test_local_files_stay_as_they_are(tmp_path):
    JSON_WRITERS[".jsonl"](tmp_path / "a.jsonl", [{"text": "x"}])
    config = DumpConfig("teacher", tmp_path / "a.jsonl", "store")
    assert with_local_corpus(config) is config
    with pytest.raises(InputError, match="there is no file"):
        with_local_corpus(replace(config, corpus=(tmp_path / "b.jsonl",)))
