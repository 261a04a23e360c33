"""Which sequences: those that a SELECT statement gives."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.choice.answers import MEMORY_LIMIT, TIMEOUT, Numbers, answered
from knowledge_store.errors import InputError, QueryError
from knowledge_store.reporter import Reporter

if TYPE_CHECKING:
    import pyarrow as pa

DUMP, SEQUENCE_ID = "dump", "sequence_id"
SHAPE = "SELECT dump, sequence_id FROM sequences WHERE …"


@dataclass(frozen=True)
class ChosenSequences:
    """Which sequences a query chose.

    Attributes:
        query: the statement.
        ordinals: of each dump, ascending int64; empty for one of which none was chosen.
        sha256: of their dumps and ids: the same ids have the same one, whatever query chose them.
    """

    query: str
    ordinals: Mapping[str, np.ndarray]
    sha256: str

    @property
    def count(self) -> int:
        """How many there are, all dumps together."""
        return sum(map(len, self.ordinals.values()))


def choose_sequences(
    dumps: Dumps, query: str, names: Sequence[str], memory_limit: float, timeout: float, reporter: Reporter
) -> ChosenSequences:
    """See `KnowledgeStore.choose_sequences`."""
    numbers = {name: Numbers(dumps, name) for name in names}
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with (
        reporter.progress("choosing sequences", None, "sequences") as advance,
        answered(dumps, query, memory_limit, timeout, reporter.note) as reader,
    ):
        _check_columns(reader.schema, names, dumps)
        for batch in reader:
            for name, ids in _by_dump(batch, names):
                found[name].append(numbers[name].ordinals(ids))
            advance(len(batch))
    ordinals = {name: np.sort(np.concatenate([np.empty(0, np.int64), *parts])) for name, parts in found.items()}
    digest = hashlib.sha256()
    for name in sorted(names):
        chosen = ordinals[name]
        twice = chosen[1:][np.diff(chosen) == 0]
        if len(twice):
            raise InputError(
                f"the query gives {len(np.unique(twice)):,} sequences of the dump {name!r} more than once, the first of them"
                f" {numbers[name].ids[twice[0]]}: begin it with SELECT DISTINCT"
            )
        digest.update(f"{name}\n{len(chosen)}\n".encode())
        digest.update(np.sort(numbers[name].ids[chosen]).astype("<i8").tobytes())
    result = ChosenSequences(query, ordinals, digest.hexdigest())
    if not result.count:
        raise InputError(f"the query gives no sequence: try it with `knowledge-store sql {dumps.storage.address}`")
    return result


def check_query(dumps: Dumps, query: str, names: Sequence[str]) -> None:
    """Refuse a query that does not run or has other columns, without reading what it asks about (raises as
    `choose_sequences`)."""
    plain = query.strip().rstrip(";")
    if re.match(r"[\s(]*(--|/\*|(select|with|from|values)\b)", plain, re.IGNORECASE) is None:
        raise QueryError(f"{query!r} is no SELECT statement: write it as {SHAPE}")
    with answered(dumps, f"SELECT * FROM ({plain}\n) LIMIT 0", MEMORY_LIMIT, TIMEOUT, lambda sentence: None) as reader:
        schema = reader.schema
        reader.read_all()
    _check_columns(schema, names, dumps)


def _check_columns(schema: pa.Schema, names: Sequence[str], dumps: Dumps) -> None:
    """Refuse an answer of another shape (QueryError)."""
    import pyarrow as pa

    expected = {DUMP, SEQUENCE_ID}
    given = ", ".join(schema.names)
    # Relations have the sequences of all dumps, and dumps have the same ids: alone, those of another would be taken for these.
    if set(schema.names) != expected and not (len(dumps.manifests) == 1 and schema.names == [SEQUENCE_ID]):
        reason = "since the store has several dumps" if schema.names == [SEQUENCE_ID] else "and no others may be there"
        raise QueryError(
            f"the query has to give the columns dump and sequence_id, {reason}; it gives {given}: write it as {SHAPE}"
        )
    kind = schema.field(SEQUENCE_ID).type
    if not pa.types.is_integer(kind):
        raise QueryError(f"the column sequence_id of the query is of type {kind}: give the one of `sequences`, as in {SHAPE}")
    if DUMP in schema.names and not (pa.types.is_string(kind := schema.field(DUMP).type) or pa.types.is_large_string(kind)):
        raise QueryError(f"the column dump of the query is of type {kind}: give the one of `sequences`, as in {SHAPE}")


def _by_dump(batch: pa.RecordBatch, names: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """The sequence ids of a batch, by dump (InputError: one is null, or of a dump that is not read)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if any(column.null_count for column in batch.columns):
        raise InputError(f"the query gives a row whose dump or sequence_id is null: leave it out, or write it as {SHAPE}")
    ids = batch[SEQUENCE_ID].cast(pa.int64(), safe=False)
    if DUMP not in batch.schema.names:
        return [(names[0], ids.to_numpy())]
    parts = []
    for name in pc.unique(batch[DUMP]).to_pylist():
        if name not in names:
            shown = ", ".join(f"'{known}'" for known in names)
            raise InputError(
                f"the query gives sequences of the dump {name!r}, which is not among those that are read: add the condition"
                f" dump IN ({shown}), or name that dump too"
            )
        parts.append((name, ids.filter(pc.equal(batch[DUMP], name)).to_numpy()))
    return parts
