"""Bytes on disk for each position of a dump: every file of the store but the index, and each column.

python benchmarks/size.py STORE --dump NAME
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measurement import keep

from knowledge_store import KnowledgeStore
from knowledge_store.layout import INDEX_FILE, TOKENS_FILE


def main() -> None:
    """Add up the files of a store with one dump."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--dump")
    options = parser.parse_args()
    store = KnowledgeStore.open(options.store)
    name = store.dump(options.dump)
    summary = next(each for each in store.info() if each.dump == name)
    files = [path for path in options.store.rglob("*") if path.is_file() and path.name != INDEX_FILE]
    if len(store.dumps) > 1:
        files = [path for path in files if name in path.parts]
    vocabulary = sum(path.stat().st_size for path in files if path.name == TOKENS_FILE)
    total = sum(path.stat().st_size for path in files)
    keep(
        f"size-{name}",
        {
            "teacher": summary.teacher.rsplit("/", 1)[-1],
            "selection": summary.selection,
            "quantisation_step": summary.quantisation_step,
            "vocabulary_size": summary.vocabulary_size,
            "positions": summary.positions,
            "mean_top_k_mass": round(summary.mean_top_k_mass or 0, 4),
            "mean_nll": round(summary.mean_nll or 0, 4),
            "bytes": total,
            "bytes_per_position": round(total / summary.positions, 3),
            "bytes_per_position_without_vocabulary": round((total - vocabulary) / summary.positions, 3),
            "vocabulary_bytes": vocabulary,
            "dense_bytes": summary.dense_bytes,
            "ratio": round(summary.dense_bytes / total),
            "column_bytes_per_position": {
                column: round(size / summary.positions, 3)
                for column, size in sorted(summary.column_bytes.items(), key=lambda item: -item[1])
            },
        },
    )


if __name__ == "__main__":
    main()
