"""Kinds of knowledge: what a table of the store holds. One file or folder a kind; `kind` says what each has to declare.

Nothing outside this room knows the columns of a kind.
"""

from knowledge_store.errors import DamageError, StoreError
from knowledge_store.format.layout import COMMITS, MANIFEST_FILE, SEQUENCES
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds.columns import Arrays, joined
from knowledge_store.kinds.field import Field
from knowledge_store.kinds.kind import Codec, Kind, NoParameters, Totals
from knowledge_store.kinds.positions import POSITIONS

__all__ = ["KINDS", "Arrays", "Codec", "Field", "Kind", "NoParameters", "Totals", "check_kinds", "item_mask", "joined"]

KINDS: dict[str, Kind] = {
    "positions": POSITIONS,
}

# Names that batches and SQL have for themselves.
BATCH_NAMES = ("sequence_id", "attention_mask")
RELATIONS = (SEQUENCES, "tokens", "shards", "dumps")


def item_mask(kind: str) -> str:
    """The name of the array of a batch that says which items of a kind per item there are."""
    return f"{kind}_mask"


def check_kinds(manifest: Manifest, address: str) -> None:
    """Make sure that the kinds of a dump can be used together: each is known, its parameters can be used, and no two
    have one name for an array of a batch or for a relation.

    Args:
        manifest: of the dump.
        address: of its store, for messages.

    Raises:
        StoreError: a kind is not known, or two of them do not go together.
        DamageError: a kind's parameters cannot be used.
    """
    arrays = dict.fromkeys(BATCH_NAMES, "every batch")
    relations = dict.fromkeys((*RELATIONS, COMMITS), "every store")
    for name, record in manifest.kinds.items():
        if name not in KINDS:
            raise StoreError(
                f"dump {manifest.dump!r} of {address} holds knowledge of kind {name!r}, which this knowledge-store does not"
                " know: install the version that its commit records name under `made_by`, or import the package that adds this"
                f" kind to KINDS; `knowledge-store info {address}` lists the dumps that can be used as it is"
            )
        kind = KINDS[name]
        try:
            kind.parameters.from_record(record)
        except ValueError as error:
            raise DamageError(f"{address}/{manifest.dump}/{MANIFEST_FILE} is damaged: of {name!r}, {error}") from None
        owned = [*kind.arrays(manifest), *([item_mask(name)] if kind.per == "item" else [])]
        for taken, what, names in ((arrays, "array", owned), (relations, "relation", {name: None, **kind.relations})):
            for each in names:
                if each in taken:
                    raise StoreError(
                        f"dump {manifest.dump!r} of {address} cannot hold the kinds {taken[each]!r} and {name!r} together: both"
                        f" have {'an' if what == 'array' else 'a'} {what} named {each!r}"
                    )
                taken[each] = name
