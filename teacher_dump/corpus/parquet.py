"""Rows of .parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from teacher_dump.corpus.arrow_values import BATCH_ROWS, batch_rows
from teacher_dump.corpus.rows import Row, Start

READ_BYTES = 1 << 20


def parquet_rows(path: Path, start: Start) -> Iterator[Row]:
    """The rows of a file from `start` on (see `arrow_values` for what its values become)."""
    try:
        # With a buffer, a row group is read page by page and never held whole.
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            number, group = 0, 0
            while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows < start.row:
                number += file.metadata.row_group(group).num_rows
                group += 1
            for batch in file.iter_batches(BATCH_ROWS, row_groups=list(range(group, file.num_row_groups))):
                wanted = batch.slice(max(start.row - 1 - number, 0))
                yield from batch_rows(wanted, number + len(batch) - len(wanted))
                number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
