"""`--teacher-url`: a teacher behind a vLLM server, as replies of a real one were recorded, and what may go wrong with it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from recorded_server import FOLDER, MAX_LENGTH, RecordedServer, free_port, recording, rows

from knowledge_store import KnowledgeStore, verify
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from teacher_dump import DumpConfig, dump
from teacher_dump.teachers import http
from teacher_dump.teachers.completions import Patience

QUICK = Patience(failures=4, first_wait=0.01, longest_wait=0.02)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "stories.jsonl", rows())


@pytest.fixture
def quick(monkeypatch) -> None:
    """Servers that fail are asked again at once."""
    monkeypatch.setattr(http, "PATIENCE", QUICK)


def configuration(corpus: Path, store: Path, url: str, **options) -> DumpConfig:
    options = {"max_length": MAX_LENGTH, "shard_size": 4, "batch_size": 3, **options}
    return DumpConfig(str(FOLDER), (corpus,), store, "served", teacher_url=url, **options)


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name + path.parent.name: path.read_bytes() for path in sorted(store.rglob("*.parquet"))}


@pytest.fixture(scope="module")
def served_store(tmp_path_factory, corpus) -> Path:
    """A store with the dump of the recorded server, which nobody may change."""
    store = tmp_path_factory.mktemp("served") / "store"
    with RecordedServer() as server:
        report = dump(configuration(corpus, store, server.url))
    assert report.shards == report.shards_planned == 3
    return store


def test_a_dump_of_a_server_says_that_its_tails_are_remainders_and_whose_they_are(served_store):
    assert verify(served_store).damage == []
    store = KnowledgeStore.open(served_store)
    manifest = store.manifest("served")
    parameters = positions_of(manifest)
    assert (parameters.tail, parameters.tail_entropy, str(parameters.selection)) == ("remainder", False, "top-k 5")
    teacher = manifest.teacher
    assert teacher["engine"] == "vllm-server" and teacher["engine_version"] == "0.32.0" and teacher["served_name"] == "tiny"
    assert len(teacher["fingerprint"]) == 64 and teacher["vocabulary_size"] == 408 and "files" not in teacher


def test_what_is_kept_is_what_the_server_said(served_store):
    store, replies = KnowledgeStore.open(served_store), recording()
    compared = 0
    for ordinal in range(store.sequence_count("served")):
        table, _ = store.stored(ordinal, "positions", "served")
        [choice] = replies[f"/v1/completions {table['token_id'].to_pylist()} 5"][1]["choices"]
        for row in table.filter(table["candidate_ids"].is_valid()).to_pylist():
            entry = choice["prompt_logprobs"][row["position"]]
            logprobs = {int(token): values["logprob"] for token, values in entry.items()}
            ids = row["candidate_ids"]
            assert ids == sorted(logprobs, key=lambda token: -logprobs[token])[:5]
            kept, said = np.array(row["candidate_logprobs"]), np.array([logprobs[token] for token in ids])
            # Each lies within half a step of how far it was below the first.
            np.testing.assert_allclose(kept - kept[0], said - said[0], atol=1 / 16 + 1e-5)
            odds, log_rest = row["tail_logprob"] - np.log(np.exp(kept).sum()), np.log1p(-np.exp(said).sum())
            np.testing.assert_allclose(odds, log_rest - np.log(np.exp(said).sum()), atol=1 / 16 + 1e-4)
            compared += 1
    assert compared > 300


# Of the recorded reply: what comes instead, and what is said of it.
def _choice(change):
    def fault(body):
        change(body["choices"][0])
        return body

    return fault


def _entries(change):
    return _choice(lambda choice: [change(entry) for entry in choice["prompt_logprobs"][1:]])


def _likely(entry):
    for values in entry.values():
        values["logprob"] = -1.0


FAULTS = {
    "other ids": (_choice(lambda choice: choice["prompt_token_ids"].reverse()), "about other token ids than it was given"),
    "other tokens": (
        _choice(lambda choice: choice.update(prompt_token_ids=None, prompt_logprobs=choice["prompt_logprobs"][::-1])),
        "gives no log-probabilities for position|about other token ids than it was given",
    ),
    "missing position": (_choice(lambda choice: choice["prompt_logprobs"].pop()), r"for \d+ of \d+ positions"),
    "empty position": (
        _choice(lambda choice: choice["prompt_logprobs"].__setitem__(2, None)),
        "no log-probabilities for position 2",
    ),
    "none": (
        _choice(lambda choice: choice.update(prompt_logprobs=None)),
        "gives no log-probabilities of the prompt: only vLLM",
    ),
    "−9999": (
        _entries(lambda entry: next(iter(entry.values())).update(logprob=-9999.0)),
        "gives −9999, a probability of 0, at",
    ),
    "NaN": (
        _entries(lambda entry: next(iter(entry.values())).update(logprob=float("nan"))),
        "a log-probability that is no number",
    ),
    "a sum above one": (_entries(_likely), r"probabilities that sum to more than 1\.001 at position \d+ of sequence \d+"),
    "too few": (_entries(lambda entry: entry.pop(list(entry)[-1])), "fewer log-probabilities than the 5 that it was asked for"),
    "no number": (
        _entries(lambda entry: next(iter(entry.values())).update(logprob="x")),
        "log-probabilities that cannot be read",
    ),
    "no completion": (lambda body: {"object": "chat.completion"}, "answers with what is no completion"),
    "no JSON": (lambda body: (200, b"<html>"), "what is no JSON"),
    "a refused key": (lambda body: (401, {"error": "Unauthorized"}), "wants a key: put it into VLLM_API_KEY"),
    "no such model": (lambda body: (404, {"error": {"message": "no model `tiny`."}}), r"HTTP status 404 \(no model `tiny`\)"),
    "too many": (
        lambda body: (400, {"error": {"message": "Requested prompt logprobs of 5, which is greater than max allowed: 2"}}),
        "does not give 5 log-probabilities a position .*: start it with --max-logprobs 5",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_replies_that_cannot_be_used_are_refused_by_name(tmp_path, corpus, name, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    fault, sentence = FAULTS[name]
    with RecordedServer() as server:
        server.fault = lambda body: body if server.requests == 1 else fault(body)  # the first is of the fingerprint
        with pytest.raises(InputError, match=sentence):
            dump(configuration(corpus, tmp_path / "store", server.url))
    assert not list(tmp_path.glob("store/served/commits/*"))


@pytest.mark.parametrize("failure", [(500, {}), (429, {"error": "busy"}), (503, b"<html>"), "cut"], ids=str)
def test_failures_that_pass_leave_the_dump_as_it_is(tmp_path, corpus, served_store, failure, quick):
    with RecordedServer() as server:
        failed = set()

        def fault(body):
            # Each sequence fails once.
            if (first := str(body["choices"][0]["prompt_token_ids"])) in failed:
                return body
            failed.add(first)
            return "x" * 1000 if failure == "cut" else failure

        server.fault = fault
        dump(configuration(corpus, tmp_path / "store", server.url))
    assert files_of(tmp_path / "store") == files_of(served_store)


def test_a_server_that_is_killed_and_started_again_in_the_middle_of_a_shard(tmp_path, corpus, served_store):
    port = free_port()

    def serve(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).parent / "recorded_server.py"), "serve", str(port), *arguments]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
        return server

    servers = [serve("8")]
    restarted = threading.Thread(target=lambda: (servers[0].wait(), servers.append(serve())))
    restarted.start()
    try:
        dump(configuration(corpus, tmp_path / "store", f"http://127.0.0.1:{port}"))
    finally:
        restarted.join()
        for server in servers:
            server.kill()
            server.wait()
            server.stdout.close()
    assert servers[0].returncode == 1 and len(servers) == 2
    assert files_of(tmp_path / "store") == files_of(served_store)


def test_a_server_that_fails_for_good_ends_the_dump_and_the_next_run_resumes_it(tmp_path, corpus, served_store, quick):
    with RecordedServer() as server:
        # The first shard has 8 sequences, and the prompts of the fingerprint are asked before.
        server.fault = lambda body: body if server.requests <= 16 else (500, {"error": {"message": "out of memory"}})
        config = configuration(corpus, tmp_path / "store", server.url)
        with pytest.raises(InputError, match=r"failed 4 times in a row, .*HTTP status 500 \(out of memory\).* to resume"):
            dump(config)
        committed = len(list(tmp_path.glob("store/served/commits/*")))
        server.fault = None
        report = dump(config)
    assert committed == report.shards_existing > 0 and report.shards == 3 - committed > 0
    assert files_of(tmp_path / "store") == files_of(served_store)


def test_the_server_has_as_many_requests_as_are_asked_for_also_between_batches_and_shards(tmp_path, corpus):
    arrived, answered, lonely = 0, 0, []
    condition = threading.Condition()
    with RecordedServer() as server:
        total = sum(1 for key in server.replies if key.startswith("/v1/completions") and key.endswith(" 5")) - 1

        def fault(body):
            """Answer in order, and none before there are three that are not answered, as long as so many are left."""
            nonlocal arrived, answered
            if server.requests == 1:
                return body
            with condition:
                arrived += 1
                number = arrived
                condition.notify_all()
                condition.wait_for(lambda: answered == number - 1, timeout=60)
                if not condition.wait_for(lambda: arrived >= min(number + 2, total), timeout=60):
                    lonely.append(number)
                answered += 1
                condition.notify_all()
            return body

        server.fault = fault
        dump(configuration(corpus, tmp_path / "store", server.url, shard_size=2))
    assert answered == total and not lonely
