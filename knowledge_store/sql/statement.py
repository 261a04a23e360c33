"""A statement as it is asked: with its parameters, its limits and what else goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.sql.limits import MEMORY_LIMIT, TIMEOUT
from knowledge_store.sql.named_files import NamedFiles
from knowledge_store.sql.parameters import Parameters


@dataclass(frozen=True)
class Statement:
    """One SELECT statement, from anybody.

    Attributes:
        sql: itself.
        memory_limit: in bytes, for all that it needs, its answer and its text included.
        timeout: in seconds.
        parameters: of it (see `query.Query`): numbers, texts, truth values, None, and lists and dicts of them.
        files: Parquet files that it may read as relations, by their names.
        kept: whether the caller keeps the answer in memory, which the memory limit then holds for too.
    """

    sql: str
    memory_limit: float = MEMORY_LIMIT
    timeout: float = TIMEOUT
    parameters: Parameters | None = None
    files: NamedFiles | None = None
    kept: bool = False
