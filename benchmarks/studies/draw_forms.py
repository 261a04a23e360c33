"""Two unbiased forms of the loss of draws whose number varies, and how much the gradient of each varies.

    python -m benchmarks.studies.draw_forms --teacher stories260K --corpus tinystories.jsonl

Draws stand for a weight τ each, so that a position's target, candidates and draws, has a mass M that is one on average alone.
Both −Σ w z + M · LSE(z) and −Σ w z + LSE(z) have the full divergence's gradient on average. Their gradients by the logits are
M p − w and p − w. Of each selection, draws are made `SEEDS` times at the same positions, and the variances over them summed:
of the gradient by the logits, and of that by the hidden states before the head, from which all other weights have theirs. The
student is the teacher with noise added to its weights, once little and once much of it.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measurement import STUDIES, keep
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.sampling import starts
from teacher_dump.teachers.local import load_teacher

SEEDS = 64
POSITIONS = 512
NOISES = {"near": 0.1, "far": 1.0}  # of a weight's own standard deviation
SELECTIONS = (
    *(Selection("top-k", 5, weight) for weight in (0.2, 0.1, 0.05, 0.025)),
    *(Selection.threshold(weight) for weight in (0.2, 0.1, 0.05)),
)


def target(logits: Tensor, selection: Selection, seed: int) -> Tensor:
    """Candidates and draws as one target, float64 (N, V)."""
    begin = torch.from_numpy(starts(0, len(logits), seed))
    found = knowledge_of(logits.clone(), torch.zeros(len(logits), dtype=torch.long), selection, begin)
    weights = torch.zeros(logits.shape, dtype=torch.float64)
    weights.scatter_add_(1, found["candidate_ids"], found["candidate_logprobs"].double().exp())
    drawn = found["tail_ids"]
    return weights.scatter_add_(1, drawn.clamp(min=0), selection.draw_weight * (drawn >= 0).double())


def main() -> None:
    """Draw, measure both forms, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, type=Path)
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher)
    text = " ".join(json.loads(line)["text"] for line in arguments.corpus.read_text().splitlines()[:20])
    ids = torch.tensor(
        [teacher.tokenizer(text)["input_ids"][: POSITIONS // 2], teacher.tokenizer(text)["input_ids"][-POSITIONS // 2 :]]
    )
    with torch.inference_mode():
        logits = teacher.model(input_ids=ids).logits.float().flatten(0, 1)
    head = teacher.model.get_output_embeddings().weight.detach().double()
    rows: list[dict[str, Any]] = []
    for name, noise in NOISES.items():
        torch.manual_seed(0)
        student = copy.deepcopy(teacher.model)
        with torch.no_grad():
            for weight in student.parameters():
                if weight.dim() == 2:
                    weight += noise * weight.std() * torch.randn_like(weight)
            p = torch.softmax(student(input_ids=ids).logits.double().flatten(0, 1), dim=1)
        for selection in SELECTIONS:
            sums: dict[str, list[np.ndarray]] = {}
            for seed in range(SEEDS):
                weights = target(logits, selection, seed)
                mass = weights.sum(dim=1, keepdim=True)
                for form, gradient in {"mass": mass * p - weights, "one": p - weights}.items():
                    for of, values in {"logits": gradient, "hidden": gradient @ head}.items():
                        first, second = values.numpy(), values.square().numpy()
                        if seed == 0:
                            sums[f"{form} {of}"] = [first.copy(), second.copy()]
                        else:
                            sums[f"{form} {of}"][0] += first
                            sums[f"{form} {of}"][1] += second
            variances = {
                key: float((squares / SEEDS - (total / SEEDS) ** 2).sum(axis=1).mean() * SEEDS / (SEEDS - 1))
                for key, (total, squares) in sums.items()
            }
            ratios = {of: variances[f"mass {of}"] / variances[f"one {of}"] for of in ("logits", "hidden")}
            rows.append({"student": name, "selection": str(selection), "variance": variances, "mass_against_one": ratios})
            print(f"{name:<6}{selection!s:<36} {ratios['logits']:.4f} {ratios['hidden']:.4f}")
    figures = {"teacher": Path(arguments.teacher).name, "positions": len(logits), "seeds": SEEDS, "each": rows}
    keep("draw_forms", figures, STUDIES)


if __name__ == "__main__":
    main()
