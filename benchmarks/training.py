"""What a training step costs: cross-entropy, the store, a whole distribution, a teacher in the loop; and when a dump pays.

    python -m benchmarks.training

A small student with random weights takes steps on one batch with AdamW, at several sizes of its vocabulary. Each measurement is
a process of its own, of which the operating system (or torch, on a GPU) reports the peak memory; methods take turns, and the
first step of each, in which the optimiser makes its state, is not timed.

* `cross-entropy`: transformers' own, `model(…, labels=labels).loss`.
* `cross-entropy, sliced` and `store, sliced`: head and loss in slices of positions, as `student-train run` computes them.
  The store gives 5 candidates, their tail and as many draws as it is large, padded as those of a dump of the default weight
  are; its arrays are made up, and take the way of any batch.
* `store, whole logits`: the loop of the README, `forward_kl(*select_targets(logits, batch))`.
* `whole distribution`: KL to a (positions, vocabulary) array of the teacher's log-probabilities, which lies ready.
* `online`: the same, and a teacher that computes it at every step.

Beside the steps, what the teacher's pass of a dump takes for the same batch: the forward pass, and what is kept of each
prediction (without writing it). From these unit costs follows what N students cost either way, and from which N on a dump is
cheaper: N online = steps with the teacher; from the store = one dump and N times the steps without it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measurement import RESULTS, keep
from benchmarks.pictures import picture
from knowledge_store.kinds.positions.selection import DRAW_WEIGHT, Selection
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.sliced import Share, sliced_loss, sum_over_slices
from student_train.losses.targets import Batch, select_targets
from teacher_dump.extraction.distributions import knowledge_of

CANDIDATES = 5
DRAWS = round(1 / DRAW_WEIGHT)  # the most at a position, and so how wide a batch is
BASELINE = "cross-entropy"
POSITIONS = 100_000_000  # of the corpus whose hours are printed
STUDENTS = (1, 2, 4, 8, 16)


def make_model(vocabulary: int, width: int, layers: int, device: torch.device) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def make_batch(vocabulary: int, sequences: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """A batch with the columns that a dump of candidates and draws gives, every position but the first a target."""
    shape = (sequences, length)
    ids = torch.randint(0, vocabulary, (*shape, CANDIDATES + DRAWS))
    logprobs = torch.log_softmax(torch.randn(*shape, CANDIDATES + 1), dim=-1)
    counts = (logprobs[..., CANDIDATES].exp() / DRAW_WEIGHT).round()
    drawn = torch.arange(DRAWS) < counts.unsqueeze(-1)
    tokens = torch.randint(0, vocabulary, shape)
    is_target = torch.ones(shape, dtype=torch.bool)
    is_target[:, 0] = False
    batch = {
        "sequence_id": torch.arange(sequences),
        "input_ids": tokens,
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "is_target": is_target,
        "labels": tokens.masked_fill(~is_target, -100),
        "token_logprob": torch.zeros(shape),
        "candidate_ids": ids[..., :CANDIDATES],
        "candidate_logprobs": logprobs[..., :CANDIDATES],
        "tail_logprob": logprobs[..., CANDIDATES],
        "tail_ids": torch.where(drawn, ids[..., CANDIDATES:], -1),
        "draw_weight": torch.full(shape, DRAW_WEIGHT),
    }
    return {name: column.to(device) for name, column in batch.items()}


def dense_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over positions (N, V), teacher in log-probabilities."""
    return functional.kl_div(torch.log_softmax(logits, dim=-1), teacher, log_target=True, reduction="sum") / len(logits)


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, and peak memory, of one method in this process."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = options.vocabularies[0]
    batch = make_batch(vocabulary, options.sequences, options.length, device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    teacher = None
    if method in ("online", "dump"):
        teacher = make_model(vocabulary, options.teacher_width, options.teacher_layers, device).eval().requires_grad_(False)
    step = dump_step(teacher, batch) if method == "dump" else None
    if step is None:
        student = make_model(vocabulary, options.width, options.layers, device).train()
        loss = losses(student, teacher, batch, inputs)[method]
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = []
    for _ in range(1 + options.steps):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds[1:],
        "peak_mib": peak,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def losses(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM | None, batch: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """What each method computes for its step; what a method holds beside that is made when it is first asked."""
    given: list[Tensor] = []

    def student_logits() -> Tensor:
        return student(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)

    def distribution() -> Tensor:
        if not given:
            positions = batch["is_target"].sum()
            given.append(torch.randn(int(positions), student.config.vocab_size, device=positions.device))
            given[0].sub_(torch.logsumexp(given[0], dim=-1, keepdim=True))
        return given[0]

    def asked() -> Tensor:
        assert teacher is not None
        with torch.no_grad():
            return torch.log_softmax(teacher(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1), dim=-1)

    return {
        BASELINE: lambda: student(**inputs, labels=batch["labels"], use_cache=False).loss,
        "cross-entropy, sliced": lambda: sliced_loss(student, batch, cross_entropy),
        "store, sliced": lambda: sliced_loss(student, batch, forward_kl),
        "store, whole logits": lambda: forward_kl(*select_targets(student(**inputs, use_cache=False).logits, batch)).mean(),
        "whole distribution": lambda: dense_kl(student_logits(), distribution()),
        "online": lambda: dense_kl(student_logits(), asked()),
    }


METHODS = (BASELINE, "cross-entropy, sliced", "store, sliced", "store, whole logits", "whole distribution", "online", "dump")


def dump_step(teacher: LlamaForCausalLM | None, batch: Batch) -> Callable[[], None]:
    """The teacher's pass over a batch, its head in slices, and what is kept of each prediction."""
    assert teacher is not None
    selection = Selection("top-k", CANDIDATES, DRAW_WEIGHT)
    tokens = batch["input_ids"][:, 1:].flatten()
    begin = torch.full((len(tokens),), 0.5, dtype=torch.float64, device=tokens.device)

    def prepare(_: int) -> Share:
        def share(logits: Tensor, rows: slice) -> Tensor:
            return knowledge_of(logits.float(), tokens[rows], selection, begin[rows])["tail_logprob"].sum()

        return share

    def step() -> None:
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            sum_over_slices(teacher, batch, prepare)

    return step


def in_own_process(method: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` gives, of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.training", "--measure", method, "--vocabularies", str(vocabulary)]
    for name in ("width", "layers", "teacher_width", "teacher_layers", "sequences", "length", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{method} at a vocabulary of {vocabulary:,} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def break_even(rows: dict[str, Any], positions: int) -> dict[str, Any]:
    """What N students cost online and from a store, by the medians, for one pass and for three over the corpus."""
    seconds = {name: row["step_seconds"]["median"] for name, row in rows.items()}
    peaks = {name: row["peak_mib"]["median"] for name, row in rows.items()}
    hours = {name: each / positions * POSITIONS / 3600 for name, each in seconds.items()}
    figures: dict[str, Any] = {
        "peak_mib": {"online": peaks["online"], "dump": peaks["dump"], "store": peaks["store, sliced"]},
        "corpus_positions": POSITIONS,
    }
    for epochs in (1, 3):
        online, store = epochs * hours["online"], epochs * hours["store, sliced"]
        figures[f"epochs: {epochs}"] = {
            # The dump is cheaper from this number of students on.
            "break_even_students": round(hours["dump"] / (online - store), 2) if online > store else None,
            "hours": {
                f"{count} students": {"online": round(count * online, 1), "store": round(hours["dump"] + count * store, 1)}
                for count in STUDENTS
            },
        }
    return figures


def draw(figures: dict[str, Any], path: Path) -> None:
    """Step time and peak memory of each method, as multiples of cross-entropy's."""
    methods = [method for method in METHODS if method not in (BASELINE, "dump")]
    vocabularies = list(figures)
    with picture(path, 1, 2, figsize=(10, 3.6), sharey=True) as panels:
        for panel, name, title in zip(panels, ("step_seconds", "peak_mib"), ("step time", "peak memory"), strict=True):
            for index, vocabulary in enumerate(vocabularies):
                rows = figures[vocabulary]["methods"]
                base = rows[BASELINE][name]["median"]
                places = [place + (index - (len(vocabularies) - 1) / 2) * 0.26 for place in range(len(methods))]
                middle = [rows[method][name]["median"] / base for method in methods]
                error = [
                    [value - rows[method][name]["min"] / base for method, value in zip(methods, middle, strict=True)],
                    [rows[method][name]["max"] / base - value for method, value in zip(methods, middle, strict=True)],
                ]
                panel.barh(places, middle, 0.24, xerr=error, label=vocabulary, error_kw={"linewidth": 0.8})
            panel.axvline(1, color="black", linewidth=0.8)
            panel.set_yticks(range(len(methods)), methods)
            panel.set_xlabel(f"{title}, as a multiple of transformers' cross-entropy")
        panels[0].invert_yaxis()
        panels[1].legend(frameon=False)


def main() -> None:
    """Measure every method in turn, several times, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_768, 131_072, 262_144])
    parser.add_argument("--width", type=int, default=384, help="of the student; a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--teacher-width", type=int, default=768)
    parser.add_argument("--teacher-layers", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="that are timed, of each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for vocabulary in options.vocabularies:
            # Each repeat begins with another method.
            turn = repeat % len(METHODS)
            for method in (*METHODS[turn:], *METHODS[:turn]):
                one = in_own_process(method, vocabulary, options)
                found.setdefault((vocabulary, method), []).append(one)
                print(
                    f"{vocabulary:>7,}  {method:<22} {min(one['seconds']):7.3f} s {one['peak_mib']:8.0f} MiB", file=sys.stderr
                )
    positions = options.sequences * options.length
    figures: dict[str, Any] = {}
    for vocabulary in options.vocabularies:
        rows: dict[str, Any] = {}
        for method in METHODS:
            runs = found[vocabulary, method]
            rows[method] = {
                "step_seconds": spread([second for run in runs for second in run["seconds"]]),
                "peak_mib": spread([run["peak_mib"] for run in runs], 0),
            }
        base = rows[BASELINE]
        for row in rows.values():
            for name in ("step_seconds", "peak_mib"):
                row[f"{name}_against_cross_entropy"] = round(row[name]["median"] / base[name]["median"], 3)
        figures[f"{vocabulary:,}"] = {"methods": rows, "students": break_even(rows, positions)}
    settings = {name: value for name, value in vars(options).items() if name not in ("measure", "vocabularies")}
    device = found[options.vocabularies[0], BASELINE][0]["device"]
    keep("training", {"device": device, "threads": torch.get_num_threads(), **settings, "vocabularies": figures})
    draw(figures, RESULTS / "training.svg")


if __name__ == "__main__":
    main()
