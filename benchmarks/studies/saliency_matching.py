"""Does a student gain by having the teacher's saliency, beside its answers, and what does that cost?

    python -m benchmarks.studies.saliency_matching --stories tinystories.json --model stories260K --work FOLDER

The task is that of `saliency`: whom is a story about, whose name was swapped for another. The teacher is tuned for it. Students
are copies of the untuned model, which learn the teacher's distribution of the answer (KL) for some steps. With *matching* their
loss has WEIGHT · ‖s/‖s‖ − t/‖t‖‖² more: s and t are the saliencies of the context's tokens, student's and teacher's, which are
the norms of the gradient of the gold token's log-odds at the embeddings. That is the idea of AD-KD (Wu et al. 2023,
Attribution-Driven Knowledge Distillation, arXiv 2305.10010), with the gradient itself in place of its integral along a path. A
step then needs second derivatives.

Of the judged stories: how often the student's likeliest token is the name, the negative log-likelihood of the name (nats), and
how often one of the student's own five most salient tokens is the name's. Seconds are those of one core, without the
teacher's, whose answers and saliency a store keeps. *As long* has as many steps without matching as take the time of matching.
The tuned teacher and finished students' figures stay in the folder, and are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measurement import STUDIES, keep
from benchmarks.studies.saliency import JUDGED, NAMES, RATE, TOP, Beginning, Example, beginnings, example, tune
from knowledge_store.terminal.console import note

SEEDS = (0, 1, 2)
STEPS, STUDENT_BATCH = 40, 8
WEIGHTS = (1.0, 10.0)  # of matching; 0 is without


@dataclass(frozen=True)
class Batch:
    """Examples of one step: ids and mask (B, T), and the place that predicts the answer, the answer, and which are context."""

    ids: Tensor
    mask: Tensor
    places: Tensor
    answers: Tensor
    context: Tensor
    name: Tensor


def batch_of(rows: list[Example]) -> Batch:
    """Examples, padded on the right."""
    width = max(len(row.token_ids) for row in rows)

    def padded(values: list[list[Any]]) -> Tensor:
        return torch.tensor([[*map(int, row), *[0] * (width - len(row))] for row in values])

    ends = torch.tensor([len(row.token_ids) - 1 for row in rows])
    ids, mask = padded([row.token_ids for row in rows]), padded([[1] * len(row.token_ids) for row in rows])
    answers = ids.gather(1, ends[:, None])[:, 0]
    context = torch.arange(width)[None] < ends[:, None]
    return Batch(ids, mask, ends - 1, answers, context, padded([row.is_name for row in rows]).bool())


def answer_logits(model: nn.Module, batch: Batch, embeddings: Tensor) -> Tensor:
    """The logits that predict the answer, (B, V)."""
    logits = model(inputs_embeds=embeddings, attention_mask=batch.mask, use_cache=False).logits
    return logits[torch.arange(len(logits)), batch.places]


def asked(model: nn.Module, batch: Batch, *, second: bool) -> tuple[Tensor, Tensor]:
    """The answer's logits (B, V) and the saliency of the context's tokens, of norm 1, (B, T); `second` for their gradients."""
    embeddings = model.get_input_embeddings()(batch.ids)  # type: ignore[operator]
    embeddings = embeddings if second else embeddings.detach().requires_grad_()
    logits = answer_logits(model, batch, embeddings)
    own = logits.gather(1, batch.answers[:, None])[:, 0]
    others = logits.scatter(1, batch.answers[:, None], float("-inf")).logsumexp(dim=1)
    [slopes] = torch.autograd.grad((own - others).sum(), embeddings, create_graph=second)
    squares = slopes.square().sum(dim=2).masked_fill(~batch.context, 0)
    norms = squares.clamp(min=1e-20).sqrt() * batch.context  # the root has no slope at 0
    return logits, normalize(norms, dim=1)


def learn(
    student: nn.Module, teacher: nn.Module, train: list[Beginning], tokenizer: Any, seed: int, weight: float, steps: int
) -> float:
    """Train a student in place; gives the seconds of the processor that its own passes took."""
    generator, seconds = random.Random(seed), 0.0
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    for step in range(steps):
        rows = [example(generator.choice(train), generator.choice(NAMES), tokenizer, end=False) for _ in range(STUDENT_BATCH)]
        batch = batch_of(rows)
        told, saliency = asked(teacher, batch, second=False)
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        if weight:
            logits, own = asked(student, batch, second=True)
            apart = (own - saliency).square().sum(dim=1).mean()
        else:
            logits, apart = answer_logits(student, batch, student.get_input_embeddings()(batch.ids)), torch.zeros(())  # type: ignore[operator]
        teacher_logprobs = told.detach().log_softmax(dim=1)
        divergence = (teacher_logprobs.exp() * (teacher_logprobs - logits.log_softmax(dim=1))).sum(dim=1).mean()
        (divergence + weight * apart).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - began
    return seconds


def judged(model: nn.Module, rows: list[Example]) -> dict[str, float]:
    """The figures of a model, over all judged stories."""
    right, nll, hits = 0, 0.0, 0
    for start in range(0, len(rows), 50):
        batch = batch_of(rows[start : start + 50])
        logits, saliency = asked(model, batch, second=False)
        right += int((logits.argmax(dim=1) == batch.answers).sum())
        nll -= float(logits.detach().log_softmax(dim=1).gather(1, batch.answers[:, None]).sum())
        hits += int(batch.name.gather(1, saliency.topk(TOP, dim=1).indices).any(dim=1).sum())
    return {"accuracy": right / len(rows), "nll": round(nll / len(rows), 4), "overlap": hits / len(rows)}


def main() -> None:
    """Measure every arm with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of stories")
    parser.add_argument("--model", required=True, help="folder of a small model of stories")
    parser.add_argument("--work", required=True, type=Path, help="where the teacher and finished figures are kept")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = beginnings(json.loads(arguments.stories.read_text()))
    train, last = found[:-JUDGED], found[-JUDGED:]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    generator = random.Random(1)
    rows = [example(beginning, generator.choice(NAMES), tokenizer, end=False) for beginning in last]

    def loaded(folder: str | Path) -> Any:
        # Fused attention has no second derivatives.
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    if not (work / "teacher" / "model.safetensors").exists():
        torch.manual_seed(0)
        tuned = loaded(arguments.model)
        tune(tuned, tokenizer, train)
        tuned.save_pretrained(work / "teacher")
    teacher = loaded(work / "teacher").eval()
    figures: dict[str, Any] = {
        "steps": STEPS,
        "batch": STUDENT_BATCH,
        "judged": len(rows),
        "teacher": judged(teacher, rows),
        "students": {},
    }

    def student(name: str, seed: int, weight: float, steps: int) -> float:
        cell = work / f"{seed} {name}.json"
        if not cell.exists():
            torch.manual_seed(seed)
            model = loaded(arguments.model).train()
            seconds = learn(model, teacher, train, tokenizer, seed, weight, steps)
            model.eval()
            cell.write_text(json.dumps({"steps": steps, "seconds": round(seconds, 2), **judged(model, rows)}))
        result = json.loads(cell.read_text())
        figures["students"].setdefault(name, []).append(result)
        note(f"{name}, seed {seed}: {result}")
        return float(result["seconds"])

    for seed in SEEDS:
        plain = student("KL", seed, 0.0, STEPS)
        longer = [student(f"KL and {weight:g} · matching", seed, weight, STEPS) for weight in WEIGHTS]
        student("KL, as long", seed, 0.0, round(STEPS * statistics.mean(longer) / plain))
    figures["means"] = {
        name: {figure: round(statistics.mean(each[figure] for each in seeds), 4) for figure in seeds[0]}
        for name, seeds in figures["students"].items()
    }
    keep("saliency_matching", figures, STUDIES)


if __name__ == "__main__":
    main()
