"""Which selection and loss bring a student closest to its teacher: measured where full distillation can be afforded.

    python -m benchmarks.studies.fidelity --teacher stories260K --stories stories.json

A small real teacher (vocabulary 512), a student of three layers, and targets from real dumps, one for each selection. Every
method sees the same sequences in the same order from the same weights, for each of several seeds; `full` asks the teacher at
every step for its whole distribution. Three experiments:

* `fine-tuned`: going on from a student that keeps three of the teacher's five layers and has learnt the text by cross-entropy.
* `epochs`: from such a student before it has learnt anything, over a small part of the text many times. Draws come out of a
  store the same in each epoch; `fresh` methods draw again at every step, which no store can.
* `random`: from random weights.

and, on one student, the gradient of every loss against that of full distillation: the angle between them on a batch, and the
variance over the draws. Finished runs are kept in the work folder, and skipped when it is called again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.measurement import STUDIES, keep
from knowledge_store import KnowledgeStore
from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from knowledge_store.kinds.positions.selection import Selection
from student_train.losses.divergences import cross_entropy
from student_train.losses.table import LOSSES
from student_train.losses.targets import Targets, select_targets
from student_train.training.dataset import DistillationDataset
from teacher_dump.configuration import DumpConfig
from teacher_dump.dumping.run import dump
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.sampling import independent_points, systematic_points

MAX_LENGTH = 128
BATCH_SIZE = 4
KEPT_LAYERS = (0, 1, 4)
LEARNING_RATE = {"fine-tuned": 2e-3, "epochs": 2e-3, "random": 5e-3}
INITIAL_DEVIATION = 0.05  # of random weights: the usual 0.02 starts slowly at a width of 64
WARMUP = 0.05
HELD_OUT_STORIES = 60
EPOCHS_SEQUENCES = 150
REDRAWS = 24

SELECTIONS = {
    **{f"top-5-{m}": Selection("top-k", 5, m) for m in (1, 2, 4, 8)},
    **{f"rs-{n}": Selection("random-sampling", 0, n) for n in (6, 22)},
    "top-9": Selection("top-k", 9),
}
# Only drawn again from the teacher, to see how the gradient varies with the number of ids; never dumped.
ONLY_REDRAWN = {f"rs-{n}": Selection("random-sampling", 0, n) for n in (60, 120)}


@dataclass(frozen=True)
class Method:
    """A way to make a student: a loss of the project (or `full`), the selection it reads, and the loss's options."""

    loss: str
    selection: str = "top-5-1"
    options: tuple[tuple[str, Any], ...] = ()
    fresh: bool = False


METHODS = {
    "cross-entropy": Method("ce"),
    "FIRST (c = 0.28)": Method("first"),
    "FIRST, not re-calibrated": Method("conditional-kl"),
    "naive top-5": Method("top-k-renormalised"),
    "top-5 + bucket": Method("forward-kl", options=(("tail", "bucket"),)),
    "top-9 + bucket": Method("forward-kl", "top-9", (("tail", "bucket"),)),  # as many ids as top-5 + 4 draws at most
    "top-5 + residual to gold": Method("residual-to-gold"),
    "random sampling, 6 draws": Method("forward-kl", "rs-6"),
    "random sampling, 22 draws": Method("forward-kl", "rs-22"),
    **{f"top-5 + {m} tail draw{'s' * (m > 1)}": Method("forward-kl", f"top-5-{m}", (("tail", "draws"),)) for m in (1, 2, 4, 8)},
    "full": Method("full"),
}
EPOCHS_METHODS = {
    **{name: METHODS[name] for name in ("cross-entropy", "top-5 + bucket", "random sampling, 22 draws", "full")},
    **{name: METHODS[name] for name in ("top-5 + 1 tail draw", "top-5 + 4 tail draws", "top-5 + 8 tail draws")},
    "top-5 + 1 fresh draw": Method("forward-kl", "top-5-1", (("tail", "draws"),), fresh=True),
}


class Laboratory:
    """The teacher, the dumps, and everything that a run needs.

    Args:
        teacher: its folder.
        stories: a JSON list of texts; the first HELD_OUT_STORIES are held out.
        work: where dumps and finished runs are kept.
        selections: what is kept, by the name of the dump of the other stories.
    """

    def __init__(self, teacher: str, stories: Path, work: Path, selections: Mapping[str, Selection] = SELECTIONS):
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        texts = json.loads(stories.read_text())
        parts = {"train": texts[HELD_OUT_STORIES:], "heldout": texts[:HELD_OUT_STORIES]}
        for name, chosen in parts.items():
            if not (work / f"{name}.jsonl").exists():
                (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        for name, selection in selections.items():
            options: dict[str, Any] = {"draws": selection.draws}
            if selection.candidates:
                options = {"top_k": selection.candidates, "tail_draws": selection.draws}
            corpus = (work / "train.jsonl",)
            dump(DumpConfig(teacher, corpus, work / "store", name, selection=selection.name, max_length=MAX_LENGTH, **options))
        dump(DumpConfig(teacher, (work / "heldout.jsonl",), work / "store", "heldout", max_length=MAX_LENGTH, tail_draws=0))
        self.store = KnowledgeStore.open(work / "store")
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval().requires_grad_(False)
        self._held_out = list(self.batches("heldout", 0, epochs=1, shuffle=False))

    def batches(
        self, dump_name: str, seed: int, ordinals: np.ndarray | None = None, epochs: int | None = None, shuffle: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of a dump as the trainer reads them; without end unless `epochs` is 1."""
        return iter(
            DistillationDataset(
                self.store,
                dump_name,
                batch_size=BATCH_SIZE,
                seed=seed,
                ordinals=ordinals,
                shuffle=shuffle,
                endless=epochs is None,
            )
        )

    def student(self, experiment: str, seed: int, steps: int) -> LlamaForCausalLM:
        """A student of three layers, as the experiment starts with it."""
        torch.manual_seed(seed)
        changes = {"num_hidden_layers": len(KEPT_LAYERS), "initializer_range": INITIAL_DEVIATION}
        model = LlamaForCausalLM(type(self.teacher.config)(**{**self.teacher.config.to_dict(), **changes}))
        if experiment != "random":
            model.load_state_dict(self.teacher.state_dict(), strict=False)
            for layer, kept in zip(model.model.layers, KEPT_LAYERS, strict=True):
                layer.load_state_dict(self.teacher.model.layers[kept].state_dict())
        if experiment == "fine-tuned":
            weights = self.work / "runs" / f"start-{steps}-{seed}.pt"
            if not weights.exists():
                # Another order than the one that the methods will see.
                self.train(model, "fine-tuned", METHODS["cross-entropy"], seed + 100, steps)
                torch.save(model.state_dict(), weights)
            model.load_state_dict(torch.load(weights, weights_only=True))
        return model

    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's logits at the predicting positions, in the order of `select_targets`."""
        with torch.no_grad():
            return select_targets(logits_of(self.teacher, batch), batch)[0]

    def redrawn(self, batch: dict[str, Tensor], targets: Targets, selection: Selection, key: int) -> Targets:
        """The same targets with draws that no other key makes."""
        logits = self.teacher_logits(batch)
        points = systematic_points if selection.candidates else independent_points
        at = torch.from_numpy(points(key, len(logits), selection.draws))
        found = knowledge_of(logits, targets.token_ids, selection, at)
        share = found["tail_counts"] / found["tail_counts"].sum(dim=1, keepdim=True).clamp(min=1)
        return targets._replace(
            candidate_ids=found["candidate_ids"],
            candidate_logprobs=found["candidate_logprobs"],
            tail_logprob=found["tail_logprob"],
            draw_ids=found["tail_ids"],
            draw_weights=(found["tail_logprob"].exp()[:, None] * share).float(),
        )

    def ids(self, batch: dict[str, Tensor], selection: Selection) -> float:
        """Different tokens kept at a position, on average, when drawn again."""
        _, targets = select_targets(torch.empty(*batch["input_ids"].shape, self.teacher.config.vocab_size), batch)
        weights = self.redrawn(batch, targets, selection, 0).draw_weights
        assert weights is not None
        return selection.candidates + float(torch.count_nonzero(weights, dim=1).double().mean())

    def loss(self, method: Method, model: LlamaForCausalLM, batch: dict[str, Tensor], key: int = 0) -> Tensor:
        """The mean loss of a batch, in nats per target."""
        logits, targets = select_targets(logits_of(model, batch), batch)
        if method.loss == "full":
            q = torch.log_softmax(self.teacher_logits(batch), dim=-1)
            return (q.exp() * (q - torch.log_softmax(logits, dim=-1))).sum(dim=-1).mean()
        if method.fresh:
            targets = self.redrawn(batch, targets, {**SELECTIONS, **ONLY_REDRAWN}[method.selection], key)
        return LOSSES[method.loss].function(logits, targets, **dict(method.options)).mean()

    def quality(self, model: LlamaForCausalLM) -> dict[str, float]:
        """Held-out NLL and full KL to the teacher (nats per token), ECE of the likeliest token (15 bins), agreement."""
        sums = {"nll": 0.0, "kl": 0.0}
        confidence, correct, agreed = [], [], []
        with torch.no_grad():
            for batch in self._held_out:
                logits, targets = select_targets(logits_of(model, batch), batch)
                q = torch.log_softmax(self.teacher_logits(batch).double(), dim=-1)
                p = torch.log_softmax(logits.double(), dim=-1)
                sums["nll"] += float(cross_entropy(logits, targets).double().sum())
                sums["kl"] += float((q.exp() * (q - p)).sum())
                best, choice = p.max(dim=-1)
                confidence.append(best.exp().numpy())
                correct.append((choice == targets.token_ids).numpy())
                agreed.append((choice == q.argmax(dim=-1)).numpy())
        sure, right = np.concatenate(confidence), np.concatenate(correct)
        return {
            **{name: value / len(sure) for name, value in sums.items()},
            "ece": expected_calibration_error(sure, right, 15),
            "agreement": float(np.concatenate(agreed).mean()),
        }

    def train(self, model: LlamaForCausalLM, experiment: str, method: Method, seed: int, steps: int) -> None:
        """Train a student in place, with AdamW and a cosine of the learning rate."""
        ordinals = np.arange(EPOCHS_SEQUENCES) if experiment == "epochs" else None
        stream = self.batches(method.selection, seed, ordinals)
        optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[experiment], weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(steps))
        for step in range(steps):
            loss = self.loss(method, model, next(stream), key=1 + step + seed * steps)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()

    def run(self, experiment: str, name: str, method: Method, seed: int, steps: int) -> dict[str, Any]:
        """Train a student and measure it, or take the result of a finished run."""
        result = self.work / "runs" / f"{experiment}-{steps}" / f"{name.replace(' ', '_')}-{seed}.json"
        if result.exists():
            return dict(json.loads(result.read_text()))
        result.parent.mkdir(parents=True, exist_ok=True)
        model = self.student(experiment, seed, steps)
        began = time.monotonic()
        self.train(model, experiment, method, seed, steps)
        figures = {"seconds": round(time.monotonic() - began, 1), **self.quality(model.eval())}
        write_atomically(result, figures)
        print(f"{experiment:<11} {name:<32} seed {seed}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
        return figures

    def gradients(self, steps: int, batches: int = 4) -> dict[str, Any]:
        """For each loss, on the fine-tuned student of seed 0: the angle to the gradient of full distillation on one batch,
        and the variance of the gradient over the draws, relative to the full gradient's squared norm."""
        result = self.work / "runs" / f"gradients-{steps}.json"
        if result.exists():
            return dict(json.loads(result.read_text()))
        model = self.student("fine-tuned", 0, steps)

        def gradient(method: Method, batch: dict[str, Tensor], key: int = 0) -> Tensor:
            model.zero_grad()
            self.loss(method, model, batch, key).backward()
            return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

        others = {f"loss {name}": Method(name) for name in LOSSES if name not in ("ce", "forward-kl")}
        others |= {f"random sampling, {n} draws": Method("forward-kl", f"rs-{n}", fresh=True) for n in (60, 120)}
        found: dict[str, Any] = {}
        for name, method in {**METHODS, **others}.items():
            angles, variances, stored = [], [], []
            dumped = method.selection if method.selection in SELECTIONS else "top-5-1"
            for key, (batch, reference) in enumerate(
                zip(self.take(dumped, batches), self.take("top-5-1", batches), strict=True)
            ):
                full = gradient(METHODS["full"], reference)
                cosine = float(torch.cosine_similarity(gradient(method, batch, REDRAWS + key), full, dim=0))
                angles.append(math.degrees(math.acos(min(cosine, 1.0))))
                selection = {**SELECTIONS, **ONLY_REDRAWN}[method.selection]
                if method.loss == "forward-kl" and dict(method.options).get("tail") != "bucket":
                    fresh = replace(method, fresh=True)
                    drawn = torch.stack([gradient(fresh, batch, key) for key in range(REDRAWS)])
                    variances.append(float(drawn.var(dim=0).sum() / full.square().sum()))
                    stored.append(self.ids(batch, selection))
            found[name] = {
                "angle": float(np.mean(angles)),
                "angle_spread": float(np.std(angles)),
                "variance": float(np.mean(variances)) if variances else None,
                "ids": float(np.mean(stored)) if stored else None,
            }
            print(f"gradient    {name:<32} {found[name]}", flush=True)
        write_atomically(result, found)
        return found

    def take(self, dump_name: str, count: int) -> list[dict[str, Tensor]]:
        """The first batches of a dump, in the order of seed 0."""
        stream = self.batches(dump_name, 0)
        return [next(stream) for _ in range(count)]


def write_atomically(path: Path, value: dict[str, Any]) -> None:
    """JSON that is all there or not there."""
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").replace(path)


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A model's logits (B, T, V)."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def cosine(steps: int) -> Callable[[int], float]:
    """The learning rate's share at a step: a short rise, then half a cosine."""
    rise = max(1, round(WARMUP * steps))
    return lambda step: min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and how far of the way from cross-entropy to full distillation, in KL."""
    ce = np.array([run["kl"] for run in runs["cross-entropy"]])
    full = np.array([run["kl"] for run in runs["full"]])
    found = {}
    for name, each in runs.items():
        way = (ce - np.array([run["kl"] for run in each])) / (ce - full)
        found[name] = {
            metric: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
            for metric in ("nll", "kl", "ece", "agreement")
            for values in [[run[metric] for run in each]]
        } | {"way": {"mean": float(way.mean()), "sd": float(way.std(ddof=1)) if len(way) > 1 else None}}
    return found


def print_tables(figures: dict[str, Any]) -> None:
    """The figures of each experiment in Markdown: mean ± standard deviation over seeds, and what the gradients say."""
    gradients = figures["gradients"]
    for experiment in LEARNING_RATE:
        print(f"\n{experiment}, {len(figures['seeds'])} seeds")
        print("| target | NLL | KL to the teacher | of the way CE → full | ECE, 15 bins | gradient angle | variance |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, row in figures[experiment]["methods"].items():
            nll, kl, ece, way = ((row[metric]["mean"], row[metric]["sd"] or 0.0) for metric in ("nll", "kl", "ece", "way"))
            angle, variance = (gradients.get(name, {}).get(metric) for metric in ("angle", "variance"))
            print(
                f"| {name} | {nll[0]:.3f} ± {nll[1]:.3f} | {kl[0]:.4f} ± {kl[1]:.4f} | {way[0]:.1%} ± {way[1]:.1%}"
                f" | {ece[0]:.2%} ± {ece[1]:.2%} | {'' if angle is None else f'{angle:.1f}°'}"
                f" | {'' if variance is None else f'{variance:.3f}'} |"
            )
    print("\n| loss | gradient angle | ids | variance |\n| --- | --- | --- | --- |")
    for name, row in gradients.items():
        ids, variance = (row[metric] for metric in ("ids", "variance"))
        rest = " | " if ids is None else f"{ids:.2f} | {variance:.3f}"
        print(f"| {name} | {row['angle']:.1f}° ± {row['angle_spread']:.1f}° | {rest} |")


def draw_picture(figures: dict[str, Any], path: Path) -> None:
    """KL to the teacher by method, for each experiment: every seed a dot."""
    import matplotlib.pyplot as plt

    titles = {"fine-tuned": "from a fine-tuned student", "epochs": "many epochs", "random": "from random weights"}
    experiments = [name for name in ("fine-tuned", "epochs", "random") if name in figures]
    chart, axes = plt.subplots(1, len(experiments), figsize=(5.2 * len(experiments), 4.6), layout="constrained")
    for axis, experiment in zip(np.atleast_1d(axes), experiments, strict=True):
        table = figures[experiment]["methods"]
        names = sorted(table, key=lambda name: table[name]["kl"]["mean"])
        values = [table[name]["kl"]["mean"] for name in names]
        spread = [table[name]["kl"]["sd"] or 0 for name in names]
        colours = ["#c1440e" if "tail draw" in name or "fresh draw" in name else "#33658a" for name in names]
        axis.errorbar(values, range(len(names)), xerr=spread, fmt="none", ecolor="#999999", capsize=2)
        axis.scatter(values, range(len(names)), c=colours, zorder=3)
        axis.axvline(table["full"]["kl"]["mean"], color="#bbbbbb", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xscale("log")
        ticks = [tick for tick in (0.45, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5) if min(values) < tick < max(values)]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("KL to the teacher, nats (log scale)")
        axis.set_title(titles[experiment])
    chart.savefig(path)


def main() -> None:
    """Run every experiment that is not done yet, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a small causal language model")
    parser.add_argument("--stories", required=True, type=Path, help="a JSON list of texts")
    parser.add_argument("--work", type=Path, default=Path(".fidelity"), help="where dumps and finished runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    laboratory = Laboratory(arguments.teacher, arguments.stories, arguments.work)
    seeds, steps = range(arguments.seeds), arguments.steps
    sequences = {name: laboratory.store.sequences(name).num_rows for name in ("top-5-1", "heldout")}
    figures: dict[str, Any] = {
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "seeds": list(seeds),
        "sequences": sequences,
        "positions": {row.dump: row.positions for row in laboratory.store.info()},
        "passes": {"all": steps * BATCH_SIZE / sequences["top-5-1"], "epochs": steps * BATCH_SIZE / EPOCHS_SEQUENCES},
        "learning_rate": LEARNING_RATE,
    }
    figures["teacher"] = laboratory.quality(laboratory.teacher)
    for experiment, methods in (("fine-tuned", METHODS), ("epochs", EPOCHS_METHODS), ("random", METHODS)):
        runs = {
            name: [laboratory.run(experiment, name, method, seed, steps) for seed in seeds] for name, method in methods.items()
        }
        figures[experiment] = {"methods": summary(runs), "runs": runs}
        figures["gradients"] = laboratory.gradients(steps)
    keep("fidelity", figures, STUDIES)
    draw_picture(figures, STUDIES / "fidelity.svg")
    print_tables(figures)


if __name__ == "__main__":
    main()
