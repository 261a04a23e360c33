"""The command `student-train`: each command is one call of the library.

Nothing here imports torch before a command runs, so that help is quick and a missing extra is one clear line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from knowledge_store.console import INTERRUPTED, command_errors, note, output
from knowledge_store.errors import InputError

app = typer.Typer(
    help="Train students from a knowledge store, without the teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

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
        from student_train.initialisation import initialise

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


@app.command()
def run(
    store: Annotated[Path, typer.Option(help="Folder of the knowledge store.")],
    student: Annotated[str, typer.Option(help="Folder or hub id of the model to train.")],
    folder: Annotated[Path, typer.Option("--output", help="Folder of the run, and of the trained model.")],
    dump: Annotated[str | None, typer.Option(help="Which dump; needed when the store has several.")] = None,
    loss: Annotated[
        str, typer.Option(help="forward-kl (candidates and tail), ce (the text alone), first, top-k-renormalised.")
    ] = "forward-kl",
    ce_weight: Annotated[float, typer.Option(help="Share of cross-entropy mixed in, 0 to 1.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of forward-kl and top-k-renormalised.")] = 1.0,
    first_c: Annotated[float, typer.Option(help="Scale of the probabilities in the loss first, up to 1.")] = 0.28,
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
    report_to: Annotated[str, typer.Option(help="An experiment tracker: tensorboard, wandb, …")] = "none",
    gguf_file: GgufFile = None,
) -> None:
    """Train a student. The same command again goes on from the last checkpoint.

    Example: `student-train run --store store/ --dump train --student student/ --output runs/distilled --ce-weight 0.2`

    On two GPUs: `torchrun --nproc-per-node 2 -m student_train.cli run --store store/ --student student/ --output run/`
    """
    with _command():
        from student_train.configuration import TrainConfig
        from student_train.training import leave_processes, train

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
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model.")],
    store: Annotated[Path, typer.Option(help="Folder of the knowledge store.")],
    dump: Annotated[str | None, typer.Option(help="Which dump; needed when the store has several.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Only this many sequences, spread evenly over the dump.")] = None,
    file: Annotated[
        Path | None, typer.Option("--output", help="File to write; MODEL/evaluations/DUMP.json unless given.")
    ] = None,
    gguf_file: GgufFile = None,
) -> None:
    """Measure a model on a held-out dump: against the text, and against the teacher.

    Example: `student-train evaluate runs/distilled --store store/ --dump heldout`
    """
    with _command():
        from student_train.evaluation import EvaluateConfig, output_path
        from student_train.evaluation import evaluate as evaluate_model

        config = EvaluateConfig(
            model=model,
            store=str(store),
            dump=dump,
            batch_size=batch_size,
            limit=limit,
            output=str(file) if file else None,
            gguf_file=gguf_file,
        )
        result = evaluate_model(config)
        output.print(_table(result))
        path = output_path(config, result["dump"]["name"])
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
        from student_train.report import write_report

        output.print(f"{write_report(runs, file)}", markup=False)


def _table(result: dict[str, Any]) -> Table:
    student, teacher = result["student"], result["teacher"]
    dump = result["dump"]["name"]
    table = Table(title=f"{result['positions']:,} positions of {dump}, {result['seconds']:,.0f} s", title_justify="left")
    table.add_column("")
    table.add_column("student", justify="right")
    table.add_column("teacher", justify="right")
    rows = [
        ("held-out loss (nats per token)", "nll", ".3f"),
        ("KL to the teacher (nats, lower bound)", "kl_lower_bound", ".3f"),
        ("top-1 agreement with the teacher", "top_1_agreement", ".1%"),
        ("top-1 accuracy on the text", "accuracy", ".1%"),
        ("calibration error, 10 bins", "ece_10", ".2%"),
        ("calibration error, 15 bins", "ece_15", ".2%"),
    ]
    for label, name, form in rows:
        cells = [format(side[name], form) if name in side else "–" for side in (student, teacher)]
        table.add_row(label, *cells)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,}"


def main() -> None:
    """The entry point of `student-train`."""
    app()


if __name__ == "__main__":
    main()
