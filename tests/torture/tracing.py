"""`strace` counts, fails and cuts off a worker's system calls, on the paths of one store alone."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture.host import Host, Outcome

CHANGING = ("openat", "write", "fsync", "link", "linkat", "unlink", "unlinkat", "rename", "mkdir", "close", "flock")
LOOKING = ("read", "pread64", "getdents64", "newfstatat", "fstat", "stat", "lstat", "statx", "lseek")

_CALL = re.compile(r"^(?:(\d+) +)?(\w+)\(")


@dataclass(frozen=True)
class Site:
    """The `number`-th call (from 1) of `call` on a store's paths, in any thread."""

    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.call} number {self.number}"


def unavailable(folder: Path) -> str | None:
    """Why processes cannot be traced here; None when they can."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "needs strace (apt-get install strace)"
    with Host(folder) as host:
        try:
            outcome = host.run("torture.host:nothing", strace=["-e", "trace=read"])
        except RuntimeError as error:
            return str(error)
    return None if outcome.acknowledged == {7} else f"strace: a traced process did not work: {outcome.message}"


def store_paths(host: Host, store: Path, work: str, *arguments: Any) -> list[str]:
    """The paths that some work uses in a store and beside it, with the temporary names of the worker "0"."""
    outcome = host.run(work, *arguments, strace=["-e", "trace=%file"])
    assert outcome.returncode == 0, outcome.message
    found = {path for line in outcome.calls for path in re.findall(r'"([^"]*)"', line)}
    return sorted(path for path in found if Path(path).is_relative_to(store) or path == str(store.parent))


def on_paths(paths: Iterable[str], calls: Iterable[str], prefix: str = "0") -> list[str]:
    """strace's options to look at these calls on these paths alone, with the temporary names of the worker `prefix`."""
    named = [path.replace("-" + 12 * "0", "-" + 12 * prefix) for path in paths]
    return ["-e", f"trace={','.join('?' + call for call in calls)}", *(word for path in named for word in ("-P", path))]


def sites(outcome: Outcome) -> list[Site]:
    """Every call that a traced worker made, counted by name in each of its threads, as strace counts."""
    counted: Counter[tuple[str, str]] = Counter()
    found: dict[Site, None] = {}
    for line in outcome.calls:
        if match := _CALL.match(line):
            thread, call = match.groups()
            counted[thread, call] += 1
            found[Site(call, counted[thread, call])] = None
    return list(found)


def inject(site: Site, what: str) -> list[str]:
    """strace's options to do something to one call, as in `signal=SIGKILL` or `error=ENOSPC`."""
    return ["-e", f"inject={site.call}:{what}:when={site.number}"]
