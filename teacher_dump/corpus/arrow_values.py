"""Values of Arrow as JSON would have them, so that a row means the same in every type of file.

* A struct has every key of every other row, filled with null: a null key counts as absent, at any depth. Maps and lists keep
  their nulls. A map is an object.
* A value of Arrow's JSON type (what `datasets` calls `Json`) is what its text says.
* Points in time are ISO 8601 text (in UTC, where they have a time zone), durations seconds. A decimal is a number where a
  double holds all its digits, and otherwise its digits as text. Bytes are text where they are UTF-8, and otherwise Base64.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa

from teacher_dump.corpus.json_text import json_value
from teacher_dump.corpus.rows import Row

Conversion = Callable[[Any], Any]

BATCH_ROWS = 64

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def batch_rows(batch: pa.RecordBatch, number: int) -> Iterator[Row]:
    """The rows of a batch that comes after `number` rows. A value that cannot be read is its own row's problem."""
    try:
        records = _records(batch)
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if len(batch) > 1:
            for index in range(len(batch)):
                yield from batch_rows(batch.slice(index, 1), number + index)
        elif isinstance(error, UnicodeDecodeError):
            yield Row(number + 1, 0, problem="text that is not UTF-8")
        else:
            yield Row(number + 1, 0, problem=f"a value that cannot be read ({str(error).splitlines()[0]})")
        return
    for index, record in enumerate(records, number + 1):
        yield Row(index, 0, record)


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in columns:
            raise ValueError(f"the column `{name}` is there twice")
        given = column.type
        for retyped in (_in_utc, _as_text):
            kind = retyped(column.type)
            column = column if kind == column.type else column.cast(kind)
        convert, values = _conversion(given), column.to_pylist()
        columns[name] = values if convert is None else [convert(value) for value in values]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _retyped(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with other leaves."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_retyped(field.type, leaf)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_retyped(kind.key_type, leaf), _retyped(kind.item_type, leaf))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_retyped(kind.value_type, leaf)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_retyped(kind.value_type, leaf)))
    return leaf(kind)


def _in_utc(kind: pa.DataType) -> pa.DataType:
    def leaf(kind: pa.DataType) -> pa.DataType:
        return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) and kind.tz else kind

    return _retyped(kind, leaf)


def _as_text(kind: pa.DataType) -> pa.DataType:
    def leaf(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
            return pa.string()
        return pa.int64() if pa.types.is_duration(kind) else kind

    return _retyped(kind, leaf)


def _conversion(kind: pa.DataType) -> Conversion | None:
    """What makes plain values of those that Arrow gives for a type (or for the text it was cast to); None for plain ones."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _nullable(json_value if kind.extension_name == "arrow.json" else _text_unless_plain)
    if types.is_struct(kind):
        return _nullable(_struct({field.name: _conversion(field.type) for field in kind}))
    if types.is_map(kind):
        return _nullable(_map(_conversion(kind.item_type)))
    if hasattr(kind, "value_type") and not types.is_dictionary(kind) and not types.is_run_end_encoded(kind):
        inner = _conversion(kind.value_type)
        return None if inner is None else _nullable(lambda values: [inner(value) for value in values])
    if hasattr(kind, "value_type"):
        return _conversion(kind.value_type)
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        return _nullable(_iso_text)
    if types.is_duration(kind):
        return _nullable(lambda count: count / _UNITS[kind.unit])
    if types.is_decimal(kind):
        return _nullable(_decimal)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or types.is_binary_view(kind):
        return _nullable(_bytes_text)
    plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return None if plain or text else _nullable(_text_unless_plain)


def _nullable(convert: Conversion) -> Conversion:
    return lambda value: None if value is None else convert(value)


def _struct(conversions: dict[str, Conversion | None]) -> Conversion:
    def convert(record: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value if (conversion := conversions[name]) is None else conversion(value)
            for name, value in record.items()
            if value is not None
        }

    return convert


def _map(conversion: Conversion | None) -> Conversion:
    def convert(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        record = {str(key): value if conversion is None else conversion(value) for key, value in pairs}
        if len(record) != len(pairs):
            raise ValueError("a map with a key twice")
        return record

    return convert


def _iso_text(text: Any) -> str:
    """ISO 8601 of Arrow's text of a point in time: a `T` before the time, and no zeros at the end of a fraction."""
    if str(text).startswith("<"):
        raise ValueError(f"a date or time out of range: {str(text).strip('<>').split(': ')[-1]}")
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda fraction: f".{fraction[1]}" if fraction[1] else "", str(text)).replace(" ", "T")


def _decimal(value: Decimal) -> int | float | str:
    if value == value.to_integral_value() and value.as_tuple().exponent == 0:
        return int(value)
    number = float(value)
    return number if Decimal(repr(number)) == value else str(value)


def _bytes_text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def _text_unless_plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | dict) else str(value)
