"""Teachers that are spread over devices, made smaller or loaded from a revision: the same answers, or others by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_teacher, story_rows, write_jsonl
from processes import Command
from test_teacher import padded, sliced_logits

from benchmarks.tiny_architectures import tiny_config, tiny_model
from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError, MismatchError
from teacher_dump import CheckConfig, DumpConfig, check, dump
from teacher_dump.teachers.local import load_teacher

WHERE = {"cpu": "100MiB", "disk": "40KiB"}  # room on the CPU: for all weights, or for few of them


@pytest.fixture(scope="module", params=["llama", "gemma2"])  # logits from the head, and whole ones
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("spread") / request.param
    save_teacher(place)
    if request.param != "llama":
        config = tiny_config(request.param)
        tiny_model(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("place", WHERE)
def test_a_teacher_on_cpu_and_disk_answers_as_one_in_one_place(folder, place):
    spread = load_teacher(str(folder), device_map="auto", max_memory=f"cpu={WHERE[place]}")
    whole = load_teacher(str(folder), device="cpu")
    places = set(getattr(spread.model, "hf_device_map", {"": "cpu"}).values())
    assert ("disk" in places) is (place == "disk") and ("disk" in spread.device_name) is (place == "disk")
    assert spread.description == whole.description and spread.whole_logits == whole.whole_logits
    batch = padded([3, 11, 7], 11, left=False)
    np.testing.assert_allclose(sliced_logits(spread, *batch), sliced_logits(whole, *batch), atol=1e-5)
    assert spread.batching(64, 640) == whole.batching(64, 640)


def test_a_dump_with_offloaded_weights_is_resumed_and_checked_with_any(tmp_path, teacher_folder):
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(12))
    config = DumpConfig(str(teacher_folder), (corpus,), tmp_path / "s", "d", max_length=40, shard_size=4)
    spread = replace(config, device_map="auto", max_memory="cpu=40KiB")
    assert dump(spread, 0, 3).shards == 1
    assert dump(config, 1, 3).shards == 1 and dump(spread, 2, 3).shards == 1
    assert (
        check(CheckConfig(tmp_path / "s", str(teacher_folder), device_map="auto", max_memory="cpu=40KiB"))["positions"].verdict
        == "agrees"
    )
    record = json.loads((tmp_path / "s/d/commits/00000.json").read_text())
    assert "disk" in json.dumps(record["made_by"]["device"])


def test_the_kind_of_attention_is_the_one_that_is_asked_for(teacher_folder):
    batch = padded([3, 11, 7], 11, left=False)
    kinds = {kind: load_teacher(str(teacher_folder), device="cpu", attention=kind) for kind in ("sdpa", "eager")}
    for kind, teacher in kinds.items():
        assert teacher.model.config._attn_implementation == kind and f"({kind} attention)" in teacher.device_name
    np.testing.assert_allclose(*(sliced_logits(teacher, *batch) for teacher in kinds.values()), atol=1e-4)


REFUSED = [
    (("--device-map", "auto", "--device", "cpu"), "--device is one device and --device-map several"),
    (("--max-memory", "cpu=1GiB"), "--max-memory is the room for weights on each device of --device-map: give that too"),
    (("--device-map", "auto", "--max-memory", "cpu=1GiB,much"), "--max-memory has 'much': give DEVICE=SIZE"),
    (("--device-map", "balanced"), "--device-map is 'balanced'; it must be none or auto"),
    (("--quantize", "3-bit"), "--quantize is '3-bit'; it must be none, 8-bit or 4-bit"),
    (("--quantize", "4-bit", "--gguf-file", "x.gguf"), "--quantize does not go with --gguf-file"),
    (("--attention", "fast"), "--attention is 'fast'; it must be auto, sdpa, eager or flash_attention_2"),
    (("--revision", "v2"), "--revision v2 is of a hub id, and"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_loading_that_cannot_be_is_refused_in_one_line(tmp_path, teacher_folder, words, message):
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(2))
    line = ("run", tmp_path / "s", "--teacher", teacher_folder, "--corpus", corpus, *words)
    done = Command(*line, folder=tmp_path / "said").wait()
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_small_weights_without_their_library_are_refused_by_its_name(teacher_folder):
    for bits in ("8-bit", "4-bit"):
        with pytest.raises(InputError, match=f"--quantize {bits} needs the library bitsandbytes.*pip install bitsandbytes"):
            DumpConfig(str(teacher_folder), ("c.jsonl",), "s", quantize=bits)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not here")
@pytest.mark.parametrize("bits", ["8-bit", "4-bit"])
def test_small_weights_are_part_of_what_a_dump_is(tmp_path, bits):
    folder = save_teacher(tmp_path / "t", hidden_size=64)
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(8))
    config = DumpConfig(str(folder), (corpus,), tmp_path / "s", "d", max_length=40, shard_size=4, quantize=bits)
    assert dump(config, 0, 2).shards == 1
    assert KnowledgeStore.open(tmp_path / "s").manifest("d").teacher["quantize"] == bits
    assert dump(replace(config, quantize=None), 1, 2).shards == 1
    with pytest.raises(MismatchError, match=f"--quantize was {bits} and is now none. Leave --quantize out"):
        dump(replace(config, quantize="none"))
    assert check(CheckConfig(tmp_path / "s", str(folder)))["positions"].verdict == "agrees"
    other = check(CheckConfig(tmp_path / "s", str(folder), quantize="none"))["positions"]
    assert other.verdict != "damage" and any(f"made with --quantize {bits}" in note for note in other.notes)


def test_a_revision_is_the_one_that_is_loaded(tmp_path, teacher_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub/models--somebody--tiny"
    (place / "refs").mkdir(parents=True)
    for name, commit, source in (
        ("main", "a" * 40, teacher_folder), ("v2", "b" * 40, save_teacher(tmp_path / "second", seed=5))
    ):  # fmt: skip
        (place / "refs" / name).write_text(commit)
        shutil.copytree(source, place / "snapshots" / commit)
    hashes = [load_teacher("somebody/tiny", device="cpu", revision=name).description["files"] for name in (None, "main", "v2")]
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(InputError, match="there is no folder somebody/tiny, and the hub"):
        load_teacher("somebody/tiny", device="cpu", revision="v3")


def test_weights_that_are_kept_on_the_disk_leave_nothing_behind(tmp_path, teacher_folder, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spread = load_teacher(str(teacher_folder), dtype="bfloat16", device_map="auto", max_memory="cpu=20KiB")
    assert spread.model.dtype == torch.bfloat16
    sliced_logits(spread, *padded([3, 11], 11, left=False))
    del spread
    import gc

    gc.collect()
    assert not list(tmp_path.glob("teacher-weights-*"))
