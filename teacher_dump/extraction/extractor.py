"""What an extractor is: it gets one batch and gives, for each of its sequences, the arrays of its kind of knowledge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knowledge_store.kinds import Arrays
from teacher_dump.configuration import EstimateConfig
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.teachers.protocol import Ability, Prediction, Teacher

Total = tuple[float, int]  # a sum, and over how many


@dataclass(frozen=True)
class ExtractionBatch:
    """What an extractor is given.

    Attributes:
        sequences: the B sequences of the batch.
        prediction: the teacher's, for token ids padded on the right.
        parameters: of the extractor's kind, as its dump's manifest has them (see `Kind.parameters`).
    """

    sequences: list[TokenSequence]
    prediction: Prediction
    parameters: Any

    @property
    def attention_mask(self) -> np.ndarray:
        """Which positions are tokens of a sequence, not padding on the right: bool (B, T)."""
        lengths = np.array([len(sequence.token_ids) for sequence in self.sequences])
        return np.arange(lengths.max(initial=0)) < lengths[:, None]


@dataclass(frozen=True)
class Extractor:
    """How one kind of knowledge is taken from a teacher's predictions.

    Attributes:
        needs: what the teacher must be able to give.
        function: the arrays of each sequence of a batch; for a kind per sequence they have one entry.
        parameters: of the kind, from the command's options; None for a kind without parameters.
        figures: by name, a sum over what was extracted of some sequences and over how many values it is: means that are shown
            while a dump is made.
        sample_figures: the same for `estimate`, from a batch of its sample.
    """

    needs: frozenset[Ability]
    function: Callable[[ExtractionBatch], list[Arrays]]
    parameters: Callable[[EstimateConfig, Teacher], Any] | None = None
    figures: Mapping[str, Callable[[list[Arrays]], Total]] = field(default_factory=dict)
    sample_figures: Callable[[ExtractionBatch], dict[str, Total]] | None = None
