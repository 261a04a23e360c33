"""Losses of preferences: as they are defined, the same for any cut into batches, and without all the logits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.losses import sliced as slices
from student_train.losses.preference import TargetLogprobs, answer_logprobs, dpo, margins, pro, rrhf
from student_train.losses.sliced import sliced_logprobs, target_logprobs
from student_train.losses.step import run_student, step_loss, units
from student_train.losses.table import LOSSES, Loss

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LENGTH = 7, 6
NAMES = ["dpo", "rrhf", "pro"]
FUNCTIONS = {"dpo": dpo, "rrhf": rrhf, "pro": pro}
SIZES = [2, 4, 3, 2]


def random_batch(seed: int = 0, sizes: list[int] = SIZES, padding: int = 2, levels: int = 4, vocabulary: int = VOCABULARY):
    """Groups of so many answers, with scores of few levels, so that some are equal, and rows of padding behind them."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    starts = torch.randint(1, 3, (rows,), generator=generator)
    ends = torch.randint(4, LENGTH + 1, (rows,), generator=generator)
    places = torch.arange(LENGTH)
    is_target = torch.zeros(rows + padding, LENGTH, dtype=torch.bool)
    is_target[:rows] = (places >= starts[:, None]) & (places < ends[:, None])
    group = torch.full((rows + padding,), -1)
    group[:rows] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    score = torch.full((rows + padding,), math.nan, dtype=torch.float64)
    score[:rows] = torch.randint(0, levels, (rows,), generator=generator).double() / 2 - 1
    reference = torch.zeros(rows + padding, dtype=torch.float64)
    reference[:rows] = -5 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return {
        "sequence_id": torch.where(group >= 0, torch.arange(rows + padding) + 3, -1),
        "input_ids": torch.randint(0, vocabulary, (rows + padding, LENGTH), generator=generator),
        "attention_mask": torch.ones(rows + padding, LENGTH, dtype=torch.int64),
        "is_target": is_target,
        "group": group,
        "score": score,
        "reference_logprob": reference,
    }


def random_logits(batch, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*batch["input_ids"].shape, VOCABULARY, generator=generator, dtype=torch.float64)


def reference(name: str, logits: torch.Tensor, batch, beta: float = 0.1) -> list[float]:
    """The same losses, written down from their papers with loops."""
    found = []
    for number in range(int(batch["group"].max()) + 1):
        answers = []
        for row in (batch["group"] == number).nonzero().flatten().tolist():
            logprob, count = 0.0, 0
            for place in range(1, LENGTH):
                if batch["is_target"][row, place]:
                    values = logits[row, place - 1]
                    logprob += (values[batch["input_ids"][row, place]] - values.exp().sum().log()).item()
                    count += 1
            answers.append((float(batch["score"][row]), logprob, count, float(batch["reference_logprob"][row])))
        ranked = sorted(answers, key=lambda answer: -answer[0])
        best, worst = ranked[0], ranked[-1]
        if name == "dpo":
            margin = beta * ((best[1] - best[3]) - (worst[1] - worst[3]))
            found.append(-math.log(1 / (1 + math.exp(-margin))))
        elif name == "rrhf":
            loss = -best[1]
            for lower in answers:
                for higher in answers:
                    if lower[0] < higher[0]:
                        loss += max(0.0, lower[1] / lower[2] - higher[1] / higher[2])
            found.append(loss)
        else:
            loss = -0.05 * (len(answers) - 1) ** 2 * best[1]
            for higher in ranked:
                worse = [lower for lower in ranked if lower[0] < higher[0]]
                if not worse:
                    continue
                temperatures = [1 / (higher[0] - lower[0]) for lower in worse]
                own = math.exp(higher[1] / higher[2] / min(temperatures))
                others = [math.exp(a[1] / a[2] / temperature) for a, temperature in zip(worse, temperatures, strict=True)]
                loss -= math.log(own / (own + sum(others)))
            found.append(loss)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_a_float64_reference(name, seed):
    batch = random_batch(seed, levels=(2, 4, 50)[seed])
    logits = random_logits(batch)
    found = FUNCTIONS[name](SimpleNamespace(logits=logits), batch)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(reference(name, logits, batch), rel=1e-10)
    in_float32 = FUNCTIONS[name](SimpleNamespace(logits=logits.float()), batch)
    assert in_float32.dtype == torch.float32
    torch.testing.assert_close(in_float32.double(), found, rtol=1e-4, atol=1e-5)
    other_beta = dpo(SimpleNamespace(logits=logits), batch, beta=0.7)
    assert other_beta.tolist() == pytest.approx(reference("dpo", logits, batch, beta=0.7), rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    batch = random_batch(4, sizes=[3], padding=0)
    logits = random_logits(batch).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: FUNCTIONS[name](SimpleNamespace(logits=values), batch), (logits,))


def test_a_student_that_is_its_own_reference_has_no_margin():
    batch = random_batch(1)
    logits = random_logits(batch)
    outputs = SimpleNamespace(logits=logits)
    batch["reference_logprob"] = answer_logprobs(outputs, batch)
    assert dpo(outputs, batch).tolist() == pytest.approx([math.log(2)] * len(SIZES))
    rewards = LOSSES["dpo"].rewards(outputs, batch, beta=0.3)
    assert margins(rewards, batch).tolist() == [0] * len(SIZES)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_score_is_refused_and_padding_alone_has_no_group(name):
    batch = random_batch(2)
    outputs = SimpleNamespace(logits=random_logits(batch).requires_grad_())
    share = step_loss(LOSSES[name], [outputs], {**batch, "group": torch.full_like(batch["group"], -1)}, units(batch))
    share.backward()
    assert share.item() == 0 and not outputs.logits.grad.any()
    batch["score"][3] = math.nan
    with pytest.raises(ValueError, match="an answer of this batch has no score"):
        FUNCTIONS[name](outputs, batch)
    with pytest.raises(ValueError, match="a loss of groups is of whole batches"):
        Loss(FUNCTIONS[name], unit="group")


def cut(batch, logits: torch.Tensor, groups: list[int], padding: int):
    """A batch of some of the groups, as a reader that began with them would number them, and its logits."""
    rows = torch.cat([(batch["group"] == number).nonzero().flatten() for number in groups])
    rows = torch.cat([rows, torch.full((padding,), len(batch["group"]) - 1)])  # a row of padding
    part = {name: value[rows] for name, value in batch.items()}
    part["group"] = torch.tensor([-1 if group < 0 else groups.index(group) for group in part["group"].tolist()])
    return part, logits[rows]


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_cut_into_batches_has_the_same_gradient(data):
    """A step's batches, accumulated or of several ranks, add up to the mean over all of its groups."""
    name = data.draw(st.sampled_from(NAMES))
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=5))
    batch = random_batch(data.draw(st.integers(0, 99)), sizes=sizes, padding=1)
    counts = units(batch)
    assert int(counts["group"]) == len(sizes)
    whole = random_logits(batch).requires_grad_()
    step_loss(LOSSES[name], [SimpleNamespace(logits=whole)], batch, counts).backward()

    order = data.draw(st.permutations(range(len(sizes))))
    ends = [*sorted(data.draw(st.sets(st.integers(1, len(sizes))))), len(sizes)]
    parts = [list(order[start:end]) for start, end in zip([0, *ends], ends, strict=False) if start < end]
    logits = random_logits(batch).requires_grad_()
    for part in parts:
        piece, its_logits = cut(batch, logits, part, data.draw(st.integers(0, 2)))
        step_loss(LOSSES[name], [SimpleNamespace(logits=its_logits)], piece, counts).backward()
    torch.testing.assert_close(logits.grad, whole.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_log_probabilities_are_the_same_in_slices(monkeypatch, rows, bias):
    """In slices of three positions, with gradients that differ from token to token."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 3 * VOCABULARY * 8)
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, 4), (VOCABULARY, 4), *([(VOCABULARY,)] if bias else [])]
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    tokens = torch.randint(0, VOCABULARY, (rows,), generator=generator)

    def in_slices(*parts):
        return sliced_logprobs(*(*parts, None)[:3], tokens)

    plain = torch.log_softmax(torch.nn.functional.linear(*parts), dim=-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(in_slices(*parts), plain)
    with torch.no_grad():
        torch.testing.assert_close(in_slices(*parts), plain)
    if rows:
        assert torch.autograd.gradcheck(in_slices, tuple(parts))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_all_its_logits(name):
    """Loss and gradients are those of the whole logits, over two backward passes that add up; and in bfloat16 autocast."""
    model = make_model(50, layers=1)
    batch = random_batch(3, vocabulary=50)
    found = []
    for whole in (True, False):
        model.zero_grad()
        for _ in range(2):
            outputs = run_student(model, LOSSES[name], batch, logits=whole)
            assert isinstance(outputs[0], TargetLogprobs) is not whole
            loss = step_loss(LOSSES[name], outputs, batch, units(batch))
            loss.backward()
        found.append((loss.detach(), {n: parameter.grad.clone() for n, parameter in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = target_logprobs(model, batch)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logprobs, target_logprobs(model, batch), rtol=0.05, atol=0.05)
