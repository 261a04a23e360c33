"""Where the tokens of a dump's sequences stand: in one of its own kinds of knowledge, or in another dump of the same corpus."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.reading.teachers import corpus_change

COLUMNS = {"token_id", "is_target"}


class TokenSource(NamedTuple):
    """Where they stand.

    Attributes:
        dump, kind: whose rows have them.
        ids: of that dump's sequences, int64, by ordinal.
    """

    dump: str
    kind: str
    ids: np.ndarray

    def rows(self, store: KnowledgeStore, sequence_id: int) -> pa.Table:
        """The rows of a sequence, with COLUMNS (DamageError: they are not what was published)."""
        [ordinal] = np.flatnonzero(self.ids == sequence_id)
        return store.stored(int(ordinal), self.kind, self.dump)[0]


def find_tokens(store: KnowledgeStore, manifest: Manifest) -> TokenSource | None:
    """Where the tokens of all of a dump's sequences stand; None where no dump of the store has them."""
    wanted = _ids(store, manifest.dump)
    for dump in (manifest.dump, *store.dumps):
        other = store.manifest(dump)
        kind = next((kind for kind in other.kinds if set(KINDS[kind].schema(other).names) >= COLUMNS), None)
        if kind is not None and corpus_change(manifest, other) is None:
            ids = _ids(store, dump)
            if np.isin(wanted, ids).all():
                return TokenSource(dump, kind, ids)
    return None


def _ids(store: KnowledgeStore, dump: str) -> np.ndarray:
    return store.sequences(dump, ["sequence_id"])["sequence_id"].to_numpy()
