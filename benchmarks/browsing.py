"""The page of a store in a real browser: how soon it shows a store of 10 million positions, a sequence, and a position.

    python -m benchmarks.browsing

A synthetic store (`benchmarks.scale`) is served by `knowledge-store browse`, and headless Chromium looks at it, driven by
playwright (neither comes with an extra: `pip install playwright`, and Debian's package `chromium`). In a fresh server and a
fresh browser, some times over:

* `first view`: from the moment the server says its address to the dumps being shown;
* `sequences`: from one page of sequences to another, far away in the dump;
* `sequence`: from the address of a sequence being set to its tokens being shown, in shards all over the dump;
* `position`: from a token being clicked to its candidates being shown.

Beside each stands the processor time of the server, which other work on the machine does not lengthen, and the file has the
machine's load.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep
from benchmarks.scale import DUMP, many_positions
from knowledge_store import KnowledgeStore

READY = "main[aria-busy='false'] "


def processor_seconds(process: int) -> float:
    """What a process has taken of the processor so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Look:
    """A server and a browser that looks at its page."""

    def __init__(self, playwright: Any, store: Path, chromium: str):
        self.times: dict[str, list[tuple[float, float]]] = {}
        self._browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        self._page = self._browser.new_page(viewport={"width": 1280, "height": 860})
        command = [sys.executable, "-m", "knowledge_store.cli", "browse", str(store), "--bind", "127.0.0.1:0", "--no-open"]
        self._server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._server.stderr
        found = re.search(r"http://\S+", self._server.stderr.readline())
        assert found
        self.address = found[0]

    def measure(self, what: str, do: Callable[[], object], shown: str) -> None:
        """The time until something is shown, and the server's processor time."""
        started, processor = time.perf_counter(), processor_seconds(self._server.pid)
        do()
        self._page.wait_for_selector(READY + shown)
        self.times.setdefault(what, []).append((time.perf_counter() - started, processor_seconds(self._server.pid) - processor))

    def go(self, place: str) -> Callable[[], object]:
        """Goes to a part of the page, as a link does."""
        return lambda: self._page.evaluate(f"() => {{ location.hash = {place!r}; }}")

    def look(self, sequences: list[int], pages: int) -> None:
        """All that is measured, once."""
        self.measure("first view", lambda: self._page.goto(self.address), "article.dump")
        for page in (1, pages // 2, pages):
            self.measure("sequences", self.go(f"#/sequences/{DUMP}?page={page}"), f"nav.pager >> text=page {page:,} of")
        for sequence in sequences:
            self.measure("sequence", self.go(f"#/sequence/{DUMP}/{sequence}"), f"h1:text-is('Sequence {sequence}')")
            self._page.wait_for_selector("[role=option]")
            for position in (1, 100):
                token = self._page.locator("[role=option]").nth(position)
                self.measure(
                    "position", token.click, f"aside h2:has-text('at {position}') >> xpath=../.. >> li.marked >> nth=0"
                )

    def close(self) -> None:
        """End both."""
        self._browser.close()
        self._server.terminate()
        self._server.wait()


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Of the repeats of one thing, in seconds."""
    found = {}
    for name, values in zip(("seconds", "processor_seconds"), zip(*times, strict=True), strict=True):
        found[name] = {
            "median": round(statistics.median(values), 3), "least": round(min(values), 3), "most": round(max(values), 3),
        }  # fmt: skip
    return {"count": len(times), **found}


def main() -> None:
    """Make the store, look at it, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", type=Path, help="a store that an earlier run made")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("playwright is missing: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no Chromium: Debian's package is `chromium`")
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        if not options.store:
            many_positions(store, options.positions)
        opened = KnowledgeStore.open(store)
        [facts] = opened.info()
        ids = opened.sequences(DUMP)["sequence_id"].to_pylist()
        draw = random.Random(0)
        times: dict[str, list[tuple[float, float]]] = {}
        load = [os.getloadavg()[0]]
        with sync_playwright() as playwright:
            for _ in range(options.repeats):
                looking = Look(playwright, store, chromium)
                try:
                    looking.look(draw.sample(ids, 5), -(-len(ids) // 50))
                finally:
                    looking.close()
                for what, measured in looking.times.items():
                    times.setdefault(what, []).extend(measured)
                load.append(os.getloadavg()[0])
    figures = {what: summary(measured) for what, measured in times.items()}
    version = subprocess.run([chromium, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    keep(
        "browsing",
        {"store": {"positions": facts.positions, "sequences": facts.sequences}, "browser": version, "repeats": options.repeats,
         "load_average": [round(value, 1) for value in load], **figures},
    )  # fmt: skip


if __name__ == "__main__":
    main()
