"""What every benchmark prints and keeps beside its figures: the command, the hardware, the versions."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Committed results are overwritten only by those who run a benchmark by itself.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "duckdb", "numpy")


def processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def keep(name: str, figures: dict[str, Any]) -> None:
    """Print the figures of a benchmark, and write them to RESULTS/NAME.json with how they were made.

    Folders are left out of the command: where somebody keeps a model or a text is nobody's business.
    """
    words = [Path(sys.argv[0]).name, *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    record = {"command": f"python benchmarks/{' '.join(words)}", "machine": machine(), "figures": figures}
    # A list of plain values on one line: an interval is read at a glance.
    text = re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1))
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
