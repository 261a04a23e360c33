"""Whether a student learns as well from the order `blocks` as from `global`.

    python -m benchmarks.studies.orders --teacher stories260K --stories stories.json

A small real teacher (vocabulary 512) and a student of three of its layers, which goes on from the teacher's weights by forward
KL over one epoch, for each of several seeds. The corpus is read as it stands, and sorted by the length of its stories, so that
neighbours are alike, as in a corpus of several files. Row groups are small, 8 sequences, and windows 16 or 64 of them: 16 or 64
batches. `in order` shows what is at stake. KL is that to the teacher over the whole vocabulary, on held-out stories. Finished
runs are kept in the work folder, and skipped when it is called again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import knowledge_store.writing.row_groups
from benchmarks.measurement import STUDIES, keep
from benchmarks.small_students import cosine, logits_of, write_atomically
from knowledge_store import KnowledgeStore
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.targets import select_targets
from student_train.training.dataset import DistillationDataset
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump

KEPT_LAYERS = (0, 1, 4)
MAX_LENGTH = 128
GROUP_BYTES = 8 * MAX_LENGTH * 2048  # eight sequences, each position counted as 2048 bytes
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
HELD_OUT_STORIES, STORIES = 40, 440
CORPORA = ("sorted by length", "as it stands")
ORDERS: dict[str, dict[str, Any]] = {
    "global": {},
    "blocks, windows of 16": {"order": "blocks", "window": 16},
    "blocks, windows of 64": {"order": "blocks", "window": 64},
    "in order": {"shuffle": False},
}


def dump_of(corpus: str) -> str:
    """The name of a corpus's dump."""
    return corpus.replace(" ", "-")


def make_store(teacher: str, stories: Path, work: Path) -> KnowledgeStore:
    """A dump of each corpus, in small row groups, and `heldout`."""
    work.mkdir(parents=True, exist_ok=True)
    texts = json.loads(stories.read_text())
    training = texts[HELD_OUT_STORIES:STORIES]
    of_dumps = zip(map(dump_of, CORPORA), (sorted(training, key=len), training), strict=True)
    parts = {"heldout": texts[:HELD_OUT_STORIES], **dict(of_dumps)}
    for name, chosen in parts.items():
        corpus = work / f"{name}.jsonl"
        if not corpus.exists():
            corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        with patch.object(knowledge_store.writing.row_groups, "ROW_GROUP_BYTES", GROUP_BYTES):
            dump(DumpConfig(teacher, (corpus,), work / "store", name, max_length=MAX_LENGTH))
    return KnowledgeStore.open(work / "store")


def quality(model: LlamaForCausalLM, teacher: Any, store: KnowledgeStore) -> dict[str, float]:
    """Held-out NLL and KL to the teacher, nats per token."""
    sums, count = {"nll": 0.0, "kl": 0.0}, 0
    with torch.no_grad():
        for batch in DistillationDataset(store, "heldout", batch_size=BATCH_SIZE, shuffle=False, rank=0, world_size=1):
            logits, targets = select_targets(logits_of(model, batch), batch)
            q = torch.log_softmax(select_targets(logits_of(teacher, batch), batch)[0].double(), dim=-1)
            p = torch.log_softmax(logits.double(), dim=-1)
            sums["nll"] += float(cross_entropy(logits, targets).double().sum())
            sums["kl"] += float((q.exp() * (q - p)).sum())
            count += len(logits)
    return {name: value / count for name, value in sums.items()}


def run(store: KnowledgeStore, teacher: Any, corpus: str, name: str, seed: int, work: Path) -> dict[str, Any]:
    """Train a student and measure it, or take the result of a finished run."""
    result = work / "runs" / f"{dump_of(corpus)}-{dump_of(name)}-{seed}.json"
    if result.exists():
        return dict(json.loads(result.read_text()))
    result.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(type(teacher.config)(**{**teacher.config.to_dict(), "num_hidden_layers": len(KEPT_LAYERS)}))
    model.load_state_dict(teacher.state_dict(), strict=False)
    for layer, kept in zip(model.model.layers, KEPT_LAYERS, strict=True):
        layer.load_state_dict(teacher.model.layers[kept].state_dict())
    plan = {"batch_size": BATCH_SIZE, "seed": seed, "rank": 0, "world_size": 1}
    dataset = DistillationDataset(store, dump_of(corpus), **plan, **ORDERS[name])
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(len(dataset)))
    began = time.monotonic()
    for batch in dataset:
        logits, targets = select_targets(logits_of(model, batch), batch)
        optimiser.zero_grad()
        forward_kl(logits, targets).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    seconds = round(time.monotonic() - began, 1)
    figures = {"steps": len(dataset), "seconds": seconds, **quality(model.eval(), teacher, store)}
    write_atomically(result, figures)
    print(f"{corpus}, {name}, seed {seed}: {figures}", flush=True)
    return figures


def summary(runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and each."""
    values = [round(run[metric], 5) for run in runs]
    sd = round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 5), "sd": sd, "by_seed": values}


def main() -> None:
    """Run what is missing, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".orders"))
    options = parser.parse_args()
    store = make_store(options.teacher, options.stories, options.work)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval().requires_grad_(False)
    seeds = range(options.seeds)
    runs = {
        corpus: {name: [run(store, teacher, corpus, name, seed, options.work) for seed in seeds] for name in ORDERS}
        for corpus in CORPORA
    }
    first = dump_of(CORPORA[0])
    figures: dict[str, Any] = {
        "sequences": store.sequence_count(first),
        "row_groups": len(store.batches(first, order="blocks").readers[0].row_groups) - 1,
        "steps": runs[CORPORA[0]]["global"][0]["steps"],
        "seeds": options.seeds,
        "corpora": {
            corpus: {name: {metric: summary(found, metric) for metric in ("kl", "nll")} for name, found in of_corpus.items()}
            for corpus, of_corpus in runs.items()
        },
    }
    keep("orders", figures, STUDIES)


if __name__ == "__main__":
    main()
