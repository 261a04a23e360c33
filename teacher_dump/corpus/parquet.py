"""Rows of .parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from teacher_dump.corpus.rows import Row, Start

READ_BYTES = 1 << 20
PARQUET_ROWS = 64


def parquet_rows(path: Path, start: Start) -> Iterator[Row]:
    try:
        # With a buffer, a row group is read page by page and never held whole.
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            number, group = 0, 0
            while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows < start.row:
                number += file.metadata.row_group(group).num_rows
                group += 1
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(range(group, file.num_row_groups))):
                wanted = batch.slice(max(start.row - 1 - number, 0))
                yield from _parquet_batch(wanted, number + len(batch) - len(wanted))
                number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _parquet_batch(batch: pa.RecordBatch, number: int) -> Iterator[Row]:
    """The rows of a batch that comes after `number` rows."""
    try:
        for index, record in enumerate(batch.to_pylist(), number + 1):
            yield Row(index, 0, record)
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            for index in range(len(batch)):
                yield from _parquet_batch(batch.slice(index, 1), number + index)
        elif isinstance(error, UnicodeDecodeError):
            yield Row(number + 1, 0, problem="text that is not UTF-8")
        else:
            yield Row(number + 1, 0, problem=f"a value that cannot be read ({str(error).splitlines()[0]})")
