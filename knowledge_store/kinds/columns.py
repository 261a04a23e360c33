"""Between arrays and columns: how rows of numbers, lists and text become an Arrow table, and come out of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
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
MAX_SHOWN = 60  # characters of a value in an error


def joined(knowledge: Sequence[Arrays], fillers: Mapping[str, Any] | None = None) -> Arrays:
    """The arrays of several sequences, one after the other; nothing of no sequence.

    Args:
        knowledge: of each sequence.
        fillers: what narrower rows of an array (N, K) are filled up with, where it has one; others become lists of rows.
    """
    if not knowledge:
        return {}
    return {name: _concatenated([arrays[name] for arrays in knowledge], (fillers or {}).get(name)) for name in knowledge[0]}


def _concatenated(parts: list[Any], filler: Any) -> Any:
    """Rows one after the other: as one array only where all are of one sort of number, which loses no digit."""
    filled = [part for part in parts if len(part)] or parts[:1]
    if not all(isinstance(part, np.ndarray) for part in filled):
        return list(chain.from_iterable(filled))
    if filler is not None and all(part.ndim == 2 for part in filled) and len({part.dtype for part in filled}) == 1:
        width = max(part.shape[1] for part in filled)
        rows: np.ndarray = np.full((sum(map(len, filled)), width), filler, filled[0].dtype)
        end = 0
        for part in filled:
            rows[end : end + len(part), : part.shape[1]] = part
            end += len(part)
        return rows
    if len({(part.dtype.kind, part.shape[1:]) for part in filled}) > 1:
        return list(chain.from_iterable(filled))
    masked = any(isinstance(part, np.ma.MaskedArray) for part in filled)
    return np.ma.concatenate(filled) if masked else np.concatenate(filled)


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


def list_mask(lengths: np.ndarray, width: int) -> np.ndarray:
    """Which places of lists that are padded to `width` values hold one, bool (N, width), from the lists' lengths (N,)."""
    mask = np.empty((len(lengths), width), bool)
    for place in range(width):  # in as many long loops: numpy takes a short one for each list otherwise
        np.greater(lengths, place, out=mask[:, place])
    return mask


def padded_lists(column: pa.ChunkedArray, fill: Any, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Lists of up to K values as (N, K), and their lengths (N,); null counts as empty."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    width = int(lengths.max(initial=0))
    padded: np.ndarray = np.full((len(column), width), fill, dtype=dtype)
    padded[list_mask(lengths, width)] = pc.list_flatten(column).to_numpy()
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
    """The table of `keys` and of an extractor's arrays, one entry a row: integers exactly, floats rounded to their type.

    Args:
        keys: the key columns.
        arrays: of each field: scalars (N,), a fixed width (N, W), ragged a list of N arrays or an array (N, K); text a list of
            str, a row's list for several. Null is None in a list, and masked in a `numpy.ma` array.
        fields: of the kind.

    Raises:
        InputError: an array has a value that its field cannot hold.
    """
    columns = [*keys.columns]
    for field in fields:
        try:
            columns.append(_encoded(arrays[field.name], field))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            declared = field.type if field.shape == "scalar" else f"{field.shape} {field.type}"
            raise InputError(f"the array {field.name!r} is not what its field declares ({declared}): {error}") from None
    return pa.table(columns, schema=pa.schema([*keys.schema, *(field.column for field in fields)]))


def is_list(values: Any) -> bool:
    """Whether something has entries in an order: text has, and is one value."""
    return hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0 and not isinstance(values, str | bytes | Mapping | Set)


def _short(value: Any) -> str:
    """A value as errors show it."""
    shown = str(value) if isinstance(value, np.generic) else repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def _encoded(rows: Any, field: Field) -> pa.Array:
    absent = _absent(rows)
    if absent.any() and not field.nullable:
        raise ValueError("a value is missing, and the field is not nullable")
    present: Any = np.ma.getdata(rows) if isinstance(rows, np.ndarray) else rows
    if absent.any():
        present = present[~absent] if isinstance(present, np.ndarray) else [row for row in rows if not _is_null(row)]
    if not field.is_list:
        values = _values(present, field)
        return values.take(pa.array(np.maximum(np.cumsum(~absent) - 1, 0), mask=absent)) if absent.any() else values
    lengths = np.zeros(len(rows), np.int64)
    if isinstance(present, np.ndarray) and present.ndim == 2:
        lengths[~absent] = present.shape[1]
    else:
        for row in present:
            if not is_list(row):
                raise ValueError(f"{_short(row)} stands where a list of values belongs")
        lengths[~absent] = [len(row) for row in present]
    if isinstance(field.shape, int) and (lengths[~absent] != field.shape).any():
        raise ValueError(f"a row does not have {field.shape} values")
    mask = pa.array(absent) if absent.any() else None
    return pa.ListArray.from_arrays(list_offsets(lengths), _flat(present, field), type=field.column.type, mask=mask)


def _is_null(row: Any) -> bool:
    masked = isinstance(row, np.ma.MaskedArray) and row.size > 0 and bool(np.ma.getmaskarray(row).all())
    return row is None or row is np.ma.masked or masked


def _absent(rows: Any) -> np.ndarray:
    """Which rows are null, bool (N,)."""
    if isinstance(rows, np.ma.MaskedArray) and rows.ndim <= 2:
        mask = np.ma.getmaskarray(rows)
        if mask.ndim == 1:
            return mask
        absent = np.asarray(mask.any(axis=1))
        if not mask[absent].all():
            raise ValueError("a value among those of a row is masked")
        return absent
    if isinstance(rows, np.ndarray) and rows.dtype != object:
        return np.zeros(len(rows), bool)
    return np.array([_is_null(row) for row in rows], bool)


def _flat(rows: Any, field: Field) -> pa.Array:
    """The values of all rows side by side."""
    if field.is_text:
        return _values(list(chain.from_iterable(rows)), field)
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return _values(rows.reshape(-1), field)
    if any(isinstance(row, np.ma.MaskedArray) and np.ma.getmaskarray(row).any() for row in rows):
        raise ValueError("a value among those of a row is masked")
    if len({row.dtype if isinstance(row, np.ndarray) else None for row in rows}) == 1 and isinstance(rows[0], np.ndarray):
        return _values(np.concatenate([np.asarray(row) for row in rows]), field)
    # Of several types: numpy would make floats of integers, or of rows without a value.
    return pa.array(np.concatenate([np.empty(0, field.dtype), *(_numbers(row, field) for row in rows)]), field.type)


def _values(values: Any, field: Field) -> pa.Array:
    """An Arrow array of the field's type."""
    if not field.is_text:
        return pa.array(_numbers(values, field), field.type)
    expected = str if field.type == pa.string() else bytes
    for value in values:
        if not isinstance(value, expected):
            raise ValueError(f"{_short(value)} is not {'text' if expected is str else 'bytes'}")
    return pa.array(list(values), field.type)


def _numbers(values: Any, field: Field) -> np.ndarray:
    """Numbers (N,) in the field's type: integers and bools as they are, floats rounded.

    Raises:
        ValueError: the type does not hold one of them.
    """
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"its values are an array of {values.ndim} dimensions")
    dtype = field.dtype
    if not isinstance(values, np.ndarray) or values.dtype == object:
        values = _from_list(list(values), dtype.kind)
    accepted = {"b": "b", "i": "iuf", "u": "iuf", "f": "iuf"}[dtype.kind]
    if len(values) and values.dtype.kind not in accepted and values.dtype != object:
        raise ValueError(f"{_short(values[0])} is of another type ({values.dtype})")
    if not len(values) or dtype.kind == "b":
        return values.astype(dtype)
    if dtype.kind == "f":
        return _rounded(values, dtype, field.infinite)
    if values.dtype.kind == "f" and (wrong := ~(np.isfinite(values) & (np.trunc(values) == values))).any():
        raise ValueError(f"{_short(values[wrong][0])} is not an integer")
    minimum, maximum = np.iinfo(dtype).min, np.iinfo(dtype).max
    for value in (int(values.min()), int(values.max())):
        if not minimum <= value <= maximum:
            raise ValueError(f"{value} is not between {minimum} and {maximum}")
    return values.astype(dtype)


def _from_list(values: list[Any], kind: str) -> np.ndarray:
    """Numbers of a list (N,) for a type of a kind of numpy's: bools, Python's integers (dtype object), or float64."""
    for value in values:
        boolean = isinstance(value, bool | np.bool_)
        if boolean != (kind == "b") or not isinstance(value, bool | np.bool_ | int | float | np.integer | np.floating):
            raise ValueError(f"{_short(value)} is not {'a bool' if kind == 'b' else 'a number'}")
        if kind in "iu" and isinstance(value, float | np.floating) and not value.is_integer():
            raise ValueError(f"{_short(value)} is not an integer")
    if kind in "iu":
        return np.array([int(value) for value in values], object)
    return np.array(values, bool if kind == "b" else np.float64)


def _rounded(values: np.ndarray, dtype: np.dtype, infinite: bool) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
        if (wrong := np.isnan(values) | (np.isinf(values) & (not infinite))).any():
            raise ValueError(f"{_short(values[wrong][0])} is NaN or infinite")
        if (wrong := np.isinf(rounded) & np.isfinite(values)).any():
            raise ValueError(f"{_short(values[wrong][0])} is beyond what the type holds, up to {np.finfo(dtype).max}")
    return rounded


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
        if not pc.all(pc.equal(widths, field.shape), skip_nulls=True, min_count=0).as_py():  # where all rows are null too
            raise ValueError(f"{field.name} does not have {field.shape} values in each row")
    if field.is_text:
        return column.to_pylist()
    dtype = field.dtype
    if isinstance(field.shape, int):
        rows: np.ndarray = np.full((len(column), field.shape), field.padding, dtype)
        rows[column.is_valid().to_numpy()] = pc.list_flatten(column).to_numpy().reshape(-1, field.shape)
        return rows
    if field.is_list:
        return padded_lists(column, field.padding, dtype.type)[0]
    if not column.null_count:
        return column.to_numpy()
    rows = np.full(len(column), field.padding, dtype)
    rows[column.is_valid().to_numpy()] = column.drop_null().to_numpy()
    return rows
