"""Answers to SQL as text: JSON, CSV, or columns for a person."""

from __future__ import annotations

import csv
import decimal
import json
import math
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len

from knowledge_store.errors import QueryError

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS = 200
COUNTED_ROWS = 1_000_000
ROWS_AT_ONCE = 10_000


class Format(StrEnum):
    """How an answer is printed."""

    table = "table"
    csv = "csv"
    json = "json"


def write_answer(schema: pa.Schema, batches: Iterator[pa.RecordBatch], form: Format, file: TextIO) -> str | None:
    """Write an answer as its rows come, or the first SHOWN_ROWS of them as a table.

    Returns:
        what a person must be told of it: how many rows were left out.

    Raises:
        QueryError: Python has no such value.
    """
    if form is Format.table:
        return _write_table(schema, batches, file)
    separator = "["
    writer = csv.writer(file, lineterminator="\n")
    if form is Format.csv:
        writer.writerow(schema.names)
    for batch in batches:
        for start in range(0, len(batch), ROWS_AT_ONCE):
            for row in rows_of(batch.slice(start, ROWS_AT_ONCE)):
                if form is Format.csv:
                    writer.writerow([plain(value) for value in row.values()])
                else:
                    file.write(f"{separator}{_json(row)}")
                    separator = ",\n"
    if form is Format.json:
        file.write("[]\n" if separator == "[" else "]\n")
    return None


def _write_table(schema: pa.Schema, batches: Iterator[pa.RecordBatch], file: TextIO) -> str | None:
    rows: list[list[str]] = []
    count = 0
    for batch in batches:
        shown = rows_of(batch.slice(0, SHOWN_ROWS - len(rows)))
        rows += [[visible(_cell(value)) for value in row.values()] for row in shown]
        count += len(batch)
        if count > COUNTED_ROWS:
            break
    file.writelines(f"{line}\n" for line in aligned([visible(name) for name in schema.names], rows))
    if count == len(rows):
        return None
    total = f"more than {COUNTED_ROWS:,}" if count > COUNTED_ROWS else f"{count:,}"
    return f"{len(rows)} of {total} rows shown: --format csv or json gives all"


def plain(value: Any) -> Any:
    """A value as JSON has it: −∞, ∞ and NaN become null, whole decimals numbers, and what JSON lacks text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _json(row: dict[str, Any]) -> str:
    """A row as JSON that tells a terminal nothing, if it is one that reads it: JSON may spell out any character of a text."""
    text = json.dumps(plain(row), ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else json.dumps(character)[1:-1] for character in text)


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as Python values.

    Raises:
        QueryError: Python has no such value (a date after the year 9999, say).
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (OverflowError, ValueError) as error:
        raise QueryError(f"the answer has a value that cannot be shown ({error}): cast it to VARCHAR") from None
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_cell(item) for item in value) + "]"
    return str(plain(value))


def visible(text: str) -> str:
    """Text that stays on its line, and tells a terminal nothing: control characters are spelled out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def aligned(names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of rows under their names, each column as wide as it needs to be: a terminal folds long lines."""
    widths = [max(cell_len(line[column]) for line in [names, *rows]) for column in range(len(names))]
    for line in [names, *rows]:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()
