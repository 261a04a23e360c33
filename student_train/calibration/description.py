"""A fit in words: a small table, what it means, and what speaks against it."""

from __future__ import annotations

import math

from student_train.calibration.fit import MIN_TARGETS, StoreFit


def describe(fit: StoreFit) -> list[str]:
    """A fit as a small table, and what it means."""
    calibration = fit.calibration
    first = calibration.method == "first"
    before, after = calibration.before, calibration.after
    columns = {"as it is": before, f"{'c' if first else 'T'} = {calibration.value:g}": after}
    if fit.dump_figures is not None:
        columns[f"dump's T = {fit.dump_temperature:g}"] = fit.dump_figures
    lines = [" " * 28 + "".join(f"{label:>18}" for label in columns)]
    for name, label, form in (
        ("nll", "loss, nats per target", ".4f"),
        ("ece_10", "calibration error, 10 bins", ".2%"),
        ("ece_15", "calibration error, 15 bins", ".2%"),
        ("brier", "Brier score", ".4f"),
    ):
        lines.append(f"{label:<28}" + "".join(f"{format(figures[name], form):>18}" for figures in columns.values()))
    lines.append("Brier score: over the candidates and everything else as one more class")
    if first:
        lines.append(
            f"{calibration.uncovered:,} of {calibration.targets:,} targets have a token that is not among the candidates:"
            " FIRST gives it nothing, and the loss of the first two columns leaves them out"
        )
        lines.append(f"no confidence comes out above {fit.ceiling:.3f} at this c, however sure the teacher is")
    elif fit.dump_figures is not None:
        better = "better" if fit.dump_figures["nll"] < after["nll"] else "no better"
        lines.append(f"by its loss, the dump's own temperature of the whole distribution is {better} than this one")
    return lines


def doubts(fit: StoreFit) -> list[str]:
    """What speaks against a fit, in words; empty when nothing does."""
    calibration = fit.calibration
    before, after, targets = calibration.before, calibration.after, calibration.targets
    sentences = []
    if targets < MIN_TARGETS:
        interval = "they are of too few sequences for an interval"
        if not math.isnan(fit.ece_10[0] + fit.nll[0]):
            interval = (
                f"with 95 % confidence the calibration error is {fit.ece_10[0]:.1%} to {fit.ece_10[1]:.1%}, and the loss"
                f" {fit.nll[0]:.3f} to {fit.nll[1]:.3f} nats"
            )
        sentences.append(f"{targets} targets are few (fit on {MIN_TARGETS} or more): {interval}")
    if fit.at_edge:
        sentences.append(f"{calibration.value:g} is where the search ends: the best value may lie beyond it")
    if calibration.method == "bucket-temperature" and after["nll"] > before["nll"] * (1 - 1e-3):
        sentences.append(f"a temperature does not help: {calibration.value:g} lowers the loss by less than 0.1%")
    if after["ece_10"] > before["ece_10"]:
        sentences.append("the calibration error is higher with it than without")
    return sentences
