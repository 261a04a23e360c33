"""Stores in buckets: the calls of the storage against a small server of S3's language, and the commands over it."""

from __future__ import annotations

import os
import pickle
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bucket_servers
import numpy as np
import pytest
import s3_server as s3_server_module
from s3_server import S3Server, s3_server
from stores import commit, contents, make_manifest, random_sequences, words, write_store
from test_storage import everything
from typer.testing import CliRunner

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, StoreError, verify
from knowledge_store.cli import app
from knowledge_store.errors import MissingFileError
from knowledge_store.format import scan_ahead
from knowledge_store.format.sequences import tokens_table
from knowledge_store.storage import BucketStorage, open_storage
from knowledge_store.storage import bucket as bucket_module
from knowledge_store.storage.bucket_address import BucketAddress
from knowledge_store.writing.copy import copy

obstore = pytest.importorskip("obstore", reason="obstore is not installed: pip install 'knowledge-store[bucket]'")

SECRET = "5ecret5ecret"
TOKENS = tokens_table(words(11), words(11))


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch) -> S3Server:
    """The server, empty and sound, and an environment with its credentials."""
    server.objects.clear()
    server.heeds, server.fault = True, lambda method, key: None
    server.forget()
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return server


def address_in(s3: S3Server, prefix: str = "some/store") -> str:
    return f"s3://bucket/{prefix}?endpoint={s3.endpoint}"


def flip(s3: S3Server, key: str) -> None:
    """Alter a byte in the middle of an object."""
    data = s3.objects[key]
    middle = len(data) // 2
    s3.objects[key] = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# Addresses


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("s3://bucket", ("s3", "bucket", "", None)),
        ("gs://bucket/a/b/", ("gs", "bucket", "a/b", None)),
        ("s3://b/a?endpoint=http://127.0.0.1:9000/", ("s3", "b", "a", "http://127.0.0.1:9000")),
    ],
)
def test_addresses_are_read_and_written(text, parts):
    address = BucketAddress.parse(text)
    assert (address.scheme, address.bucket, address.prefix, address.endpoint) == parts
    assert BucketAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "s3://", "s3:///x", "hf://datasets/x", "s3://b/a//b", "s3://b/../c", "s3://b/a?region=x", "s3://b/a?endpoint=minio:9000",
        "s3://b/a#c", "s3://my bucket/a", "s3://b:80/a", "s3://[b/a", "s3:/b/a", f"s3://key:{SECRET}@b/a",
        f"s3://b/a?endpoint=https://key:{SECRET}@host", f"s3://b/a?endpoint=https%3A//key:{SECRET}@host&x=1",
        f"az://b/a?sv=1&sig={SECRET}", f"https://b.blob.core.windows.net/a?sig={SECRET}",
        f"s3://b/a?endpoint=key:{SECRET}@host", f"s3://b/a?endpoint=https://h/?sig={SECRET}",
        "s3://b/a?endpoint=http://h:99999", "s3://b/a?endpoint=http://[::1", "s3://b/a?endpoint=http://a b",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_and_secrets_in_it_are_not_repeated(text):
    with pytest.raises(InputError) as caught:
        open_storage(text)
    assert SECRET not in str(caught.value)


def test_a_path_that_was_an_address_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give the address of a bucket as a text"):
        DumpWriter.open(Path("s3://bucket/store"), make_manifest(), TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_the_endpoint_of_the_environment_is_used(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    write_store("s3://bucket/elsewhere")
    assert KnowledgeStore.open("s3://bucket/elsewhere").dumps == ("small",)
    assert "elsewhere/store.json" in s3.objects


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", f"http://key:{SECRET}@127.0.0.1:9", "AWS_ENDPOINT_URL in the environment holds no credentials"),
        ("AWS_ENDPOINT_URL", "minio:9000", "AWS_ENDPOINT_URL in the environment, 'minio:9000', is no endpoint"),
        ("AWS_SESSION_TOKEN", f"{SECRET}\n", "AWS_SESSION_TOKEN in the environment has a line end"),
    ],
)
def test_what_the_environment_says_wrongly_is_named_without_its_secrets(s3, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words) as caught:
        KnowledgeStore.open("s3://bucket/a" if name == "AWS_ENDPOINT_URL" else address_in(s3))
    assert SECRET not in str(caught.value)


# The calls


def test_objects_are_published_once_and_read_in_parts(s3):
    storage = open_storage(address_in(s3))
    assert storage.files("") == [] and storage.folders("") == []
    assert storage.create("a/zero", lambda file: file.write(b""))
    assert storage.create("a/b/one", lambda file: file.write(b"first"))
    assert not storage.create("a/b/one", lambda file: file.write(b"second"))
    assert (storage.read("a/b/one"), storage.size("a/b/one"), storage.read("a/zero")) == (b"first", 5, b"")
    assert (storage.read("a/b/one", 1, 3), storage.read("a/b/one", 3), storage.read("a/b/one", 3, 99)) == (b"ir", b"st", b"st")
    assert (storage.read("a/b/one", 9, 99), storage.read("a/b/one", 2, 2), storage.read("a/zero", 0, 9)) == (b"", b"", b"")
    assert (storage.folders(""), storage.folders("a"), storage.folders("a/b")) == (["a"], ["b"], [])
    assert [(entry.name, entry.size) for entry in storage.files("a/b")] == [("one", 5)]
    before = storage.version("a/b/one")
    storage.remove("a/b/one")
    storage.remove("a/b/one")
    storage.create("a/b/one", lambda file: file.write(b"third"))
    assert storage.version("a/b/one") != before
    for missing in ("a/b/two", "nowhere/one"):
        for call in (storage.read, storage.size, storage.version):
            with pytest.raises(MissingFileError, match=f"{storage.locate(missing)} is missing"):
                call(missing)
    with pytest.raises(DamageError):
        storage.create("a/two", lambda file: file.write(b"half") and (_ for _ in ()).throw(DamageError("nothing good")))
    assert "some/store/a/two" not in s3.objects


def test_a_store_of_obstore_may_be_given(tmp_path):
    from obstore.store import MemoryStore

    storage = BucketStorage("s3://bucket/x", store=MemoryStore())
    write_store(storage, shards=3)
    opened = KnowledgeStore.open(storage)
    assert everything(opened) == everything(KnowledgeStore.open(write_store(tmp_path / "other", shards=3)))
    with pytest.raises(InputError, match="no other program has the credentials"):
        opened.sql("SELECT 1", isolated=True)


def test_a_bucket_that_lets_writers_replace_each_other_is_refused(s3):
    s3.heeds = False
    with pytest.raises(StoreError, match=r"9 of 9 .* does not heed `If-None-Match: \*`"):
        write_store(address_in(s3))
    assert s3.objects == {}


def test_a_probe_whose_first_answer_is_lost_is_made_again(s3):
    lost = iter(["drop after"] * bucket_module.RACERS)
    s3.fault = lambda method, key: next(lost, None) if method == "PUT" else None
    open_storage(address_in(s3)).probe()
    assert s3.objects == {}


def test_what_probes_leave_behind_is_removed_after_a_day(s3):
    for name, age in (("old", 2 * 86400), ("new", 60)):
        open_storage(address_in(s3)).create(f".tmp-probe-{name}", lambda file: file.write(b"x"))
        s3.written[f"some/store/.tmp-probe-{name}"] -= age
    write_store(address_in(s3))
    probes = [key for key in s3.objects if ".tmp-" in key]
    assert probes == ["some/store/.tmp-probe-new"]
    assert verify(address_in(s3)).sound


# Errors


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403", "refuses it (HTTP 403, SignatureDoesNotMatch): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("301", "the bucket is in another region than the one at"),
        ("drop", "broke off, time and again"),
    ],
)
def test_why_a_service_cannot_be_used_is_one_sentence_without_secrets(s3, monkeypatch, fault, words):
    monkeypatch.setattr(bucket_module, "FIRST_RETRIES", {"max_retries": 1})
    monkeypatch.setattr(bucket_module, "READ_ATTEMPTS", 1)
    s3.fault = lambda method, key: fault
    with pytest.raises(StoreError) as caught:
        KnowledgeStore.open(address_in(s3))
    sentence = str(caught.value)
    assert "cannot read s3://bucket/some/store/store.json: the" in sentence and words in sentence
    assert "\n" not in sentence and SECRET not in sentence and "Signature=" not in sentence


def test_other_mistakes_are_named(s3, monkeypatch):
    monkeypatch.setattr(bucket_module, "FIRST_RETRIES", {"max_retries": 1})
    with pytest.raises(StoreError, match=r"there is no store at s3://bucket/none\?endpoint="):
        KnowledgeStore.open(address_in(s3, "none"))
    for doing in (KnowledgeStore.open, write_store):
        with pytest.raises(StoreError, match=r"there is no bucket other at http://127\.0\.0\.1:\d+: make it first"):
            doing(f"s3://other/store?endpoint={s3.endpoint}")
    with pytest.raises(StoreError, match=r"no connection at http://127\.0\.0\.1:9: is the address right"):
        KnowledgeStore.open("s3://bucket/store?endpoint=http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", f"http://key:{SECRET}@127.0.0.1:9")
    with pytest.raises(StoreError, match=r"no connection at .* Or is it the proxy of HTTP_PROXY") as caught:
        KnowledgeStore.open(address_in(s3))
    assert SECRET not in str(caught.value)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreError, match="cannot use az://bucket/store: set AZURE_STORAGE_ACCOUNT_NAME and"):
        KnowledgeStore.open("az://bucket/store")


def test_a_service_that_is_busy_or_breaks_off_is_asked_again(s3):
    expected = everything(KnowledgeStore.open(write_store(address_in(s3))))
    seen: dict[tuple[str, str], int] = {}

    def now_and_then(method: str, key: str) -> str | None:
        seen[method, key] = seen.get((method, key), 0) + 1
        return {1: "503", 2: "half" if method == "GET" and key else "503"}.get(seen[method, key])

    s3.fault = now_and_then
    assert everything(KnowledgeStore.open(address_in(s3))) == expected


def test_a_write_whose_answer_is_lost_is_not_done_twice(s3, tmp_path):
    lost: set[str] = set()

    def once(method: str, key: str) -> str | None:
        first = method == "PUT" and ".tmp-" not in key and key not in lost
        lost.update([key] if first else [])
        return "drop after" if first else None

    s3.fault = once
    write_store(address_in(s3), shards=2)
    assert len(lost) == len(s3.objects) == 9
    assert verify(address_in(s3)).sound
    assert everything(KnowledgeStore.open(address_in(s3))) == everything(KnowledgeStore.open(write_store(tmp_path / "other")))


def test_a_slow_line_has_time_for_what_is_sent_and_silence_is_not_believed_at_once(s3, monkeypatch):
    monkeypatch.setattr(bucket_module, "SILENCE", 1)
    monkeypatch.setattr(bucket_module, "SLOWEST", 1000)
    storage = open_storage(address_in(s3))
    slow = iter((1.5, 1.5, 0.0))
    s3.fault = lambda method, key: time.sleep(next(slow, 0.0))  # more PUTs where the machine is slow
    assert storage.create("large", lambda file: file.write(bytes(2500)))
    storage.create("small", lambda file: file.write(b"x"))  # by the first PUT or by the second
    assert s3.objects["some/store/small"] == b"x"
    time.sleep(0.7)  # until the first is answered too


# Stores


def test_a_store_is_the_same_in_a_bucket(s3, tmp_path):
    write_store(address_in(s3), shards=3)
    opened = KnowledgeStore.open(address_in(s3))
    local = write_store(tmp_path / "other", shards=3)
    assert everything(opened) == everything(KnowledgeStore.open(local)) == everything(pickle.loads(pickle.dumps(opened)))
    found = verify(address_in(s3))
    assert (found.damage, found.notes, found.shards) == ([], [], 3)
    prefix = "some/store/"
    tables = {key.removeprefix(prefix): data for key, data in s3.objects.items() if "/commits/" not in key}
    assert tables == {name: data for name, data in contents(local).items() if "/commits/" not in name}
    opened.remove("small")
    assert list(s3.objects) == ["some/store/store.json"] and opened.dumps == ()
    s3.objects["some/store/small/commits/00000.json"] = b"left by a removal that was cut off"
    s3.written["some/store/small/commits/00000.json"] = 0
    KnowledgeStore.open(address_in(s3)).remove("small")
    assert list(s3.objects) == ["some/store/store.json"]
    s3.objects["some/store/inner/store.json"] = b"of another store"
    s3.written["some/store/inner/store.json"] = 0
    with pytest.raises(InputError, match="no dump 'inner'"):
        KnowledgeStore.open(address_in(s3)).remove("inner")
    with pytest.raises(InputError, match="a bucket renames nothing"):
        write_store(address_in(s3))
        KnowledgeStore.open(address_in(s3)).rename("small", "large")


def test_damage_is_found_and_repaired_by_copying(s3, tmp_path):
    """What a store in a bucket has in place of --repair."""
    before = everything(KnowledgeStore.open(write_store(address_in(s3), shards=3)))
    sound = dict(s3.objects)
    for name in ("positions/00001.parquet", "commits/00002.json"):
        flip(s3, f"some/store/small/{name}")
    with pytest.raises(DamageError, match=r"commits/00002\.json is damaged"):
        list(KnowledgeStore.open(address_in(s3)).batches("small", batch_size=3))
    writer = DumpWriter.open(address_in(s3), make_manifest(shards=3), TOKENS)
    with pytest.raises(InputError, match=r"is not repaired where it is.*knowledge-store copy .* FOLDER"):
        writer.storage.replace([])
    with pytest.raises(DamageError, match=r"2 shards are damaged and left out"):
        copy(address_in(s3), tmp_path / "folder")
    local = DumpWriter.open(tmp_path / "folder", make_manifest(shards=3), TOKENS)
    assert local.committed_shards() == {0}
    for shard in (1, 2):
        commit(local, shard, random_sequences(shard, 4))
    with pytest.raises(DamageError, match="and copy again"):
        copy(tmp_path / "folder", address_in(s3))
    for name in ("store.json", "small/manifest.json", "small/tokens.parquet"):
        flip(s3, f"some/store/{name}")
    copied = copy(tmp_path / "folder", address_in(s3), repair=True)
    assert (copied.shards, copied.existing) == (2, 1)
    assert everything(KnowledgeStore.open(address_in(s3))) == before and verify(address_in(s3)).sound
    assert {key: data for key, data in s3.objects.items() if "/commits/" not in key} == {
        key: data for key, data in sound.items() if "/commits/" not in key
    }
    assert copy(tmp_path / "folder", address_in(s3), repair=True).existing == 3


# Requests


def test_opening_takes_few_requests(s3, monkeypatch):
    monkeypatch.setattr(s3_server_module, "PAGE", 2)
    shards = 5
    write_store(address_in(s3), shards=shards)
    KnowledgeStore.open(address_in(s3))
    s3.forget()
    opened = KnowledgeStore.open(address_in(s3))
    assert opened.info()[0].shards == shards
    pages = -(-shards // s3_server_module.PAGE)
    assert s3.requests.total() <= 5 + pages and s3.requests["GET"] == 2  # store.json and the manifest


def test_opening_for_the_first_time_takes_few_requests(s3, tmp_path, monkeypatch):
    """Of a store that a writer finished, or a copy; of another once it was bundled."""
    shards = 30
    copy(write_store(tmp_path / "local", shards=shards), address_in(s3))
    anew = iter(range(9))

    def opening() -> int:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {next(anew)}"))
        s3.forget()
        opened, requests = KnowledgeStore.open(address_in(s3)), s3.requests.total()
        assert opened.info()[0].shards == shards
        return requests

    assert opening() <= 5
    [bundle] = [key for key in s3.objects if key.endswith(".gz")]
    flip(s3, bundle)
    assert opening() == 5 + shards
    del s3.objects[bundle]
    code, out, err = run("reindex", "s3://bucket/some/store", "--bundle", "--endpoint", s3.endpoint)
    assert (code, out) == (0, "Bundled 30 commit records of small\nIndexed 30 shards of 1 dumps\n"), err
    assert opening() <= 5
    code, _, err = run("reindex", str(tmp_path / "local"), "--bundle")
    assert code == 2 and "--bundle is for stores in buckets" in err


def large_knowledge(seed: int, length: int, k: int = 5, vocabulary: int = 5000) -> dict[str, np.ndarray]:
    """One sequence of candidates whose probabilities fall off, made in a moment."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocabulary - k, (length, 1)) + np.arange(k)
    logprobs = np.log(0.9 * random.dirichlet(np.full(k, 0.5), length) + 1e-4)
    logprobs = -np.sort(-logprobs, axis=1)
    is_target = np.arange(length) > 0
    return {
        "token_id": ids[:, 0].astype(np.uint32), "is_target": is_target, "has_knowledge": is_target,
        "token_logprob": logprobs[:, 0].astype(np.float32), "candidate_ids": ids.astype(np.uint32),
        "candidate_logprobs": logprobs.astype(np.float32),
        "tail_logprob": np.log1p(-np.exp(logprobs).sum(axis=1)).astype(np.float32),
    }  # fmt: skip


def test_a_pass_takes_few_requests_and_each_byte_once(s3, tmp_path):
    """And they are on the way before they are asked for, in another order, with the same answers."""
    manifest = make_manifest(vocabulary=5000, k=5, plan={"max_length": 2048}, shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knowledge_store.format.parquet.COMPRESSION_LEVEL", 3)
        writer = DumpWriter.open(address_in(s3), manifest, tokens_table(words(5000), words(5000)))
        for shard in range(2):
            commit(writer, shard, [large_knowledge(100 * shard + number, 2000) for number in range(40)])
    files = {key: len(data) for key, data in s3.objects.items() if "/positions/" in key or "/sequences/" in key}
    copy(address_in(s3), tmp_path / "local")
    groups = len(KnowledgeStore.open(address_in(s3)).batches(order="blocks").readers[0].row_groups) - 1
    assert groups > len(files) / 2
    for plan in ({"shuffle": False}, {"order": "blocks", "window": 2}):
        opened = KnowledgeStore.open(address_in(s3), cache_size=0)
        s3.forget()
        read = [batch["candidate_ids"].tobytes() for batch in opened.batches(batch_size=4, **plan)]
        assert s3.requests.total() <= 2 * len(files) + groups
        assert s3.sent <= 1.2 * sum(files.values())
        local = KnowledgeStore.open(tmp_path / "local", cache_size=0)
        assert read == [batch["candidate_ids"].tobytes() for batch in local.batches(batch_size=4, **plan)]
    opened = KnowledgeStore.open(address_in(s3), cache_size=0)
    s3.forget()
    assert opened.sql("SELECT count(*) AS n FROM positions WHERE tail_logprob < 0").to_pylist() == [{"n": 80 * 1999}]
    assert s3.sent <= 0.25 * sum(files.values()) and s3.requests.total() <= 2 * len(files) + groups
    s3.forget()
    question = "SELECT count(*) AS n, sum(token_id) AS ids FROM positions WHERE sequence_id < 131072"
    assert opened.sql(question).to_pylist() == local.sql(question).to_pylist()
    assert s3.requests.total() <= 2 * len(files) + 1  # what statistics exclude is not read


def test_a_scan_reads_each_block_once_whatever_comes_first(s3, tmp_path, monkeypatch):
    """Also where what is on the way is cut small, and little of it at once."""
    monkeypatch.setattr(scan_ahead, "UNIT_BYTES", 2 * 16384)
    monkeypatch.setattr(scan_ahead, "UNITS", 2)
    monkeypatch.setattr("knowledge_store.format.parquet.COMPRESSION_LEVEL", 3)
    manifest = make_manifest(vocabulary=5000, k=5, plan={"max_length": 2048}, shards=3)
    writer = DumpWriter.open(tmp_path / "local", manifest, tokens_table(words(5000), words(5000)))
    for shard in range(3):
        commit(writer, shard, [large_knowledge(100 * shard + number, 2000) for number in range(20)])
    copy(tmp_path / "local", address_in(s3))
    opened, local = KnowledgeStore.open(address_in(s3)), KnowledgeStore.open(tmp_path / "local")
    for columns in ("token_id, tail_logprob", "*", "candidate_ids", "is_target, token_logprob"):
        s3.forget()
        question = f"SELECT {columns} FROM positions ORDER BY sequence_id, position LIMIT 50000"
        assert opened.sql(question).equals(local.sql(question))
        assert s3.sent <= sum(len(data) for data in s3.objects.values())


# Real servers


def started(server: Any, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server in a context; the test is skipped where its program is not installed."""
    if not (bucket_servers.AZURITE if what == "azurite-blob" else bucket_servers.program(what)):
        pytest.skip(f"{what} is not installed (see tests/bucket_servers.py)")

    @contextmanager
    def running():
        with server(folder / "server") as service:
            for name, value in service.environment.items():
                monkeypatch.setenv(name, value)
            yield service

    return running()


@pytest.mark.parametrize(
    ("server", "what"),
    [(bucket_servers.seaweedfs, "weed"), (bucket_servers.azurite, "azurite-blob"), (bucket_servers.moto, "moto_server")],
)
def test_a_real_server_holds_a_store(server, what, tmp_path, monkeypatch):
    if server is bucket_servers.moto:  # which takes conditions one after the other only
        monkeypatch.setattr(bucket_module, "RACERS", 1)
    with started(server, what, tmp_path, monkeypatch) as service:
        address = service.store("some/store")
        write_store(address, shards=3)
        opened = KnowledgeStore.open(address)
        assert everything(opened) == everything(KnowledgeStore.open(write_store(tmp_path / "other", shards=3)))
        assert opened.sql("SELECT count(*) AS n FROM shards", isolated=True).to_pylist() == [{"n": 3}]
        copy(tmp_path / "other", service.store("copied"))
        assert verify(address).sound and verify(service.store("copied")).sound
        opened.remove("small")
        assert KnowledgeStore.open(address).dumps == ()  # SeaweedFS lists empty folders for a while


def test_a_real_server_that_does_not_heed_conditions_is_refused(tmp_path, monkeypatch):
    with started(bucket_servers.rclone, "rclone", tmp_path, monkeypatch) as service:
        with pytest.raises(StoreError, match=r"does not heed `If-None-Match: \*`"):
            write_store(service.store("store"))
        assert open_storage(service.store("store")).files("") == []


# Commands


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


def test_commands_take_addresses_and_an_endpoint(s3, tmp_path):
    write_store(address_in(s3))
    endpoint = ("--endpoint", s3.endpoint)
    code, out, _ = run("info", "s3://bucket/some/store", *endpoint)
    assert code == 0 and "2 of 2 shards, complete" in out
    code, out, err = run("sql", "s3://bucket/some/store", "SELECT count(*) AS n FROM positions", *endpoint, "--format", "csv")
    assert (code, out) == (0, "n\n53\n"), err
    code, out, _ = run("verify", "s3://bucket/some/store", *endpoint)
    assert code == 0 and "Sound: 1 dumps, 2 shards" in out
    flip(s3, "some/store/small/commits/00001.json")
    for name in ("verify", "info"):
        code, out, err = run(name, "s3://bucket/some/store", *endpoint)
        assert code and f"made again by `knowledge-store copy '{address_in(s3)}' FOLDER`" in " ".join(err.split())
    flip(s3, "some/store/small/commits/00001.json")
    code, out, _ = run("copy", "s3://bucket/some/store", str(tmp_path / "local"), *endpoint)
    assert code == 0 and "Copied small: 2 shards" in out
    code, out, _ = run("copy", str(tmp_path / "local"), "s3://bucket/copied", *endpoint)
    assert code == 0 and verify(address_in(s3, "copied")).sound
    code, _, err = run("info", str(tmp_path / "local"), *endpoint)
    assert code == 2 and "--endpoint is for stores in buckets" in err
    for output in ("s3://bucket/x.parquet", "gs://bucket/x.parquet"):
        code, _, err = run("export", "s3://bucket/some/store", "small", "--output", output, *endpoint)
        assert code == 2 and f"--output is of this machine, and not at {output[:5]}" in err
    code, out, _ = run("view", "s3://bucket/some/store", "small", *endpoint)
    assert code == 0 and "read_parquet(['s3://bucket/some/store/small/" in out


# Training


def test_worker_processes_of_a_loader_read_a_bucket(s3):
    """A forked one would wait for ever: it is told, and others are started as the data set says."""
    torch = pytest.importorskip("torch")
    from student_train.training.dataset import DistillationDataset

    dataset = DistillationDataset(KnowledgeStore.open(write_store(address_in(s3), shards=3), cache_size=0), batch_size=2)
    expected = [batch["sequence_id"].tolist() for batch in dataset]
    assert dataset.start_method == "forkserver"
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=dataset.start_method)
    assert [batch["sequence_id"].tolist() for batch in loader] == expected
    forked = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(InputError, match="forked"):
        list(forked)


# Serving


def test_stores_in_buckets_are_served_by_their_last_names(s3):
    from knowledge_store.serving.service import _stores

    places = [write_store(address_in(s3, prefix)) for prefix in ("some/one", "some/other/")]
    served = _stores((*places,))
    assert list(served) == ["one", "other"]
    assert served["one"].storage.address == address_in(s3, "some/one")
