"""Losses against plain float64 numpy, against the full divergence, and at the edges of what floats can hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.losses import (
    LOSSES,
    Loss,
    Targets,
    cross_entropy,
    first,
    forward_kl,
    select_targets,
    step_loss,
    top_k_renormalised,
    units,
)

PER_POSITION = [forward_kl, first, top_k_renormalised, cross_entropy]


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def kept(teacher_logits: np.ndarray, k: int, token_ids: np.ndarray | None = None) -> Targets:
    """What a store keeps of a teacher's logits (N, V), in float64."""
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


def random_case(seed: int, rows: int = 6, vocabulary: int = 23, k: int = 5, scale: float = 3.0):
    generator = np.random.default_rng(seed)
    teacher = generator.normal(size=(rows, vocabulary)) * scale
    student = generator.normal(size=(rows, vocabulary)) * scale
    return student, teacher, kept(teacher, k, generator.integers(0, vocabulary, rows))


def kl(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    possible = q > 0
    return np.where(possible, q * (np.log(np.where(possible, q, 1)) - np.log(np.where(possible, p, 1))), 0).sum(axis=-1)


def reference(name: str, student: np.ndarray, targets: Targets, option: float) -> np.ndarray:
    """The same loss, written down from its definition with probabilities in float64."""
    p = np.exp(log_softmax(student))
    ids = targets.candidate_ids.numpy()
    q_kept = np.exp(targets.candidate_logprobs.numpy().astype(np.float64))
    p_kept = np.take_along_axis(p, ids, axis=-1)
    if name == "ce":
        return -np.log(np.take_along_axis(p, targets.token_ids.numpy()[:, None], axis=-1)[:, 0])
    if name == "first":
        rescale = lambda values: np.exp(values / option) / np.exp(values / option).sum(axis=-1, keepdims=True)  # noqa: E731
        return kl(rescale(q_kept), rescale(p_kept))
    if name == "top-k-renormalised":
        q = q_kept ** (1 / option)
        tempered = np.exp(log_softmax(student / option))
        return option**2 * kl(q / q.sum(axis=-1, keepdims=True), np.take_along_axis(tempered, ids, axis=-1))
    others = np.ones_like(p)
    np.put_along_axis(others, ids, 0, axis=-1)
    q = np.concatenate([q_kept, np.exp(targets.tail_logprob.numpy())[:, None]], axis=-1) ** (1 / option)
    bucketed = np.concatenate([p_kept, (p * others).sum(axis=-1, keepdims=True)], axis=-1) ** (1 / option)
    return option**2 * kl(q / q.sum(axis=-1, keepdims=True), bucketed / bucketed.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ce", {}),
        ("forward-kl", {}),
        ("forward-kl", {"temperature": 2.0}),
        ("forward-kl", {"temperature": 0.5}),
        ("first", {}),
        ("first", {"c": 0.9}),
        ("top-k-renormalised", {}),
        ("top-k-renormalised", {"temperature": 3.0}),
    ],
)
def test_parity_with_float64_reference(name, options):
    student, _, targets = random_case(1)
    expected = reference(name, student, targets, next(iter(options.values()), 0.28 if name == "first" else 1.0))
    found = LOSSES[name].function(torch.from_numpy(student), targets, **options)
    assert found.shape == (6,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", PER_POSITION)
@pytest.mark.parametrize("k", [3, 7])
def test_gradients(function, k):
    student, _, targets = random_case(2, rows=2, vocabulary=7, k=k, scale=1.0)
    logits = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: function(values, targets), (logits,))


def test_gradients_with_temperature():
    student, _, targets = random_case(3, rows=2, vocabulary=7, k=3, scale=1.0)
    logits = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: forward_kl(values, targets, temperature=2.0), (logits,))
    assert torch.autograd.gradcheck(lambda values: top_k_renormalised(values, targets, temperature=2.0), (logits,))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_whole_vocabulary_is_the_full_divergence(temperature):
    student, teacher, _ = random_case(4)
    targets = kept(teacher, teacher.shape[1])
    q, p = np.exp(log_softmax(teacher / temperature)), np.exp(log_softmax(student / temperature))
    found = forward_kl(torch.from_numpy(student), targets, temperature=temperature)
    np.testing.assert_allclose(found.numpy(), temperature**2 * kl(q, p), rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(k, temperature):
    _, teacher, _ = random_case(5)
    logits = torch.from_numpy(teacher).requires_grad_()
    loss = forward_kl(logits, kept(teacher, k), temperature=temperature)
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_what_each_loss_asks_of_the_tail():
    """Same shape over the candidates, a tail of 0.1 instead of the teacher's 0.5."""
    teacher = np.log(np.array([[0.3, 0.2, 0.25, 0.25]]))
    student = np.log(np.array([[0.54, 0.36, 0.05, 0.05]]))
    targets = Targets(*kept(teacher, 4))
    targets = targets._replace(
        candidate_ids=torch.tensor([[0, 1]]),
        candidate_logprobs=torch.from_numpy(teacher[:, :2]),
        tail_logprob=torch.tensor([np.log(0.5)]),
    )
    naive = top_k_renormalised(torch.from_numpy(student), targets)
    bucket = forward_kl(torch.from_numpy(student), targets)
    assert naive.item() == pytest.approx(-np.log(0.9))  # wants no tail at all: less than the teacher's costs nothing
    assert bucket.item() == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 23), scale=st.floats(0.01, 20))
def test_never_negative_and_never_above_the_full_divergence(seed, k, scale):
    student, teacher, targets = random_case(seed, k=k, scale=scale)
    logits = torch.from_numpy(student)
    for function in PER_POSITION:
        assert (function(logits, targets) >= -1e-9).all()
    full = kl(np.exp(log_softmax(teacher)), np.exp(log_softmax(student)))
    assert (forward_kl(logits, targets).numpy() <= full + 1e-9).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)])
@pytest.mark.parametrize("function", PER_POSITION)
def test_low_precision_logits_are_computed_in_float32(function, dtype, tolerance):
    """Against float64 on the same (already rounded) logits: within 2e-5 nats at a vocabulary of 5,000."""
    student, _, targets = random_case(6, rows=8, vocabulary=5000)
    logits = torch.from_numpy(student).to(dtype)
    found = function(logits, Targets(*(each.float() if each.is_floating_point() else each for each in targets)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), function(logits.double(), targets), atol=tolerance, rtol=2e-6)


@pytest.mark.parametrize("function", PER_POSITION)
@pytest.mark.parametrize("k", [3, 8])
def test_extreme_logits_stay_finite(function, k):
    teacher = np.array([[80.0, -80, 0, 0, 0, 0, 0, 0], [-80.0, 80, 80, -80, 0, 1, 2, 3]])
    targets = Targets(*(each.float() if each.is_floating_point() else each for each in kept(teacher, k)))
    for student in (-teacher, teacher, np.zeros_like(teacher), np.full_like(teacher, 80.0)):
        logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
        loss = function(logits, targets)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert logits.grad is not None and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("function", PER_POSITION)
def test_rows_with_fewer_candidates(function):
    """A row filled up with −inf is the row without its fillers, token 0 (the filler's id) included."""
    student, teacher, _ = random_case(7)
    three, five = kept(teacher, 3), kept(teacher, 5)
    ids, logprobs = torch.zeros_like(five.candidate_ids), torch.full_like(five.candidate_logprobs, float("-inf"))
    ids[:, :3], logprobs[:, :3] = three.candidate_ids, three.candidate_logprobs
    filled = three._replace(candidate_ids=ids, candidate_logprobs=logprobs)
    logits = torch.from_numpy(student)
    assert (five.candidate_ids[:, 0] != 0).any()
    torch.testing.assert_close(function(logits, filled), function(logits, three))
    if function is forward_kl:
        torch.testing.assert_close(forward_kl(logits, filled, temperature=2.0), forward_kl(logits, three, temperature=2.0))


def toy_batch(vocabulary: int = 11, k: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, length = 3, 5
    logprobs = torch.log_softmax(torch.randn(rows, length, vocabulary, generator=generator), dim=-1)
    values, ids = logprobs.topk(k, dim=-1)
    tail = torch.log1p(-values.exp().sum(-1))
    is_target = torch.zeros(rows, length, dtype=torch.bool)
    is_target[0, 1:], is_target[1, 2:4] = True, True  # the third row is padding
    return {
        "sequence_id": torch.tensor([7, 9, -1]),
        "input_ids": torch.randint(0, vocabulary, (rows, length), generator=generator),
        "is_target": is_target,
        "token_logprob": torch.zeros(rows, length),
        "candidate_ids": ids,
        "candidate_logprobs": values,
        "tail_logprob": tail,
    }


def test_position_t_is_paired_with_the_logits_of_t_minus_one():
    batch = toy_batch()
    logits = torch.arange(3 * 5, dtype=torch.float32).view(3, 5, 1).expand(3, 5, 11)
    chosen, targets = select_targets(logits, batch)
    assert chosen[:, 0].tolist() == [0, 1, 2, 3, 6, 7]
    assert targets.token_ids.tolist() == [*batch["input_ids"][0, 1:].tolist(), *batch["input_ids"][1, 2:4].tolist()]
    assert torch.equal(targets.candidate_ids[-1], batch["candidate_ids"][1, 3])


def test_candidates_beyond_the_students_head_go_to_the_tail():
    batch = toy_batch(vocabulary=11)
    whole, small = torch.randn(3, 5, 11), 8
    logits, targets = select_targets(whole[..., :small], batch)
    total = targets.candidate_logprobs.exp().sum(-1) + targets.tail_logprob.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert targets.candidate_ids.max() < small
    assert torch.isfinite(forward_kl(logits, targets)).all()


def test_shares_of_a_step_add_up_to_the_mean_of_one_batch():
    batch = toy_batch()
    outputs = SimpleNamespace(logits=torch.randn(3, 5, 11))
    counts = units(batch)
    assert {unit: int(count) for unit, count in counts.items()} == {"target": 6, "sequence": 2}
    whole = step_loss(LOSSES["forward-kl"], outputs, batch, counts, ce_weight=0.3)
    logits, targets = select_targets(outputs.logits, batch)
    expected = 0.7 * forward_kl(logits, targets).mean() + 0.3 * cross_entropy(logits, targets).mean()
    torch.testing.assert_close(whole, expected)
    shares = [
        step_loss(
            LOSSES["forward-kl"],
            SimpleNamespace(logits=outputs.logits[row : row + 1]),
            {name: value[row : row + 1] for name, value in batch.items()},
            counts,
            ce_weight=0.3,
        )
        for row in range(3)
    ]
    torch.testing.assert_close(sum(shares), whole)


def test_a_loss_of_another_kind_is_one_entry():
    """One vector per sequence, matched by the mean of the student's last hidden state."""

    def match(outputs, batch):
        return (outputs.hidden_states[-1].mean(dim=1) - batch["vector"]).square().sum(dim=-1)

    entry = Loss(match, kinds=("vectors",), columns=("vector",), whole_batch=True, unit="sequence", hidden_states=True)
    batch = {**toy_batch(), "vector": torch.ones(3, 4)}
    hidden = torch.zeros(3, 5, 4)
    hidden[2] = 1e9  # padding must not count
    outputs = SimpleNamespace(logits=torch.randn(3, 5, 11), hidden_states=(hidden,))
    assert step_loss(entry, outputs, batch, units(batch)).item() == pytest.approx(4.0)


def test_an_empty_batch_adds_nothing():
    batch = toy_batch()
    batch["is_target"][:] = False
    logits = torch.randn(3, 5, 11, requires_grad=True)
    for loss in LOSSES.values():
        share = step_loss(loss, SimpleNamespace(logits=logits), batch, {"target": 6, "sequence": 2}, ce_weight=0.5)
        share.backward()
        assert share.item() == 0
    assert logits.grad is not None and not logits.grad.any()
