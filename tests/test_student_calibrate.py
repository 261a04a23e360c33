"""Re-calibration from a store alone: fits that are known beforehand, exact targets at a temperature, and runs that use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_teacher, story_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import commit, knowledge_of, make_manifest, words
from targets import in_float32, kept, log_softmax, random_case, random_draws
from typer.testing import CliRunner

from knowledge_store import Calibration, DumpWriter, KnowledgeStore, read_calibration, write_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import tokens_table
from student_train import TrainConfig, calibrate, recalibrated, select_targets, train
from student_train.calibration.description import doubts
from student_train.calibration.fit import first_ceiling
from student_train.cli import app

TEACHER = {"name": "numbers", "vocabulary_size": 11, "files": {"model.safetensors": "11"}}
TOKENIZER = {"size": 11, "vocabulary_sha256": "22"}
FIGURES = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}


def calibration(method: str = "temperature", value: float = 1.5, **changes) -> Calibration:
    fields = {"teacher": TEACHER, "tokenizer": TOKENIZER, "fitted_on": {}, "targets": 1000, "before": FIGURES, "after": FIGURES}
    return Calibration(method=method, value=value, **{**fields, **changes})


pytestmark = pytest.mark.usefixtures("one_thread")


# --- targets at a temperature ---------------------------------------------------------------------------------------------


def with_tail(teacher: np.ndarray, targets, temperature: float):
    """Targets that keep the tail at a temperature too, as an extractor computes it."""
    logprobs = log_softmax(teacher)
    np.put_along_axis(logprobs, targets.candidate_ids.numpy(), -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        return targets._replace(tail_logsumexp=torch.from_numpy(np.log(np.exp(logprobs / temperature).sum(axis=1))))


@given(st.integers(0, 1000), st.floats(0.3, 4), st.sampled_from([1, 5, 22, 23]))
@settings(max_examples=40)
def test_a_temperature_gives_exactly_the_tempered_softmax(seed, temperature, k):
    """Candidates, tail and the token's own, of unrounded knowledge, against softmax(z / T) over the whole vocabulary."""
    _, teacher, _ = random_case(seed, k=1)
    tokens = np.random.default_rng(seed).integers(0, teacher.shape[1], len(teacher))
    targets = with_tail(teacher, kept(teacher, k, tokens), temperature)
    found, expected = recalibrated(targets, calibration(value=temperature)), log_softmax(teacher / temperature)
    for name, value in (("candidate_logprobs", targets.candidate_ids.numpy()), ("token_logprob", tokens[:, None])):
        wanted = np.take_along_axis(expected, value, axis=1).reshape(getattr(found, name).shape)
        np.testing.assert_allclose(getattr(found, name).numpy(), wanted, atol=1e-9)
    np.put_along_axis(expected, targets.candidate_ids.numpy(), -np.inf, axis=1)
    np.testing.assert_allclose(np.exp(found.tail_logprob.numpy()), np.exp(expected).sum(axis=1), atol=1e-9)
    assert torch.equal(found.token_ids, targets.token_ids) and torch.equal(found.candidate_ids, targets.candidate_ids)
    assert found.tail_logsumexp is None


@given(st.integers(0, 1000), st.floats(0.3, 4), st.sampled_from([1, 5, 22]))
@settings(max_examples=40)
def test_a_bucket_temperature_tempers_the_symbols_and_leaves_shares_of_the_tail(seed, temperature, k):
    _, teacher, _ = random_case(seed, k=1)
    tokens = np.random.default_rng(seed).integers(0, teacher.shape[1], len(teacher))
    targets = kept(teacher, k, tokens)
    found = recalibrated(targets, calibration("bucket-temperature", temperature))
    for row in range(len(teacher)):
        symbols = torch.cat([targets.candidate_logprobs[row], targets.tail_logprob[row, None]]).exp().numpy()
        tempered = symbols ** (1 / temperature) / (symbols ** (1 / temperature)).sum()
        np.testing.assert_allclose(found.candidate_logprobs[row].exp().numpy(), tempered[:-1], rtol=1e-9)
        assert found.tail_logprob[row].exp().item() == pytest.approx(tempered[-1], rel=1e-9)
        place = np.flatnonzero(targets.candidate_ids[row].numpy() == tokens[row])
        share = 1 if len(place) else targets.token_logprob[row].exp().item() / symbols[-1]
        own = tempered[place[0] if len(place) else -1] * share
        assert found.token_logprob[row].exp().item() == pytest.approx(own, rel=1e-9)


def test_a_temperature_of_one_changes_nothing_and_the_whole_vocabulary_needs_no_tail():
    _, teacher, targets = random_case(3)
    plain = recalibrated(targets, calibration("bucket-temperature", 1.0))
    for name in ("candidate_logprobs", "tail_logprob", "token_logprob"):
        assert torch.allclose(getattr(plain, name), getattr(targets, name), atol=1e-12)
    whole = in_float32(with_tail(teacher, kept(teacher, teacher.shape[1]), 2.0))
    found = recalibrated(whole, calibration(value=2.0))
    assert found.tail_logprob.isneginf().all() and found.token_logprob.isfinite().all()
    assert torch.allclose(found.candidate_logprobs.exp().sum(dim=1), torch.ones(len(teacher)))


def test_fillers_stay_fillers_and_draws_are_dropped():
    _, teacher, _ = random_case(5)
    targets = random_draws(kept(teacher, 5), 0)
    filled = targets._replace(
        candidate_ids=torch.cat([targets.candidate_ids, torch.zeros(6, 2, dtype=torch.int64)], dim=1),
        candidate_logprobs=torch.cat([targets.candidate_logprobs, torch.full((6, 2), -torch.inf)], dim=1),
    )
    one, other = (recalibrated(each, calibration("bucket-temperature", 2.0)) for each in (targets, filled))
    assert torch.allclose(other.candidate_logprobs[:, :5], one.candidate_logprobs)
    assert other.candidate_logprobs[:, 5:].isneginf().all()
    assert torch.allclose(one.token_logprob, other.token_logprob) and torch.allclose(one.tail_logprob, other.tail_logprob)
    assert targets.draw_ids is not None and one.draw_ids is None and one.draw_weights is None


def test_what_cannot_be_recalibrated_is_refused():
    _, _, targets = random_case(0)
    with pytest.raises(ValueError, match="keep no tail at another temperature"):
        recalibrated(targets, calibration(value=2.0))
    with pytest.raises(ValueError, match="for the loss first"):
        recalibrated(targets, calibration("first", 0.5))


def test_candidates_outside_a_students_head_are_moved_after_the_temperature():
    """A head of 15 rows, a teacher of 23: the tail at T is that of everything the student has no row for as well."""
    _, teacher, _ = random_case(7)
    tokens = np.arange(len(teacher))
    targets = with_tail(teacher, kept(teacher, 6, tokens), 1.7)
    batch = {
        "is_target": torch.tensor([[False, True]]).expand(len(teacher), 2),
        "input_ids": targets.token_ids[:, None].expand(-1, 2),
        **{
            name: torch.stack([getattr(targets, name)] * 2, dim=1)
            for name in ("token_logprob", "candidate_ids", "candidate_logprobs", "tail_logprob", "tail_logsumexp")
        },
    }
    _, found = select_targets(torch.zeros(len(teacher), 2, 15), batch, lambda each: recalibrated(each, calibration(value=1.7)))
    expected = np.exp(log_softmax(teacher / 1.7))
    inside = found.candidate_logprobs > -torch.inf
    assert (~inside).any() and torch.equal(inside, targets.candidate_ids < 15)
    reached = np.where(inside, np.take_along_axis(expected, targets.candidate_ids.numpy(), axis=1), 0).sum(axis=1)
    np.testing.assert_allclose(found.tail_logprob.exp().numpy(), 1 - reached, atol=1e-9)


# --- fits -----------------------------------------------------------------------------------------------------------------


def write_labelled(folder: Path, k: int, scale: float, count: int = 300, step: float = 2**-16, **changes) -> KnowledgeStore:
    """A store whose text is what softmax(z) says, and whose teacher says softmax(scale · z); its own temperature is `scale`.

    Sequences have the columns `split` (calibration for every other one, else train) and `fold` (a number).
    """
    generator = np.random.default_rng(1)
    manifest = make_manifest(
        "labelled",
        k=k,
        shards=3,
        teacher=TEACHER,
        tokenizer=TOKENIZER,
        quantisation_step=step,
        columns={"split": "string", "fold": "int64", "length": "double"},
        calibration={"temperature": scale, "sha256": "00"},
        **changes,
    )
    writer = DumpWriter.open(folder, manifest, tokens_table(words(11), words(11)))
    for shard in range(3):
        knowledge = []
        for _ in range(count // 3):
            logits = generator.normal(0, 1.5, (10, 11))
            chosen = [0, *(generator.choice(11, p=np.exp(row)) for row in log_softmax(logits)[:-1])]
            arrays = knowledge_of(np.array(chosen), scale * logits, k)
            tempered = log_softmax(np.concatenate([logits[:1], logits[:-1]]) * scale) / scale
            np.put_along_axis(tempered, arrays["candidate_ids"].astype(np.int64), -np.inf, axis=1)
            with np.errstate(divide="ignore"):
                arrays["tail_logsumexp"] = np.log(np.exp(tempered).sum(axis=1)).astype(np.float32)
            knowledge.append(arrays)
        number = range(len(knowledge))
        own = {"split": [("train", "calibration")[n % 2] for n in number], "fold": list(number), "length": [0.5] * len(number)}
        commit(writer, shard, knowledge, **own)
    return KnowledgeStore.open(folder)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> KnowledgeStore:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "store", k=3, scale=2.0)


def arrays_of(store: KnowledgeStore) -> dict[str, np.ndarray]:
    """All target positions of a small store."""
    (batch,) = store.batches(batch_size=300, shuffle=False)
    chosen = batch["is_target"]
    return {name: value[chosen] for name, value in batch.items() if value.shape[:2] == chosen.shape}


def plain_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    total = 0.0
    for low in np.arange(bins) / bins:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_a_temperature_that_is_known_is_found(tmp_path):
    """With the whole vocabulary kept, a teacher whose logits are doubled has the temperature 2: 2,700 targets, to 0.1."""
    fit = calibrate(write_labelled(tmp_path / "store", k=11, scale=2.0), method="temperature")
    found = fit.calibration
    assert found.method == "bucket-temperature" and found.temperature == pytest.approx(2, abs=0.1)
    assert found.targets == 2700 and not fit.at_edge and doubts(fit) == []
    assert found.after["nll"] < found.before["nll"] - 0.1 and found.after["ece_10"] < 0.04 < found.before["ece_10"]
    # With no tail, the dump's own temperature is one of these.
    assert fit.dump_temperature == 2 and fit.dump_figures["nll"] == pytest.approx(found.after["nll"], abs=2e-3)
    assert fit.nll[0] < found.after["nll"] < fit.nll[1]


def test_the_bucket_temperature_has_the_least_loss(labelled):
    """Against a fine grid and a plain computation; the true temperature does better, since it shapes the tail too."""
    fit = calibrate(labelled, method="temperature")
    columns = arrays_of(labelled)
    among = columns["candidate_ids"] == columns["input_ids"][:, None]

    def loss(temperature: float) -> float:
        symbols = np.exp(
            np.concatenate([columns["candidate_logprobs"], columns["tail_logprob"][:, None]], axis=1).astype(float)
        )
        tempered = symbols ** (1 / temperature)
        tempered /= tempered.sum(axis=1, keepdims=True)
        share = np.exp(columns["token_logprob"].astype(float)) / symbols[:, -1]
        own = np.where(among.any(axis=1), (tempered[:, :-1] * among).sum(axis=1), tempered[:, -1] * share)
        return float(-np.log(own).mean())

    found = fit.calibration
    assert found.before["nll"] == pytest.approx(loss(1), abs=1e-4)
    assert found.after["nll"] == pytest.approx(loss(found.temperature), abs=1e-4)
    assert found.after["nll"] <= min(map(loss, np.linspace(0.5, 3, 51))) + 1e-5
    assert fit.dump_figures["nll"] < found.after["nll"] - 0.01
    full = recalibrated_nll(labelled, calibration(value=2.0))
    assert fit.dump_figures["nll"] == pytest.approx(full, abs=1e-4)


def recalibrated_nll(store: KnowledgeStore, given: Calibration) -> float:
    batch = {name: torch.from_numpy(value) for name, value in next(iter(store.batches(batch_size=300, shuffle=False))).items()}
    logits = torch.zeros(*batch["input_ids"].shape, 11)
    return float(-select_targets(logits, batch, lambda each: recalibrated(each, given))[1].token_logprob.double().mean())


def test_training_uses_what_was_fitted(labelled):
    """The loss that a fit reports is that of the targets a run would learn from."""
    found = calibrate(labelled, method="temperature").calibration
    assert recalibrated_nll(labelled, found) == pytest.approx(found.after["nll"], abs=1e-5)


def test_first_has_the_least_calibration_error_of_the_papers_grid(labelled):
    fit = calibrate(labelled, method="first")
    found, columns = fit.calibration, arrays_of(labelled)
    probabilities = np.exp(columns["candidate_logprobs"].astype(float))
    correct = columns["candidate_ids"][:, 0] == columns["input_ids"]

    def rescaled(c: float) -> np.ndarray:
        weights = np.exp(probabilities / c)
        return weights / weights.sum(axis=1, keepdims=True)

    errors = {round(0.1 * step, 2): plain_error(rescaled(0.1 * step).max(axis=1), correct) for step in range(1, 11)}
    coarse = min(errors, key=errors.get)
    fine = [round(coarse + 0.02 * step, 2) for step in range(-4, 5)]
    errors |= {c: plain_error(rescaled(c).max(axis=1), correct) for c in fine if 0 < c <= 1}
    assert dict(found.grid) == pytest.approx(errors, abs=1e-9)
    assert found.c == min(errors, key=errors.get) and found.after["ece_10"] == pytest.approx(errors[found.c])
    assert found.before["ece_10"] == pytest.approx(plain_error(probabilities[:, 0], correct))

    among = columns["candidate_ids"] == columns["input_ids"][:, None]
    covered = among.any(axis=1)
    assert found.uncovered == (~covered).sum() > 0
    own = (rescaled(found.c) * among).sum(axis=1)
    assert found.after["nll"] == pytest.approx(-np.log(own[covered]).mean())
    assert found.before["nll"] == pytest.approx(-np.log((probabilities * among).sum(axis=1)[covered]).mean())
    assert found.after["brier"] == pytest.approx((1 - 2 * own + (rescaled(found.c) ** 2).sum(axis=1)).mean())


@pytest.mark.parametrize(("c", "candidates", "ceiling"), [(0.28, 5, 0.899), (1.0, 2, 0.731), (0.1, 1, 1.0)])
def test_the_ceiling_of_first(c, candidates, ceiling):
    assert first_ceiling(c, candidates) == pytest.approx(ceiling, abs=1e-3)


def test_candidates_of_various_number(tmp_path):
    """top-p: rows with fewer candidates are filled up, and fillers are no candidates of FIRST's softmax."""
    store = KnowledgeStore.open(save_top_p(tmp_path))
    columns, found = arrays_of(store), calibrate(store, method="first").calibration
    confidence, losses = [], []
    for row, logprobs in enumerate(columns["candidate_logprobs"].astype(float)):
        probabilities = np.exp(logprobs[logprobs > -np.inf])
        rescaled = np.exp(probabilities / found.c) / np.exp(probabilities / found.c).sum()
        confidence.append(rescaled.max())
        place = np.flatnonzero(columns["candidate_ids"][row, : len(rescaled)] == columns["input_ids"][row])
        losses += (-np.log(rescaled[place])).tolist()
    assert len({*(columns["candidate_logprobs"] > -np.inf).sum(axis=1)}) > 2 and max(confidence) == 1
    correct = columns["candidate_ids"][:, 0] == columns["input_ids"]
    assert found.after["ece_10"] == pytest.approx(plain_error(np.array(confidence), correct))
    assert found.after["nll"] == pytest.approx(np.mean(losses))
    assert np.isfinite(list(calibrate(store, method="temperature").calibration.after.values())).all()


def save_top_p(folder: Path) -> Path:
    selection = {"name": "top-p", "p": 0.8, "max_k": 6}
    manifest = make_manifest("various", shards=1, selection=selection, teacher=TEACHER, tokenizer=TOKENIZER)
    writer = DumpWriter.open(folder / "various", manifest, tokens_table(words(11), words(11)))
    generator = np.random.default_rng(0)
    knowledge = []
    for _ in range(40):
        arrays = knowledge_of(generator.integers(0, 11, 9), generator.normal(0, 2, (9, 11)), 6)
        mass = np.exp(arrays["candidate_logprobs"].astype(np.float64))
        dropped = mass.cumsum(axis=1) - mass >= 0.8
        arrays["tail_logprob"] = np.log(np.exp(arrays["tail_logprob"]) + np.where(dropped, mass, 0).sum(axis=1)).astype(
            np.float32
        )
        arrays["candidate_logprobs"] = np.where(dropped, -np.inf, arrays["candidate_logprobs"]).astype(np.float32)
        knowledge.append(arrays)
    commit(writer, 0, knowledge)
    return folder / "various"


# --- which targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "targets"),
    [
        ("split=calibration", 1350),
        ("split=train", 1350),
        ("fold=7", 27),
        ("length=10", 2700),
        ("corpus_length=0.5", 2700),
        (None, 2700),
    ],
)
def test_a_split_picks_sequences_by_a_column(labelled, split, targets):
    """The corpus's own `length` is stored as `corpus_length`, beside the store's."""
    fit = calibrate(labelled, method="first", split=split)
    assert fit.calibration.targets == targets
    column, value = (split or "=").split("=")
    assert fit.calibration.fitted_on.get("column", "") == column and fit.calibration.fitted_on.get("value", "") == value
    assert fit.calibration.fitted_on["dump"] == "labelled"
    assert fit.calibration.teacher == TEACHER and fit.calibration.tokenizer == TOKENIZER


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("calibration", "must be COLUMN=VALUE"),
        ("split=", "must be COLUMN=VALUE"),
        ("part_of=calibration", "have no column 'part_of': they have .*split, fold"),
        ("split=validation", "has split=validation: its values are calibration, train$"),
        ("fold=many", "has fold=many: its values are 0, 1"),
        ("fold=1000", "has fold=1000: its values are .* …$"),
    ],
)
def test_a_split_that_is_not_there_is_refused(labelled, split, message):
    with pytest.raises(InputError, match=message):
        calibrate(labelled, split=split)


def test_few_targets_are_said_with_an_interval(labelled, tmp_path):
    fit = calibrate(labelled, method="temperature", split="fold=7")
    (few,) = [doubt for doubt in doubts(fit) if "27 targets are few" in doubt]
    assert "too few sequences for an interval" in few  # they are of three sequences
    fit = calibrate(write_labelled(tmp_path / "few", 4, 1.5, count=18), method="temperature")
    (few,) = [doubt for doubt in doubts(fit) if "162 targets are few" in doubt]
    assert f"{fit.ece_10[0]:.1%} to {fit.ece_10[1]:.1%}" in few and fit.ece_10[0] < fit.ece_10[1]


def test_other_bad_input(labelled, tmp_path):
    with pytest.raises(InputError, match="no method 'platt'"):
        calibrate(labelled, method="platt")
    with pytest.raises(InputError, match="no dump 'other'"):
        calibrate(labelled, "other")


# --- runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dumps(tmp_path_factory, loaded_teacher, teacher_folder) -> Path:
    """A folder with a store of the tiny teacher: dumps `plain`, `tempered` (at 1.7, with draws) and `drawn` (no candidates)."""
    from teacher_dump import CalibrateConfig, DumpConfig, dump
    from teacher_dump import calibrate as fit_temperature

    folder = tmp_path_factory.mktemp("dumps")
    corpus = write_jsonl(folder / "corpus.jsonl", story_rows(14))
    config = DumpConfig(str(teacher_folder), (corpus,), folder / "store", max_length=48, batch_size=8, calibration=None)
    held_out = CalibrateConfig(str(teacher_folder), (corpus,), max_length=48, batch_size=8, limit=100)
    fitted = fit_temperature(held_out, teacher=loaded_teacher).calibration
    write_calibration(folder / "t.json", replace(fitted, value=1.7))
    write_calibration(folder / "cooler.json", replace(fitted, value=0.9))
    dump(replace(config, name="plain"), teacher=loaded_teacher)
    dump(replace(config, name="tempered", calibration=folder / "t.json", draw_weight=0.1), teacher=loaded_teacher)
    store = KnowledgeStore.open(folder / "store")
    for method in ("first", "temperature"):
        found = calibrate(store, "plain", method=method, split="source=a").calibration
        write_calibration(folder / f"{found.method}.json", found)
    other = replace(found, teacher={**found.teacher, "files": {"model.safetensors": "00"}})
    write_calibration(folder / "foreign.json", other)
    save_teacher(folder / "student", layers=1, seed=1)
    return folder


def run(dumps: Path, output: Path, calibration: str | None, dump: str = "plain", **changes) -> TrainConfig:
    given = {"steps": 4, "batch_size": 4, "eval_fraction": 0.2, "evaluations": 1, "learning_rate": 1e-3, **changes}
    path = None if calibration is None else str(dumps / f"{calibration}.json")
    return TrainConfig(str(dumps / "store"), str(dumps / "student"), str(output), dump=dump, calibration=path, **given)


def losses(output: Path) -> list[float]:
    return [each["eval_loss"] for each in json.loads((output / "history.json").read_text())["entries"] if "eval_loss" in each]


def test_a_dump_gives_the_teachers_own_distribution_at_its_temperature(dumps, loaded_teacher):
    """Rounding to a step of 1/8 moves candidates by a step / T at most, the tail by half a step, and the sum by either."""
    batch = next(iter(KnowledgeStore.open(dumps / "store").batches("tempered", batch_size=14, shuffle=False)))
    batch = {name: torch.from_numpy(value) for name, value in batch.items()}
    with torch.inference_mode():
        logits = loaded_teacher.model(batch["input_ids"], attention_mask=batch["attention_mask"].long()).logits
    given = read_calibration(dumps / "t.json")
    chosen, found = select_targets(logits, batch, lambda each: recalibrated(each, given))
    expected = torch.log_softmax(chosen / given.temperature, dim=-1)
    step, temperature = 0.125, given.temperature
    bound = step / temperature + max(step / temperature, step / 2) + 1e-3
    for ids, logprobs in (
        (found.candidate_ids, found.candidate_logprobs),
        (found.token_ids[:, None], found.token_logprob[:, None]),
    ):
        assert (expected.gather(1, ids) - logprobs).abs().max() <= bound
    rest = expected.scatter(1, found.candidate_ids, -torch.inf).logsumexp(dim=1)
    assert (rest - found.tail_logprob).abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "dump", "options"),
    [
        ("first", "plain", {"loss": "first", "ce_weight": 0.2}),
        ("t", "tempered", {}),
        ("t", "tempered", {"loss": "reverse-kl", "ce_weight": 0.5}),
        ("bucket-temperature", "plain", {}),
        ("bucket-temperature", "tempered", {"loss": "total-variation", "temperature": 2.0}),
    ],
)
def test_a_run_with_each_calibration(dumps, tmp_path, name, dump, options):
    used, other = run(dumps, tmp_path / "run", name, dump, **options), run(dumps, tmp_path / "plain", None, dump, **options)
    assert train(used).finished and train(other).finished
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert losses(tmp_path / "run")[0] != losses(tmp_path / "plain")[0]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    stored = read_calibration(dumps / f"{name}.json")
    assert facts["identity"]["calibration"] == stored.sha256 and facts["config"]["calibration"] == used.calibration
    if name == "first":
        assert facts["config"]["first_c"] == stored.c
    # The same again is done already, with the file anywhere; with another calibration it is another run.
    moved = tmp_path / "moved.json"
    moved.write_bytes((dumps / f"{name}.json").read_bytes())
    assert train(replace(used, calibration=str(moved))).began_at == 4
    with pytest.raises(InputError, match="--calibration was"):
        train(replace(used, calibration=None))


def test_cross_entropy_is_of_the_text_whatever_the_calibration(dumps, tmp_path):
    """Mixed in alone, it is the same with and without."""
    for name, calibrated in (("with", "bucket-temperature"), ("without", None)):
        train(run(dumps, tmp_path / name, calibrated, ce_weight=1.0, steps=2))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


REFUSED = [
    ("first", "plain", {}, "for --loss first, not forward-kl"),
    ("first", "plain", {"loss": "first", "first_c": 0.5}, "--first-c or --calibration, not both"),
    ("t", "plain", {}, "the dump plain keeps none"),
    ("t", "tempered", {"loss": "first"}, "the loss first re-calibrates by its own c"),
    ("cooler", "tempered", {}, "has the temperature 0.9, and the dump tempered was made for 1.7"),
    ("t", "tempered", {"tail": "draws"}, "--tail draws works at temperature 1 only"),
    ("bucket-temperature", "tempered", {"tail": "draws"}, "--tail draws works at temperature 1 only"),
    ("bucket-temperature", "plain", {"loss": "ce"}, "the loss ce takes no --calibration"),
    ("foreign", "plain", {}, "belongs to another teacher"),
    ("none", "plain", {}, "there is no calibration file"),
]


@pytest.mark.parametrize(("name", "dump", "options", "message"), REFUSED)
def test_a_calibration_that_cannot_be_used_is_refused_before_training(dumps, tmp_path, name, dump, options, message):
    with pytest.raises(InputError, match=message):
        train(run(dumps, tmp_path / "run", name, dump, **options))
    assert not (tmp_path / "run").exists()


# --- the command ----------------------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_says_what_it_found(dumps, tmp_path):
    given = ["calibrate", dumps / "store", "--dump", "tempered", "--split", "source=a", "--output", tmp_path / "c.json"]
    done = invoke(*given, "--method", "first")
    assert done.exit_code == 0, done.stderr
    found = read_calibration(tmp_path / "c.json")
    assert f"c = {found.c:g}" in done.stdout and "no confidence comes out above" in done.stdout
    assert f"{found.uncovered:,} of {found.targets:,} targets" in done.stdout
    assert f"{found.after['nll']:.4f}" in done.stdout and "the sequences with source=a" in done.stderr
    done = invoke(*given, "--method", "temperature")
    assert done.exit_code == 0 and read_calibration(tmp_path / "c.json").method == "bucket-temperature"
    assert "dump's T = 1.7" in done.stdout and "by its loss, the dump's own temperature" in done.stdout
    whole = invoke("calibrate", dumps / "store", "--dump", "plain", "--output", tmp_path / "c.json")
    assert "all sequences" in whole.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "nothing=1"], "no column 'nothing'"),
        (["--method", "platt"], "--method is 'platt'; it must be first or temperature"),
        (["--output", "none/c.json"], "there is no folder none"),
    ],
)
def test_mistakes_are_one_line(dumps, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = invoke("calibrate", dumps / "store", "--dump", "plain", *arguments)
    assert done.exit_code == 2 and not done.stdout and not any(tmp_path.iterdir())
    assert done.stderr.startswith("Error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_the_command_trains_with_a_calibration(dumps, tmp_path):
    given = ["run", dumps / "store", "--student", dumps / "student", "--dump", "plain", "--steps", 1]
    done = invoke(*given, "--calibration", dumps / "bucket-temperature.json", "--output", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    done = invoke(*given, "--calibration", dumps / "foreign.json", "--output", tmp_path / "other")
    assert done.exit_code == 2 and "belongs to another teacher" in done.stderr
