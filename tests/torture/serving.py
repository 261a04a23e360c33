"""A served store under fire: servers killed in mid-epoch, clients that vanish, nonsense, and hostile SQL from afar.

Hostile SQL goes through Flight, and through ADBC too where its driver is installed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from hostile_sql import BOMBS, HARMLESS, REFUSED, WORDS, filled_in, lay_bait, standing
from pyarrow import flight
from served import TOKEN, assert_equal
from stores import write_store

from knowledge_store import KnowledgeStore, KnowledgeStoreError
from knowledge_store.serving.flight_sql import TYPE_PREFIX
from knowledge_store.serving.protobuf import message
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.messages import to_bytes
from torture.heartbeat import beat, wait_until

MEMORY_LIMIT = 256 * 2**20
TIMEOUT = 1.0
SERVER_TIMEOUT = 3.0  # for ADBC, which says none
SERVER_MEMORY = 300 * 2**20
ENDLESS = "SELECT sum(hash(range)) AS n FROM range(1000000000000)"
OPTIONS = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {TOKEN}".encode())])


class Server:
    """A server of a store, in a process of its own, that may be killed and started again at the same port."""

    def __init__(self, store: Path, folder: Path):
        self._store, self._tokens = store, folder / "tokens"
        self._log = folder / "log"
        self._tokens.write_text(f"{TOKEN}\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"grpc://127.0.0.1:{free.getsockname()[1]}"
        self.most = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        limits = ["--memory-limit", str(MEMORY_LIMIT / 2**30), "--timeout", str(SERVER_TIMEOUT)]
        command = [sys.executable, "-m", "knowledge_store.cli", "serve", self._store, "--token-file", self._tokens, *limits]
        with open(self._log, "w") as log:
            words = [*map(str, command), "--bind", self.address.rpartition("/")[2]]
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None and "Serving" in self.process.stdout.readline(), self._log.read_text()[-500:]

    def kill(self) -> None:
        """End it at once."""
        self.look()
        self.process.kill()
        self.process.communicate()

    def look(self) -> None:
        """Make sure that it lives, within its memory (Linux)."""
        assert self.process.poll() is None, f"the server ended: {self._log.read_text()[-500:]}"
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.most = max(self.most, int(line.split()[1]) * 1024)
        assert self.most <= SERVER_MEMORY, f"the server took {self.most / 2**20:.0f} MiB"

    @property
    def queries(self) -> list[str]:
        """The processes that it has started, on Linux."""
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError):  # a thread that has ended
                    found += (task / "children").read_text().split()
        return found

    def open(self) -> KnowledgeStore:
        """The store, as a client has it."""
        return KnowledgeStore.open(self.address, token_file=self._tokens)


def run(seed: int, minutes: float, folder: Path, faults: int | None = None) -> dict[str, int]:
    """Faults of all sorts in turn, until the time is over.

    Args:
        seed: of the faults.
        minutes: how long.
        folder: an empty folder.
        faults: so many, however long it takes.

    Returns:
        faults by sort, how many of them were survived, silent ones, and how many of the statements were asked.
    """
    chance = random.Random(seed)
    outside = folder / "outside"
    outside.mkdir()
    write_store(outside / "store", size=40)
    lay_bait(outside)
    (folder / "server").mkdir()
    server = Server(outside / "store", folder / "server")
    counts: Counter[str] = Counter()
    try:
        before = standing(outside)
        hostile, asked = _hostile(chance), set()
        end = time.monotonic() + 60 * minutes
        while sum(counts.values()) < faults if faults is not None else time.monotonic() < end:
            what = chance.choices(("sql", "nonsense", "clients", "kills"), (12, 3, 1, 1))[0]
            beat(f"seed {seed}, fault {sum(counts.values()) + 1}: {what}")
            if what == "sql":
                attempt = next(hostile)
                counts[f"sql by {_ask(server, attempt, outside)}"] += 1
                asked.add(attempt[0])
            elif what == "nonsense":
                _nonsense(server, chance)
                counts["nonsense"] += 1
            elif what == "clients":
                _vanish(server)
                counts["clients that vanish"] += 1
            else:
                counts["servers killed"] += _kill_in_an_epoch(server, chance, outside / "store")
            server.look()
            assert standing(outside) == before, f"{what} changed something"
    finally:
        server.process.kill()
        server.process.communicate()
    total = sum(counts.values())
    found = {"faults": total, "survived": total, "silent": 0, **counts, "statements": len(asked)}
    return {**found, "server_mib": round(server.most / 2**20)}


def _hostile(chance: random.Random) -> Iterator[tuple[str, bool]]:
    """Statements, and whether each has to be refused: each once, in some order, and again."""
    corpus = [(sql, name in REFUSED) for name, sql in {**REFUSED, **HARMLESS, **BOMBS}.items()]
    while True:
        yield from chance.sample(corpus, len(corpus))


def _ask(server: Server, attempt: tuple[str, bool], outside: Path) -> str:
    sql, refused = filled_in(attempt[0], outside), attempt[1]
    ways: dict[str, Any] = {"Flight": _by_flight}
    with contextlib.suppress(ImportError):
        import adbc_driver_flightsql.dbapi

        ways["ADBC"] = _by_adbc
        errors = adbc_driver_flightsql.dbapi.Error
    for way, ask in ways.items():
        try:
            answer = ask(server, sql)
        except (KnowledgeStoreError, OverflowError, ValueError) as error:
            assert WORDS not in str(error), f"{sql!r} saw outside: {error}"
        except Exception as error:
            assert way == "ADBC" and isinstance(error, errors), f"{sql!r} ended with {error!r}"
            assert WORDS not in str(error), f"{sql!r} saw outside: {error}"
        else:
            assert not refused, f"{sql!r} was answered by {way}"
            assert answer.nbytes > 2**20 or WORDS not in str(answer.to_pydict()), f"{sql!r} saw outside"
    return " and ".join(ways)


def _by_flight(server: Server, sql: str) -> pa.Table:
    with server.open() as store:
        return store.sql(sql, memory_limit=MEMORY_LIMIT, timeout=TIMEOUT)


def _by_adbc(server: Server, sql: str) -> pa.Table:
    import adbc_driver_flightsql.dbapi as flight_sql

    options = {"adbc.flight.sql.authorization_header": f"Bearer {TOKEN}"}
    with flight_sql.connect(server.address, db_kwargs=options) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetch_arrow_table()


def _nonsense(server: Server, chance: random.Random) -> None:
    """Some dozens of malformed requests on one connection."""
    with flight.FlightClient(server.address) as client:
        for _ in range(40):
            data = chance.randbytes(chance.choice((0, 3, 50, 5000)))
            request = {"sequences": {"dump": "small", "snapshot": chance.getrandbits(60), "kinds": ["positions"]}}
            inner = message([(chance.randrange(1, 7), chance.choice((data, chance.getrandbits(64)))) for _ in range(3)])
            command = message([(1, f"{TYPE_PREFIX}CommandGetDbSchemas".encode()), (2, inner)])
            whole = chance.choice((data, to_bytes(request), command))
            if whole:
                place = chance.randrange(len(whole))
                whole = whole[:place] + chance.randbytes(chance.randrange(3)) + whole[place + chance.randrange(3) :]
            with contextlib.suppress(flight.FlightError, pa.ArrowException):
                kind = chance.randrange(4)
                descriptor = flight.FlightDescriptor.for_command(whole)
                if kind == 0:
                    client.do_get(flight.Ticket(whole), OPTIONS).read_all()
                elif kind == 1:
                    client.get_flight_info(descriptor, OPTIONS)
                elif kind == 2:
                    writer, reader = client.do_exchange(descriptor, OPTIONS)
                    with contextlib.closing(writer):
                        writer.write_metadata(data)
                        writer.done_writing()
                        reader.read_all()
                else:
                    what = chance.choice((messages.READ, messages.OPEN, messages.FILES, "x"))
                    list(client.do_action(flight.Action(what, whole), OPTIONS))


def _vanish(server: Server) -> None:
    """A client that is killed while its query has no first row: the query's process is gone, and the slot is free."""
    program = (
        "from pyarrow import flight; import sys\n"
        "client = flight.FlightClient(sys.argv[1])\n"
        "options = flight.FlightCallOptions(headers=[(b'authorization', sys.argv[2].encode())])\n"
        "client.do_get(flight.Ticket(sys.argv[3].encode()), options)\n"
    )
    ticket = to_bytes({"sql": ENDLESS, "memory_limit": MEMORY_LIMIT, "timeout": 1000.0}).decode()
    client = subprocess.Popen(
        [sys.executable, "-c", program, server.address, f"Bearer {TOKEN}", ticket], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: bool(server.queries) or client.poll() is not None)
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    wait_until(lambda: not server.queries)


def _kill_in_an_epoch(server: Server, chance: random.Random, folder: Path) -> int:
    """Two servers killed while an epoch is read: it is the folder's, batch by batch."""
    plan = {"batch_size": chance.randrange(1, 6), "seed": chance.randrange(100), "order": chance.choice(("global", "blocks"))}
    expected = list(KnowledgeStore.open(folder, cache_size=0).batches(**plan))
    places = set(chance.sample(range(len(expected)), 2))
    with server.open() as store:
        for step, batch in enumerate(store.batches(**plan)):
            assert_equal(batch, expected[step])
            if step in places:
                server.kill()
                server.start()
    return len(places)
