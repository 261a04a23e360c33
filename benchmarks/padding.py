"""How much of the batches of conversations is padding, with sequences grouped by length and without; and whether students train
as well from such batches.

    python -m benchmarks.padding --teacher stories260K --questions csqa.jsonl obqa.json --stories stories.json --work work

The conversations are made of questions with their answers and of stories: a geometric number of turns, of which one in six is a
story. Padding is computed from their lengths alone, for several batch sizes and groups, beside the sampler
`group_by_length` of transformers. Then the teacher makes a dump of them, and a student of three of its layers takes the same
steps from the same weights with and without groups, for each of several seeds. Finished runs are kept in the work folder, and
skipped when it is called again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.measurement import keep
from knowledge_store import KnowledgeStore
from knowledge_store.reading.length_groups import LengthGroups, padding_share
from knowledge_store.reading.order import EpochOrder, Shuffled
from knowledge_store.reading.ordinals import AllBut
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.targets import select_targets
from student_train.training.dataset import DistillationDataset
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}\n{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)
TURNS = 0.4  # chance that a conversation ends after a turn
STORIES = 1 / 6  # share of the turns
MOST_TURNS = 12
LONGEST = 2048  # tokens, of the table of padding
TRAINED_LENGTH = 384  # tokens of the students' conversations
BATCH_SIZES = (4, 8, 16, 32)
GLOBAL_BATCHES = (32, 128, 512)
GROUPS = (256, 1024, 4096)
EPOCHS = 3
KEPT_LAYERS = (0, 1, 4)
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
HELD_OUT = 200  # conversations


def question_turns(path: Path) -> list[tuple[str, str]]:
    """Questions with answers: of CommonsenseQA (JSON lines), or of a list with `instruction` and `output`."""
    if path.suffix != ".jsonl":
        return [(row["instruction"], row["output"]) for row in json.loads(path.read_text())]
    turns = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
        listed = " ".join(f"({label}) {text}" for label, text in choices.items())
        turns.append((f"{row['question']['stem']} {listed}", choices[row["answerKey"]]))
    return turns


def conversations(questions: list[Path], stories: Path, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations in which each question stands once."""
    random = np.random.default_rng(seed)
    asked = [turn for path in questions for turn in question_turns(path)]
    told = cycle(json.loads(stories.read_text()))
    left: Iterator[tuple[str, str]] = (asked[place] for place in random.permutation(len(asked)).tolist())
    found: list[list[dict[str, str]]] = []
    while True:
        messages: list[dict[str, str]] = []
        for _ in range(min(int(random.geometric(TURNS)), MOST_TURNS)):
            turn = ("Tell me a story.", next(told)) if random.random() < STORIES else next(left, None)
            if turn is None:
                return found
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        found.append(messages)


def token_counts(teacher: str, rows: list[list[dict[str, str]]]) -> np.ndarray:
    """Tokens of each conversation, cut at LONGEST."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [tokenizer.apply_chat_template(row, chat_template=TEMPLATE, tokenize=False) for row in rows]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return np.minimum(lengths, LONGEST)


def padding(lengths: np.ndarray) -> dict[str, Any]:
    """Shares of padding, means over epochs: by global batch and batch size, of each size of groups and of transformers'."""
    stream = Shuffled(AllBut(len(lengths)), 0, 0)

    def share(global_batch: int, batch_size: int, group: int | None, epoch: int) -> float:
        order: Any = EpochOrder([stream], [len(lengths)], 0, epoch)
        if group:
            order = LengthGroups(
                order, lambda _, rows: lengths[rows], group=group, global_batch=global_batch, seed=0, epoch=epoch
            )
        return padding_share(lengths[order.items(0, len(order))[1]], batch_size)

    def theirs(global_batch: int, batch_size: int, epoch: int) -> float:
        rows = get_length_grouped_indices(lengths.tolist(), global_batch, generator=torch.Generator().manual_seed(epoch))
        return padding_share(lengths[rows], batch_size)

    found: dict[str, Any] = {}
    for global_batch in GLOBAL_BATCHES:
        for batch_size in BATCH_SIZES:
            groups = {"without groups": None, "groups of one global batch": global_batch}
            groups |= {f"groups of {group}": group for group in GROUPS if group > global_batch}
            shares = {
                name: [share(global_batch, batch_size, group, epoch) for epoch in range(EPOCHS)]
                for name, group in groups.items()
            }
            shares["transformers, group_by_length"] = [theirs(global_batch, batch_size, epoch) for epoch in range(EPOCHS)]
            found[f"global batch {global_batch}, batch {batch_size}"] = {
                name: round(float(np.mean(of_epochs)), 4) for name, of_epochs in shares.items()
            }
    return found


class Laboratory:
    """The teacher's dumps, and students."""

    def __init__(self, teacher: str, rows: list[list[dict[str, str]]], work: Path):
        self.runs = work / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        template = work / "template.jinja"
        template.write_text(TEMPLATE)
        for name, part in (("train", rows[HELD_OUT:]), ("heldout", rows[:HELD_OUT])):
            corpus = work / f"{name}.jsonl"
            corpus.write_text("".join(json.dumps({"messages": row}) + "\n" for row in part))
            dump(DumpConfig(teacher, (corpus,), work / "store", name, max_length=TRAINED_LENGTH, chat_template=template))
        self.store = KnowledgeStore.open(work / "store")
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)

    def student(self, seed: int) -> LlamaForCausalLM:
        """Some of the teacher's layers, which do not know yet that others are missing."""
        torch.manual_seed(seed)
        config = type(self.teacher.config)(**{**self.teacher.config.to_dict(), "num_hidden_layers": len(KEPT_LAYERS)})
        model = LlamaForCausalLM(config)
        model.load_state_dict(self.teacher.state_dict(), strict=False)
        for layer, kept in zip(model.model.layers, KEPT_LAYERS, strict=True):
            layer.load_state_dict(self.teacher.model.layers[kept].state_dict())
        return model

    def run(self, name: str, seed: int, steps: int, group: int | None) -> dict[str, float]:
        """Train a student and measure it, or take the result of a finished run."""
        result = self.runs / f"{name.replace(' ', '-')}-{steps}-{seed}.json"
        if not result.exists():
            figures = self.measured(seed, steps, group)
            result.write_text(json.dumps(figures))
            print(f"seed {seed}, {name}: {figures}", flush=True)
        return dict(json.loads(result.read_text()))

    def measured(self, seed: int, steps: int, group: int | None) -> dict[str, float]:
        """Train a student, and measure it."""
        model = self.student(seed)
        plan: dict[str, Any] = {"group_by_length": group, "global_batch": BATCH_SIZE} if group else {}
        dataset = DistillationDataset(self.store, "train", batch_size=BATCH_SIZE, seed=seed, endless=True, **plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
        began, stream, padded, positions = time.monotonic(), iter(dataset), 0, 0
        for _ in range(steps):
            batch = next(stream)
            positions += batch["attention_mask"].numel()
            padded += batch["attention_mask"].numel() - int(batch["attention_mask"].sum())
            loss = forward_kl(*select_targets(_logits(model, batch), batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        seconds = time.monotonic() - began
        return {"padding": padded / positions, "tokens": positions - padded, "seconds": seconds, **self.quality(model.eval())}

    def quality(self, model: LlamaForCausalLM) -> dict[str, float]:
        """Held-out KL to the teacher (over candidates and tail) and NLL, nats a target: of all, and of the shorter and the
        longer half of the conversations."""
        sums: dict[str, list[np.ndarray]] = {"kl": [], "nll": []}
        lengths = []
        with torch.no_grad():
            for batch in DistillationDataset(self.store, "heldout", batch_size=1, shuffle=False):
                logits, targets = select_targets(_logits(model, batch), batch)
                sums["kl"].append(forward_kl(logits, targets, tail="bucket").double().numpy())
                sums["nll"].append(cross_entropy(logits, targets).double().numpy())
                lengths.append(batch["input_ids"].shape[1])
        by_length = np.argsort(lengths, kind="stable")
        half = len(by_length) // 2
        parts = {"": by_length, "_shorter": by_length[:half], "_longer": by_length[half:]}
        return {
            f"{name}{part}": float(np.concatenate([values[place] for place in places]).mean())
            for part, places in parts.items()
            for name, values in sums.items()
        }


def _logits(model: LlamaForCausalLM, batch: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def training(laboratory: Laboratory, steps: int, seeds: int, groups: list[int]) -> dict[str, Any]:
    """Means over the seeds, and the difference to training without groups, of the same seed: mean and standard deviation."""
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for group in (None, *groups):
            name = f"groups of {group}" if group else "without groups"
            runs.setdefault(name, []).append(laboratory.run(name, seed, steps, group))
    base = runs["without groups"]
    found: dict[str, Any] = {"steps": steps, "seeds": seeds, "batch_size": BATCH_SIZE}
    for name, results in runs.items():
        found[name] = {figure: round(float(np.mean([run[figure] for run in results])), 4) for figure in results[0]}
        if results is not base:
            for figure in ("kl", "nll"):
                differences = [run[figure] - other[figure] for run, other in zip(results, base, strict=True)]
                found[name][f"{figure}_difference"] = [
                    round(float(each), 4) for each in (np.mean(differences), np.std(differences, ddof=1))
                ]
    return found


def main() -> None:
    """Compute padding, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a folder for dumps and finished runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", type=int, nargs="+", default=[1024], help="of the students")
    parser.add_argument("--rows", type=int, default=2000, help="conversations in the students' dumps")
    options = parser.parse_args()
    rows = conversations(options.questions, options.stories)
    lengths = token_counts(options.teacher, rows)
    quantiles = {f"{share:.0%}": int(np.quantile(lengths, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
    figures: dict[str, Any] = {
        "conversations": {"count": len(rows), "mean_tokens": round(float(lengths.mean()), 1), "quantiles": quantiles},
        "padding": padding(lengths),
    }
    print(json.dumps(figures, indent=1), flush=True)
    torch.set_num_threads(1)
    laboratory = Laboratory(options.teacher, rows[: options.rows], options.work)
    figures["training"] = training(laboratory, options.steps, options.seeds, options.groups)
    keep("padding", figures)


if __name__ == "__main__":
    main()
