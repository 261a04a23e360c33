"""What differences between a dump and its teacher mean: agreement, damage, another teacher, or another tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import positions_of
from teacher_dump.checking.agreement import AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER, Agreement
from teacher_dump.checking.positions.comparison import KeptSequence
from teacher_dump.checking.positions.limits import SHARE_OFF, SHORT, Limits
from teacher_dump.checking.positions.report import describe

MAX_COUNTED = 2.0  # nats of one value, in a mean
SHOWN = 5
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Differences:
    """How far one quantity is off, over all its values.

    Attributes:
        values: how many.
        steps: shares of the values that are the same step, one off, two off, and more.
        quantiles: of the difference (nats; of draws a share of the tail), at QUANTILES.
        typical: mean |difference| of a value in the median sequence, from how many steps they moved (nats).
        mean: |mean difference| over all positions, likewise (nats). noise: what noise can do to that.
    """

    values: int
    steps: tuple[float, float, float, float]
    quantiles: tuple[float, ...]
    typical: float = 0.0
    mean: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PositionsAgreement(Agreement):
    """How far a teacher agrees with the predictions that a dump keeps.

    Attributes:
        positions: how many were compared, those with knowledge.
        limits: what counts as numeric noise here.
        differences: of `token`, `candidates`, `tail`, and where there are any `tail at T`, `selection`, `draws`.
        noise: the largest `typical` of any quantity (nats).
        draws_off: mean difference of a draw in the median sequence (share of the tail); None without draws.
        changed_top_1: share of the positions whose likeliest token is another one; None without candidates.
        moved_draws: share of the draws that now fall on another token; None without draws.
        sequences_off: how many have a value beyond `limits.single`, a mean beyond `limits.mean` or a draw beyond `limits.draw`,
            cannot be read, or have other tokens than they had.
    """

    positions: int
    limits: Limits
    differences: dict[str, Differences] = field(default_factory=dict)
    noise: float = 0.0
    draws_off: float | None = None
    changed_top_1: float | None = None
    moved_draws: float | None = None
    sequences_off: int = 0

    @property
    def lines(self) -> list[str]:
        """The distribution of differences, rates, and the verdict with what it rests on."""
        return describe(self)


def _values(compared: list[Arrays], ending: str) -> np.ndarray:
    """All values there are of the quantities whose name ends like this, one after the other."""
    values = [array.ravel() for arrays in compared for name, array in arrays.items() if name.endswith(ending)]
    joined = np.concatenate([np.zeros(0), *values])
    return joined[~np.isnan(joined)]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _means(compared: Arrays, name: str) -> np.ndarray:
    """Of one sequence, how far a quantity moved at each position that has it: the mean of its values, in nats, (n,).

    One that is far off does not speak for all: none counts for more than MAX_COUNTED.
    """
    moved = compared[f"{name} moved"]
    moved = moved if moved.ndim == 2 else moved[:, None]
    present = ~np.isnan(moved)
    sums = np.where(present, moved.clip(-MAX_COUNTED, MAX_COUNTED), 0).sum(axis=1)
    return sums[present.any(axis=1)] / present.sum(axis=1)[present.any(axis=1)]


def _differences(compared: list[Arrays], step: float, limits: Limits) -> dict[str, Differences]:
    names = [name.removesuffix(" off") for name in (compared[0] if compared else ()) if name.endswith(" off")]
    differences = {}
    for name in names:
        off, moved = (_values(compared, f"{name} {ending}") for ending in ("off", "moved"))
        if not len(off):
            continue
        steps = np.abs(moved) / step
        same, one, two, more = (
            _mean(share) or 0.0 for share in (steps < 0.5, abs(steps - 1) < 0.5, abs(steps - 2) < 0.5, steps > 2.5)
        )
        quantiles = tuple(float(quantile) for quantile in np.quantile(off, QUANTILES, method="higher"))
        typical = mean = noise = 0.0
        if len(moved):
            by_sequence = [np.abs(moves) for moves in (_values([arrays], f"{name} moved") for arrays in compared) if len(moves)]
            typical = _median(moves.mean() for moves in by_sequence) or 0.0
            means = np.concatenate([_means(arrays, name) for arrays in compared])
            mean, noise = abs(float(means.mean())), limits.mean(len(means))
        differences[name] = Differences(len(off), (same, one, two, more), quantiles, typical, mean, noise)
    return differences


def _farthest(sequence: KeptSequence, compared: Arrays, limits: Limits) -> tuple[float, str]:
    """The largest difference of a sequence, in multiples of what noise can do to it, and a sentence about it."""
    most, words = 0.0, ""
    for name, values in compared.items():
        if not name.endswith(" off") or not values.size:
            continue
        flat = np.where(np.isnan(values), 0, values).reshape(len(values), -1).max(axis=1, initial=0)
        at = int(flat.argmax())
        limit, unit = (limits.draw, "of the tail") if name == "draws off" else (limits.single, "nats")
        if flat[at] / limit > most:
            most = float(flat[at]) / limit
            words = f"sequence {sequence.number}, position {sequence.places[at]}: {name} by {flat[at]:.3g} {unit}"
    for name, mean, limit, positions in _biases(compared, limits):
        if most <= 1 and mean > limit:  # one value that is off says where
            most = mean / limit
            words = (
                f"sequence {sequence.number}: {name} off one way, by {mean:.3g} nats on average over {positions} positions"
                f" (noise: up to {limit:.2g})"
            )
    return most, words


def _biases(compared: Arrays, limits: Limits) -> Iterator[tuple[str, float, float, int]]:
    """Of each rounded quantity of a sequence: name, |mean difference|, what noise can do to that, over how many positions."""
    for name in (key.removesuffix(" moved") for key in compared if key.endswith(" moved")):
        means = _means(compared, name)
        if len(means):
            yield name, abs(float(means.mean())), limits.mean(len(means)), len(means)


def _median(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return float(np.median(numbers)) if numbers else None


def _value_is_off(compared: Arrays, limits: Limits) -> bool:
    """Whether any value of a sequence, or a mean of them, is off by more than noise can do to it, draws excepted."""
    names = (name for name in compared if name.endswith(" off") and name != "draws off")
    return any((compared[name] > limits.single).any() for name in names) or any(
        mean > limit for _, mean, limit, _ in _biases(compared, limits)
    )


def judge(
    manifest: Manifest,
    kept: list[KeptSequence],
    compared: list[Arrays],
    unreadable: list[str],
    tokenizer: list[str],
    same_weights: bool,
    notes: list[str],
    limits: Limits,
    sample: int,
) -> PositionsAgreement:
    draws = [shares for shares in (_values([arrays], "draws off") for arrays in compared) if len(shares)]
    draws_off, moved = _median(shares.mean() for shares in draws), _median((shares > 0).mean() for shares in draws)
    farthest = [_farthest(sequence, arrays, limits) for sequence, arrays in zip(kept, compared, strict=True)]
    off = sorted((entry for entry in farthest if entry[0] > 1), key=lambda entry: -entry[0])
    # Damage that shows by itself says nothing of the teacher, and draws nothing that values do not say better.
    values_are_off = [_value_is_off(arrays, limits) for arrays in compared]
    sound = [arrays for arrays, is_off in zip(compared, values_are_off, strict=True) if arrays and not is_off]
    values_off = sum(values_are_off)
    step = positions_of(manifest).quantisation_step
    differences = _differences([arrays for arrays in compared if arrays], step, limits)
    noise, noisiest = max(((difference.typical, name) for name, difference in differences.items()), default=(0.0, "values"))
    biased = [
        f"{name} off one way, by {difference.mean:.3g} nats on average over {len(sound)} sequences that show nothing each by"
        f" itself (noise: up to {difference.noise:.2g})"
        for name, difference in _differences(sound, step, limits).items()
        if difference.mean > difference.noise
    ]
    seen = [*unreadable, *(words for _, words in off)]
    listed = [*seen[:SHOWN], *([f"and {len(seen) - SHOWN} more sequences"] if len(seen) > SHOWN else [])]
    everywhere = noise > limits.typical or values_off > SHARE_OFF * len(kept) or bool(biased)
    draws_everywhere = (draws_off or 0.0) > limits.draws or (moved or 0.0) > limits.moved
    typically = f"the median sequence is off by {noise:.3g} nats a value ({noisiest}; noise: up to {limits.typical})"
    drawn = "" if moved is None else f"its draws by {draws_off:.2g} of the tail, and {moved:.1%} of them fall on another token"
    if tokenizer:
        verdict, reasons = OTHER_TOKENIZER, tokenizer
    elif everywhere and not same_weights:
        verdict, reasons = (
            OTHER_TEACHER,
            [
                f"{typically}, and {values_off} of {len(kept)} have a value off by more than {limits.single}, or all one way",
                *biased,
                *unreadable[:SHOWN],
            ],
        )
    elif everywhere or draws_everywhere or seen:
        verdict, reasons = DAMAGE, listed or [typically]
        if draws_everywhere:
            reasons = [f"draws are off in most sequences: in the median one {drawn}", *listed]
            if not same_weights:
                notes = [*notes, "draws may also tell of a teacher so near to the dump's that values do not tell the two apart"]
        if everywhere:
            reasons = [
                "the teacher's weights are those that the manifest names, and its answers are others all the same: values were"
                " altered, or this machine computes wrongly",
                *biased,
                *reasons,
            ]
    else:
        verdict, reasons = AGREES, [f"{typically}, no value by {limits.single}, and none are off one way"]
        if drawn:
            reasons.append(f"in the median sequence {drawn}; no draw is off by {limits.draw}")
        if not same_weights and limits is SHORT:
            notes = [*notes, "a teacher that differs by less than a short dtype's noise passes too: --dtype float32 tells more"]
    return PositionsAgreement(
        dump=manifest.dump,
        sequences=sample,
        positions=sum(len(sequence.places) for sequence in kept),
        verdict=verdict,
        reasons=tuple(reasons),
        notes=tuple(notes),
        limits=limits,
        differences=differences,
        noise=noise,
        draws_off=draws_off,
        changed_top_1=_mean(_values(compared, "changed")),
        moved_draws=_mean(_values(compared, "draws off") > 0),
        sequences_off=len(seen),
    )
