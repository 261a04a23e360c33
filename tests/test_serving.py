"""A store that is served: whoever opens it there reads the same as from its folder, and nobody else reads anything."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
from served import OTHER_TOKEN, TOKEN, assert_equal, served
from stores import commit, make_manifest, random_sequences, words, write_store
from torture.heartbeat import wait_until
from typer.testing import CliRunner

from knowledge_store import DumpWriter, InputError, KnowledgeStore, QueryError, StoreError
from knowledge_store.cli import app
from knowledge_store.format.sequences import tokens_table
from knowledge_store.reading.cache import DecodedCache
from knowledge_store.storage.served import client as client_module
from knowledge_store.storage.served.address import parse_address
from knowledge_store.storage.served.tokens import ENVIRONMENT, read_tokens
from knowledge_store.writing.copy import copy as copy_dumps

PLANS = [
    {"batch_size": 3},
    {"batch_size": 2, "seed": 5, "epoch": 3, "rank": 1, "world_size": 3},
    {"batch_size": 4, "seed": 5, "order": "blocks", "window": 1},
    {"batch_size": 2, "seed": 1, "consumed": 7},
    {"batch_size": 2, "seed": 1, "group_by_length": 8, "global_batch": 4},
    {"batch_size": 5, "shuffle": False, "ordinals": np.array([0, 3, 4, 9])},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of two dumps of one corpus, and one of another."""
    folder = tmp_path_factory.mktemp("served") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 1000)
        for dump, seed in (("one", 0), ("two", 0), ("other", 7)):
            write_store(folder, dump, size=6, seed=seed)
    return folder


@pytest.fixture(scope="module")
def where(folder):
    with served(folder) as found:
        yield found


@pytest.fixture(scope="module")
def local(folder) -> KnowledgeStore:
    return KnowledgeStore.open(folder, cache_size=0)


@pytest.fixture
def remote(where):
    with where.open() as opened:
        yield opened


def test_what_is_said_of_the_store_is_the_same(local, remote):
    assert remote.dumps == local.dumps and len(remote) == len(local) and remote.info() == local.info()
    for dump in local.dumps:
        assert remote.manifest(dump) == local.manifest(dump) and remote.snapshot(dump) == local.snapshot(dump)
        assert remote.tokens(dump).equals(local.tokens(dump)) and remote.sequences(dump).equals(local.sequences(dump))
        assert remote.shown(2, dump) == local.shown(2, dump)
        for ordinal in range(local.sequence_count(dump)):
            assert_equal(remote[dump, ordinal], local[dump, ordinal])
    with pytest.raises(IndexError, match="has no sequence 99"):
        remote["one", 99]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dump", ["one", {"one": 0.7, "other": 0.3}])
def test_batches_are_the_same(local, remote, plan, dump):
    if isinstance(dump, dict) and "ordinals" in plan:
        plan = {**plan, "ordinals": {"other": plan["ordinals"]}}
    batches, expected = remote.batches(dump, **plan), local.batches(dump, **plan)
    assert len(batches) == len(expected) and batches.state == expected.state
    for one, other in zip(batches, expected, strict=True):
        assert_equal(one, other)
    assert batches.state == expected.state
    for step in (len(expected) - 1, 0, 0):  # in any order
        assert_equal(batches[step], expected[step])
    for step in range(1, len(expected), 2):  # as the second of two workers takes them
        assert_equal(batches.at(1)[min(step, len(batches.at(1)) - 1)], expected.at(1)[min(step, len(expected.at(1)) - 1)])


def test_several_teachers_and_chosen_targets(local, remote):
    plan = {"batch_size": 4, "teachers": {"one": 2.0, "two": 1.0}, "seed": 3}
    for one, other in zip(remote.batches(**plan), local.batches(**plan), strict=True):
        assert_equal(one, other)
    query = "SELECT dump, sequence_id FROM sequences WHERE dump = 'one' AND length > 4"
    condition = "exp(tail_logprob) > 0.1"
    sequences, expected = remote.choose_sequences(query, "one"), local.choose_sequences(query, "one")
    targets, expected_targets = remote.choose_targets(condition, "one"), local.choose_targets(condition, "one")
    assert sequences.sha256 == expected.sha256 and targets.sha256 == expected_targets.sha256
    plan = {"ordinals": sequences.ordinals, "targets": targets.masks, "batch_size": 3}
    for one, other in zip(remote.batches("one", **plan), local.batches("one", **plan), strict=True):
        assert_equal(one, other)


def test_no_more_than_eight_batches_are_on_the_way(folder):
    with served(folder) as where, where.open() as remote:
        batches = iter(remote.batches("one", batch_size=1))
        for _ in range(2):
            next(batches)
        wait_until(lambda: where.counted("sequences_sent_total") == 10)
        assert len(list(batches)) == 10


def test_a_stream_that_rests_is_ended_and_begun_again(folder, local):
    """Its client pauses, looks at single sequences meanwhile, and goes on."""
    with served(folder, stalled=0.05) as where, where.open() as remote:
        found, expected = remote.batches("one", batch_size=1, seed=2), list(local.batches("one", batch_size=1, seed=2))
        for step, batch in enumerate(found):
            assert_equal(batch, expected[step])
            if step in (1, 4):
                wait_until(lambda: where.counted("streams_standing") == 0)
                assert_equal(remote["one", 5], local["one", 5])
        wait_until(lambda: where.counted("streams_now") == 0)
    wait_until(lambda: {facts["outcome"] for facts in where.calls("sequences")} == {"ok"})


def test_a_server_that_ends_has_its_clients_hang_up(folder):
    with served(folder) as where, where.open() as remote:
        next(iter(remote.batches("one", batch_size=1)))
        where.server.close()
        assert where.server.ended


def test_a_large_batch_comes_in_parts(folder, local, monkeypatch):
    monkeypatch.setattr("knowledge_store.serving.sequences.PART_BYTES", 2000)
    with served(folder) as where, where.open() as remote:
        for one, other in zip(remote.batches("one", batch_size=7), local.batches("one", batch_size=7), strict=True):
            assert_equal(one, other)


def test_sequences_come_in_few_bytes(tmp_path):
    """About as many as the decoded cache has of them; a batch has several times as many."""
    folder = write_store(tmp_path / "store", vocabulary=400, k=20, size=30)
    local = KnowledgeStore.open(folder)
    [size] = {sum(array.nbytes for array in batch.values()) for batch in local.batches(batch_size=60)}
    with served(folder) as where, where.open() as remote:
        list(remote.batches(batch_size=60))
        wait_until(lambda: where.counted("sequences_sent_total") == 60)
    assert where.counted('sent_bytes_total{call="sequences"}') < size / 2


def test_sql(local, remote):
    query = "SELECT dump, count(*) AS n, avg(tail_logprob) AS tail FROM positions GROUP BY ALL ORDER BY ALL"
    assert remote.sql(query).equals(local.sql(query))
    assert remote.sql("SELECT $1 + 1 AS x, $2 AS y", [1, "two"]).to_pylist() == [{"x": 2, "y": "two"}]
    with pytest.raises(QueryError, match="only a SELECT statement is answered"):
        remote.sql("DROP TABLE positions")
    with pytest.raises(InputError, match="files of this machine are not read there"):
        remote.sql("SELECT * FROM mine", files={"mine": "mine.parquet"})


def test_a_closed_dump_is_closed_there_too(tmp_path):
    folder = write_store(write_store(tmp_path / "store", "good"), "bad")
    path = folder / "bad" / "manifest.json"
    path.write_text(path.read_text().replace("numbers", "numberz"))
    with served(folder) as where, where.open() as remote:
        local = KnowledgeStore.open(folder)
        assert remote.dumps == ("good",) and remote.closed == local.closed
        with pytest.raises(type(local._dumps.closed["bad"])):
            remote.manifest("bad")


def test_nothing_is_written(where, remote, tmp_path):
    refused = "is a served store, which is only read"
    for write in (lambda: remote.remove("one"), lambda: remote.rename("one", "two2")):
        with pytest.raises(InputError, match=refused):
            write()
    with pytest.raises(InputError, match=refused):
        DumpWriter.open(remote.storage, make_manifest("new"), tokens_table(words(11), words(11)))
    assert copy_dumps(remote.storage, tmp_path / "copy", "one").shards == 2
    assert KnowledgeStore.open(tmp_path / "copy").snapshot() == remote.snapshot("one")


def test_a_dump_that_grows_is_read_as_it_was_opened(tmp_path):
    folder = tmp_path / "store"
    writer = DumpWriter.open(folder, make_manifest(shards=3), tokens_table(words(11), words(11)))
    for shard in (0, 2):
        commit(writer, shard, random_sequences(shard, 4))
    with served(folder) as where, where.open() as before:
        expected = list(KnowledgeStore.open(folder, cache_size=0).batches(batch_size=2))
        commit(writer, 1, random_sequences(1, 4))
        where.server._stores["store"]._looked = 0  # as a second later
        with where.open() as after:
            assert len(after) == 12 and len(before) == 8
            for one, other in zip(before.batches(batch_size=2), expected, strict=True):
                assert_equal(one, other)
        where.server.close()
        with (
            served(folder, port=where.server.port),  # which never knew it otherwise
            pytest.raises(StoreError, match="has other sequences than when the store was opened"),
        ):
            before[0]


def test_several_stores_and_what_names_them(tmp_path):
    one, two = write_store(tmp_path / "one", "first"), write_store(tmp_path / "two", "second")
    with served(one, two) as where:
        assert where.open("one").dumps == ("first",) and where.open("two").dumps == ("second",)
        for name in ("", "three"):
            with pytest.raises(InputError, match="put one of one, two behind the address"):
                where.open(name)


def test_only_who_has_a_token_is_let_in(where, tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(InputError, match="put it into the environment variable"):
        KnowledgeStore.open(where.address)
    for text, sentence in (("tökén-that-is-none-of-all", "ASCII"), ("a b c", "no token"), ("short", "can be guessed")):
        monkeypatch.setenv(ENVIRONMENT, text)
        with pytest.raises(InputError, match=f"KNOWLEDGE_STORE_TOKEN .*{sentence}"):
            KnowledgeStore.open(where.address)
    monkeypatch.setenv(ENVIRONMENT, "0123456789abcdef-of-nobody")
    with pytest.raises(InputError, match="this server does not know the token"):
        KnowledgeStore.open(where.address)
    monkeypatch.setenv(ENVIRONMENT, f"second {OTHER_TOKEN}\r\n")  # as it stands in the file
    before = len(where.calls("open"))
    opened = KnowledgeStore.open(where.address)
    assert opened.dumps == ("one", "other", "two")
    assert [facts["who"] for facts in where.calls("open")[before:]] == ["second"]
    text = where.token_file.read_text()
    try:
        where.token_file.write_text(f"first {TOKEN}\n")
        where.tokens.read_again()
        with pytest.raises(InputError, match="does not know the token"):
            opened.sequences("one")  # that was revoked
        where.token_file.write_text("short\n")
        with pytest.raises(InputError, match="can be guessed"):
            where.tokens.read_again()
        assert where.tokens.holder(TOKEN) == "first"  # as before
    finally:
        where.token_file.write_text(text)
        where.tokens.read_again()
    secrets = [token.secret for token in read_tokens(where.token_file)]
    assert not any(secret in str(where.log) + repr(opened) for secret in secrets)


def test_commands_take_a_token_file(where, folder, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "")  # and as it was after this test
    tokens = ("--token-file", str(where.token_file))
    asked = CliRunner().invoke(app, ["info", where.address, *tokens])
    assert asked.exit_code == 0 and "complete" in asked.output
    for words_of, sentence in (
        (["info", where.address, "--token-file", str(tmp_path / "none")], "the tokens cannot be read from"),
        (["info", str(folder), *tokens], "--token-file is for stores that are served"),
    ):
        asked = CliRunner().invoke(app, words_of)
        assert asked.exit_code == 2 and sentence in " ".join(asked.output.split())


def test_copies_and_pickles_open_connections_of_their_own(local, remote):
    for other in (copy.copy(remote), pickle.loads(pickle.dumps(remote))):
        assert_equal(other["one", 3], local["one", 3])


@pytest.mark.parametrize(
    "address",
    ["grpc://host", "grpc+tls://:1", "grpc://user:secret@host:1", "grpc://host:1/a/b", "grpc://host:99999", "grpc://h:1?x"],
)
def test_what_is_no_address(address):
    with pytest.raises(InputError):
        parse_address(address)


def test_where_nothing_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PATIENCE", 0.0)
    monkeypatch.setenv(ENVIRONMENT, TOKEN)
    with pytest.raises(StoreError, match="is `knowledge-store serve` running there"):
        KnowledgeStore.open("grpc://127.0.0.1:9")


def test_tls_where_there_is_none(where, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PATIENCE", 0.0)
    address = where.address.replace("grpc://", "grpc+tls://")
    with pytest.raises(StoreError, match="it is served without TLS, as grpc://"):
        KnowledgeStore.open(address, token_file=where.token_file)
    monkeypatch.setenv(client_module.ROOTS, "nowhere.pem")
    with pytest.raises(InputError, match=r"nowhere\.pem, which cannot be read"):
        KnowledgeStore.open(address, token_file=where.token_file)


def test_a_server_without_a_cache_says_the_same(folder, local, monkeypatch):
    monkeypatch.setattr(DecodedCache, "read", lambda *place: None)
    with served(folder, cache_size=0) as where, where.open() as remote, warnings.catch_warnings():
        for one, other in zip(remote.batches("two", batch_size=4), local.batches("two", batch_size=4), strict=True):
            assert_equal(one, other)


def test_metrics_count_calls_and_bytes(where, remote):
    remote.sql("SELECT 1")
    assert where.counted('calls_total{call="sql",outcome="ok"}') >= 1
    assert where.counted('sent_bytes_total{call="sql"}') >= 4
    assert where.counted("queries_now") == 0
