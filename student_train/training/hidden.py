"""Which hidden states of a dump a run learns from, and whether a student can have them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from knowledge_store.kinds.hidden import hidden_of
from knowledge_store.kinds.vectors import teacher_width
from student_train.training.configuration import HiddenStates
from student_train.training.mixture import Mixture

KIND = "hidden"


def check_hidden(
    store: KnowledgeStore, mixture: Mixture, hidden: HiddenStates, *, layers: int | None, width: int | None
) -> tuple[tuple[int, ...], int]:
    """Refuse dumps without hidden states, or a student that cannot have them.

    Args:
        store, mixture: what is learnt from.
        hidden: how.
        layers, width: how many layers the student has, and values a state of it; None where that is not known yet.

    Returns:
        the student's layers, one for each of the dump's, and the teacher's width.

    Raises:
        InputError: naming the dump, or the option.
    """
    if mixture.teachers:
        raise InputError("--hidden-weight: hidden states are those of one teacher: use --dump instead of --teachers")
    manifests = [store.manifest(dump) for dump in mixture.dumps]
    first, *others = map(_kept, manifests)
    if any(other != first for other in others):
        names = f"{', '.join(mixture.dumps[:-1])} and {mixture.dumps[-1]}"
        raise InputError(f"{names} keep hidden states of other layers or widths: train on one of them")
    dump, (kept, teacher) = mixture.dumps[0], first
    chosen = kept if hidden.layers is None else hidden.layers
    if len(chosen) != len(kept):
        raise InputError(
            f"--hidden-layers names {_words(chosen)}, and the dump {dump} keeps states of {_words(kept)}: name one of the"
            " student's layers for each of these"
        )
    for layer in chosen:
        # The layers' count itself is the state before the last norm, which models do not give.
        if layers is not None and not -layers - 1 <= layer < layers:
            named = f"--hidden-layers {layer}" if hidden.layers else f"layer {layer}, of which the dump {dump} keeps states,"
            raise InputError(
                f"{named} is not one of the student's, which has {layers}: give --hidden-layers, with 0 (the embeddings) to"
                f" {layers - 1}, or -1 (the last) to -{layers + 1}"
            )
    if width is not None and width != teacher and not hidden.projector:
        raise InputError(
            f"the student's hidden states have {width:,} values, and those of the dump {dump} {teacher:,}: give"
            " --hidden-projector, which learns a linear map from these to those"
        )
    return chosen, teacher


def _kept(manifest: Manifest) -> tuple[tuple[int, ...], int]:
    """The layers and the width of a dump's hidden states (InputError: it has none, or does not say)."""
    layers, width = hidden_of(manifest).layers, teacher_width(manifest)
    if width is None:
        raise InputError(f"the dump {manifest.dump} does not say how wide its teacher's hidden states are: dump them anew")
    return layers, width


def _words(layers: Sequence[int]) -> str:
    return f"{len(layers)} ({', '.join(map(str, layers))})"
