"""What is taken from a teacher's predictions: one file for each kind of knowledge, and sampling.

To add a kind, write its extractor in a file of its own and add its line to `EXTRACTORS`. Nothing here reads a corpus or writes.
"""

from knowledge_store.errors import InputError
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor
from teacher_dump.extraction.positions import POSITIONS
from teacher_dump.teachers.protocol import Teacher

__all__ = ["EXTRACTORS", "ExtractionBatch", "Extractor", "check_needs"]

EXTRACTORS: dict[str, Extractor] = {
    "positions": POSITIONS,
}


def check_needs(kinds: tuple[str, ...], teacher: Teacher) -> None:
    """Make sure that a teacher can give what some kinds of knowledge need.

    Raises:
        InputError: naming the kind, what it needs, and the teacher.
    """
    for kind in kinds:
        if kind not in EXTRACTORS:
            raise InputError(f"no extractor is known for knowledge of kind {kind!r}")
        missing = sorted(EXTRACTORS[kind].needs - teacher.abilities)
        if missing:
            raise InputError(
                f"knowledge of kind {kind!r} needs {' and '.join(missing)}, which the teacher {teacher.description['name']!r}"
                " cannot give: use another teacher, or leave this kind out"
            )
