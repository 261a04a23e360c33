"""Whether draws are unbiased: many starts of one distribution against its full softmax.

    python -m benchmarks.studies.unbiasedness --teacher smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --text wikitext2.txt
    python -m benchmarks.studies.unbiasedness --synthetic 262144

At some positions of a text, or of made-up distributions (Zipf's law of several exponents with log-normal noise, the likeliest
tokens at random ids), each selection draws from as many starts as a dump with that many positions would have. How often each
token came is compared with what the full softmax outside the candidates says (in float64): q / τ at every start, by Pearson's
statistic over bins of at least `MIN_EXPECTED` expected draws. Of a sound sampler it is at most a chi-square variable
(systematic draws vary less), and exceeds the limit that is printed with a probability below `FALSE_ALARM` in the whole run, all
distributions and selections together. Candidates are kept with their own probability, so nothing else could be biased.
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
from knowledge_store.kinds.positions.selection import Selection, most_above
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.extraction.sampling import block_sums, draw, starts
from teacher_dump.teachers.local import load_teacher

FALSE_ALARM = 1e-6
MIN_EXPECTED = 25
DRAWS = 40_000
SELECTIONS = (
    Selection("top-k", 5, 0.05),
    Selection("top-p", 32, 0.05, p=0.95),
    Selection.threshold(0.2),
    Selection.threshold(0.05),
)
MOST_STARTS, STARTS_AT_ONCE = 60_000, 1024


def tail_of(logits: Tensor, selection: Selection) -> tuple[Tensor, float, np.ndarray]:
    """What is drawn from at one distribution: the float32 weights (1, V) of a dump, the spacing of points in them, and how
    often each token is to be drawn at a start, float64 (V,)."""
    full = torch.softmax(logits.double(), dim=0)
    order = full.argsort(descending=True)[: selection.candidates]
    if selection.name == "top-p":
        before = full[order].cumsum(0) - full[order]
        order = order[before < selection.p]
    elif selection.name == "threshold":
        order = order[full[order] >= selection.draw_weight]
    kept = logits.clone()
    kept[order] = -torch.inf
    highest = kept.max()
    spacing = selection.draw_weight * math.exp(float(torch.logsumexp(logits.double(), dim=0) - highest))
    full[order] = 0
    return torch.exp(kept - highest)[None], spacing, (full / selection.draw_weight).numpy()


def drawn(logits: Tensor, selection: Selection, number: int, reference: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How often each token was drawn in all, DRAWS together or from MOST_STARTS, and how often it was to be, float64 (V,)
    each; by other logits of the same distribution where these are given."""
    weights, spacing, expected = tail_of(logits, selection)
    if reference is not None:
        expected = tail_of(reference, selection)[2]
    count = math.ceil(min(MOST_STARTS, DRAWS / expected.sum()))
    begin = torch.from_numpy(starts(number, count, selection.draw_seed))
    sums = block_sums(weights)
    seen = np.zeros(len(expected))
    for part in begin.split(STARTS_AT_ONCE):
        rows = len(part)
        ids = draw(
            weights.expand(rows, -1), sums.expand(rows, -1), torch.full((rows,), spacing, dtype=torch.float64), part,
            most_above(selection.draw_weight) + 1,
        )  # fmt: skip
        seen += np.bincount(ids[ids >= 0].numpy(), minlength=len(expected))
    return seen, expected * count


def made_up(vocabulary: int, count: int) -> Tensor:
    """Logits of distributions like those of language models, float32 (count, vocabulary)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for exponent in torch.linspace(0.9, 1.8, count).tolist():
        logits = -exponent * torch.arange(1, vocabulary + 1).log() + torch.randn(vocabulary, generator=generator)
        rows.append(logits[torch.randperm(vocabulary, generator=generator)])
    return torch.stack(rows)


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
    parser.add_argument("--teacher")
    parser.add_argument("--gguf-file")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--synthetic", type=int, metavar="VOCABULARY", help="made-up distributions instead of a teacher's")
    parser.add_argument("--positions", type=int, default=16, help="how many distributions")
    arguments = parser.parse_args()
    if arguments.synthetic:
        logits = made_up(arguments.synthetic, arguments.positions)
    else:
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
                seen, expected = drawn(row, selection, position)
                statistic, bins = chi_square(seen, expected)
                most = limit(bins - 1, each)
                found = {"selection": str(selection), "statistic": statistic, "bins": bins, "limit": most}
                rows.append({**found, "passed": statistic < most})
                advance(1)
    name = "made up" if arguments.synthetic else arguments.gguf_file or Path(arguments.teacher).name
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
