"""Losses against plain float64 numpy and against the full divergence, how targets are picked, and what a run may ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import commit, knowledge_of, make_manifest, words
from stores import with_draws as made_up_draws
from targets import VOCABULARY, divergence, drawn, in_float32, kept, kl, log_softmax, random_case, random_draws

from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import tokens_table
from student_train.losses.divergences import (
    cross_entropy,
    forward_kl,
    label_smoothing,
    residual_to_gold,
    top_k_renormalised,
)
from student_train.losses.step import step_loss, units
from student_train.losses.table import LOSSES, Loss
from student_train.losses.targets import Targets, select_targets
from student_train.training.configuration import TrainConfig, check_config
from student_train.training.knowledge import check_knowledge

DIVERGENCES = [
    *("forward-kl", "reverse-kl", "jensen-shannon", "total-variation", "skewed-kl", "skewed-reverse-kl", "adaptive-kl")
]
PER_POSITION = {name: loss for name, loss in LOSSES.items() if not loss.whole_batch}
FUNCTIONS = {name: loss.function for name, loss in PER_POSITION.items()}


def renormalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum(axis=-1, keepdims=True)


def reference(name: str, student: np.ndarray, targets: Targets, **options: float) -> np.ndarray:
    """The same loss, written down from its definition with probabilities in float64."""
    p = np.exp(log_softmax(student))
    ids, gold = targets.candidate_ids.numpy(), targets.token_ids.numpy()[:, None]
    q_kept = np.exp(targets.candidate_logprobs.numpy())
    p_kept = np.take_along_axis(p, ids, axis=-1)
    tail = np.exp(targets.tail_logprob.numpy())[:, None]
    temperature = options.pop("temperature", 1.0)
    if name == "ce":
        return -np.log(np.take_along_axis(p, gold, axis=-1)[:, 0])
    if name == "first":
        c = options.get("c", 0.28)
        return kl(renormalised(np.exp(q_kept / c)), renormalised(np.exp(p_kept / c)))
    if name == "conditional-kl":
        return kl(renormalised(q_kept), renormalised(p_kept))
    if name == "label-smoothing":
        smoothed = renormalised(q_kept)
        given = np.minimum(options.get("smoothing", 0.1), smoothed[:, :1])
        smoothed[:, :1] -= given
        smoothed[:, 1:] += given / (ids.shape[1] - 1)
        return kl(smoothed, p_kept)
    if name == "residual-to-gold":
        q = np.zeros_like(p)
        np.put_along_axis(q, ids, q_kept, axis=-1)
        np.put_along_axis(q, gold, np.take_along_axis(q, gold, axis=-1) + tail, axis=-1)
        return kl(q, p)
    if name == "top-k-renormalised":
        tempered = np.exp(log_softmax(student / temperature))
        q = renormalised(q_kept ** (1 / temperature))
        return temperature**2 * kl(q, np.take_along_axis(tempered, ids, axis=-1))
    others = np.ones_like(p)
    np.put_along_axis(others, ids, 0, axis=-1)
    q = renormalised(np.concatenate([q_kept, tail], axis=-1) ** (1 / temperature))
    bucketed = np.concatenate([p_kept, (p * others).sum(axis=-1, keepdims=True)], axis=-1)
    power = 1 if name == "total-variation" else 2
    return temperature**power * divergence(name, q, renormalised(bucketed ** (1 / temperature)), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in PER_POSITION),
        *((name, {"temperature": temperature}) for name in DIVERGENCES for temperature in (0.5, 2.0)),
        ("jensen-shannon", {"beta": 0.2}),
        ("skewed-kl", {"skew": 0.7}),
        ("skewed-reverse-kl", {"skew": 0.7}),
        ("first", {"c": 0.9}),
        ("label-smoothing", {"smoothing": 0.4}),
        ("top-k-renormalised", {"temperature": 3.0}),
    ],
)
def test_parity_with_float64_reference(name, options):
    student, _, targets = random_case(1, rows=40)
    found = FUNCTIONS[name](torch.from_numpy(student), targets, **options)
    assert found.shape == (40,)
    np.testing.assert_allclose(found.numpy(), reference(name, student, targets, **options), rtol=1e-9, atol=1e-12)


def test_parity_of_draws_with_float64_reference():
    student, _, bare = random_case(1)
    targets = random_draws(bare, 0)
    assert targets.draw_ids is not None and targets.draw_weights is not None
    q, p = np.exp(bare.candidate_logprobs.numpy()), np.exp(log_softmax(student))
    t = np.exp(bare.tail_logprob.numpy())
    assert (targets.draw_weights > 0).sum(dim=1).tolist() == [0, 1, 2, 3, 0, 1]
    expected = (q * np.log(q / np.take_along_axis(p, bare.candidate_ids.numpy(), axis=-1))).sum(axis=-1) + t * np.log(t)
    for draw in range(3):
        weights = np.where(np.arange(6) % 4 > draw, 0.07, 0)
        expected -= weights * np.log(p[np.arange(6), targets.draw_ids[:, draw].numpy()])
    logits = torch.from_numpy(student)
    for tail in ("auto", "draws"):
        np.testing.assert_allclose(forward_kl(logits, targets, tail=tail).numpy(), expected, rtol=1e-10)


def test_where_the_draws_are_not_used():
    student, _, bare = random_case(1)
    logits, targets = torch.from_numpy(student), random_draws(bare, 0)
    assert torch.equal(forward_kl(logits, targets, tail="bucket"), forward_kl(logits, bare))
    assert torch.equal(forward_kl(logits, targets, temperature=2.0), forward_kl(logits, bare, temperature=2.0))
    assert not torch.equal(forward_kl(logits, targets), forward_kl(logits, bare))
    for name, function in FUNCTIONS.items():
        if name != "forward-kl":
            assert torch.equal(function(logits, targets), function(logits, bare)), name
    for arguments, message in (
        ((bare, {"tail": "draws"}), "no draws"),
        ((targets, {"tail": "draws", "temperature": 2.0}), "work at temperature 1 only, not at 2.0"),
        ((targets, {"tail": "nonsense"}), "tail is one of auto, draws, bucket, not 'nonsense'"),
    ):
        with pytest.raises(ValueError, match=message):
            forward_kl(logits, arguments[0], **arguments[1])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_whole_vocabulary_is_the_full_divergence(name, temperature):
    student, teacher, _ = random_case(4)
    targets = kept(teacher, VOCABULARY)
    q, p = np.exp(log_softmax(teacher / temperature)), np.exp(log_softmax(student / temperature))
    found = FUNCTIONS[name](torch.from_numpy(student), targets, temperature=temperature)
    empty = np.zeros((6, 1))  # the bucket
    full = divergence(name, np.concatenate([q, empty], axis=1), np.concatenate([p, empty], axis=1))
    np.testing.assert_allclose(found.numpy(), temperature ** (1 if name == "total-variation" else 2) * full, rtol=1e-9)


def test_whole_vocabulary_with_room_for_draws():
    """No tail, so nothing was drawn: the fillers weigh nothing."""
    student, teacher, _ = random_case(4)
    bare = kept(teacher, VOCABULARY)
    targets = drawn(bare, np.full((6, 3), -1), 0.05)
    found = forward_kl(torch.from_numpy(student), targets, tail="draws")
    np.testing.assert_allclose(found.numpy(), kl(np.exp(log_softmax(teacher)), np.exp(log_softmax(student))), rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 23])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(name, k, temperature):
    _, teacher, _ = random_case(5)
    logits = torch.from_numpy(teacher).requires_grad_()
    loss = FUNCTIONS[name](logits, kept(teacher, k), temperature=temperature)
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    if name != "total-variation":  # which has a kink there
        assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_what_each_loss_asks_of_the_tail():
    """Same shape over the candidates, a tail of 0.1 instead of the teacher's 0.5."""
    teacher = np.log(np.array([[0.3, 0.2, 0.25, 0.25]]))
    student = torch.from_numpy(np.log(np.array([[0.54, 0.36, 0.05, 0.05]])))
    targets = kept(teacher, 4)._replace(
        candidate_ids=torch.tensor([[0, 1]]),
        candidate_logprobs=torch.from_numpy(teacher[:, :2]),
        tail_logprob=torch.tensor([np.log(0.5)]),
    )
    bucket = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert FUNCTIONS["conditional-kl"](student, targets).item() == pytest.approx(0, abs=1e-12)  # any tail will do
    # Wants no tail at all: less than the teacher's costs nothing.
    assert top_k_renormalised(student, targets).item() == pytest.approx(-np.log(0.9))
    assert forward_kl(student, targets).item() == pytest.approx(bucket)
    # One token drawn twice: it alone should have what the tail has.
    both = targets._replace(draw_ids=torch.tensor([[3]]), draw_weights=torch.tensor([[0.5]]))
    assert forward_kl(student, both).item() == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.05))


def smoothing_case(*probabilities: float) -> Targets:
    logprobs = torch.tensor([probabilities]).double().log()
    ids = torch.arange(len(probabilities)).unsqueeze(0)
    gold = torch.tensor([0])
    return Targets(gold, torch.zeros(1), ids, logprobs, torch.log1p(-logprobs.exp().sum(-1)))


def test_label_smoothing_may_swap_the_top_two():
    """It is least at the smoothed distribution: 0.4 and 0.36 of 0.8, renormalised, become 0.4 and 0.5."""
    targets = smoothing_case(0.4, 0.36, 0.04)
    best = torch.log(torch.tensor([[0.3, 0.55, 0.15]]).double())
    assert label_smoothing(best, targets, smoothing=0.2).item() == pytest.approx(0, abs=1e-12)
    kept_order = torch.log(torch.tensor([[0.5, 0.45, 0.05]]).double())
    assert label_smoothing(kept_order, targets, smoothing=0.0).item() == pytest.approx(0, abs=1e-12)
    # No more than the likeliest has; a token that ends with nothing costs nothing.
    assert label_smoothing(
        torch.log(torch.tensor([[1e-9, 0.7, 0.3]]).double()), targets, smoothing=0.9
    ).item() == pytest.approx(0, abs=1e-8)


def test_label_smoothing_of_a_single_candidate():
    student = torch.log(torch.tensor([[0.25, 0.75]]).double())
    assert label_smoothing(student, smoothing_case(0.6), smoothing=0.3).item() == pytest.approx(np.log(4))


@pytest.mark.parametrize(("gold", "best"), [(1, [0.5, 0.5, 0, 0]), (3, [0.5, 0.3, 0, 0.2])])
def test_residual_goes_to_the_token_that_stands_there(gold, best):
    targets = smoothing_case(0.5, 0.3)._replace(token_ids=torch.tensor([gold]))
    logits = torch.log(torch.tensor([best]).double()).clamp(min=-60)
    assert residual_to_gold(logits, targets).item() == pytest.approx(0, abs=1e-9)
    assert residual_to_gold(torch.zeros(1, 4).double(), targets).item() == pytest.approx(
        kl(np.array([best]), np.full((1, 4), 0.25))[0]
    )


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 23), scale=st.floats(0.01, 20))
def test_never_negative_and_never_above_the_full_divergence(seed, k, scale):
    student, teacher, targets = random_case(seed, k=k, scale=scale)
    logits = torch.from_numpy(student)
    q, p = np.exp(log_softmax(teacher)), np.exp(log_softmax(student))
    for name, function in FUNCTIONS.items():
        values = function(logits, targets).numpy()
        assert (values >= -1e-9).all(), name
        if name in DIVERGENCES and name != "adaptive-kl":
            full = divergence(name, q, p)
            assert (values <= full + 1e-9 * (1 + full)).all(), name
    if k < VOCABULARY - 1:  # with draws no value is bounded, but it is the same wherever all logits are moved by one number
        drawn_from = random_draws(targets, seed)
        torch.testing.assert_close(forward_kl(logits + 7, drawn_from), forward_kl(logits, drawn_from))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_low_precision_logits_are_computed_in_float32(function, dtype):
    """Against float64 on the same (already rounded) logits: within 2e-5 nats at a vocabulary of 5,000."""
    student, _, targets = random_case(6, rows=8, vocabulary=5000)
    logits = torch.from_numpy(student).to(dtype)
    found = function(logits, in_float32(targets))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), function(logits.double(), targets), atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_rows_with_fewer_candidates(function):
    """A row filled up with −inf is the row without its fillers, also where token 0 (the filler's id) stands."""
    student, teacher, _ = random_case(7)
    three, five = kept(teacher, 3, np.zeros(6, np.int64)), kept(teacher, 5)
    ids, logprobs = torch.zeros_like(five.candidate_ids), torch.full_like(five.candidate_logprobs, float("-inf"))
    ids[:, :3], logprobs[:, :3] = three.candidate_ids, three.candidate_logprobs
    filled = three._replace(candidate_ids=ids, candidate_logprobs=logprobs)
    logits = torch.from_numpy(student)
    assert (five.candidate_ids[:, 0] != 0).any()
    torch.testing.assert_close(function(logits, filled), function(logits, three))
    if function in [FUNCTIONS[name] for name in (*DIVERGENCES, "top-k-renormalised")]:
        torch.testing.assert_close(function(logits, filled, temperature=2.0), function(logits, three, temperature=2.0))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_row_of_fillers_is_a_row_without_candidates(function):
    student, teacher, _ = random_case(7)
    none = kept(teacher, 0)
    assert none.candidate_ids.shape == (6, 0) and none.tail_logprob.abs().max() < 1e-12
    fillers = none._replace(
        candidate_ids=torch.zeros(6, 2, dtype=torch.int64), candidate_logprobs=torch.full((6, 2), float("-inf")).double()
    )
    logits = torch.from_numpy(student)
    found = function(logits, none)
    torch.testing.assert_close(function(logits, fillers), found)
    if function in (FUNCTIONS["ce"], FUNCTIONS["residual-to-gold"]):
        torch.testing.assert_close(found, cross_entropy(logits, none))
    else:
        assert found.abs().max() < 1e-12


def test_fillers_among_the_draws_change_nothing():
    student, _, bare = random_case(8)
    ids = np.array([np.setdiff1d(np.arange(1, VOCABULARY), row)[:3] for row in bare.candidate_ids.numpy()])
    plain = drawn(bare, ids, 0.05)
    filled = drawn(bare, np.pad(ids, ((0, 0), (0, 2)), constant_values=-1), 0.05)
    assert filled.draw_weights is not None and filled.draw_weights.shape == (6, 5)
    logits = torch.from_numpy(student)
    torch.testing.assert_close(forward_kl(logits, filled), forward_kl(logits, plain))


def toy_batch(vocabulary: int = 11, k: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, length = 3, 5
    logprobs = torch.log_softmax(torch.randn(rows, length, vocabulary, generator=generator), dim=-1)
    values, ids = logprobs.topk(k, dim=-1)
    tail = torch.log1p(-values.exp().sum(-1)) if k else torch.zeros(rows, length)
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


def with_draws(batch: dict[str, torch.Tensor], *ids: int) -> dict[str, torch.Tensor]:
    shape = batch["input_ids"].shape
    return {**batch, "tail_ids": torch.tensor(ids).expand(*shape, len(ids)), "draw_weight": torch.full(shape, 0.05)}


def test_position_t_is_paired_with_the_logits_of_t_minus_one():
    batch = with_draws(toy_batch(), 10, -1)
    batch["tail_ids"] = batch["tail_ids"].clone()
    batch["tail_ids"][1, 3, 0] = 9
    logits = torch.arange(3 * 5, dtype=torch.float32).view(3, 5, 1).expand(3, 5, 11)
    chosen, targets = select_targets(logits, batch)
    assert chosen[:, 0].tolist() == [0, 1, 2, 3, 6, 7]
    assert targets.token_ids.tolist() == [*batch["input_ids"][0, 1:].tolist(), *batch["input_ids"][1, 2:4].tolist()]
    assert torch.equal(targets.candidate_ids[-1], batch["candidate_ids"][1, 3])
    assert targets.draw_ids is not None and targets.draw_ids[:, 0].tolist() == [10, 10, 10, 10, 10, 9]


def test_a_part_of_the_targets():
    batch = toy_batch()
    for batch in (toy_batch(), with_draws(toy_batch(), 10, 10)):
        _, targets = select_targets(torch.zeros(3, 5, 11), batch)
        part = targets.part(slice(2, 5))
        assert torch.equal(part.candidate_logprobs, targets.candidate_logprobs[2:5])
        assert (part.draw_weights is None) == (targets.draw_weights is None)
        if part.draw_weights is not None and targets.draw_weights is not None:
            assert torch.equal(part.draw_weights, targets.draw_weights[2:5])


def test_candidates_beyond_the_students_head_go_to_the_tail():
    batch = toy_batch(vocabulary=11)
    whole, small = torch.randn(3, 5, 11), 8
    logits, targets = select_targets(whole[..., :small], batch)
    total = targets.candidate_logprobs.exp().sum(-1) + targets.tail_logprob.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert targets.candidate_ids.max() < small
    for name, function in FUNCTIONS.items():
        assert torch.isfinite(function(logits, targets._replace(token_ids=targets.token_ids % small))).all(), name


def test_draws_beyond_the_students_head_are_left_out():
    """The others stand for what they stood for, and the tail grows by the candidates moved into it."""
    batch = with_draws(toy_batch(), 4, 5, 9, 10)
    tail = batch["tail_logprob"][:, 1:][batch["is_target"][:, 1:]].exp()
    _, whole = select_targets(torch.zeros(3, 5, 11), batch)
    _, narrow = select_targets(torch.zeros(3, 5, 8), batch)
    assert whole.draw_weights is not None and narrow.draw_weights is not None and narrow.draw_ids is not None
    torch.testing.assert_close(whole.draw_weights, torch.full((6, 4), 0.05))
    torch.testing.assert_close(narrow.draw_weights, torch.tensor([0.05, 0.05, 0, 0]).expand(6, 4))
    assert narrow.draw_ids.max() < 8
    assert (narrow.tail_logprob.exp() > tail + 1e-3).any()
    logits, none_left = select_targets(torch.zeros(3, 5, 4), batch)
    assert none_left.draw_weights is not None and not none_left.draw_weights.any()
    assert torch.isfinite(forward_kl(logits, none_left)).all()


def test_shares_of_a_step_add_up_to_the_mean_of_one_batch():
    batch = toy_batch()
    outputs = SimpleNamespace(logits=torch.randn(3, 5, 11))
    counts = units(batch)
    assert {unit: int(count) for unit, count in counts.items()} == {"target": 6, "sequence": 2, "group": 0}
    whole = step_loss(LOSSES["forward-kl"], [outputs], batch, counts, ce_weight=0.3)
    logits, targets = select_targets(outputs.logits, batch)
    expected = 0.7 * forward_kl(logits, targets).mean() + 0.3 * cross_entropy(logits, targets).mean()
    torch.testing.assert_close(whole, expected)
    shares = [
        step_loss(
            LOSSES["forward-kl"],
            [SimpleNamespace(logits=outputs.logits[row : row + 1])],
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
    assert step_loss(entry, [outputs], batch, units(batch)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("k", [0, 3])
def test_an_empty_batch_adds_nothing(k):
    batch = with_draws(toy_batch(k=k), 9, -1)
    batch["is_target"][:] = False
    logits = torch.randn(3, 5, 11, requires_grad=True)
    for loss in PER_POSITION.values():
        share = step_loss(loss, [SimpleNamespace(logits=logits)], batch, {"target": 6, "sequence": 2}, ce_weight=0.5)
        share.backward()
        assert share.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def config(**changes) -> TrainConfig:
    return TrainConfig("store", "student", "output", **changes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tail": "nonsense"}, "--tail is 'nonsense'; it must be auto, draws or bucket"),
        ({"tail": "bucket", "loss": "reverse-kl"}, "the loss reverse-kl takes no --tail"),
        ({"tail": "draws", "temperature": 2.0}, "--tail draws works at --temperature 1 only"),
        ({"loss": "jensen-shannon", "beta": 1.0}, "--beta is 1; of jensen-shannon it must be below 1"),
        ({"loss": "skewed-kl", "skew": 0.0}, "--skew is 0.0; it must be above 0 and below 1"),
        ({"loss": "label-smoothing", "smoothing": 1.0}, "--smoothing is 1.0; it must be at least 0 and below 1"),
        ({"beta": 0.4}, "the loss forward-kl takes no --beta"),
        ({"loss": "reverse-kl", "skew": 0.4}, "the loss reverse-kl takes no --skew"),
        ({"loss": "first", "smoothing": 0.4}, "the loss first takes no --smoothing"),
        ({"loss": "conditional-kl", "first_c": 0.4}, "the loss conditional-kl takes no --first-c"),
        ({"loss": "residual-to-gold", "temperature": 2.0}, "the loss residual-to-gold takes no --temperature"),
    ],
)
def test_options_that_a_loss_cannot_use_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        check_config(config(**changed))


@pytest.mark.parametrize("name", PER_POSITION)
def test_options_reach_their_loss(name):
    """Each loss takes what the configuration hands it, and an option that is changed changes it."""
    student, _, targets = random_case(9)
    logits = torch.from_numpy(student)
    values = {"temperature": 2.0, "c": 0.5, "tail": "bucket", "beta": 0.3, "skew": 0.3, "smoothing": 0.3}
    fields = {option: {"c": "first_c"}.get(option, option) for option in LOSSES[name].options}
    check_config(config(loss=name, **{field: values[option] for option, field in fields.items()}))
    plain = FUNCTIONS[name](logits, targets)
    torch.testing.assert_close(FUNCTIONS[name](logits, targets, **config(loss=name).loss_options()), plain)
    for option, field in fields.items():
        if option != "tail":
            chosen = config(loss=name, **{field: values[option]})
            changed = FUNCTIONS[name](logits, targets, **chosen.loss_options())
            assert not torch.allclose(changed, plain), option


def small_store(folder: Path, selection: dict[str, object]) -> KnowledgeStore:
    k, weight = int(selection.get("k", 2)), float(selection.get("draw_weight", 0))
    manifest = make_manifest(shards=1, selection=selection)
    writer = DumpWriter.open(folder, manifest, tokens_table(words(11), words(11)))
    random = np.random.default_rng(0)
    arrays = knowledge_of(np.arange(6), random.normal(size=(6, 11)), k)
    commit(writer, 0, [made_up_draws(arrays, weight=weight) if weight else arrays])
    return KnowledgeStore.open(folder)


def test_draws_asked_of_a_dump_without_any_are_refused(tmp_path):
    asked = config(tail="draws")
    with pytest.raises(InputError, match=r"--tail draws: the dump small keeps no draws from the tail \(top-k 3\)"):
        check_knowledge(small_store(tmp_path / "bare", {"name": "top-k", "k": 3}), "small", asked, LOSSES["forward-kl"])
    rich = small_store(tmp_path / "rich", {"name": "top-k", "k": 3, "draw_weight": 0.01, "draw_seed": 0})
    check_knowledge(rich, "small", asked, LOSSES["forward-kl"])
    batch = {name: torch.from_numpy(array) for name, array in next(iter(rich.batches("small", batch_size=1))).items()}
    _, targets = select_targets(torch.zeros(1, 6, 11), batch)
    assert targets.draw_weights is not None
    torch.testing.assert_close(targets.draw_weights.sum(-1), targets.tail_logprob.exp(), rtol=0.15, atol=0.01)
