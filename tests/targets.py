"""What a store would keep of a teacher's logits, in float64, and the plain ways to compare: for tests of the losses."""

from __future__ import annotations

import numpy as np
import torch

from student_train.losses.targets import Targets, select_targets

VOCABULARY = 23


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def kept(teacher_logits: np.ndarray, k: int, token_ids: np.ndarray | None = None) -> Targets:
    """What a store keeps of a teacher's logits (N, V)."""
    logprobs = log_softmax(teacher_logits)
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(np.take_along_axis(logprobs, order[:, k:], axis=-1)).sum(axis=-1))
    tokens = order[:, -1] if token_ids is None else token_ids
    return Targets(
        token_ids=torch.from_numpy(tokens.copy()),
        token_logprob=torch.from_numpy(np.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]),
        candidate_ids=torch.from_numpy(order[:, :k].copy()),
        candidate_logprobs=torch.from_numpy(np.take_along_axis(logprobs, order[:, :k], axis=-1)),
        tail_logprob=torch.from_numpy(tail),
    )


def random_case(seed: int, rows: int = 6, vocabulary: int = VOCABULARY, k: int = 5, scale: float = 3.0):
    """A student's and a teacher's logits (N, V), and what is kept of the teacher's."""
    generator = np.random.default_rng(seed)
    teacher = generator.normal(size=(rows, vocabulary)) * scale
    student = generator.normal(size=(rows, vocabulary)) * scale
    return student, teacher, kept(teacher, k, generator.integers(0, vocabulary, rows))


def drawn(targets: Targets, ids: np.ndarray, weight: float, rows: int = VOCABULARY) -> Targets:
    """The same targets with these draws (N, M) from the tail (−1: none) of this weight, for a student with so many rows:
    through `select_targets`."""

    def second(column: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(column), column], dim=1)

    batch = {
        "is_target": torch.tensor([[False, True]]).expand(len(targets.token_ids), 2),
        "input_ids": second(targets.token_ids),
        **{name: second(getattr(targets, name)) for name in Targets._fields[1:5]},
        "tail_ids": second(torch.from_numpy(ids)),
        "draw_weight": second(torch.full((len(ids),), weight, dtype=torch.float64)),
    }
    return select_targets(torch.zeros(len(targets.token_ids), 2, rows), batch)[1]


def random_draws(targets: Targets, seed: int, weight: float = 0.07) -> Targets:
    """The same targets with tokens outside the candidates drawn: none, one, two, or one of two twice."""
    generator = np.random.default_rng(seed)
    outside = [np.setdiff1d(np.arange(VOCABULARY), row) for row in targets.candidate_ids.numpy()]
    ids = np.stack([generator.choice(each, 2, replace=False) for each in outside])
    counts = np.arange(len(ids))[:, None] % 4
    return drawn(targets, np.where(counts > [0, 1, 2], ids[:, [0, 1, 1]], -1), weight)


def in_float32(targets: Targets) -> Targets:
    """As a store's reader hands them over."""
    return Targets(*(each.float() if each is not None and each.is_floating_point() else each for each in targets))


def kl(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    possible = q > 0
    return np.where(possible, q * (np.log(np.where(possible, q, 1)) - np.log(np.where(possible, p, 1))), 0).sum(axis=-1)


def adaptive_share(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """How much of Σ|q − p| lies on the fewest likeliest symbols on which q reaches ½ (all but the last may be one)."""
    shares = []
    for one, other in zip(q, p, strict=True):
        head, mass = [], 0.0
        for symbol in np.argsort(-one[:-1], kind="stable"):
            if mass >= 0.5:
                break
            head.append(symbol)
            mass += one[symbol]
        shares.append(np.abs(one - other)[head].sum() / np.abs(one - other).sum())
    return np.array(shares)


def divergence(name: str, q: np.ndarray, p: np.ndarray, beta: float = 0.5, skew: float = 0.1) -> np.ndarray:
    """Of two arrays of distributions, from its definition."""
    middle = beta * q + (1 - beta) * p
    share = adaptive_share(q, p) if name == "adaptive-kl" else 0
    return {
        "forward-kl": lambda: kl(q, p),
        "reverse-kl": lambda: kl(p, q),
        "jensen-shannon": lambda: beta * kl(q, middle) + (1 - beta) * kl(p, middle),
        "total-variation": lambda: 0.5 * np.abs(q - p).sum(axis=-1),
        "skewed-kl": lambda: kl(q, skew * q + (1 - skew) * p),
        "skewed-reverse-kl": lambda: kl(p, (1 - skew) * q + skew * p),
        "adaptive-kl": lambda: share * kl(q, p) + (1 - share) * kl(p, q),
    }[name]()
