"""Statistics of a kind over a shard: measured a row group at a time, added up over row groups, shards and dumps.

They are named "KIND.NAME" in commit records, in SQL and in `info`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds.kind import ROWS, Kind


def measured(kind: Kind, table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """A kind's statistics over some of its rows; over none, the number of rows alone.

    Raises:
        ValueError: the kind gives others than it declares, or the rows cannot be measured.
    """
    statistics: dict[str, float] = {ROWS: len(table), **(kind.measure(table, manifest) if len(table) else {})}
    unknown = statistics.keys() - kind.statistics.keys() - {ROWS}
    if unknown:
        raise ValueError(f"the kind {kind.name!r} does not declare the statistic {min(unknown)!r}")
    return statistics


def added(kind: Kind, parts: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Statistics over several groups of rows, from those of each; a mean over nothing is left out."""
    listed = list(parts)
    statistics: dict[str, float] = {}
    for name, over in {ROWS: None, **kind.statistics}.items():
        weighted = [(value, (part.get(over) or 0) if over else 1) for part in listed if (value := part.get(name)) is not None]
        weight = sum(count for _, count in weighted)
        if over is None or weight:
            statistics[name] = sum(value * count for value, count in weighted) / (weight if over else 1)
    return statistics


def qualified(kind: Kind, statistics: Mapping[str, float]) -> dict[str, float]:
    """Statistics by the names that commit records have."""
    return {f"{kind.name}.{name}": value for name, value in statistics.items()}
