"""Knowledge of kind `vectors`: its options, the parameters that they stand for, and its extractor. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knowledge_store.kinds import Arrays
from knowledge_store.kinds.vectors import POOLED, POOLINGS, VectorsParameters
from knowledge_store.options import option
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor
from teacher_dump.extraction.layers import check_layers
from teacher_dump.teachers.protocol import Ability


@dataclass(frozen=True, kw_only=True)
class VectorsOptions:
    """What a sequence's vector is made of."""

    vectors_layer: int = option(
        -1,
        metavar="LAYER",
        help="Layer whose hidden states become vectors: 0 are the embeddings, 1 the first, -1 the last, after the norm.",
    )
    vectors_pooling: str = option(
        POOLINGS[0], choices=POOLINGS, help="A sequence's vector: the mean of the hidden states, or the last one."
    )
    vectors_over: str = option(
        POOLED[0],
        choices=POOLED,
        help="Whose hidden states it is made of: those of the targets, or of all tokens but the first.",
    )


def vectors_parameters(options: VectorsOptions) -> VectorsParameters:
    """What the options stand for."""
    return VectorsParameters(options.vectors_layer, options.vectors_pooling, options.vectors_over)


def check_vectors(options: VectorsOptions, teacher: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> None:
    """Make sure that a teacher has the layer (InputError: it has not)."""
    check_layers("--vectors-layer", [options.vectors_layer], teacher)


def extract(batch: ExtractionBatch) -> list[Arrays]:
    """See `states.extract_vectors`."""
    from teacher_dump.extraction.states import extract_vectors

    return extract_vectors(batch)


VECTORS = Extractor(
    needs=frozenset({Ability.HIDDEN_STATES}),
    function=extract,
    layers=lambda parameters: (parameters.layer,),
    options=VectorsOptions,
    parameters=vectors_parameters,
    check=check_vectors,
    option_names={"layer": "--vectors-layer", "pooling": "--vectors-pooling", "over": "--vectors-over"},
)
