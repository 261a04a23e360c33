"""The command `student-train`: each command is one call of the library.

Nothing here imports torch before a command runs, so that help is quick and a missing extra is one clear line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from knowledge_store.errors import InputError
from knowledge_store.reading.cache import CACHE_SIZE
from knowledge_store.terminal.console import INTERRUPTED, command_errors, note, output

app = typer.Typer(
    help="Train students from a knowledge store, without the teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

# To fit a temperature on.
FEW_QUESTIONS = 200

_LIBRARIES = {"torch", "transformers", "accelerate", "safetensors", "matplotlib"}

GgufFile = Annotated[str | None, typer.Option("--gguf-file", help="Name of a GGUF file in the model's folder.")]


@contextmanager
def _command() -> Iterator[None]:
    with command_errors():
        try:
            yield
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _LIBRARIES:
                raise
            raise InputError("student-train needs torch and transformers: pip install 'knowledge-store[student]'") from error


@app.command()
def init(
    source: Annotated[str, typer.Option("--from", help="Folder or hub id of the model to copy.")],
    keep_layers: Annotated[str, typer.Option(help="Layers to keep, 0-based: 0,6,12.")],
    folder: Annotated[Path, typer.Option("--output", help="Folder to make.")],
    gguf_file: GgufFile = None,
) -> None:
    """Make a student: a copy of a model that keeps some of its layers.

    Example: `student-train init --from teacher/ --keep-layers 0,6,12,18,24,29 --output student/`
    """
    with _command():
        from student_train.training.initialisation import initialise

        try:
            layers = [int(layer) for layer in keep_layers.split(",")]
        except ValueError:
            raise InputError(f"--keep-layers is numbers with commas, such as 0,6,12, not {keep_layers!r}") from None
        made = initialise(source, layers, folder, gguf_file=gguf_file)
        output.print(
            f"{made.output}: {made.layers} of {made.layers_before} layers,"
            f" {_millions(made.parameters)} of {_millions(made.parameters_before)} parameters",
            markup=False,
        )


class _RunCommand(TyperCommand):
    """Its help names every loss. They are looked up only when it is shown, since that imports torch."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with suppress(ModuleNotFoundError):
            from student_train.losses.divergences import LOSSES

            for parameter in self.params:
                if isinstance(parameter, TyperOption) and parameter.name == "loss":
                    parameter.help = f"What to learn: {', '.join(LOSSES)}."
        super().format_help(ctx, formatter)


@app.command(cls=_RunCommand)
def run(
    store: Annotated[Path, typer.Option(help="Folder of the knowledge store.")],
    student: Annotated[str, typer.Option(help="Folder or hub id of the model to train.")],
    folder: Annotated[Path, typer.Option("--output", help="Folder of the run, and of the trained model.")],
    dump: Annotated[str | None, typer.Option(help="Which dump; needed when the store has several.")] = None,
    loss: Annotated[str, typer.Option(help="What to learn.")] = "forward-kl",
    ce_weight: Annotated[float, typer.Option(help="Share of cross-entropy mixed in, 0 to 1.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of the divergences and top-k-renormalised.")] = 1.0,
    first_c: Annotated[float, typer.Option(help="Scale of the probabilities in the loss first, up to 1.")] = 0.28,
    tail: Annotated[
        str, typer.Option(help="forward-kl outside the candidates: draws, bucket, or auto (draws where there are some).")
    ] = "auto",
    beta: Annotated[float, typer.Option(help="The teacher's share in jensen-shannon's mixture, 0 to 1.")] = 0.5,
    skew: Annotated[float, typer.Option(help="Share mixed into the reference of the skewed losses, 0 to 1.")] = 0.1,
    smoothing: Annotated[float, typer.Option(help="What label-smoothing takes off the likeliest token.")] = 0.1,
    calibration: Annotated[
        Path | None, typer.Option(help="A file that re-calibrates the teacher; see `calibrate`. The tail is a bucket then.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the dump; 1 unless --steps is given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass of one process.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes in one optimiser step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 3e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps during which it rises.")] = 0.05,
    schedule: Annotated[str, typer.Option(help="How it falls: cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0 for no clipping.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order of sequences.")] = 0,
    eval_fraction: Annotated[float, typer.Option(help="Share of the documents held out to follow the loss.")] = 0.02,
    evaluations: Annotated[int, typer.Option(help="How often to evaluate on them in the run.")] = 10,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16 (mixed).")] = "auto",
    save_steps: Annotated[int, typer.Option(help="Optimiser steps between checkpoints.")] = 200,
    workers: Annotated[int, typer.Option(help="Processes that read batches ahead.")] = 0,
    cache_size: Annotated[
        float, typer.Option(help="Disk, GB, for decoded sequences in your cache folder; safe to delete. 0 for none.")
    ] = CACHE_SIZE / 1e9,
    report_to: Annotated[str, typer.Option(help="An experiment tracker: tensorboard, wandb, …")] = "none",
    gguf_file: GgufFile = None,
) -> None:
    """Train a student. The same command again goes on from the last checkpoint.

    Example: `student-train run --store store/ --dump train --student student/ --output runs/distilled --ce-weight 0.2`

    On two GPUs: `torchrun --nproc-per-node 2 -m student_train.cli run --store store/ --student student/ --output run/`
    """
    with _command():
        from student_train.training.configuration import TrainConfig
        from student_train.training.run import leave_processes, train

        first_process = os.environ.get("RANK", "0") == "0"
        try:
            result = train(
                TrainConfig(
                    store=str(store),
                    student=student,
                    output=str(folder),
                    dump=dump,
                    loss=loss,
                    ce_weight=ce_weight,
                    temperature=temperature,
                    first_c=first_c,
                    tail=tail,
                    beta=beta,
                    skew=skew,
                    smoothing=smoothing,
                    calibration=None if calibration is None else str(calibration),
                    epochs=epochs,
                    steps=steps,
                    batch_size=batch_size,
                    gradient_accumulation=gradient_accumulation,
                    learning_rate=learning_rate,
                    warmup=warmup,
                    schedule=schedule,
                    weight_decay=weight_decay,
                    max_grad_norm=max_grad_norm,
                    seed=seed,
                    eval_fraction=eval_fraction,
                    evaluations=evaluations,
                    precision=precision,
                    save_steps=save_steps,
                    workers=workers,
                    cache_size=cache_size,
                    report_to=report_to,
                    gguf_file=gguf_file,
                )
            )
        finally:
            leave_processes()
        if not result.finished:
            if first_process:
                note(
                    f"Stopped at step {result.step:,} of {result.steps:,}; the checkpoint is saved."
                    " Run the same command again to go on."
                )
            raise typer.Exit(INTERRUPTED)
        if first_process:
            already = result.began_at == result.steps
            held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.3f}"
            output.print(
                f"{result.output} is finished{' already' if already else ''}:"
                f" {result.steps:,} steps in {result.seconds:,.0f} s{held_out}",
                markup=False,
            )


@app.command()
def calibrate(
    store: Annotated[Path, typer.Argument(help="Folder of the knowledge store.")],
    dump: Annotated[str | None, typer.Option(help="Which dump; needed when the store has several.")] = None,
    method: Annotated[
        str, typer.Option(help="first (c of FIRST's rescaling) or temperature (of the candidates and the tail).")
    ] = "first",
    split: Annotated[
        str | None, typer.Option(help="COLUMN=VALUE: the sequences to fit on, such as split=calibration; all unless given.")
    ] = None,
    file: Annotated[Path, typer.Option("--output", help="The calibration's file; an older one is replaced.")] = Path(
        "calibration.json"
    ),
) -> None:
    """Re-calibrate a dump's teacher from what the dump keeps, without the teacher.

    Example: `student-train calibrate store/ --dump train --method first --split split=calibration`
    """
    with _command():
        from knowledge_store import KnowledgeStore
        from knowledge_store.calibration.file import check_output, write_calibration
        from student_train.calibration import fit as fitting

        check_output(file)
        fit = fitting.calibrate(KnowledgeStore.open(store), dump, method=method, split=split)
        write_calibration(file, fit.calibration)
        for line in fitting.describe(fit):
            output.print(line, markup=False)
        for doubt in fitting.doubts(fit):
            note(f"Warning: {doubt}")
        where = "all sequences, also those that students learn from" if split is None else f"the sequences with {split}"
        taken = " (a sample of them)" if fit.sampled else ""
        note(f"Fitted on {fit.calibration.targets:,} targets of {where}{taken}; written to {file}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model.")],
    store: Annotated[Path | None, typer.Option(help="Folder of the knowledge store, to measure on held-out text.")] = None,
    dump: Annotated[str | None, typer.Option(help="Which dump; needed when the store has several.")] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines file of multiple-choice questions (`question`, `options`, `answer`), instead of --store."
        ),
    ] = None,
    answer_as: Annotated[
        str, typer.Option(help="How questions are answered: by `letter`, or by the option's `text`.")
    ] = "letter",
    post_hoc_temperature: Annotated[
        Path | None,
        typer.Option(
            help="Measure once more at a temperature of the model: other questions (.jsonl) to fit one on,"
            " or the model's own calibration (.json) from `teacher-dump calibrate`."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 8,
    limit: Annotated[
        int | None, typer.Option(help="Only this many sequences or questions, spread evenly over them all.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--output", help="To write; else MODEL/evaluations/DUMP.json or QUESTIONS.letter.json."),
    ] = None,
    gguf_file: GgufFile = None,
) -> None:
    """Measure a model: on a held-out dump, against the text and the teacher, or on multiple-choice questions.

    Example: `student-train evaluate runs/distilled --store store/ --dump heldout`

    Example: `student-train evaluate runs/distilled --questions test.jsonl --post-hoc-temperature validation.jsonl`
    """
    with _command():
        from student_train.evaluation.run import EvaluateConfig, output_path
        from student_train.evaluation.run import evaluate as evaluate_model

        config = EvaluateConfig(
            model=model,
            store=str(store) if store else None,
            dump=dump,
            batch_size=batch_size,
            limit=limit,
            output=str(file) if file else None,
            gguf_file=gguf_file,
            questions=str(questions) if questions else None,
            answer_as=answer_as,
            post_hoc_temperature=str(post_hoc_temperature) if post_hoc_temperature else None,
        )
        result = evaluate_model(config)
        if questions:
            _print_answers(result)
        else:
            output.print(_table(result))
        path = output_path(config, None if questions else result["dump"]["name"])
        if path:
            note(f"Written to {path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs or evaluated models.", metavar="RUN...")],
    file: Annotated[Path, typer.Option("--output", help="The page to write.")] = Path("report.html"),
) -> None:
    """Compare runs on one self-contained HTML page.

    Example: `student-train report runs/fine-tuned runs/distilled --output report.html`
    """
    with _command():
        from student_train.report.report import write_report

        output.print(f"{write_report(runs, file)}", markup=False)


def _table(result: dict[str, Any]) -> Table:
    """Of an evaluation on a dump."""
    sides = {"student": result["student"], "teacher": result["teacher"]}
    if "post_hoc" in result:
        sides[f"at T = {result['post_hoc']['temperature']:.3g}"] = result["post_hoc"]["student"]
    dump = result["dump"]["name"]
    table = Table(title=f"{result['positions']:,} positions of {dump}, {result['seconds']:,.0f} s", title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    rows = [
        ("held-out loss (nats per token)", "nll", ".3f"),
        ("KL to the teacher (nats, lower bound)", "kl_lower_bound", ".3f"),
        ("top-1 agreement with the teacher", "top_1_agreement", ".1%"),
        ("top-1 accuracy on the text", "accuracy", ".1%"),
        ("Brier score, full vocabulary", "brier", ".4f"),
        ("ECE, 10 bins", "ece_10", ".2%"),
        ("ECE, 15 bins", "ece_15", ".2%"),
        ("ECE, bins of equal counts", "adaptive_ece", ".2%"),
        ("Full-ECE, the whole vocabulary", "full_ece", ".2%"),
    ]
    for label, name, form in rows:
        if name in sides["student"]:
            table.add_row(label, *(_with_interval(side, name, form) for side in sides.values()))
    table.caption = _CAPTION.format("sequences")
    return table


def _print_answers(result: dict[str, Any]) -> None:
    """Of an evaluation on questions."""
    asked = result["questions"]
    labels = {"first_token": "first token", "options": "over the options", "sequence": "whole sequence"}
    rows = [
        ("accuracy", "accuracy", ".1%"),
        ("NLL (nats)", "nll", ".3f"),
        ("Brier score", "brier", ".3f"),
        ("ECE, 10 bins", "ece_10", ".1%"),
        ("ECE, 15 bins", "ece_15", ".1%"),
        ("ECE, bins of equal counts", "adaptive_ece", ".1%"),
    ]
    title = f"{asked['count']:,} questions of {asked['name']}, {result['seconds']:,.0f} s"
    for heading, sides in ((title, result), ("At a post-hoc temperature", result.get("post_hoc", {}))):
        shown = [name for name in labels if name in sides]
        if not shown:
            continue
        table = Table(title=heading, title_justify="left")
        table.add_column("")
        for name in shown:
            table.add_column(labels[name], justify="right")
        if sides is not result:
            table.add_row("T", *(f"{sides[name]['temperature']:.3f}" for name in shown))
        for label, figure, form in rows:
            table.add_row(label, *(_with_interval(sides[name], figure, form) for name in shown))
        table.caption = _CAPTION.format("questions")
        output.print(table)
    if asked["shared_first_token"]:
        note(
            f"{asked['shared_first_token']:,} of the questions have options that share their first token, which says nothing of"
            " them: judge by the whole sequence."
        )
    if any(each.get("at_edge") for each in result.get("post_hoc", {}).values() if isinstance(each, dict)):
        note("A fitted temperature is at the edge of its range: the best one lies beyond, or there is none.")
    fitted_on = result.get("post_hoc", {}).get("questions", FEW_QUESTIONS)
    if fitted_on < FEW_QUESTIONS:
        note(f"The temperature is fitted on {fitted_on:,} questions, which are few: use {FEW_QUESTIONS} or more.")


_CAPTION = (
    "In brackets: where 95 of 100 resamples of the {} lie (bootstrap). A calibration error comes out higher on a resample,"
    " so it can lie below."
)


def _with_interval(side: dict[str, Any], name: str, form: str) -> str:
    """A figure and the interval it lies in."""
    if name not in side:
        return "–"
    value = format(side[name], form)
    if name not in side["intervals"]:
        return value
    low, high = (format(end, form).removesuffix("%") for end in side["intervals"][name])
    return f"{value}\n[{low}, {high}]"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,}"


def main() -> None:
    """The entry point of `student-train`."""
    app()


if __name__ == "__main__":
    main()
