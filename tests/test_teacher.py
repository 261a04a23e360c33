"""A teacher's logits, slice by slice, are its own logits: whatever the model does behind its head, however rows are padded."""

from __future__ import annotations

import json
import shutil
import struct
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT, make_model, make_tokenizer, save_teacher
from processes import Notes

from knowledge_store.errors import InputError
from knowledge_store.model_files import hub_folder
from student_train.training.models import load_model, load_tokenizer
from teacher_dump.teachers import local as teacher_module
from teacher_dump.teachers.files import check_local_teacher, model_files
from teacher_dump.teachers.local import find_device, load_teacher
from teacher_dump.teachers.protocol import Ability

VOCABULARY = 408
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}

MODELS = {
    "gemma2": (transformers.Gemma2Config, {**SMALL, **HEADS, "final_logit_softcapping": 3.0, "sliding_window": 8}, True),
    "granite": (transformers.GraniteConfig, {**SMALL, **HEADS, "logits_scaling": 4.0}, True),
    "cohere": (transformers.CohereConfig, {**SMALL, **HEADS, "logit_scale": 0.25}, True),
    "llama-tied": (transformers.LlamaConfig, {**SMALL, **HEADS, "tie_word_embeddings": True}, False),
    "llama-untied": (transformers.LlamaConfig, {**SMALL, **HEADS, "tie_word_embeddings": False}, False),
    "mistral": (transformers.MistralConfig, {**SMALL, **HEADS, "sliding_window": 6}, False),
    "qwen3": (transformers.Qwen3Config, {**SMALL, **HEADS}, False),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        False,
    ),
}


def make_teacher(folder: Path, config_class, arguments: dict) -> Path:
    torch.manual_seed(1)
    config = config_class(**arguments, initializer_range=0.2, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def padded(lengths: list[int], longest: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens of these lengths, and their mask. The same tokens on whichever side the padding is."""
    generator = np.random.default_rng(0)
    tokens, mask = np.zeros((len(lengths), longest), np.int64), np.zeros((len(lengths), longest), bool)
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if left else slice(0, length)
        tokens[row, place] = generator.integers(0, VOCABULARY, length)
        mask[row, place] = True
    return tokens, mask


def sliced_logits(teacher, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """All logits at attended positions, sequence after sequence, by way of slices."""
    rows, positions = (torch.from_numpy(each) for each in np.nonzero(mask))
    prediction = teacher.predict(tokens, mask)
    parts = [(part, logits.clone()) for part, logits in prediction.logit_slices(rows, positions)]
    assert [part.start for part, _ in parts] == [0, *(part.stop for part, _ in parts[:-1])]
    return torch.cat([logits for _, logits in parts]).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_own_and_padding_changes_nothing(tmp_path, name, monkeypatch):
    config_class, arguments, changes_logits = MODELS[name]
    reporter = Notes()
    folder = make_teacher(tmp_path / name, config_class, arguments)
    teacher = load_teacher(str(folder), device="cpu", reporter=reporter)
    assert teacher.whole_logits is changes_logits
    assert Ability.HIDDEN_STATES in teacher.abilities
    tokens = np.arange(16).reshape(2, 8)
    count = teacher.description["layers"]
    answer = teacher.predict(tokens, np.ones(tokens.shape, bool), layers=(0, -1, count))
    with torch.inference_mode():
        states = teacher.model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    for layer in (0, -1):
        torch.testing.assert_close(answer.layer_states(layer), states[layer], rtol=1e-4, atol=1e-5)
    assert answer.layer_states(count).shape == states[-1].shape  # before the last norm
    assert len(reporter.notes) == changes_logits
    assert all("changes its logits after the head, so whole logits are used" in note for note in reporter.notes)
    monkeypatch.setitem(teacher_module.SLICE_LOGITS, "cpu", 5 * teacher.vocabulary_size)  # five positions a slice

    lengths = [3, 11, 7]
    tokens, mask = padded(lengths, 11, left=False)
    with torch.inference_mode():
        alone = [
            teacher.model(torch.from_numpy(row[kept][None])).logits[0].numpy() for row, kept in zip(tokens, mask, strict=True)
        ]
    for left in (False, True):
        found = sliced_logits(teacher, *padded(lengths, 13, left))
        np.testing.assert_allclose(found, np.concatenate(alone), atol=1e-4, rtol=0)
    assert np.abs(np.concatenate(alone)).max() > 0.05  # an atol that everything passes would show nothing


def test_the_facts_of_a_teacher(loaded_teacher, teacher_folder):
    facts = loaded_teacher.description
    assert facts["vocabulary_size"] == loaded_teacher.vocabulary_size == len(loaded_teacher.tokenizer) + 8
    assert facts["max_positions"] == 256 and facts["dtype"] == "float32" and facts["model_type"] == "llama"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= facts["files"].keys()
    assert all(len(sha256) == 64 for sha256 in facts["files"].values())


def test_texts_of_tokens_join_to_the_text(loaded_teacher):
    texts, names = loaded_teacher.tokens()
    ids = loaded_teacher.tokenizer(TEXT)["input_ids"]
    assert "".join(texts[token] for token in ids) == TEXT
    assert len(texts) == len(names) == loaded_teacher.vocabulary_size
    assert texts[-1] is None and names[-1] is None  # rows of the head that no token uses
    assert names[0] == texts[0] == "<|end|>"


def test_a_decoder_that_drops_leading_spaces_still_shows_them(loaded_teacher):
    """SentencePiece's way: words carry their space in front, and a text's first space is dropped when it is decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁the": 1, "▁lamp": 2, "s": 3, "▁a": 4, "<0x0A>": 5}
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary], 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    teacher = teacher_module.LocalTeacher(
        loaded_teacher.model, tokenizer, {"vocabulary_size": 7}, loaded_teacher.device, whole_logits=False
    )
    assert teacher.tokens()[0] == ["<unk>", " the", " lamp", "s", " a", "\n", None]


def test_half_precision_is_kept_as_it_is_asked_for(teacher_folder):
    teacher = load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu")
    assert teacher.model.dtype == torch.bfloat16 and teacher.description["dtype"] == "bfloat16"
    assert not teacher.whole_logits


def test_a_half_precision_teacher_is_float32_on_a_cpu(tmp_path):
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path), device="cpu").model.dtype == torch.float32


def refusal(folder: Path, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_teacher(str(folder), **{"device": "cpu", **arguments})
    return str(caught.value)


@pytest.fixture
def folder(tmp_path, teacher_folder) -> Path:
    """A copy of the teacher's folder, to be broken."""
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def test_a_folder_without_a_part_of_the_teacher_is_refused(folder):
    for name, message in (("tokenizer.json", "has no tokenizer"), ("config.json", "has no config.json")):
        (folder / name).rename(folder / "hidden")
        assert message in refusal(folder)
        (folder / "hidden").rename(folder / name)
    (folder / "model.safetensors").unlink()
    assert "has no weights that can be used: weights must be safetensors or GGUF" in refusal(folder)
    (folder / "model.Q4.gguf").touch()
    assert "it has model.Q4.gguf; pass --gguf-file" in refusal(folder)


@pytest.mark.parametrize("name", ["tekken.json", "spiece.model", "tiktoken.model", "sentencepiece.bpe.model"])
def test_a_vocabulary_of_any_name_is_known_hashed_and_downloaded(folder, monkeypatch, name):
    (folder / "tokenizer.json").rename(folder / name)
    check_local_teacher(str(folder))
    assert folder / name in model_files(folder, None)
    wanted: list[str] = []

    def snapshot(model: str, *, allow_patterns: list[str], **_) -> Path:
        wanted.extend(allow_patterns)
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    hub_folder("somebody/tiny")
    assert any(fnmatch(name, pattern) for pattern in wanted)


def test_pickled_weights_are_never_loaded(folder):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder / "sprung",))

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    assert "weights must be safetensors or GGUF" in refusal(folder)
    assert not (folder / "sprung").exists()


def test_an_index_or_configuration_cannot_name_a_pickle(folder):
    """transformers opens what these name, whatever it was told of safetensors."""
    index = folder / "model.safetensors.index.json"
    for name, message in (
        ("pytorch_model.bin", "'pytorch_model.bin': weights must be safetensors or GGUF"),
        ("../elsewhere.safetensors", "which is no file of"),
        ("absent.safetensors", "which is no file of"),
        (5, "weights must be safetensors or GGUF"),
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert message in refusal(folder)
        with pytest.raises(InputError, match="names weights in"):
            load_model(str(folder))
    for text in ("[]", "{", "[" * 100_000, '{"weight_map": 3}'):
        index.write_text(text)
        assert str(index) in refusal(folder)
    index.unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("pytorch_model.bin", "../elsewhere.safetensors", "adapter_model.bin"):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        assert "names weights in" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert "is an adapter to a model that lies elsewhere" in refusal(folder)
    (folder / "config.json").unlink()  # as peft saves one
    assert "is an adapter to a model that lies elsewhere" in refusal(folder)


def test_a_pickle_is_refused_under_every_name(folder):
    torch.save({"model.norm.weight": torch.ones(1)}, folder / "weights.bin")
    assert "is not a GGUF file" in refusal(folder, gguf_file="weights.bin")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load_model(str(folder), "weights.bin")
    (folder / "weights.bin").rename(folder / "model.safetensors")  # a pickle that is called otherwise is not opened as one
    assert "cannot be loaded" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which can run code, and is never loaded" in refusal(folder)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle"):
        load_model(str(folder))


def test_a_folder_with_a_gguf_file_is_no_adapter_either(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    for load in (load_teacher, load_model, load_tokenizer):
        with pytest.raises(InputError, match="is an adapter to a model that lies elsewhere"):
            load(str(folder), "model.gguf")


@pytest.fixture
def cached(folder, tmp_path, monkeypatch) -> Path:
    """The teacher as the model "somebody/tiny" in a cache of the hub; its files' folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub/models--somebody--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("a" * 40)
    return shutil.copytree(folder, place / "snapshots" / ("a" * 40))


def test_a_model_of_the_hub_is_checked_as_a_folder_is(cached):
    tokens = torch.arange(9)[None]
    student, teacher = load_model("somebody/tiny"), load_teacher("somebody/tiny", device="cpu")
    assert torch.equal(student(input_ids=tokens).logits, teacher.model(input_ids=tokens).logits)
    assert teacher.description["name"] == "somebody/tiny"

    def refused(message: str, *arguments: str) -> None:
        for load in (load_model, load_teacher):
            with pytest.raises(InputError, match=message):
                load(*(arguments or ("somebody/tiny",)))

    refused(
        "there is no folder somebody/large, and the hub, which may have a model of that name, cannot be reached",
        "somebody/large",
    )
    torch.save({"model.norm.weight": torch.ones(32)}, cached / "weights.bin")
    refused("is not a GGUF file", "somebody/tiny", "weights.bin")
    index = cached / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "weights.bin"}}')
    (cached / "model.safetensors").rename(cached / "other.safetensors")
    refused("names weights in 'weights.bin'")
    index.unlink()
    (cached / "adapter_config.json").write_text("{}")
    refused("is an adapter to a model that lies elsewhere|is not the configuration of an adapter")
    (cached / "adapter_config.json").unlink()
    (cached / "other.safetensors").unlink()
    refused(r"weights\.bin is a pickle")


def test_remote_code_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")
    assert "cannot be loaded" in refusal(folder)
    assert not (folder / "sprung").exists()


def test_incomplete_and_damaged_weights_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "incomplete: model.norm.weight" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00 not weights")
    assert "cannot be loaded" in refusal(folder)


def test_a_damaged_gguf_file_and_a_missing_one_are_refused(folder):
    assert "there is no GGUF file" in refusal(folder, gguf_file="model.gguf")
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    assert "cannot be loaded" in refusal(folder, gguf_file="model.gguf")
    (folder / "model.gguf").write_bytes(b"nothing like it")
    assert "cannot be loaded" in refusal(folder, gguf_file="model.gguf")


def gguf(layers: int, merges: list[str]) -> bytes:
    """A GGUF file of a Llama of some hundred bytes: three tokens, no tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def texts(key: str, values: list[str]) -> bytes:
        return text(key) + struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))

    def pair(key: str, value: int | str) -> bytes:
        kind = struct.pack("<I", 8 if isinstance(value, str) else 4)
        return text(key) + kind + (text(value) if isinstance(value, str) else struct.pack("<I", value))

    counts = {"embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 64, "block_count": layers}
    pairs = [pair("general.architecture", "llama"), pair("tokenizer.ggml.model", "gpt2")]
    pairs += [texts("tokenizer.ggml.tokens", ["a", "b", "c"]), texts("tokenizer.ggml.merges", merges)]
    pairs += [pair(f"llama.{key}", value) for key, value in counts.items()]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path):
    folder = tmp_path  # no tokenizer.json, which would be taken instead
    (folder / "config.json").write_text("{}")
    (folder / "model.gguf").write_bytes(gguf(1, ["a b"]))  # which has no token for "ab"
    assert "cannot be loaded: range end index" in refusal(folder, gguf_file="model.gguf")
    with pytest.raises(InputError, match=r"cannot load a tokenizer .* range end index"):
        load_tokenizer(str(folder), "model.gguf")


def test_other_things_that_are_no_teacher(folder):
    assert "is a file: name the teacher's folder" in refusal(folder / "config.json")
    assert "there is no folder" in refusal(folder / "elsewhere")
    assert "there is no dtype 'int3' for a teacher" in refusal(folder, dtype="int3")
    for device in ("abacus", "cuda:99", "meta"):
        with pytest.raises(InputError, match=device):
            find_device(device)


def test_a_tiny_head_over_a_wide_vocabulary_keeps_its_size(tmp_path):
    folder = save_teacher(tmp_path, hidden_size=8)
    assert load_teacher(str(folder), device="cpu").description["hidden_size"] == 8
