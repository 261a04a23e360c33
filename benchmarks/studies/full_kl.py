"""Whether the KL that `evaluate` estimates from a store is that of the whole distributions, and whether its intervals hold.

    python -m benchmarks.studies.full_kl --teacher stories260K --stories stories.json

A small real teacher (vocabulary 512) and three students: its own weights rounded to 4 bits, three of its five layers as they
are, and these after a short training on the text. Both read the same stories, and at every position the estimate of
`student_train.losses.full_kl` is held against the exact divergence, from draws of several seeds:

* `without_rounding`: the mean of estimate − exact, over the seeds, and its standard error over them. On average over the draws
  there should be nothing.
* `with_rounding`: the same with what a dump keeps, and beside it the bias alone, with the draws replaced by what they are on
  average; and the floor that an evaluation prints. The teacher itself is a fourth student here.
* `coverage`: sets of stories are drawn anew, each story with the draws of any seed, and measured as `evaluate` does, with
  rounding: how many of the intervals have the exact value of all stories in them.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.measurement import STUDIES, keep
from knowledge_store import KINDS, Manifest
from knowledge_store.kinds.positions import PositionsParameters
from knowledge_store.kinds.positions.selection import DRAW_WEIGHT, Selection
from knowledge_store.terminal.progress import progress_bar
from student_train.evaluation.bootstrap import bootstrap, mean_of_sums
from student_train.evaluation.metrics import standard_error
from student_train.losses.full_kl import full_kl, rounding_floor
from student_train.losses.targets import Targets, targets_of
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.positions import QUANTISATION_STEP
from teacher_dump.extraction.sampling import starts

MAX_LENGTH = 128
BITS = 4
KEPT_LAYERS = (0, 1, 4)
STEPS, BATCH, LEARNING_RATE = 150, 8, 2e-3
SELECTION = Selection("top-k", 5, DRAW_WEIGHT)
NORMAL = 1.96  # of a standard error on either side: 95%


@dataclass(frozen=True)
class Story:
    """What a store would keep of one sequence, N positions of it, for each of several seeds of draws.

    Attributes:
        logprobs: the teacher's, float64 (N, V).
        exact, rounded: targets, one a seed, as the teacher says and as a dump keeps it.
    """

    tokens: Tensor
    logprobs: Tensor
    exact: list[Targets]
    rounded: list[Targets]


def students(teacher: PreTrainedModel, texts: list[Tensor]) -> dict[str, PreTrainedModel]:
    """The three students."""
    torch.manual_seed(0)
    quantised = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in quantised.parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(dim=1, keepdim=True) / (2 ** (BITS - 1) - 1)
                parameter.copy_((parameter / scale).round() * scale)
    shorter = copy.deepcopy(teacher)
    shorter.model.layers = torch.nn.ModuleList([shorter.model.layers[layer] for layer in KEPT_LAYERS])
    shorter.config.num_hidden_layers = len(KEPT_LAYERS)
    for index, layer in enumerate(shorter.model.layers):
        layer.self_attn.layer_idx = index
    trained = copy.deepcopy(shorter).train()
    optimiser = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        rows = [texts[number % len(texts)] for number in range(BATCH * step, BATCH * (step + 1))]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        trained(input_ids=batch, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return {f"{BITS} bits": quantised, "3 of 5 layers": shorter, "3 layers, trained": trained.eval()}


def manifest_of(vocabulary: int) -> Manifest:
    """Of a dump with the default settings."""
    parameters = PositionsParameters(SELECTION, QUANTISATION_STEP, tail_entropy=True)
    return Manifest("study", {"positions": parameters.to_record()}, {"vocabulary_size": vocabulary}, {}, {}, {}, {})


def read_story(number: int, tokens: Tensor, logits: Tensor, seeds: int, manifest: Manifest) -> Story:
    """Ask a teacher's logits (N + 1, V) of N + 1 tokens what a dump keeps of them."""
    kind, length, vocabulary = KINDS["positions"], len(tokens), logits.shape[1]
    keys = pa.table({"sequence_id": np.zeros(length - 1, np.int64), "position": np.arange(1, length, dtype=np.int32)})
    text = {"token_id": tokens[1:].numpy().astype(np.uint32)}
    text |= dict.fromkeys(("is_target", "has_knowledge"), np.ones(length - 1, bool))
    exact, rounded = [], []
    stored: dict[str, np.ndarray] = {}
    for seed in range(seeds):
        begin = torch.from_numpy(starts(number, length, seed))[1:]
        said = knowledge_of(logits[:-1].clone(), tokens[1:], SELECTION, begin, entropy=True)
        arrays = {name: values.numpy() for name, values in said.items()}
        if not stored:  # but for the draws, what is kept is the same for all seeds
            stored = kind.decode(kind.unpack(kind.pack(keys, {**arrays, **text}, manifest), manifest), manifest)
        drawn = {**stored, "tail_ids": arrays["tail_ids"]}
        rounded.append(_targets(drawn, vocabulary))
        exact.append(_targets({name: arrays.get(name, values) for name, values in drawn.items()}, vocabulary))
    return Story(tokens, torch.log_softmax(logits[:-1].double(), dim=1), exact, rounded)


def _targets(arrays: dict[str, np.ndarray], vocabulary: int) -> Targets:
    """Arrays of positions from the second on as targets."""
    batch = {name: torch.from_numpy(np.concatenate([values[:1], values]))[None] for name, values in arrays.items()}
    return targets_of(batch, vocabulary)


def expected(story: Story, student: Tensor) -> Tensor:
    """The estimate of a rounded store on average over the draws, (N,), of a student's log-probabilities (N, V), float64."""
    targets = story.rounded[0]
    assert targets.tail_mean_logprob is not None
    kept = targets.candidate_logprobs.double()
    candidates = (kept.exp() * (kept - student.gather(1, targets.candidate_ids))).sum(dim=1)
    tail = story.logprobs.exp().scatter(1, targets.candidate_ids, 0)
    return candidates + (tail * (targets.tail_mean_logprob.double()[:, None] - student)).sum(dim=1)


def measured(stories: list[Story], model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Sums over the positions of each of G stories: exact, expected (G,), without and with (rounding) (G, seeds), and their
    `variance` (G,) over independent draws."""
    sums: dict[str, list[Any]] = {name: [] for name in ("exact", "expected", "without", "with", "variance")}
    for story in stories:
        with torch.no_grad():
            logits = model(input_ids=story.tokens[None]).logits[0, :-1]
        student = torch.log_softmax(logits.double(), dim=1)
        sums["exact"].append(float((story.logprobs.exp() * (story.logprobs - student)).sum()))
        sums["expected"].append(float(expected(story, student).sum()))
        sums["without"].append([float(full_kl(logits, targets).estimate.double().sum()) for targets in story.exact])
        found = [full_kl(logits, targets) for targets in story.rounded]
        sums["with"].append([float(each.estimate.double().sum()) for each in found])
        sums["variance"].append(float(np.mean([float(each.draw_variance.double().sum()) for each in found])))
    return {name: np.array(values) for name, values in sums.items()}


def over_seeds(differences: np.ndarray) -> dict[str, float]:
    """Mean and its standard error over the seeds, (seeds,)."""
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    mean = float(differences.mean())
    return {"mean": mean, "standard_error": error, "in_standard_errors": mean / error}


def coverage(sums: dict[str, np.ndarray], sizes: np.ndarray, sets: int, stories: int) -> dict[str, float]:
    """How many of the intervals of `sets` sets of so many stories hold the exact mean of all."""
    random = np.random.default_rng(0)
    truth, total = sums["exact"].sum() / sizes.sum(), len(sizes)
    inside = {"bootstrap": 0, "standard_error": 0}
    for number in range(sets):
        chosen, seeds = random.integers(0, total, stories), random.integers(0, sums["with"].shape[1], stories)
        values, counts = sums["with"][chosen, seeds], sizes[chosen]
        low, high = bootstrap(values[:, None], counts, mean_of_sums, seed=number)
        inside["bootstrap"] += low <= truth <= high
        error = standard_error(values, counts) or np.nan
        inside["standard_error"] += abs(values.sum() / counts.sum() - truth) <= NORMAL * error
    return {name: count / sets for name, count in inside.items()}


def texts_of(path: Path, tokenizer: Any, count: int) -> Iterator[Tensor]:
    """The stories as token ids."""
    for text in json.loads(path.read_text())[:count]:
        yield torch.tensor(tokenizer(text)["input_ids"][:MAX_LENGTH])


def main() -> None:
    """Read, measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--stories", required=True, type=Path)
    parser.add_argument("--count", type=int, default=400, help="stories that are measured; the students learn from the others")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--set-size", type=int, default=60)
    arguments = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    tokens = list(texts_of(arguments.stories, AutoTokenizer.from_pretrained(arguments.teacher), 10**9))
    held_out, others = tokens[: arguments.count], tokens[arguments.count :]
    models = {**students(teacher, others), "the teacher": teacher}
    manifest = manifest_of(teacher.config.vocab_size)
    stories = []
    with progress_bar("reading", len(held_out), "stories") as advance:
        for number, ids in enumerate(held_out):
            with torch.no_grad():
                logits = teacher(input_ids=ids[None]).logits[0]
            stories.append(read_story(number, ids, logits, arguments.seeds, manifest))
            advance(1)
    sizes = np.array([len(story.logprobs) for story in stories], np.float64)
    floor = float(sum(float(rounding_floor(story.rounded[0], QUANTISATION_STEP).sum()) for story in stories) / sizes.sum())
    entropy = -float(sum(float((story.logprobs.exp() * story.logprobs).sum()) for story in stories) / sizes.sum())
    rows: dict[str, Any] = {}
    for name, model in models.items():
        sums = measured(stories, model)
        exact = sums["exact"].sum() / sizes.sum()
        bias = sums["expected"] - sums["exact"]
        without, rounded = ((sums[key].sum(axis=0) - sums["exact"].sum()) / sizes.sum() for key in ("without", "with"))
        rows[name] = {
            "exact": float(exact),
            "without_rounding": over_seeds(without),
            "with_rounding": over_seeds(rounded),
            "bias_of_rounding": float(bias.sum() / sizes.sum()),
            "bias_standard_error": standard_error(bias, sizes),
            "deviation_over_draws": float(without.std(ddof=1)),
            "deviation_as_printed": float(np.sqrt(sums["variance"].sum()) / sizes.sum()),
            "coverage": coverage(sums, sizes, arguments.sets, arguments.set_size),
        }
    figures = {
        "selection": str(SELECTION),
        "stories": len(stories),
        "positions": int(sizes.sum()),
        "seeds": arguments.seeds,
        "set_size": arguments.set_size,
        "sets": arguments.sets,
        "teacher_entropy": entropy,
        "floor": floor,
        "students": rows,
    }
    keep("full_kl", figures, STUDIES)


if __name__ == "__main__":
    main()
