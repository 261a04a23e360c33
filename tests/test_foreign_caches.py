"""Caches that other programs made are imported with known answers, and refused where they are off by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer
from foreign_caches import (
    Cache,
    make_cache,
    shifted,
    write_axolotl,
    write_distillkit,
    write_megatron,
    write_nemo,
    write_plain,
    write_vllm,
)
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore, verify
from knowledge_store.kinds.positions import positions_of

STEP = 1 / 8
AS_LONG = (30, 30, 30, 30)  # of Megatron's samples


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder) -> int:
    return len(make_tokenizer())


WRITERS = {
    "plain": write_plain,
    "distillkit": write_distillkit,
    "vllm": write_vllm,
    "axolotl": write_axolotl,
    "nemo-aligner": write_nemo,
    "megatron": write_megatron,
}


def written(name: str, folder: Path, cache: Cache, vocabulary: int) -> list[str]:
    """A cache in a layout: the words of the command that name its files."""
    more = (vocabulary,) if name == "distillkit" else ()
    return WRITERS[name](folder, cache, *more)


def import_files(store: Path, words: list[str], name: str, tokenizer: Path, *more: str):
    from teacher_dump.cli import app

    return CliRunner().invoke(app, ["import", str(store), *words, "--format", name, "--tokenizer", str(tokenizer), *more])


def error_of(result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.output.splitlines()[-1] == line
    return line


def imported(store: Path) -> list[dict]:
    opened = KnowledgeStore.open(store)
    return [opened[number] for number in range(len(opened))]


@pytest.mark.parametrize("name", WRITERS)
def test_known_answers(name, tmp_path, tokenizer_folder, vocabulary):
    cache = make_cache(vocabulary, AS_LONG) if name == "megatron" else make_cache(vocabulary)
    words = written(name, tmp_path, cache, vocabulary)
    result = import_files(tmp_path / "store", words, name, tokenizer_folder)
    assert result.exit_code == 0, result.output
    assert verify(tmp_path / "store").sound
    order = [0, 2, 1, 3] if name == "megatron" else range(len(cache.tokens))  # a rank's file holds every second sample
    sequences = imported(tmp_path / "store")
    assert len(sequences) == len(cache.tokens)
    for found, text in zip(sequences, order, strict=True):
        tokens, ids, logprobs, own = (column[text] for column in (cache.tokens, cache.ids, cache.logprobs, cache.own))
        first = 2 if name in ("axolotl", "nemo-aligner") else 1  # whose labels leave a token out
        assert np.array_equal(found["input_ids"], tokens)
        assert found["has_knowledge"][1:].all() and not found["has_knowledge"][0]
        assert found["is_target"].tolist() == [False] * first + [True] * (len(tokens) - first)
        assert np.array_equal(found["candidate_ids"][1:], ids[1:])
        assert np.abs(found["candidate_logprobs"][1:] - logprobs[1:]).max() < 1.5 * STEP
        tail = np.log1p(-np.exp(logprobs).sum(axis=1))
        assert np.abs(found["tail_logprob"][1:] - tail[1:]).max() < 1.5 * STEP
        among = (ids == tokens[:, None]).any(axis=1)[1:]
        known = ~np.isnan(found["token_logprob"][1:])
        assert known.all() if name in ("plain", "vllm") else np.array_equal(known, among)
        assert np.abs(found["token_logprob"][1:] - own[1:])[known].max() < 1.5 * STEP
    parameters = positions_of(KnowledgeStore.open(tmp_path / "store").manifest())
    assert parameters.tail == ("exact" if name == "plain" else "remainder")
    assert parameters.unknown_tokens == (name not in ("plain", "vllm"))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("name", WRITERS)
def test_off_by_one_is_refused(name, by, tmp_path, tokenizer_folder, vocabulary):
    cache = shifted(make_cache(vocabulary, AS_LONG if name == "megatron" else (40, 60)), by)
    words = written(name, tmp_path, cache, vocabulary)
    result = import_files(tmp_path / "store", words, name, tokenizer_folder)
    assert result.exit_code == 2
    assert "are off by one" in error_of(result)
    assert not (tmp_path / "store").exists()
