"""`make torture` tells a loop that hangs from one that is slow, ends when it is told to, and leaves nothing at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from processes import child_process
from torture.heartbeat import Reading, Watch, wait_for, wait_until
from torture.supervision import WORK, Ending, Processes, run_loop

CASE = "from torture.heartbeat import beat; import os, signal, threading, time; beat('case 7'); "
SPINS = {
    "in Python": CASE + "\nwhile True: pass",
    "in a library": CASE + "import duckdb; duckdb.sql('SELECT count(*) FROM range(1000000) a, range(1000000000) b').fetchall()",
    "in a process it started": CASE + "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])",
}
SLEEPS = {
    "asleep": CASE + "signal.pause()",
    "for a lock": CASE + "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "looking again and again": CASE + "\nwhile True: time.sleep(0.5)",
    "for a process it started": CASE + "import subprocess; subprocess.run(['sleep', 'infinity'])",
}


def endings(cases: dict[str, str], folder: Path, processes: Processes) -> Iterator[tuple[str, Ending]]:
    """How each of some pieces of Python ended; they run at once, since most of their time is waiting."""
    with ThreadPoolExecutor(len(cases)) as pool:
        runs = {name: pool.submit(processes.run, code, folder / name, [], seconds=600) for name, code in cases.items()}
        yield from ((name, run.result()) for name, run in runs.items())


def test_a_case_that_spins_hangs(tmp_path):
    for name, ending in endings(SPINS, tmp_path, Processes(spinning=1, idle=600)):
        assert ending.hung is not None and ending.result is None and ending.cut_off is None, name
        assert ending.hung.startswith("it used ") and ending.hung.endswith("s of processor time at 'case 7'"), name


def test_a_case_that_waits_for_ever_hangs(tmp_path):
    for name, ending in endings(SLEEPS, tmp_path, Processes(spinning=600, idle=1)):
        assert ending.hung is not None and ending.result is None and ending.cut_off is None, name
        assert ending.hung.startswith("it used no processor time for ") and ending.hung.endswith("at 'case 7'"), name


def test_a_loop_that_hangs_is_broken_and_says_where(tmp_path, monkeypatch):
    loop = "import sys\nsys.modules['torture.damage'] = sys\ndef stuck(*_):\n    while True: pass\nsys.run = stuck\n"
    monkeypatch.setattr("torture.supervision.WORK", loop + WORK)
    found = run_loop(Processes(spinning=1), "damage again", 5, 10, tmp_path, time.monotonic() + 6000)
    assert found["broken"].startswith("it hung: it used ") and "in stuck" in found["broken"]


def test_a_loop_whose_time_is_over_is_cut_off_and_not_broken(tmp_path):
    ending = Processes().run(CASE + "signal.pause()", tmp_path / "loop", [], seconds=0)
    assert ending.hung is None and ending.cut_off is not None


@pytest.mark.parametrize(("code", "idle"), [("while True: pass", False), ("import signal; signal.pause()", True)])
def test_a_worker_that_hangs_is_not_waited_for(code, idle):
    with child_process([sys.executable, "-c", code]) as process:
        hung = wait_for(process.pid, lambda: process.poll() is not None, spinning=1, idle=2)
    assert hung is not None and ("no processor time" in hung) == idle


def watched(readings: Iterable[tuple[float, str, float, bool]]) -> Iterator[str | None]:
    """What a watch says of (clock, case, processor seconds, ready), one after the other; the first is where it begins."""
    steps = iter([Reading(clock, case, {1: used}, used, ready) for clock, case, used, ready in readings])
    watch = Watch(lambda: next(steps), spinning=60, idle=60)
    for step in [*steps]:
        watch.read = lambda step=step: step
        yield watch.hung()


SECONDS = range(100_000)  # more than a day
SLOW = {
    "little of a busy processor": [(clock, "case", 0.02 * clock, False) for clock in SECONDS[:2900]],
    "none of it, though it is ready": [(clock, "case", 0.0, clock % 50 == 0) for clock in SECONDS],
    "much of it, for many cases": [(clock, f"case {clock // 50}", 1.0 * clock, False) for clock in SECONDS],
    "nothing but cases": [(clock, f"case {clock // 50}", 0.0, False) for clock in SECONDS],
    "what took most of it ended": [(clock, "case", 50.0 - clock // 30, False) for clock in SECONDS[:1500]],
}


@pytest.mark.parametrize("readings", SLOW.values(), ids=SLOW.keys())
def test_a_slow_machine_makes_nothing_hang(readings):
    assert set(watched(readings)) == {None}


HANGING = {
    "spinning": ([(clock, "case", 0.3 * clock, True) for clock in SECONDS[:210]], 202),
    "asleep": ([(clock, "case", 0.0, False) for clock in SECONDS[:70]], 61),
    "waking up now and then": ([(clock, "case", 0.001 * clock, False) for clock in SECONDS[:70]], 61),
    "asleep at its second case": ([(clock, f"case {clock > 100}", 0.0, clock < 101) for clock in SECONDS[:170]], 162),
}


@pytest.mark.parametrize(("readings", "moment"), HANGING.values(), ids=HANGING.keys())
def test_a_hanging_case_is_noticed_on_any_machine(readings, moment):
    verdicts = list(watched(readings))
    assert [number for number, verdict in enumerate(verdicts, 1) if verdict][:1] in ([moment - 1], [moment], [moment + 1])


def environments(mark: str) -> list[dict[str, str]]:
    """The environments of all processes that have a mark in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_text(errors="replace").split("\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        if f"MARK={mark}" in words:
            found.append(dict(word.split("=", 1) for word in words if "=" in word))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_an_interrupted_torture_leaves_no_process_and_no_file(tmp_path):
    mark, output = uuid.uuid4().hex, tmp_path / "torture.json"
    environment = {**os.environ, "MARK": mark, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.torture", "workers", "--minutes", "600", "--output", str(output)]
    with child_process(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as torture:

        def at_work() -> bool:
            """Itself, the loop, and what that starts. To look takes time that they need."""
            time.sleep(0.1)
            return len(environments(mark)) >= 6

        wait_until(at_work, lambda: torture.poll() is None)
        seen = environments(mark)
        folders = [Path(each["TMPDIR"]).parent.parent for each in seen if each.get("TMPDIR", "").endswith("/workers/tmp")]
        assert folders and all(folder.exists() for folder in folders)
        torture.send_signal(signal.SIGINT)
        printed, _ = torture.communicate()
    assert torture.returncode == 130
    assert "STOPPED by SIGINT" in printed
    assert not environments(mark)
    assert not any(folder.exists() for folder in folders)
    assert not output.exists()
