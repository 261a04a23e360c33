"""Knowledge of kind `hidden`: its options, the parameters that they stand for, and its extractor. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.hidden import PLACES, PRECISIONS, HiddenParameters
from knowledge_store.options import option
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor
from teacher_dump.extraction.layers import check_layers
from teacher_dump.teachers.protocol import Ability


@dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """Which hidden states are kept."""

    hidden_layers: str = option(
        "-1",
        metavar="LAYER,...",
        help="Layers whose hidden states are kept, side by side: 0 are the embeddings, 1 the first, -1 the last after the"
        " norm.",
    )
    hidden_where: str = option(
        PLACES[0],
        choices=PLACES,
        help="Where hidden states are kept: at the positions that targets are predicted from (targets), or at all.",
    )
    hidden_every: int = option(1, min=1, metavar="N", help="Of these positions, keep every N-th of a sequence.")
    hidden_precision: str = option(
        PRECISIONS[0], choices=PRECISIONS, help="Numbers of hidden states: 8 bits with a scale for each 64 (int8), or 16 bits."
    )

    def __post_init__(self) -> None:
        layers = self.layers
        if repeated := {layer for layer in layers if layers.count(layer) > 1}:
            raise InputError(f"layer {min(repeated)} is named twice in --hidden-layers")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, as numbers (InputError: they are none)."""
        try:
            return tuple(int(word) for word in self.hidden_layers.split(","))
        except ValueError:
            raise InputError(
                f"--hidden-layers {self.hidden_layers!r} is no list of layers: give numbers with commas, such as 8,16,-1"
            ) from None


def hidden_parameters(options: HiddenOptions) -> HiddenParameters:
    """What the options stand for."""
    return HiddenParameters(options.layers, options.hidden_where, options.hidden_every, options.hidden_precision)


def check_hidden(options: HiddenOptions, teacher: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> None:
    """Make sure that a teacher has the layers (InputError: it has not)."""
    check_layers("--hidden-layers", options.layers, teacher)


def hidden_bytes(parameters: HiddenParameters, teacher: Mapping[str, Any], counts: CorpusCounts) -> int | None:
    """What the hidden states take before they are compressed; None where the teacher's width is not known."""
    positions = counts.targets if parameters.where == PLACES[0] else counts.positions
    width = teacher.get("hidden_size")
    return None if width is None else positions // parameters.every * parameters.state_bytes(width)


def extract(batch: ExtractionBatch) -> list[Arrays]:
    """See `states.extract_hidden`."""
    from teacher_dump.extraction.states import extract_hidden

    return extract_hidden(batch)


HIDDEN = Extractor(
    needs=frozenset({Ability.HIDDEN_STATES}),
    function=extract,
    layers=lambda parameters: tuple(parameters.layers),
    options=HiddenOptions,
    parameters=hidden_parameters,
    check=check_hidden,
    bytes=hidden_bytes,
    option_names={
        "layers": "--hidden-layers",
        "where": "--hidden-where",
        "every": "--hidden-every",
        "precision": "--hidden-precision",
    },
)
