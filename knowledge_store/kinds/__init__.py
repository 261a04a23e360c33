"""Kinds of knowledge: what a table of the store holds. One file or folder a kind; `kind` says what each has to declare.

Nothing outside this room knows the columns of a kind.
"""

from knowledge_store.errors import DamageError, StoreError
from knowledge_store.format.layout import COMMITS, MANIFEST_FILE, SEQUENCES
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds.columns import Arrays, joined
from knowledge_store.kinds.field import KEYS, Field
from knowledge_store.kinds.hidden import HIDDEN
from knowledge_store.kinds.kind import Codec, Kind, NoParameters, Totals
from knowledge_store.kinds.positions import POSITIONS
from knowledge_store.kinds.saliency import SALIENCY
from knowledge_store.kinds.vectors import VECTORS

__all__ = ["KINDS", "Arrays", "Codec", "Field", "Kind", "NoParameters", "Totals", "check_kinds", "item_mask", "joined"]

KINDS: dict[str, Kind] = {
    "positions": POSITIONS,
    "saliency": SALIENCY,
    "vectors": VECTORS,
    "hidden": HIDDEN,
}

# Names that are not free, and the one kind that may have them: batches, and the training that takes them, have arrays of their
# own; tables have keys, to which relations add the dump; SQL has relations, and the folder of a dump `commits`, which would be
# that of a kind.
RESERVED: dict[str, dict[str, str | None]] = {
    "column": dict.fromkeys(("dump", *(key.name for keys in KEYS.values() for key in keys))),
    "array": {
        **dict.fromkeys(("sequence_id", "attention_mask", "labels", "dump", "teacher_weights")),
        **dict.fromkeys(("input_ids", "is_target"), POSITIONS.name),
    },
    "array of groups": dict.fromkeys(("group", "score")),  # of a dump that has them
    "relation": dict.fromkeys((SEQUENCES, "tokens", "shards", "dumps", COMMITS)),
}


def item_mask(kind: str) -> str:
    """The name of the array of a batch that says which items of a kind per item there are."""
    return f"{kind}_mask"


def check_kinds(manifest: Manifest, address: str) -> None:
    """Make sure that the kinds of a dump can be used together: each is known, its parameters can be used, and no two
    have one name for an array of a batch or for a relation, none has one for two columns, and no name is reserved; of any case.

    Args:
        manifest: of the dump.
        address: of its store, for messages.

    Raises:
        StoreError: a kind is not known, has a reserved name or one name twice, or two of them do not go together.
        DamageError: a kind's parameters cannot be used.
    """
    where = f"dump {manifest.dump!r} of {address}"
    owners: dict[tuple[str, str], tuple[str, str]] = {}
    for name, record in manifest.kinds.items():
        if name not in KINDS:
            raise StoreError(
                f"{where} holds knowledge of kind {name!r}, which this knowledge-store does not know: install the version that"
                " its commit records name under `made_by`; or, where a package adds the kind to KINDS, use the store in a"
                " program that imports it, since commands and isolated processes know built-in kinds alone;"
                f" `knowledge-store info {address}` lists the dumps that can be used as it is"
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
            _check_free(what, taken, name, owners, where, manifest.has_groups)
        for schema in (kind.schema(manifest), kind.stored_schema(manifest)):
            columns: dict[tuple[str, str], tuple[str, str]] = {}
            for column in schema.names[len(KEYS[kind.per]) :]:
                _check_free("column", column, name, columns, where)


def _check_free(
    what: str, taken: str, kind: str, owners: dict[tuple[str, str], tuple[str, str]], where: str, groups: bool = False
) -> None:
    """Give a kind a name, unless it is reserved, also by `groups`, or given (StoreError), in whatever case: SQL tells no two
    cases apart."""
    article = "an" if what == "array" else "a"
    key = (what, taken.lower())
    if key in owners:
        owner, spelled = owners[key]
        names = repr(taken) if spelled == taken else f"{spelled!r} and {taken!r}, which SQL does not tell apart"
        if owner == kind:
            raise StoreError(f"{where} cannot hold the kind {kind!r}: two of its {what}s are named {names}; choose other names")
        raise StoreError(
            f"{where} cannot hold the kinds {owner!r} and {kind!r} together: both have {article} {what} named {names}"
        )
    reserved = RESERVED[what] | (RESERVED["array of groups"] if groups and what == "array" else {})
    if reserved.get(key[1], kind) != kind:
        raise StoreError(
            f"{where} cannot hold the kind {kind!r}: {taken!r} is reserved, and cannot name {article} {what} of this kind;"
            " choose another name"
        )
    owners[key] = (kind, taken)
