"""SQL that a server answers: each statement in a limited process of its own, which ends with the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
from pyarrow import flight

from knowledge_store.isolation.child import Child
from knowledge_store.serving.limits import Slots, Watch, Watched
from knowledge_store.serving.metrics import Call
from knowledge_store.serving.served import ServedStore
from knowledge_store.sql.isolated import isolated_batches, isolated_schemas
from knowledge_store.sql.limits import check_limits
from knowledge_store.sql.statement import Statement

SHOWN_SQL = 300  # characters of a statement in the log


class Queries:
    """Answers statements.

    Args:
        slots: how many at once.
        watch: over their calls.
        memory_limit, timeout: the most bytes and seconds of one.
    """

    def __init__(self, slots: Slots, watch: Watch, memory_limit: int, timeout: float):
        check_limits(memory_limit, timeout)
        self._slots, self._watch = slots, watch
        self._memory_limit, self._timeout = memory_limit, timeout

    def answer(
        self,
        context: Any,
        call: Call,
        store: ServedStore,
        statement: Statement,
        remark: Callable[[str], None] = lambda sentence: None,
    ) -> Iterator[Any]:
        """The columns of an answer (a schema), and then its batches, within the statement's limits or the server's, where those
        are less. The process ends with this iterator, and within a second of its client's end.

        Raises:
            BusyError: as many are answered as may be.
            KnowledgeStoreError: as of `isolated_batches`.
        """
        call.facts["sql"] = statement.sql[:SHOWN_SQL]
        memory_limit = min(statement.memory_limit, self._memory_limit)
        limited = replace(statement, memory_limit=memory_limit, timeout=min(statement.timeout, self._timeout))
        check_limits(limited.memory_limit, limited.timeout)
        with (
            self._process(context) as (watched, begin),
            isolated_batches(store.storage.address, limited, remark, begin) as reader,
        ):
            yield reader.schema
            for batch in reader:
                with watched.waiting():
                    yield batch

    def schemas(self, context: Any, call: Call, store: ServedStore) -> dict[str, pa.Schema]:
        """The columns of the relations of a store, by their names (raises as `answer`)."""
        with self._process(context) as (_, begin):
            return isolated_schemas(store.storage.address, self._memory_limit, self._timeout, begin)

    @contextmanager
    def _process(self, context: Any) -> Iterator[tuple[Watched, Callable[[Child], None]]]:
        """A slot for a process, whose call is watched; the process is said once it has begun (raises as `answer`)."""
        give_back = self._slots.take()
        ended: list[bool] = []
        children: list[Child] = []

        def end() -> None:
            ended.append(True)
            for child in children:
                child.kill()
            give_back()

        def begin(child: Child) -> None:
            children.append(child)
            if ended:
                child.kill()

        try:
            with self._watch.over(context, end) as watched:
                try:
                    yield watched, begin
                except Exception:
                    if watched.ended:
                        raise flight.FlightCancelledError(f"the query was ended: {watched.ended}") from None
                    raise
        finally:
            give_back()
