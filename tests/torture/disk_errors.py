"""A dump whose disk refuses a call, takes half of a write, or is full: the writer alone, and `teacher-dump` with threads."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from stores import contents

from knowledge_store import verify
from torture import journal_disk, small_dump, teacher_work
from torture.heartbeat import beat
from torture.host import Host, Outcome
from torture.journal_disk import Journal, after_power_cut, lay_out, mounted
from torture.small_dump import check_complete, check_standing, committed, write_dump
from torture.tracing import CHANGING, LOOKING, Site, inject, on_paths, sites, store_paths, unavailable

__all__ = ["run", "unavailable"]

WRITER = "torture.small_dump:work"
COMMAND = "torture.teacher_work:work"
SHARDS = teacher_work.ROWS // teacher_work.SHARD_SIZE

REFUSALS = {
    "openat": ("EMFILE", "ENFILE", "ENOSPC", "EIO", "EACCES"),
    "write": ("ENOSPC", "EIO", "EDQUOT"),
    "fsync": ("EIO", "ENOSPC"),
    "link": ("EIO", "ENOSPC", "EMLINK"),
    "unlink": ("EIO", "EROFS"),
    "mkdir": ("ENOSPC", "EIO"),
    "close": ("EIO", "ENOSPC"),
    "flock": ("ENOLCK", "EIO"),
}  # any other call: EIO


def run(seed: int, minutes: float, folder: Path, trials: int | None = None) -> dict[str, int]:
    """Refuse the calls of a dump, one at a time in an order of chance, with each error that a disk has for it.

    Args:
        seed: of the order.
        minutes: how long to go on.
        folder: an empty folder.
        trials: stop after as many of each sort.

    Returns:
        `faults` that were injected; those `survived`; `silent`: dumps that lack something and ended with exit code 0;
        `refused`: those that ended with an error that names a file; `done_nevertheless`: those that could do without; `calls`
        that were refused in the writer by itself and `command_calls` in the command with its threads; `short_writes`,
        `full_disks` (0 where there is no FUSE).

    Raises:
        AssertionError: an unclear error, a loss, a hang, or a re-run that is not the whole dump.
    """
    deadline = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    names = (
        "faults",
        "survived",
        "silent",
        "refused",
        "done_nevertheless",
        "calls",
        "command_calls",
        "short_writes",
        "full_disks",
    )
    counts = Counter(dict.fromkeys(names, 0))
    with Host(folder, "torture.small_dump", "torture.teacher_work") as host:
        sorts: list[tuple[Callable[..., None], list[tuple]]] = []
        for dump in (_WriterDump(host, folder / "writer"), _CommandDump(host, folder / "command")):
            refusals = [(site, each) for site in dump.sites() for each in REFUSALS.get(site.call, ("EIO",))]
            sorts.append((dump.refused, refusals))
        disk = _SmallDisk(host, folder / "limited")
        if journal_disk.unavailable(folder) is None:
            writes, size = disk.measured()
            sorts.append((disk.shortened, [(number,) for number in range(1, writes + 1)]))
            sorts.append((disk.full, [(capacity,) for capacity in chance.sample(range(size), 40)]))
        planned = []
        for trial, arguments in sorts:
            chance.shuffle(arguments)
            planned += [(trial, each) for each in arguments[:trials]]
        chance.shuffle(planned)
        for trial, each in planned:
            if time.monotonic() > deadline:
                break
            case = f"seed {seed}, {trial.__qualname__} {' '.join(str(word) for word in each)}"
            beat(case)
            try:
                trial(counts, *each)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
    return dict(counts)


def _check_ending(counts: Counter[str], outcome: Outcome, folder: Path, complete: bool) -> None:
    """An error is one line that names a file; without one, all is there."""
    counts["faults"] += 1
    if outcome.returncode == 0:
        counts["silent"] += not complete
        assert complete, "it ended with exit code 0, and the dump is not complete"
        counts["done_nevertheless"] += 1
        return
    lines = [line for line in outcome.message.splitlines() if line.startswith("Error: ")]
    assert outcome.returncode == 2, outcome.message
    assert len(lines) == 1, outcome.message
    assert "Traceback" not in outcome.message, outcome.message
    assert str(folder) in lines[0], f"no file is named: {outcome.message}"
    assert "damaged" not in lines[0], f"nothing is damaged: {outcome.message}"
    counts["refused"] += 1


class _WriterDump:
    """The small dump, whose writer is refused something."""

    counted = "calls"

    def __init__(self, host: Host, folder: Path):
        self.host, self.folder = host, folder
        self.store, self.whole = folder / "trial/store", folder / "whole/store"
        self.whole.parent.mkdir(parents=True)

    def work(self, store: Path) -> tuple[str, ...]:
        return WRITER, str(store)

    def make_whole(self) -> None:
        write_dump(self.whole)

    def check_standing(self, acknowledged: set[int]) -> None:
        check_standing(self.store, acknowledged, self.whole)

    def check_complete(self) -> None:
        check_complete(self.store, self.whole)

    def complete(self) -> bool:
        return committed(self.store) == set(range(small_dump.SHARDS))

    def sites(self) -> list[Site]:
        """Every call that can be refused."""
        self.make_whole()
        self._anew()
        self.paths = store_paths(self.host, self.store, *self.work(self.store))
        self._anew()
        outcome = self.host.run(*self.work(self.store), strace=on_paths(self.paths, CHANGING + LOOKING))
        assert outcome.returncode == 0, outcome.message
        self.check_complete()
        return sites(outcome)

    def _anew(self) -> None:
        shutil.rmtree(self.store.parent, ignore_errors=True)
        self.store.parent.mkdir()

    def refused(self, counts: Counter[str], site: Site, error: str) -> None:
        """Refuse one call."""
        self._anew()
        strace = on_paths(self.paths, CHANGING + LOOKING) + inject(site, f"error={error}")
        outcome = self.host.run(*self.work(self.store), strace=strace)
        if not outcome.injected:
            return  # threads are not as quick every time
        counts[self.counted] += 1
        _check_ending(counts, outcome, self.store.parent, self.complete())
        self.check_standing(outcome.acknowledged)
        again = self.host.run(*self.work(self.store), prefix="1")
        assert again.returncode == 0, again.message
        self.check_complete()
        counts["survived"] += 1


class _CommandDump(_WriterDump):
    """`teacher-dump run`, whose reader, teacher and writer are threads of their own."""

    counted = "command_calls"

    def work(self, store: Path) -> tuple[str, ...]:
        return COMMAND, str(self.folder / "rows.jsonl"), str(store)

    def make_whole(self) -> None:
        teacher_work.write_corpus(self.folder)
        outcome = self.host.run(*self.work(self.whole))
        assert outcome.returncode == 0, outcome.message

    def committed(self) -> set[int]:
        """The shards with a commit record."""
        return {int(path.stem) for path in self.store.glob(f"{teacher_work.DUMP}/commits/[0-9]*.json")}

    def complete(self) -> bool:
        return self.committed() == set(range(SHARDS))

    def check_standing(self, acknowledged: set[int]) -> None:
        standing = self.committed()
        assert acknowledged <= standing, f"lost: shards {sorted(acknowledged - standing)} were acknowledged"
        if standing:
            found = verify(self.store)
            assert found.sound, found

    def check_complete(self) -> None:
        assert not small_dump.leftovers(self.store), small_dump.leftovers(self.store)
        mine, theirs = contents(self.store), contents(self.whole)
        assert mine == theirs, [name for name in theirs if mine.get(name) != theirs[name]]


class _SmallDisk:
    """The small dump on a disk that takes less than it is given."""

    def __init__(self, host: Host, folder: Path):
        self.host, self.folder = host, folder
        self.whole = folder / "whole/store"
        self.whole.parent.mkdir(parents=True)

    def measured(self) -> tuple[int, int]:
        """How many writes a dump takes, and how many bytes."""
        write_dump(self.whole)
        journal, _ = self._dump()
        sizes = [len(change[3]) // 2 for change in journal if change[0] == "write"]
        return len(sizes), sum(sizes)

    def _dump(self, **faults: int) -> tuple[Journal, Outcome]:
        with mounted(self.folder, **faults) as (disk, file):
            outcome = self.host.run(WRITER, f"{disk}/store")
        journal: Journal = json.loads(file.read_text())
        file.unlink()
        return journal, outcome

    def _go_on(self, journal: Journal, acknowledged: set[int]) -> None:
        """What stands on the disk is on a larger one now."""
        place = self.folder / "larger"
        shutil.rmtree(place, ignore_errors=True)
        lay_out(after_power_cut(journal, None, everything=True), place)
        check_standing(place / "store", acknowledged, self.whole)
        again = self.host.run(WRITER, str(place / "store"), prefix="1")
        assert again.returncode == 0, again.message
        check_complete(place / "store", self.whole)

    def shortened(self, counts: Counter[str], number: int) -> None:
        """One write takes but half of what it is given."""
        journal, outcome = self._dump(shorten=number)
        assert outcome.returncode == 0, outcome.message
        counts["short_writes"] += 1
        _check_ending(counts, outcome, self.folder, outcome.acknowledged == set(range(small_dump.SHARDS)))
        self._go_on(journal, outcome.acknowledged)
        counts["survived"] += 1

    def full(self, counts: Counter[str], capacity: int) -> None:
        """The disk is full after `capacity` bytes, in the middle of a write."""
        journal, outcome = self._dump(capacity=capacity)
        assert outcome.returncode == 2, outcome.message
        assert "No space left on device" in outcome.message
        counts["full_disks"] += 1
        _check_ending(counts, outcome, self.folder, False)
        self._go_on(journal, outcome.acknowledged)
        counts["survived"] += 1
