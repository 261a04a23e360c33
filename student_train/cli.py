"""The command `student-train`: each command is one call of the library.

Nothing here imports torch before a command has checked its paths, options, store and dump, so that help and mistakes are quick
and a missing extra is one clear line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.table import Table

from knowledge_store.errors import InputError
from knowledge_store.terminal.commands import application, command
from knowledge_store.terminal.console import INTERRUPTED, note, output
from knowledge_store.terminal.progress import TerminalReporter
from student_train.calibration.configuration import CalibrateConfig
from student_train.evaluation.configuration import CompareConfig, EvaluateConfig, check_evaluation, output_path
from student_train.rationales.configuration import RationalesConfig
from student_train.report.configuration import ReportConfig
from student_train.training.configuration import InitialiseConfig, TrainConfig, parse_layers

app = application("Train students from a knowledge store, without the teacher.")

DIVERGED = 1  # the exit code of a run that came to no end, through no mistake in its options
_LIBRARIES = {"torch", "transformers", "accelerate", "safetensors", "matplotlib"}


@contextmanager
def _libraries() -> Iterator[None]:
    """Within it, libraries of the extra are imported; InputError where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        raise InputError("student-train needs torch and transformers: pip install 'knowledge-store[student]'") from error


@command(app, InitialiseConfig)
def init(config: InitialiseConfig) -> None:
    """Make a student: a copy of a model that keeps some of its layers.

    Example: `student-train init --from teacher/ --keep-layers 0,6,12,18,24,29 --output student/`
    """
    from student_train.training.initialisation import initialise

    with _libraries():
        made = initialise(
            config.source, list(parse_layers("--keep-layers", config.keep_layers)), config.output, gguf_file=config.gguf_file
        )
    output.print(
        f"{made.output}: {made.layers} of {made.layers_before} layers,"
        f" {_millions(made.parameters)} of {_millions(made.parameters_before)} parameters",
        markup=False,
    )


@command(app, TrainConfig, configuration_file=True)
def run(config: TrainConfig) -> None:
    """Train a student. The same command resumes a run that was interrupted.

    Example: `student-train run store/ --dump train --student student/ --output runs/distilled --ce-weight 0.2`

    On two GPUs: `torchrun --nproc-per-node 2 -m student_train.cli run store/ --dump train --student student/ --output run/`
    """
    from student_train.training.choice import check_choice
    from student_train.training.knowledge import check_run

    store, mixture, _ = check_run(config)
    if os.environ.get("WORLD_SIZE", "1") == "1":  # several ask once, when they have met (`choose_once`)
        check_choice(config, store, mixture.corpus)
    first_process = os.environ.get("RANK", "0") == "0"
    with _libraries():
        from student_train.training.divergence import DivergenceError
        from student_train.training.run import leave_processes, train

        try:
            result = train(config, reporter=TerminalReporter())
        except DivergenceError as error:
            if first_process:
                note(f"Error: {error}")
            raise typer.Exit(DIVERGED) from None
        finally:
            leave_processes()
    if not result.finished:
        if first_process:
            note(
                f"Stopped at step {result.step:,} of {result.steps:,}; the checkpoint is saved."
                " Run the same command again to resume."
            )
        raise typer.Exit(INTERRUPTED)
    if first_process:
        already = result.began_at == result.steps
        validation = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.3f}"
        output.print(
            f"{result.output} is finished{' already' if already else ''}:"
            f" {result.steps:,} steps in {result.seconds:,.0f} s{validation}",
            markup=False,
        )


@command(app, CalibrateConfig)
def calibrate(config: CalibrateConfig) -> None:
    """Re-calibrate a dump's teacher from what the dump keeps, without the teacher.

    Example: `student-train calibrate store/ --dump train --method first --split split=calibration`
    """
    from knowledge_store import KnowledgeStore
    from knowledge_store.calibration.file import check_output, write_calibration
    from student_train.calibration.description import describe, doubts
    from student_train.calibration.fit import calibrate as fit_calibration

    check_output(config.output)
    store = KnowledgeStore.open(config.store, reporter=TerminalReporter())
    if missing := store.what_is_missing(config.dump):
        note(f"Warning: {missing}")
    fit = fit_calibration(store, config.dump, method=config.method, split=config.split, reporter=TerminalReporter())
    write_calibration(config.output, fit.calibration)
    for line in describe(fit):
        output.print(line, markup=False)
    for doubt in doubts(fit):
        note(f"Warning: {doubt}")
    sequences = "all sequences, also those that students learn from"
    if config.split is not None:
        sequences = f"the sequences with {config.split}"
    sample = " (a sample of them)" if fit.sampled else ""
    note(f"Fitted on {fit.calibration.targets:,} targets of {sequences}{sample}; written to {config.output}")


@command(app, EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Measure a model: on a held-out dump, against the text and the teacher, or on multiple-choice questions.

    Example: `student-train evaluate store/ --dump heldout --model runs/distilled`

    Example: `student-train evaluate --model runs/distilled --questions test.jsonl --post-hoc-temperature validation.jsonl`
    """
    from student_train.evaluation.tables import remarks, tables

    check_evaluation(config)
    with _libraries():
        from student_train.evaluation.run import evaluate as evaluate_model

        result = evaluate_model(config, reporter=TerminalReporter())
    for table in tables(result):
        output.print(table)
    for remark in remarks(result):
        note(remark)
    path = output_path(config, None if config.questions else result["dump"]["name"])
    if path:
        note(f"Written to {path}")


@command(app, CompareConfig)
def compare(config: CompareConfig) -> None:
    """Show evaluations of several models side by side, and by how much each differs from the first.

    Example: `student-train compare original.json q8.json q4.json`
    """
    from student_train.evaluation.results import read_evaluation
    from student_train.evaluation.tables import compared

    for table in compared({path: read_evaluation(Path(path)) for path in config.results}):
        output.print(table)


@command(app, RationalesConfig)
def rationales(config: RationalesConfig) -> None:
    """Say how often the most salient tokens of a dump are of the answer, beside chance and the teacher's accuracy.

    Example: `student-train rationales store/ --dump train --chance 0.2`
    """
    from knowledge_store import KnowledgeStore
    from student_train.rationales.overlap import measure_overlap

    store = KnowledgeStore.open(config.store, reporter=TerminalReporter())
    for dump in dict.fromkeys(map(store.dump, (config.dump, config.rationale_dump or config.dump))):
        if missing := store.what_is_missing(dump):
            note(f"Warning: {missing}")
    overlap = measure_overlap(store, config)
    table = Table(title=f"{overlap.examples:,} examples, {config.rationale_tokens} tokens of each", title_justify="left")
    table.add_column("")
    table.add_column("share", justify="right")
    table.add_column("by chance", justify="right")
    for row in overlap.rows():
        table.add_row(*row)
    output.print(table)
    if overlap.left_out:
        note(f"{overlap.left_out:,} sequences with fewer tokens of context are left out.")
    for warning in overlap.warnings():
        note(f"Warning: {warning}.")


@command(app, ReportConfig)
def report(config: ReportConfig) -> None:
    """Compare runs on one self-contained HTML page.

    Example: `student-train report runs/fine-tuned runs/distilled --output report.html`
    """
    with _libraries():
        from student_train.report.html import write_report

        page = write_report(config.runs, config.output)
    output.print(str(page), markup=False)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,}"


def main() -> None:
    """The entry point of `student-train`."""
    app()


if __name__ == "__main__":
    main()
