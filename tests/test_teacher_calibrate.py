"""A teacher's temperature: found where it is known, measured as a plain computation measures it, and kept in a dump."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, story_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore, read_calibration, verify, write_calibration
from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from knowledge_store.calibration.temperature import root_of_slopes
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.kinds.positions import positions_of
from teacher_dump import CalibrateConfig, DumpConfig, calibrate, dump
from teacher_dump.calibration import GRID, describe, mean_and_error
from teacher_dump.cli import app
from teacher_dump.teachers.local import load_teacher

WORDS = 24
LENGTH = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_word_teacher(folder: Path, scale: float) -> Path:
    """A teacher whose tokens are words, so that any sequence of tokens is a text; its logits are multiplied by `scale`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, **{f"w{token}": token for token in range(1, WORDS)}}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    model = make_model(WORDS)
    with torch.no_grad():
        model.model.norm.weight *= scale
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Teachers `plain` and `doubled`, the second twice as sure as it should be, and a corpus that `plain` wrote."""
    folder = tmp_path_factory.mktemp("words")
    save_word_teacher(folder / "doubled", 2.0)
    model = load_teacher(str(save_word_teacher(folder / "plain", 1.0)), device="cpu").model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, WORDS, (160, 1), generator=generator)
    with torch.inference_mode():
        for _ in range(LENGTH - 1):
            probabilities = torch.softmax(model(tokens).logits[:, -1], dim=1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    texts = [" ".join(f"w{token}" if token else "a" for token in row) for row in tokens.tolist()]
    write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in texts])
    return folder


def fit_config(words: Path, teacher: str, **changes) -> CalibrateConfig:
    given = {"max_length": LENGTH, "batch_size": 32, "device": "cpu", **changes}
    return CalibrateConfig(str(words / teacher), (words / "corpus.jsonl",), **given)


def dump_config(words: Path, teacher: str, **changes) -> DumpConfig:
    given = {"max_length": LENGTH, "batch_size": 32, "device": "cpu", **changes}
    return DumpConfig(str(words / teacher), (words / "corpus.jsonl",), words / "store", "words", **given)


def test_logits_multiplied_by_two_come_back_with_a_temperature_of_two(words):
    """160 × 23 targets: the temperature is known to about 0.03."""
    fit = calibrate(fit_config(words, "doubled"))
    calibration = fit.calibration
    assert calibration.targets == 160 * (LENGTH - 1) and fit.sequences == 160
    assert calibration.temperature == pytest.approx(2, abs=0.1)
    assert calibration.after["nll"] < calibration.before["nll"] - 0.1 and fit.interval[0] > 0.1
    assert calibration.after["ece_15"] < 0.03 < calibration.before["ece_15"]
    assert calibration.after["brier"] < calibration.before["brier"]
    assert not fit.at_edge and fit.doubts == []


def test_a_teacher_that_is_right_is_left_alone_and_said_so(words):
    fit = calibrate(fit_config(words, "plain"))
    assert fit.calibration.temperature == pytest.approx(1, abs=0.05)
    assert any("does not help" in doubt for doubt in fit.doubts)
    doubled = calibrate(fit_config(words, "doubled")).calibration
    # The doubled teacher at its temperature is this one at its own.
    assert doubled.after["nll"] == pytest.approx(fit.calibration.after["nll"], abs=1e-4)
    assert doubled.temperature == pytest.approx(2 * fit.calibration.temperature, rel=2e-3)


def word_logits(words: Path, teacher: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every target: logits float64 (N, V) and token (N,), computed whole and plainly."""
    loaded = load_teacher(str(words / teacher), device="cpu")
    texts = [json.loads(line)["text"] for line in (words / "corpus.jsonl").read_text().splitlines()]
    tokens = torch.tensor(loaded.tokenizer(texts)["input_ids"])
    with torch.inference_mode():
        logits = loaded.model(tokens).logits[:, :-1].double().numpy()
    return logits.reshape(-1, WORDS), tokens[:, 1:].reshape(-1).numpy()


def plain_figures(logits: np.ndarray, tokens: np.ndarray, temperature: float) -> dict[str, float]:
    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    own = probabilities[np.arange(len(tokens)), tokens]
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == tokens
    found = {"nll": -np.log(own).mean(), "brier": ((probabilities - np.eye(WORDS)[tokens]) ** 2).sum(axis=1).mean()}
    for bins in (10, 15):
        total = 0.0
        for low in np.arange(bins) / bins:
            inside = (confidence > low) & (confidence <= low + 1 / bins)
            if inside.any():
                total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        found[f"ece_{bins}"] = total
    return found


def test_the_figures_are_those_of_a_plain_computation(words):
    calibration = calibrate(fit_config(words, "doubled")).calibration
    logits, tokens = word_logits(words, "doubled")
    for figures, temperature in ((calibration.before, 1.0), (calibration.after, calibration.temperature)):
        assert figures == pytest.approx(plain_figures(logits, tokens, temperature), abs=1e-5)
    # … and no other temperature near it has a lower loss.
    for other in (0.99, 1.01):
        worse = plain_figures(logits, tokens, calibration.temperature * other)["nll"]
        assert calibration.after["nll"] < worse


def test_an_optimum_beyond_the_grid_is_said(loaded_teacher, teacher_folder, tmp_path):
    """Random weights know nothing of English: no temperature is high enough."""
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(20))
    fit = calibrate(CalibrateConfig(str(teacher_folder), (corpus,), max_length=48), teacher=loaded_teacher)
    assert fit.at_edge and fit.calibration.temperature == GRID[-1] == 4
    assert "or beyond" in fit.doubts[0]
    assert list(tmp_path.iterdir()) == [corpus]


@given(st.floats(0.3, 3.8), st.integers(0, 1000))
@settings(max_examples=30)
def test_the_root_of_the_slopes_is_where_the_slope_is_zero(temperature, seed):
    """For 40 positions whose true distribution is softmax(z / T), the slope over 1/T passes zero at T."""
    logits = np.random.default_rng(seed).normal(0, 2, (40, 12))

    def tempered(at: float) -> np.ndarray:
        weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / at)
        return weights / weights.sum(axis=1, keepdims=True)

    slopes = np.array([((tempered(at) - tempered(temperature)) * logits).sum() for at in GRID])
    assert root_of_slopes(GRID, slopes) == (pytest.approx(temperature, rel=2e-3), False)


@pytest.mark.parametrize(("slopes", "edge"), [(np.linspace(9, 1, 17), 4.0), (np.linspace(-1, -9, 17), 0.25)])
def test_slopes_that_do_not_pass_zero_end_at_the_edge(slopes, edge):
    assert root_of_slopes(GRID, slopes) == (edge, True)


def test_calibration_error_and_standard_error_of_known_numbers():
    confidence, correct = np.array([0.05, 0.1, 0.95, 1.0]), np.array([False, True, True, True])
    # Two bins: |½ − 0.075| · ½ + |1 − 0.975| · ½.
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx(0.225)
    values, groups = np.array([1.0, 3.0, 2.0, 2.0]), np.array([7, 7, 9, 9])
    assert mean_and_error(values, groups) == (2.0, 0.0)  # within groups the differences cancel
    assert mean_and_error(values, np.arange(4)) == (2.0, pytest.approx(math.sqrt(4 / 3 * 2) / 4))
    assert mean_and_error(values, np.zeros(4)) == (2.0, None)


# --- which text it is fitted on -------------------------------------------------------------------------------------------


def test_a_limit_takes_a_sample_from_all_over_the_corpus(words):
    few = calibrate(fit_config(words, "doubled", limit=100))
    assert few.calibration.targets == 5 * (LENGTH - 1) and few.sequences == 5
    assert any("115 targets are few" in doubt for doubt in few.doubts)
    assert calibrate(fit_config(words, "doubled", limit=100)).calibration == few.calibration
    first = words / "first.jsonl"
    first.write_text("".join((words / "corpus.jsonl").read_text().splitlines(keepends=True)[:5]))
    assert calibrate(replace(fit_config(words, "doubled"), corpus=(first,))).calibration.after != few.calibration.after


def test_one_sequence_has_no_interval(words, tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "w1 w2 w3 a w5 w6"}])
    fit = calibrate(replace(fit_config(words, "doubled"), corpus=(corpus,)))
    assert fit.interval is None and fit.calibration.targets == 5
    assert "95% interval" not in "\n".join(describe(fit, Path("c.json")))


def test_only_targets_count(words, tmp_path):
    rows = [{"prompt": "w1 w2 w3", "completion": " w4 w5"}] * 3
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    assert calibrate(replace(fit_config(words, "plain"), corpus=(corpus,))).calibration.targets == 6


def test_what_it_belongs_to_is_recorded(words, tmp_path):
    calibration = calibrate(fit_config(words, "doubled", limit=50)).calibration
    assert calibration.method == "temperature"
    assert calibration.teacher["name"] == "doubled" and "model.safetensors" in calibration.teacher["files"]
    assert calibration.tokenizer["size"] == WORDS
    (file,) = calibration.fitted_on["corpus"]
    assert file["name"] == "corpus.jsonl" and len(file["sha256"]) == 64
    write_calibration(tmp_path / "c.json", calibration)
    assert read_calibration(tmp_path / "c.json") == calibration


def test_rows_that_cannot_be_used(words, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "w1 w2 w3"}\nbroken\n{"text": "w4 w5"}\n')
    config = replace(fit_config(words, "plain"), corpus=(corpus,))
    with pytest.raises(InputError, match=r"c\.jsonl, line 2: not JSON.*--skip-bad-rows"):
        calibrate(config)
    fit = calibrate(replace(config, skip_bad_rows=True))
    assert fit.calibration.targets == 3 and (fit.counts.rows, fit.counts.rows_left_out, fit.all_rows) == (3, 1, True)


def test_bad_input_is_refused(words, tmp_path):
    config = fit_config(words, "plain")
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "w1"}, {"text": ""}])
    for changes, message in (
        ({"limit": 0}, "--limit is 0"),
        ({"corpus": (tmp_path / "none.jsonl",)}, "there is no file"),
        ({"corpus": (corpus,)}, "no target to fit"),
        ({"max_length": 300}, "--max-length 300 is above the 256 positions"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(replace(config, **changes))


def test_a_broken_teacher_is_noticed(words):
    teacher = load_teacher(str(words / "plain"), device="cpu")
    with torch.no_grad():
        teacher.model.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match="NaN or infinite at row"):
        calibrate(fit_config(words, "plain"), teacher=teacher)


# --- a dump at a temperature ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(words) -> DumpConfig:
    """A dump that was made with a calibration of the doubled teacher."""
    write_calibration(words / "doubled.json", calibrate(fit_config(words, "doubled")).calibration)
    config = dump_config(words, "doubled", calibration=words / "doubled.json", top_k=5)
    dump(config)
    return config


def test_a_calibrated_dump_keeps_the_tail_at_the_temperature(calibrated, words):
    """What is stored there is log Σ p^(1/T) over the tail, to half a step of rounding."""
    store = KnowledgeStore.open(calibrated.store)
    manifest, temperature = store.manifest(), read_calibration(calibrated.calibration).temperature
    assert positions_of(manifest).calibration == {
        "temperature": temperature,
        "sha256": read_calibration(calibrated.calibration).sha256,
    }
    assert verify(calibrated.store).damage == []
    logits, _ = word_logits(words, "doubled")
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    kept = next(iter(store.batches(batch_size=160, shuffle=False)))
    ids = kept["candidate_ids"][:, 1:].reshape(-1, 5)
    np.put_along_axis(logprobs, ids, -np.inf, axis=1)
    expected = np.log(np.exp(logprobs / temperature).sum(axis=1))
    difference = np.abs(kept["tail_logsumexp"][:, 1:].reshape(-1) - expected)
    assert difference.max() <= positions_of(manifest).quantisation_step / 2 + 1e-4


def test_a_dump_is_resumed_with_the_same_calibration_alone(calibrated, words):
    assert dump(calibrated).shards_existing == 1
    with pytest.raises(MismatchError, match=r"temperature of --calibration was .* and is now absent"):
        dump(replace(calibrated, calibration=None))
    other = replace(read_calibration(calibrated.calibration), value=1.25)
    write_calibration(words / "other.json", other)
    with pytest.raises(MismatchError, match=r"temperature of --calibration was .* and is now 1\.25"):
        dump(replace(calibrated, calibration=words / "other.json"))


def test_a_calibration_of_something_else_is_refused_before_anything_is_made(calibrated, words, tmp_path):
    sound = read_calibration(calibrated.calibration)
    config = replace(dump_config(words, "plain", calibration=tmp_path / "c.json"), store=tmp_path / "store")
    for calibration, message in (
        (sound, "belongs to another teacher: it was fitted to 'doubled'"),
        (replace(sound, method="first", value=0.5), "of method first"),
        (replace(sound, method="bucket-temperature"), "of method bucket-temperature"),
    ):
        write_calibration(config.calibration, calibration)
        with pytest.raises(InputError, match=message):
            dump(config)
    same_weights = replace(sound, tokenizer={**sound.tokenizer, "vocabulary_sha256": "00"})
    write_calibration(config.calibration, same_weights)
    with pytest.raises(InputError, match="another tokenizer"):
        dump(replace(config, teacher=str(words / "doubled")))
    with pytest.raises(InputError, match="there is no calibration file"):
        dump(replace(config, calibration=tmp_path / "none.json"))
    assert not config.store.exists()


# --- the command ----------------------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_the_file_and_says_what_it_found(words, tmp_path):
    given = ["calibrate", "--teacher", words / "doubled", "--corpus", words / "corpus.jsonl", "--max-length", LENGTH]
    done = invoke(*given, "--limit", 150, "--output", tmp_path / "c.json")
    assert done.exit_code == 0, done.stderr
    calibration = read_calibration(tmp_path / "c.json")
    assert f"T = {calibration.temperature:g}" in done.stdout and "95% interval" in done.stdout
    assert f"{calibration.after['nll']:.4f}" in done.stdout and f"{calibration.before['ece_10']:.2%}" in done.stdout
    assert "Warning: 161 targets are few" in done.stderr
    refused = invoke(*given, "--output", words / "corpus.jsonl")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and "is no calibration" in refused.stderr
    run = ["run", tmp_path / "store", "--teacher", words / "plain", "--corpus", words / "corpus.jsonl"]
    refused = invoke(*run, "--calibration", tmp_path / "c.json", "--max-length", LENGTH)
    assert refused.exit_code == 2 and "belongs to another teacher" in refused.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["c.json"]


def test_help_has_an_example():
    text = " ".join(invoke("calibrate", "--help").stdout.split())
    assert "teacher-dump calibrate --teacher" in text


def test_a_temperature_makes_estimates_larger(loaded_teacher, teacher_folder, tmp_path):
    from teacher_dump import EstimateConfig, estimate

    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(20))
    fit = calibrate(CalibrateConfig(str(teacher_folder), (corpus,), max_length=48, limit=100), teacher=loaded_teacher)
    write_calibration(tmp_path / "c.json", fit.calibration)
    config = EstimateConfig(str(teacher_folder), (corpus,), max_length=48)
    plain, tempered = (
        estimate(replace(config, calibration=each), teacher=loaded_teacher) for each in (None, tmp_path / "c.json")
    )
    assert tempered.bytes > plain.bytes
