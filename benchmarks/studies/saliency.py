"""Does saliency find the answer where it stands, and what does it cost?

    python -m benchmarks.studies.saliency --stories tinystories.json --model stories260K
    python -m benchmarks.studies.saliency --stories tinystories.json \
        --cost 40000 stories260K --cost 2000 smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

*Overlap.* The name in the beginning of a story is swapped for another, drawn anew for each example and each step, and the
question is whom the story is about: only the context says so. The answer is the first token of the name, as the others would
be copied from the name's earlier places by any model. The model is tuned for 200 steps, without the token that ends a sequence.
Of the judged stories, none of which it was tuned on, the overlap is the share in which one of the five most salient tokens
stands within the name's characters; beside it that of five tokens drawn at random, exactly, and how often the model would give
the answer. Asked again with a target more, the end of the sequence, which it never learnt.

*Cost.* Dumps of the stories, the first half of each as the prompt of the second, with `positions`, with both kinds in one pass,
and with `saliency` alone: seconds of the processor, in turns in one process, of one thread; bytes by the columns of the files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measurement import STUDIES, keep
from knowledge_store import KnowledgeStore
from knowledge_store.kinds.saliency import METHODS, SUBJECTS
from knowledge_store.terminal.console import note
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump
from teacher_dump.teachers.local import LocalTeacher, load_teacher

NAMES = ("Lily", "Ben", "Tom", "Timmy", "Tim", "Sam", "Mia")  # which differ in their first token
QUESTION = "\n\nWho is this story about? This story is about"
CHARACTERS = 240  # of a story's beginning
MAX_LENGTH = 192  # tokens
STEPS, BATCH, RATE = 200, 16, 1e-3
JUDGED, TOP = 200, 5
ROUNDS = 2
KINDS = {"positions": ("positions",), "both": ("positions", "saliency"), "saliency": ("saliency",)}


@dataclass(frozen=True)
class Beginning:
    """The beginning of a story: what stands between the places of its name."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A story with a name put in, the question and the answer.

    Attributes:
        token_ids: of all of it. is_target: of the answer. is_name: of the name, in the story.
    """

    token_ids: list[int]
    is_target: list[bool]
    is_name: list[bool]


def beginnings(stories: list[str]) -> list[Beginning]:
    """Beginnings in which one of NAMES stands, and no other."""
    found = []
    for story in stories:
        text = story[:CHARACTERS].rsplit(" ", 1)[0]
        names = set(re.findall(rf"\b({'|'.join(NAMES)})\b", text))
        if len(names) == 1:
            found.append(Beginning(tuple(re.split(rf"\b{names.pop()}\b", text))))
    return found


def example(beginning: Beginning, name: str, tokenizer: Any, end: bool) -> Example:
    """The beginning with a name put in; `end` adds the token that ends a sequence to the answer."""
    story = name.join(beginning.parts)
    starts, place = [], 0
    for part in beginning.parts[:-1]:
        starts.append(place + len(part))
        place = starts[-1] + len(name)
    prompt = story + QUESTION
    encoded = tokenizer(prompt + f" {name}", return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    targets = [begin >= len(prompt) and stop > begin for begin, stop in spans]
    length = targets.index(True) + 1
    within = [any(begin < at + len(name) and stop > at for at in starts) for begin, stop in spans]
    ids = list(encoded["input_ids"])[:length]
    extra = [tokenizer.eos_token_id] if end else []
    return Example([*ids, *extra], [*targets[:length], *[True] * len(extra)], [*within[:length], *[False] * len(extra)])


def tune(model: Any, tokenizer: Any, train: list[Beginning]) -> None:
    """Teach the model to answer with the name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = random.Random(0)
    model.train()
    for step in range(STEPS):
        rows = [example(generator.choice(train), generator.choice(NAMES), tokenizer, end=False) for _ in range(BATCH)]
        width = max(len(row.token_ids) for row in rows)
        ids = torch.tensor([row.token_ids + [0] * (width - len(row.token_ids)) for row in rows])
        labels = torch.tensor(
            [
                [token if target else -100 for token, target in zip(row.token_ids, row.is_target, strict=True)]
                + [-100] * (width - len(row.token_ids))
                for row in rows
            ]
        )
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def random_overlap(row: Example) -> float:
    """How probable it is that one of TOP context tokens, drawn at random, is of the name."""
    context = len(row.is_target) - sum(row.is_target)
    others = context - sum(row.is_name)
    return 1 - comb(others, TOP) / comb(context, TOP)


def overlap(folder: Path, rows: list[Example], work: Path) -> dict[str, Any]:
    """Dump the examples in each way, and hold the most salient tokens against the name's."""
    teacher = load_teacher(str(folder), device="cpu")
    corpus = work / "examples.jsonl"
    lines = [{"input_ids": row.token_ids, "completion_mask": [int(target) for target in row.is_target]} for row in rows]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures: dict[str, Any] = {}
    for method in METHODS:
        for subject in SUBJECTS:
            name = f"{method}-{subject}"
            config = DumpConfig(
                str(folder), (corpus,), work / "store", name, kinds=("positions", "saliency"), max_length=MAX_LENGTH,
                saliency_method=method, saliency_of=subject,
            )  # fmt: skip
            dump(config, teacher=teacher)
            store = KnowledgeStore.open(work / "store")
            hits = 0
            top = store.sql(
                f"SELECT document, list(position) AS places FROM rationales JOIN sequences USING (dump, sequence_id)"
                f" WHERE dump = '{name}' AND rank <= {TOP} GROUP BY document"
            ).to_pylist()
            for found in top:
                hits += any(rows[found["document"]].is_name[place] for place in found["places"])
            figures[f"{method}, of {subject}"] = hits / len(rows)
    figures["random"] = statistics.mean(map(random_overlap, rows))
    figures["accuracy"] = accuracy(teacher, rows)
    return figures


def accuracy(teacher: LocalTeacher, rows: list[Example]) -> float:
    """How often every token of the name (the end of a sequence left out) is the likeliest at its place."""
    right = 0
    for row in rows:
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            likeliest = teacher.model(input_ids=ids).logits[0].argmax(dim=1)
        places = [place for place, target in enumerate(row.is_target) if target]
        places = [place for place in places if row.token_ids[place] != teacher.tokenizer.eos_token_id]
        right += all(likeliest[place - 1] == row.token_ids[place] for place in places)
    return right / len(rows)


def overlaps(model_folder: str, stories: list[str], work: Path) -> dict[str, Any]:
    """The overlap before and after tuning, and with an end of sequence as a target more."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = beginnings(stories)
    train, judged = found[:-JUDGED], found[-JUDGED:]
    generator = random.Random(1)
    names = [generator.choice(NAMES) for _ in judged]
    rows = [example(beginning, name, tokenizer, end=False) for beginning, name in zip(judged, names, strict=True)]
    ended = [example(beginning, name, tokenizer, end=True) for beginning, name in zip(judged, names, strict=True)]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tune(model, tokenizer, train)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    figures: dict[str, Any] = {
        "names": len(NAMES), "top": TOP, "tuned_on": len(train), "judged": len(judged), "steps": STEPS,
    }  # fmt: skip
    for name, folder, examples in (
        ("untuned", Path(model_folder), rows),
        ("tuned", work / "model", rows),
        ("tuned, with an end of sequence", work / "model", ended),
    ):
        (work / name).mkdir()
        figures[name] = overlap(folder, examples, work / name)
        note(f"{name}: {figures[name]}")
    return figures


# --- cost ---------------------------------------------------------------------------------------------------------------


def cost(place: str, gguf_file: str | None, stories: list[str], positions: int, work: Path) -> dict[str, Any]:
    """Processor time and bytes of dumps with one kind and with both, of about so many positions."""
    teacher = load_teacher(place, gguf_file, device="cpu")
    lines, tokens = [], 0
    for story in stories:
        words = story.split(" ")
        lines.append({"prompt": " ".join(words[: len(words) // 2]), "completion": " " + " ".join(words[len(words) // 2 :])})
        tokens += len(teacher.tokenizer(story)["input_ids"])
        if tokens > positions:
            break
    corpus = work / "halves.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = DumpConfig(place, (corpus,), work, max_length=512, shard_size=len(lines), gguf_file=gguf_file)
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in range(ROUNDS + 1):  # the first pays for what later ones find ready
        for name, kinds in KINDS.items():
            config = replace(base, store=work / str(turn), name=name, kinds=kinds)
            began = time.process_time()
            dump(config, teacher=teacher)
            seconds[name].append(time.process_time() - began)
    summaries = {facts.dump: facts for facts in KnowledgeStore.open(work / "0").info()}
    each = {name: facts.column_bytes for name, facts in summaries.items()}
    count = summaries["both"].positions
    shared = sum(size for name, size in each["both"].items() if name.startswith("saliency."))
    ratios = {
        name: [other / plain for other, plain in zip(seconds[name][1:], seconds["positions"][1:], strict=True)]
        for name in ("both", "saliency")
    }
    return {
        "teacher": teacher.description["name"],
        "parameters": teacher.description["parameters"],
        "positions": count,
        "context": int(summaries["both"].statistics["saliency.context"] or 0),
        "bytes_per_position_of_positions": sum(each["positions"].values()) / count,
        "bytes_per_position_more": shared / count,
        "columns": {name: size / count for name, size in each["both"].items() if name.startswith("saliency.")},
        "bytes_per_position_alone": sum(each["saliency"].values()) / count,
        "processor_seconds": {name: [round(value, 3) for value in values[1:]] for name, values in seconds.items()},
        "time_of_both": statistics.median(ratios["both"]),
        "time_of_saliency_alone": statistics.median(ratios["saliency"]),
        "mean_top_5_share": summaries["both"].statistics["saliency.mean_top_5_share"],
    }


def main() -> None:
    """Measure both, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of stories")
    parser.add_argument("--model", help="folder of a small model of stories, whose overlap is measured")
    parser.add_argument("--cost", nargs="+", action="append", default=[], help="positions, a folder, perhaps a GGUF file in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stories = json.loads(arguments.stories.read_text())
    if arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            keep("saliency-overlap", overlaps(arguments.model, stories, Path(folder)), STUDIES)
    costs = []
    for positions, place, *files in arguments.cost:
        with tempfile.TemporaryDirectory() as folder:
            costs.append(cost(place, files[0] if files else None, stories, int(positions), Path(folder)))
        note(f"{costs[-1]}")
    if costs:
        keep("saliency-cost", {"rounds": ROUNDS, "teachers": costs}, STUDIES)


if __name__ == "__main__":
    main()
