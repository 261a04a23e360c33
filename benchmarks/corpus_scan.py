"""How fast one core looks through a corpus before its first shard, and hashes it.

    python -m benchmarks.corpus_scan --tokenizer FOLDER --text FILE [--gguf-file NAME] [--megabytes N] [--repeats N]

The paragraphs of a text are the rows of a .jsonl file, again and again until it has so many megabytes. Figures are of processor
time, medians over the repeats with the least and the most.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep
from benchmarks.scale import spread
from teacher_dump.corpus.scan import Scanner, scan
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.teachers.tokenizer import load_tokenizer

MAX_LENGTH = 512


def write_corpus(path: Path, text: str, size: int) -> None:
    """The paragraphs of a text as rows, until a file has so many bytes."""
    rows = [json.dumps({"text": paragraph}) + "\n" for paragraph in text.split("\n") if paragraph.strip()]
    with open(path, "w") as file:
        while file.tell() < size:
            file.writelines(rows)


def measure(corpus: Path, tokenizer: Any, repeats: int) -> dict[str, Any]:
    """Look through a corpus, and hash it, in turn."""
    size, speeds, positions = corpus.stat().st_size, [], 0
    hashed = []
    for _ in range(repeats):
        scanner = Scanner((corpus,), CorpusTokenizer(tokenizer, MAX_LENGTH), 64 * MAX_LENGTH)
        began = time.process_time()
        found, _ = scan(scanner, 512)
        speeds.append((time.process_time() - began, found.counts.positions))
        positions = found.counts.positions
        began = time.process_time()
        with open(corpus, "rb") as file:
            hashlib.file_digest(file, "sha256")
        hashed.append(size / (time.process_time() - began) / 1e6)
    return {
        "bytes": size,
        "pieces": len(Scanner((corpus,), CorpusTokenizer(tokenizer, MAX_LENGTH), 64 * MAX_LENGTH).pieces),
        "positions": positions,
        "positions_per_cpu_s": spread([tokens / seconds for seconds, tokens in speeds]),
        "megabytes_per_cpu_s": spread([size / seconds / 1e6 for seconds, _ in speeds]),
        "megabytes_hashed_per_cpu_s": spread(hashed),
    }


def main() -> None:
    """Measure, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a teacher's folder")
    parser.add_argument("--gguf-file", help="in it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer, options.gguf_file)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, options.text.read_text(), options.megabytes * 10**6)
        figures = measure(corpus, tokenizer, options.repeats)
    keep("corpus_scan", {"vocabulary_size": len(tokenizer), **figures})


if __name__ == "__main__":
    main()
