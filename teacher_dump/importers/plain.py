"""Columns of any names, in Parquet, Arrow or JSON Lines files: token ids and, for each, k candidates with log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teacher_dump.importers.configuration import REQUIRED
from teacher_dump.importers.layout import IGNORED, Layout, LayoutRow, split
from teacher_dump.importers.rows import real_numbers, table_rows, wanted, whole_numbers


class Plain(Layout):
    """The layout `plain`: the columns are named by `--columns`. Targets are labels, −100 elsewhere, or a mask of 0 and 1."""

    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """See `Layout`."""
        names = self.config.column_names
        columns = wanted(list(names.values()))
        for row in table_rows(path, first, offset, columns):
            found = {part: row.columns[name] for part, name in names.items() if row.columns.get(name) is not None}
            found = {**{part: [] for part in REQUIRED}, **found}
            given: dict[str, Any] = {}
            if "mask" in found:
                given["mask"] = whole_numbers(found["mask"], names["mask"])
            if "targets" in found:
                given["is_target"] = targets_of(whole_numbers(found["targets"], names["targets"]))
            if "token" in found:
                given["token_logprobs"] = real_numbers(found["token"], names["token"])
            if "tail" in found:
                given["tail_logprobs"] = real_numbers(found["tail"], names["tail"])
            ids, candidates, logprobs = (
                whole_numbers(found["ids"], names["ids"]),
                whole_numbers(found["candidates"], names["candidates"], 2),
                real_numbers(found["logprobs"], names["logprobs"], 2),
            )
            yield LayoutRow(row.number, row.offset, split(ids, candidates, logprobs, self.shift, **given))

    def record(self) -> dict[str, Any]:
        """See `Layout`."""
        return {"columns": self.config.column_names}


def targets_of(labels: Any) -> Any:
    """Which tokens count, bool (T,): of labels those that are not −100, of a mask of 0 and 1 those with 1."""
    return labels == 1 if ((labels == 0) | (labels == 1)).all() else labels != IGNORED
