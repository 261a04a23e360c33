"""Peak memory of `teacher-dump run` does not grow with the corpus: the same text once and ten times over.

    python -m benchmarks.memory --teacher FOLDER --corpus FILE.jsonl

Each dump runs in a process of its own, whose peak resident memory the operating system reports. A small teacher makes it a
matter of minutes, and memory that grew with the corpus would show all the better beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep


def dump(teacher: Path, corpus: Path, store: Path, shard_size: int) -> dict[str, float]:
    """Peak memory (MiB) and seconds of one dump."""
    command = [sys.executable, "-m", "teacher_dump.cli", "run", str(store), "--teacher", str(teacher), "--corpus", str(corpus)]
    process = subprocess.Popen([*command, "--shard-size", str(shard_size)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the dump failed with exit code {process.returncode}")
    return {"peak_mib": usage.ru_maxrss / 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    """Dump the corpus at each size, several times, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10], help="sizes, as multiples of the corpus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shard-size", type=int, default=64)
    options = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {times: [] for times in options.times}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for times in options.times:
                corpus = Path(folder) / f"corpus{times}.jsonl"
                if not corpus.exists():
                    corpus.write_text(options.corpus.read_text() * times)
                runs[times].append(dump(options.teacher, corpus, Path(folder) / f"store-{times}-{repeat}", options.shard_size))
    figures: dict[str, Any] = {"teacher": options.teacher.name, "repeats": options.repeats}
    for times, measured in runs.items():
        peaks = [run["peak_mib"] for run in measured]
        figures[f"corpus × {times}"] = {
            "corpus_mib": round(options.corpus.stat().st_size * times / 2**20, 2),
            "peak_mib_median": round(statistics.median(peaks), 1),
            "peak_mib_min": round(min(peaks), 1),
            "peak_mib_max": round(max(peaks), 1),
        }
    keep("memory", figures)


if __name__ == "__main__":
    main()
