"""What a teacher does is found by asking it: no answer depends on a batch, on what came before, or on what comes later."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, write_jsonl
from processes import Notes
from transformers import AutoModelForSeq2SeqLM

from benchmarks.tiny_architectures import tiny_config, tiny_model
from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from teacher_dump import CalibrateConfig, CheckConfig, DumpConfig, calibrate, check, dump
from teacher_dump.dumping import batches
from teacher_dump.dumping.batches import length_batches
from teacher_dump.teachers.local import LocalTeacher, load_teacher
from teacher_dump.teachers.protocol import Batching

LONGEST = 128
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2], "long_factor": [1.1, 1.5, 8.0, 40.0],
}  # fmt: skip


def save(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **settings) -> Path:
    tiny_model(tiny_config(architecture, **settings)).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def longrope(folder: Path, border: int, dtype: torch.dtype = torch.float32) -> Path:
    parameters = {**LONGROPE, "original_max_position_embeddings": border}
    return save(folder, "phi3", dtype, rope_parameters=parameters, original_max_position_embeddings=border)


def corpus(folder: Path, lengths: list[int]) -> Path:
    """Rows of so many tokens each: one a letter."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvw"), max(lengths))
    return write_jsonl(folder / "c.jsonl", [{"text": "".join(letters[:length])} for length in lengths])


def logprobs(teacher: LocalTeacher, token_ids: list[int]) -> torch.Tensor:
    """What the model by itself says of a text's tokens but the first."""
    tokens = torch.tensor([token_ids])
    with torch.inference_mode():
        logits = teacher.model(input_ids=tokens).logits[0, :-1].float()
    return torch.log_softmax(logits, dim=1).gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("border", [16, 50, 127])
def test_a_rope_that_looks_at_the_whole_batch_is_asked_in_two_sorts_of_batches(tmp_path, border, dtype):
    teacher = load_teacher(str(longrope(tmp_path / "t", border, dtype)), dtype=str(dtype).removeprefix("torch."), device="cpu")
    assert teacher.batching(LONGEST, 8 * LONGEST) == Batching("sides", border)
    assert teacher.batching(border, 8 * border) == Batching()  # none of its sequences is long


def test_its_dump_holds_what_each_sequence_is_told_alone_and_check_sees_a_dump_that_does_not(tmp_path, monkeypatch):
    teacher = load_teacher(str(longrope(tmp_path / "t", 32)), device="cpu")
    rows = corpus(tmp_path, [8, 20, 31, 40, 70, 100])
    reporter = Notes()
    config = DumpConfig("t", (rows,), tmp_path / "s", "right", max_length=LONGEST, batch_size=8, top_k=4)
    dump(config, teacher=teacher, reporter=reporter)
    assert "beside a text of more than 32 tokens" in " ".join(reporter.notes)
    store = KnowledgeStore.open(tmp_path / "s")
    for sequence in store:
        kept = sequence["token_logprob"][1:]
        np.testing.assert_allclose(kept, logprobs(teacher, sequence["input_ids"].tolist()), atol=0.15)
    assert check(CheckConfig(tmp_path / "s", "t", dump="right"), teacher=teacher)["positions"].verdict == "agrees"

    monkeypatch.setattr(LocalTeacher, "batching", lambda *_: Batching())
    dump(DumpConfig("t", (rows,), tmp_path / "s", "wrong", max_length=LONGEST, batch_size=8, top_k=4), teacher=teacher)
    assert check(CheckConfig(tmp_path / "s", "t", dump="wrong"), teacher=teacher)["positions"].verdict == "damage"


def test_answers_that_depend_on_what_was_asked_before_are_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    teacher = load_teacher(str(save(tmp_path / "t", "llama", rope_parameters=rope, max_position_embeddings=64)), device="cpu")
    assert teacher.batching(64, 512) == Batching()
    with pytest.raises(InputError, match=r"after another text than before it.*rope_type is 'dynamic'.*smaller --max-length"):
        teacher.batching(LONGEST, 8 * LONGEST)


def test_a_teacher_that_differs_by_batch_for_another_reason_is_asked_one_by_one(tmp_path):
    """Sparse attention that picks the best of all places of a batch, some of them padding, picks others where they tie."""
    teacher = load_teacher(str(save(tmp_path / "t", "axk2")), device="cpu")
    assert teacher.batching(LONGEST, 8 * LONGEST) == Batching("alone")


def test_batches_hold_what_may_be_together():
    lengths = [5, 40, 17, 16, 33, 16, 90]
    for batching in (Batching(), Batching("sides", 16), Batching("alone")):
        made = length_batches(lengths, 200, batching)
        assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
        pairs = [(lengths[one], lengths[other]) for batch in made for one in batch for other in batch if one != other]
        assert all(batching.together(*pair) for pair in pairs)
    assert [len(batch) for batch in length_batches(lengths, 200, Batching("sides", 16))] == [2, 2, 3]
    assert [len(batch) for batch in length_batches(lengths, 200, Batching("alone"))] == [1] * 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("bert", {"is_decoder": False}), ("xlm-roberta", {})],
)
def test_models_that_look_ahead_are_refused(tmp_path, architecture, settings, dtype):
    folder = save(tmp_path / "t", architecture, **settings)
    with pytest.raises(InputError, match=r"t looks ahead .*choose a causal language model"):
        load_teacher(str(folder), device="cpu", dtype=dtype)


def test_the_same_architectures_as_decoders_are_not(tmp_path):
    for architecture, settings in (("gemma3_text", {}), ("bert", {"is_decoder": True}), ("llama", {})):
        load_teacher(str(save(tmp_path / architecture, architecture, **settings)), device="cpu")


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_encoder_decoders_are_refused(tmp_path, architecture):
    AutoModelForSeq2SeqLM.from_config(tiny_config(architecture)).save_pretrained(tmp_path / "t")
    make_tokenizer().save_pretrained(tmp_path / "t")
    with pytest.raises(InputError, match=rf"\({architecture}\) is an encoder-decoder.*choose a causal language model"):
        load_teacher(str(tmp_path / "t"), device="cpu")


PADDED = 8


def save_padded(folder: Path, *more: int) -> Path:
    """A teacher whose head gives −inf to the last tokens of its vocabulary, which its tokenizer does not know, and to more."""
    config = tiny_config("phi")
    model = tiny_model(config)
    with torch.no_grad():
        model.lm_head.bias[[*range(config.vocab_size - PADDED, config.vocab_size), *more]] = -torch.inf
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{"top_k": 5}, {"selection": "top-p", "top_p": 0.9}, {"selection": "threshold"}])
def test_rows_that_pad_the_head_are_given_no_probability(tmp_path, options):
    teacher = load_teacher(str(save_padded(tmp_path / "t")), device="cpu")
    first = teacher.vocabulary_size - PADDED
    assert teacher.impossible_tokens.tolist() == list(range(first, first + PADDED))
    rows = corpus(tmp_path, [8, 30, 12])
    dump(DumpConfig("t", (rows,), tmp_path / "s", "d", max_length=40, **options), teacher=teacher)
    for sequence in KnowledgeStore.open(tmp_path / "s"):
        assert np.isfinite(sequence["token_logprob"]).all() and not (sequence["candidate_ids"] >= first).any()
        np.testing.assert_allclose(sequence["token_logprob"][1:], logprobs(teacher, sequence["input_ids"].tolist()), atol=0.15)
    assert check(CheckConfig(tmp_path / "s", "t"), teacher=teacher)["positions"].verdict == "agrees"
    fit = calibrate(CalibrateConfig("t", (rows,), max_length=40), teacher=teacher)
    assert np.isfinite(fit.calibration.value) and fit.calibration.before["nll"] > 0


def test_tokens_that_are_never_given_are_no_targets_and_no_candidates(tmp_path):
    rows = corpus(tmp_path, [8])
    written = make_tokenizer()(json.loads(rows.read_text())["text"])["input_ids"][-1]
    teacher = load_teacher(str(save_padded(tmp_path / "t", written)), device="cpu")
    size = teacher.vocabulary_size
    with pytest.raises(InputError, match=f"--top-k {size} is above .* {size - PADDED - 1} tokens that it ever gives"):
        dump(DumpConfig("t", (rows,), tmp_path / "s", "d", top_k=size, max_length=40), teacher=teacher)
    with pytest.raises(InputError, match=rf"token {written} \(row 1 of corpus file 1\) is one that the teacher never gives"):
        dump(DumpConfig("t", (rows,), tmp_path / "s", "e", max_length=40), teacher=teacher)


def test_a_probe_that_finds_too_little_memory_says_so(tmp_path, loaded_teacher, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(LocalTeacher, "predict", exhausted)
    loaded_teacher._batchings.clear()
    config = DumpConfig("t", (corpus(tmp_path, [8]),), tmp_path / "s", "d", max_length=40)
    with pytest.raises(InputError, match="ran out of memory on 1 sequences of up to 40 tokens: give a smaller --batch-size"):
        batches.find_batching(config, loaded_teacher, 40)
