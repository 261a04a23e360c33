"""`check`: the teacher asked again agrees, whatever the batch and dtype; damage, another teacher, another tokenizer do not."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_model, make_tokenizer, save_teacher, story_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from processes import Command
from safetensors.torch import load_file, save_file
from stores import knowledge_of, make_manifest
from transformers import MixtralConfig, MixtralForCausalLM

from knowledge_store import KINDS, KnowledgeStore
from knowledge_store.calibration.file import Calibration, write_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds.positions import exact_steps
from teacher_dump import CheckConfig, DumpConfig, dump
from teacher_dump import check as check_dump
from teacher_dump.checking.agreement import AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER
from teacher_dump.checking.positions.verdicts import PositionsAgreement
from teacher_dump.checking.run import CHECKERS
from teacher_dump.corpus.tokenisation import describe_tokenizer
from teacher_dump.dumping import teacher_pass
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.extraction.distributions import extract_positions
from teacher_dump.extraction.positions import POSITIONS, QUANTISATION_STEP
from teacher_dump.teachers.local import LocalTeacher, load_teacher

SELECTIONS = {
    "top-k": {},
    "no draws": {"draw_weight": 0.0},
    "top-p": {"selection": "top-p", "top_p": 0.6, "max_k": 12, "draw_weight": 0.2, "draw_seed": 7},
    "threshold": {"selection": "threshold", "draw_weight": 0.1},
}


def check(store: Path, teacher: str | LocalTeacher, **options) -> PositionsAgreement:
    """Check positions with a loaded teacher, or with the teacher in a folder."""
    if isinstance(teacher, str):
        return check_dump(CheckConfig(store, teacher, **options))["positions"]
    return check_dump(CheckConfig(store, "loaded", **options), teacher)["positions"]


@pytest.fixture
def make_dump(tmp_path, teacher_folder, loaded_teacher):
    def make(teacher=loaded_teacher, **options) -> Path:
        corpus = write_jsonl(tmp_path / "corpus.jsonl", story_rows(9))
        store = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        config = DumpConfig(str(teacher_folder), (corpus,), store, "d", max_length=40, shard_size=4, **options)
        dump(config, teacher=teacher)
        corpus.unlink()  # it is not needed again
        return store

    return make


@pytest.fixture(scope="module")
def teachers(loaded_teacher, teacher_folder) -> dict:
    """The teacher by its dtype."""
    return {"float32": loaded_teacher, "bfloat16": load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu")}


def spoil_draws(monkeypatch, change) -> None:
    """Have every dump from here on keep other draws, (N, M) ids by these, in order and as many as before."""

    def extract(batch):
        found = extract_positions(batch)
        for arrays in found:
            ids, vocabulary = arrays["tail_ids"], batch.prediction.teacher.vocabulary_size
            changed = np.sort(np.where(ids >= 0, change(ids, vocabulary), vocabulary), axis=1)
            arrays["tail_ids"] = np.where(changed < vocabulary, changed, -1)
        return found

    monkeypatch.setitem(EXTRACTORS, "positions", replace(POSITIONS, function=extract))


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
    assert found.changed_top_1 is None if selection == "threshold" else found.changed_top_1 == 0
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


def shifted(name: str, steps: int):
    """Position 3: one value (the last candidate's), and all so that they sum to one again, as what is written must."""

    def change(arrays):
        for each in ("token_logprob", "candidate_logprobs", "tail_logprob"):
            arrays[each] = arrays[each].copy()
        arrays[name][3, ...].reshape(-1)[-1] += steps * QUANTISATION_STEP
        total = np.logaddexp.reduce([*arrays["candidate_logprobs"][3], arrays["tail_logprob"][3]])
        arrays["candidate_logprobs"][3] -= total
        arrays["tail_logprob"][3] -= total

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
    ids = arrays["tail_ids"].copy()
    free = [token for token in range(407, 0, -1) if token not in arrays["candidate_ids"][3]]
    count = (ids[3] >= 0).sum()
    ids[3, :count] = sorted(free[:count])
    arrays["tail_ids"] = ids


def fewer_draws(arrays):
    ids = arrays["tail_ids"].copy()
    ids[3, (ids[3] >= 0).sum() - 1] = -1
    arrays["tail_ids"] = ids


CHANGES = {
    "token": (shifted("token_logprob", -2), "token off by"),
    "candidates": (shifted("candidate_logprobs", -2), "candidates off by"),
    "tail": (shifted("tail_logprob", 2), "tail off by"),
    "swapped": (first_two_swapped, "candidates off by"),
    "another": (another_candidate, "candidates off by"),
    "draws": (other_draws, "draws off by"),
    "a draw": (fewer_draws, "draws off by"),
}


ALTERED = [(change, "float32", "top-k") for change in CHANGES]
ALTERED += [("draws", "float32", "threshold")]
ALTERED += [("draws", "bfloat16", selection) for selection in ("top-k", "top-p", "threshold")]


@pytest.mark.parametrize(("change", "dtype", "selection"), ALTERED)
def test_values_altered_through_the_writer_are_damage(make_dump, teachers, monkeypatch, change, dtype, selection):
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

    monkeypatch.setitem(EXTRACTORS, "positions", replace(POSITIONS, function=extract))
    store = make_dump(teachers[dtype], **SELECTIONS[selection])
    assert spoilt
    found = check(store, teachers[dtype])
    assert found.verdict == DAMAGE and found.sequences_off == len(spoilt)
    numbers = {(5 << 16) + sequence.window for sequence in spoilt}
    assert {int(re.match(r"sequence (\d+)", reason)[1]) for reason in found.reasons} == numbers
    assert all(f", position 3: {says}" in reason for reason in found.reasons)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("made", ["float32", "bfloat16"])
def test_draws_that_others_made_are_damage(make_dump, teachers, monkeypatch, made, asked):
    """All of them, in every dtype; the values beside them are sound. Also where the weights' file is another."""
    options = {"top_k": 1, "draw_weight": 0.05}
    assert check(make_dump(teacher=teachers[made], **options), teachers[asked]).verdict == AGREES
    spoil_draws(monkeypatch, lambda ids, vocabulary: (ids + 137) % vocabulary)
    store = make_dump(teacher=teachers[made], **options)
    found = check(store, teachers[asked])
    assert found.verdict == DAMAGE and found.reasons[0].startswith("draws are off in most sequences: in the median one its")
    assert found.draws_off > 0.05 and found.moved_draws > 0.95 and found.noise < found.limits.typical
    text = "\n".join(found.lines)
    assert "draws that fall on another token: 9" in text and "Noise in draws: those of a sequence off by up to" in text
    again = replace(teachers[asked], description={**teachers[asked].description, "files": {"model.safetensors": "ab"}})
    found = check(store, again)
    assert found.verdict == DAMAGE and any("draws may also tell of a teacher so near" in each for each in found.notes)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory) -> Path:
    """A teacher of 20,000 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), make_tokenizer()
    make_model(20_000).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_draws_of_many_tokens_are_damage_though_they_fall_near_by(make_dump, wide_folder, monkeypatch):
    """Noise moves most of so many, and by as much of the tail as the next token is away: not all of them, as damage does."""
    teachers = {dtype: load_teacher(str(wide_folder), dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}
    options = {"top_k": 1, "draw_weight": 0.05}
    honest = check(make_dump(teacher=teachers["bfloat16"], **options), teachers["float32"], sample=4)
    assert honest.verdict == AGREES and 0.3 < honest.moved_draws < honest.limits.moved
    spoil_draws(monkeypatch, lambda ids, vocabulary: (ids + 1) % vocabulary)
    found = check(make_dump(teacher=teachers["bfloat16"], **options), teachers["float32"], sample=4)
    assert found.verdict == DAMAGE and found.reasons[0].startswith("draws are off in most sequences")
    assert found.draws_off < found.limits.draws and found.moved_draws > found.limits.moved


def test_sequences_longer_than_the_dump_s_longest_are_never_asked(make_dump, loaded_teacher, monkeypatch):
    store = make_dump()
    lengths = KnowledgeStore.open(store).sequences()["length"].to_pylist()
    opened = KnowledgeStore.open(store).manifest()
    monkeypatch.setattr(KnowledgeStore, "manifest", lambda *_: replace(opened, plan={**opened.plan, "max_length": 20}))
    asked = []

    def predict(teacher, token_ids, mask, **more):
        asked.append(token_ids.shape[1])
        return original(teacher, token_ids, mask, **more)

    original = LocalTeacher.predict
    monkeypatch.setattr(LocalTeacher, "predict", predict)
    found = check(store, loaded_teacher)
    too_long = sum(length > 20 for length in lengths)
    assert 0 < too_long < len(lengths) and max(asked) <= 20
    assert found.verdict == DAMAGE and found.sequences_off == too_long
    assert found.reasons[0] == "sequence 65536: it has 33 tokens, and the dump's longest have 20"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_said_in_one_line(store_folder, loaded_teacher, monkeypatch, error):
    def predict(*_, **__):
        raise error

    monkeypatch.setattr(LocalTeacher, "predict", predict)
    with pytest.raises(InputError, match=r"on \d+ sequences of up to \d+ tokens: give a smaller --batch-size \(now 8"):
        check(store_folder, loaded_teacher, dump="train", batch_size=8)
    error = RuntimeError("a kernel failed")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        check(store_folder, loaded_teacher, dump="train", batch_size=8)


def test_what_no_selection_keeps_is_damage(make_dump, loaded_teacher, monkeypatch):
    """One sequence that cannot even be held against an answer; the others are."""

    def extract(batch):
        found = extract_positions(batch)
        for sequence, arrays in zip(batch.sequences, found, strict=True):
            if (sequence.document.number, sequence.window) == (5, 0):
                arrays["candidate_ids"][3, 1] = arrays["candidate_ids"][3, 0]
        return found

    monkeypatch.setitem(EXTRACTORS, "positions", replace(POSITIONS, function=extract))
    found = check(make_dump(), loaded_teacher)
    assert (found.verdict, found.sequences_off) == (DAMAGE, 1)
    assert found.reasons == (f"sequence {5 << 16}: a token stands twice among the candidates of one position",)


def test_values_altered_everywhere_are_damage_where_the_weights_are_the_dump_s_own(make_dump, loaded_teacher, monkeypatch):
    def extract(batch):
        found = extract_positions(batch)
        for arrays in found:
            arrays["token_logprob"] = arrays["token_logprob"] - 0.5
        return found

    monkeypatch.setitem(EXTRACTORS, "positions", replace(POSITIONS, function=extract))
    found = check(make_dump(), loaded_teacher)
    assert found.verdict == DAMAGE and "values were altered, or this machine computes wrongly" in found.reasons[0]


def moved_one_way(arrays, quantity: str, by: float) -> None:
    """Every position's log-odds of the tail, gaps to the first candidate, or token, in nats; all else as the teacher said."""
    if quantity == "token":
        arrays["token_logprob"] = arrays["token_logprob"] - by
        return
    candidates, tail = arrays["candidate_logprobs"].astype(np.float64), arrays["tail_logprob"].astype(np.float64)
    odds = tail - np.logaddexp.reduce(candidates, axis=1) + (by if quantity == "tail" else 0)
    if quantity == "candidates":
        candidates[:, 1:] -= by
    candidates -= np.logaddexp.reduce(candidates, axis=1)[:, None] + np.logaddexp(0, odds)[:, None]
    arrays["candidate_logprobs"], arrays["tail_logprob"] = (
        candidates.astype(np.float32),
        -np.logaddexp(0, -odds).astype(np.float32),
    )


def spoil_one_way(monkeypatch, quantity, by, documents=range(9)) -> list:
    """Have every dump from here on move the sequences of these documents; returns where they will be listed."""
    spoilt = []

    def extract(batch):
        found = extract_positions(batch)
        for sequence, arrays in zip(batch.sequences, found, strict=True):
            if sequence.document.number in documents:
                moved_one_way(arrays, quantity, by)
                spoilt.append(sequence)
        return found

    monkeypatch.setitem(EXTRACTORS, "positions", replace(POSITIONS, function=extract))
    return spoilt


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("quantity", "by"),
    [("tail", 1.2), ("tail", -1.2), ("candidates", 0.3), ("token", 0.3), ("tail", 0.12), ("candidates", 0.12)],
)
def test_values_that_all_moved_one_way_are_damage_however_noisy_the_dtype(
    make_dump, teachers, monkeypatch, quantity, by, asked
):
    """Each of them is within what the dtype's noise can do to one value."""
    spoil_one_way(monkeypatch, quantity, by)
    store = make_dump(teacher=teachers["bfloat16"], draw_weight=0.0)  # as many as the tail is large tell of it before
    found = check(store, teachers[asked])
    assert found.verdict == DAMAGE and "values were altered" in found.reasons[0]
    assert max(each.quantiles[-2] for each in found.differences.values()) < found.limits.single
    for name, each in found.differences.items():
        if name == quantity:
            assert abs(each.mean - abs(by)) < 0.05 and each.mean > each.noise
        else:
            assert each.mean <= each.noise / 2
    assert any(f"{quantity} off one way, by 0." in each or f"{quantity} off one way, by 1." in each for each in found.reasons)
    other = replace(teachers[asked], description={**teachers[asked].description, "files": {"model.safetensors": "ab"}})
    assert check(store, other).verdict == OTHER_TEACHER


def test_some_sequences_that_moved_one_way_are_damage_and_no_other_teacher(make_dump, teachers, monkeypatch):
    spoilt = spoil_one_way(monkeypatch, "tail", 1.0, documents=[2, 5])
    store = make_dump(teacher=teachers["bfloat16"], draw_weight=0.0)
    teacher = teachers["bfloat16"]
    other = replace(teacher, description={**teacher.description, "files": {"model.safetensors": "ab"}})
    found = check(store, other)
    assert found.verdict == DAMAGE and 0 < found.sequences_off == len(spoilt) < found.sequences
    numbers = {(sequence.document.number << 16) + sequence.window for sequence in spoilt}
    assert re.match(rf"sequence ({'|'.join(map(str, numbers))}): tail off one way, by [\d.]+ nats on average", found.reasons[0])


def test_a_mixture_of_experts_is_warned_of_where_rounding_differs(make_dump, tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    asked = {dtype: load_teacher(str(tmp_path / "experts"), dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}
    store = make_dump(teacher=asked["float32"])
    assert check(store, asked["float32"], sample=2).notes == ()
    notes = check(store, asked["bfloat16"], sample=2).notes
    assert any("mixture of experts" in each and "ask as the dump did (--dtype float32" in each for each in notes)


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


def test_the_differences_are_what_a_plain_computation_gives(make_dump, loaded_teacher):
    """Against a float64 reference of what FORMAT.md says is rounded, asked of a teacher that is a little off."""
    store = make_dump()
    altered = replace(loaded_teacher, model=copy.deepcopy(loaded_teacher.model))
    altered.model.get_output_embeddings().weight.data *= 1.02
    found = check(store, altered)
    opened = KnowledgeStore.open(store)
    off, moved = {"token": [], "candidates": [], "tail": []}, {"token": [], "candidates": [], "tail": []}

    def compare(name, kept, asked):
        off[name].append(max(abs(kept - asked) - 0.0625, 0))
        moved[name].append(round(asked * 8) - round(kept * 8))

    for ordinal in range(opened.sequence_count()):
        rows, _ = opened.stored(ordinal, "positions")
        with torch.inference_mode():
            logits = altered.model(torch.from_numpy(rows["token_id"].to_numpy().astype(np.int64)[None])).logits[0].double()
        for row, logprobs in zip(rows.to_pylist()[1:], torch.log_softmax(logits, 1).tolist(), strict=False):
            ids, kept, tail = row["candidate_ids"], row["candidate_logprobs"], row["tail_logprob"]
            left = math.log(sum(math.exp(each) for token, each in enumerate(logprobs) if token not in ids))
            if row["token_id"] not in ids:
                compare("token", row["token_logprob"], logprobs[row["token_id"]])
            for token, value in zip(ids[1:], kept[1:], strict=True):
                compare("candidates", kept[0] - value, logprobs[ids[0]] - logprobs[token])
            odds = tail - math.log(sum(map(math.exp, kept)))
            compare("tail", odds, left - math.log(sum(math.exp(logprobs[token]) for token in ids)))
    for name in off:
        each = found.differences[name]
        assert each.values == len(off[name])
        assert max(off[name]) > 0.01  # there is something to compare
        np.testing.assert_allclose(each.quantiles[-1], max(off[name]), atol=1e-4)
        np.testing.assert_allclose(each.steps[:3], [np.mean(np.abs(moved[name]) == steps) for steps in range(3)], atol=0.01)
        np.testing.assert_allclose(each.mean, abs(np.mean(moved[name])) / 8, atol=2e-3)


@given(st.data())
def test_what_is_kept_lies_within_half_a_step_of_what_is_rounded(data):
    """Of every selection, for any distribution: the bound that `check` takes off."""
    step = data.draw(st.sampled_from([1 / 64, 1 / 8, 1.0]))
    k = data.draw(st.integers(1, 5))
    logits = data.draw(numpy_strategies.arrays(np.float32, (4, 5), elements=st.floats(-30, 30, width=32)))
    selection = {"name": "top-k", "k": k}
    calibration = {"temperature": 2.0, "sha256": ""}
    manifest = make_manifest(vocabulary=5, selection=selection, calibration=calibration, quantisation_step=step)
    said = knowledge_of(np.arange(4), logits, k)
    said |= {"tail_logsumexp": said["tail_logprob"] / 2}
    keys = pa.table({"sequence_id": np.zeros(4, np.int64), "position": np.arange(4, dtype=np.int32)})
    rows = KINDS["positions"].unpack(KINDS["positions"].pack(keys, said, manifest), manifest).slice(1)
    kept = {name: rows[name].to_numpy() for name in ("token_id", "token_logprob", "tail_logprob", "tail_logsumexp")}
    for name in ("candidate_ids", "candidate_logprobs"):
        kept[name] = np.array(rows[name].to_pylist(), np.float64).reshape(3, -1)
    before, after = exact_steps({name: values[1:] for name, values in said.items()}, manifest), exact_steps(kept, manifest)
    assert before.keys() == after.keys() == {"token_logprob", "tail_logsumexp", "candidate_logprobs", "tail_logprob"}
    for name, values in before.items():
        np.testing.assert_allclose(after[name], np.round(after[name]), atol=1e-5 / step)  # they are whole steps
        np.testing.assert_allclose(after[name], values, atol=0.5 + 1e-5 / step)


def test_what_cannot_be_checked(store_folder, loaded_teacher, tmp_path):
    for options, message in (
        ({"sample": 0}, "--sample is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"dump": "nothing"}, "has no dump 'nothing'"),
        ({}, "name a dump"),
    ):
        with pytest.raises(InputError, match=message):
            check(store_folder, loaded_teacher, **options)


def test_other_kinds_are_checked_by_the_table(monkeypatch, store_folder, loaded_teacher):
    """A dump is checked by the checkers of its kinds; where there is none for any of them, it is refused."""
    config = CheckConfig(store_folder, "loaded", dump="heldout", sample=4)
    asked = []
    monkeypatch.setitem(CHECKERS, "positions", lambda store, manifest, ordinals, *_: asked.append(len(ordinals)) or "sound")
    assert check_dump(config, loaded_teacher) == {"positions": "sound"} and asked == [4]
    monkeypatch.delitem(CHECKERS, "positions")
    monkeypatch.setitem(CHECKERS, "dreams", None)
    with pytest.raises(
        InputError, match=r"'heldout' holds positions, which cannot be checked: give a dump that holds .* or dreams"
    ):
        check_dump(config, loaded_teacher)


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
        ((store_folder, "--teacher", tmp_path / "none", "--dump", "train"), "there is no folder"),
        ((store_folder, "--teacher", teacher_folder, "--dump", "train", "--sample", 0), "--sample is 0"),
    ):
        found = run(*arguments)
        assert found.returncode == 2 and found.stderr.startswith("Error: ") and message in found.stderr
        assert len(found.stderr.splitlines()) == 1
    found = run("--help")
    assert found.returncode == 0 and "teacher-dump check knowledge/ --teacher" in " ".join(found.stdout.split())


def test_a_person_is_told_all_of_it(store_folder, loaded_teacher):
    text = "\n".join(check(store_folder, loaded_teacher, dump="heldout").lines)
    for words in (
        "same step",
        "|mean|",
        "Noise goes up and down alike",
        "99.9 %",
        "candidates",
        "selection",
        "draws",
        "Another teacher: more than 50% of them",
    ):
        assert words in text
