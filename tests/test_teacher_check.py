"""`check`: the teacher asked again agrees, whatever the batch and dtype; damage, another teacher, another tokenizer do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_teacher, story_rows, write_jsonl
from processes import Command
from safetensors.torch import load_file, save_file

from knowledge_store import KnowledgeStore
from knowledge_store.calibration import Calibration, write_calibration
from knowledge_store.errors import InputError
from knowledge_store.sequences import token_hash
from teacher_dump import DumpConfig, dump, teacher_pass
from teacher_dump.agreement import AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER, check, describe
from teacher_dump.extraction import extract_positions
from teacher_dump.plan import describe_tokenizer
from teacher_dump.teacher import load_teacher

SELECTIONS = {
    "top-k": {},
    "no draws": {"tail_draws": 0},
    "top-p": {"selection": "top-p", "top_p": 0.6, "max_k": 12, "tail_draws": 2},
    "random-sampling": {"selection": "random-sampling", "draws": 9},
}


@pytest.fixture
def make_dump(tmp_path, teacher_folder, loaded_teacher):
    def make(**options) -> Path:
        corpus = write_jsonl(tmp_path / "corpus.jsonl", story_rows(9))
        store = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        config = DumpConfig(str(teacher_folder), (corpus,), store, "d", max_length=40, shard_size=4, **options)
        dump(config, teacher=loaded_teacher)
        corpus.unlink()  # it is not needed again
        return store

    return make


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_teacher_itself_agrees(make_dump, loaded_teacher, selection):
    store = make_dump(**SELECTIONS[selection])
    found = check(store, loaded_teacher, batch_size=1)
    assert (found.verdict, found.sequences_off, found.notes) == (AGREES, 0, ())
    assert found.sequences == KnowledgeStore.open(store).sequence_count() and found.positions > 100
    assert found.noise < 0.001
    for name, each in found.differences.items():
        assert each.quantiles[-1] < 1e-3, name
        assert not sum(each.steps) or each.steps[0] > 0.99
    assert found.changed_top_1 is None if selection == "random-sampling" else found.changed_top_1 == 0
    assert found.moved_draws is None if selection == "no draws" else found.moved_draws < 0.01


def test_a_calibrated_dump_agrees(make_dump, loaded_teacher, tmp_path):
    figures = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}
    tokenizer = describe_tokenizer(loaded_teacher.tokenizer)
    calibration = Calibration("temperature", 1.7, loaded_teacher.description, tokenizer, {}, 9, figures, figures)
    write_calibration(tmp_path / "c.json", calibration)
    found = check(make_dump(calibration=tmp_path / "c.json"), loaded_teacher)
    assert found.verdict == AGREES
    assert found.differences["tail at T=1.7"].quantiles[-1] < 1e-3


def test_a_sample_is_drawn_by_its_seed(store_folder, loaded_teacher):
    first, again, other = (check(store_folder, loaded_teacher, dump="train", sample=5, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.sequences == 5
    assert first.positions != other.positions


def test_another_dtype_is_noise(store_folder, teacher_folder):
    found = check(store_folder, load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu"), dump="train")
    assert found.verdict == AGREES
    assert 0.001 < found.noise < found.limits.typical and found.limits.typical > 0.1
    assert found.differences["token"].steps[0] < 0.999
    assert any("made in float32, and the teacher is asked in bfloat16" in each for each in found.notes)


def perturbed(folder: Path, source: Path, size: float) -> Path:
    """A copy of a teacher, one layer's weights changed."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(each for each in weights if "layers.1.mlp.down_proj" in each)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weights[name].shape, generator=generator)
    weights[name] = weights[name] + size * weights[name].std() * noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("size", [0.03, 0.5])
def test_a_changed_layer_is_another_teacher(store_folder, teacher_folder, tmp_path, size):
    found = check(store_folder, str(perturbed(tmp_path / "other", teacher_folder, size)), dump="train", device="cpu")
    assert found.verdict == OTHER_TEACHER
    assert any("not those that the manifest names" in each for each in found.notes)


def test_other_weights_and_another_size_are_another_teacher(store_folder, tmp_path):
    other = save_teacher(tmp_path / "other", seed=5)
    found = check(store_folder, str(other), dump="train", device="cpu")
    assert found.verdict == OTHER_TEACHER and found.changed_top_1 > 0.3
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    found = check(store_folder, str(other), dump="train", device="cpu")
    assert (found.verdict, found.positions) == (OTHER_TEACHER, 0)
    assert "knows 16 positions" in found.reasons[0]


def test_saved_again_it_is_the_same_teacher(store_folder, teacher_folder, tmp_path):
    """Other bytes, the same numbers: what it answers decides, and the note says that its files are others."""
    shutil.copytree(teacher_folder, tmp_path / "again")
    weights = load_file(tmp_path / "again/model.safetensors")
    save_file(weights, tmp_path / "again/model.safetensors", metadata={"format": "pt", "saved": "again"})
    found = check(store_folder, str(tmp_path / "again"), dump="train", device="cpu")
    assert found.verdict == AGREES
    assert any("not those that the manifest names" in each for each in found.notes)


def test_another_tokenizer_is_told(store_folder, teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [name for name, token in vocabulary.items() if token in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    found = check(store_folder, str(tmp_path / "other"), dump="train", device="cpu")
    assert found.verdict == OTHER_TOKENIZER
    assert "2 of the dump's" in found.reasons[0]
    assert found.sequences_off == 0  # the same weights answer the same to the same ids


def shifted(name: str, by: float):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][3] += by

    return change


def first_two_swapped(arrays):
    ids = arrays["candidate_ids"].copy()
    ids[3, [0, 4]] = ids[3, [4, 0]]
    arrays["candidate_ids"] = ids


def another_candidate(arrays):
    ids, logprobs = arrays["candidate_ids"].copy(), arrays["candidate_logprobs"]
    taken = {*ids[3].tolist(), *arrays["tail_ids"][3].tolist()}
    ids[3, 4] = next(token for token in range(400) if token not in taken)
    arrays["candidate_ids"], arrays["candidate_logprobs"] = ids, logprobs


def other_draws(arrays):
    ids, counts = arrays["tail_ids"].copy(), arrays["tail_counts"].copy()
    free = [token for token in range(407, 0, -1) if token not in arrays["candidate_ids"][3]]
    ids[3], counts[3] = sorted(free[: ids.shape[1]]), 1
    arrays["tail_ids"], arrays["tail_counts"] = ids, counts


CHANGES = {
    "token": (shifted("token_logprob", -0.5), "token off by"),
    "candidates": (shifted("candidate_logprobs", -0.25), "candidates off by"),
    "tail": (shifted("tail_logprob", 0.25), "tail off by"),
    "swapped": (first_two_swapped, "candidates off by"),
    "another": (another_candidate, "candidates off by"),
    "draws": (other_draws, "draws off by"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_values_altered_through_the_writer_are_damage(make_dump, loaded_teacher, monkeypatch, change):
    """One position of one sequence: the file is published as it is, and its hashes are right."""
    spoil, says = CHANGES[change]
    spoilt = []

    def extract(batch):
        found = extract_positions(batch)
        for sequence, arrays in zip(batch.sequences, found, strict=True):
            if sequence.document.number == 5:
                spoil(arrays)
                spoilt.append(sequence)
        return found

    monkeypatch.setitem(teacher_pass.EXTRACTORS, "positions", extract)
    store = make_dump()
    assert spoilt
    found = check(store, loaded_teacher)
    assert found.verdict == DAMAGE and found.sequences_off == len(spoilt)
    numbers = {(5 << 16) + sequence.window for sequence in spoilt}
    assert {int(reason.split(",")[0].removeprefix("sequence ")) for reason in found.reasons} == numbers
    assert all(f", position 3: {says}" in reason for reason in found.reasons)


def test_values_altered_everywhere_are_damage_where_the_weights_are_the_dump_s_own(make_dump, loaded_teacher, monkeypatch):
    def extract(batch):
        found = extract_positions(batch)
        for arrays in found:
            arrays["token_logprob"] = arrays["token_logprob"] - 0.5
        return found

    monkeypatch.setitem(teacher_pass.EXTRACTORS, "positions", extract)
    found = check(make_dump(), loaded_teacher)
    assert found.verdict == DAMAGE and "values were altered, or this machine computes wrongly" in found.reasons[0]


def test_other_tokens_and_damaged_pages_are_damage(make_dump, loaded_teacher, monkeypatch):
    monkeypatch.setattr(teacher_pass, "token_hash", lambda ids: token_hash(ids) ^ (len(ids) == 40))
    store = make_dump()
    found = check(store, loaded_teacher)
    assert found.verdict == DAMAGE and "do not match the hash" in found.reasons[0]
    path = store / "d/positions/00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    found = check(store, loaded_teacher)
    assert found.verdict == DAMAGE and any(f"{path} is damaged" in each for each in found.reasons)


def test_the_differences_are_what_a_plain_computation_gives(store_folder, loaded_teacher, teacher_folder):
    """Against a float64 reference: |kept − log-softmax| less half a step, for every token of a dump."""
    found = check(store_folder, replace(loaded_teacher), dump="heldout")
    opened = KnowledgeStore.open(store_folder)
    off, moved = [], []
    for ordinal in range(opened.sequence_count("heldout")):
        rows, _ = opened.kept(ordinal, "heldout")
        tokens = rows["token_id"].to_numpy().astype(np.int64)
        with torch.inference_mode():
            logits = loaded_teacher.model(torch.from_numpy(tokens[None])).logits[0].double()
        logprobs = torch.log_softmax(logits, 1)[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])].numpy()
        kept = rows["token_logprob"].to_numpy()[1:]
        off += np.maximum(np.abs(kept - logprobs) - 0.0625, 0).tolist()
        moved += np.abs(np.round(logprobs * 8) - kept * 8).tolist()
    assert found.differences["token"].values == len(off) == found.positions
    np.testing.assert_allclose(found.differences["token"].quantiles[-1], max(off), atol=1e-4)
    np.testing.assert_allclose(found.differences["token"].steps[0], np.mean(np.array(moved) == 0), atol=0.01)


def test_what_cannot_be_checked(store_folder, loaded_teacher, tmp_path):
    for options, message in (
        ({"sample": 0}, "--sample is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"dump": "nothing"}, "has no dump 'nothing'"),
        ({}, "name a dump"),
    ):
        with pytest.raises(InputError, match=message):
            check(store_folder, loaded_teacher, **options)


def test_the_command(store_folder, teacher_folder, tmp_path):
    def run(*arguments):
        return Command("check", *arguments, folder=tmp_path / "log").wait()

    found = run(store_folder, "--teacher", teacher_folder, "--dump", "train", "--sample", 6)
    assert found.returncode == 0, found
    assert "6 sequences asked again" in found.stdout and "Verdict: agrees" in found.stdout
    assert "likeliest token changed: 0.000% of positions" in found.stdout
    assert "asking the teacher again: 100%" in found.stderr
    other = save_teacher(tmp_path / "other", seed=5)
    found = run(store_folder, "--teacher", other, "--dump", "train", "--sample", 6)
    assert found.returncode == 1 and "Verdict: another teacher" in found.stdout
    for arguments, message in (
        ((tmp_path / "none", "--teacher", teacher_folder), "there is no store at"),
        ((store_folder, "--teacher", tmp_path / "none", "--dump", "train"), "there is no teacher folder"),
        ((store_folder, "--teacher", teacher_folder, "--dump", "train", "--sample", 0), "--sample is 0"),
    ):
        found = run(*arguments)
        assert found.returncode == 2 and found.stderr.startswith("Error: ") and message in found.stderr
        assert len(found.stderr.splitlines()) == 1
    found = run("--help")
    assert found.returncode == 0 and "teacher-dump check knowledge/ --teacher" in " ".join(found.stdout.split())


def test_a_person_is_told_all_of_it(store_folder, loaded_teacher):
    text = "\n".join(describe(check(store_folder, loaded_teacher, dump="heldout")))
    for words in ("same step", "99.9 %", "candidates", "selection", "draws", "Another teacher: more than 50% of them"):
        assert words in text
