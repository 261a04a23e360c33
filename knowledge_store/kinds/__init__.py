"""Kinds of knowledge: what a table of the store holds.

To add one: write its file beside `positions.py`, and its line in `KINDS`. Writer, reader, index, verify and SQL work from the
fields of `Kind` alone. `teacher_dump.extraction.EXTRACTORS` and `student_train.losses.LOSSES` have its other two lines.
"""

from knowledge_store.kinds.kind import Arrays, Kind
from knowledge_store.kinds.positions import POSITIONS

__all__ = ["KINDS", "Arrays", "Kind"]

KINDS: dict[str, Kind] = {
    "positions": POSITIONS,
}
