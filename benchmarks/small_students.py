"""What studies of small students share: a student of three of a small teacher's layers, its schedule, and how it is judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from knowledge_store.calibration.expected_calibration_error import expected_calibration_error

MAX_LENGTH = 128
KEPT_LAYERS = (0, 1, 4)
INITIAL_DEVIATION = 0.05  # of random weights: the usual 0.02 starts slowly at a width of 64
WARMUP = 0.05
HELD_OUT = 60  # stories
JUDGED_AT_ONCE = 20  # sequences


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A model's logits (B, T, V)."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def cosine(steps: int) -> Callable[[int], float]:
    """The learning rate's share at a step: a short rise, then half a cosine."""
    rise = max(1, round(WARMUP * steps))
    return lambda step: min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def write_atomically(path: Path, value: dict[str, Any]) -> None:
    """JSON that is all there or not there."""
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").replace(path)


def write_texts(stories: Path, work: Path) -> tuple[Path, list[str]]:
    """Divide a JSON list of texts: a corpus file of all but the first HELD_OUT, and those."""
    texts = json.loads(stories.read_text())
    corpus = work / "train.jsonl"
    if not corpus.exists():
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[HELD_OUT:]))
    return corpus, texts[:HELD_OUT]


def three_layers(teacher: Any, seed: int, cut: bool) -> LlamaForCausalLM:
    """A student of three layers: of random weights, or cut out of the teacher."""
    torch.manual_seed(seed)
    changes = {"num_hidden_layers": len(KEPT_LAYERS), "initializer_range": INITIAL_DEVIATION}
    model = LlamaForCausalLM(type(teacher.config)(**{**teacher.config.to_dict(), **changes}))
    if cut:
        model.load_state_dict(teacher.state_dict(), strict=False)
        for layer, kept in zip(model.model.layers, KEPT_LAYERS, strict=True):
            layer.load_state_dict(teacher.model.layers[kept].state_dict())
    return model


class Judge:
    """Held-out text, with the teacher's whole distributions there.

    Args:
        teacher: the model.
        tokenizer: its own.
        texts: each is cut into sequences of MAX_LENGTH tokens.
        most: sequences; None for all.
    """

    def __init__(self, teacher: Any, tokenizer: Any, texts: Iterable[str], most: int | None = None):
        tokens = [tokenizer(text)["input_ids"] for text in texts]
        sequences = [ids[at : at + MAX_LENGTH] for ids in tokens for at in range(0, len(ids), MAX_LENGTH)][:most]
        self._batches: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        for at in range(0, len(sequences), JUDGED_AT_ONCE):
            part = sequences[at : at + JUDGED_AT_ONCE]
            shape = len(part), max(map(len, part))
            batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
            for row, ids in enumerate(part):
                batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
                batch["attention_mask"][row, : len(ids)] = 1
            counts = batch["attention_mask"][:, 1:].bool()
            with torch.no_grad():
                self._batches.append((batch, counts, torch.log_softmax(logits_of(teacher, batch)[:, :-1][counts], dim=-1)))

    def quality(self, model: Any) -> dict[str, float]:
        """NLL and full KL to the teacher (nats per token), ECE of the likeliest token (15 bins), agreement."""
        nll = kl = 0.0
        confidence, correct, agreed = [], [], []
        with torch.no_grad():
            for batch, counts, q in self._batches:
                p = torch.log_softmax(logits_of(model, batch)[:, :-1][counts], dim=-1)
                tokens = batch["input_ids"][:, 1:][counts]
                nll -= float(p.gather(1, tokens[:, None]).double().sum())
                kl += float((q.exp() * (q - p)).sum(dim=-1).double().sum())
                best, choice = p.max(dim=-1)
                confidence.append(best.exp().numpy())
                correct.append((choice == tokens).numpy())
                agreed.append((choice == q.argmax(dim=-1)).numpy())
        sure, right = np.concatenate(confidence), np.concatenate(correct)
        return {
            "nll": nll / len(sure),
            "kl": kl / len(sure),
            "ece": expected_calibration_error(sure, right, 15),
            "agreement": float(np.concatenate(agreed).mean()),
        }
