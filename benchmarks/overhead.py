"""What `teacher-dump run` costs beside the bare teacher: positions/s and peak memory of both, and what takes the rest.

    python -m benchmarks.overhead --teacher smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --teacher llama --text wikitext2.txt

The bare teacher is a forward pass with whole logits, over the very batches of the dump. Beside it stands one whose head is run
on slices of positions, as a dump runs it, with nothing done to the logits. All take turns in one process, several times, in an
order that changes, and each ratio is of runs of one turn, by the clock and by the processor's time, which a busy machine
disturbs less (set OMP_NUM_THREADS=1 for it: threads that wait count too). A dump's time is that of its pass: from the
first shard's reading until the second and last is committed, which no teacher's work hides in so short a dump. Loading the
teacher and planning are left out. Peak memory is measured in a process of each one's own, from when the teacher is loaded:
resident memory on a CPU (Linux), torch's allocations on a GPU. The profile is of one more dump, whose functions are timed: on
the teacher's thread in seconds of the clock, beside it in seconds of the processor (fsync: of the clock).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.measurement import keep
from knowledge_store.terminal.console import note
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence
from teacher_dump.dumping.batches import batch_arrays, length_batches
from teacher_dump.dumping.plan import ShardReader, make_manifest
from teacher_dump.dumping.run import dump
from teacher_dump.dumping.teacher_pass import dump_shards
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.teachers.local import LocalTeacher, find_device, load_teacher

GOAL = 0.97  # of the ratio
SLICED = "bare, head in slices"
DUMP = "dump"  # of the default selection
SHARDS = 2
CHARACTERS_PER_POSITION = 4
WINDOWS_IN_A_ROW = 8


def batches_of(config: DumpConfig, teacher: LocalTeacher) -> list[list[TokenSequence]]:
    """The batches of a dump, as it makes them."""
    manifest = make_manifest(config, teacher)
    reader = ShardReader(config, manifest, CorpusTokenizer(teacher.tokenizer, config.max_length))
    batches = []
    for number in range(manifest.shard_count):
        sequences = reader.read(number).sequences
        lengths = [len(sequence.token_ids) for sequence in sequences]
        for indices in length_batches(lengths, config.batch_size * config.max_length):
            batches.append([sequences[index] for index in indices])
    return batches


def synchronise(teacher: LocalTeacher) -> None:
    """Wait until a GPU has done what it was given."""
    if teacher.device.type == "cuda":
        torch.cuda.synchronize(teacher.device)


Speed = tuple[float, float]  # positions a second of the clock, and of the processor's time


def run_bare(teacher: LocalTeacher, batches: list[list[TokenSequence]], sliced: bool = False) -> Speed:
    """The bare teacher: its forward pass, all logits and nothing else; whole, or in the slices of a dump."""
    synchronise(teacher)
    started, processor_started = time.monotonic(), time.process_time()
    for sequences in batches:
        padded = batch_arrays([sequence.token_ids for sequence in sequences])
        if sliced:
            places = (torch.from_numpy(each) for each in np.nonzero(padded[1]))
            for _ in teacher.predict(*padded).logit_slices(*places):
                pass
            continue
        tokens, mask = (torch.from_numpy(each).to(teacher.device) for each in padded)
        with torch.inference_mode():
            teacher.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
    synchronise(teacher)
    positions = sum(len(each.token_ids) for sequences in batches for each in sequences)
    return positions / (time.monotonic() - started), positions / (time.process_time() - processor_started)


def run_dump(config: DumpConfig, teacher: LocalTeacher) -> Speed:
    """A dump's pass, into a store of its own beside `config.store`."""
    seconds = [0.0]

    def timed_pass(*arguments: Any) -> Any:
        started = time.process_time()
        committed = dump_shards(*arguments)
        seconds[0] = time.process_time() - started
        return committed

    with tempfile.TemporaryDirectory(dir=Path(str(config.store)).parent) as folder, ExitStack() as stack:
        stack.enter_context(patch("teacher_dump.dumping.teacher_pass.dump_shards", timed_pass))
        report = dump(replace(config, store=Path(folder) / "store"), teacher=teacher)
    return report.positions / report.seconds, report.positions / seconds[0]


# --- memory -------------------------------------------------------------------------------------------------------------


def resident(name: str) -> float:
    """A figure of this process's memory, in MiB, as Linux names it."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def peak_memory(config: DumpConfig, teacher: LocalTeacher, bare: bool) -> dict[str, float]:
    """MiB that this process holds with the teacher loaded, and the most that it holds while it works."""
    batches = batches_of(config, teacher) if bare else []
    cuda = teacher.device.type == "cuda"
    if cuda:
        loaded = torch.cuda.memory_allocated(teacher.device) / 2**20
        torch.cuda.reset_peak_memory_stats(teacher.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again: loading takes more than is kept
        loaded = resident("VmRSS")
    if bare:
        run_bare(teacher, batches)
    else:
        run_dump(config, teacher)
    peak = torch.cuda.max_memory_allocated(teacher.device) / 2**20 if cuda else resident("VmHWM")
    return {"loaded_mib": round(loaded, 1), "peak_mib": round(peak, 1)}


def peak_memory_alone(config: DumpConfig, what: str) -> dict[str, float]:
    """`peak_memory` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.overhead",
        "--text",
        config.corpus[0],
        "--memory-of",
        what,
        "--teacher",
        config.teacher,
    ]
    command += [config.gguf_file] if config.gguf_file else []
    for name in ("max_length", "batch_size", "device"):
        command += [f"--{name.replace('_', '-')}", getattr(config, name)]
    command += ["--dtypes", config.dtype]
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


# --- profile ------------------------------------------------------------------------------------------------------------


class Profile:
    """Seconds spent in functions, by part: of the clock, and of the processor by the thread itself.

    What a function spends in another that is timed counts for that one alone.
    """

    def __init__(self, teacher: LocalTeacher):
        self.seconds: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self._teacher = teacher
        self._inner = threading.local()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as that part."""

        def now() -> np.ndarray:
            if threading.current_thread() is threading.main_thread():
                synchronise(self._teacher)
            return np.array([time.perf_counter(), time.thread_time()])

        def call(*arguments: Any, **options: Any) -> Any:
            outer = getattr(self._inner, "seconds", 0)
            self._inner.seconds = np.zeros(2)
            started = now()
            try:
                return function(*arguments, **options)
            finally:
                spent = now() - started
                self.seconds[part] += spent - self._inner.seconds
                self._inner.seconds = outer + spent

        return call


# Which function is which part, by where the dump looks it up.
ON_THE_TEACHERS_THREAD = {
    "forward of the body": ["teacher_dump.teachers.local.LocalTeacher.predict"],
    "head's matrix product": [],  # a module of the teacher's
    "top-k": ["teacher_dump.extraction.distributions.likeliest"],
    "log-sum-exp": ["teacher_dump.extraction.distributions.knowledge_of"],
    "draws": ["teacher_dump.extraction.distributions.draw"],
    "checks and gathering": [],  # the extractor, looked up in a dict
    "progress figures": ["teacher_dump.dumping.teacher_pass._Meter.batch"],
}
BESIDE_IT = {
    "reading and tokenising": ["teacher_dump.dumping.plan.ShardReader.read"],
    "encoding": ["knowledge_store.writing.writer.pack_shard"],
    "compressing": ["knowledge_store.format.parquet.write_table"],
    "hashing": ["knowledge_store.format.parquet.describe"],
    "fsync": ["os.fsync"],
    "rows and statistics": ["teacher_dump.dumping.teacher_pass.shard_of"],
}


def profile(config: DumpConfig, teacher: LocalTeacher) -> dict[str, Any]:
    """Where the time of a dump goes: each part's share of its pass, in percent, on the teacher's thread or beside it."""
    found, head = Profile(teacher), teacher.model.get_output_embeddings()
    with ExitStack() as stack:
        for part, places in {**ON_THE_TEACHERS_THREAD, **BESIDE_IT}.items():
            for place in places:
                stack.enter_context(patch(place, found.timed(part, resolve_name(place))))
        stack.enter_context(patch.object(head, "forward", found.timed("head's matrix product", head.forward)))
        extractor = EXTRACTORS["positions"]
        extractor = replace(extractor, function=found.timed("checks and gathering", extractor.function))
        stack.enter_context(patch.dict(EXTRACTORS, positions=extractor))
        with tempfile.TemporaryDirectory(dir=Path(str(config.store)).parent) as folder:
            report = dump(replace(config, store=Path(folder) / "store"), teacher=teacher)

    def percent(seconds: float) -> float:
        return round(float(100 * seconds / report.seconds), 2)

    on_thread = {part: percent(found.seconds[part][0]) for part in ON_THE_TEACHERS_THREAD}
    return {
        "positions": report.positions,
        "seconds": round(report.seconds, 2),
        "percent_on_the_teachers_thread": {**on_thread, "everything else": round(100 - sum(on_thread.values()), 2)},
        "percent_beside_it": {part: percent(found.seconds[part][int(part != "fsync")]) for part in BESIDE_IT},
    }


# --- all of it ----------------------------------------------------------------------------------------------------------


def multiplies(dtype: str, device: torch.device) -> bool:
    """Whether the machine's own instructions multiply numbers of that type."""
    if dtype == "float32":
        return True
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def spread(values: list[float], digits: int) -> dict[str, float]:
    """The median of some values, the least and the most."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()}


def figures_of(speeds: list[Speed]) -> dict[str, dict[str, float]]:
    """The speeds of some runs."""
    names = ("positions_per_second", "positions_per_processor_second")
    return {name: spread(list(values), 1) for name, values in zip(names, zip(*speeds, strict=True), strict=True)}


def measure(config: DumpConfig, teacher: LocalTeacher, repeats: int) -> dict[str, Any]:
    """Everything about one teacher in one precision."""
    batches = batches_of(config, teacher)
    runs: dict[str, Callable[[], Speed]] = {"bare": lambda: run_bare(teacher, batches)}
    if not teacher.whole_logits:
        runs[SLICED] = lambda: run_bare(teacher, batches, sliced=True)
    runs[DUMP] = lambda: run_dump(config, teacher)
    run_bare(teacher, batches[:1])
    speeds: dict[str, list[Speed]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(repeats):
        for name in order:
            speeds[name].append(runs[name]())
            note("{}: {:,.1f} positions/s of the clock, {:,.1f} of the processor".format(name, *speeds[name][-1]))
        order.append(order.pop(0))
    parts = profile(config, teacher)
    note(f"{parts}")
    memory = {name: peak_memory_alone(config, name) for name in ("bare", DUMP)}
    found: dict[str, Any] = {
        "vocabulary_size": teacher.vocabulary_size,
        "whole_logits": teacher.whole_logits,
        "device": torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type,
        "positions_of_a_run": sum(len(each.token_ids) for sequences in batches for each in sequences),
        "positions_of_a_batch": max(sum(len(each.token_ids) for each in sequences) for sequences in batches),
        "bare": {**figures_of(speeds["bare"]), **memory["bare"]},
    }
    for name in speeds.keys() - {"bare"}:
        pairs = list(zip(speeds[name], speeds["bare"], strict=True))
        by_clock, by_processor = ([mine[which] / bare[which] for mine, bare in pairs] for which in range(2))
        found[name] = {
            **figures_of(speeds[name]),
            "ratio": spread(by_clock, 4),
            "ratio_by_processor_time": spread(by_processor, 4),
            **memory.get(name, {}),
        }
    found[DUMP]["peak_below_bare"] = memory[DUMP]["peak_mib"] < memory["bare"]["peak_mib"]
    return {**found, "profile": parts}


def show(title: str, found: dict[str, Any]) -> None:
    """Print the figures of one teacher in one precision for a person."""
    print(f"\n{title}: {'positions/s':>30} {'ratio':>8} {'by processor':>14} {'peak MiB':>9}")
    for name in ("bare", SLICED, DUMP):
        if name in found:
            row = found[name]
            ratios = (row[each]["median"] if each in row else 1 for each in ("ratio", "ratio_by_processor_time"))
            speed, peak = row["positions_per_second"]["median"], row.get("peak_mib", float("nan"))
            print(f"  {name:<20} {speed:>18.1f} {next(ratios):>8.3f} {next(ratios):>14.3f} {peak:>9.0f}")
    for where in ("percent_on_the_teachers_thread", "percent_beside_it"):
        print(f"  {where.replace('_', ' ').replace('teachers', 'teacher’s')}:")
        for part, share in sorted(found["profile"][where].items(), key=lambda item: -item[1]):
            print(f"    {part:<26} {share:>6.2f}")


def main() -> None:
    """Measure every teacher in every precision, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", action="append", required=True, help="folder or hub id, and a GGUF file in it")
    parser.add_argument("--text", required=True, type=Path, help="a .txt file")
    parser.add_argument("--positions", type=int, default=8192, help="about so many in a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="left out where the machine cannot")
    parser.add_argument("--memory-of", choices=["bare", DUMP], help="print the peak memory of this alone, and no more")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"goal": GOAL, "repeats": arguments.repeats, "teachers": []}
    with tempfile.TemporaryDirectory() as work:
        corpus = Path(work) / "text.jsonl"
        if arguments.memory_of:
            corpus = arguments.text
        else:
            text = arguments.text.read_text()[: CHARACTERS_PER_POSITION * arguments.positions]
            size = CHARACTERS_PER_POSITION * arguments.max_length * WINDOWS_IN_A_ROW
            rows = [json.dumps({"text": text[start : start + size]}) for start in range(0, len(text), size)]
            corpus.write_text("\n".join(rows))
        documents = len(corpus.read_text().splitlines())
        for folder, *gguf_file in arguments.teacher:
            for dtype in arguments.dtypes:
                config = DumpConfig(
                    folder, (corpus,), Path(work) / "store", "overhead", gguf_file=gguf_file[0] if gguf_file else None,
                    max_length=arguments.max_length, batch_size=arguments.batch_size, dtype=dtype, device=arguments.device,
                    shard_size=-(-documents // SHARDS),
                )  # fmt: skip
                name = config.gguf_file or Path(folder).name
                if not multiplies(dtype, find_device(arguments.device)):
                    figures["teachers"].append({"teacher": name, "dtype": dtype, "left_out": "emulated on this machine"})
                    continue
                teacher = load_teacher(folder, config.gguf_file, dtype, arguments.device)
                if arguments.memory_of:
                    print(json.dumps(peak_memory(config, teacher, arguments.memory_of == "bare")))
                    return
                figures["teachers"].append({"teacher": name, "dtype": dtype, **measure(config, teacher, arguments.repeats)})
                del teacher
    keep("overhead", figures)
    for found in figures["teachers"]:
        if "profile" in found:
            show(f"{found['teacher']} ({found['dtype']})", found)


if __name__ == "__main__":
    main()
