"""`--teacher-url`: a teacher behind a vLLM server, as replies of a real one were recorded, and what may go wrong with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from recorded_server import FOLDER, MAX_LENGTH, RecordedServer, free_port, recording, rows, served_model
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore, verify
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.kinds.positions import PositionsParameters, positions_of
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump import (
    CalibrateConfig,
    CheckConfig,
    DumpConfig,
    EstimateConfig,
    RunConfig,
    append,
    calibrate,
    check,
    dump,
    estimate,
    repair,
)
from teacher_dump.cli import app
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.likeliest import candidates_of
from teacher_dump.extraction.positions import PositionsOptions, of_likeliest
from teacher_dump.teachers import http
from teacher_dump.teachers.completions import Patience, server_address
from teacher_dump.teachers.protocol import Likeliest

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
    "a token that is none": (
        _entries(lambda entry: entry.update({"408": max(entry.values(), key=lambda values: values["logprob"])})),
        "gives a token beyond its vocabulary, which has 408 by its config.json, at",
    ),
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


def test_another_model_under_the_same_name_ends_the_dump_in_the_middle(tmp_path, corpus, served_store):
    """What it answered is not kept, and the first one goes on."""
    with RecordedServer() as server:
        swap, exchange, shards = _entries(_swap(2.0)), _entries(_exchange), tmp_path / "store/served/commits"

        # As if the server had been started again between two requests, of which none fails.
        def fault(body):
            if not list(shards.glob("*")):
                return body
            return (swap if len(body["choices"][0]["prompt_token_ids"]) == 65 else exchange)(body)

        server.fault = fault
        config = configuration(corpus, tmp_path / "store", server.url)
        with pytest.raises(InputError, match="answers to fixed prompts as another model than at the start"):
            dump(config)
        committed = len(list(shards.glob("*")))
        server.fault = None
        assert dump(config).shards == 3 - committed > 0
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
            if len(body["choices"][0]["prompt_token_ids"]) == 65:  # of the fingerprint
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"/version": {"version": "0.33.0"}}, r"engine_version.* was 0\.32\.0 and is now 0\.33\.0"),
        ({"/v1/models": {"data": [{"id": "other", "owned_by": "vllm", "max_model_len": 256}]}}, "is now other"),
        ("other answers", "answers to fixed prompts are others"),
    ],
    ids=["version", "name", "fingerprint"],
)
def test_another_server_does_not_go_on_with_a_dump(tmp_path, corpus, served_store, change, sentence):
    store = shutil.copytree(served_store, tmp_path / "store")
    with RecordedServer() as server:
        if isinstance(change, dict):
            for path, body in change.items():
                server.replies[path] = (200, body)
            # The name of a model is in no recorded key.
        else:
            server.fault = _entries(_swap(2.0))
        with pytest.raises(MismatchError, match=sentence):
            dump(configuration(corpus, store, server.url))


def _swap(nats: float):
    """The second likeliest token becomes the likeliest, so far above the other."""

    def change(entry):
        first, second = sorted(entry.values(), key=lambda values: -values["logprob"])[:2]
        second["logprob"] = first["logprob"] + nats

    return change


def _exchange(entry):
    """The two likeliest tokens change places."""
    first, second = sorted(entry.values(), key=lambda values: -values["logprob"])[:2]
    first["logprob"], second["logprob"] = second["logprob"], first["logprob"]


def test_a_server_that_takes_longer_sequences_now_is_no_other_teacher(tmp_path, corpus, served_store):
    store = shutil.copytree(served_store, tmp_path / "store")
    (store / "served/commits/00001.json").unlink()
    with RecordedServer() as server:
        server.replies["/v1/models"][1]["data"][0]["max_model_len"] = 512
        assert dump(configuration(corpus, store, server.url)).shards == 1
    assert KnowledgeStore.open(store).manifest("served").teacher["max_positions"] == 255
    assert files_of(store) == files_of(served_store)


def test_numeric_noise_in_the_answers_to_fixed_prompts_makes_no_other_teacher(tmp_path, corpus, served_store):
    store = shutil.copytree(served_store, tmp_path / "store")
    with RecordedServer() as server:
        server.fault = _entries(_swap(0.01))
        report = dump(configuration(corpus, store, server.url))
    assert report.shards_existing == report.shards_planned


def test_a_dump_of_a_server_is_resumed_by_a_server(tmp_path, corpus, served_store, teacher_folder, loaded_teacher):
    config = DumpConfig(str(FOLDER), (corpus,), served_store, "served", max_length=MAX_LENGTH, shard_size=4)
    with pytest.raises(MismatchError, match=r"was made by a server, and --teacher-url is missing. .* that serves tiny"):
        dump(config, teacher=loaded_teacher)
    local = DumpConfig(str(teacher_folder), (corpus,), tmp_path / "local", "served", max_length=MAX_LENGTH)
    dump(local, teacher=loaded_teacher)
    with pytest.raises(MismatchError, match=r"was made by transformers, and --teacher-url is given now. Leave it out"):
        dump(configuration(corpus, tmp_path / "local", "http://127.0.0.1:1"))


def test_the_key_comes_from_the_environment_and_is_never_shown(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "open-sesame")
    arguments = ["run", str(tmp_path / "store"), "--teacher", str(FOLDER), "--corpus", str(corpus), "--max-length", "40"]
    with RecordedServer() as server:
        done = CliRunner().invoke(app, [*arguments, "--teacher-url", server.url])
        assert done.exit_code == 0 and "neither draws nor the entropy of tails are kept" in " ".join(done.output.split())
        assert {headers["Authorization"] for headers in server.seen} == {"Bearer open-sesame"}
        server.fault = lambda body: (401, {"error": "the key open-sesame is wrong"})
        refused = CliRunner().invoke(app, [*arguments, "--name", "other", "--teacher-url", server.url])
        server.fault = lambda body: (404, {"error": {"message": "no open-sesame here"}})
        missing = CliRunner().invoke(app, [*arguments, "--name", "other", "--teacher-url", server.url])
    assert refused.exit_code == missing.exit_code == 2
    assert "refuses the key in VLLM_API_KEY" in " ".join(refused.output.split())
    assert "open-sesame" not in done.output + refused.output + missing.output
    assert not any(b"open-sesame" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:8000/v1/chat/completions", "is a chat endpoint, which takes messages"),
        ("http://me:sesame@host/v1", "put the server's key into VLLM_API_KEY"),
        ("http://host/v1?api_key=sesame", "put the server's key into VLLM_API_KEY"),
        ("ftp://host", "is no server's address: give one such as"),
        ("localhost:8000", "is no server's address"),
        ("http://host:many", "is no server's address"),
    ],
)
def test_addresses_that_are_none_are_refused(url, sentence):
    with pytest.raises(InputError, match=sentence) as refusal:
        server_address(url)
    assert "sesame" not in str(refusal.value)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_an_address_may_name_the_interface(ending):
    assert server_address(f"http://host:8000/llama{ending}") == "http://host:8000/llama"


def _models(owner: str, **more):
    return {"/v1/models": (200, {"data": [{"id": "tiny", "owned_by": owner, **more}]})}


@pytest.mark.parametrize(
    ("replies", "options", "sentence"),
    [
        (_models("llamacpp"), {}, "llama.cpp's server, which gives no log-probabilities of a prompt: load its GGUF file here"),
        (_models("library"), {}, "Ollama's, which gives no log-probabilities"),
        (_models("sglang"), {}, "not vLLM's .its models are owned by 'sglang'.*serve the model with vLLM"),
        (_models("vllm", max_model_len=40), {}, "takes 39 tokens and one more .* start the server with --max-model-len 41"),
        (
            {"/v1/models": (200, {"data": [{"id": name, "root": name, "owned_by": "vllm"} for name in "ab"]})},
            {},
            "serves a, b:",
        ),
        ({"/v1/models": (404, {})}, {}, "refuses /v1/models with HTTP status 404: give the address of a vLLM server"),
        ({"/v1/models": (500, {})}, {}, r"does not answer \(HTTP status 500\): start it, or correct --teacher-url"),
        ({"/version": (200, {})}, {}, "does not say its version"),
        (
            {},
            {"kinds": ("positions", "vectors")},
            "kind 'vectors' needs hidden states, which a teacher of --teacher-url cannot",
        ),
        ({}, {"selection": "threshold"}, "--selection threshold needs whole distributions, .* use --selection top-k or top-p"),
        ({}, {"draw_weight": 0.1}, "--draw-weight 0.1 needs whole distributions, .* leave it out"),
        ({}, {"draw_seed": 3}, "--draw-seed needs whole distributions"),
        ({}, {"dtype": "float32"}, "--dtype does not go with --teacher-url: the server has loaded the teacher already"),
        ({}, {"engine": "transformers"}, "--engine runs the teacher here, and --teacher-url asks one"),
    ],
    ids=str,
)
def test_what_cannot_be_the_teacher_is_refused_before_anything_is_written(tmp_path, corpus, replies, options, sentence):
    with RecordedServer() as server:
        server.replies.update(replies)
        with pytest.raises(InputError, match=sentence):
            dump(configuration(corpus, tmp_path / "store", server.url, **options))
    assert not (tmp_path / "store").exists()


def test_a_temperature_is_neither_used_nor_fitted_with_likeliest_tokens_alone(tmp_path, corpus):
    with pytest.raises(InputError, match="--calibration needs whole distributions"):
        of_likeliest(PositionsOptions(calibration=tmp_path / "c.json"))
    config = CalibrateConfig(
        teacher=str(FOLDER),
        corpus=(corpus,),
        output=tmp_path / "c.json",
        teacher_url="http://127.0.0.1:1",
        max_length=MAX_LENGTH,
    )
    with pytest.raises(InputError, match="a temperature is fitted on whole distributions: load the teacher here"):
        calibrate(config)


def test_a_server_that_is_not_there_is_refused_at_once(tmp_path, corpus):
    with pytest.raises(InputError, match=r"does not answer \(.*\): start it, or correct --teacher-url"):
        dump(configuration(corpus, tmp_path / "store", f"http://127.0.0.1:{free_port()}"))


def test_a_folder_with_another_tokenizer_or_none_is_refused(tmp_path, corpus, teacher_folder):
    with RecordedServer() as server:
        server.replies = {
            key: (status, {"tokens": [1, 2]}) if key.startswith("/tokenize") else (status, body)
            for key, (status, body) in server.replies.items()
        }
        with pytest.raises(InputError, match=r"the tokenizer of tiny at .* makes other tokens of a text"):
            dump(configuration(corpus, tmp_path / "store", server.url))
    shutil.copy(FOLDER / "config.json", tmp_path)
    with pytest.raises(InputError, match="has no tokenizer"):
        dump(replace(configuration(corpus, tmp_path / "store", server.url), teacher=str(tmp_path)))


def test_top_p_keeps_what_reaches_it(tmp_path, corpus):
    with RecordedServer() as server:
        dump(configuration(corpus, tmp_path / "store", server.url, selection="top-p", top_p=0.6, max_k=8))
    assert verify(tmp_path / "store").damage == []
    sizes = KnowledgeStore.open(tmp_path / "store").sql("SELECT len(candidate_ids) AS k FROM positions WHERE is_target")["k"]
    assert len(set(sizes.to_pylist())) > 3


def test_an_estimate_and_a_repair_and_the_next_dump_of_a_family(tmp_path, corpus, served_store):
    store = shutil.copytree(served_store, tmp_path / "store")
    with RecordedServer() as server:
        config = configuration(corpus, store, server.url)
        estimated = estimate(EstimateConfig(**{field.name: getattr(config, field.name) for field in fields(EstimateConfig)}))
        assert estimated.bytes and "top-5 coverage" in estimated.figures and "top-16 coverage" not in estimated.figures
        (store / "served/positions/00001.parquet").write_bytes(b"damaged")
        assert repair(config).shards == 1
        assert files_of(store) == files_of(served_store)
        following = write_jsonl(tmp_path / "next.jsonl", rows()[:4])
        appended = RunConfig(
            teacher=str(FOLDER), corpus=(following,), store=store, append="served", teacher_url=server.url, batch_size=3
        )
        with pytest.raises(InputError, match=r"made by vllm-server, .* give its --teacher-url"):
            append(replace(appended, teacher_url=None))
        assert append(appended).dump == "served-2"
    assert KnowledgeStore.open(store).manifest("served-2").kinds == KnowledgeStore.open(store).manifest("served").kinds


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory) -> Path:
    """The teacher that was served, with its weights."""
    folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("weights") / "tiny")
    served_model().save_pretrained(folder)
    return folder


def test_transformers_judges_what_a_server_said(served_store, weights_folder, teacher_folder):
    agreement = check(CheckConfig(teacher=str(weights_folder), store=served_store, dump="served", device="cpu"))["positions"]
    assert agreement.agrees and agreement.positions > 300
    assert agreement.differences["candidates"].quantiles[-1] < 1e-4 and agreement.changed_top_1 == 0
    assert any("below e^-9 it is not compared" in note for note in agreement.notes)


def test_a_server_judges_what_transformers_said(tmp_path, corpus, weights_folder):
    options = {"max_length": MAX_LENGTH, "shard_size": 4, "device": "cpu", "top_k": 8}
    dump(DumpConfig(str(weights_folder), (corpus,), tmp_path / "store", "local", **options))
    with RecordedServer() as server:
        config = CheckConfig(teacher=str(FOLDER), store=tmp_path / "store", dump="local", teacher_url=server.url, batch_size=4)
        agreement = check(config)["positions"]
        assert agreement.agrees and agreement.moved_draws is None and agreement.differences["tail"].quantiles[-1] < 1e-3
        server.fault = _entries(_scale)
        assert check(config)["positions"].verdict == "another teacher"


def _scale(entry):
    """A teacher that is more certain of everything."""
    for values in entry.values():
        values["logprob"] *= 2.5


def test_what_is_kept_of_likeliest_tokens_is_what_is_kept_of_whole_distributions():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (200, 50))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)
    token_ids = generator.integers(0, 50, 200)
    own = logprobs[np.arange(200), token_ids]
    for selection in (Selection("top-k", 5), Selection("top-p", 8, p=0.7), Selection("top-k", 50)):
        width = selection.candidates
        answers = Likeliest(ids[:, :width], np.take_along_axis(logprobs, ids[:, :width], axis=1), token_ids, own)
        whole = knowledge_of(torch.from_numpy(logits).float(), torch.from_numpy(token_ids), selection)
        for name, values in candidates_of(answers, selection, 50).items():
            expected = whole[name].numpy()
            if name == "candidate_ids":
                present = whole["candidate_logprobs"].numpy() > -np.inf
                np.testing.assert_array_equal(np.where(present, values, 0), np.where(present, expected, 0))
            else:
                np.testing.assert_allclose(values, expected, atol=2e-3)


def test_a_remainder_is_kept_above_its_floor_and_above_a_token_of_it():
    answers = Likeliest(
        np.array([[1, 2]] * 3), np.log([[0.7, 0.3], [0.7, 0.3], [0.6, 0.4004]]), np.array([1, 3, 1]), np.log([0.7, 1e-4, 0.6])
    )
    tail = candidates_of(answers, Selection("top-k", 2), 400)["tail_logprob"]
    np.testing.assert_allclose(tail, [-13, np.log(1e-4), -13], atol=1e-3)


@pytest.mark.parametrize(
    "more", [{"tail_entropy": True}, {"selection": {"name": "top-k", "k": 5, "draw_weight": 0.1, "draw_seed": 0}}]
)
def test_what_is_known_of_a_tail_alone_does_not_go_with_a_remainder(more):
    record = PositionsParameters(tail="remainder").to_record()
    assert PositionsParameters.from_record(record).tail == "remainder"
    with pytest.raises(ValueError, match="its tail is what candidates leave"):
        PositionsParameters.from_record({**record, **more})
