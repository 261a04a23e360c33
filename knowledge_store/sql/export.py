"""One kind of knowledge of a dump as a Parquet file of plain columns, which pandas, polars and everything else read."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.sql.limits import MEMORY_LIMIT
from knowledge_store.sql.query import Query, connect
from knowledge_store.sql.quoting import identifier
from knowledge_store.storage.new_file import new_file

COMPRESSION = "zstd"


def export(
    dumps: Dumps,
    kind: str,
    output: Path,
    where: str | None = None,
    *,
    rows: int | None = None,
    reporter: Reporter = SILENT,
) -> int:
    """Write the rows of a relation to a new file, as they are found, in any order; an existing file is never replaced.

    Args:
        dumps: the dump alone.
        kind: the relation, such as `positions`.
        output: the file.
        where: a condition in SQL over the relation's columns; it may ask the dump's other relations too.
        rows: how many there are without a condition, for the progress.

    Returns:
        how many rows were written.

    Raises:
        InputError: the file cannot be written, or is there already.
        QueryError: the condition is refused, or DuckDB cannot run it.
        DamageError: a file of the store is not what was published.
    """
    condition = f" WHERE ({where}\n)" if where else ""
    sql = f"SELECT * FROM {identifier(kind)}{condition}"
    count = 0
    with (
        new_file(output) as unfinished,
        connect(MEMORY_LIMIT) as connection,
        reporter.progress(f"exporting {kind}", rows, "rows") as advance,
    ):
        schema, batches = Query(connection, dumps, sql, memory_limit=None).answer()
        with pq.ParquetWriter(unfinished, schema, compression=COMPRESSION) as writer:
            for batch in batches:
                writer.write_batch(batch)
                count += len(batch)
                advance(len(batch))
    return count
