"""The beginning of an answer as JSON values, for a page to show: so many rows, and so much of each value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from knowledge_store.sql.answers import plain, rows_of

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000
CHARACTERS = 2000  # of a text
ITEMS = 64  # of a list
VALUES = 200_000  # of an answer, those in lists included
LARGEST = 2**53  # whole numbers above are not exact in a browser


def excerpt(schema: pa.Schema, batches: Iterable[pa.RecordBatch], rows: int = ROWS) -> dict[str, Any]:
    """The first rows of an answer.

    Args:
        schema: of the answer.
        batches: its rows as they come; no more of them are taken than are shown.
        rows: the most that are shown.

    Returns:
        `columns`: the name and type of each; `rows`: a list of values for each; `more`: whether rows were left out. A text or
        list that is cut ends in "…"; numbers that JSON lacks, or a browser would round, are text.

    Raises:
        QueryError: Python has no such value.
    """
    shown: list[list[Any]] = []
    values, more = 0, False
    # One row at a time: a row of lists may hold as much as the memory limit lets it.
    for row in (batch.slice(start, 1) for batch in batches for start in range(len(batch))):
        more = len(shown) == rows or values > VALUES
        if more:
            break
        cells = [_cell(value) for value in rows_of(row)[0].values()]
        values += sum(len(cell) if isinstance(cell, list) else 1 for cell in cells)
        shown.append(cells)
    columns = [{"name": field.name, "type": str(field.type)} for field in schema]
    return {"columns": columns, "rows": shown, "more": more}


def _cell(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return value if len(value) <= CHARACTERS else value[:CHARACTERS] + "…"
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if isinstance(value, (list, tuple)) and depth < 3:
        cells = [_cell(item, depth + 1) for item in value[:ITEMS]]
        return [*cells, "…"] if len(value) > ITEMS else cells
    if isinstance(value, (dict, bytes, list, tuple)):
        return _cell(str(plain(value)))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return str(value)
    return _cell(plain(value)) if value is not None and not isinstance(value, (bool, int)) else value
