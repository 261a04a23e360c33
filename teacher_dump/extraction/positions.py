"""Knowledge of kind `positions`: its options, the parameters that they stand for, and its extractor. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from knowledge_store.calibration.file import check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import PositionsParameters
from knowledge_store.kinds.positions.selection import DRAW_WEIGHT, MAX_DRAW_SEED, NAMES, Selection
from knowledge_store.options import option
from teacher_dump.extraction.coverage import coverage
from teacher_dump.extraction.extractor import ExtractionBatch, Extractor, Total
from teacher_dump.teachers.protocol import Ability

QUANTISATION_STEP = 1 / 8  # nats

SELECTION_OPTIONS: dict[str, set[str]] = {"top-k": {"top_k"}, "top-p": {"top_p", "max_k"}, "threshold": set()}


@dataclass(frozen=True, kw_only=True)
class PositionsOptions:
    """What is kept of each prediction."""

    selection: str = option(
        "top-k",
        choices=NAMES,
        help="The rule that picks candidates: top-k, top-p (as many as reach --top-p) or threshold (every token of at least"
        " --draw-weight: the smallest store).",
    )
    top_k: int = option(5, min=1, help="Candidates kept at each position, with top-k.")
    draw_weight: float = option(
        DRAW_WEIGHT,
        min=0,
        below=1,
        help="The probability that each draw from beyond the candidates stands for: less of it is more draws, and less noise."
        " Draws make an unbiased target; 0 keeps none.",
    )
    draw_seed: int = option(0, min=0, max=MAX_DRAW_SEED, help="A dump with another seed has draws of its own.")
    top_p: float = option(0.95, above=0, max=1, help="The probability that the candidates reach, with top-p.")
    max_k: int = option(32, min=1, help="Maximum number of candidates, with top-p.")
    keep_context: bool = option(False, help="Keep knowledge at context positions (prompts) too.")
    tail_entropy: bool = option(
        True, help="Keep the entropy of what lies beyond the candidates: evaluations then measure the whole KL to the teacher."
    )
    calibration: Path | None = option(None, help="A file of `teacher-dump calibrate`: the tail is kept at its temperature too.")
    # Not an option: what the teacher can give decides it (see `of_likeliest`).
    tail: str = "exact"

    def __post_init__(self) -> None:
        names = {name for options in SELECTION_OPTIONS.values() for name in options}
        for field in fields(PositionsOptions):
            unused = field.name in names - SELECTION_OPTIONS.get(self.selection, names)
            if unused and getattr(self, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise InputError(f"--{name} is not an option of the selection {self.selection}")
        if not self.draw_weight and self.selection == "threshold":
            raise InputError(
                "--selection threshold needs a --draw-weight above 0: it keeps what is as likely, and draws the rest"
            )
        if not self.draw_weight and self.draw_seed:
            raise InputError("--draw-seed decides where draws fall, and --draw-weight 0 keeps none: leave one of the two out")
        _ = self.rule  # refuses what a selection cannot be

    @property
    def rule(self) -> Selection:
        """The selection, as the rule it stands for."""
        if self.selection == "threshold":
            return Selection.threshold(self.draw_weight, self.draw_seed)
        size = {"candidates": self.max_k, "p": self.top_p} if self.selection == "top-p" else {"candidates": self.top_k}
        return Selection(self.selection, **size, draw_weight=self.draw_weight, draw_seed=self.draw_seed)


def positions_parameters(options: PositionsOptions) -> PositionsParameters:
    """What the options stand for.

    Raises:
        InputError: the calibration's file cannot be used. DamageError: it was altered.
    """
    calibration = {} if options.calibration is None else read_calibration(options.calibration).to_manifest()
    return PositionsParameters(
        options.rule, QUANTISATION_STEP, calibration, options.keep_context, options.tail_entropy, options.tail
    )


def of_likeliest(options: PositionsOptions) -> PositionsOptions:
    """The options for a teacher that gives its likeliest tokens alone: without draws and the tail's entropy.

    Raises:
        InputError: draws that are not those of the default are asked for, or the tail at a temperature.
    """
    reason = "needs whole distributions, and this teacher gives its likeliest tokens alone"
    if options.selection == "threshold":
        raise InputError(f"--selection threshold {reason}: use --selection top-k or top-p")
    if options.draw_weight not in (0, DRAW_WEIGHT) or options.draw_seed:
        name = "--draw-seed" if options.draw_seed else f"--draw-weight {options.draw_weight:g}"
        raise InputError(f"{name} {reason}: leave it out, and no draws are kept")
    if options.calibration is not None:
        raise InputError(f"--calibration {reason}: leave it out, and fit a temperature with `student-train calibrate`")
    return replace(options, draw_weight=0.0, tail_entropy=False, tail="remainder")


def check_positions(options: PositionsOptions, teacher: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> None:
    """Make sure that the options fit a teacher.

    Raises:
        InputError: there are more candidates than tokens, or the calibration belongs to another teacher or tokenizer.
    """
    name, vocabulary = "--max-k" if options.selection == "top-p" else "--top-k", teacher.get("vocabulary_size")
    impossible = teacher.get("impossible_tokens", 0)
    counted = options.selection != "threshold"
    if counted and vocabulary is not None and options.rule.candidates > vocabulary - impossible:
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
    needs=frozenset({Ability.LIKELIEST}),
    function=extract,
    of_likeliest=of_likeliest,
    likeliest=lambda parameters: parameters.selection.candidates,
    options=PositionsOptions,
    parameters=positions_parameters,
    check=check_positions,
    option_names={
        "selection.name": "--selection",
        "selection.k": "--top-k",
        "selection.p": "--top-p",
        "selection.max_k": "--max-k",
        "selection.draw_weight": "--draw-weight",
        "selection.draw_seed": "--draw-seed",
        "quantisation_step": "the quantisation step",
        "keep_context": "--keep-context",
        "tail_entropy": "--tail-entropy",
        "tail": "the tail",
        "calibration.temperature": "the temperature of --calibration",
        "calibration.sha256": "the file of --calibration",
    },
    absent_values={"selection.draw_weight": 0, "selection.draw_seed": 0, "tail": "exact"},
    figures={"mass of the candidates": coverage},
    sample_figures=sample_figures,
    comparisons={"full distributions (float32)": "dense_bytes"},
)
