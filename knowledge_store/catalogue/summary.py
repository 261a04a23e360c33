"""Facts about dumps and shards, from manifests and the index alone: the relations `dumps` and `shards`, and `info`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.catalogue.index import STATISTIC, Index
from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.format.layout import manifest_file
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Kind, Totals
from knowledge_store.kinds.kind import ROWS


@dataclass(frozen=True)
class DumpSummary:
    """What one dump holds, over its committed shards.

    Attributes:
        dump, teacher, kinds, max_length, vocabulary_size: from the manifest.
        documents, shards: committed; documents_planned, shards_planned: in the plan.
        skipped_rows: rows of the corpus that were skipped; skip_reasons: how many for each reason, most first.
        truncated: sequences that were truncated at the maximum length.
        counts: what becomes of the rows of the whole corpus, committed or not; None where the manifest does not say.
        chat: what the plan says of conversations: train_on, and where it has them the date and the template's SHA-256.
        sequences: committed; positions: all their tokens.
        groups: of which the sequences are the answers; None where they are no groups.
        bytes: everything of the dump but its vocabulary (tokens.parquet), commit records included.
        column_bytes: compressed bytes of each column, as "table.column".
        statistics: of each kind over all its rows, as "KIND.NAME"; None where no shard has one.
        facts: what else each kind states, as "KIND.NAME".
        lines: what each kind tells a person: label and value.
    """

    dump: str
    teacher: str
    kinds: tuple[str, ...]
    max_length: int
    vocabulary_size: int
    documents: int
    documents_planned: int
    shards: int
    shards_planned: int
    skipped_rows: int
    skip_reasons: dict[str, int]
    truncated: int
    counts: CorpusCounts | None
    chat: dict[str, Any]
    sequences: int
    groups: int | None
    positions: int
    bytes: int
    tokens_bytes: int
    column_bytes: dict[str, int]
    statistics: dict[str, float | None]
    facts: dict[str, str | float | int | None]
    lines: list[tuple[str, str]]

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.shards == self.shards_planned

    @property
    def bytes_per_position(self) -> float | None:
        """Bytes on disk for each position, the vocabulary left out."""
        return self.bytes / self.positions if self.positions else None

    def to_record(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        record = asdict(self)
        del record["lines"]
        return {**record, "complete": self.complete, "bytes_per_position": self.bytes_per_position}


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _statistics(shards: pa.Table, kind: Kind) -> dict[str, float | None]:
    """A kind's statistics over shards, from those of each; None where no shard has one."""

    def column(name: str) -> pa.ChunkedArray:
        full = f"{STATISTIC}{kind.name}.{name}"
        return shards[full] if full in shards.column_names else pa.chunked_array([pa.nulls(len(shards), pa.float64())])

    statistics: dict[str, float | None] = {}
    for name, over in {ROWS: None, **kind.statistics}.items():
        values = column(name)
        if over is None:
            total = pc.sum(values).as_py()
            statistics[name] = int(total) if total is not None and total.is_integer() else total
            continue
        weights = column(over)
        weight = pc.sum(pc.if_else(pc.is_valid(values), weights, 0)).as_py()
        statistics[name] = pc.sum(pc.multiply(values, weights)).as_py() / weight if weight else None
    return statistics


def _added(column: pa.ChunkedArray) -> dict[str, int]:
    """The sum of each key's values over all shards, largest first."""
    maps = column.combine_chunks()
    sums = pa.table({"key": maps.keys, "value": maps.items}).group_by("key", use_threads=False).aggregate([("value", "sum")])
    ordered = sums.sort_by([("value_sum", "descending"), ("key", "ascending")])
    return {row["key"]: row["value_sum"] for row in ordered.to_pylist()}


def what_is_missing(dumps: Dumps, manifest: Manifest) -> str | None:
    """A sentence about a dump whose shards are not all there, and how to go on; None of one that is complete."""
    shards = pc.sum(pc.equal(dumps.index.shards["dump"], manifest.dump)).as_py() or 0
    if shards == manifest.shard_count:
        return None
    return (
        f"the dump {manifest.dump} has {shards:,} of its {manifest.shard_count:,} shards, and only these are read: run the"
        " command that makes it again, which goes on with the others"
    )


def summarise(dumps: Dumps, manifest: Manifest) -> DumpSummary:
    """The facts of one dump.

    Raises:
        DamageError: its manifest is gone.
    """
    shards = dumps.index.shards.filter(pc.field("dump") == manifest.dump)
    manifest_bytes = dumps.storage.size(manifest_file(manifest.dump))
    size = _sum(shards["bytes"]) + _sum(shards["record_bytes"]) + manifest_bytes
    totals = {name: Totals(_statistics(shards, KINDS[name]), size) for name in manifest.kinds}
    facts_of = {name: KINDS[name].facts(manifest, total) for name, total in totals.items()}
    return DumpSummary(
        dump=manifest.dump,
        teacher=manifest.teacher["name"],
        kinds=tuple(manifest.kinds),
        max_length=manifest.plan["max_length"],
        vocabulary_size=manifest.vocabulary_size,
        documents=_sum(shards["documents"]),
        documents_planned=manifest.derived["documents"],
        shards=len(shards),
        shards_planned=manifest.shard_count,
        skipped_rows=_sum(shards["skipped_rows"]),
        skip_reasons=_added(shards["skip_reasons"]),
        truncated=_sum(shards["truncated"]),
        counts=manifest.counts,
        chat={name: value for name, value in manifest.plan.get("chat", {}).items() if name != "template"},
        sequences=_sum(shards["sequences"]),
        # A document is a row of the corpus then, and one that was not skipped is a group.
        groups=_sum(shards["documents"]) - _sum(shards["skipped_rows"]) if manifest.has_groups else None,
        positions=_sum(shards["positions"]),
        bytes=size,
        tokens_bytes=manifest.derived["tokens"]["bytes"],
        column_bytes=_added(shards["column_bytes"]),
        statistics={f"{name}.{key}": value for name, total in totals.items() for key, value in total.statistics.items()},
        facts={f"{name}.{key}": value for name, facts in facts_of.items() for key, value in facts.items()},
        lines=[line for name, total in totals.items() for line in KINDS[name].lines(manifest, total)],
    )


DUMPS = pa.schema(
    [
        ("dump", pa.string()),
        ("teacher", pa.string()),
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
        ("bytes", pa.int64()),
        ("bytes_per_position", pa.float64()),
    ]
)


def dumps_table(dumps: Dumps) -> pa.Table:
    """The relation `dumps`: one row per dump, with DUMPS, and columns "KIND.NAME" for facts and statistics of their kinds."""
    summaries = [summarise(dumps, manifest) for manifest in dumps.manifests.values()]
    rows = [
        {**{name: getattr(summary, name) for name in DUMPS.names}, **summary.facts, **summary.statistics}
        for summary in summaries
    ]
    names = dict.fromkeys(name for summary in summaries for name in summary.facts)
    facts = {name: _type(summary.facts.get(name) for summary in summaries) for name in names}
    names = dict.fromkeys(name for summary in summaries for name in summary.statistics)
    statistics = {name: _type(summary.statistics.get(name) for summary in summaries) for name in names}
    return pa.Table.from_pylist(rows, schema=pa.schema([*DUMPS, *facts.items(), *statistics.items()]))


def _type(values: Iterable[str | float | int | None]) -> pa.DataType:
    types = {type(value) for value in values if value is not None}
    return pa.string() if str in types else pa.int64() if types == {int} else pa.float64()


def shards_table(index: Index) -> pa.Table:
    """The relation `shards`: one row per committed shard, with a column for each statistic of its kinds."""
    before = ("dump", "shard", "first_document", "documents", "sequences", "positions")
    after = ("skipped_rows", "bytes", "committed_at")
    statistics = [name for name in index.shards.column_names if name.startswith(STATISTIC)]
    table = index.shards.select([*before, *statistics, *after])
    return table.rename_columns([name.removeprefix(STATISTIC) for name in table.column_names])
