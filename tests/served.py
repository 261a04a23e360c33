"""Stores that are served, in this process: for tests of clients and servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store import KnowledgeStore
from knowledge_store.serving.served import ServedStore
from knowledge_store.serving.server import Limits, StoreServer
from knowledge_store.storage.served.tokens import TokenFile

TOKEN = "0123456789abcdef-the-first"
OTHER_TOKEN = "0123456789abcdef-the-second"


@dataclass
class Served:
    """A server.

    Attributes:
        server: itself.
        tokens: what it knows, in their file.
        token_file: the file.
        log: the calls that have ended.
    """

    server: StoreServer
    tokens: TokenFile
    token_file: Path
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it is."""
        return f"grpc://127.0.0.1:{self.server.port}"

    def open(self, store: str = "") -> KnowledgeStore:
        """One of its stores, by the name of several."""
        return KnowledgeStore.open(f"{self.address}/{store}", token_file=self.token_file)

    def counted(self, name: str) -> float:
        """One of its metrics, with its labels if it has some."""
        lines = self.server.metrics.text().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"knowledge_store_{name} "))

    def calls(self, what: str) -> list[dict[str, Any]]:
        """The calls of a sort that have ended."""
        return [facts for facts in self.log if facts["call"] == what]


@contextmanager
def served(*stores: Path, port: int = 0, cache_size: int = 10**9, **limits: Any) -> Iterator[Served]:
    """Serve stores while this context lasts.

    Args:
        stores: their folders.
        port: where.
        cache_size: of decoded sequences.
        limits: fields of `Limits`.
    """
    token_file = stores[0].parent / "tokens"
    if not token_file.exists():
        token_file.write_text(f"# who may read\nfirst {TOKEN}\n\nsecond {OTHER_TOKEN}\n")
    tokens, log = TokenFile(token_file), []
    chosen = Limits(**{"streams": 4, "queries": 2, "memory_limit": 2**30, "timeout": 1000.0, **limits})
    of_names = {store.name: ServedStore(store, cache_size) for store in stores}
    server = StoreServer(f"grpc://127.0.0.1:{port}", of_names, tokens, chosen, log.append)
    try:
        yield Served(server, tokens, token_file, log)
    finally:
        server.close()


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two batches or sequences have the same arrays, bit for bit."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if not isinstance(array, np.ndarray | np.generic):
            assert found[name] == array, name
            continue
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
