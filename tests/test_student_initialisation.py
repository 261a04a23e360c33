"""Layer-dropped copies: the right layers, a model like any other, and nothing left behind by mistakes."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer, save_teacher
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from benchmarks.tiny_architectures import tiny_config, tiny_model
from knowledge_store.errors import InputError
from student_train.training.initialisation import initialise
from student_train.training.models import rebuild


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("deep") / "deep", layers=4)


def test_the_named_layers_are_kept(deep, tmp_path):
    made = initialise(str(deep), [0, 3], tmp_path / "student")
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (deep, tmp_path / "student"))
    assert (made.layers, made.layers_before) == (2, 4)
    assert made.parameters == student.num_parameters() < made.parameters_before == teacher.num_parameters()
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    for new, old in enumerate([0, 3]):
        for mine, theirs in zip(student.model.layers[new].parameters(), teacher.model.layers[old].parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert student.model.layers[new].self_attn.layer_idx == new
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert next(student.parameters()).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == make_tokenizer().get_vocab()
    assert (tmp_path / "student" / "model.safetensors").exists()
    assert student.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)  # the cache has its two layers


def test_all_layers_is_the_same_model(deep, tmp_path):
    initialise(str(deep), [0, 1, 2, 3], tmp_path / "student")
    ids = torch.tensor([[5, 6, 7, 8]])
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (deep, tmp_path / "student"))
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, student(ids).logits)


def test_per_layer_settings_follow_their_layers():
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=4,
    )
    student = rebuild(Gemma3ForCausalLM(config), [0, 3])
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert student(torch.arange(8)[None]).logits.shape == (1, 8, 64)


@pytest.mark.parametrize("architecture", ["gemma3", "fuyu", "got_ocr2"])
def test_of_a_model_of_texts_and_images_the_language_model_is_kept(tmp_path, architecture):
    both = tiny_model(tiny_config(architecture))
    both.save_pretrained(tmp_path / "both")
    make_tokenizer().save_pretrained(tmp_path / "both")
    made = initialise(str(tmp_path / "both"), [0, 1, 2, 3], tmp_path / "all")
    assert made.layers_before == made.layers == 4
    tokens = torch.arange(20)[None] + 5
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    assert student.config.get_text_config() is student.config
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=tokens).logits, both(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    made = initialise(str(tmp_path / "both"), [0, 3], tmp_path / "half")
    assert (made.layers, made.layers_before) == (2, 4)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for kept, layer in zip(half.model.layers, (0, 3), strict=True):
        for name, parameter in kept.named_parameters():
            assert torch.equal(parameter, student.model.layers[layer].get_parameter(name))


def test_other_names_for_the_same_things():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32))
    student = rebuild(model, [0, 2])
    assert student.config.n_layer == len(student.transformer.h) == 2
    assert torch.equal(student.transformer.h[1].mlp.c_fc.weight, model.transformer.h[2].mlp.c_fc.weight)


def test_a_mark_of_quantisation_is_taken_off(deep, tmp_path):
    """Models widened from GGUF carry one, and refuse to be saved while they do."""
    model = AutoModelForCausalLM.from_pretrained(deep)
    model.config.quantization_config = {"quant_method": "gguf"}
    copy = rebuild(model)
    assert not hasattr(copy.config, "quantization_config")
    copy.save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    ("layers", "message"),
    [([0, 4], "layer 4 does not exist"), ([-1], "layer -1"), ([1, 1], "named twice"), ([], "no layers"), ([2, 0], "order")],
)
def test_layers_that_cannot_be(deep, tmp_path, layers, message):
    with pytest.raises(InputError, match=message):
        initialise(str(deep), layers, tmp_path / "student")
    assert not any(tmp_path.iterdir())


def test_output_is_never_overwritten(deep, tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(InputError, match="exists already"):
        initialise(str(deep), [0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in ((tmp_path / "empty", "no config.json"), (tmp_path / "absent", "there is no folder")):
        with pytest.raises(InputError, match=message):
            initialise(str(source), [0], tmp_path / "student")
    broken = save_teacher(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights that can be used"):
        initialise(str(broken), [0], tmp_path / "student")
