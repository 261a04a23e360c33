"""Between arrays and columns: how rows of numbers, lists and text become an Arrow table, and come out of it again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.errors import InputError
from knowledge_store.kinds.field import Field

# By name, arrays of one entry a row. Text is a list of str; ragged rows, as an extractor gives them, may be a list of arrays.
Arrays = dict[str, Any]

MAX_PADDED = 2**27  # values of a padded row group, 1 GiB


def joined(knowledge: Sequence[Arrays]) -> Arrays:
    """The arrays of several sequences, one after the other; nothing of no sequence."""
    if not knowledge:
        return {}
    parts = {name: [arrays[name] for arrays in knowledge] for name in knowledge[0]}
    return {
        name: _concatenated(each) if all(isinstance(part, np.ndarray) for part in each) else list(chain.from_iterable(each))
        for name, each in parts.items()
    }


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    masked = any(isinstance(part, np.ma.MaskedArray) for part in parts)
    return np.ma.concatenate(parts) if masked else np.concatenate(parts)


def row_counts(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How many of some rows each sequence has, int64 (N,).

    Args:
        rows: the sequence of each row, ascending.
        ids: of the N sequences, ascending.
    """
    return np.searchsorted(rows, ids, side="right") - np.searchsorted(rows, ids, side="left")


def list_offsets(lengths: np.ndarray) -> pa.Array:
    """Where each list of an Arrow list array begins and ends, from the lists' lengths.

    Raises:
        InputError: more values than one array can hold.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(ends) and ends[-1] >= 2**31:
        raise InputError("a row group would hold 2^31 values or more: keep fewer candidates, or give a smaller maximum length")
    return pa.array(np.concatenate([[0], ends]).astype(np.int32))


def padded_lists(column: pa.ChunkedArray, fill: float, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Lists of up to K values as (N, K), and their lengths (N,); null counts as empty."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    width = int(lengths.max(initial=0))
    padded: np.ndarray = np.full((len(column), width), fill, dtype=dtype)
    padded[np.arange(width) < lengths[:, None]] = pc.list_flatten(column).to_numpy()
    return padded, lengths


def check_lists(table: pa.Table) -> None:
    """Make sure that `padded_lists` can be made of a table's columns: of one long list among many short ones it would take all
    memory there is.

    Raises:
        ValueError: they cannot; says why.
    """
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_list(column.type):
            longest = pc.max(pc.list_value_length(column)).as_py() or 0
            values = pc.list_flatten(column)
            if longest * len(column) > max(MAX_PADDED, 4 * len(values)):
                raise ValueError(f"a list of {longest:,} values stands among lists of few")
            if values.null_count:
                raise ValueError(f"{name} has a null among its values")


def encode_columns(keys: pa.Table, arrays: Arrays, fields: Sequence[Field]) -> pa.Table:
    """The table of `keys` and of an extractor's arrays, one entry a row.

    Args:
        keys: the key columns.
        arrays: of each field: scalars (N,), a fixed width (N, W), ragged a list of N arrays or an array (N, K); text a list of
            str, a row's list for several. Null is None in a list, and masked in a `numpy.ma` array.
        fields: of the kind.

    Raises:
        InputError: an array is missing, or is not what its field declares.
    """
    columns = [*keys.columns]
    for field in fields:
        if field.name not in arrays:
            raise InputError(f"there is no array {field.name!r}: the extractor leaves a field out")
        rows = arrays[field.name]
        if len(rows) != len(keys):
            raise InputError(f"the array {field.name!r} has {len(rows):,} rows, and {len(keys):,} belong there")
        try:
            columns.append(_encoded(rows, field))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the array {field.name!r} is not what its field declares ({field.type}): {error}") from None
    return pa.table(columns, schema=pa.schema([*keys.schema, *(field.column for field in fields)]))


def _encoded(rows: Any, field: Field) -> pa.Array:
    absent = _absent(rows)
    if absent.any() and not field.nullable:
        raise ValueError("a value is missing, and the field is not nullable")
    mask = pa.array(absent) if absent.any() else None
    if not field.is_list:
        return _values(rows, field, mask)
    if isinstance(field.shape, int) and isinstance(rows, np.ndarray) and rows.ndim == 2:
        widths = np.where(absent, 0, rows.shape[1])
        flat = rows[~absent].reshape(-1)
    else:
        present = [() if missing else row for row, missing in zip(rows, absent, strict=True)]
        widths = np.array([len(row) for row in present], np.int64)
        flat = list(chain.from_iterable(present)) if field.is_text else np.concatenate([np.empty(0, _dtype(field)), *present])
    if isinstance(field.shape, int) and (widths[~absent] != field.shape).any():
        raise ValueError(f"a row does not have {field.shape} values")
    return pa.ListArray.from_arrays(list_offsets(widths), _values(flat, field, None), type=field.column.type, mask=mask)


def _absent(rows: Any) -> np.ndarray:
    """Which rows are null, bool (N,)."""
    if isinstance(rows, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(rows)
        return np.asarray(mask.all(axis=1)) if mask.ndim == 2 else mask
    if isinstance(rows, np.ndarray):
        return np.zeros(len(rows), bool)
    return np.array([row is None for row in rows], bool)


def _values(rows: Any, field: Field, mask: pa.Array | None) -> pa.Array:
    if field.is_text:
        return pa.array(list(rows), field.type)
    values = np.asarray(rows) if mask is None else np.array([0 if row is None else row for row in np.ma.filled(rows, 0)])
    if values.ndim != 1:
        raise ValueError(f"its values are an array of {values.ndim} dimensions")
    if pa.types.is_floating(field.type):
        values = values.astype(_dtype(field))
    return pa.array(values, mask=None if mask is None else mask.to_numpy(zero_copy_only=False)).cast(field.type)


def _dtype(field: Field) -> np.dtype:
    return np.dtype(field.type.to_pandas_dtype())


def decode_columns(table: pa.Table, fields: Sequence[Field]) -> Arrays:
    """The reverse of `encode_columns`: arrays with one entry a row, ragged rows padded to the longest of the table; text as
    lists.

    Raises:
        ValueError: a row is null or of another width than its field declares.
    """
    return {field.name: _decoded(table[field.name], field) for field in fields}


def _decoded(column: pa.ChunkedArray, field: Field) -> Any:
    if column.null_count and not field.nullable:
        raise ValueError(f"{field.name} is null")
    if isinstance(field.shape, int):
        widths = pc.list_value_length(column)
        if len(column) and not pc.all(pc.equal(widths, field.shape), skip_nulls=True).as_py():
            raise ValueError(f"{field.name} does not have {field.shape} values in each row")
    if field.is_text:
        return column.to_pylist()
    dtype = _dtype(field)
    if isinstance(field.shape, int):
        found: np.ndarray = np.full((len(column), field.shape), field.padding, dtype)
        found[column.is_valid().to_numpy()] = pc.list_flatten(column).to_numpy().reshape(-1, field.shape)
        return found
    if field.is_list:
        return padded_lists(column, field.padding, dtype.type)[0]
    if not column.null_count:
        return column.to_numpy()
    found = np.full(len(column), field.padding, dtype)
    found[column.is_valid().to_numpy()] = column.drop_null().to_numpy()
    return found
