"""A corpus read once before it is dumped: every row is checked, and where each shard begins is noted, so that a worker goes
straight to its shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_dump.corpus.documents import problem_text, read_documents
from teacher_dump.corpus.rows import Start


@dataclass(frozen=True)
class Scan:
    """What reading the whole corpus found: how many documents, where shards begin, the types of its own columns, and the rows
    that cannot be used (the first of them in words)."""

    documents: int
    shards: list[Start]
    columns: dict[str, str]
    bad_rows: int
    first_problem: str | None


def _column_type(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "double" if isinstance(value, float) else "string"


def _common_type(one: str | None, other: str | None) -> str | None:
    if one is None or other is None or one == other:
        return one or other
    return "double" if {one, other} == {"int64", "double"} else "string"


def column_value(value: Any, column_type: str) -> Any:
    """A corpus column's value as the type its column has: anything that is no string becomes JSON text in a string column."""
    if value is None or (column_type == "string" and isinstance(value, str)):
        return value
    if column_type == "string":
        return json.dumps(value, ensure_ascii=False, default=str)
    return float(value) if column_type == "double" else value


def scan(
    files: tuple[Path, ...],
    shard_size: int,
    part_characters: int,
    progress: Callable[[int], None] = lambda count: None,
    column_names: Mapping[str, str] | None = None,
) -> Scan:
    """Read the whole corpus once.

    Args:
        files: checked by `check_files`.
        shard_size: documents in a shard.
        part_characters: longest text that is one document.
        progress: called with the bytes of the files that were passed since the last call; those of a compressed file or of
            Parquet pass as a whole, or nearly so.
        column_names: what `--columns` says.

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    starts: list[Start] = []
    characters: list[int] = []
    columns: dict[str, str | None] = {}
    bad_rows, first_problem, count = 0, None, 0
    sizes = [path.stat().st_size for path in files]
    begins = [sum(sizes[:file]) for file in range(len(files))]
    passed = 0
    for document in read_documents(files, Start(0, 0, 1, 0, 0), part_characters, column_names):
        if document.number % shard_size == 0:
            starts.append(Start(document.number, document.file, document.row, document.part, document.offset))
            characters.append(0)
        count = document.number + 1
        characters[-1] += document.characters
        place = begins[document.file] + min(document.offset, sizes[document.file])
        progress(place - passed)
        passed = place
        if document.problem is not None:
            bad_rows += 1
            first_problem = first_problem or problem_text(files, document.file, document.row, document.problem)
        elif document.part == 0:
            for name, value in (document.columns or {}).items():
                columns[name] = _common_type(columns.get(name), _column_type(value))
    progress(sum(sizes) - passed)
    shards = [
        Start(start.document, start.file, start.row, start.part, start.offset, size)
        for start, size in zip(starts, characters, strict=True)
    ]
    return Scan(count, shards, {name: kind or "string" for name, kind in columns.items()}, bad_rows, first_problem)
