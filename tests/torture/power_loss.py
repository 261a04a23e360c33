"""A dump on a disk that loses what was not flushed: cut at every flush and at moments of chance."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from torture.host import Host
from torture.journal_disk import MARK, ROOT, Disk, Journal, after_power_cut, lay_out, mounted, unavailable
from torture.small_dump import check_complete, check_standing, write_dump

__all__ = ["run", "unavailable"]

WORK = "torture.small_dump:work"
CUTS_BETWEEN = 10  # cuts of a dump that was killed and gone on with, at moments of chance


def work(acknowledge: Callable[[int], None], disk: str) -> None:
    """Make the small dump on a disk; what is acknowledged is marked in its journal at once."""

    def mark(shard: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{disk}/{MARK}{shard}").stat()

    write_dump(Path(disk) / "store", mark)


def run(seed: int, minutes: float, folder: Path, cuts: int | None = None) -> dict[str, int]:
    """Cut the power at every flush of the small dump, then of dumps that were killed before and gone on with.

    Args:
        seed: of the moments, and of what survives that was not flushed.
        minutes: how long to go on.
        folder: an empty folder.
        cuts: stop after as many.

    Returns:
        `faults`: cuts that left different disks; those `survived`; `silent` losses; `flushes` of the dump; `killed_before`:
        cuts of a dump that a second run went on with after the first was killed.

    Raises:
        AssertionError: something acknowledged was lost, or the re-run is not the whole dump.
    """
    deadline = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    counts = Counter(faults=0, survived=0, silent=0, killed_before=0)
    whole = folder / "whole/store"
    write_dump(whole)
    with Host(folder, "torture.small_dump", "torture.power_loss") as host:
        cutter = _Cutter(host, folder, whole, counts, seed)
        journal = _recorded(host, folder)
        flushes = [number for number, change in enumerate(journal) if change[0] == "sync"]
        counts["flushes"] = len(flushes)
        # Just before each flush, and as soon as it is done.
        moments = [moment for flush in flushes for moment in (flush, flush + 1)]
        chance.shuffle(moments)
        for moment in moments[:cuts]:
            if time.monotonic() > deadline:
                break
            cutter.cut(journal[:moment], None)
            cutter.cut(journal[:moment], chance)
        # Killed where a flush was due: what was done is there for the next run to see, and may yet be lost.
        kills = [flush + 1 for flush in flushes]
        chance.shuffle(kills)
        for kill in chain(kills[:cuts], iter(lambda: chance.randint(1, len(journal)), None) if cuts is None else ()):
            if time.monotonic() > deadline:
                break
            continued = _recorded(host, folder, kill)
            for moment in [len(continued), *(chance.randint(kill, len(continued)) for _ in range(cuts or CUTS_BETWEEN))]:
                before = counts["faults"]
                for kept in (None, chance):
                    if time.monotonic() < deadline:
                        cutter.cut(continued[:moment], kept, kill)
                counts["killed_before"] += counts["faults"] - before
    return dict(counts)


def _recorded(host: Host, folder: Path, kill: int | None = None) -> Journal:
    """The journal of a dump; of one killed at change `kill` and gone on with by a second run."""
    with mounted(folder, **({} if kill is None else {"kill": kill})) as (disk, file):
        codes = [host.run("torture.power_loss:work", str(disk)).returncode]
        if codes == [-9]:
            codes.append(host.run("torture.power_loss:work", str(disk), prefix="1").returncode)
    journal: Journal = json.loads(file.read_text())
    file.unlink()
    assert codes in ([0], [-9, 0]), codes
    return journal


class _Cutter:
    """Lays out what a cut leaves, looks at it, and goes on with the dump."""

    def __init__(self, host: Host, folder: Path, whole: Path, counts: Counter[str], seed: int):
        self._host, self._place, self._whole, self._counts, self._seed = host, folder / "left", whole, counts, seed
        self._seen: set[str] = set()

    def cut(self, journal: Journal, chance: random.Random | None, killed: int | None = None) -> None:
        """Cut the power at the end of a journal."""
        acknowledged = {change[1] for change in journal if change[0] == "mark"}
        left = after_power_cut(journal, chance)
        known = _fingerprint(left, acknowledged)
        if known in self._seen:
            return
        self._seen.add(known)
        shutil.rmtree(self._place, ignore_errors=True)
        lay_out(left, self._place)
        store = self._place / "store"
        self._counts["faults"] += 1
        try:
            check_standing(store, acknowledged, self._whole)
            outcome = self._host.run(WORK, str(store), prefix="2")
            assert outcome.returncode == 0, outcome.message
            check_complete(store, self._whole)
        except AssertionError as error:
            before = "" if killed is None else f" (killed at change {killed} and gone on with)"
            what = "what was flushed" if chance is None else "a part of what was not flushed, too,"
            raise AssertionError(
                f"seed {self._seed}: power cut after {len(journal)} changes{before}; {what} survived: {error}"
            ) from error
        self._counts["survived"] += 1


def _fingerprint(disk: Disk, acknowledged: set[int]) -> str:
    """The same for disks with the same files under the same names."""

    def listing(inode: int) -> list[object]:
        contents = disk.inodes[inode]
        if isinstance(contents, bytearray):
            return [inode, contents.hex()]
        return [(name, listing(contents[name])) for name in sorted(contents)]

    return hashlib.sha256(json.dumps([listing(ROOT), sorted(acknowledged)]).encode()).hexdigest()
