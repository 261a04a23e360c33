"""Knowledge of kind `positions`: its options, the parameters that they stand for, and its extractor. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from knowledge_store.calibration.file import check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import PositionsParameters
from knowledge_store.kinds.positions.selection import MAX_DRAWS, NAMES, Selection
from knowledge_store.options import option
from teacher_dump.extraction.coverage import coverage
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor, Total
from teacher_dump.teachers.protocol import Ability

QUANTISATION_STEP = 1 / 8  # nats

SELECTION_OPTIONS = {
    "top-k": {"top_k", "tail_draws"},
    "top-p": {"top_p", "max_k", "tail_draws"},
    "random-sampling": {"draws"},
}


@dataclass(frozen=True, kw_only=True)
class PositionsOptions:
    """What is kept of each prediction."""

    selection: str = option(
        "top-k",
        choices=NAMES,
        help="The rule that picks what is kept: top-k, top-p (as many candidates as reach --top-p) or random-sampling (draws"
        " alone).",
    )
    top_k: int = option(5, min=1, help="Candidates kept at each position, with top-k.")
    tail_draws: int = option(
        4, min=0, max=MAX_DRAWS, help="Draws from beyond the candidates, which make an unbiased target; 0 keeps none."
    )
    top_p: float = option(0.95, above=0, max=1, help="The probability that the candidates reach, with top-p.")
    max_k: int = option(32, min=1, help="Maximum number of candidates, with top-p.")
    draws: int = option(50, min=1, max=MAX_DRAWS, help="Draws at each position, with random-sampling.")
    keep_context: bool = option(False, help="Keep knowledge at context positions (prompts) too.")
    tail_entropy: bool = option(
        True, help="Keep the entropy of what lies beyond the candidates: evaluations then measure the whole KL to the teacher."
    )
    calibration: Path | None = option(None, help="A file of `teacher-dump calibrate`: the tail is kept at its temperature too.")

    def __post_init__(self) -> None:
        names = {name for options in SELECTION_OPTIONS.values() for name in options}
        for field in fields(PositionsOptions):
            unused = field.name in names - SELECTION_OPTIONS.get(self.selection, names)
            if unused and getattr(self, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise InputError(f"--{name} is not an option of the selection {self.selection}")
        if self.calibration is not None and self.selection == "random-sampling":
            raise InputError(
                "--calibration keeps the tail at another temperature beside candidates, and random-sampling has none: its draws"
                " serve temperature 1 alone"
            )

    @property
    def rule(self) -> Selection:
        """The selection, as the rule it stands for."""
        if self.selection == "random-sampling":
            return Selection(self.selection, 0, self.draws)
        if self.selection == "top-p":
            return Selection(self.selection, self.max_k, self.tail_draws, self.top_p)
        return Selection(self.selection, self.top_k, self.tail_draws)


def positions_parameters(options: PositionsOptions) -> PositionsParameters:
    """What the options stand for.

    Raises:
        InputError: the calibration's file cannot be used. DamageError: it was altered.
    """
    calibration = {} if options.calibration is None else read_calibration(options.calibration).to_manifest()
    return PositionsParameters(options.rule, QUANTISATION_STEP, calibration, options.keep_context, options.tail_entropy)


def check_positions(options: PositionsOptions, teacher: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> None:
    """Make sure that the options fit a teacher.

    Raises:
        InputError: there are more candidates than tokens, or the calibration belongs to another teacher or tokenizer.
    """
    name, vocabulary = "--max-k" if options.selection == "top-p" else "--top-k", teacher.get("vocabulary_size")
    impossible = teacher.get("impossible_tokens", 0)
    if vocabulary is not None and options.rule.candidates > vocabulary - impossible:
        never = " that it ever gives" if impossible else ""
        raise InputError(
            f"{name} {options.rule.candidates} is above the teacher's vocabulary of {vocabulary - impossible:,} tokens{never}"
        )
    if options.calibration is not None and tokenizer is not None:
        check_calibration(read_calibration(options.calibration), dict(teacher), dict(tokenizer))


def extract(batch: ExtractionBatch) -> list[Arrays]:
    """See `distributions.extract_positions`."""
    from teacher_dump.extraction.distributions import extract_positions

    return extract_positions(batch)


def sample_figures(batch: ExtractionBatch) -> dict[str, Total]:
    """See `distributions.coverage_by_depth`."""
    from teacher_dump.extraction.distributions import coverage_by_depth

    return coverage_by_depth(batch)


POSITIONS = Extractor(
    needs=frozenset({Ability.DISTRIBUTIONS}),
    function=extract,
    options=PositionsOptions,
    parameters=positions_parameters,
    check=check_positions,
    option_names={
        "selection.name": "--selection",
        "selection.k": "--top-k",
        "selection.p": "--top-p",
        "selection.max_k": "--max-k",
        "selection.tail_draws": "--tail-draws",
        "selection.draws": "--draws",
        "quantisation_step": "the quantisation step",
        "keep_context": "--keep-context",
        "tail_entropy": "--tail-entropy",
        "calibration.temperature": "the temperature of --calibration",
        "calibration.sha256": "the file of --calibration",
    },
    absent_values={"selection.tail_draws": 0},
    figures={"top-k coverage": coverage},
    sample_figures=sample_figures,
    comparisons={"full distributions (float32)": "dense_bytes"},
)
