"""Stores in buckets: the calls of the storage against a small server of S3's language, and the commands over it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from s3_server import S3Server, s3_server
from stores import commit, contents, make_manifest, random_sequences, words, write_store
from test_storage import everything
from typer.testing import CliRunner

from knowledge_store import DamageError, DumpWriter, InputError, KnowledgeStore, StoreError, verify
from knowledge_store.cli import app
from knowledge_store.errors import MissingFileError
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
        "s3://b/a#c", f"s3://key:{SECRET}@b/a", f"s3://b/a?endpoint=https://key:{SECRET}@host",
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
    code, out, _ = run("copy", "s3://bucket/some/store", str(tmp_path / "local"), *endpoint)
    assert code == 0 and "Copied small: 2 shards" in out
    code, out, _ = run("copy", str(tmp_path / "local"), "s3://bucket/copied", *endpoint)
    assert code == 0 and verify(address_in(s3, "copied")).sound
    code, _, err = run("info", str(tmp_path / "local"), *endpoint)
    assert code == 2 and "--endpoint is for stores in buckets" in err
    code, out, _ = run("view", "s3://bucket/some/store", "small", *endpoint)
    assert code == 0 and "read_parquet(['s3://bucket/some/store/small/" in out
