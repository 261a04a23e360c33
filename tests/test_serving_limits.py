"""What a server does at once, what it does with nonsense, and how it ends what nobody waits for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hostile_sql import EXPRESSION_BOMBS, REFUSED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import Command, Running
from pyarrow import flight
from served import TOKEN, served
from stores import write_store
from torture.heartbeat import wait_until
from torture.hostile_sql import Stand

from knowledge_store import InputError, KnowledgeStore, KnowledgeStoreError
from knowledge_store.configuration import ServeConfig
from knowledge_store.serving import limits
from knowledge_store.serving.flight_sql import TYPE_PREFIX
from knowledge_store.serving.protobuf import Message, message
from knowledge_store.serving.service import serve
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.messages import BusyError, library_error, to_bytes

ENDLESS = "SELECT sum(hash(range)) AS n FROM range(1000000000000)"  # has no first row
LONG = "SELECT range AS n, repeat('x', 100) AS words FROM range(1000000000)"  # has many
COMMANDS = (
    *("CommandStatementQuery", "CommandPreparedStatementQuery", "TicketStatementQuery", "CommandGetTables"),
    *("CommandGetSqlInfo", "CommandGetDbSchemas", "CommandStatementUpdate", "ActionCreatePreparedStatementRequest"),
)
OPTIONS = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {TOKEN}".encode())])


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    with served(write_store(tmp_path_factory.mktemp("limits") / "store"), queries=2, stalled=0.5) as found:
        yield found


@pytest.fixture(scope="module")
def client(where):
    with flight.FlightClient(where.address) as found:
        yield found


def children() -> list[psutil.Process]:
    """The processes of queries."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if any("isolation.child" in word for word in process.cmdline()):
                found.append(process)
    return found


def ask(client: flight.FlightClient, sql: str) -> flight.FlightStreamReader:
    return client.do_get(flight.Ticket(to_bytes({"sql": sql, "memory_limit": 2**28, "timeout": 1000.0})), OPTIONS)


def all_gone(where) -> bool:
    return not children() and where.server.query_slots.taken == 0


def test_a_query_ends_with_its_call(where, client):
    """Which is cancelled among its rows."""
    reader = ask(client, LONG)
    reader.read_chunk()
    wait_until(lambda: len(children()) == 1)
    reader.cancel()
    wait_until(lambda: all_gone(where))
    wait_until(lambda: where.calls("sql") and where.calls("sql")[-1]["outcome"] == "cancelled")


def ask_and_die(address: str) -> None:
    """A client that is killed while it waits."""
    client = flight.FlightClient(address)
    _ = ask(client, ENDLESS).schema


def test_a_query_without_a_row_ends_with_its_client(where, tmp_path):
    asking = Running(ask_and_die, where.address, folder=tmp_path)
    wait_until(lambda: len(children()) == 1, asking.process.is_alive)
    asking.process.kill()
    asking.process.join()
    wait_until(lambda: all_gone(where))


def test_one_query_more_is_refused(where, client, monkeypatch):
    monkeypatch.setattr(where.server.query_slots, "patience", 0.0)
    taken = [where.server.query_slots.take() for _ in range(2)]
    with pytest.raises(flight.FlightUnavailableError) as refused:
        ask(client, "SELECT 1").read_all()
    assert isinstance(library_error(refused.value), BusyError)
    for give_back in taken:
        give_back()
    assert where.server.query_slots.refused == 1 and ask(client, "SELECT 1").read_all().num_rows == 1


def test_a_client_that_takes_nothing_is_given_up(where, client):
    reader = ask(client, LONG)
    reader.read_chunk()
    wait_until(lambda: where.server.query_slots.taken == 1)
    wait_until(lambda: all_gone(where))
    with pytest.raises(flight.FlightError, match="took nothing"):
        while True:
            reader.read_chunk()


def test_a_server_that_ends_ends_its_queries(tmp_path):
    """Also one that has no row yet, instead of waiting until its limit of time."""
    with served(write_store(tmp_path / "store")) as where, flight.FlightClient(where.address) as client:
        failed: list[Exception] = []

        def asking() -> None:
            try:
                ask(client, ENDLESS).read_all()
            except flight.FlightError as error:
                failed.append(error)

        thread = threading.Thread(target=asking)
        thread.start()
        wait_until(lambda: len(children()) == 1)
        where.server.close()
        assert where.server.ended and not children()
        thread.join()
        assert "the server is ending" in str(failed[0])


def test_hostile_sql_is_as_harmless_from_afar(tmp_path):
    """One of each sort; `tests.torture` has the whole corpus."""
    stand = Stand(tmp_path)
    with served(tmp_path / "store") as where:  # and its file of tokens beside it: nothing is compared
        stand._store = where.open()
        for corpus, outcome in ((REFUSED, "refused"), (EXPRESSION_BOMBS, None)):
            ended = stand.attempt(next(iter(corpus.values())), timeout=1.0)
            assert outcome in (ended, None)


def answered(client: flight.FlightClient, call) -> None:
    """A call comes to an end, whatever it is: with an answer, or an error that Flight carries."""
    try:
        call()
    except (flight.FlightError, pa.ArrowException, KnowledgeStoreError) as error:
        assert "Traceback" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {
        "dump": st.sampled_from(["small", "", "../small"]) | json_values,
        "snapshot": st.integers() | json_values,
        "kinds": st.lists(st.sampled_from(["positions", "", "vectors"]), max_size=3) | json_values,
    }
)


@settings(max_examples=25)
@given(st.binary(max_size=60) | json_values.map(to_bytes))
@example(b"")
@example(b"{" * 100_000)
def test_malformed_tickets(where, client, ticket):
    answered(client, lambda: client.do_get(flight.Ticket(ticket), OPTIONS).read_all())


def exchanged(client: flight.FlightClient, command: bytes, message: bytes) -> None:
    """Ask for sequences, and take all that comes."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command), OPTIONS)
    with suppress(pa.ArrowException):  # what was wrong, the other direction says
        writer.write_metadata(message)
        writer.done_writing()
    try:
        reader.read_all()
    finally:
        with suppress(pa.ArrowException):
            writer.close()


@settings(max_examples=25)
@given(st.binary(max_size=60) | fields.map(lambda of: to_bytes({"sequences": of})), st.just(bytes(8)))
@example(to_bytes({"sequences": {"dump": "small", "snapshot": 2**80, "kinds": ["positions"]}}), bytes(8))
def test_malformed_commands_of_streams(where, client, command, message):
    answered(client, lambda: exchanged(client, command, message))


@settings(max_examples=25)
@given(st.binary(max_size=60) | st.lists(st.integers(-3, 10), max_size=3).map(lambda of: np.array(of, "<i8").tobytes()))
@example(bytes(8 * (messages.MAX_SEQUENCES + 1)))
@example(bytes(messages.MAX_READ))
def test_malformed_messages_of_streams(where, client, message):
    snapshot = where.open().snapshot()
    command = to_bytes({"sequences": {"dump": "small", "snapshot": snapshot, "kinds": ["positions"]}})
    answered(client, lambda: exchanged(client, command, message))


@settings(max_examples=25)
@given(st.data())
def test_malformed_commands_of_flight_sql(where, client, data):
    values = st.binary(max_size=20) | st.integers(0, 2**64 - 1)
    inner = message(data.draw(st.lists(st.tuples(st.integers(1, 6), values), max_size=4)))
    name = data.draw(st.sampled_from(COMMANDS))
    command = message([(1, f"{TYPE_PREFIX}{name}".encode()), (2, inner)])
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(command) - 1))
        command = command[:place] + data.draw(st.binary(max_size=4)) + command[place + data.draw(st.integers(0, 3)) :]
    if b"CommandGetTables" in command:  # which would start a process
        command = command[: len(command) // 2]
    descriptor = flight.FlightDescriptor.for_command(command)
    answered(client, lambda: client.get_flight_info(descriptor, OPTIONS))
    what = data.draw(st.sampled_from([messages.READ, messages.OPEN, messages.SIZE, "CreateSubstrait", "", "EndTransaction"]))
    answered(client, lambda: list(client.do_action(flight.Action(what, command), OPTIONS)))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_refused(data):
    with suppress(InputError):
        read = Message(data)
        read.number(1), read.numbers(2)
        with suppress(InputError):
            read.text(1)


@pytest.mark.parametrize(
    "name",
    ["../tokens", "/etc/passwd", "small/../../tokens", "small//x", ".tmp-x", "a/b/c/d", "small/\0", "small\\x"],
)
def test_only_files_of_the_store_are_read(where, client, name):
    request = to_bytes({"name": name, "start": 0, "end": 100})
    for what in (messages.READ, messages.SIZE, messages.FILES):
        with pytest.raises(flight.FlightServerError, match="there is no file"):
            list(client.do_action(flight.Action(what, request), OPTIONS))


def test_a_slow_client_keeps_nobody_waiting(where, client):
    """One that sends a byte now and then, and one that says nothing, hold no slot."""
    connections = [socket.create_connection(("127.0.0.1", where.server.port)) for _ in range(40)]
    try:
        for number, connection in enumerate(connections):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[:number])
        assert where.open().sql("SELECT 1 AS one")["one"].to_pylist() == [1]
    finally:
        for connection in connections:
            connection.close()


def test_a_call_that_is_over_is_not_looked_at(monkeypatch):
    """What Flight knows of it is gone with it."""

    class Context:
        def is_cancelled(self) -> bool:
            raise AssertionError("it was looked at")

    monkeypatch.setattr(limits, "INTERVAL", 0.001)
    watch = limits.Watch()
    looked = threading.Event()
    with suppress(AssertionError), watch.over(Context(), looked.set):
        pass
    assert not looked.wait(0.05)
    watch.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed, which makes a certificate")
    return folder / "cert.pem", folder / "key.pem"


def test_the_command_serves_over_tls(certificate, tmp_path):
    """To who knows its certificate; and it ends at SIGTERM."""
    folder, tokens = write_store(tmp_path / "store"), tmp_path / "tokens"
    tokens.write_text(TOKEN)
    cert, key = certificate
    options = ["--token-file", tokens, "--bind", "localhost:0", "--tls-cert", cert, "--tls-key", key]
    server = Command("serve", folder, *options, folder=tmp_path / "server", package="knowledge_store")
    try:
        wait_until(lambda: "Serving" in server.output, server.process.is_alive)
        address = server.output.split()[-1]
        assert address.startswith("grpc+tls://localhost:")
        environment = {**os.environ, "KNOWLEDGE_STORE_TOKEN": TOKEN, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(cert)}
        command = [sys.executable, "-m", "knowledge_store.cli", "sql", address, "SELECT count(*) AS n FROM sequences"]
        asked = subprocess.run([*command, "--format", "csv"], env=environment, capture_output=True, text=True)
        assert asked.stdout.split() == ["n", "8"], asked.stderr
    finally:
        server.process.terminate()
        ended = server.wait()
    assert ended.returncode == 0
    calls = [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]
    assert [call["outcome"] for call in calls if call["call"] == "sql"] == ["ok"]


def test_what_is_refused_before_anything_is_served(where, certificate, tmp_path):
    folder, tokens = write_store(tmp_path / "store"), tmp_path / "tokens"
    tokens.write_text(TOKEN)
    for options, sentence in (
        ({"bind": "0.0.0.0:0"}, "give --tls-cert and --tls-key, or --insecure"),
        ({"tls_cert": tokens}, "--tls-cert and --tls-key go together"),
        ({"tls_cert": tokens, "tls_key": tokens}, "is no PEM file"),
        ({"tls_cert": certificate[0], "tls_key": certificate[0]}, "give those that belong together"),
        ({"token_file": tmp_path / "none"}, "cannot be read"),
        ({"bind": f"127.0.0.1:{where.server.port}"}, "Address already in use"),
        ({"stores": (str(folder), str(write_store(tmp_path / "a store")))}, "'a store' is no name that stands in an address"),
        ({"bind": "8815"}, "write it as host:port"),
        ({"stores": (str(folder), str(folder))}, "two of the stores are called store"),
        ({"stores": ("grpc://127.0.0.1:1",)}, "is served already"),
        ({"stores": (str(tmp_path / "nowhere"),)}, "there is no store"),
    ):
        config = ServeConfig(**{"stores": (str(folder),), "token_file": tokens, "bind": "127.0.0.1:0", **options})
        with pytest.raises(KnowledgeStoreError, match=sentence):
            serve(config, print, print)


def test_adbc(where):
    """What a notebook does: it asks, with parameters and without, and looks at what there is."""
    dbapi = pytest.importorskip("adbc_driver_flightsql.dbapi", reason="adbc-driver-flightsql is not installed")
    local = KnowledgeStore.open(where.server._stores["store"].storage)
    options = {"adbc.flight.sql.authorization_header": f"Bearer {TOKEN}"}
    with dbapi.connect(where.address, db_kwargs=options) as connection, connection.cursor() as cursor:
        query = "SELECT dump, count(*) AS n, avg(tail_logprob) AS tail FROM positions GROUP BY ALL"
        cursor.execute(query)
        assert cursor.fetch_arrow_table().equals(local.sql(query))
        cursor.execute("SELECT ? + 1 AS x, ? AS y", (41, "s"))
        assert cursor.fetchall() == [(42, "s")]
        [catalogue] = connection.adbc_get_objects(depth="tables").read_all().to_pylist()
        names = {table["table_name"] for table in catalogue["catalog_db_schemas"][0]["db_schema_tables"]}
        assert {"positions", "sequences", "dumps", "tokens"} <= names
        assert connection.adbc_get_table_schema("sequences").equals(local.sql("SELECT * FROM sequences").schema)
        table = f"{catalogue['catalog_name']}.{catalogue['catalog_db_schemas'][0]['db_schema_name']}.sequences"
        cursor.execute(f"SELECT count(*) FROM {table}")  # as programs write it that look at what there is
        assert cursor.fetchall() == [(8,)]
        assert connection.adbc_get_info()["vendor_name"] == "knowledge-store"
        with pytest.raises(dbapi.Error, match="only a SELECT statement is answered"):
            cursor.execute("DROP TABLE positions")
    with pytest.raises(dbapi.Error, match="asks for a token"), dbapi.connect(where.address, autocommit=True) as connection:
        connection.cursor().execute("SELECT 1")
