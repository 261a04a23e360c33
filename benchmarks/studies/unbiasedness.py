"""Whether draws are unbiased on a real teacher's own distributions: many draws against the full softmax.

    python -m benchmarks.studies.unbiasedness --teacher smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --text wikitext2.txt

At some positions of a text, each selection draws again and again. How often each token came is compared with what the
teacher's full softmax outside the candidates says (in float64), by Pearson's statistic over bins of at least `MIN_EXPECTED`
expected draws. Of a sound sampler it is at most a chi-square variable (systematic draws vary less), and exceeds the limit that
is printed with a probability below `FALSE_ALARM` in the whole run, all positions and selections together.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measurement import STUDIES, keep
from knowledge_store.kinds.positions.selection import Selection
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.extraction.sampling import block_sums, draw, independent_points, systematic_points
from teacher_dump.teachers.local import load_teacher

FALSE_ALARM = 1e-6
MIN_EXPECTED = 25
DRAWS = 60_000
SELECTIONS = (Selection("top-k", 5, 4), Selection("top-p", 32, 4, 0.95), Selection("random-sampling", 0, 50))


def tail_weights(logits: Tensor, selection: Selection) -> tuple[Tensor, np.ndarray]:
    """What is drawn from at one position: the float32 weights (1, V) of a dump, and the true probabilities, float64 (V,)."""
    full = torch.softmax(logits.double(), dim=0)
    order = full.argsort(descending=True)[: selection.candidates]
    if selection.name == "top-p":
        before = full[order].cumsum(0) - full[order]
        order = order[before < selection.p]
    kept = logits.clone()
    kept[order] = -torch.inf
    full[order] = 0
    return torch.exp(kept - kept.max())[None], (full / full.sum()).numpy()


def chi_square(seen: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic over bins of tokens of like probability, and how many bins there are."""
    order = np.argsort(-expected)
    full = np.flatnonzero(np.diff(np.floor(expected[order].cumsum() / MIN_EXPECTED), prepend=0))
    edges = np.concatenate([[0], full[:-1] + 1])
    observed, hoped = np.add.reduceat(seen[order], edges), np.add.reduceat(expected[order], edges)
    return float(((observed - hoped) ** 2 / hoped).sum()), len(edges)


def limit(degrees: int, false_alarm: float) -> float:
    """What a chi-square variable exceeds with at most that probability (Laurent and Massart 2000, lemma 1)."""
    x = -math.log(false_alarm)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


def main() -> None:
    """Draw, compare, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--positions", type=int, default=16)
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher, arguments.gguf_file)
    ids = teacher.tokenizer(arguments.text.read_text()[:4000])["input_ids"][: 8 * arguments.positions]
    input_ids = torch.tensor([ids])
    with torch.inference_mode():
        logits = teacher.model(input_ids=input_ids.to(teacher.device)).logits[0, 7::8].float().cpu()
    each = FALSE_ALARM / (len(logits) * len(SELECTIONS))
    rows: list[dict[str, Any]] = []
    with progress_bar("drawing", len(logits) * len(SELECTIONS), "distributions") as advance:
        for position, row in enumerate(logits):
            for selection in SELECTIONS:
                weights, expected = tail_weights(row, selection)
                points = systematic_points if selection.candidates else independent_points
                at = torch.from_numpy(points(position, DRAWS // selection.draws, selection.draws)).reshape(1, -1)
                sums = block_sums(weights)
                drawn = torch.cat([draw(weights, sums, part) for part in at.split(64, dim=1)], dim=1)
                seen = np.bincount(drawn[0].numpy(), minlength=len(expected)).astype(np.float64)
                statistic, bins = chi_square(seen, expected * at.shape[1])
                most = limit(bins - 1, each)
                found = {"selection": str(selection), "statistic": statistic, "bins": bins, "limit": most}
                rows.append({**found, "passed": statistic < most})
                advance(1)
    name = arguments.gguf_file or Path(arguments.teacher).name
    figures = {
        "teacher": name,
        "vocabulary_size": logits.shape[1],
        "positions": len(logits),
        "draws": DRAWS,
        "false_alarm": FALSE_ALARM,
        "failed": sum(not row["passed"] for row in rows),
        "largest_share_of_the_limit": max(row["statistic"] / row["limit"] for row in rows),
        "bins": [min(row["bins"] for row in rows), max(row["bins"] for row in rows)],
    }
    keep(f"unbiasedness-{logits.shape[1]}", {**figures, "each": rows}, STUDIES)
    print(figures)


if __name__ == "__main__":
    main()
