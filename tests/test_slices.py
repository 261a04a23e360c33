"""Head and loss in slices: the loss and the gradients of the plain way, without its memory, and never for the wrong model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, save_teacher
from targets import random_case, random_draws
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from student_train.losses import sliced as slices
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.head import has_plain_head
from student_train.losses.sliced import sliced, sliced_loss
from student_train.losses.step import per_target
from student_train.losses.table import LOSSES
from student_train.losses.targets import Targets, select_targets
from student_train.training.configuration import TrainConfig
from student_train.training.run import train

VOCABULARY, WIDTH = 23, 4
PER_TARGET = [name for name, loss in LOSSES.items() if not loss.whole_batch]


@pytest.fixture(autouse=True)
def short_slices(monkeypatch) -> None:
    """Three positions of the small vocabulary in float64, so that seven make an odd last slice."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 3 * VOCABULARY * 8)


def head(rows: int, bias: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, WIDTH), (VOCABULARY, WIDTH), *([(VOCABULARY,)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def both_ways(function, targets: Targets, rows: int, bias: bool) -> list[list[torch.Tensor]]:
    """Value and gradients in slices, and as a whole; divided by 3, as a step divides."""
    found = []
    for in_slices in (True, False):
        parts = head(rows, bias)
        if in_slices:
            three = (*parts, None)[:3]
            total = sliced(*three, lambda logits, rows: function(logits, targets.part(rows)).sum())
        else:
            total = function(torch.nn.functional.linear(*parts), targets).sum()
        (total / 3).backward()
        found.append([total.detach(), *(part.grad for part in parts)])
    return found


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", PER_TARGET)
def test_every_loss_is_the_same_in_slices(name, ce_weight):
    bare = random_case(1, rows=7)[2]
    for targets in (bare, random_draws(bare, 2)):
        function = per_target(LOSSES[name], ce_weight=ce_weight)
        for bias in (False, True):
            one, other = both_ways(function, targets, 7, bias)
            for mine, plain in zip(one, other, strict=True):
                torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)
            assert other[2].abs().max() > 1e-3


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 6])
def test_any_number_of_positions(rows):
    targets = random_case(1, rows=6)[2].part(slice(0, rows))
    for mine, plain in zip(*both_ways(forward_kl, targets, rows, True), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def test_only_the_gradients_that_are_asked_for():
    hidden, weight, bias = head(7, True)
    targets = random_case(1, rows=7)[2]
    sliced(hidden, weight.detach(), bias, lambda logits, rows: forward_kl(logits, targets.part(rows)).sum()).backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None


def test_gradients_cannot_be_scaled_twice():
    hidden, weight = head(7, False)
    targets = random_case(1, rows=7)[2]
    loss = 2 * sliced(hidden, weight, None, lambda logits, rows: forward_kl(logits, targets.part(rows)).sum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def batch_of(vocabulary: int, length: int = 9) -> dict[str, torch.Tensor]:
    """Three sequences as a dataset gives them: all targets, some, and a row of padding."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(2 * torch.randn(3, length, vocabulary, generator=generator), dim=-1)
    values, ids = logprobs.topk(7, dim=-1)
    is_target = torch.zeros(3, length, dtype=torch.bool)
    is_target[0, 1:], is_target[1, 3:6] = True, True
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[2, 1:] = 0
    return {
        "sequence_id": torch.tensor([7, 9, -1]),
        "input_ids": torch.randint(0, vocabulary, (3, length), generator=generator),
        "attention_mask": mask,
        "is_target": is_target,
        "token_logprob": torch.zeros(3, length),
        "candidate_ids": ids[..., :5],
        "candidate_logprobs": values[..., :5],
        "tail_logprob": torch.log1p(-values[..., :5].exp().sum(-1)),
        "tail_ids": torch.where(torch.arange(2) < torch.arange(length)[:, None] % 3, ids[..., 5:], -1),
        "draw_weight": torch.full((3, length), 0.05),
    }


def the_plain_way(model, batch, function) -> torch.Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return function(*select_targets(logits, batch)).mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, batch, function) -> None:
    """Loss and gradients of all parameters, over two backward passes that add up."""
    found = []
    for way in (sliced_loss, the_plain_way):
        model.zero_grad()
        losses = []
        for _ in range(2):
            losses.append(way(model, batch, function))
            losses[-1].backward()
        found.append((torch.stack(losses).detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0][1].keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        torch.testing.assert_close(sliced_loss(model, batch, function), found[1][0][0], rtol=1e-4, atol=1e-6)


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}


def test_tied_weights():
    model = make_model(50, layers=1)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight and has_plain_head(model)
    assert_same(model, batch_of(50), forward_kl)


def test_a_head_with_a_bias():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL, **IDS))
    torch.nn.init.normal_(model.lm_head.bias)
    assert has_plain_head(model) and model.lm_head.bias is not None
    assert_same(model.eval(), batch_of(50), forward_kl)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SMALL, **IDS, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.5, initializer_range=0.4)
        ),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, **IDS, num_key_value_heads=1, logit_scale=0.25, initializer_range=0.4)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, **IDS, num_key_value_heads=1, logits_scaling=4.0)),
    ],
    ids=["capped", "multiplied", "divided"],
)
def test_a_model_that_changes_its_logits_takes_the_longer_way(make):
    torch.manual_seed(0)
    model = make().eval()
    assert not has_plain_head(model)
    assert_same(model, batch_of(50), forward_kl)


def test_other_heads_take_the_longer_way():
    for change in (
        lambda model: setattr(model, "lm_head", torch.nn.Sequential(model.lm_head)),
        lambda model: model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda model: setattr(model.lm_head, "forward", lambda hidden: 2 * hidden @ model.lm_head.weight.T),
    ):
        model = make_model(50, layers=1)
        assert has_plain_head(model)
        change(model)
        assert not has_plain_head(model)
        assert_same(model, batch_of(50), forward_kl)


def test_in_place_changes_are_noticed():
    model = make_model(50, layers=1)
    forward = model.forward

    def capped(*arguments, **options):
        outputs = forward(*arguments, **options)
        outputs.logits.mul_(0.5)
        return outputs

    model.forward = capped
    assert not has_plain_head(model)


def test_a_model_that_changes_its_mind_is_refused():
    model = make_model(50, layers=1)
    assert has_plain_head(model)
    forward = model.forward

    def scaled(*arguments, **options):
        outputs = forward(*arguments, **options)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = scaled
    with pytest.raises(RuntimeError, match="LlamaForCausalLM changed after its first pass"):
        sliced_loss(model, batch_of(50), forward_kl)
    assert "forward" not in vars(model.lm_head)


def test_looking_at_a_model_changes_nothing():
    model = make_model(50, layers=1).train()
    state = torch.random.get_rng_state()
    assert has_plain_head(model) and model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("name", PER_TARGET)
def test_no_array_of_positions_by_vocabulary(name, monkeypatch):
    vocabulary, width = 400, 8
    monkeypatch.setattr(slices, "SLICE_BYTES", 6 * vocabulary * 4)
    model = make_model(vocabulary, layers=1, hidden_size=width)
    batch = batch_of(vocabulary, length=31)
    positions = int(batch["is_target"].sum())
    has_plain_head(model)
    seen = []
    for way in (sliced_loss, the_plain_way):
        with Largest() as largest:
            way(model, batch, per_target(LOSSES[name], ce_weight=0.5)).backward()
        seen.append(largest.elements)
    assert seen[0] <= width * vocabulary < positions * vocabulary <= seen[1]


def test_without_gradients_none_are_computed():
    model = make_model(50, layers=1)
    asked = []

    def recorded(logits, targets):
        asked.append(logits.requires_grad)
        return cross_entropy(logits, targets)

    with torch.inference_mode():
        inferred = sliced_loss(model, batch_of(50), recorded)
    assert asked and not any(asked)
    torch.testing.assert_close(inferred, the_plain_way(model, batch_of(50), cross_entropy).detach())


def test_mixed_precision():
    """The head's products are those of autocast; its gradient comes in float32, as near as the plain way's."""
    model, batch = make_model(50, layers=1), batch_of(50)
    the_plain_way(model, batch, forward_kl).backward()
    exact = model.lm_head.weight.grad.clone()
    errors = []
    for way in (sliced_loss, the_plain_way):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = way(model, batch, forward_kl)
        loss.backward()
        assert loss.dtype == model.lm_head.weight.grad.dtype == torch.float32
        errors.append((model.lm_head.weight.grad - exact).norm() / exact.norm())
    assert 0 < errors[0] < 2 * errors[1] < 0.2


def test_a_run_is_what_it_was_without_slices(store_folder, tmp_path, monkeypatch):
    """Losses and held-out figures of a whole run, with the head in slices and as a whole."""
    student = save_teacher(tmp_path / "student", layers=1, seed=1)
    settings = {"store": str(store_folder), "student": str(student), "dump": "train", "batch_size": 4, "learning_rate": 1e-3}
    settings |= {"steps": 6, "eval_fraction": 0.2, "evaluations": 2}
    histories = []
    for plain in (True, False):
        output = tmp_path / f"plain-{plain}"
        if not plain:
            monkeypatch.setattr(slices, "has_plain_head", lambda model: False)
        else:
            monkeypatch.setattr(slices, "SLICE_BYTES", 11 * 400 * 4)
        train(TrainConfig(**settings, output=str(output), ce_weight=0.3))
        histories.append(losses_of(output))
    assert len(histories[0]) == 9
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def losses_of(output: Path) -> list[float]:
    entries = json.loads((output / "history.json").read_text())["entries"]
    return [entry[name] for entry in entries for name in ("loss", "eval_loss") if name in entry]
