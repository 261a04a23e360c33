"""Rows of .arrow files, as `datasets` writes them (Arrow's stream format) and as Arrow's file format has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from knowledge_store.errors import InputError
from teacher_dump.corpus.arrow_values import BATCH_ROWS, batch_rows
from teacher_dump.corpus.compression import ends_early
from teacher_dump.corpus.rows import Row, Start

_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow_rows(path: Path, start: Start) -> Iterator[Row]:
    """The rows of a file from `start` on (see `arrow_values` for what its values become)."""
    number = 0
    try:
        for batch in _batches(path):
            if number + len(batch) >= start.row:
                for begin in range(max(start.row - 1 - number, 0), len(batch), BATCH_ROWS):
                    yield from batch_rows(batch.slice(begin, BATCH_ROWS), number + begin)
            number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Arrow: {str(error).splitlines()[0]}") from None


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        if source.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
            return
        source.seek(max(source.size() - len(_STREAM_END), 0))
        complete = source.read() == _STREAM_END
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        if not complete:
            raise ends_early(path)
        yield from stream
