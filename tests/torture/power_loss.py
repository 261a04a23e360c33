"""A dump, and a repair, on a disk that loses what was not flushed: cut at every flush and at moments of chance."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torture.heartbeat import beat
from torture.host import Host
from torture.journal_disk import MARK, ROOT, Disk, Journal, after_power_cut, lay_out, mounted, unavailable
from torture.small_dump import check_complete, check_half_repaired, check_standing, harm, repair_dump, write_dump

__all__ = ["run", "unavailable"]

WORK = "torture.small_dump:work"
REPAIR = "torture.small_dump:repair_work"
CUTS_BETWEEN = 10  # cuts of a dump that was killed and gone on with, at moments of chance


def work(acknowledge: Callable[[int], None], disk: str) -> None:
    """Make the small dump on a disk; what is acknowledged is marked in its journal at once."""
    write_dump(Path(disk) / "store", partial(_mark, disk))


def repair_work(acknowledge: Callable[[int], None], disk: str) -> None:
    """Repair the small dump on a disk, and mark what is acknowledged."""
    repair_dump(Path(disk) / "store", partial(_mark, disk))


def _mark(disk: str, shard: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path(f"{disk}/{MARK}{shard}").stat()


def run(seed: int, minutes: float, folder: Path, cuts: int | None = None) -> dict[str, int]:
    """Cut the power on the small dump, alone and killed and gone on with, and on its repair.

    First the end of every dump that was killed where a flush was due, since what the second run finds there may yet be lost,
    and of a repair; then every flush of a dump left alone and of a repair, and moments of killed dumps, in an order of chance;
    then other kills.

    Args:
        seed: of the order, and of what survives that was not flushed.
        minutes: how long to go on.
        folder: an empty folder.
        cuts: stop after so many flushes of each sort. A kill before the dump's last flush is among them.

    Returns:
        `faults`: cuts that left different disks; those `survived`; `silent` losses; `flushes` of the dump, `repair_flushes` of
        a repair; `killed_before`: cuts of a dump that a second run went on with after the first was killed; `repairs_cut`.

    Raises:
        AssertionError: something acknowledged was lost, or the re-run is not the whole dump.
    """
    deadline = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    counts = Counter(faults=0, survived=0, silent=0, killed_before=0, repairs_cut=0)
    whole = folder / "whole/store"
    write_dump(whole)
    with Host(folder, "torture.small_dump", "torture.power_loss") as host:
        cutter = _Cutter(host, folder, whole, counts, seed)
        journal, _ = _recorded(host, folder)
        repair, sound = _recorded_repair(host, folder, whole)
        flushes, repair_flushes = _flushes(journal), _flushes(repair, sound)
        counts.update(flushes=len(flushes), repair_flushes=len(repair_flushes))

        def killed(number: int) -> None:
            """Kill a dump at this change, go on with it, cut at the end; plan more cuts of it."""
            beat(f"seed {seed}, killed at change {number}")
            continued, began_again = _recorded(host, folder, number)
            cutter.cut(continued, None, number)
            moments = [len(continued), *(chance.randint(began_again, len(continued)) for _ in range(cuts or CUTS_BETWEEN))]
            for moment in moments:
                later.append(partial(cutter.cut, continued[:moment], None, number))
                later.append(partial(cutter.cut, continued[:moment], chance, number))

        # The last shard is acknowledged after the last flush. No later one makes up for it, if a run that finds it trusts it.
        last, *others = flushes[-1], *chance.sample(flushes[:-1], len(flushes) - 1)
        first: list[Callable[[], None]] = [partial(killed, flush + 1) for flush in [last, *others][:cuts]]
        first.append(partial(cutter.cut_repair, repair, None))
        later: list[Callable[[], None]] = []
        for changes, cut, places in ((journal, cutter.cut, flushes), (repair, cutter.cut_repair, repair_flushes)):
            # Just before each flush, and as soon as it is done.
            moments = [moment for flush in places for moment in (flush, flush + 1)]
            for moment in chance.sample(moments, min(len(moments), cuts or len(moments))):
                later += [partial(cut, changes[:moment], None), partial(cut, changes[:moment], chance)]
        while time.monotonic() < deadline:
            if first:
                first.pop(0)()
                if not first:
                    chance.shuffle(later)
            elif later:
                later.pop()()
            elif cuts is None:
                killed(chance.randint(1, len(journal)))
            else:
                break
    return dict(counts)


def _flushes(journal: Journal, start: int = 0) -> list[int]:
    return [number for number, change in enumerate(journal) if change[0] == "sync" and number >= start]


def _recorded(host: Host, folder: Path, kill: int | None = None) -> tuple[Journal, int]:
    """The journal of a dump; of one killed at change `kill` and gone on with by a second run.

    Returns:
        it, and where the last run begins in it.
    """
    with mounted(folder, **({} if kill is None else {"kill": kill})) as (disk, file):
        codes = [host.run("torture.power_loss:work", str(disk)).returncode]
        if codes == [-9]:
            codes.append(host.run("torture.power_loss:work", str(disk), prefix="1").returncode)
    assert codes in ([0], [-9, 0]), codes
    return _read(file), kill or 0


def _recorded_repair(host: Host, folder: Path, whole: Path) -> tuple[Journal, int]:
    """The journal of a repair.

    Returns:
        it, and where the repair begins in it: before, a damaged dump was laid there and flushed.
    """
    with mounted(folder) as (disk, file):
        places = {path: disk / "store" / path.relative_to(whole) for path in [whole, *sorted(whole.rglob("*"))]}
        for path, place in places.items():
            place.mkdir() if path.is_dir() else place.write_bytes(path.read_bytes())
        harm(disk / "store")
        for place in [*places.values(), disk]:
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        outcome = host.run("torture.power_loss:repair_work", str(disk), prefix="1")
    assert outcome.returncode == 0, outcome.message
    journal = _read(file)
    return journal, journal.index(["sync", ROOT]) + 1


def _read(file: Path) -> Journal:
    journal: Journal = json.loads(file.read_text())
    file.unlink()
    return journal


class _Cutter:
    """Lays out what a cut leaves, looks at it, and goes on with the dump or the repair."""

    def __init__(self, host: Host, folder: Path, whole: Path, counts: Counter[str], seed: int):
        self._host, self._place, self._whole, self._counts, self._seed = host, folder / "left", whole, counts, seed
        self._seen: set[str] = set()

    def cut(self, journal: Journal, chance: random.Random | None, killed: int | None = None) -> None:
        """Cut the power at the end of the journal of a dump, which was `killed` at a change and gone on with."""
        before = "" if killed is None else f" (killed at change {killed} and gone on with)"
        if self._cut(journal, chance, before, check_standing, WORK):
            self._counts["killed_before"] += killed is not None

    def cut_repair(self, journal: Journal, chance: random.Random | None) -> None:
        """Cut the power at the end of the journal of a repair."""
        self._counts["repairs_cut"] += self._cut(journal, chance, " of a repair", check_half_repaired, REPAIR)

    def _cut(
        self, journal: Journal, chance: random.Random | None, before: str, check: Callable[..., object], work: str
    ) -> bool:
        """Cut the power, check what is left, and do the work again; False where as much was left before."""
        acknowledged = {change[1] for change in journal if change[0] == "mark"}
        left = after_power_cut(journal, chance)
        known = _fingerprint(left, acknowledged)
        if known in self._seen:
            return False
        self._seen.add(known)
        case = f"seed {self._seed}: power cut after {len(journal)} changes{before}"
        beat(case)
        shutil.rmtree(self._place, ignore_errors=True)
        lay_out(left, self._place)
        store = self._place / "store"
        self._counts["faults"] += 1
        try:
            check(store, acknowledged, self._whole)
            outcome = self._host.run(work, str(store), prefix="2")
            assert outcome.returncode == 0, outcome.message
            check_complete(store, self._whole)
        except AssertionError as error:
            what = "what was flushed" if chance is None else "a part of what was not flushed, too,"
            raise AssertionError(f"{case}; {what} survived: {error}") from error
        self._counts["survived"] += 1
        return True


def _fingerprint(disk: Disk, acknowledged: set[int]) -> str:
    """The same for disks with the same files under the same names."""

    def listing(inode: int) -> list[object]:
        contents = disk.inodes[inode]
        if isinstance(contents, bytearray):
            return [inode, contents.hex()]
        return [(name, listing(contents[name])) for name in sorted(contents)]

    return hashlib.sha256(json.dumps([listing(ROOT), sorted(acknowledged)]).encode()).hexdigest()
