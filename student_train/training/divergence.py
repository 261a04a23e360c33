"""What is said of a run whose numbers are not finite, which `run_trainer` looks for in every step and before every save."""

from __future__ import annotations

from pathlib import Path

from knowledge_store.errors import KnowledgeStoreError
from student_train.training.run_folder import last_checkpoint


class DivergenceError(KnowledgeStoreError):
    """A run came to a loss or a gradient that is no finite number. The weights that it came from are not saved.

    Args:
        output: the run's folder.
        step: the optimiser step in which it showed, counted from 1; 0 before the first.
        updates: how many optimiser steps had been made.
        figure: what is not finite ("loss").
        value: what it is instead.

    Attributes:
        step: as above.
    """

    def __init__(self, output: Path, step: int, updates: int, figure: str, value: float):
        checkpoint = last_checkpoint(output)
        kept = (
            f"the checkpoint of step {checkpoint.step:,} is kept in {output}"
            if checkpoint
            else "no checkpoint was saved before"
        )
        advice = "begin again in another --output with a lower --learning-rate, or with --max-grad-norm"
        if not updates:
            advice = "the student has not been changed yet, so look at its weights and at the options of the loss"
        super().__init__(f"training diverged at step {step:,}: the {figure} is {value}. {kept[0].upper()}{kept[1:]}; {advice}")
        self.step = step
