"""Several dumps read as one corpus: which they are, whether they go together, and what is taken of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest, in_words
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.kind import check_held

Named = str | Sequence[str] | Mapping[str, float] | None
Tokens = Callable[[Manifest], pa.Table]


def weights_of(dumps: Mapping[str, float], what: str) -> dict[str, float]:
    """The weights of dumps.

    Raises:
        InputError: there is none, or one of them is no finite number above 0.
    """
    if not dumps:
        raise InputError(f"no {what} is named: name at least one")
    for dump, weight in dumps.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight > 0):
            raise InputError(f"the weight of the {what} {dump} is {weight!r}: give a finite number above 0")
    return dict(dumps)


def named_dumps(dump: Named, name: Callable[[str | None], str]) -> tuple[list[str], dict[str, float] | None]:
    """The dumps that are meant, and their weights, if they have some.

    Args:
        dump: one, several in a sequence, or several with weights; None means the only one.
        name: see `Dumps.name`.

    Raises:
        InputError: there is no such dump, one is named twice or none at all, or a weight is no finite number above 0.
    """
    if dump is None or isinstance(dump, str):
        return [name(dump)], None
    weights = weights_of(dump, "dump") if isinstance(dump, Mapping) else None
    names = [name(each) for each in dump]
    if not names:
        raise InputError("no dump is named: name at least one")
    for each in names:
        if names.count(each) > 1:
            raise InputError(f"the dump {each} is named twice: name it once, with a weight if it is to count for more")
    return names, weights


@dataclass(frozen=True)
class Taken:
    """What a batch of several dumps has of each of their kinds.

    Attributes:
        kinds: which kinds, of each the names of its arrays, and what stands in them where there is nothing.
        left_out: arrays that some of the dumps lack, and which these are: none of the others' is read.
        differences: what the kinds' parameters differ in, a sentence each.
    """

    kinds: Mapping[str, dict[str, Any]]
    left_out: Mapping[str, tuple[str, ...]]
    differences: tuple[str, ...]


def taken(manifests: Sequence[Manifest], kinds: tuple[str, ...] | None) -> Taken:
    """What is read of dumps that are read together.

    Args:
        manifests: of the dumps.
        kinds: which kinds of knowledge; None for all that they hold.

    Raises:
        InputError: a dump lacks one of the kinds, holds others than the first, or has rows of another width where the width is
            fixed.
    """
    first = manifests[0]
    for manifest in manifests:
        if kinds is None and manifest.kinds.keys() != first.kinds.keys():
            raise InputError(
                f"dump {first.dump!r} holds {', '.join(first.kinds)}, and dump {manifest.dump!r} holds"
                f" {', '.join(manifest.kinds)}: name the kinds to read of both"
            )
        for kind in kinds or ():
            check_held(manifest, kind)
    arrays: dict[str, dict[str, Any]] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    for kind in tuple(first.kinds) if kinds is None else kinds:
        of_dumps = {manifest.dump: KINDS[kind].arrays(manifest) for manifest in manifests}
        names = dict.fromkeys(name for of_dump in of_dumps.values() for name in of_dump)
        lacking = {name: tuple(dump for dump, of_dump in of_dumps.items() if name not in of_dump) for name in names}
        left_out |= {name: dumps for name, dumps in lacking.items() if dumps}
        arrays[kind] = {name: padding for name, padding in of_dumps[first.dump].items() if not lacking[name]}
        _check_widths(kind, manifests)
    return Taken(arrays, left_out, tuple(_differences(manifests, arrays)))


def _check_widths(kind: str, manifests: Sequence[Manifest]) -> None:
    """InputError: a row of fixed width has another one in some dump."""
    if KINDS[kind].codec:
        return
    shapes = [{field.name: field.shape for field in KINDS[kind].fields(manifest)} for manifest in manifests]
    for manifest, fields in zip(manifests, shapes, strict=True):
        for name, shape in fields.items():
            expected = shapes[0].get(name, shape)
            if shape != expected:
                raise InputError(
                    f"{name} of dump {manifests[0].dump!r} is {expected} wide and of dump {manifest.dump!r} {shape}: train on"
                    " one of them"
                )


def _differences(manifests: Sequence[Manifest], kinds: Iterable[str]) -> Iterable[str]:
    first = manifests[0]
    for other in manifests[1:]:
        changes = first.changes(other)
        for kind in kinds:
            sentences = KINDS[kind].comparison(first, other)
            yield from sentences.values()
            for name, values in changes.items():
                parameter = name.removeprefix(f"kinds.{kind}.")
                if parameter == name or parameter.partition(".")[0] in sentences:
                    continue
                yield f"{in_words(name)} {_compared(first.dump, other.dump, *values)}"


def _compared(first: str, other: str, value: Any, other_value: Any) -> str:
    """The end of a sentence about a parameter of two dumps, None where one of them has none."""
    if value is None:
        return f"is {other_value} in {other}, and {first} has none"
    return f"is {value} in {first}" + (f", and {other} has none" if other_value is None else f" and {other_value} in {other}")


def check_vocabularies(manifests: Sequence[Manifest], tokens: Tokens) -> None:
    """Refuse dumps whose token ids do not mean the same.

    Args:
        manifests: of the dumps.
        tokens: gives the `tokens` table of a dump, which is read where the hashes of vocabularies differ.

    Raises:
        InputError: the vocabularies of two dumps differ; names the first token that does.
        DamageError: a vocabulary that has to be read is damaged.
    """
    first = manifests[0]
    for other in manifests[1:]:
        if first.derived["tokens"] == other.derived["tokens"]:
            continue
        hashes = [manifest.tokenizer.get("vocabulary_sha256") for manifest in (first, other)]
        if hashes[0] == hashes[1] is not None:
            continue
        names = [tokens(manifest)["token"].to_pylist() for manifest in (first, other)]
        for token, (one, two) in enumerate(zip(*names, strict=False)):
            if one != two and one is not None and two is not None:
                raise InputError(
                    f"dumps {first.dump!r} and {other.dump!r} are of different vocabularies: token {token} is {one!r} in the"
                    f" first and {two!r} in the second; train on dumps of one vocabulary"
                )
        count, others = ({token for token in range(len(listed)) if listed[token] is not None} for listed in names)
        if count != others:
            raise InputError(
                f"dumps {first.dump!r} and {other.dump!r} are of different vocabularies: one has {len(count):,} tokens and the"
                f" other {len(others):,}; train on dumps of one vocabulary"
            )
