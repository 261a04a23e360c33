"""Hostile SQL: nothing outside the store is read, nothing is written, and limits of memory and time hold."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from hostile_sql import BOMBS, EXPRESSION_BOMBS, HARMLESS, REFUSED, ROW_BOMBS
from processes import child_process
from stores import write_store
from torture.heartbeat import wait_for, wait_until
from torture.hostile_sql import Stand, run

from knowledge_store import DamageError, InputError, KnowledgeStore, QueryError, StoreError
from knowledge_store.isolation.child import Killed
from knowledge_store.sql.isolated import _result
from knowledge_store.sql.query import QUERY_THREAD, Query
from knowledge_store.sql.statement import Statement

MIB = 2**20
AMPLE = 1000.0  # seconds, where a limit of time is not what is tested


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def store(stand: Stand) -> KnowledgeStore:
    return KnowledgeStore.open(stand.outside / "store")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(stand, monkeypatch, name):
    monkeypatch.chdir(stand.outside)
    assert stand.attempt(REFUSED[name], timeout=AMPLE) == "refused"
    stand.check(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(stand, monkeypatch, name):
    monkeypatch.chdir(stand.outside)
    stand.attempt(HARMLESS[name], timeout=AMPLE)
    stand.check(name)


@pytest.mark.parametrize("name", ROW_BOMBS)
def test_bombs_of_rows(stand, name):
    assert stand.attempt(ROW_BOMBS[name], timeout=0.2) == "interrupted"
    stand.check(name)


@pytest.mark.parametrize("name", EXPRESSION_BOMBS)
def test_bombs_of_expressions(stand, name):
    stand.attempt(EXPRESSION_BOMBS[name], isolated=True, timeout=0.2)
    stand.check(name)


@pytest.mark.parametrize("name", ["read_text", "bare Parquet file", "EXPLAIN ANALYZE COPY", "INSERT in WITH", "two statements"])
def test_refused_in_a_process_of_its_own(stand, monkeypatch, name):
    monkeypatch.chdir(stand.outside)
    assert stand.attempt(REFUSED[name], isolated=True, timeout=AMPLE) == "refused"
    stand.check(name)


def test_combinations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torture.hostile_sql.BOMBS", {"long list": BOMBS["long list"]})
    refused = dict(list(REFUSED.items())[::3])
    monkeypatch.setattr("torture.hostile_sql.REFUSED", refused)
    counts = run(seed=5, minutes=0, folder=tmp_path, combinations=40)
    assert counts["attempts"] == counts["survived"] == len(refused) + len(HARMLESS) + 1 + 40
    assert counts["silent"] == 0


QUERIES = [
    "SELECT * FROM positions ORDER BY ALL",
    "SELECT * FROM candidates ORDER BY ALL",
    "SELECT * FROM sequences",
    "SELECT * FROM shards JOIN dumps USING (dump)",
    "SHOW TABLES",
    "SELECT a.dump, b.dump FROM dumps a, dumps b",
    "SELECT NULL, [1, NULL], {'a': 1}, MAP {'a': 1}, 'x'::BLOB, 1.5::DECIMAL(9, 2), 'a'::ENUM('a', 'b'), uuid() = uuid()",
    "SELECT 1 AS a WHERE false",
    "PIVOT positions ON is_target USING count(*) GROUP BY dump",
]


@pytest.mark.parametrize("query", QUERIES)
def test_an_answer_is_the_same_in_a_process_of_its_own(store, query):
    assert store.sql(query, isolated=True).equals(store.sql(query))


def test_pivot(store):
    targets = store.sql("SELECT is_target FROM positions")["is_target"].to_pylist()
    pivot = "PIVOT (SELECT is_target FROM positions) ON is_target USING count(*)"
    for query in (pivot, f"/* x */ WITH p AS ({pivot}) FROM p"):
        assert store.sql(query).to_pylist() == [{"false": targets.count(False), "true": targets.count(True)}]


@pytest.mark.parametrize("isolated", [False, True])
def test_time(store, isolated):
    with pytest.raises(QueryError, match=r"interrupted: it had not been answered after 0\.3 s, its limit of time"):
        store.sql(BOMBS["cross join"], timeout=0.3, isolated=isolated)  # by itself it would take years
    assert store.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]


def query_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == QUERY_THREAD]


def test_time_of_planning(store, monkeypatch):
    """A statement is planned without a look at the clock: the caller has his answer all the same."""
    planning, planned = threading.Event(), threading.Event()

    class Planned(Query):
        def __init__(self, *arguments):
            planning.set()
            planned.wait()
            super().__init__(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("knowledge_store.sql.query.Query", Planned)
        with pytest.raises(QueryError, match="interrupted"):
            store.sql(BOMBS["cross join"], timeout=0.1)
    assert planning.wait(AMPLE)
    [thread] = query_threads()  # it is being planned still
    assert store.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]
    planned.set()
    thread.join(AMPLE)  # it ends when that is done, and does not run the query
    assert not thread.is_alive()


def test_a_statement_of_many_parts_does_not_outlive_its_planning(store):
    with pytest.raises(QueryError, match="interrupted"):
        store.sql(" UNION ALL ".join(["SELECT 1"] * 3000), timeout=1e-6)
    assert store.sql("SELECT 1 AS one").to_pylist() == [{"one": 1}]
    for thread in query_threads():
        thread.join(AMPLE)
        assert not thread.is_alive()


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", ["secret_directory", "extension_directory"])
def test_no_setting_names_the_home(store, name, isolated):
    [row] = store.sql(f"SELECT current_setting('{name}')::VARCHAR AS value", isolated=isolated).to_pylist()
    assert str(Path.home()) not in row["value"] and not Path(row["value"]).exists()
    settings = store.sql("SELECT value FROM duckdb_settings()", isolated=isolated)["value"].to_pylist()
    assert not any(str(Path.home()) in (value or "") for value in settings)


SLOW = """
import os, resource, time
from knowledge_store.catalogue import dumps
from knowledge_store.isolation.child import main
from knowledge_store.sql import isolated
isolated.OPENING_TIME = 0.5
def slow(*args, **options):
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] < 2**34
    while True:
        time.sleep(1)
dumps.open_dumps = slow
main(os.getppid())
"""


def test_opening_a_store_has_limits_of_its_own(stand):
    """They are there before anything of the store is read, and the SQL is not blamed for what it had no part in."""
    request = {"store": str(stand.outside / "store"), "sql": "SELECT 1", "form": "arrow", "memory_limit": 2**28, "timeout": 0.1}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW]
    with child_process(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdin and child.stderr
        child.stdin.write(json.dumps({"task": "knowledge_store.sql.isolated:answer", "request": request}).encode() + b"\n")
        child.stdin.flush()
        report = child.stderr.read().decode()
    assert (child.returncode, report) == (-signal.SIGALRM, "")
    statement = Statement("SELECT 1", memory_limit=2**28, timeout=0.1)
    with pytest.raises(StoreError, match=r"could not be opened within 300 s and 4 GiB \(the process ended by SIGALRM\)"):
        _result(Ended(signal.SIGALRM), statement)
    with pytest.raises(QueryError, match="interrupted"):
        _result(Ended(signal.SIGALRM, {"state": "opened"}), statement)
    with pytest.raises(QueryError, match="SIGABRT"):
        _result(Ended(signal.SIGABRT, {"state": "opened"}), statement)


class Ended:
    """A child that a signal ended after some reports."""

    def __init__(self, number: int, *reports: dict):
        self.number, self.reports = number, reports

    def result(self, hear):
        for report in self.reports:
            hear(report)
        raise Killed(self.number)


@pytest.mark.parametrize("isolated", [False, True])
def test_memory(store, isolated):
    for query in (BOMBS["list gathered"], BOMBS["string gathered"]):
        with pytest.raises(QueryError, match="memory") as raised:
            store.sql(query, memory_limit=64 * MIB, timeout=AMPLE, isolated=isolated)
        assert "64 MiB" in str(raised.value)
        assert "SET " not in str(raised.value) and "temporary" not in str(raised.value)  # advice that no query may follow


def test_what_duckdb_lacks_is_said_with_advice_that_can_be_followed(store):
    with pytest.raises(QueryError, match=r"than its limit of 64 MiB: .*--memory-limit\), or ask for less$") as raised:
        store.sql("SELECT list(i) FROM range(100000000) AS t(i)", memory_limit=64 * MIB, timeout=AMPLE)
    assert not any(word in str(raised.value) for word in ("SET ", "Possible", "\n"))


@pytest.mark.parametrize("isolated", [False, True])
def test_answers_too_large(store, isolated):
    with pytest.raises(QueryError, match="cut off: its answer takes more memory than the limit of 64 MiB"):
        store.sql(BOMBS["endless rows"], memory_limit=64 * MIB, timeout=AMPLE, isolated=isolated)


@pytest.mark.parametrize("isolated", [False, True])
def test_limits_that_are_none(store, isolated):
    for wrong in ({"memory_limit": 0}, {"memory_limit": -1}, {"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}):
        with pytest.raises(InputError, match="limit"):
            store.sql("SELECT 1", isolated=isolated, **wrong)
    large = {"memory_limit": 2**80, "timeout": 1e300}
    assert store.sql("SELECT 1 AS one", isolated=isolated, **large).to_pylist() == [{"one": 1}]


def test_damage_is_named_from_a_process_of_its_own(tmp_path):
    folder = write_store(tmp_path / "store")
    path = folder / "small/positions/00001.parquet"
    opened = KnowledgeStore.open(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"positions/00001\.parquet is damaged"):
        opened.sql("SELECT count(token_id) FROM positions", isolated=True)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command("knowledge_store", "sql", *arguments)


def test_the_command_interrupts_and_says_so(stand):
    answer = command(stand.outside / "store", BOMBS["strings compared"], "--timeout", "0.3")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "Error: this SQL was interrupted: it had not been answered after 0.3 s, its limit of time\n"


def test_a_time_that_is_over_at_once_is_the_querys(stand):
    answer = command(stand.outside / "store", "SELECT 1", "--timeout", "1e-9")
    assert answer.returncode == 2
    assert answer.stderr.startswith("Error: this SQL was interrupted: it had not been answered after 1e-09 s")


def test_the_command_streams_and_stops(stand):
    query = "SELECT repeat('x', 500) FROM range(100000000000)"
    answer = command(stand.outside / "store", query, "--format", "csv", "--memory-limit", "0.05", "--timeout", AMPLE)
    assert answer.returncode == 2
    assert answer.stderr.startswith("Error: this SQL was cut off: its answer takes more memory than the limit of 51.2 MiB")
    rows = answer.stdout.splitlines()[1:]
    assert len(rows) > 1000
    assert set(rows) == {"x" * 500}


def test_the_command_counts_so_far_and_no_further(stand):
    answer = command(stand.outside / "store", "SELECT * FROM range(100000000000)", "--timeout", AMPLE)
    assert answer.returncode == 0
    assert len(answer.stdout.splitlines()) == 201
    assert answer.stderr == "200 of more than 1,000,000 rows shown: --format csv or json gives all\n"


def test_one_large_cell_is_put_into_words_within_the_limit(stand):
    query = [str(stand.outside / "store"), "SELECT range(20000000)", "--format", "json"]
    query += ["--memory-limit", "0.25", "--timeout", str(AMPLE)]
    # By way of another process, whose only children these are.
    measure = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    measure += "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    between = [sys.executable, "-c", measure, sys.executable, "-m", "knowledge_store.cli", "sql", *query]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(between, capture_output=True, text=True, env=environment, check=True)
    code, largest = map(int, answer.stdout.split())
    assert code == 2
    assert answer.stderr.count("\n") == 1
    assert largest < 1024 * (600 if sys.platform == "linux" else 2**20)


def children(pid: int) -> list[int]:
    return [int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def processor_ticks(pid: int) -> int:
    """How much processor time a process took, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


DOUBLED = ", ".join(f"t{n} AS (SELECT * FROM {f't{n - 1} a, t{n - 1} b' if n else 'dumps'})" for n in range(22))
PLANNING = f"WITH {DOUBLED} SELECT 1 FROM t21"  # DuckDB keeps Python's lock: no thread of the query's process can watch


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("query", [BOMBS["strings compared"], PLANNING], ids=["answering", "planning"])
def test_the_query_ends_with_its_command(stand, number, query):
    arguments = [sys.executable, "-m", "knowledge_store.cli", "sql", str(stand.outside / "store"), query]
    arguments += ["--timeout", str(AMPLE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with child_process(arguments, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: bool(children(process.pid)), lambda: process.poll() is None)
        [child] = children(process.pid)
        # It may enlarge no file once it has opened the store; then it begins with the query.
        limits, running = Path(f"/proc/{child}/limits"), lambda: process.poll() is None
        wait_until(lambda: bool(re.search(r"^Max file size +0 ", limits.read_text(), re.MULTILINE)), running)
        opened = processor_ticks(child)
        wait_until(lambda: processor_ticks(child) > opened + 50, running)  # half a second of work: it is at it
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert errors == ("Interrupted.\n" if number == signal.SIGINT else "")
    wait_until(lambda: not alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nobody that a parent ended")
def test_a_query_whose_parent_was_gone_already_ends():
    program = "from knowledge_store.isolation.child import main; main(1 << 30)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with child_process([sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment) as child:
        assert child.wait() == 1  # though its standard input is open still


def test_ctrl_c_ends_a_query_of_a_program(stand):
    program = f"""
import os, signal, sys, threading, time
from concurrent.futures import wait
from knowledge_store import KnowledgeStore
from knowledge_store.sql.query import Query
signal.signal(signal.SIGINT, signal.default_int_handler)
store = KnowledgeStore.open({str(stand.outside / "store")!r})
answer = Query.answer
def answering(query):
    Query.answer = answer
    threading.Thread(target=lambda: (wait_for_main(), os.kill(os.getpid(), signal.SIGINT))).start()
    return answer(query)
def wait_for_main():  # until it waits for the query
    while True:
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None:
            if frame.f_code is wait.__code__:
                return
            frame = frame.f_back
        time.sleep(0.01)
Query.answer = answering
try:
    store.sql({BOMBS["cross join"]!r})
except KeyboardInterrupt:
    print("stopped", store.sql("SELECT 1 AS one").to_pylist())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "stopped [{'one': 1}]\n")


CLOCK = """
import os, signal, threading, time
from knowledge_store.isolation.child import _Outlet
reading, writing = os.pipe()
signal.setitimer(signal.ITIMER_REAL, 1000)
def read_later():
    while signal.getitimer(signal.ITIMER_REAL)[0]:  # until the clock stands still
        time.sleep(0.1)
    left = 1 << 20  # more than a pipe holds: the writer is still at it
    while left:
        left -= len(os.read(reading, left))
threading.Thread(target=read_later).start()
written = 0
while written < 1 << 20:
    written += _Outlet(writing).write(bytes((1 << 20) - written))
assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
print("done")
"""


def test_the_clock_stands_still_while_a_reader_is_waited_for():
    """What is read is read only once the clock stands still: otherwise this never ends."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with child_process([sys.executable, "-c", CLOCK], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert wait_for(process.pid, lambda: process.poll() is not None) is None
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"


def waiting_bytes(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_slow_reader_gets_all_of_the_answer(stand):
    """Most of the answer is read only once the pipe to its reader holds little more."""
    arguments = [sys.executable, "-m", "knowledge_store.cli", "sql", str(stand.outside / "store")]
    arguments += ["SELECT range AS n FROM range(100000)", "--format", "json", "--timeout", str(AMPLE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with child_process(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        begun = process.stdout.read(10)
        wait_until(lambda: waiting_bytes(process.stdout.fileno()) > 2**15)  # pipes hold 2**16
        rest = process.stdout.read()
        assert process.stderr.read() == b""
    assert json.loads(begun + rest)[-1] == {"n": 99_999}
