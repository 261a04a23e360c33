"""The words in which an agreement is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_dump.checking.positions.limits import FLOAT32, SHARE_OFF

if TYPE_CHECKING:
    from teacher_dump.checking.positions.verdicts import PositionsAgreement


def describe(agreement: PositionsAgreement) -> list[str]:
    """An agreement in words: the distribution of differences, rates, and the verdict with what it rests on."""
    lines = [f"{agreement.dump}: {agreement.sequences} sequences asked again, {agreement.positions:,} positions with knowledge"]
    if agreement.differences:
        heads = "".join(f"{name:>9}" for name in ("median", "90 %", "99 %", "99.9 %", "most", "|mean|", "noise"))
        lines.append(f"{'beyond rounding':<16}{'values':>10}{'same step':>11}{'1 off':>8}{'2 off':>8}{'more':>8}{heads}")
    for name, difference in agreement.differences.items():
        # Draws and the order of candidates are not rounded.
        steps = [f"{share:.2%}" for share in difference.steps] if sum(difference.steps) else ["–"] * 4
        means = [f"{value:.2g}" for value in (difference.mean, difference.noise)] if sum(difference.steps) else ["–"] * 2
        quantiles = "".join(f"{value:>9.2g}" for value in difference.quantiles) + "".join(f"{mean:>9}" for mean in means)
        lines.append(f"{name:<16}{difference.values:>10,}{steps[0]:>11}{steps[1]:>8}{steps[2]:>8}{steps[3]:>8}{quantiles}")
    if agreement.differences:
        lines.append(
            "In nats, less the half step that rounding explains; draws as a share of the tail. |mean|: how far values moved one"
            " way on average; beside it, what noise can do to that."
        )
        lines.append(
            "What is rounded: how far candidates are below the first, the tail's log-odds, and the log-probability of a token"
            " that is no candidate."
        )
    if agreement.changed_top_1 is not None:
        lines.append(f"likeliest token changed: {agreement.changed_top_1:.3%} of positions")
    if agreement.moved_draws is not None:
        lines.append(f"draws that fall on another token: {agreement.moved_draws:.3%}")
    limits = agreement.limits
    dtype = "float32" if limits is FLOAT32 else "a dtype of 16 bits"
    lines.append(
        f"Noise ({dtype}), of each quantity: the median sequence off by up to {limits.typical} nats a value on average, and"
        f" no value by more than {limits.single}. Noise goes up and down alike, so that the mean of n positions, of a sequence"
        f" or of all, moves by up to {limits.bias} + {limits.spread}/√n. Damage: some sequences beyond that."
        f" Another teacher: more than {SHARE_OFF:.0%} of them, or all together (damage if its weights are the dump's own)."
    )
    if agreement.moved_draws is not None:
        lines.append(
            f"Noise in draws: those of a sequence off by up to {limits.draws} of the tail on average, no draw by more than"
            f" {limits.draw}, and up to {limits.moved:.0%} on another token. Damage: some draws beyond that, or most sequences'"
            " where values agree."
        )
    lines.append(f"Verdict: {agreement.verdict}")
    lines += [f"  {reason}" for reason in agreement.reasons]
    return lines
