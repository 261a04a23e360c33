"""Which targets: those that meet a condition in SQL on their positions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import duckdb
import numpy as np

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.choice.answers import MEMORY_LIMIT, TIMEOUT, Numbers, answered
from knowledge_store.errors import InputError, QueryError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Kind
from knowledge_store.kinds.kind import filled
from knowledge_store.reading.target_mask import TargetMask
from knowledge_store.reporter import Reporter
from knowledge_store.sql.quoting import identifier, literal

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ChosenTargets:
    """Which targets meet a condition.

    Attributes:
        condition: the expression.
        masks: of each dump. Only targets are chosen.
        targets: of each dump, how many targets each of its sequences has, by ordinal, int64 (N,).
        sha256: of the dumps and their masks.
    """

    condition: str
    masks: Mapping[str, TargetMask]
    targets: Mapping[str, np.ndarray]
    sha256: str


def choose_targets(
    dumps: Dumps, condition: str, names: Sequence[str], memory_limit: float, timeout: float, reporter: Reporter
) -> ChosenTargets:
    """See `KnowledgeStore.choose_targets`."""
    masks: dict[str, TargetMask] = {}
    targets: dict[str, np.ndarray] = {}
    digest = hashlib.sha256()
    for name in names:
        numbers = Numbers(dumps, name)
        mask, targets[name] = TargetMask.empty(numbers.lengths), numbers.targets
        query = f"SELECT * FROM ({_conditions(dumps.manifest(name), condition)}) WHERE chosen"
        with (
            reporter.progress(f"choosing targets of {name}", len(numbers.ids), "sequences") as advance,
            answered(dumps, query, memory_limit, timeout, reporter.note) as reader,
        ):
            _check_truth(reader.schema, condition)
            done = 0
            for batch in reader:
                if len(batch):
                    ordinals = numbers.ordinals(batch["sequence_id"].to_numpy())
                    mask.choose(ordinals, batch["position"].to_numpy().astype(np.int64))
                    # They come about in the order in which they are stored.
                    advance(max(int(ordinals[-1]) - done, 0))
                    done = max(done, int(ordinals[-1]))
            advance(len(numbers.ids) - done)
        masks[name] = mask
        digest.update(f"{name}\n{mask.sha256}\n".encode())
    if not any(mask.bits.any() for mask in masks.values()):
        raise InputError(f"no target of {', '.join(names)} meets the condition {condition}: choose another")
    return ChosenTargets(condition, masks, targets, digest.hexdigest())


def check_condition(dumps: Dumps, condition: str, names: Sequence[str]) -> None:
    """Refuse a condition that does not run or is none, without reading what it asks about.

    Raises:
        InputError: a dump holds no knowledge of positions that count.
        QueryError: DuckDB cannot run it, or its value is no truth value.
    """
    for name in names:
        query = f"SELECT * FROM ({_conditions(dumps.manifest(name), condition)}) LIMIT 0"
        with answered(dumps, query, MEMORY_LIMIT, TIMEOUT, lambda sentence: None) as reader:
            schema = reader.schema
            reader.read_all()
        _check_truth(schema, condition)


def _check_truth(schema: pa.Schema, condition: str) -> None:
    import pyarrow as pa

    if schema.names != ["sequence_id", "position", "chosen"]:
        raise QueryError(f"{condition} is not one expression: give one condition, as in exp(tail_logprob) > 0.05")
    if not pa.types.is_boolean(kind := schema.field("chosen").type):
        raise QueryError(
            f"{condition} is no condition, since its value is of type {kind}: compare it with something, as in"
            " exp(tail_logprob) > 0.05"
        )


def _kind(manifest: Manifest) -> tuple[Kind, str]:
    """The kind of a dump that says which positions count, and its column that says so."""
    for name in manifest.kinds:
        if (column := KINDS[name].target) is not None:
            return KINDS[name], column
    raise InputError(f"the dump {manifest.dump!r} holds no knowledge that says which positions count for training")


def _conditions(manifest: Manifest, condition: str) -> str:
    """SQL that gives sequence_id, position, and whether the condition is met, of every target of a dump; of one several times
    where the kind has several things of a position and the condition names one of these."""
    kind, target = _kind(manifest)
    relation = identifier(kind.name)
    rows = f"SELECT * FROM {relation} WHERE dump = {literal(manifest.dump)} AND {identifier(target)}"
    if kind.repeated is not None and names_any(condition, kind.repeated.columns):
        rows = filled(kind.repeated.rows, rows=f"({rows})")
    return f'SELECT sequence_id, "position", ({condition}\n) AS chosen FROM ({rows}) AS {relation}'


def names_any(sql: str, names: Sequence[str]) -> bool:
    """Whether an expression names one of some columns, in whatever case; functions of that name do not count.

    Raises:
        QueryError: it is empty, or cannot be read as SQL.
    """
    try:
        octets = sql.encode()
        tokens = duckdb.tokenize(sql)
    except (duckdb.Error, UnicodeEncodeError) as error:
        raise QueryError(f"this SQL does not parse: {error}") from None
    if not tokens:
        raise QueryError("the condition is empty: give one, such as exp(tail_logprob) > 0.05")
    ends = [start for start, _ in tokens[1:]] + [len(octets)]
    words = [octets[start:end].decode().strip().strip('"').lower() for (start, _), end in zip(tokens, ends, strict=True)]
    return any(word in names and following != "(" for word, following in zip(words, [*words[1:], ""], strict=True))
