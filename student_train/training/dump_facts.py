"""The facts of a dump that runs and evaluations keep beside their results, for the report. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.catalogue.summary import DumpSummary
from knowledge_store.kinds.field import KEYS


def describe_dump(store: KnowledgeStore, dump: str, columns: Mapping[str, Collection[str]] | None = None) -> dict[str, Any]:
    """The facts of a dump, whatever its kinds.

    Args:
        store: an open store.
        dump: which dump.
        columns: those that are read, by kind of knowledge; None for all.

    Returns:
        name, store, teacher, vocabulary_size; sequences, positions (all their tokens), targets; `kinds`, what each states of
        itself by its name, and `lines`, what each tells a person, [label, value]; `bytes` of everything but the vocabulary, and
        `bytes_read`, which leaves out the columns that are not read.
    """
    manifest = store.manifest(dump)
    summary = next(summary for summary in store.info() if summary.dump == dump)
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in manifest.kinds}
    for name, fact in summary.facts.items():
        kind, _, label = name.partition(".")
        kinds[kind][label] = fact
    return {
        "name": dump,
        "store": store.address,
        "teacher": summary.teacher,
        "vocabulary_size": summary.vocabulary_size,
        "kinds": kinds,
        "lines": [list(line) for line in summary.lines],
        "sequences": summary.sequences,
        "positions": summary.positions,
        "targets": int(store.sequences(dump)["targets"].to_numpy().sum()),
        "bytes": summary.bytes,
        "bytes_read": summary.bytes - (0 if columns is None else _bytes_left_out(summary, manifest, columns)),
    }


def _bytes_left_out(summary: DumpSummary, manifest: Manifest, columns: Mapping[str, Collection[str]]) -> int:
    """The bytes of the stored columns from which none of the columns that are read is made."""
    left_out = 0
    for name in manifest.kinds:
        kind = KINDS[name]
        stored = set(kind.stored_schema(manifest).names)
        if name in columns:
            keys = [key.name for key in KEYS[kind.per]]
            stored -= kind.stored_columns({*keys, *columns[name]}, manifest)
        left_out += sum(summary.column_bytes.get(f"{name}.{column}", 0) for column in stored)
    return left_out
