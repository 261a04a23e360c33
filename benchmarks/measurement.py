"""What every benchmark prints and keeps beside its figures: the command, the hardware, the versions, the default of a dump."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from knowledge_store.format.layout import FORMAT_VERSION
from knowledge_store.kinds.positions.selection import DRAW_WEIGHT

# Living measurements keep their figures in results/, studies beside themselves. BENCHMARK_RESULTS names another folder for
# both, so that committed figures are replaced only by those who run a benchmark by itself.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
STUDIES = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "studies")
VECTORS = {"AVX-512": "avx512f", "AVX2": "avx2", "AVX": "avx"}  # and their flags, the widest first
PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "duckdb", "numpy")


def processor() -> str:
    """The processor's name, as Linux gives it, and the widest vectors that it computes with: hosts call several alike."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    widest = [name for name, flag in VECTORS.items() if flag in facts.get("flags", "").split()]
    return ", ".join([facts.get("model name", platform.processor()).strip(), *widest[:1]])


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


def keep(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print the figures of a benchmark, and write them to FOLDER/NAME.json with the command, the hardware and the versions.

    Beside them stands what a dump is by default in the code that wrote it: who reads "the default" later sees whether it still
    is that. The folders of paths in the command are left out, since they are those of one machine.
    """
    module = sys.modules["__main__"].__spec__
    program = f"-m {module.name}" if module else f"benchmarks/{Path(sys.argv[0]).name}"
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    default = {"format": FORMAT_VERSION, "draw_weight": DRAW_WEIGHT}
    command = f"python {' '.join([program, *words])}"
    record = {"command": command, "machine": machine(), "default_dump": default, "figures": figures}
    # A list of plain values on one line: an interval is read at a glance.
    text = re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1))
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    # At once: a study that is stopped here keeps the hours of cells that it had.
    unfinished = folder / f".{name}.json.unfinished"
    unfinished.write_text(text + "\n")
    unfinished.replace(folder / f"{name}.json")
