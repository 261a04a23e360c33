"""What the finished cells of the study of trust say: accuracy and calibration with their intervals, differences between
methods, FIRST's claims beside them, and the page that shows it.

A record is what trust.json keeps: `questions` (how many options each has, and which is right), `models` and `cells` (by name,
the log-likelihood of each option), and `settings`, whose `methods` are in the order of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibrators import fit_calibrators
from benchmarks.pictures import picture
from benchmarks.questions import BINS, RESAMPLES, SETS, figure_cell, interval
from student_train.evaluation.bootstrap import calibration_gaps, gap_error
from student_train.evaluation.metrics import negative_log_likelihood

AS_IT_IS = "as it is"
STUDENTS = ("whole", "healed")
FIT = "held out to fit on"
GROUPS = {"in domain": SETS[:1], "out of domain": SETS[1:], "all four": SETS}
# What a row is compared with: a model (None for the row's own student), a method, and a calibrator after training (None for the
# row's own).
BASELINES: dict[str, tuple[str | None, str, str | None]] = {
    "over fine-tuning": (None, "fine-tuning", "none"),
    "over fine-tuning and a temperature": (None, "fine-tuning", "temperature"),
    "over direct distillation": (None, "direct distillation", None),
    "over the teacher": ("teacher", AS_IT_IS, None),
}
CLAIMED = ("over fine-tuning", "over fine-tuning and a temperature")  # what FIRST's claims are held against
# The baselines of the page: without a calibrator after training, and with a temperature after both.
SHOWN = {
    "fine-tuning": CLAIMED,
    "direct distillation": ("over direct distillation", "over direct distillation"),
    "the teacher": ("over the teacher", "over the teacher"),
}
# FIRST's, on average over its data sets: in points of accuracy and, as we read it, in points of calibration error.
CLAIMS = {"accuracy": 2.3, "ece": -10.0}
LABELS = {"accuracy": "accuracy", "ece": "ECE"}


@dataclass(frozen=True)
class Cell:
    """One student that is trained and asked."""

    student: str
    seed: int
    method: str

    @property
    def name(self) -> str:
        """What it is called in the result."""
        return f"{self.student} / seed {self.seed} / {self.method}"

    @staticmethod
    def named(name: str) -> Cell:
        """The cell of a name in the result."""
        student, seed, method = name.split(" / ")
        return Cell(student, int(seed.removeprefix("seed ")), method)


def unpacked(likelihoods: list[float], options: list[int]) -> np.ndarray:
    """(N, C) of the options' likelihoods one after another; −inf where a question has fewer."""
    values = np.full((len(options), max(options)), -np.inf)
    values[np.arange(max(options)) < np.array(options)[:, None]] = likelihoods
    return values


def replicates(likelihoods: dict[str, list[float]], questions: dict[str, Any]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """By calibrator and group, accuracy, ECE, Brier score of the chosen option's confidence and, where there is a distribution,
    NLL, in RESAMPLES bootstrap samples of the questions: (1 + RESAMPLES,), the figure itself first. The samples of a data set
    are always the same, so that two cells can be subtracted."""
    values = {data: unpacked(each, questions[data]["options"]) for data, each in likelihoods.items()}
    answers = {data: np.array(questions[data]["answers"]) for data in values}
    samples = {}
    for place, data in enumerate(SETS):
        size = len(answers[data])
        times = np.random.default_rng(place).multinomial(size, np.full(size, 1 / size), RESAMPLES)
        samples[data] = np.vstack([np.ones(size), times]) / size
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, calibrator in fit_calibrators(values[FIT], answers[FIT]).items():
        sets = {}
        for data, times in samples.items():
            confidence, correct = calibrator.confidence(values[data]), values[data].argmax(axis=1) == answers[data]
            gaps = calibration_gaps(confidence, correct, BINS)
            sets[data] = {
                "accuracy": times @ correct,
                "ece": gap_error(times @ gaps, np.ones(len(times))),
                "brier": times @ (confidence - correct) ** 2,
            }
            if calibrator.temperature is not None:
                nll = negative_log_likelihood(values[data], answers[data], calibrator.temperature)
                sets[data]["nll"] = times @ nll
        found[name] = {
            group: {metric: np.mean([sets[data][metric] for data in names], axis=0) for metric in sets[SETS[0]]}
            for group, names in GROUPS.items()
        }
    return found


def over_seeds(values: np.ndarray) -> np.ndarray:
    """The mean over seeds of (S, 1 + RESAMPLES), where each resample of the questions has S − 1 of the seeds, drawn with
    replacement: the same for all that have as many seeds, so that two of them can be subtracted."""
    count, size = values.shape
    weights = np.full((size, count), 1 / count)
    if count > 1:
        generator = np.random.default_rng(count)
        weights[1:] = generator.multinomial(count - 1, np.full(count, 1 / count), size - 1) / (count - 1)
    mean: np.ndarray = (weights.T * values).sum(axis=0)
    return mean


def unbiased(values: np.ndarray) -> np.ndarray:
    """A calibration error, or a difference of two, (1 + RESAMPLES,), without the bias that its resamples show: each of them is
    reflected about the figure (the basic bootstrap interval), and the figure is their mean (Efron & Tibshirani 1993)."""
    reflected = 2 * values[0] - values[1:]
    return np.concatenate([[reflected.mean()], reflected])


def tabulate(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each student, method and calibrator with a finished cell: means over its seeds, and the differences to the
    baselines over the seeds that both have. Models as they are, such as the teacher, come first."""
    found: dict[tuple[str, str], dict[int | None, Any]] = {}
    for name, likelihoods in record["models"].items():
        model, _, seed = name.partition(" / seed ")
        found.setdefault((model, AS_IT_IS), {})[int(seed) if seed else None] = replicates(likelihoods, record["questions"])
    methods = [*record["settings"]["methods"]]
    ran = [Cell.named(name) for name in record["cells"]]
    for cell in sorted(ran, key=lambda cell: (STUDENTS.index(cell.student), methods.index(cell.method), cell.seed)):
        likelihoods = record["cells"][cell.name]["likelihoods"]
        found.setdefault((cell.student, cell.method), {})[cell.seed] = replicates(likelihoods, record["questions"])

    def mean(name: tuple[str, str], calibrator: str, seeds: list[int | None]) -> dict[str, dict[str, np.ndarray]]:
        each = [found[name][seed][calibrator] for seed in seeds]
        return {
            group: {metric: over_seeds(np.array([one[group][metric] for one in each])) for metric in each[0][group]}
            for group in GROUPS
        }

    table = []
    for (student, method), of_seeds in found.items():
        seeds = list(of_seeds)
        for calibrator in of_seeds[seeds[0]]:
            row: dict[str, Any] = {"student": student, "method": method, "calibrator": calibrator, "seeds": seeds}
            row |= _intervals(mean((student, method), calibrator, seeds))
            row["of each seed"] = {
                group: {
                    metric: [round(float(each[calibrator][group][metric][0]), 5) for each in of_seeds.values()]
                    for metric in CLAIMS
                }
                for group in GROUPS
            }
            for title, (model, other_method, other_calibrator) in BASELINES.items():
                other, after = (model or student, other_method), other_calibrator or calibrator
                both = [seed for seed in seeds if seed in found.get(other, {})]
                if both and (*other, after) != (student, method, calibrator):
                    one, baseline = partial(mean, (student, method), calibrator), partial(mean, other, after)
                    row[title] = {"seeds": both, **_differences(one(both), baseline(both))}
                    if len(both) > 1:
                        row[title]["of each seed"] = [_differences(one([seed]), baseline([seed])) for seed in both]
            table.append(row)
    return table


def _differences(one: dict[str, dict[str, np.ndarray]], other: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    metrics = [metric for metric in (*CLAIMS, "nll") if metric in one["all four"]]
    found = {group: {metric: one[group][metric] - other[group][metric] for metric in metrics} for group in GROUPS}
    return _intervals(found, least=-np.inf)


def _intervals(groups: dict[str, dict[str, np.ndarray]], least: float = 0) -> dict[str, dict[str, list[float]]]:
    found = {}
    for group, metrics in groups.items():
        figures = {name: unbiased(values) if name == "ece" else values for name, values in metrics.items()}
        found[group] = {name: interval(values.clip(min=least)) for name, values in figures.items()}
    return found


def verdict(difference: list[float], claimed: float) -> str:
    """What a difference in points, with its interval, says of a claim. Where the interval holds 0, "not shown" means that it
    holds the claimed figure too, and "no sign of it" that it does not."""
    figure, low, high = difference
    sign = 1 if claimed > 0 else -1
    figure, least, most = (figure, low, high) if sign > 0 else (-figure, -high, -low)
    if least > 0 and figure >= abs(claimed):
        return "holds here"
    if least > 0:
        return "better here too, " + ("by less than claimed" if most < abs(claimed) else "maybe by less than claimed")
    if most < 0:
        return "the opposite here"
    return "not shown here" if most >= abs(claimed) else "no sign of it here"


def claims(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FIRST's claims beside what was found, in points, for its methods and ours without a calibrator after training: how wide
    the interval is, whether one as wide about the claimed figure would leave 0 out, and the verdict."""
    found = []
    for row in table:
        if row["calibrator"] != "none" or not ("FIRST" in row["method"] or "draws" in row["method"]):
            continue
        for title in CLAIMED:
            for group in GROUPS if title in row else ():
                for metric, claimed in CLAIMS.items():
                    points = [round(100 * value, 2) for value in row[title][group][metric]]
                    width = round(points[2] - points[1], 2)
                    entry = {"student": row["student"], "method": row["method"], "baseline": title, "where": group}
                    entry |= {"seeds": row[title]["seeds"], "metric": metric, "points": points, "width": width}
                    entry |= {"tells": width < 2 * abs(claimed)}
                    found.append({**entry, "claimed": claimed, "verdict": verdict(points, claimed)})
    return found


# ---- the page


def print_tables(record: dict[str, Any]) -> None:
    """How wide the intervals are, all figures, differences and FIRST's claims, in Markdown."""
    compared = [each for each in record["claims"] if each["baseline"] == "over fine-tuning"]
    print("How wide the intervals of differences to fine-tuning are, in points, and whether they can tell what FIRST claims:")
    print("\n| where | figure | claimed | widths | can tell |\n|" + " --- |" * 5)
    for group in GROUPS:
        for metric, claimed in CLAIMS.items():
            entries = [each for each in compared if (each["where"], each["metric"]) == (group, metric)]
            if entries:
                widths = f"{min(each['width'] for each in entries):.1f} to {max(each['width'] for each in entries):.1f}"
                told = f"{sum(each['tells'] for each in entries)} of {len(entries)}"
                print(f"| {group} | {LABELS[metric]} | {claimed:+g} | {widths} | {told} |")
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in record["table"]:
        rows.setdefault((row["student"], row["method"]), {})[row["calibrator"]] = row
    where = ("in domain", "out of domain")
    columns = " | ".join(f"{LABELS[metric]} {group}" for metric in CLAIMS for group in where)
    print(f"\n| of each seed, % | seeds | {columns} |\n|" + " --- |" * 6)
    for (student, method), calibrated in rows.items():
        each = calibrated["none"]["of each seed"]
        shown = [" / ".join(f"{100 * value:.1f}" for value in each[group][metric]) for metric in CLAIMS for group in where]
        print(f"| {student}: {method} | {seed_names(calibrated['none']['seeds'])} | {' | '.join(shown)} |")
    for group in GROUPS:
        calibrators = ("a temperature", "Platt", "isotonic")
        after = " | ".join([*(f"ECE after {each}, %" for each in calibrators), "NLL after a temperature, nats"])
        print(f"\n| {group} | seeds | accuracy, % | ECE, % | {after} |\n|" + " --- |" * 8)
        for (student, method), calibrated in rows.items():
            shown = [figure_cell(calibrated["none"][group]["accuracy"], 100)]
            shown += [figure_cell(row[group]["ece"], 100) for row in calibrated.values()]
            shown.append(figure_cell(calibrated["temperature"][group]["nll"], 1))
            print(f"| {student}: {method} | {seed_names(calibrated['none']['seeds'])} | {' | '.join(shown)} |")
    print("\nDifferences in points, and in nats; the last two after a temperature on both:")
    print("\n| of | to | seeds | where | accuracy | ECE | ECE | NLL |\n|" + " --- |" * 8)
    places = {name: place for place, name in enumerate(rows)}
    for (student, method), calibrated in rows.items():
        plain, cooled = calibrated["none"], calibrated["temperature"]
        for (to, (before, after)), group in product(SHOWN.items(), GROUPS):
            model, other, _ = BASELINES[before]
            if before in plain and places[model or student, other] < places[student, method]:  # each difference once
                shown = [figure_cell(plain[before][group][name], 100, "+") for name in CLAIMS]
                shown.append(figure_cell(cooled[after][group]["ece"], 100, "+"))
                shown.append(figure_cell(cooled[after][group]["nll"], 1, "+"))
                seeds = seed_names(plain[before]["seeds"])
                print(f"| {student}: {method} | {to} | {seeds} | {group} | {' | '.join(shown)} |")
    print("\n| student | method | against | seeds | figure | where | Δ, points | claimed | |\n|" + " --- |" * 9)
    for each in record["claims"]:
        points = figure_cell([value / 100 for value in each["points"]], 100, "+")
        words = [each["student"], each["method"], each["baseline"].removeprefix("over "), seed_names(each["seeds"])]
        words += [LABELS[each["metric"]], each["where"]]
        print(f"| {' | '.join(words)} | {points} | {each['claimed']:+g} | {each['verdict']} |")
    total = len(record["not_run"]) + len(record["cells"])
    print(f"\nNot run, {len(record['not_run'])} of {total} cells: {'; '.join(record['not_run'])}.")


def seed_names(seeds: list[int | None]) -> str:
    """Which seeds a mean is of; empty for a model that is the same for all."""
    return ", ".join(str(seed) for seed in seeds if seed is not None)


def draw(record: dict[str, Any], path: Path) -> None:
    """What each method gains over fine-tuning in accuracy and in calibration error, in and out of domain."""
    rows = [row for row in record["table"] if "over fine-tuning" in row and row["calibrator"] in ("none", "temperature")]
    if not rows:
        return
    with picture(path, 1, 2, sharey=True, figsize=(9, 1.2 + 0.26 * len(rows))) as panels:
        for axes, (metric, claimed) in zip(panels, CLAIMS.items(), strict=True):
            for group, colour, shift in (("in domain", "#33658a", 0.12), ("out of domain", "#c1440e", -0.12)):
                for place, row in enumerate(rows):
                    value, low, high = (100 * each for each in row["over fine-tuning"][group][metric])
                    marks = {"fmt": "o", "markersize": 3, "color": colour, "label": "" if place else group}
                    axes.errorbar(value, shift - place, xerr=[[max(value - low, 0)], [max(high - value, 0)]], **marks)
            axes.axvline(0, color="#888888", linewidth=0.8)
            axes.axvline(claimed, color="#6a9a3b", linewidth=0.8, linestyle=(0, (4, 3)), label="claimed of FIRST")
            axes.set_xlabel(f"points of {LABELS[metric]} over fine-tuning")
        after = {"none": "", "temperature": ", temperature after"}
        names = [f"{row['student']}: {row['method']}{after[row['calibrator']]}" for row in rows]
        panels[0].set_yticks([-place for place in range(len(rows))], names)
        panels[1].figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
