"""SQL over a served store: the server answers, within its own limits, and the rows come as they are found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from knowledge_store.sql.parameters import check_json, plain_parameters
from knowledge_store.sql.statement import Statement
from knowledge_store.storage.served.client import ServedStorage
from knowledge_store.storage.served.messages import library_error, to_bytes

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def served_batches(
    storage: ServedStorage, statement: Statement, remark: Callable[[str], None]
) -> Iterator[pa.RecordBatchReader]:
    """The answer to a statement, batch by batch as it comes (see `sql.isolated.isolated_batches`), within the limits that
    are given or those of the server where these are less.

    Raises:
        KnowledgeStoreError: what the server said, or it does not answer.
    """
    import pyarrow as pa
    from pyarrow import flight

    values = plain_parameters(statement.parameters)
    check_json(values)
    limits = {"memory_limit": int(statement.memory_limit), "timeout": float(statement.timeout), "kept": statement.kept}
    ticket = flight.Ticket(to_bytes({"sql": statement.sql, "parameters": values, **limits}))
    attempts = storage.attempts()
    stream = attempts.of(lambda: _begun(storage.connection().do_get(ticket, storage.options(None))))

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            while True:
                try:
                    chunk = stream.read_chunk()
                except StopIteration:
                    return
                if chunk.app_metadata is not None:
                    for sentence in json.loads(chunk.app_metadata.to_pybytes()):
                        remark(sentence)
                elif chunk.data is not None:
                    yield chunk.data
        except pa.ArrowException as error:
            raise library_error(error) or attempts.lost(error) from None

    rows = batches()
    try:
        yield _Rows(stream.schema, rows)
    finally:
        rows.close()  # type: ignore[attr-defined]
        stream.cancel()


class _Rows:
    """The batches of an answer: as much of Arrow's RecordBatchReader as is used, with errors as they are."""

    def __init__(self, schema: pa.Schema, rows: Iterator[pa.RecordBatch]):
        self.schema, self._rows = schema, rows

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self._rows

    def read_all(self) -> pa.Table:
        """All of them."""
        import pyarrow as pa

        return pa.Table.from_batches(list(self._rows), self.schema)


def _begun(stream: Any) -> Any:
    """A stream whose columns are known: what the server refuses is refused here."""
    _ = stream.schema
    return stream
