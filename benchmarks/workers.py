"""What workers that share a dump do twice: when they look through its corpus together, and when they help each other.

    python -m benchmarks.workers FOLDER [--megabytes 32]

FOLDER holds the teacher whose tokenizer looks through a corpus made of Python's language reference, repeated. Ranks start at
once as processes of their own; speeds are by their processor time, so they do not depend on what else the machine does. The
shards are made by a small teacher that is made on the spot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.measurement import keep

RANKS = (1, 2, 4)
HELPERS, SHARDS = 4, 63
PROCESSES = multiprocessing.get_context("fork")  # which have imported all that they need


def config_of(teacher: Path, corpus: Path, store: Path, **options: Any) -> Any:
    """The dump that all workers of a measurement share."""
    from teacher_dump import DumpConfig

    return DumpConfig(str(teacher), corpus, store, "shared", **options)


def scan(teacher: Path, corpus: Path, store: Path, rank: int, world_size: int, shared: bool, log: Path) -> None:
    """Look through the corpus as one rank, and write what it took to a file."""
    from teacher_dump.corpus import scan as scanning
    from teacher_dump.dumping.inspection import chat_asked, look_through, teacher_tokenizer
    from teacher_dump.dumping.shared_scan import Sharing

    config = config_of(teacher, corpus, store)
    tokenizer, chat = teacher_tokenizer(config, None, weights=False), chat_asked(config)
    counted = scanning.Scanner.scan
    pieces: list[int] = []

    def scan_counted(scanner: scanning.Scanner, piece: Any, *arguments: Any) -> scanning.PieceScan:
        pieces.append(scanner.pieces.index(piece))
        with open(log.with_suffix(".pieces"), "a") as file:
            file.write(f"{pieces[-1]}\n")
        return counted(scanner, piece, *arguments)

    scanning.Scanner.scan = scan_counted  # type: ignore[method-assign]
    from knowledge_store.storage import open_storage

    began = time.process_time()
    derived = look_through(config, tokenizer, chat, Sharing(open_storage(store), rank, world_size) if shared else None)
    seconds = time.process_time() - began
    log.with_suffix(".json").write_text(json.dumps({"seconds": seconds, "pieces": pieces, "derived": derived}))


def at_once(processes: list[BaseProcess]) -> None:
    """Start processes, and wait for their ends."""
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def measure_scan(teacher: Path, megabytes: int, folder: Path) -> dict[str, Any]:
    """Look through one corpus by one worker that shares nothing, by several at once, and by some of which one is killed."""
    from teacher_dump.corpus.pieces import cut_corpus

    corpus = folder / "corpus.jsonl"
    with open(corpus, "w") as file:
        number = 0
        while file.tell() < megabytes * 1_000_000:
            for name, text in topics.items():
                file.write(json.dumps({"text": f"{number} {name}\n{text}"}) + "\n")
                number += 1
    count = len(cut_corpus((corpus,), [corpus.stat().st_size]))

    def ranks(name: str, world_size: int, shared: bool = True) -> list[BaseProcess]:
        logs = [folder / f"{name}-{rank}" for rank in range(world_size)]
        store = folder / name
        arguments = [(teacher, corpus, store, rank, world_size, shared, log) for rank, log in enumerate(logs)]
        return [PROCESSES.Process(target=scan, args=each) for each in arguments]

    def figures(name: str, world_size: int) -> dict[str, Any]:
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
        tokens = found[0]["derived"]["counts"]["positions"]
        seconds = sum(each["seconds"] for each in found)
        scanned = [line for path in folder.glob(f"{name}-*.pieces") for line in path.read_text().split()]
        return {
            "ranks": world_size,
            "same_plan_as_alone": all(each["derived"] == alone for each in found),
            "pieces": count,
            "pieces_scanned": len(scanned),
            "processor_seconds": round(seconds, 2),
            "tokens_a_second_a_core": round(tokens / seconds),
            "megabytes_a_second_a_core": round(corpus.stat().st_size / seconds / 1e6, 2),
        }

    at_once(ranks("alone", 1, shared=False))
    alone = json.loads((folder / "alone-0.json").read_text())["derived"]
    measured = {"one worker, nothing shared": figures("alone", 1)}
    for world_size in RANKS:
        at_once(ranks(f"shared{world_size}", world_size))
        measured[f"{world_size} at once"] = figures(f"shared{world_size}", world_size)
    first, second = ranks("killed", 2)
    first.start()
    second.start()
    while len(list((folder / "killed").glob(".scan-*/*.json"))) < count // 2:
        time.sleep(0.01)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join()
    measured["2 at once, one killed in the middle"] = figures("killed", 2)
    return {"corpus_bytes": corpus.stat().st_size, "rows": number, "runs": measured}


def help_others(teacher: Path, corpus: Path, store: Path, rank: int, log: Path) -> None:
    """Dump as one rank that helps, and write how many positions the teacher was asked about."""
    from teacher_dump import dump
    from teacher_dump.dumping import teacher_pass

    asked = 0
    predict = teacher_pass.predict_batch

    def predict_counted(config: Any, teacher: Any, sequences: Any, kinds: Any) -> Any:
        nonlocal asked
        asked += sum(len(sequence.token_ids) for sequence in sequences)
        return predict(config, teacher, sequences, kinds)

    teacher_pass.predict_batch = predict_counted
    report = dump(config_of(teacher, corpus, store, shard_size=1, help_others=True), rank, HELPERS)
    helped = {"asked": asked, "others": report.shards_of_others, "positions": report.counts.positions if report.counts else 0}
    log.write_text(json.dumps(helped))


def measure_helpers(folder: Path) -> dict[str, Any]:
    """Dump by some ranks that help, once all of them and once without the last."""
    subprocess.run([sys.executable, "-m", "benchmarks.tiny_model", str(folder), "--steps", "1"], check=True)
    figures = {}
    for present in (HELPERS, HELPERS - 1):
        store = folder / f"store{present}"
        logs = [folder / f"helper{present}-{rank}.json" for rank in range(present)]
        work: Callable[..., None] = help_others
        arguments = [(folder / "teacher", folder / "train.jsonl", store, rank, log) for rank, log in enumerate(logs)]
        at_once([PROCESSES.Process(target=work, args=each) for each in arguments])
        found = [json.loads(log.read_text()) for log in logs]
        positions = found[0]["positions"]
        figures[f"{present} of {HELPERS} ranks"] = {
            "shards": len(list((store / "shared" / "commits").glob("*.json"))),
            "shards_of_others_committed": [each["others"] for each in found],
            "positions": positions,
            "asked_about_twice": round(sum(each["asked"] for each in found) / positions - 1, 4),
        }
    return figures


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, metavar="FOLDER")
    parser.add_argument("--megabytes", type=int, default=32, help="of the corpus that is looked through")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="workers-") as name:
        folder = Path(name)
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        import teacher_dump.dumping.teacher_pass
        import teacher_dump.teachers.local  # noqa: F401

        scans = measure_scan(options.teacher.resolve(), options.megabytes, folder)
        keep("workers", {"scan": scans, "help_others": measure_helpers(folder)})


if __name__ == "__main__":
    main()
