"""What figures have to say about themselves: how they are measured, printed, compared and reported. Imports no torch.

`kinds.FIGURES` has those of each kind of knowledge, and `question_figures` those on multiple-choice questions. The table that
`evaluate` prints, the comparison of two models and the report go by what is declared here alone, and know no kind by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from knowledge_store import KnowledgeStore
from knowledge_store.reporter import Reporter
from student_train.evaluation.comparison import Difference
from student_train.training.run_folder import Record

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

ABOVE = "A calibration error sums absolute values and comes out higher on a resample, so it can lie below its interval."


@dataclass(frozen=True)
class Metric:
    """A line of the table that `evaluate` prints, and a column of the report's.

    Attributes:
        name: of the figure in `Row.figures` and among the differences.
        title, note: what it is called; its unit, or what distinguishes it.
        form: of its numbers, as `format` takes it; one that ends in "%" is a share.
        lowest: whether less of it is better.
        remark: a sentence that stands below a table of the report that has it.
        interval_remark: a sentence that stands below any table that has it with its interval.
    """

    name: str
    title: str
    note: str
    form: str
    lowest: bool = True
    remark: str = ""
    interval_remark: str = ""

    def shown(self, value: float | None) -> str:
        """The number as it is printed."""
        return "–" if value is None else format(value, self.form)


def calibration_errors(form: str) -> tuple[Metric, ...]:
    """The metrics of the calibration errors that `metrics.describe_answers` gives."""
    return (
        calibration_error("ece_10", "ECE", "10 bins", form),
        calibration_error("ece_15", "ECE", "15 bins", form),
        calibration_error("adaptive_ece", "Adaptive ECE", "equal counts", form),
    )


def calibration_error(name: str, title: str, note: str, form: str) -> Metric:
    """A calibration error, with what has to be said of any."""
    remark = "Calibration error can be small for a poor model: read it beside the loss, which no model gains by pretending."
    return Metric(name, title, note, form, remark=remark, interval_remark=ABOVE)


def intervals_shown(metrics: Sequence[Metric], rows: Sequence[Row]) -> list[Metric]:
    """The metrics of which at least one row has an interval."""
    return [metric for metric in metrics if any(metric.name in row.figures.get("intervals", {}) for row in rows)]


def remarks_once(remarks: Iterable[str]) -> list[str]:
    """The remarks that say something, each once, in their order."""
    return [remark for remark in dict.fromkeys(remarks) if remark]


@dataclass(frozen=True)
class Row:
    """Figures that belong together: of the model, of the model at a post-hoc temperature, or of the teacher.

    Attributes:
        label: what `evaluate` calls them.
        figures: a number by the name of a metric; `intervals`, two ends by the name of a metric, where they are known; and
            `reliability`, of `knowledge_store.calibration`, with `ece_15` and `nll`, where there is a diagram to draw.
        kept: what a result keeps of each sequence or question, for `Figures.differences`; None where nothing is compared.
        temperature: the post-hoc temperature, if any.
        teacher: whether they are the teacher's, which all models share.
        group: a heading that the report puts above them; those of one group are compared with each other.
    """

    label: str
    figures: Record
    kept: Record | None = None
    temperature: float | None = None
    teacher: bool = False
    group: str = ""


@dataclass(frozen=True)
class Bars:
    """A bar chart of shares.

    Attributes:
        title, label, unit: of the chart, of its horizontal and of its vertical axis.
        edges: where bars begin and end, one more than there are bars; they are shares where the first is 0.
        heights: of the bars, shares; the numbers stand above them where they are few.
        mean: a value of the horizontal axis to mark, if any.
        highest: the upper end of the vertical axis; None for what the bars need.
    """

    title: str
    label: str
    unit: str
    edges: Sequence[float]
    heights: Sequence[float]
    mean: float | None = None
    highest: float | None = None


@dataclass(frozen=True)
class Chart:
    """Bar charts side by side, with a heading, words about them, and a description for those who cannot see them."""

    title: str
    words: str
    description: str
    panels: tuple[Bars, ...]


@dataclass(frozen=True)
class Measurement:
    """What one result of `evaluate` says by one set of figures.

    Attributes:
        name: of the kind of knowledge; "questions" on questions.
        figures: how it is to be read.
        record: the numbers, as the result has them.
        result: all of it.
    """

    name: str
    figures: Figures
    record: Record
    result: Record

    @property
    def rows(self) -> list[Row]:
        """Its figures."""
        return self.figures.rows(self.record)

    @property
    def count(self) -> int:
        """Over how many of `Figures.counted` it is."""
        return self.figures.count(self)

    @property
    def source(self) -> str:
        """The name of the dump or of the questions."""
        return str((self.result.get("questions") or self.result["dump"])["name"])

    def comparable(self, other: Measurement) -> bool:
        """Whether both are of the same sequences or questions, so that their rows can be compared one by one."""
        return self.name == other.name and self.figures.sample(self) == self.figures.sample(other)


def _sequences(measurement: Measurement) -> int:
    return int(measurement.result["sequences"])


def _same_dump(measurement: Measurement) -> Any:
    return measurement.source, measurement.result["sequences"]


def _no_differences(one: Record, other: Record) -> dict[str, Difference]:
    return {}


def _no_words(measurement: Measurement) -> str:
    return ""


def _no_remarks(measurement: Measurement) -> Iterator[str]:
    return iter(())


def _no_charts(measurement: Measurement) -> Iterator[Chart]:
    return iter(())


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One set of figures. Whatever has a default may be left out.

    Attributes:
        title: the heading of its sections in the report.
        metrics: the figures there are, in the order in which they are shown; a row may lack some.
        details: further ones, which stand below these in a terminal, and not in the report.
        rows: the rows of a result's record; those that are compared have `kept`.
        counted, count: what it is measured over, such as "target positions", and how many of them.
        resampled: what the bootstrap draws whole.
        sample: a plain value that is the same for two results exactly when they are of the same sequences or questions.
        differences: the first less the second, by the name of a metric, of what two rows have kept; `comparison` has the means.
        words: sentences below the heading of the report's section, as plain text.
        confidence: a sentence beside its reliability diagrams, as plain text.
        remarks: sentences on what to be careful about, which `evaluate` prints below the table.
        charts: what the report's section draws at its end, of the largest of the samples.
    """

    title: str
    metrics: tuple[Metric, ...]
    rows: Callable[[Record], list[Row]]
    details: tuple[Metric, ...] = ()
    counted: str = "sequences"
    count: Callable[[Measurement], int] = _sequences
    resampled: str = "sequences"
    sample: Callable[[Measurement], Any] = _same_dump
    differences: Callable[[Record, Record], dict[str, Difference]] = _no_differences
    words: Callable[[Measurement], str] = _no_words
    confidence: str = ""
    remarks: Callable[[Measurement], Iterator[str]] = _no_remarks
    charts: Callable[[Measurement], Iterator[Chart]] = _no_charts


@dataclass(frozen=True)
class Curve:
    """A figure that a run measures on the way: its name in the run's history, what it is called, and its unit."""

    name: str
    title: str
    unit: str


class Measure(Protocol):
    """Measures a model by one kind of knowledge of a dump.

    It is given the sequences to read as `ordinals`, int64 (S,), the longest first, and returns what is to be kept in the result
    of an evaluation, ready for JSON. The model is in evaluation mode and on its device.
    With a temperature, the model is measured a second time with its logits divided by that. Where the kind judges positions, it
    writes a row for each of them to `positions_file`, if there is one (see `judged_positions`).
    """

    def __call__(
        self,
        model: PreTrainedModel,
        store: KnowledgeStore,
        dump: str,
        ordinals: np.ndarray,
        *,
        batch_size: int,
        temperature: float | None,
        positions_file: Path | None,
        reporter: Reporter,
    ) -> Record: ...


class Likeliest(Protocol):
    """What a teacher found likeliest at some positions, as one kind of knowledge keeps it.

    It is given the batch of one sequence, as `KnowledgeStore.batches` gives it with the text, and positions of targets in it.
    For each of them it returns (token id, probability), the likeliest first; none where the dump does not say.
    """

    def __call__(self, batch: Mapping[str, np.ndarray], positions: Sequence[int]) -> list[list[tuple[int, float]]]: ...


@dataclass(frozen=True, kw_only=True)
class KindFigures(Figures):
    """The figures of a kind of knowledge.

    Attributes:
        measure: computes the record that the others read.
        likeliest: what the teacher expected at positions of a text, to show beside what a model writes; None for a kind that
            has no text or does not know.
        curves: of a run's history, for the report.
        whole_bytes: the name of the fact that says how many bytes the knowledge would take if all of it were kept; empty where
            there is no such fact. whole_words: a sentence on it, as plain text.
    """

    measure: Measure
    likeliest: Likeliest | None = None
    curves: tuple[Curve, ...] = ()
    whole_bytes: str = ""
    whole_words: str = ""
