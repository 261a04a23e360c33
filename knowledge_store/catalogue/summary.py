"""Facts about dumps and shards, from manifests and the index alone: the relations `dumps` and `shards`, and `info`."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.catalogue.index import STATISTIC, Index
from knowledge_store.format.layout import manifest_file
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds.positions import positions_of
from knowledge_store.storage import Storage

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
    if "positions" not in manifest.kinds:
        return ""
    kept = positions_of(manifest)
    at = f", tail also at temperature {kept.temperature:g}" if kept.temperature else ""
    return f"{kept.selection}{at}"


def _statistic(shards: pa.Table, name: str) -> pa.ChunkedArray:
    """One statistic of each shard, null where it has none of that name."""
    column = f"{STATISTIC}{name}"
    return shards[column] if column in shards.column_names else pa.chunked_array([pa.nulls(len(shards), pa.float64())])


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _mean(shards: pa.Table, name: str) -> float | None:
    """A mean over predictions, from the means of the shards that have one."""
    means, weights = _statistic(shards, name), _statistic(shards, "predictions")
    weight = pc.sum(pc.if_else(pc.is_valid(means), weights, 0)).as_py()
    return pc.sum(pc.multiply(means, weights)).as_py() / weight if weight else None


def _column_bytes(shards: pa.Table) -> dict[str, int]:
    """Compressed bytes of each column ("table.column") over all shards."""
    maps = shards["column_bytes"].combine_chunks()
    columns = pa.table({"column": maps.keys, "bytes": maps.items}).group_by("column", use_threads=False)
    return {row["column"]: row["bytes_sum"] for row in columns.aggregate([("bytes", "sum")]).to_pylist()}


def summarise(storage: Storage, index: Index, manifest: Manifest) -> DumpSummary:
    """The facts of one dump.

    Raises:
        DamageError: its manifest is gone.
    """
    shards = index.shards.filter(pc.field("dump") == manifest.dump)
    predictions = _sum(_statistic(shards, "predictions"))
    own = storage.size(manifest_file(manifest.dump))
    return DumpSummary(
        dump=manifest.dump,
        teacher=manifest.teacher["name"],
        kinds=tuple(manifest.kinds),
        selection=_selection(manifest),
        quantisation_step=positions_of(manifest).quantisation_step if "positions" in manifest.kinds else 0.0,
        max_length=manifest.plan["max_length"],
        vocabulary_size=manifest.vocabulary_size,
        documents=_sum(shards["documents"]),
        documents_planned=manifest.derived["documents"],
        shards=len(shards),
        shards_planned=manifest.shard_count,
        skipped_rows=_sum(shards["skipped_rows"]),
        sequences=_sum(shards["sequences"]),
        positions=_sum(shards["positions"]),
        predictions=predictions,
        mean_top_k_mass=_mean(shards, "mean_top_k_mass"),
        mean_nll=_mean(shards, "mean_nll"),
        mean_top_1_accuracy=_mean(shards, "mean_top_1_accuracy"),
        bytes=_sum(shards["bytes"]) + _sum(shards["record_bytes"]) + own,
        tokens_bytes=manifest.derived["tokens"]["bytes"],
        column_bytes=_column_bytes(shards),
        dense_bytes=min(predictions * manifest.vocabulary_size * DENSE_BYTES_PER_LOGPROB, 2**63 - 1),
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


def dumps_table(storage: Storage, index: Index, manifests: list[Manifest]) -> pa.Table:
    """The relation `dumps`: one row per dump (schema DUMPS)."""
    summaries = [summarise(storage, index, manifest) for manifest in manifests]
    rows = [{name: getattr(summary, name) for name in DUMPS.names} for summary in summaries]
    return pa.Table.from_pylist(rows, schema=DUMPS)


def shards_table(index: Index) -> pa.Table:
    """The relation `shards`: one row per committed shard, with a column for each statistic of its kinds."""
    before = ("dump", "shard", "first_document", "documents", "sequences", "positions")
    after = ("skipped_rows", "bytes", "committed_at")
    statistics = [name for name in index.shards.column_names if name.startswith(STATISTIC)]
    table = index.shards.select([*before, *statistics, *after])
    return table.rename_columns([name.removeprefix(STATISTIC) for name in table.column_names])
