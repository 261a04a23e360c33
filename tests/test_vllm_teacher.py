"""A teacher that vLLM runs: whole distributions as transformers gives them, dumps that resume, and what is done where vLLM is
another than is known. Most tests run a fake of vLLM's surface; those of the real one are skipped where it is not installed."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import fake_vllm
import numpy as np
import pytest
import torch
from conftest import make_tokenizer, story_rows, write_jsonl

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.reporter import Reporter
from teacher_dump import (
    CalibrateConfig,
    CheckConfig,
    DumpConfig,
    EstimateConfig,
    GenerateConfig,
    RunConfig,
    append,
    calibrate,
    check,
    dump,
    estimate,
    generate,
    repair,
)
from teacher_dump.teachers import vllm_engine
from teacher_dump.teachers.loading import Loading
from teacher_dump.teachers.local import LocalTeacher
from teacher_dump.teachers.local import load_teacher as load_local
from teacher_dump.teachers.protocol import Ability, TextRequest, Writing
from teacher_dump.teachers.vllm import VllmTeacher, load_teacher

LONGEST = 48


class Notes(Reporter):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str, *arguments: object, **options: object) -> None:
        self.texts.append(text)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the engine sets in the environment is taken back."""
    for name in vllm_engine.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, vllm_engine.ENVIRONMENT[name]))


@pytest.fixture
def engine(monkeypatch) -> type[fake_vllm.LLMEngine]:
    """The fake, in steps of 20 tokens, so that sequences are cut."""
    monkeypatch.setattr(vllm_engine, "MIN_STEP", 20)
    monkeypatch.setitem(vllm_engine.STEP_LOGPROBS, "cpu", 1)
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def teacher(engine, teacher_folder) -> VllmTeacher:
    return load_teacher(str(teacher_folder), Loading(engine="vllm"), LONGEST)


def batch(vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask (4, 48): padded on the left, on the right, not at all, and one of two tokens."""
    mask = np.ones((4, LONGEST), bool)
    mask[0, :17], mask[1, 30:], mask[3, 2:] = False, False, False
    return np.random.default_rng(seed).integers(0, vocabulary, mask.shape) * mask, mask


def asked(mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """All places of a batch behind which another token stands."""
    following = np.roll(mask, -1, axis=1)
    following[:, -1] = False
    rows, positions = np.nonzero(mask & following)
    return torch.from_numpy(rows), torch.from_numpy(positions)


def distributions(
    teacher: LocalTeacher | VllmTeacher, mask: np.ndarray, ids: np.ndarray, *places: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities (N, V) at some places, and slices of the N that come in order."""
    parts, following = [], 0
    for part, logits in teacher.predict(ids, mask).logit_slices(*places):
        assert part.start == following
        following = part.stop
        parts.append(logits.log_softmax(dim=1))
    assert following == len(places[0])
    return torch.cat(parts)


def test_distributions_are_those_of_transformers(teacher, loaded_teacher):
    ids, mask = batch(teacher.vocabulary_size)
    places = asked(mask)
    ours, theirs = (distributions(each, mask, ids, *places) for each in (teacher, loaded_teacher))
    assert torch.allclose(ours, theirs, atol=1e-4)
    # Any places, in any order, and more than once.
    chosen = torch.from_numpy(np.random.default_rng(1).permutation(np.repeat(np.arange(len(places[0])), 2))[:40])
    some = distributions(teacher, mask, ids, *(place[chosen] for place in places))
    assert torch.allclose(some, theirs[chosen], atol=1e-4)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert list(teacher.predict(ids, mask).logit_slices(nothing, nothing)) == []
    with pytest.raises(IndexError, match="nothing stands behind position 47"):
        list(teacher.predict(ids, mask).logit_slices(torch.tensor([2]), torch.tensor([47])))


def test_no_more_of_a_sequence_is_asked_about_than_is_wanted(teacher, engine):
    ids, mask = batch(teacher.vocabulary_size)
    steps = teacher.engine.engine.steps
    list(teacher.predict(ids, mask).logit_slices(torch.tensor([2]), torch.tensor([10])))
    assert teacher.engine.engine.steps == steps + 1


def test_likeliest_tokens_are_those_of_the_distributions(teacher, loaded_teacher):
    ids, mask = batch(teacher.vocabulary_size)
    rows, positions = asked(mask)
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(rows)))
    rows, positions = rows[order], positions[order]
    answers = teacher.predict(ids, mask, likeliest=7).likeliest(rows.numpy(), positions.numpy())
    expected = distributions(loaded_teacher, mask, ids, rows, positions)
    values, tokens = expected.topk(7, dim=1)
    assert np.array_equal(answers.ids, tokens) and np.allclose(answers.logprobs, values, atol=1e-4)
    assert np.array_equal(answers.token_ids, ids[rows, positions + 1])
    own = expected.gather(1, torch.from_numpy(answers.token_ids)[:, None])[:, 0]
    assert np.allclose(answers.token_logprobs, own, atol=1e-4)


def config(folder: Path, teacher_folder: Path, name: str, **options) -> DumpConfig:
    """A dump of three shards, in one store for all names."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_jsonl(corpus, story_rows(12))
    options = {"max_length": LONGEST, "shard_size": 4, "batch_size": 4, **options}
    return DumpConfig(str(teacher_folder), corpus, folder / "store", name=name, **options)


def shards(store: Path, name: str) -> dict[str, bytes]:
    """The files of a dump's knowledge."""
    return {path.name: path.read_bytes() for path in sorted((store / name).rglob("*.parquet"))}


def test_a_dump_is_the_one_of_transformers_and_each_judges_the_other(engine, tmp_path, teacher_folder, loaded_teacher):
    dump(config(tmp_path, teacher_folder, "fake", engine="vllm"))
    dump(config(tmp_path, teacher_folder, "local"), teacher=loaded_teacher)
    store = KnowledgeStore.open(tmp_path / "store")
    ours, theirs = store.manifest("fake"), store.manifest("local")
    assert ours.teacher["engine"] == "vllm" and "engine" not in theirs.teacher
    assert ours.teacher["files"] == theirs.teacher["files"]
    assert (ours.kinds, ours.plan, ours.tokenizer) == (theirs.kinds, theirs.plan, theirs.tokenizer)
    found = check(CheckConfig(tmp_path / "store", str(teacher_folder), dump="local", engine="vllm"))["positions"]
    assert found.agrees and found.sequences_off == 0
    found = check(CheckConfig(tmp_path / "store", "loaded", dump="fake"), loaded_teacher)["positions"]
    assert found.agrees and found.sequences_off == 0
    commits = (tmp_path / "store" / "fake" / "commits").iterdir()
    assert {json.loads(path.read_text())["made_by"]["device"] for path in commits} == {"cpu (vLLM 0.32.0)"}


def test_a_dump_is_resumed_by_the_engine_that_began_it(engine, tmp_path, teacher_folder):
    engine.faults = fake_vllm.Faults(stop_after=22)
    with pytest.raises(KeyboardInterrupt):
        dump(config(tmp_path, teacher_folder, "cut", engine="vllm"))
    begun = shards(tmp_path / "store", "cut")
    assert begun
    with pytest.raises(MismatchError, match="--engine was vllm and is now transformers"):
        dump(config(tmp_path, teacher_folder, "cut", engine="transformers"))
    report = dump(config(tmp_path, teacher_folder, "cut"))
    assert report.shards_existing and report.shards
    dump(config(tmp_path, teacher_folder, "whole", engine="vllm"))
    assert shards(tmp_path / "store", "cut") == shards(tmp_path / "store", "whole")
    assert begun.items() <= shards(tmp_path / "store", "cut").items()


def test_every_command_takes_the_engine(engine, tmp_path, teacher_folder, loaded_teacher):
    corpus = config(tmp_path, teacher_folder, "first", engine="vllm").corpus
    options = {"max_length": LONGEST, "engine": "vllm"}
    found = estimate(EstimateConfig(str(teacher_folder), corpus, **options))
    assert found.figures == pytest.approx(
        estimate(EstimateConfig(str(teacher_folder), corpus, max_length=LONGEST), loaded_teacher).figures, abs=1e-4
    )
    fit = calibrate(CalibrateConfig(str(teacher_folder), corpus, **options)).calibration
    other = calibrate(CalibrateConfig(str(teacher_folder), corpus, max_length=LONGEST), loaded_teacher).calibration
    assert fit.temperature == pytest.approx(other.temperature, rel=1e-3)
    dump(config(tmp_path, teacher_folder, "first", engine="vllm"))
    whole = shards(tmp_path / "store", "first")
    damaged = next(path for path in (tmp_path / "store" / "first").rglob("*.parquet") if "00001" in path.name)
    damaged.write_bytes(b"PAR1")
    assert repair(config(tmp_path, teacher_folder, "first")).shards == 1
    assert shards(tmp_path / "store", "first") == whole
    more = write_jsonl(tmp_path / "more.jsonl", story_rows(3, start=50))
    assert append(RunConfig(teacher=str(teacher_folder), corpus=more, store=tmp_path / "store", append="first")).shards == 1
    assert KnowledgeStore.open(tmp_path / "store").manifest("first-2").teacher["engine"] == "vllm"


@pytest.mark.parametrize(
    ("version", "faults", "reason"),
    [
        ("0.99.1", {}, r"they have been taken from 0\.32\.x alone, and this is 0\.99\.1"),
        ("0.32.1", {"hooked": 0.01}, "they are up to 0.01 nats from what its public interface says"),
    ],
)
def test_distributions_that_are_not_known_to_be_right_are_not_used(monkeypatch, teacher_folder, version, faults, reason):
    fake_vllm.install(monkeypatch, version).faults = fake_vllm.Faults(**faults)
    notes = Notes()
    teacher = load_teacher(str(teacher_folder), Loading(engine="vllm"), LONGEST, reporter=notes)
    assert teacher.abilities == {Ability.LIKELIEST, Ability.TEXT}
    assert any(re.search(reason, text) for text in notes.texts)


def test_without_distributions_tails_are_remainders(monkeypatch, tmp_path, teacher_folder, loaded_teacher):
    fake_vllm.install(monkeypatch, "0.99.1")
    notes = Notes()
    dump(config(tmp_path, teacher_folder, "fake", engine="vllm"), reporter=notes)
    assert any("tail: remainder" in text for text in notes.texts)
    dump(config(tmp_path, teacher_folder, "local"), teacher=loaded_teacher)
    store = KnowledgeStore.open(tmp_path / "store")
    assert store.manifest("fake").kinds["positions"]["tail"] == "remainder"
    found = check(CheckConfig(tmp_path / "store", "loaded", dump="fake"), loaded_teacher)["positions"]
    assert found.agrees and found.sequences_off == 0
    found = check(CheckConfig(tmp_path / "store", str(teacher_folder), dump="local", engine="vllm"))["positions"]
    assert found.agrees and found.sequences_off == 0
    # A version from which distributions can be taken goes on as the dump was begun.
    fake_vllm.install(monkeypatch)
    commits = sorted((tmp_path / "store" / "fake" / "commits").iterdir())
    whole = shards(tmp_path / "store", "fake")
    commits[-1].unlink()
    for path in (tmp_path / "store" / "fake").rglob("*00002*.parquet"):
        path.unlink()
    assert dump(config(tmp_path, teacher_folder, "fake")).shards == 1
    assert shards(tmp_path / "store", "fake") == whole


def test_distributions_that_nobody_can_be_told_to_own_end_the_pass(teacher, engine):
    ids, mask = batch(teacher.vocabulary_size)
    engine.faults = fake_vllm.Faults(newest_first=True)
    with pytest.raises(vllm_engine.EngineFailure, match="in an order that is not known"):
        distributions(teacher, mask, ids[:, ::-1].copy(), *asked(mask))
    assert not teacher.engine.engine.has_unfinished_requests()
    original = fake_vllm.Sampler.__dict__["gather_logprobs"]
    assert isinstance(original, staticmethod) and original.__func__.__qualname__ == "Sampler.gather_logprobs"


def test_a_dtype_and_lengths_that_cannot_be_are_refused(engine, teacher_folder, tmp_path):
    with pytest.raises(InputError, match="there is no dtype 'int4' for a teacher"):
        load_teacher(str(teacher_folder), Loading(engine="vllm", dtype="int4"), LONGEST)
    with pytest.raises(InputError, match=r"sequences have up to 4000 tokens, and .* knows"):
        load_teacher(str(teacher_folder), Loading(engine="vllm"), 4000)
    with pytest.raises(InputError, match="knowledge of kind 'hidden' needs hidden states, which"):
        dump(config(tmp_path, teacher_folder, "states", engine="vllm", kinds=("hidden",)))
    assert not (tmp_path / "store").exists()


def test_an_engine_that_does_not_start_is_refused_in_one_line(engine, teacher_folder, monkeypatch):
    def fail(*arguments):
        raise ValueError("1 validation error for ModelConfig\n  Value error, no such model\n  For further information")

    monkeypatch.setattr(engine, "from_engine_args", fail)
    with pytest.raises(InputError, match=r"^vLLM cannot run the teacher in .*: Value error, no such model$"):
        load_teacher(str(teacher_folder), Loading(engine="vllm"), LONGEST)


# --- texts ------------------------------------------------------------------------------------------------------------------


def check_texts(ours: VllmTeacher, theirs: LocalTeacher) -> None:
    """Make sure that vLLM's texts do not depend on their batch, and are as likely as transformers says of their tokens."""
    assert ours.stop_tokens == theirs.stop_tokens
    requests = [TextRequest(np.arange(5 + row, 12 + 2 * row), 2**63 + row) for row in range(6)]
    writing = Writing(0.8, 12, ours.stop_tokens, likeliest=3)
    alone = [ours.write([request], writing)[0] for request in requests]
    together = ours.write(requests, writing)
    stopping = Writing(0.8, 12, tuple(int(text.token_ids[4]) for text in alone), likeliest=3)
    for one, other, stopped, request in zip(alone, together, ours.write(requests, stopping), requests, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.stopped == (int(one.token_ids[-1]) in ours.stop_tokens)
        assert stopped.stopped and len(stopped.token_ids) <= 5
        assert stopped.token_ids.tolist() == one.token_ids[: len(stopped.token_ids)].tolist()
        ids = np.concatenate([request.prompt, one.token_ids])[None]
        mask = np.ones(ids.shape, bool)
        places = torch.arange(len(request.prompt) - 1, ids.shape[1] - 1)
        logprobs = distributions(theirs, mask, ids, torch.zeros_like(places), places)
        forced = logprobs.gather(1, torch.from_numpy(one.token_ids)[:, None])[:, 0]
        assert np.allclose(one.logprobs, forced, atol=1e-3)
        assert one.likeliest is not None
        assert np.allclose(one.likeliest.logprobs, logprobs.topk(3, dim=1).values, atol=1e-3)
    greedy = [teacher.write(requests[:2], Writing(0.0, 6, ours.stop_tokens)) for teacher in (ours, theirs)]
    assert [text.token_ids.tolist() for text in greedy[0]] == [text.token_ids.tolist() for text in greedy[1]]


def test_texts_by_vllm(monkeypatch, teacher_folder, loaded_teacher, tmp_path):
    fake_vllm.install(monkeypatch)
    check_texts(load_teacher(str(teacher_folder), Loading(engine="vllm"), LONGEST), loaded_teacher)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Who lit the lamp?"}])
    named = {"prompts": prompts, "output": tmp_path / "gen", "max_new_tokens": 5}
    assert generate(GenerateConfig(str(teacher_folder), engine="vllm", **named)).texts == 1
    again = generate(GenerateConfig(str(teacher_folder), **named))  # by the engine that began the folder
    assert (again.files, again.files_existing) == (0, 1)


# --- the real engine --------------------------------------------------------------------------------------------------------


def installed() -> bool:
    try:
        return find_spec("vllm") is not None
    except (PackageNotFoundError, ValueError):
        return False


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[VllmTeacher, LocalTeacher, Path]:
    """A model with heads as wide as vLLM takes on a CPU, run by vLLM and by transformers."""
    if not installed():
        pytest.skip("vllm is not installed here")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("real")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer) + 8, max_position_embeddings=LONGEST, initializer_range=0.2, **shape)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_teacher(str(folder), Loading(engine="vllm"), LONGEST), load_local(str(folder)), folder


def test_the_real_engine_answers_as_transformers_does(real, tmp_path):
    ours, theirs, folder = real
    assert Ability.DISTRIBUTIONS in ours.abilities
    ids, mask = batch(ours.vocabulary_size)
    places = asked(mask)
    assert torch.allclose(*(distributions(each, mask, ids, *places) for each in (ours, theirs)), atol=1e-3)
    answers = ours.predict(ids, mask, likeliest=5).likeliest(*(place.numpy() for place in places))
    expected = distributions(theirs, mask, ids, *places)
    assert np.allclose(answers.logprobs, expected.topk(5, dim=1).values, atol=1e-3)
    dump(config(tmp_path, folder, "real"), teacher=ours)
    for judge in (ours, theirs):
        found = check(CheckConfig(tmp_path / "store", "loaded", dump="real"), judge)["positions"]
        assert found.agrees and found.sequences_off == 0


def test_the_real_engine_gives_no_distribution_it_is_not_known_to_give(real, monkeypatch):
    teacher, _, _ = real
    probes = [np.arange(10), np.arange(20, 40)]
    assert teacher.engine.check_distributions(probes, 1e-4) is None
    monkeypatch.setattr(vllm_engine, "WITH_DISTRIBUTIONS", ("0.1.",))
    assert "they have been taken from 0.1.x alone" in str(teacher.engine.check_distributions(probes, 1e-4))


def test_the_real_engine_writes_texts(real):
    ours, theirs, _ = real
    check_texts(ours, theirs)
