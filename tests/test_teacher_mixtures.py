"""The loss of several teachers: the sum over them by their weights, and for forward KL the gradient of their mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model

from knowledge_store.kinds.positions.selection import Selection
from student_train.losses.divergences import forward_kl, jensen_shannon
from student_train.losses.sliced import sliced_loss
from student_train.losses.step import step_loss
from student_train.losses.table import LOSSES
from student_train.losses.targets import select_targets
from student_train.losses.teachers import teachers_of
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.sampling import starts

VOCABULARY, ROWS, LENGTH = 61, 12, 30
WEIGHTS = (0.7, 0.3)
SELECTIONS = (Selection("top-k", 5, 0.05), Selection.threshold(0.1))


@pytest.fixture(scope="module")
def student():
    return make_model(VOCABULARY, layers=1, seed=3)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Of two teachers that disagree, (2, B, T, V)."""
    return np.random.default_rng(1).normal(0, 3, (2, ROWS, LENGTH, VOCABULARY))


def batch_of(logits: np.ndarray, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a reader gives of dumps whose draws have this seed: the arrays of the second teacher are `1/…`."""
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, (ROWS, LENGTH)))
    is_target = torch.arange(LENGTH).expand(ROWS, LENGTH) > 2
    batch = {
        "sequence_id": torch.arange(ROWS),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "is_target": is_target,
        "teacher_weights": torch.tensor(WEIGHTS, dtype=torch.float64).expand(ROWS, 2),
    }
    for teacher, selection in enumerate(SELECTIONS):
        begin = torch.from_numpy(np.concatenate([starts(row, LENGTH, 2 * seed + teacher) for row in range(ROWS)]))
        predictions = torch.from_numpy(logits[teacher]).float().flatten(0, 1)
        kept = knowledge_of(predictions, tokens.flatten(), selection, begin)
        kept["draw_weight"] = torch.full((ROWS * LENGTH,), selection.draw_weight)
        prefix = f"{teacher}/" if teacher else ""
        batch |= {f"{prefix}{name}": array.unflatten(0, (ROWS, LENGTH)) for name, array in kept.items()}
    return batch


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def test_the_gradient_is_that_of_the_mixture(student, logits):
    """Mean over 40 seeds of draws, against the full divergence from the mixture over the whole vocabulary in float64."""
    exact = make_model(VOCABULARY, layers=1, seed=3).double()
    batch = batch_of(logits)
    counts = batch["is_target"][:, 1:]
    mixture = sum(weight * torch.softmax(torch.from_numpy(of), -1) for weight, of in zip(WEIGHTS, logits, strict=True))
    teacher = mixture[:, 1:][counts]
    predicted = torch.log_softmax(exact(batch["input_ids"]).logits[:, :-1][counts], -1)
    full = (teacher * (teacher.log() - predicted)).sum(-1).mean()
    expected = gradients(exact, full)

    estimates = [sliced_loss(student, batch_of(logits, seed), forward_kl) for seed in range(40)]
    mean = torch.stack([gradients(student, estimate) for estimate in estimates]).mean(0).double()
    assert (mean - expected).norm() < 0.03 * expected.norm()
    # One teacher alone, or the tail as a bucket, does not pass for it.
    for other in (
        sliced_loss(student, teachers_of(batch)[0], forward_kl),
        sliced_loss(student, batch, forward_kl, tail="bucket"),
    ):
        assert (gradients(student, other).double() - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["forward-kl", "jensen-shannon", "first"])
def test_every_way_to_compute_it_is_the_weighted_sum(student, logits, name):
    batch, loss = batch_of(logits), LOSSES[name]
    outputs = student(batch["input_ids"])
    expected = 0.3 * step_loss(LOSSES["ce"], [outputs], teachers_of(batch)[0], {"target": 324})
    for weight, knowledge in zip(WEIGHTS, teachers_of(batch), strict=True):
        values = loss.function(*select_targets(outputs.logits, knowledge))
        expected = expected + 0.7 * weight * values.sum() / 324
    whole = step_loss(loss, [outputs], batch, {"target": 324}, ce_weight=0.3)
    assert torch.allclose(whole, expected, rtol=1e-5)
    alone = sum(
        weight * sliced_loss(student, knowledge, loss.function)
        for weight, knowledge in zip(WEIGHTS, teachers_of(batch), strict=True)
    )
    assert torch.allclose(sliced_loss(student, batch, loss.function), alone, rtol=1e-5)


def test_a_row_has_weights_of_its_own(student, logits):
    batch = batch_of(logits)
    batch["teacher_weights"] = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * (ROWS - 1))
    one, other = teachers_of(batch)
    expected = sum(
        sliced_loss(student, {name: array[rows] for name, array in knowledge.items()}, jensen_shannon, count=324)
        for knowledge, rows in ((one, slice(0, 1)), (other, slice(1, ROWS)))
    )
    assert torch.allclose(sliced_loss(student, batch, jensen_shannon), expected, rtol=1e-5)


def test_several_teachers_are_not_taken_for_one(student, logits):
    batch = batch_of(logits)
    with pytest.raises(ValueError, match="this batch has several teachers"):
        select_targets(torch.zeros(ROWS, LENGTH, VOCABULARY), batch)
    [alone] = teachers_of({name: array for name, array in batch.items() if name != "teacher_weights"})
    assert alone.keys() == batch.keys() - {"teacher_weights"}


def test_what_a_teacher_does_not_keep_is_taken_of_none(student, logits):
    """One teacher's draws stand for its own tail, and not for another's."""
    batch = batch_of(logits)
    without = {name: array for name, array in batch.items() if name not in ("1/tail_ids", "1/draw_weight")}
    assert all("tail_ids" not in knowledge and "candidate_ids" in knowledge for knowledge in teachers_of(without))
    bucket = sliced_loss(student, batch, forward_kl, tail="bucket")
    assert torch.allclose(sliced_loss(student, without, forward_kl), bucket, rtol=1e-6)
