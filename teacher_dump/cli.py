"""The command `teacher-dump`: a thin layer over the library, a function for each command."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from knowledge_store.calibration.file import check_output, write_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import Sentence
from knowledge_store.quantities import amount, byte_size, counted, duration
from knowledge_store.sql.answers import visible
from knowledge_store.terminal.commands import Command, application, command
from knowledge_store.terminal.console import command_errors, end_at_sigterm, note, output
from knowledge_store.terminal.progress import TerminalReporter
from knowledge_store.terminal.tokens import shown_tokens
from teacher_dump.configuration import CalibrateConfig, CheckConfig, EstimateConfig, PreviewConfig, RunConfig
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.dumping.report import DumpReport
from teacher_dump.dumping.request import check_teacher
from teacher_dump.generation.configuration import GenerateConfig
from teacher_dump.importers.configuration import ImportConfig
from teacher_dump.ranks import this_worker

if TYPE_CHECKING:
    from teacher_dump.dumping.preview import PreviewRow

NOT_THE_SAME = 1

app = application("Run a teacher once over a corpus and keep its knowledge in a store.")


class CorpusCommand(Command):
    """A command that takes several files after one `--corpus`, as a shell's glob gives them."""

    files = "--corpus"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread = _spread_files(args, self.files)
        values, _ = self.parsed(ctx, spread)
        needs_store = any(parameter.name == "store" for parameter in self.params) and not ctx.resilient_parsing
        if needs_store and values.get("store") is None and not values.get("help"):
            with command_errors():
                raise InputError(
                    "STORE is missing: name the store before the options, as in"
                    f" `{ctx.command_path} knowledge/ --teacher … --corpus …` (what follows --corpus are files of the corpus)"
                )
        return super().parse_args(ctx, spread)


class RunCommand(CorpusCommand):
    """`run`: beside `--append` it refuses a setting, also one that is given as it is without being given."""

    def parsed(self, ctx: Any, args: list[str]) -> tuple[dict[str, Any], list[Any]]:
        values, order = super().parsed(ctx, args)
        if values.get("append") is not None and not ctx.resilient_parsing:
            with command_errors():
                RunConfig.check_appended({parameter.name for parameter in order})
        return values, order


class GenerateCommand(CorpusCommand):
    """The same, after one `--prompts`."""

    files = "--prompts"


def _spread_files(arguments: list[str], option: str) -> list[str]:
    """`--corpus a b c` as `--corpus a --corpus b --corpus c`."""
    spread: list[str] = []
    inside = first = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = first = argument == option
        elif inside:
            if not first:
                spread.append(option)
            first = False
        spread.append(argument)
    return spread


def _check_packages() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"teacher-dump needs {' and '.join(missing)}: pip install 'knowledge-store[teacher]'")


@command(app, RunConfig, cls=RunCommand)
def run(config: RunConfig) -> None:
    """Dump a teacher's knowledge of a corpus. If it was stopped, the same command resumes it. A missing store is created.

    Example: `teacher-dump run knowledge/ --teacher HuggingFaceTB/SmolLM2-135M --corpus books.jsonl`

    Several workers: begin them by torchrun, srun or a Slurm array, or give each `--world-size W` and its own `--rank`. Any may
    stop and start at any time.

    A corpus that grows: `teacher-dump run knowledge/ --append books --corpus march.jsonl` makes `books-2`, as `books` was made.
    """
    _check_packages()
    end_at_sigterm()
    worker = this_worker(config.rank, config.world_size, os.environ)
    if worker.source:
        note(f"Rank {worker.rank} of {worker.world_size}, as {worker.source} say")
    ranks = worker.rank, worker.world_size
    if config.repair:
        from teacher_dump.dumping.repair import repair

        _show_report(repair(config, *ranks, reporter=TerminalReporter()), "repaired")
    elif config.append is not None:
        from teacher_dump.dumping.append import append

        _show_report(append(config, *ranks, reporter=TerminalReporter()), "dumped")
    else:
        from teacher_dump.dumping.run import dump

        _show_report(dump(config, *ranks, reporter=TerminalReporter()), "dumped")


def _show_report(report: DumpReport, done: str) -> None:
    existing = f", {report.shards_existing} existed" if report.shards_existing and done != "repaired" else ""
    others = f", {report.shards_of_others} of them other ranks'" if report.shards_of_others else ""
    speed = f" at {report.positions / report.seconds:,.0f} positions/s" if report.positions else ""
    note(
        f"{report.dump}: {report.shards} of {report.shards_planned} shards {done}{others}{existing};"
        f" {report.positions:,} positions in {duration(report.seconds)}{speed}"
    )
    if report.shards_missing:
        missing = counted(report.shards_missing, "shard of other ranks is", "shards of other ranks are")
        note(f"The dump is not complete: {missing} missing yet")
    for sentence in report.sentences:
        _show_sentence(sentence)


def _show_sentence(sentence: Sentence) -> None:
    note(_emphasised(sentence), strong=sentence.strong)


def _emphasised(sentence: Sentence) -> str:
    """A sentence of its own; one that matters says so, for where there is no bold."""
    text = f"{sentence.text[:1].upper()}{sentence.text[1:]}"
    return f"Warning: {text}" if sentence.strong else text


@command(app, PreviewConfig, cls=CorpusCommand)
def preview(config: PreviewConfig) -> None:
    """Show a few rows of a corpus as the tokens that a teacher would see. Only its tokenizer is loaded.

    ⟦Targets⟧ stand in brackets, and │ between tokens; · is a space and ↵ a line's end. A row that cannot be used says why.

    Example: `teacher-dump preview --teacher HuggingFaceTB/SmolLM2-135M-Instruct --corpus chat.jsonl`
    """
    _check_packages()
    from teacher_dump.dumping.inspection import ways_out
    from teacher_dump.dumping.preview import preview as first_rows

    excerpt = first_rows(config, reporter=TerminalReporter())
    for row in excerpt.rows:
        _show_row(row)
    counts = excerpt.counts
    amounts = f"{counted(counts.positions, 'token', 'tokens')}, {counted(counts.targets, 'target', 'targets')}"
    for sentence in counts.sentences(config.max_length, "not"):
        output.print(_emphasised(sentence), markup=False, style="bold" if sentence.strong else None)
    output.print(f"In all: {amounts}", markup=False)
    if excerpt.columns is not None:
        output.print(visible(excerpt.columns), markup=False)
    if bad := [reason for reason, left in counts.by_reason if left.bad]:
        number = sum(counts.left_out[reason].rows for reason in bad)
        note(f"`teacher-dump run` would stop: {counted(number, 'row', 'rows')} of these cannot be used. {ways_out(*bad)}")
    if not counts.rows:
        raise InputError("the corpus has no rows")
    if not counts.rows_used:
        raise InputError("none of these rows can be used, for the reasons above")


def _show_row(row: PreviewRow) -> None:
    place = f"{row.place}, part {row.part + 1}" if row.part else row.place
    if row.problem is not None:
        fate = "would stop the run" if row.stops else "not used"
        output.print(Text(visible(f"{place}: {fate}: {row.problem}"), "bold"), end="\n\n")
        return
    tokens = sum(len(sequence.tokens) for sequence in row.sequences)
    targets = sum(sequence.targets for sequence in row.sequences)
    amounts = f"{counted(tokens, 'token', 'tokens')}, {counted(targets, 'target', 'targets')}"
    several = f", in {len(row.sequences)} sequences of which this is the first" if len(row.sequences) > 1 else ""
    if row.is_group:
        several = f", in {len(row.sequences)} answers"
    dropped = f", reasoning of {counted(row.dropped_reasoning, 'message', 'messages')} left out by the template"
    output.print(Text(visible(f"{place}: {amounts}{several}{dropped if row.dropped_reasoning else ''}"), "bold"))
    for number, sequence in enumerate(row.sequences if row.is_group else row.sequences[:1], 1):
        if row.is_group:
            score = "no score" if sequence.score is None else f"score {sequence.score:g}"
            output.print(f"answer {number}, {score}:", markup=False)
        output.print(shown_tokens((token.text, token.is_target, token.is_special) for token in sequence.tokens))
        if sequence.tokens_cut:
            lost = f"{counted(sequence.targets_cut, 'target', 'targets')} among them" if sequence.targets_cut else "no target"
            output.print(f"✂ cut off: {counted(sequence.tokens_cut, 'more token', 'more tokens')}, {lost}", markup=False)
    output.print()


@command(app, EstimateConfig, cls=CorpusCommand)
def estimate(config: EstimateConfig) -> None:
    """Predict what a dump takes, from a small sample of the corpus. Nothing is written.

    Example: `teacher-dump estimate --teacher HuggingFaceTB/SmolLM2-135M --corpus books.jsonl`
    """
    _check_packages()
    config = with_local_corpus(config, reporter=TerminalReporter())
    check_teacher(config)
    from teacher_dump.dumping.estimate import estimate as predict

    prediction = predict(config, reporter=TerminalReporter())
    for label, value in (
        ("on disk", f"{byte_size(prediction.bytes)}, {prediction.bytes_per_position:.1f} bytes a position"),
        ("documents", f"{prediction.documents:,}"),
        ("positions", amount(prediction.positions)),
        ("time, one worker like this", f"{duration(prediction.seconds)} at {prediction.positions_per_second:,.0f} positions/s"),
        *(
            (label, f"{byte_size(size)}, {size / max(prediction.bytes, 1):,.0f} times as much")
            for label, size in prediction.comparisons.items()
        ),
        *((name, f"{value:.3f}") for name, value in prediction.figures.items()),
        ("sample", f"{prediction.sample_positions:,} positions"),
    ):
        output.print(f"{label:<29} {value}", markup=False)
    for sentence in prediction.sentences:
        _show_sentence(sentence)
    if any(left.bad for left in prediction.counts.left_out.values()) and not config.skip_bad_rows:
        note("`teacher-dump run` names the first of the rows that cannot be used, and stops; --skip-bad-rows leaves them out")


@command(app, CalibrateConfig, cls=CorpusCommand)
def calibrate(config: CalibrateConfig) -> None:
    """Fit the temperature at which a teacher is as confident as it is right, on text that it was not trained on.

    Example: `teacher-dump calibrate --teacher HuggingFaceTB/SmolLM2-135M --corpus heldout.jsonl --output calibration.json`
    """
    _check_packages()
    config = with_local_corpus(config, reporter=TerminalReporter())
    check_teacher(config)
    check_output(config.output)
    from teacher_dump.calibration import calibrate as fit_temperature
    from teacher_dump.calibration import describe

    fit = fit_temperature(config, reporter=TerminalReporter())
    write_calibration(config.output, fit.calibration)
    for line in describe(fit, config.output):
        output.print(line, markup=False)
    for doubt in fit.doubts:
        note(f"Warning: {doubt}")
    for sentence in fit.sentences:
        _show_sentence(sentence)


@command(app, ImportConfig, name="import")
def import_files(config: ImportConfig) -> None:
    """Take caches of predictions that other programs made into a store, as a dump. The same command resumes it.

    Everything is checked before anything is written: predictions that are off by one token are refused.

    Example: `teacher-dump import knowledge/ data_0.parquet data_1.parquet --format distillkit --tokenizer Qwen/Qwen3-8B`
    """
    _check_packages()
    end_at_sigterm()
    from teacher_dump.importers.run import import_dump

    _show_report(import_dump(config, reporter=TerminalReporter()), "repaired" if config.repair else "imported")


@command(app, GenerateConfig, cls=GenerateCommand)
def generate(config: GenerateConfig) -> None:
    """Let a teacher write texts for prompts. They become a folder of Parquet files, which `run` takes as a corpus.

    Example: `teacher-dump generate --teacher HuggingFaceTB/SmolLM2-135M-Instruct --prompts questions.jsonl --output gen/`

    The same command resumes it. A text depends on --seed, its row and its sample, and not on the batch that it is written in.
    Several workers share the work as they do that of `run`.
    """
    _check_packages()
    end_at_sigterm()
    worker = this_worker(config.rank, config.world_size, os.environ)
    if worker.source:
        note(f"Rank {worker.rank} of {worker.world_size}, as {worker.source} say")
    from teacher_dump.generation.run import generate as write_texts

    report = write_texts(config, worker.rank, worker.world_size, reporter=TerminalReporter())
    existing = f", {report.files_existing} existed" if report.files_existing else ""
    speed = f" at {report.tokens / report.seconds:,.0f} tokens/s" if report.tokens else ""
    note(
        f"{report.output}: {report.files} of {counted(report.files_planned, 'file', 'files')} written{existing};"
        f" {counted(report.texts, 'text', 'texts')}, {counted(report.tokens, 'token', 'tokens')} in"
        f" {duration(report.seconds)}{speed}"
    )
    if report.files_missing:
        missing = counted(report.files_missing, "file of other ranks is", "files of other ranks are")
        note(f"The folder is not finished: {missing} missing yet")
    for sentence in report.sentences:
        _show_sentence(sentence)


@command(app, CheckConfig)
def check(config: CheckConfig) -> None:
    """Ask the teacher again about some of a dump, and tell numeric noise from damage and from another teacher or tokenizer.

    It needs no corpus. The exit code is 1 when the verdict is anything but `agrees`.

    Example: `teacher-dump check knowledge/ --teacher HuggingFaceTB/SmolLM2-135M --sample 200`
    """
    _check_packages()
    from teacher_dump.checking.run import check as ask_again

    agreements = ask_again(config, reporter=TerminalReporter()).values()
    for agreement in agreements:
        for line in agreement.lines:
            output.print(line, markup=False)
        for sentence in agreement.notes:
            note(f"Note: {sentence}")
    if not all(agreement.agrees for agreement in agreements):
        raise typer.Exit(NOT_THE_SAME)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
