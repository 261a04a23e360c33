"""Facts about dumps and shards, from manifests and the index alone: the relations `dumps` and `shards`, and `info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from knowledge_store.index import Index
from knowledge_store.layout import SEQUENCES
from knowledge_store.manifest import Manifest

DENSE_BYTES_PER_LOGPROB = 4  # float32


@dataclass(frozen=True)
class DumpSummary:
    """What one dump holds, over its committed shards.

    Attributes:
        dump, teacher, kinds, selection, quantisation_step, max_length: from the manifest.
        documents, shards: committed; documents_planned, shards_planned: in the plan.
        skipped_rows: rows of the corpus left out.
        sequences, positions, predictions: rows; predictions are positions with knowledge.
        mean_top_k_mass, mean_nll, mean_top_1_accuracy: means over predictions (nats); None before the first shard,
            and the first and last for a selection without candidates.
        bytes: everything of the dump but its vocabulary (tokens.parquet), commit records included.
        column_bytes: compressed bytes of each column, as "table.column".
        dense_bytes: predictions × vocabulary × 4, the float32 log-probabilities that were not kept.
    """

    dump: str
    teacher: str
    kinds: tuple[str, ...]
    selection: str
    quantisation_step: float
    max_length: int
    vocabulary_size: int
    documents: int
    documents_planned: int
    shards: int
    shards_planned: int
    skipped_rows: int
    sequences: int
    positions: int
    predictions: int
    mean_top_k_mass: float | None
    mean_nll: float | None
    mean_top_1_accuracy: float | None
    bytes: int
    tokens_bytes: int
    column_bytes: dict[str, int]
    dense_bytes: int

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.shards == self.shards_planned

    @property
    def bytes_per_position(self) -> float | None:
        """Bytes on disk for each position, the vocabulary left out."""
        return self.bytes / self.positions if self.positions else None

    @property
    def ratio(self) -> float | None:
        """Dense bytes for each byte on disk."""
        return self.dense_bytes / self.bytes if self.bytes else None


def _selection(manifest: Manifest) -> str:
    at = f", tail also at temperature {manifest.temperature:g}" if manifest.temperature else ""
    return f"{manifest.rule}{at}"


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    there = [row for row in rows if name in row]
    weight = sum(row["predictions"] for row in there)
    return sum(row[name] * row["predictions"] for row in there) / weight if weight else None


def summarise(index: Index, manifest: Manifest) -> DumpSummary:
    """The facts of one dump."""
    shards = [row for row in index.shards.to_pylist() if row["dump"] == manifest.dump]
    files = [row for row in index.files.to_pylist() if row["dump"] == manifest.dump]
    statistics = [dict(row["statistics"]) for row in shards]
    predictions = int(sum(row.get("predictions", 0) for row in statistics))
    column_bytes: dict[str, int] = {}
    rows: dict[str, int] = {}
    for file in files:
        rows[file["table"]] = rows.get(file["table"], 0) + file["rows"]
        for column, size in file["column_bytes"]:
            name = f"{file['table']}.{column}"
            column_bytes[name] = column_bytes.get(name, 0) + size
    size = sum(file["bytes"] for file in files) + sum(row["record_bytes"] for row in shards) + len(manifest.to_bytes())
    return DumpSummary(
        dump=manifest.dump,
        teacher=manifest.teacher["name"],
        kinds=manifest.kinds,
        selection=_selection(manifest),
        quantisation_step=manifest.quantisation_step,
        max_length=manifest.plan["max_length"],
        vocabulary_size=manifest.vocabulary_size,
        documents=sum(row["documents"] for row in shards),
        documents_planned=manifest.derived["documents"],
        shards=len(shards),
        shards_planned=manifest.shard_count,
        skipped_rows=sum(row["skipped_rows"] for row in shards),
        sequences=rows.get(SEQUENCES, 0),
        positions=rows.get("positions", 0),
        predictions=predictions,
        mean_top_k_mass=_mean(statistics, "mean_top_k_mass"),
        mean_nll=_mean(statistics, "mean_nll"),
        mean_top_1_accuracy=_mean(statistics, "mean_top_1_accuracy"),
        bytes=size,
        tokens_bytes=manifest.derived["tokens"]["bytes"],
        column_bytes=column_bytes,
        dense_bytes=predictions * manifest.vocabulary_size * DENSE_BYTES_PER_LOGPROB,
    )


DUMPS = pa.schema(
    [
        ("dump", pa.string()),
        ("teacher", pa.string()),
        ("selection", pa.string()),
        ("quantisation_step", pa.float64()),
        ("max_length", pa.int32()),
        ("vocabulary_size", pa.int64()),
        ("documents", pa.int64()),
        ("documents_planned", pa.int64()),
        ("shards", pa.int64()),
        ("shards_planned", pa.int64()),
        ("complete", pa.bool_()),
        ("skipped_rows", pa.int64()),
        ("sequences", pa.int64()),
        ("positions", pa.int64()),
        ("predictions", pa.int64()),
        ("mean_top_k_mass", pa.float64()),
        ("mean_nll", pa.float64()),
        ("mean_top_1_accuracy", pa.float64()),
        ("bytes", pa.int64()),
        ("bytes_per_position", pa.float64()),
        ("dense_bytes", pa.int64()),
        ("ratio", pa.float64()),
    ]
)


def dumps_table(index: Index, manifests: list[Manifest]) -> pa.Table:
    """The relation `dumps`: one row per dump (schema DUMPS)."""
    summaries = [summarise(index, manifest) for manifest in manifests]
    rows = [{name: getattr(summary, name) for name in DUMPS.names} for summary in summaries]
    return pa.Table.from_pylist(rows, schema=DUMPS)


def shards_table(index: Index) -> pa.Table:
    """The relation `shards`: one row per committed shard, with a column for each statistic of its kinds."""
    sizes: dict[tuple[str, int], dict[str, int]] = {}
    for file in index.files.to_pylist():
        size = sizes.setdefault((file["dump"], file["shard"]), {"bytes": 0})
        size["bytes"] += file["bytes"]
        size[file["table"]] = file["rows"]
    statistics = sorted({name for row in index.shards["statistics"].to_pylist() for name, _ in row})
    rows: list[dict[str, Any]] = []
    for shard in index.shards.to_pylist():
        size = sizes.get((shard["dump"], shard["shard"]), {})
        fixed = {name: shard[name] for name in ("dump", "shard", "first_document", "documents", "skipped_rows", "committed_at")}
        counted = {"sequences": size.get(SEQUENCES), "positions": size.get("positions"), "bytes": size.get("bytes")}
        rows.append({**fixed, **counted, **dict(shard["statistics"])})
    schema = pa.schema(
        [
            ("dump", pa.string()),
            ("shard", pa.int64()),
            ("first_document", pa.int64()),
            ("documents", pa.int64()),
            ("sequences", pa.int64()),
            ("positions", pa.int64()),
            *((name, pa.float64()) for name in statistics),
            ("skipped_rows", pa.int64()),
            ("bytes", pa.int64()),
            ("committed_at", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)
