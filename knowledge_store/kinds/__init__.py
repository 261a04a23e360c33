"""Kinds of knowledge: what a table of the store holds. One file a kind; `kind` says what each has to declare.

Nothing outside this room knows the columns of a kind.
"""

from knowledge_store.errors import DamageError, StoreError
from knowledge_store.format.layout import MANIFEST_FILE
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds.kind import Arrays, Kind
from knowledge_store.kinds.positions import POSITIONS

__all__ = ["KINDS", "Arrays", "Kind", "check_kinds"]

KINDS: dict[str, Kind] = {
    "positions": POSITIONS,
}


def check_kinds(manifest: Manifest, address: str) -> None:
    """Make sure that the kinds of a dump are known, and that their parameters can be used.

    Args:
        manifest: of the dump.
        address: of its store, for messages.

    Raises:
        StoreError: a kind is unknown here.
        DamageError: its parameters are none.
    """
    for name, record in manifest.kinds.items():
        if name not in KINDS:
            raise StoreError(f"dump {manifest.dump!r} of {address} holds knowledge of kind {name!r}, unknown here")
        try:
            KINDS[name].parameters.from_record(record)
        except ValueError as error:
            raise DamageError(f"{address}/{manifest.dump}/{MANIFEST_FILE} is damaged: of {name!r}, {error}") from None
