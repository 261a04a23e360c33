"""What is taken from a teacher's predictions: one extractor for each kind of knowledge, with the options it has, and sampling.

To add a kind, write its extractor in a file of its own and add its line to `EXTRACTORS`: its options become options of
`teacher-dump run` and `estimate`. Nothing here reads a corpus or writes, and this table and the files that declare extractors
import no torch: options are checked before anything heavy is loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass

from knowledge_store.errors import InputError
from knowledge_store.kinds.kind import Parameters
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor
from teacher_dump.extraction.hidden import HIDDEN
from teacher_dump.extraction.positions import POSITIONS
from teacher_dump.extraction.saliency import SALIENCY
from teacher_dump.extraction.vectors import VECTORS
from teacher_dump.teachers.protocol import Ability, Teacher

__all__ = [
    "EXTRACTORS",
    "ExtractionBatch",
    "Extractor",
    "check_abilities",
    "check_needs",
    "kinds_with_context",
    "layers_needed",
    "likeliest_needed",
    "need_gradients",
    "option_classes",
]

EXTRACTORS: dict[str, Extractor] = {
    "positions": POSITIONS,
    "saliency": SALIENCY,
    "vectors": VECTORS,
    "hidden": HIDDEN,
}


def option_classes() -> tuple[type, ...]:
    """The options of all kinds.

    Raises:
        TypeError: the options of a kind cannot be put together with others, or two kinds have an option of one name, which
            could not be told apart in a command.
    """
    owners: dict[str, str] = {}
    for kind, extractor in EXTRACTORS.items():
        declared = extractor.options
        frozen = is_dataclass(declared) and getattr(declared, "__dataclass_params__").frozen  # noqa: B009
        if not frozen or not all(field.kw_only for field in fields(declared)):
            raise TypeError(
                f"the options of the kind {kind!r} cannot become those of a command: declare {declared.__name__} with"
                " @dataclass(frozen=True, kw_only=True)"
            )
        for field in fields(extractor.options):
            if owners.setdefault(field.name, kind) != kind:
                raise TypeError(f"the kinds {owners[field.name]!r} and {kind!r} both have an option {field.name!r}")
    return tuple(dict.fromkeys(extractor.options for extractor in EXTRACTORS.values()))


def kinds_with_context(kinds: Iterable[str]) -> tuple[str, ...]:
    """Those of some kinds of which a sequence without a context has nothing."""
    return tuple(kind for kind in kinds if EXTRACTORS[kind].needs_context)


def need_gradients(kinds: Iterable[str]) -> bool:
    """Whether one of some kinds is made of gradients: then its teacher is asked with them."""
    return any(Ability.GRADIENTS in EXTRACTORS[kind].needs for kind in kinds)


def layers_needed(parameters: Mapping[str, Parameters]) -> tuple[int, ...]:
    """The layers whose hidden states some kinds take, by the parameters of each, in order and each once."""
    return tuple(sorted({layer for kind, kept in parameters.items() for layer in EXTRACTORS[kind].layers(kept)}))


def likeliest_needed(parameters: Mapping[str, Parameters]) -> int:
    """How many of the likeliest tokens some kinds take, by the parameters of each, of a teacher that gives nothing more."""
    return max((EXTRACTORS[kind].likeliest(kept) for kind, kept in parameters.items()), default=0)


def check_abilities(kinds: Iterable[str], abilities: frozenset[Ability], teacher: str) -> None:
    """Make sure that some abilities are enough for some kinds of knowledge.

    Raises:
        InputError: naming the kind, what it needs, and the teacher, which is called so.
    """
    for kind in kinds:
        if missing := sorted(EXTRACTORS[kind].needs - abilities):
            raise InputError(
                f"knowledge of kind {kind!r} needs {' and '.join(missing)}, which {teacher} cannot give: use another teacher,"
                " or leave this kind out"
            )


def check_needs(kinds: tuple[str, ...], teacher: Teacher) -> None:
    """Make sure that a teacher can give what some kinds of knowledge need.

    Raises:
        InputError: naming the kind, what it needs, and the teacher; or its gradients are not those of its answers.
    """
    check_abilities(kinds, teacher.abilities, f"the teacher {teacher.description['name']!r}")
    if need_gradients(kinds):
        teacher.check_gradients()
