"""An offline store for a teacher's knowledge: plain Parquet shards, an index, SQL, checks, and batches for training.

Knows numpy, pyarrow and duckdb; never imports torch or transformers.
"""

from knowledge_store.batches import Batches
from knowledge_store.calibration import Calibration, read_calibration, write_calibration
from knowledge_store.errors import (
    DamageError,
    InputError,
    KnowledgeStoreError,
    MismatchError,
    QueryError,
    StoreError,
)
from knowledge_store.kinds import KINDS, Kind
from knowledge_store.manifest import Manifest
from knowledge_store.store import KnowledgeStore
from knowledge_store.summary import DumpSummary
from knowledge_store.verification import Verification, verify
from knowledge_store.writer import DumpWriter

__all__ = [
    "KINDS",
    "Batches",
    "Calibration",
    "DamageError",
    "DumpSummary",
    "DumpWriter",
    "InputError",
    "Kind",
    "KnowledgeStore",
    "KnowledgeStoreError",
    "Manifest",
    "MismatchError",
    "QueryError",
    "StoreError",
    "Verification",
    "read_calibration",
    "verify",
    "write_calibration",
]
