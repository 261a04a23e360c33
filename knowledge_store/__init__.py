"""An offline store for a teacher's knowledge: plain Parquet shards, an index, SQL, checks, and batches for training.

Knows numpy, pyarrow and duckdb; never imports torch or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowledge_store.calibration.file import Calibration, read_calibration, write_calibration
    from knowledge_store.catalogue.summary import DumpSummary
    from knowledge_store.choice.sequences import ChosenSequences
    from knowledge_store.choice.targets import ChosenTargets
    from knowledge_store.errors import (
        DamageError,
        InputError,
        KnowledgeStoreError,
        MismatchError,
        QueryError,
        QueryLimitError,
        StoreError,
    )
    from knowledge_store.format.manifest import Manifest
    from knowledge_store.format.sequences import sequence_id, token_hash, tokens_table
    from knowledge_store.kinds import KINDS, Field, Kind
    from knowledge_store.reading.batches import Batches
    from knowledge_store.store import KnowledgeStore
    from knowledge_store.writing.shard import Shard
    from knowledge_store.writing.verification import Verification, verify
    from knowledge_store.writing.writer import DumpWriter

# Where each name is. It is loaded when it is first asked for: the command need not wait for libraries that its child loads.
_MODULES = {
    "calibration.file": ("Calibration", "read_calibration", "write_calibration"),
    "catalogue.summary": ("DumpSummary",),
    "choice.sequences": ("ChosenSequences",),
    "choice.targets": ("ChosenTargets",),
    "errors": (
        *("DamageError", "InputError", "KnowledgeStoreError", "MismatchError", "QueryError", "QueryLimitError", "StoreError"),
    ),
    "format.manifest": ("Manifest",),
    "format.sequences": ("sequence_id", "token_hash", "tokens_table"),
    "kinds": ("KINDS", "Field", "Kind"),
    "reading.batches": ("Batches",),
    "store": ("KnowledgeStore",),
    "writing.verification": ("Verification", "verify"),
    "writing.shard": ("Shard",),
    "writing.writer": ("DumpWriter",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KINDS",
    "Batches",
    "Calibration",
    "ChosenSequences",
    "ChosenTargets",
    "DamageError",
    "DumpSummary",
    "DumpWriter",
    "Field",
    "InputError",
    "Kind",
    "KnowledgeStore",
    "KnowledgeStoreError",
    "Manifest",
    "MismatchError",
    "QueryError",
    "QueryLimitError",
    "Shard",
    "StoreError",
    "Verification",
    "read_calibration",
    "sequence_id",
    "token_hash",
    "tokens_table",
    "verify",
    "write_calibration",
]
