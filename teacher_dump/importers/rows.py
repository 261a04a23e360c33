"""Rows of Parquet, Arrow and JSON Lines files as arrays, column by column."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from teacher_dump.corpus.compression import open_bytes, uncompressed_name
from teacher_dump.importers.layout import BadLayout

BATCH_ROWS = 64
TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".json")


@dataclass(frozen=True)
class FileRow:
    """A row of a file.

    Attributes:
        number: counted from 1. offset: where it begins, in bytes of uncompressed text; 0 in binary files.
        columns: by name, numbers (N,), or lists of lists of numbers as (N, K), filled up at the end with `fill` where their
            lengths differ; the value itself where it is neither.
    """

    number: int
    offset: int
    columns: dict[str, Any]


def table_rows(
    path: Path, first: int, offset: int, columns: Callable[[Sequence[str]], Sequence[str]], fill: float = np.nan
) -> Iterator[FileRow]:
    """The rows of a file from number `first` on, which begins at `offset`.

    Args:
        columns: given the names of a file's columns, those that are wanted (BadLayout: it lacks some).
        fill: what stands behind the last of a shorter list in a list of lists; of integers −1.

    Raises:
        BadLayout: a row is not made of numbers, or does not have a column that is wanted. InputError: the file cannot be read.
    """
    name = uncompressed_name(path)
    if name.endswith(LINES):
        yield from _line_rows(path, first, offset, columns, fill)
    elif path.name.endswith(TABLES):
        yield from _arrow_rows(path, first, columns, fill)
    else:
        raise BadLayout(f"it ends in none of {', '.join(TABLES + LINES)}")


def lines(path: Path, first: int, offset: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Number, offset and object of each line of a file that is not blank, from number `first` on, which begins at `offset`.

    Raises:
        BadLayout: a line is no JSON object. InputError: the file cannot be read.
    """
    try:
        with open_bytes(path, offset) as file:
            for number, line in enumerate(file, first):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise BadLayout(f"line {number} is not JSON ({error})") from None
                    if not isinstance(record, dict):
                        raise BadLayout(f"line {number} is not a JSON object")
                    yield number, offset, record
                offset += len(line)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _line_rows(
    path: Path, first: int, offset: int, columns: Callable[[Sequence[str]], Sequence[str]], fill: float
) -> Iterator[FileRow]:
    for number, start, record in lines(path, first, offset):
        try:
            yield FileRow(number, start, {name: _array(record[name], fill) for name in columns(list(record)) if name in record})
        except (ValueError, TypeError) as error:
            raise BadLayout(f"line {number}: {error}") from None


def _array(value: Any, fill: float) -> Any:
    """A list as an array of numbers, a list of lists as (N, K); other values as they are."""
    if not isinstance(value, list):
        return value
    if any(isinstance(row, list) for row in value):
        return padded([row or [] for row in value], fill)
    numbers = np.array([np.nan if item is None else item for item in value])
    if numbers.dtype.kind not in "biuf" and len(numbers):
        raise BadLayout("a list holds something that is no number")
    return numbers


def padded(value: list[list[Any]], fill: float) -> np.ndarray:
    """Lists of numbers as (N, K), filled up at the end (BadLayout: they hold something else)."""
    lengths = {len(row) for row in value}
    if len(lengths) > 1:
        width = max(lengths)
        integers = all(isinstance(item, int) for row in value for item in row)
        value = [[*row, *[-1 if integers else fill] * (width - len(row))] for row in value]
    numbers = np.array(value)
    if numbers.ndim != 2 or numbers.dtype.kind not in "biuf":
        if numbers.size == 0:
            return np.zeros((len(value), 0))
        raise BadLayout("a list of lists holds something that is no number")
    return numbers


def _arrow_rows(path: Path, first: int, columns: Callable[[Sequence[str]], Sequence[str]], fill: float) -> Iterator[FileRow]:
    number = 0
    try:
        for batch in _batches(path, columns):
            if number + len(batch) >= first:
                skipped = max(first - 1 - number, 0)
                for place, row in enumerate(_batch_rows(batch.slice(skipped), fill)):
                    yield FileRow(number + skipped + place + 1, 0, row)
            number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _batches(path: Path, columns: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=list(columns(file.schema_arrow.names)))
        return
    with pa.memory_map(str(path)) as source:
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if whole else pa.ipc.open_stream(source)
        names = list(columns(reader.schema.names))
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if whole else iter(reader)
        for batch in batches:
            for start in range(0, len(batch), BATCH_ROWS):
                yield batch.select(names).slice(start, BATCH_ROWS)


def _as_list(array: pa.Array) -> pa.Array:
    """A list array of the plain kind."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        return array.cast(pa.list_(kind.value_type))
    return array


def _batch_rows(batch: pa.RecordBatch, fill: float) -> Iterator[dict[str, Any]]:
    """The columns of each row of a batch."""
    columns = {name: _column(_as_list(batch.column(name)), fill) for name in batch.schema.names}
    for row in range(len(batch)):
        yield {name: value(row) for name, value in columns.items()}


def _column(array: pa.Array, fill: float) -> Callable[[int], Any]:
    """The value of a row of a column."""
    if not pa.types.is_list(array.type):
        return lambda row: array[row].as_py()
    ends = np.cumsum(np.concatenate([[0], _lengths(array)]))
    inner = _as_list(array.flatten())
    if not pa.types.is_list(inner.type):
        numbers = _numbers(inner)
        return lambda row: numbers[ends[row] : ends[row + 1]]
    inner_lengths = _lengths(inner)
    inner_ends = np.concatenate([[0], np.cumsum(inner_lengths)])
    values = _numbers(inner.flatten())

    def lists(row: int) -> np.ndarray:
        start, end = ends[row], ends[row + 1]
        lengths, part = inner_lengths[start:end], values[inner_ends[start] : inner_ends[end]]
        width = int(lengths.max(initial=0))
        if (lengths == width).all():
            return part.reshape(len(lengths), width)
        filler = -1 if part.dtype.kind in "iu" else fill
        rows = np.full((len(lengths), width), filler, part.dtype if part.dtype.kind != "u" else np.int64)
        rows[np.arange(width) < lengths[:, None]] = part
        return rows

    return lists


def _lengths(array: pa.Array) -> np.ndarray:
    return pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _numbers(array: pa.Array) -> np.ndarray:
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        if pa.types.is_null(array.type):
            return np.full(len(array), np.nan)
        raise BadLayout(f"a list holds {array.type}, and numbers belong there")
    return array.to_numpy(zero_copy_only=False)


def whole_numbers(values: Any, name: str, dimensions: int = 1) -> np.ndarray:
    """Token ids, int64 (BadLayout: a column holds something else)."""
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(array.shape if array.ndim == dimensions else (0,) * dimensions, np.int64)
    if array.ndim != dimensions or array.dtype.kind not in "biuf":
        raise BadLayout(f"the column {name!r} holds no {'lists of ' * (dimensions - 1)}token ids")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise BadLayout(f"the column {name!r} holds numbers that are no token ids")
    return array.astype(np.int64)


def real_numbers(values: Any, name: str, dimensions: int = 1) -> np.ndarray:
    """Log-probabilities, float64 where a column is, else float32 (BadLayout: it holds something else)."""
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(array.shape if array.ndim == dimensions else (0,) * dimensions, np.float64)
    if array.ndim != dimensions or array.dtype.kind not in "biuf":
        raise BadLayout(f"the column {name!r} holds no {'lists of ' * (dimensions - 1)}log-probabilities")
    return array if array.dtype == np.float64 else array.astype(np.float32)


def wanted(required: Sequence[str], optional: Sequence[str] = ()) -> Callable[[Sequence[str]], list[str]]:
    """For `table_rows`: those columns, of which some may be missing."""

    def chosen(names: Sequence[str]) -> list[str]:
        missing = [name for name in required if name not in names]
        if missing:
            raise BadLayout(f"there is no column {missing[0]!r}, but {', '.join(map(repr, names[:12])) or 'none'}")
        return [name for name in (*required, *optional) if name in names]

    return chosen
