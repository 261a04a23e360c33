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

# Names that are not free, and the one kind that may have them: batches, and the training that takes them, have arrays of their
# own; SQL has relations, and the folder of a dump `commits`, which would be that of a kind.
RESERVED: dict[str, dict[str, str | None]] = {
    "array": {
        **dict.fromkeys(("sequence_id", "attention_mask", "labels")),
        **dict.fromkeys(("input_ids", "is_target"), POSITIONS.name),
    },
    "relation": dict.fromkeys((SEQUENCES, "tokens", "shards", "dumps", COMMITS)),
}


def item_mask(kind: str) -> str:
    """The name of the array of a batch that says which items of a kind per item there are."""
    return f"{kind}_mask"


def check_kinds(manifest: Manifest, address: str) -> None:
    """Make sure that the kinds of a dump can be used together: each is known, its parameters can be used, and no two
    have one name for an array of a batch or for a relation, or one that is reserved.

    Args:
        manifest: of the dump.
        address: of its store, for messages.

    Raises:
        StoreError: a kind is not known, has a reserved name, or two of them do not go together.
        DamageError: a kind's parameters cannot be used.
    """
    owners: dict[tuple[str, str], str] = {}
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
        masks = [item_mask(name)] if kind.per == "item" else []
        names = [("array", array) for array in (*kind.arrays(manifest), *masks)]
        names += [("relation", relation) for relation in {name: None, **kind.relations}]
        for what, taken in names:
            if (what, taken) in owners:
                raise StoreError(
                    f"dump {manifest.dump!r} of {address} cannot hold the kinds {owners[what, taken]!r} and {name!r} together:"
                    f" both have {'an' if what == 'array' else 'a'} {what} named {taken!r}"
                )
            if RESERVED[what].get(taken, name) != name:
                raise StoreError(
                    f"dump {manifest.dump!r} of {address} cannot hold the kind {name!r}: {taken!r} is reserved, and cannot name"
                    f" {'an' if what == 'array' else 'a'} {what} of this kind; choose another name"
                )
            owners[what, taken] = name
