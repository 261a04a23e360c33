"""The same rows in files of every type, and random conversations to put there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

Rows = list[dict[str, Any]]

# --- files --------------------------------------------------------------------------------------------------------------


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_bytes(json_lines(rows))


def write_gzip(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress(json_lines(rows)))


def write_zstd(path: Path, rows: Rows) -> None:
    path.write_bytes(zstandard.ZstdCompressor().compress(json_lines(rows)))


def write_list(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def write_arrow(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)


JSON_WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gzip,
    ".jsonl.zst": write_zstd,
    ".json": write_list,
}
ARROW_WRITERS: dict[str, Callable[[Path, Rows], None]] = {".parquet": write_parquet, ".arrow": write_arrow}

# --- rows ---------------------------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from([*"ab é界🌊\"\\\n1,{}[]'", "the ", "lamp "]), max_size=8).map("".join)
names = st.sampled_from(["city", "when", "depth", "options", "Läng", "n"])

numbers = st.floats(allow_nan=False, allow_infinity=False)
short_numbers = st.integers(-1000, 1000).map(lambda eighths: eighths / 8)  # `datasets` writes JSON with few digits


def json_objects(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with any JSON in them."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | numbers | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=6,
    )
    return st.dictionaries(names, values, max_size=4)


LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "whole": st.integers(-(2**40), 2**40),
    "number": short_numbers,
    "text": words,
}

# A type of values that a column of structs can hold: a leaf, a list of one type, or names with a type each.
value_types = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.lists(inner, min_size=1, max_size=1) | st.dictionaries(names, inner, min_size=1, max_size=3),
    max_leaves=5,
)


def draw_value(draw: Any, kind: Any, complete: bool) -> Any:
    """A value of a type, whose names are all there (and lists not empty) where it is to be complete, and else some of them, in
    the order of the type."""
    if isinstance(kind, list):
        return [draw_value(draw, kind[0], complete) for _ in range(draw(st.integers(int(complete), 3)))]
    if isinstance(kind, dict):
        return {name: draw_value(draw, inner, complete) for name, inner in kind.items() if complete or draw(st.booleans())}
    return draw(LEAVES[kind])


def _rows_of(draw: Any, count: int, arguments: Callable[[bool], Any], schema: Callable[[bool], Any]) -> Rows:
    """Conversations with tools and calls; of the first, nothing is left out that a row can have."""
    rows = []
    for index in range(count):
        complete = index == 0
        maybe = st.just(True) if complete else st.booleans()
        function = {"name": draw(words.filter(bool)), "parameters": schema(complete)}
        call = {"id": "call-1", "type": "function", "function": {"name": function["name"], "arguments": arguments(complete)}}
        asked = {"role": "user", "content": draw(words) + "?"}
        called: dict[str, Any] = {"role": "assistant"}
        if draw(maybe):
            called["content"] = draw(words)
        called["tool_calls"] = [call] * (1 if complete else draw(st.integers(1, 2)))
        answered: dict[str, Any] = {"role": "assistant", "content": draw(words) + "."}
        if draw(maybe):
            answered["reasoning_content"] = draw(words)
        messages = [asked, called, {"role": "tool", "content": draw(words), "tool_call_id": "call-1"}, answered]
        row: dict[str, Any] = {"messages": messages if complete or draw(st.booleans()) else [asked, answered]}
        if draw(maybe):
            row["tools"] = [{"type": "function", "function": function}]
        if draw(maybe):
            row["chat_template_kwargs"] = arguments(complete)
        row["number"] = index
        rows.append(row)
    return rows


@st.composite
def struct_rows(draw: Any) -> Rows:
    """Rows that columns of structs can hold: no true nulls, and one type for each place."""
    arguments = draw(st.dictionaries(names, value_types, min_size=1, max_size=3))
    schema = {"type": "text", "properties": {"place": draw(value_types)}}
    return _rows_of(
        draw,
        draw(st.integers(1, 8)),
        lambda complete: draw_value(draw, arguments, complete),
        lambda complete: draw_value(draw, schema, complete),
    )


@st.composite
def free_rows(draw: Any, numbers: st.SearchStrategy[float] = numbers) -> Rows:
    """Rows with any JSON in their arguments: nulls, and types that differ by row."""
    objects = json_objects(numbers)
    return _rows_of(draw, draw(st.integers(1, 8)), lambda complete: draw(objects), lambda complete: draw(objects))


def with_json_text(rows: Rows) -> Rows:
    """Rows whose columns of structures are JSON text."""
    return [
        {name: value if name == "number" else json.dumps(value, ensure_ascii=False) for name, value in row.items()}
        for row in rows
    ]
