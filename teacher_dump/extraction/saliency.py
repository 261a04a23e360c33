"""Knowledge of kind `saliency`: its options, the parameters that they stand for, and its extractor. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.kinds import Arrays
from knowledge_store.kinds.saliency import METHODS, SUBJECTS, SaliencyParameters
from knowledge_store.options import option
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor
from teacher_dump.teachers.protocol import Ability


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions:
    """What the saliency of a context token is."""

    saliency_method: str = option(
        METHODS[0],
        choices=METHODS,
        help="Saliency of a token: the norm of the gradient at its embedding (gradient-norm), or how large the product of both"
        " is (input-x-gradient).",
    )
    saliency_of: str = option(
        SUBJECTS[0],
        choices=SUBJECTS,
        help="What the tokens are salient for: the targets that stand there (gold), or the teacher's own likeliest tokens"
        " (teacher).",
    )


def saliency_parameters(options: SaliencyOptions) -> SaliencyParameters:
    """What the options stand for."""
    return SaliencyParameters(options.saliency_method, options.saliency_of)


def extract(batch: ExtractionBatch) -> list[Arrays]:
    """See `attribution.extract_saliency`."""
    from teacher_dump.extraction.attribution import extract_saliency

    return extract_saliency(batch)


SALIENCY = Extractor(
    needs=frozenset({Ability.GRADIENTS}),
    function=extract,
    needs_context=True,
    options=SaliencyOptions,
    parameters=saliency_parameters,
    option_names={"method": "--saliency-method", "of": "--saliency-of"},
)
