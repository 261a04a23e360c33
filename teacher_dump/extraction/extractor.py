"""What an extractor is: it gets one batch and gives, for each of its sequences, the arrays of its kind of knowledge.

No torch here: what imports it does so when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.kind import Parameters
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.teachers.protocol import Ability, Prediction

Total = tuple[float, int]  # a sum, and over how many


@dataclass(frozen=True)
class ExtractionBatch:
    """What an extractor is given.

    Attributes:
        sequences: the B sequences of the batch.
        prediction: the teacher's, for token ids padded on the right.
        parameters: of the extractor's kind, as its dump's manifest has them (see `Kind.parameters`).
        kinds: all that the dump holds.
    """

    sequences: list[TokenSequence]
    prediction: Prediction
    parameters: Any
    kinds: tuple[str, ...] = ()

    @property
    def attention_mask(self) -> np.ndarray:
        """Which positions are tokens of a sequence, not padding on the right: bool (B, T)."""
        lengths = np.array([len(sequence.token_ids) for sequence in self.sequences])
        return np.arange(lengths.max(initial=0)) < lengths[:, None]


@dataclass(frozen=True)
class NoOptions:
    """For kinds of which there is one sort."""


def no_limits(options: Any, teacher: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> None:
    """For kinds whose options fit any teacher."""


def no_layers(parameters: Any) -> tuple[int, ...]:
    """For kinds that take no hidden states."""
    return ()


def unchanged(options: Any) -> Any:
    """For kinds that take of any teacher the same."""
    return options


def no_likeliest(parameters: Any) -> int:
    """For kinds that take no likeliest tokens, or find them in whole distributions."""
    return 0


def unknown_bytes(parameters: Any, teacher: Mapping[str, Any], counts: CorpusCounts) -> int | None:
    """For kinds whose size is known by a sample alone."""
    return None


@dataclass(frozen=True)
class Extractor:
    """How one kind of knowledge is taken from a teacher's predictions.

    Attributes:
        needs: what the teacher must be able to give.
        function: the arrays of each sequence of a batch; for a kind per sequence they have one entry.
        layers: whose hidden states it takes, given the parameters (see `Prediction.layer_states`).
        likeliest: how many of the likeliest tokens it takes of a teacher without whole distributions, given the parameters.
        of_likeliest: the options as they are for a teacher without whole distributions; raises InputError where they ask for
            what it cannot give. What is given by default alone is left out.
        needs_context: whether nothing can be taken of a sequence that has no context before its targets, such as plain text.
        options: a frozen dataclass whose fields, by keyword alone and with defaults, are the kind's options in commands and
            configurations; what does not fit together it refuses when it is made. No two kinds have an option of one name.
        parameters: of the kind, from its options; None for a kind without parameters.
        check: raises InputError where options do not fit a teacher, given what is known of it (see `Teacher.description`;
            before it is loaded perhaps `vocabulary_size` and `max_positions` alone) and of its tokenizer (None before).
        bytes: what a dump of the kind takes, before it is compressed, given its parameters, what is known of the teacher, and
            what became of the corpus; None where that is not known beforehand.
        option_names: what people call a parameter, by its dotted name in the kind's record: the option that it comes from.
        absent_values: what a parameter is where the record leaves it out.
        figures: by name, a sum over what was extracted of some sequences and over how many values it is: means that are shown
            while a dump is made.
        sample_figures: the same for `estimate`, from a batch of its sample.
        comparisons: by name, another way to keep the same knowledge, and the fact of the kind (see `Kind.facts`) that says how
            many bytes that takes.
    """

    needs: frozenset[Ability]
    function: Callable[[ExtractionBatch], list[Arrays]]
    layers: Callable[[Any], tuple[int, ...]] = no_layers
    likeliest: Callable[[Any], int] = no_likeliest
    of_likeliest: Callable[[Any], Any] = unchanged
    needs_context: bool = False
    options: type = NoOptions
    parameters: Callable[[Any], Parameters] | None = None
    check: Callable[[Any, Mapping[str, Any], Mapping[str, Any] | None], None] = no_limits
    bytes: Callable[[Any, Mapping[str, Any], CorpusCounts], int | None] = unknown_bytes
    option_names: Mapping[str, str] = field(default_factory=dict)
    absent_values: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Callable[[list[Arrays]], Total]] = field(default_factory=dict)
    sample_figures: Callable[[ExtractionBatch], dict[str, Total]] | None = None
    comparisons: Mapping[str, str] = field(default_factory=dict)
