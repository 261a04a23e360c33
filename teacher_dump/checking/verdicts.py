"""What differences between a dump and its teacher mean: agreement, damage, another teacher, or another tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import positions_of
from teacher_dump.checking.comparison import KeptSequence
from teacher_dump.checking.limits import SHARE_OFF, SHORT, Limits

AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER = "agrees", "damage", "another teacher", "another tokenizer"
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


@dataclass(frozen=True)
class Agreement:
    """How far a teacher agrees with a dump.

    Attributes:
        dump, sequences, positions: what was compared; positions with knowledge.
        verdict: one of AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER.
        reasons: what it rests on, one sentence each.
        notes: what else a person should know.
        limits: what counts as numeric noise here.
        differences: of `token`, `candidates`, `tail`, and where there are any `tail at T`, `selection`, `draws`.
        noise: the largest `typical` of any quantity (nats).
        draws_off: mean difference of a draw in the median sequence (share of the tail); None without draws.
        changed_top_1: share of the positions whose likeliest token is another one; None without candidates.
        moved_draws: share of the draws that now fall on another token; None without draws.
        sequences_off: how many have a value beyond `limits.single`, a mean beyond `limits.mean` or a draw beyond `limits.draw`,
            cannot be read, or have other tokens than they had.
    """

    dump: str
    sequences: int
    positions: int
    verdict: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    limits: Limits
    differences: dict[str, Differences] = field(default_factory=dict)
    noise: float = 0.0
    draws_off: float | None = None
    changed_top_1: float | None = None
    moved_draws: float | None = None
    sequences_off: int = 0


def _values(found: list[Arrays], ending: str) -> np.ndarray:
    """All values there are of the quantities whose name ends like this, one after the other."""
    values = [each.ravel() for arrays in found for name, each in arrays.items() if name.endswith(ending)]
    joined = np.concatenate([np.zeros(0), *values])
    return joined[~np.isnan(joined)]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _means(found: Arrays, name: str) -> np.ndarray:
    """Of one sequence, how far a quantity moved at each position that has it: the mean of its values there, in nats, (n,).

    One that is far off does not speak for all: none counts for more than MAX_COUNTED.
    """
    moved = found[f"{name} moved"]
    moved = moved if moved.ndim == 2 else moved[:, None]
    there = ~np.isnan(moved)
    sums = np.where(there, moved.clip(-MAX_COUNTED, MAX_COUNTED), 0).sum(axis=1)
    return sums[there.any(axis=1)] / there.sum(axis=1)[there.any(axis=1)]


def _differences(found: list[Arrays], step: float, limits: Limits) -> dict[str, Differences]:
    names = [name.removesuffix(" off") for name in (found[0] if found else ()) if name.endswith(" off")]
    differences = {}
    for name in names:
        off, moved = (_values(found, f"{name} {ending}") for ending in ("off", "moved"))
        if not len(off):
            continue
        steps = np.abs(moved) / step
        same, one, two, more = (
            _mean(each) or 0.0 for each in (steps < 0.5, abs(steps - 1) < 0.5, abs(steps - 2) < 0.5, steps > 2.5)
        )
        quantiles = tuple(float(each) for each in np.quantile(off, QUANTILES, method="higher"))
        typical = mean = noise = 0.0
        if len(moved):
            by_sequence = [np.abs(each) for each in (_values([arrays], f"{name} moved") for arrays in found) if len(each)]
            typical = _median(each.mean() for each in by_sequence) or 0.0
            means = np.concatenate([_means(arrays, name) for arrays in found])
            mean, noise = abs(float(means.mean())), limits.mean(len(means))
        differences[name] = Differences(len(off), (same, one, two, more), quantiles, typical, mean, noise)
    return differences


def _farthest(sequence: KeptSequence, found: Arrays, limits: Limits) -> tuple[float, str]:
    """The largest difference of a sequence, in multiples of what noise can do to it, and a sentence about it."""
    most, words = 0.0, ""
    for name, values in found.items():
        if not name.endswith(" off") or not values.size:
            continue
        flat = np.where(np.isnan(values), 0, values).reshape(len(values), -1).max(axis=1, initial=0)
        at = int(flat.argmax())
        limit, unit = (limits.draw, "of the tail") if name == "draws off" else (limits.single, "nats")
        if flat[at] / limit > most:
            most = float(flat[at]) / limit
            words = f"sequence {sequence.number}, position {sequence.places[at]}: {name} by {flat[at]:.3g} {unit}"
    for name, mean, limit, positions in _biases(found, limits):
        if most <= 1 and mean > limit:  # one value that is off says where
            most = mean / limit
            words = (
                f"sequence {sequence.number}: {name} off one way, by {mean:.3g} nats on average over {positions} positions"
                f" (noise: up to {limit:.2g})"
            )
    return most, words


def _biases(found: Arrays, limits: Limits) -> Iterator[tuple[str, float, float, int]]:
    """Of each rounded quantity of a sequence: name, |mean difference|, what noise can do to that, over how many positions."""
    for name in (each.removesuffix(" moved") for each in found if each.endswith(" moved")):
        means = _means(found, name)
        if len(means):
            yield name, abs(float(means.mean())), limits.mean(len(means)), len(means)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.median(found)) if found else None


def _value_is_off(found: Arrays, limits: Limits) -> bool:
    """Whether any value of a sequence, or a mean of them, is off by more than noise can do to it, draws left out."""
    names = (name for name in found if name.endswith(" off") and name != "draws off")
    return any((found[name] > limits.single).any() for name in names) or any(
        mean > limit for _, mean, limit, _ in _biases(found, limits)
    )


def judge(
    manifest: Manifest,
    kept: list[KeptSequence],
    found: list[Arrays],
    unreadable: list[str],
    tokenizer: list[str],
    same_weights: bool,
    notes: list[str],
    limits: Limits,
    sample: int,
) -> Agreement:
    draws = [each for each in (_values([arrays], "draws off") for arrays in found) if len(each)]
    draws_off, moved = _median(each.mean() for each in draws), _median((each > 0).mean() for each in draws)
    farthest = [_farthest(sequence, each, limits) for sequence, each in zip(kept, found, strict=True)]
    off = sorted((each for each in farthest if each[0] > 1), key=lambda each: -each[0])
    # Damage that shows by itself says nothing of the teacher, and draws nothing that values do not say better.
    values_are_off = [_value_is_off(each, limits) for each in found]
    sound = [each for each, is_off in zip(found, values_are_off, strict=True) if each and not is_off]
    values_off = sum(values_are_off)
    step = positions_of(manifest).quantisation_step
    differences = _differences([each for each in found if each], step, limits)
    noise, noisiest = max(((each.typical, name) for name, each in differences.items()), default=(0.0, "values"))
    biased = [
        f"{name} off one way, by {each.mean:.3g} nats on average over {len(sound)} sequences that show nothing each by itself"
        f" (noise: up to {each.noise:.2g})"
        for name, each in _differences(sound, step, limits).items()
        if each.mean > each.noise
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
    return Agreement(
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
        changed_top_1=_mean(_values(found, "changed")),
        moved_draws=_mean(_values(found, "draws off") > 0),
        sequences_off=len(seen),
    )
