"""What is known of a model at each position that it was judged at: percentiles, and a file with a row for each. In numpy.

The file is Parquet, and its columns `dump`, `sequence_id`, `position` and `token_id` are those of the store's relation
`positions`, so that SQL joins the two and finds where a model is worst.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from knowledge_store.storage.local import publish
from student_train.evaluation.bootstrap import bootstrap_interval

PERCENTILES = {"kl_median": 50.0, "kl_90": 90.0, "kl_99": 99.0, "kl_99_9": 99.9, "kl_max": 100.0}
# The columns of the file, from `columns`; those that a dump cannot give are left out.
TYPES = {
    "sequence_id": pa.int64(),
    "position": pa.int32(),
    "token_id": pa.uint32(),
    "logprob": pa.float32(),
    "kl": pa.float32(),
    "kl_lower_bound": pa.float32(),
    "likeliest_id": pa.uint32(),
    "confidence": pa.float32(),
    "agrees": pa.bool_(),
}
COMPRESSION = "zstd"


def kl_percentiles(kl: np.ndarray) -> dict[str, float]:
    """Percentiles of the divergence (N,) nats over positions, by the names of PERCENTILES; linear between two positions."""
    values = np.percentile(kl.astype(np.float64), list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, values.tolist(), strict=True))


def perplexity_change(nll: np.ndarray, teacher_nll: np.ndarray, groups: np.ndarray) -> tuple[float, tuple[float, float]]:
    """By which share the perplexity of a text is above the teacher's, exp(mean of nll − mean of teacher_nll) − 1.

    Args:
        nll, teacher_nll: (N,) nats.
        groups: (N,) what is drawn whole in the bootstrap.

    Returns:
        the share, and its 95% bootstrap interval: both models are resampled alike. NaN twice for too few groups.
    """
    differences = nll.astype(np.float64) - teacher_nll.astype(np.float64)
    low, high = bootstrap_interval(differences, groups=groups)
    return math.expm1(differences.mean()), (math.expm1(low), math.expm1(high))


def write_positions(path: Path, dump: str, columns: Mapping[str, np.ndarray | None]) -> None:
    """Write a new file of positions, by sequence and position; an existing one is never replaced.

    Args:
        path: of the file.
        dump: the name of the dump, which becomes a column.
        columns: by the names of TYPES, (N,) each; None for what the dump cannot give.

    Raises:
        InputError: the file is there already. StoreError: the disk refuses it.
    """
    known = {name: values for name, values in columns.items() if values is not None}
    order = np.lexsort((known["position"], known["sequence_id"]))
    arrays: dict[str, Any] = {"dump": pa.array([dump] * len(order)).dictionary_encode()}
    for name, kept in TYPES.items():
        if name in known:
            arrays[name] = pa.array(known[name][order]).cast(kept)
    table = pa.table(arrays)
    if not publish(path, lambda file: pq.write_table(table, file, compression=COMPRESSION)):
        raise InputError(f"--keep-positions {path} exists already: name another file, or remove it")
