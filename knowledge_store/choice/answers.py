"""Answers to the SQL of a choice, read as they come, and the sequences of a dump that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.errors import DamageError, InputError, QueryLimitError
from knowledge_store.format.layout import SEQUENCES
from knowledge_store.format.parquet import read_table
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.sql.isolated import answered as answered_apart
from knowledge_store.sql.isolated import check_answered
from knowledge_store.sql.statement import Statement

if TYPE_CHECKING:
    import pyarrow as pa

# For questions about all there is in a store: they are asked once a run.
MEMORY_LIMIT = 4 * 2**30
TIMEOUT = 6 * 3600.0


class Numbers:
    """Numbers of the sequences of one dump, in the order of ordinals.

    Attributes:
        ids: the `sequence_id` of each, int64 (N,).
        lengths: their positions, int64 (N,).
        targets: how many of these count for training, int64 (N,).
    """

    def __init__(self, dumps: Dumps, dump: str):
        manifest = dumps.manifest(dump)
        files = dumps.files(manifest, SEQUENCES, sequences_schema(manifest))
        tables = [read_table(file, ["sequence_id", "length", "targets"]) for file in files.values()]
        if any(column.null_count for table in tables for column in table.columns):
            raise DamageError(f"the dump {dump!r} is damaged: a sequence has no id or no length")
        self.dump = dump
        self.ids, self.lengths, self.targets = (
            np.concatenate([np.empty(0, np.int64), *(table[name].to_numpy() for table in tables)])
            for name in ("sequence_id", "length", "targets")
        )
        self._order = np.argsort(self.ids, kind="stable")

    def ordinals(self, ids: np.ndarray) -> np.ndarray:
        """The ordinals of sequences, (M,), of their ids, (M,).

        Raises:
            InputError: there is no such sequence.
        """
        places = np.searchsorted(self.ids, ids, sorter=self._order)
        found = self._order[np.minimum(places, len(self.ids) - 1)] if len(self.ids) else np.zeros(len(ids), np.int64)
        missing = np.ones(len(ids), bool) if not len(self.ids) else self.ids[found] != ids
        if missing.any():
            raise InputError(
                f"the dump {self.dump!r} has no sequence {ids[missing][0]}: take ids of the relation `sequences` (one that was"
                " committed since the store was opened is not known yet)"
            )
        return found


@contextmanager
def answered(
    dumps: Dumps, query: str, memory_limit: float, timeout: float, remark: Callable[[str], None]
) -> Iterator[pa.RecordBatchReader]:
    """The answer to a query, from a process of its own; all of it has to be read.

    Raises:
        InputError: a limit is too small, or no other process can open the store.
        QueryError: the query is refused, or DuckDB cannot run it; QueryLimitError: it needs more than its limits.
        DamageError, StoreError: as of `KnowledgeStore.sql`.
    """
    address = dumps.storage.address
    try:
        check_answered(dumps.storage)
    except InputError as error:
        raise InputError(f"nothing can be chosen of {address} by SQL: {error}; give `ordinals`") from None
    try:
        with answered_apart(dumps.storage, Statement(query, memory_limit, timeout), remark) as reader:
            yield reader
    except QueryLimitError as error:
        raise QueryLimitError(
            f"{error}; ask for less, such as conditions on `sequences` alone, or choose in Python, where"
            " `KnowledgeStore.choose_sequences` and `choose_targets` take a larger memory_limit and timeout"
        ) from None
