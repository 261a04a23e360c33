"""A store from somebody else is read within limits: bombs, faults and damage are told apart, and progress is heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from command_server import forked_command
from stores import commit_of, make_manifest, rewrite, write_store
from test_verify import Hearer, flip

from knowledge_store import InputError, StoreError, verify
from knowledge_store.errors import LimitError
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.isolation.child import Killed, limit, limit_time, load_arrow, started
from knowledge_store.writing.isolated import verify_isolated

GIB = 2**30


@pytest.fixture
def store(tmp_path) -> Path:
    return write_store(tmp_path / "store")


def test_it_finds_what_verify_finds(store):
    hearer = Hearer()
    assert verify_isolated(str(store), hearer) == verify(store)
    assert (hearer.total, hearer.done) == (2, 2)
    flip(store / "small/positions/00001.parquet", 100)
    found = verify_isolated(str(store))
    assert found == verify(store) and len(found.damage) == 1
    with pytest.raises(StoreError, match="there is no store"):
        verify_isolated(str(store / "nowhere"))
    with pytest.raises(InputError, match="at least 64 MiB"):
        verify_isolated(str(store), memory_limit=1000)
    with pytest.raises(InputError, match="at least 64 MiB"):
        verify_isolated(str(store), memory_limit=float("nan"))


def test_any_number_can_be_the_limit(store):
    for limit_given, code, text in (("inf", 0, "Sound"), ("nan", 2, "--memory-limit is nan; it must be above 0")):
        ended = forked_command("knowledge_store", "verify", store, "--memory-limit", limit_given)
        assert ended.returncode == code, ended.stderr
        assert text in ended.stdout + ended.stderr and "Traceback" not in ended.stderr


def make_bomb(store: Path) -> Path:
    """A table of a few kilobytes, with hashes as they should be, that stands for 64 GiB: one long text again and again."""
    rows = 2**16
    columns = []
    for field in sequences_schema(make_manifest()):
        if field.name == "file":
            texts = pa.array(["x" * 2**20])
            columns.append(pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), texts))
        else:
            columns.append(pa.array(np.ones(rows, np.int64)).cast(field.type))
    path = store / "small/sequences/00001.parquet"
    record = rewrite(path, pa.table(columns, names=sequences_schema(make_manifest()).names))
    commit = commit_of(store, 1)
    (store / "small/commits/00001.json").write_bytes(replace(commit, files={**commit.files, "sequences": record}).to_bytes())
    assert path.stat().st_size < 10_000
    return path


MEASURED = """
import resource, sys
from knowledge_store.errors import LimitError
from knowledge_store.writing.isolated import verify_isolated
try:
    verify_isolated(sys.argv[1], memory_limit=2**27)
except LimitError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)  # the child's largest size, bytes
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not heed the limit of memory")
def test_a_bomb_ends_within_its_limits_and_is_not_called_damage(store):
    make_bomb(store)
    with pytest.raises(LimitError, match=r"not verified within its limits: to read shard 1 of small .*0\.125 GiB"):
        verify_isolated(str(store), memory_limit=GIB // 8)
    # In a process of its own, whose only child is the one that reads the store.
    done = subprocess.run([sys.executable, "-c", MEASURED, str(store)], capture_output=True, text=True, check=True)
    sentence, peak = done.stdout.splitlines()
    assert "not verified within its limits" in sentence
    assert int(peak) < GIB
    answer = forked_command("knowledge_store", "verify", store, "--memory-limit", "0.125")
    assert answer.returncode == 1 and answer.stdout == ""
    assert "to read shard 1 of small" in answer.stderr
    assert "Damage" not in answer.stderr and "Traceback" not in answer.stderr


def spin(request, answer, report):
    """A task: goes on for ever, in bits that are each short enough, or in one that is not."""
    limit(GIB, 1)
    for _ in range(request["short"]):
        limit_time(1000)
    if request["signal"]:
        os.kill(os.getpid(), request["signal"])
    limit_time(0.05)
    while True:
        pass


@pytest.mark.parametrize("number", [0, signal.SIGSEGV])
def test_what_ended_a_child_is_told(number):
    task = {"short": 3, "signal": int(number)}
    with pytest.raises(Killed) as raised, started("test_isolated_verify:spin", task) as child:
        child.result()
    assert raised.value.signal == (number or signal.SIGALRM)


def fail(request, answer, report):
    """A task that fails as nobody thought of, or for want of memory."""
    report({"said": "before"})
    raise MemoryError("no more") if request["memory"] else ZeroDivisionError("nobody thought of it")


def test_what_a_task_raises_is_raised():
    said: list = []
    with pytest.raises(MemoryError, match="no more"), started("test_isolated_verify:fail", {"memory": True}) as child:
        child.result(said.append)
    assert said == [{"said": "before"}]
    match = "ZeroDivisionError: nobody thought of it"
    with pytest.raises(Exception, match=match), started("test_isolated_verify:fail", {"memory": False}) as child:
        child.result()


def convert(request, answer, report):
    """A task that has Arrow convert values of Python, for which it looks for pandas."""
    load_arrow()
    return {"values": pa.array([1, None]).to_pylist(), "pandas": "pandas" in sys.modules}


def test_pandas_is_not_loaded_where_it_is_not_used():
    with started("test_isolated_verify:convert", {}) as child:
        assert child.result() == {"values": [1, None], "pandas": False}
