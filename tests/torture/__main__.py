"""Faults of every sort at a store, its writers, its readers and its SQL, until the time is over: what `make torture` runs.

    python -m tests.torture [damage kills ...] [--seed 7] [--minutes 20] [--output torture.json]

The loops are the modules beside this one, of which `make test` runs short versions. Two go at once, each in a process of its
own; time is shared out among those that can run here. Each counts the faults it made, those after which everything that is
promised held, and wrong answers or losses that nobody was told of. A broken promise ends its loop, is printed with how to see
it again, and makes the exit code 1; the files of such a loop are kept. What a loop does depends on its seed, and on how far it
comes in its time. A loop is broken, too, when a case of it hangs (`heartbeat`): a slow machine alone makes none broken. No loop
runs on when the time is over. Ctrl-C ends all of them, with whatever they started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from knowledge_store.quantities import duration

from .supervision import CHECK, RESERVED, Processes, adopt_orphans, module_of, run_loop

# Loops, and their shares of the time. Damage goes twice, with a seed of its own each time: there is most to try.
LOOPS = {
    "damage": 7.0,
    "damage again": 7.0,
    "kills": 4.7,
    "disk_errors": 3.0,
    "workers": 2.5,
    "hostile_sql": 2.0,
    "serving": 2.0,
    "order": 2.0,
    "power_loss": 2.0,
    "buckets": 2.0,
    "generation": 2.0,
}
AT_ONCE = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOM = 2 * 2**30  # bytes


def work_folder() -> str | None:
    """Where to make stores: in memory where there is room, since the loops flush to the disk over and over."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM
    return str(memory) if roomy else None


class Stopped(BaseException):
    """A signal that ends everything."""


def stop(number: int, frame: object) -> NoReturn:
    """Called by a signal."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # the first one counts
    raise Stopped(number)


def in_words(counts: dict[str, int | None]) -> str:
    """Counts in a line, what matters first."""
    first = ("faults", "survived", "silent")
    names = [*first, *sorted(counts.keys() - set(first))]
    return ", ".join(f"{'unknown' if counts[name] is None else format(counts[name], ',')} {name}" for name in names)


def outcome(found: dict[str, Any]) -> str:
    """How a loop ended, in a line."""
    if "counts" in found:
        return in_words(found["counts"])
    return f"BROKEN: {found['broken']}" if "broken" in found else f"CUT OFF: {found['cut_off']}"


def say(what: str, seconds: float, words: str) -> None:
    """Print a line of the table."""
    print(f"{what:<14} {duration(seconds):>10}  {words}", flush=True)


def run_all(
    processes: Processes, executor: ThreadPoolExecutor, chosen: list[str], seed: int, minutes: float, folder: Path
) -> dict[str, Any]:
    """Run the loops, and print a line as each ends.

    Returns:
        the figures to keep.
    """
    began = time.monotonic()
    deadline = began + 60 * minutes
    modules = sorted({module_of(loop) for loop in chosen})
    ending = executor.submit(processes.run, CHECK, folder / "check", modules, 60 * minutes).result()
    if ending.result is None:
        sys.exit(f"no loop can be run here: {ending.hung or ending.output}")
    reasons = ending.result
    skipped = {loop: reason for loop in chosen if (reason := reasons[module_of(loop)])}
    chosen = [loop for loop in chosen if loop not in skipped]
    lanes = min(AT_ONCE, len(chosen))
    shares = sum(LOOPS[loop] for loop in chosen) / max(lanes, 1)
    longest = max((LOOPS[loop] for loop in chosen), default=0)
    unit = max((deadline - time.monotonic()) / 60 - RESERVED, 0) / max(shares, longest, 1e-9)
    print(f"seed {seed}: {', '.join(chosen)}; {minutes:g} minutes at most", flush=True)
    for loop, reason in skipped.items():
        print(f"{loop:<14} SKIPPED: {reason}", flush=True)
    running = {}
    for loop in chosen:
        own = seed + list(LOOPS).index(loop)
        running[executor.submit(run_loop, processes, loop, own, unit * LOOPS[loop], folder, deadline)] = loop
    found = {}
    for future in as_completed(running):
        loop = running[future]
        found[loop] = future.result()
        say(loop, found[loop]["seconds"], outcome(found[loop]))
    broken = [loop for loop, each in found.items() if "broken" in each]
    counts = [each["counts"] for each in found.values() if "counts" in each]
    total: dict[str, int | None] = {name: sum(each[name] for each in counts) for name in ("faults", "survived", "silent")}
    if broken:
        total["silent"] = None  # what a broken loop counted is lost
    say("all", time.monotonic() - began, in_words(total))
    spent = round((time.monotonic() - began) / 60, 1)
    return {"seed": seed, "minutes": spent, **total, "broken": broken, "loops": found, "skipped": skipped}


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("duckdb", "numpy", "pyarrow", "torch", "transformers")},
    }


def main() -> None:
    """Run the loops, and keep the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loops", nargs="*", metavar="LOOP", help=f"one or more of {', '.join(LOOPS)}; all when none is named")
    parser.add_argument("--seed", type=int, help="of the first run of each loop; drawn when it is not given")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long all of it may take")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts; without it they are printed only")
    options = parser.parse_args()
    unknown = sorted(set(options.loops) - LOOPS.keys())
    if unknown or not options.minutes > RESERVED:
        parser.error(f"no such loop: {', '.join(unknown)}" if unknown else f"it takes more than {RESERVED:g} minutes")
    seed = random.randrange(2**31) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=work_folder())).resolve()
    adopt_orphans()
    processes, executor = Processes(), ThreadPoolExecutor(AT_ONCE)
    figures: dict[str, Any] = {"broken": []}
    try:
        for each in SIGNALS:
            signal.signal(each, stop)
        try:
            figures = run_all(
                processes, executor, list(dict.fromkeys(options.loops)) or list(LOOPS), seed, options.minutes, folder
            )
        finally:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
            executor.shutdown(wait=False, cancel_futures=True)
            processes.end()
            executor.shutdown()
            if not figures["broken"]:
                shutil.rmtree(folder, ignore_errors=True)
    except Stopped as stopped:
        number = signal.Signals(stopped.args[0])
        print(f"STOPPED by {number.name} (seed {seed}): all that was at work is ended, nothing is kept", flush=True)
        sys.exit(128 + number)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m tests.torture {' '.join(options.loops)} --seed {seed} --minutes {options.minutes:g}"
        record = {"command": " ".join(command.split()), "machine": machine(), "figures": figures}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if figures["broken"]:
        print(f"The files of what is broken are in {folder}: delete it when you have seen them")
    if figures["broken"] or figures["silent"]:
        sys.exit(f"BROKEN: {', '.join(figures['broken']) or 'silent errors'} (seed {seed})")


if __name__ == "__main__":
    main()
