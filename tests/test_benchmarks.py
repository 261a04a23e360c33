"""Benchmarks and studies: each one can be imported and says what it measures. What they measure is no test's business."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import launchers, trust_figures
from benchmarks.calibrators import isotonic, platt
from benchmarks.studies import trust

ROOT = Path(__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


def test_studies_lie_beside_their_results():
    assert {path.stem.partition("-")[0] for path in (ROOT / "benchmarks/studies").glob("*.json")} == {
        path.stem for path in (ROOT / "benchmarks/studies").glob("*.py")
    }


@pytest.mark.parametrize("module", MODULES)
def test_each_shows_its_help(module, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_recipes_are_short_and_were_run_as_they_stand():
    kept = json.loads((ROOT / "benchmarks/results/launchers.json").read_text())["figures"]
    recipes = {name: text.splitlines() for name, text in launchers.recipes().items()}
    assert recipes.keys() == launchers.RUNS.keys() and all(len(lines) <= 15 for lines in recipes.values())
    assert kept.items() and all(figures["recipe"] == recipes[name] for name, figures in kept.items())
    assert all(figures["equal_to_one_worker"] for figures in kept.values())


def judged(generator: np.random.Generator, sizes: dict[str, int], skill: float, certainty: float) -> dict[str, list[float]]:
    """Likelihoods of four options, of which the first is right: more `skill` makes it likelier, `certainty` all differences."""
    found = {}
    for data, size in sizes.items():
        values = generator.normal(size=(size, 4))
        values[:, 0] += skill
        values *= certainty
        found[data] = (values - values.max(axis=1, keepdims=True)).round(3).ravel().tolist()
    return found


def test_the_table_of_trust_says_what_its_cells_say(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trust_figures, "RESAMPLES", 200)
    sizes = {**dict.fromkeys(trust.SETS, 150), trust_figures.FIT: 400}
    weak, strong = (judged(np.random.default_rng(0), sizes, skill, 4.0) for skill in (0.5, 2.0))
    likelihoods = {"fine-tuning": weak, "FIRST": weak, "candidates + draws": strong}
    record = {
        "settings": {"methods": trust.METHODS},
        "questions": {data: {"options": [4] * size, "answers": [0] * size} for data, size in sizes.items()},
        "models": {"whole": weak, "teacher / seed 0": strong},
        "cells": {trust.Cell("whole", 0, name).name: {"likelihoods": each} for name, each in likelihoods.items()},
    }
    record["table"] = trust_figures.tabulate(record)
    record["claims"] = trust_figures.claims(record["table"])
    record["not_run"] = [cell.name for cell in trust.cells() if cell.name not in record["cells"]]
    rows = {(row["student"], row["method"], row["calibrator"]): row for row in record["table"]}
    correct = [max(row) == row[0] for row in np.reshape(weak[trust.SETS[0]], (-1, 4)).tolist()]
    plain, better = rows["whole", "fine-tuning", "none"], rows["whole", "candidates + draws", "none"]
    assert plain["in domain"]["accuracy"][0] == pytest.approx(np.mean(correct), abs=1e-5)
    nothing = {"accuracy": [0, 0, 0], "ece": [0, 0, 0], "nll": [0, 0, 0]}
    assert rows["whole", "FIRST", "none"]["over fine-tuning"]["all four"] == nothing
    assert better["over fine-tuning"]["all four"]["accuracy"][1] > 0.023
    assert better["of each seed"]["in domain"]["accuracy"] == [better["in domain"]["accuracy"][0]]
    assert better["over the teacher"]["all four"] == nothing
    assert better["over the teacher"]["seeds"] == [0] and "over direct distillation" not in better
    assert "over the teacher" not in rows["whole", trust_figures.AS_IT_IS, "none"]  # which is no student of a seed
    assert rows["whole", "fine-tuning", "temperature"]["all four"]["nll"][0] < plain["all four"]["nll"][0]
    for calibrator in ("temperature", "Platt", "isotonic"):  # a model that is too sure is made less sure, and answers alike
        after = rows["whole", "fine-tuning", calibrator]["all four"]
        assert after["accuracy"] == plain["all four"]["accuracy"]
        assert after["ece"][0] < 0.5 * plain["all four"]["ece"][0]
    found = {(each["method"], each["metric"], each["where"], each["baseline"]): each for each in record["claims"]}
    assert found["candidates + draws", "accuracy", "all four", "over fine-tuning"]["verdict"] == "holds here"
    assert len(record["not_run"]) == 2 * 4 * len(trust.METHODS) - 3
    trust_figures.print_tables(record)
    shown = capsys.readouterr().out
    assert "Not run, 85 of 88 cells: whole / seed 0 / direct distillation;" in shown
    assert "| whole: FIRST | 0 |" in shown and "| teacher: as it is | 0 |" in shown
    assert "| whole: FIRST | fine-tuning | 0 | all four | +0.0 (+0.0 to +0.0) |" in shown
    trust_figures.draw(record, tmp_path / "trust.svg")
    assert (tmp_path / "trust.svg").exists()


def test_what_is_cut_of_trust_is_what_comes_last():
    order = list(trust.cells())
    core = [cell.method in trust.CORE for cell in order]
    assert core == sorted(core, reverse=True) and len(set(order)) == len(order) == 88
    assert [(cell.student, cell.seed) for cell in order if cell.method == "FIRST"] == [
        (student, seed) for student in ("whole", "healed") for seed in (0, 1, 2, 3)
    ]


@pytest.mark.parametrize(("points", "claimed", "words"), [
    ([3.0, 1.0, 5.0], 2.3, "holds here"),
    ([1.0, 0.5, 1.5], 2.3, "better here too, by less than claimed"),
    ([2.0, 0.5, 3.5], 2.3, "better here too, maybe by less than claimed"),
    ([0.0, -3.0, 3.0], 2.3, "not shown here"),
    ([0.0, -3.0, 3.0], -10.0, "no sign of it here"),
    ([4.0, 1.0, 7.0], -10.0, "the opposite here"),
])  # fmt: skip
def test_verdicts_on_a_claim(points, claimed, words):
    assert trust_figures.verdict(points, claimed) == words


def test_cells_of_trust_are_not_mixed_with_those_of_another_teacher_or_of_other_questions():
    record = {"origin": {"teacher of seed 0": "a"}, "questions": {}}
    asked = {"arc": [trust.Question("which", ("a", "b"), 0)]}
    trust.note_origin(record, {"teacher of seed 0": "a", "teacher of seed 1": "b"})  # a seed has a teacher of its own
    trust.note_questions(record, asked)
    trust.note_questions(json.loads(json.dumps(record)), asked)
    with pytest.raises(SystemExit, match="has cells of another teacher of seed 1, b instead of a"):
        trust.note_origin(record, {"teacher of seed 1": "a"})
    with pytest.raises(SystemExit, match="has cells of other questions"):
        trust.note_questions(record, {"arc": [trust.Question("which", ("a", "b"), 1)]})


def test_processes_share_the_cells_of_trust(monkeypatch, tmp_path):
    monkeypatch.setattr(trust, "store_record", lambda record, work: None)
    monkeypatch.setattr(trust, "take_finished", lambda record: None)
    record, found = {"cells": {"done": {}}}, []
    with trust.locked(tmp_path / "taken.lock", wait=True):
        for name in ("done", "taken", "free"):
            trust.share(record, "cells", name, tmp_path, lambda name=name: found.append(name) or {"seconds": 1})
    assert found == ["free"] and record["cells"]["free"] == {"seconds": 1}


def test_intervals_of_trust_know_of_seeds_and_of_the_bias_of_calibration_errors():
    seeds = np.array([1.0, 2.0, 6.0])[:, None] * np.ones(4001)
    mean = trust_figures.over_seeds(seeds)
    assert mean[0] == pytest.approx(3) and mean[1:].mean() == pytest.approx(3, abs=0.1)
    assert mean[1:].var() == pytest.approx(np.var([1, 2, 6], ddof=1) / 3, rel=0.1)
    assert trust_figures.over_seeds(seeds[:1]).tolist() == seeds[0].tolist()
    # Of 300 right and wrong answers as often as their confidence says, whose calibration error is 0.
    generator = np.random.default_rng(0)
    found = []
    for _ in range(10):
        confidence = generator.random(300)
        gaps = trust_figures.calibration_gaps(confidence, generator.random(300) < confidence, trust_figures.BINS)
        times = np.vstack([np.ones(300), generator.multinomial(300, np.full(300, 1 / 300), 40)]) / 300
        values = trust_figures.gap_error(times @ gaps, np.ones(41))
        found.append([values[0], trust_figures.unbiased(values)[0]])
    plain, better = np.mean(found, axis=0)
    assert plain > 0.04 and abs(better) < 0.85 * plain


def test_calibrators_after_training():
    generator = np.random.default_rng(0)
    values = generator.normal(size=4000)
    correct = generator.random(4000) < 1 / (1 + np.exp(-(0.5 * values - 0.25)))
    assert platt(values, correct) == pytest.approx((0.5, -0.25), abs=0.1)
    assert platt(np.array([-1.0, 1.0]), np.array([False, True]))[0] > 0  # apart, and finite all the same
    edges, heights = isotonic(np.array([3.0, 1.0, 2.0, 4.0]), np.array([False, False, True, True]))
    assert edges.tolist() == [1, 2, 3, 4] and heights.tolist() == [0, 0.5, 0.5, 1]
    edges, heights = isotonic(np.array([1.0, 2.0, 1.0, 1.0, 2.0]), np.array([True, False, False, False, True]))
    assert edges.tolist() == [1, 2] and heights.tolist() == pytest.approx([1 / 3, 1 / 2])  # one height for each value
