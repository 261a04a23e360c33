"""A dump killed at every call it makes on its store's paths, and twin workers that take a name in between."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from torture.heartbeat import beat
from torture.host import Host
from torture.small_dump import (
    QUICK,
    check_complete,
    check_half_repaired,
    check_standing,
    committed,
    harm,
    published,
    write_dump,
)
from torture.tracing import CHANGING, Site, inject, on_paths, sites, store_paths, unavailable

__all__ = ["run", "unavailable"]

WORK = "torture.small_dump:work"
REPAIR = "torture.small_dump:repair_work"
CHAIN = 4  # kills in a row, at most


def run(seed: int, minutes: float, folder: Path, trials: int | None = None) -> dict[str, int]:
    """Kill the small dump at each of its calls, in an order of chance, then over and over at calls of chance.

    Args:
        seed: of the order.
        minutes: how long to go on.
        folder: an empty folder.
        trials: stop after as many.

    Returns:
        `faults` that were injected: `kills`, and `twins` that dumped while the worker stood still between two calls; those
        `survived`; `silent` losses; `calls` of the dump and `repair_calls` of a repair; `repairs_killed` among the kills, and
        `runs_killed_again`: kills of a run that went on after one.

    Raises:
        AssertionError: something acknowledged was lost, something published was replaced, or the re-run is not the whole dump.
    """
    deadline = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    counts = Counter(faults=0, survived=0, silent=0, kills=0, twins=0, repairs_killed=0, runs_killed_again=0)
    with Host(folder, "torture.small_dump") as host:
        dump = _Trials(host, folder)
        counts.update(calls=len(dump.calls), repair_calls=len(dump.repair_calls))
        repairs = iter(chance.sample(dump.repair_calls, len(dump.repair_calls)))
        planned: list[tuple[Callable[[Counter[str], Site], None], Site]] = []
        for site in chance.sample(dump.calls, len(dump.calls)):
            planned += [(dump.killed, site), (dump.twin, site)]
            planned += [(dump.repair_killed, each) for each in islice(repairs, 1)]
        planned += [(dump.repair_killed, each) for each in repairs]
        for trial, site in planned[:trials]:
            if time.monotonic() > deadline:
                break
            _tried(trial, counts, site, seed)
        while trials is None and time.monotonic() < deadline:
            _tried(dump.chain, counts, chance.choices(dump.calls, k=chance.randint(2, CHAIN)), seed)
    return dict(counts)


def _tried(trial: Callable, counts: Counter[str], where: Site | list[Site], seed: int) -> None:
    places = ", ".join(str(site) for site in (where if isinstance(where, list) else [where]))
    case = f"seed {seed}, {trial.__name__} at {places}"
    beat(case)
    try:
        trial(counts, where)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


class _Trials:
    """The small dump in a folder, traced."""

    def __init__(self, host: Host, folder: Path):
        self.host, self.store, self.whole = host, folder / "trial/store", folder / "whole/store"
        write_dump(self.whole)
        self._anew()
        self.paths = store_paths(host, self.store, WORK, str(self.store))
        self._anew()
        outcome = host.run(WORK, str(self.store), strace=on_paths(self.paths, CHANGING))
        check_complete(self.store, self.whole)
        self.calls = sites(outcome)
        harm(self.store)
        self.repair_paths = store_paths(host, self.store, REPAIR, str(self.store))
        harm(self.store)
        outcome = host.run(REPAIR, str(self.store), strace=on_paths(self.repair_paths, CHANGING))
        check_complete(self.store, self.whole)
        self.repair_calls = sites(outcome)

    def _anew(self) -> None:
        shutil.rmtree(self.store.parent, ignore_errors=True)
        self.store.parent.mkdir()

    def killed(self, counts: Counter[str], site: Site) -> None:
        """Killed once, gone on with."""
        self.chain(counts, [site])

    def chain(self, counts: Counter[str], where: list[Site]) -> None:
        """Killed, gone on with, killed …"""
        self._anew()
        acknowledged: set[int] = set()
        for number, site in enumerate(where):
            prefix = f"{number:x}"
            strace = on_paths(self.paths, CHANGING, prefix) + inject(site, "signal=SIGKILL")
            outcome = self.host.run(WORK, str(self.store), prefix=prefix, strace=strace)
            assert outcome.returncode in (0, -9), outcome.message
            acknowledged |= outcome.acknowledged
            check_standing(self.store, acknowledged, self.whole)
            if outcome.returncode:
                counts.update(faults=1, kills=1, runs_killed_again=int(number > 0))
        before = published(self.store)
        self._finish()
        check_complete(self.store, self.whole)
        self._untouched(before)
        counts["survived"] = counts["faults"]

    def repair_killed(self, counts: Counter[str], site: Site) -> None:
        """A damaged dump, whose repair is killed once, and done again."""
        self._anew()
        shutil.copytree(self.whole, self.store)
        harm(self.store)
        strace = on_paths(self.repair_paths, CHANGING) + inject(site, "signal=SIGKILL")
        outcome = self.host.run(REPAIR, str(self.store), strace=strace)
        assert outcome.returncode in (0, -9), outcome.message
        check_half_repaired(self.store, outcome.acknowledged, self.whole)
        if outcome.returncode:
            counts.update(faults=1, kills=1, repairs_killed=1)
        outcome = self.host.run(REPAIR, str(self.store), prefix="e")
        assert outcome.returncode == 0, outcome.message
        check_complete(self.store, self.whole)
        counts["survived"] = counts["faults"]

    def twin(self, counts: Counter[str], site: Site) -> None:
        """Stopped after a call; a twin makes the whole dump, of other bytes; then it goes on."""
        self._anew()
        strace = on_paths(self.paths, CHANGING) + inject(site, "signal=SIGSTOP")
        worker = self.host.worker(WORK, str(self.store), strace=strace)
        if worker.stopped():
            counts.update(faults=1, twins=1)
            before = published(self.store)
            outcome = self.host.run(WORK, str(self.store), QUICK, prefix="f")
            assert outcome.returncode == 0, outcome.message
            assert committed(self.store) == outcome.acknowledged
            self._untouched(before)
            before = published(self.store)
            worker.go_on()
        else:
            before = published(self.store)
        outcome = worker.wait()
        assert outcome.returncode == 0, outcome.message
        self._untouched(before)
        check_complete(self.store, self.whole, same_bytes=False)
        counts["survived"] = counts["faults"]

    def _finish(self) -> None:
        outcome = self.host.run(WORK, str(self.store), prefix="e")
        assert outcome.returncode == 0, outcome.message

    def _untouched(self, before: dict[str, tuple]) -> None:
        now = published(self.store)
        replaced = [path for path, file in before.items() if now.get(path) != file]
        assert not replaced, f"replaced after they were published: {replaced}"
