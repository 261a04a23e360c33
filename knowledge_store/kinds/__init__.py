"""Kinds of knowledge: what a table of the store holds. One file a kind; `kind` says what each has to declare.

Nothing outside this room knows the columns of a kind.
"""

from knowledge_store.kinds.kind import Arrays, Kind
from knowledge_store.kinds.positions import POSITIONS

__all__ = ["KINDS", "Arrays", "Kind"]

KINDS: dict[str, Kind] = {
    "positions": POSITIONS,
}
