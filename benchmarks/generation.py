"""How far a text depends on the batch it is written in, how right its log-probability is, and what it costs.

    python -m benchmarks.generation TEACHER PROMPTS [--rows N] [--samples N] [--max-new-tokens N] [--dtype float32 bfloat16]

TEACHER: a folder. PROMPTS: a JSON list of texts, of each of which the first words are gone on with. Each row's samples are
written in batches of 1 and of 8; a text is equal where all of its tokens are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.measurement import keep
from teacher_dump import GenerateConfig, generate
from teacher_dump.teachers.local import LocalTeacher, load_teacher

BATCHES = (1, 8)
WORDS = 8  # of a row


def forced(teacher: LocalTeacher, prompt: str, token_ids: list[int]) -> float:
    """The sum of what a teacher says of the tokens of a text behind a prompt, nats."""
    ids = [*teacher.tokenizer(prompt)["input_ids"], *token_ids]
    with torch.inference_mode():
        logprobs = teacher.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    places = torch.arange(len(ids) - len(token_ids) - 1, len(ids) - 1)
    return float(logprobs[places, torch.tensor(token_ids)].double().sum())


def measure(options: argparse.Namespace, dtype: str, folder: Path) -> dict[str, Any]:
    """Write in both batch sizes, and compare."""
    teacher = load_teacher(options.teacher, dtype=dtype, device="cpu")
    texts, figures = {}, {}
    for size in BATCHES:
        output = folder / f"{dtype}-{size}"
        config = GenerateConfig(
            options.teacher,
            prompts=folder / "prompts.jsonl",
            output=output,
            dtype=dtype,
            prompt_as="text",
            samples=options.samples,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            batch_size=size,
        )
        began = time.process_time()
        report = generate(config, teacher=teacher)
        spent = time.process_time() - began
        figures[f"tokens a second of processor time, batches of {size}"] = round(report.tokens / spent, 1)
        texts[size] = [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    one, other = (texts[size] for size in BATCHES)
    equal = [a["tokens"] == b["tokens"] for a, b in zip(one, other, strict=True)]
    away = [abs(row["logprob"] - forced(teacher, row["prompt"], row["tokens"])) / len(row["tokens"]) for row in other]
    return {
        "texts": len(equal),
        "tokens": sum(len(row["tokens"]) for row in other),
        "equal": sum(equal),
        "exact": sum(row["exact"] for row in other),
        "logprob, nats a token from a teacher-forced pass, at most": float(f"{np.max(away):.2g}"),
        **figures,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.prompts.read_text())[: options.rows]
    with TemporaryDirectory() as name:
        folder = Path(name)
        prompts = [{"prompt": " ".join(text.split()[:WORDS])} for text in rows]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        figures = {dtype: measure(options, dtype, folder) for dtype in options.dtype}
    keep("generation", {"teacher": Path(options.teacher).name, **vars_of(options), "dtypes": figures})


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {name: getattr(options, name) for name in ("rows", "samples", "temperature", "max_new_tokens")}


if __name__ == "__main__":
    main()
