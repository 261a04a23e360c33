"""The command `teacher-dump`: a thin layer over `dump`, `estimate`, `calibrate` and `check`."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from knowledge_store.calibration.file import check_output, write_calibration
from knowledge_store.terminal.console import BAD_INPUT, command_errors, note, output
from knowledge_store.terminal.quantities import amount, byte_size, duration
from teacher_dump.dumping.configuration import DumpConfig

NOT_THE_SAME = 1

app = typer.Typer(
    help="Run a teacher once over a corpus and keep its knowledge in a store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

TeacherOption = Annotated[str, typer.Option("--teacher", help="A local folder or a hub id of a causal language model.")]
CorpusOption = Annotated[
    list[Path],
    typer.Option("--corpus", help="Files: .jsonl, .jsonl.zst, .parquet or .txt."),
]
StoreOption = Annotated[Path, typer.Option("--store", help="The store's folder; made if need be.")]
NameOption = Annotated[str | None, typer.Option("--name", help="The dump's name. [default: from teacher and corpus]")]
SelectionOption = Annotated[
    str, typer.Option("--selection", help="top-k, top-p (as many candidates as it takes) or random-sampling (draws alone).")
]
TopKOption = Annotated[int, typer.Option("--top-k", help="Candidates kept at each position, with top-k.")]
TailDrawsOption = Annotated[
    int, typer.Option("--tail-draws", help="Draws from beyond the candidates: an unbiased target. 0 keeps none.")
]
TopPOption = Annotated[float, typer.Option("--top-p", help="The probability that the candidates reach, with top-p.")]
MaxKOption = Annotated[int, typer.Option("--max-k", help="Candidates at most, with top-p.")]
DrawsOption = Annotated[int, typer.Option("--draws", help="Draws at each position, with random-sampling.")]
MaxLengthOption = Annotated[int, typer.Option("--max-length", help="Longest sequence, in tokens.")]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", help="Sequences of the maximum length in a forward pass; shorter ones share the room.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (float32 on a CPU, the model's own elsewhere), float32, bfloat16 or float16.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]
ShardSizeOption = Annotated[int, typer.Option("--shard-size", help="Documents in a shard.")]
GgufOption = Annotated[str | None, typer.Option("--gguf-file", help="A GGUF file within the teacher's folder.")]
KeepContextOption = Annotated[bool, typer.Option("--keep-context", help="Keep knowledge at context positions (prompts) too.")]
SkipBadRowsOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and count them, instead of stopping.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="A file of `calibrate`: the tail is then kept at its temperature too."),
]


def _exists_or_exit() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        note(f"Error: teacher-dump needs {' and '.join(missing)}: pip install 'knowledge-store[teacher]'")
        raise typer.Exit(BAD_INPUT)


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


@app.command()
def run(
    teacher: TeacherOption,
    corpus: CorpusOption,
    store: StoreOption,
    name: NameOption = None,
    selection: SelectionOption = "top-k",
    top_k: TopKOption = DumpConfig.top_k,
    tail_draws: TailDrawsOption = DumpConfig.tail_draws,
    top_p: TopPOption = DumpConfig.top_p,
    max_k: MaxKOption = DumpConfig.max_k,
    draws: DrawsOption = DumpConfig.draws,
    max_length: MaxLengthOption = 512,
    batch_size: BatchSizeOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    shard_size: ShardSizeOption = 512,
    gguf_file: GgufOption = None,
    keep_context: KeepContextOption = False,
    skip_bad_rows: SkipBadRowsOption = False,
    calibration: CalibrationOption = None,
    rank: Annotated[int, typer.Option("--rank", help="This worker's number, from 0.")] = 0,
    world_size: Annotated[int, typer.Option("--world-size", help="How many workers share the dump.")] = 1,
    repair: Annotated[
        bool, typer.Option("--repair", help="Dump instead the shards that are damaged, each again, and put the rest in order.")
    ] = False,
) -> None:
    """Dump a teacher's knowledge of a corpus. The same command again goes on where it stopped.

    Example: `teacher-dump run --teacher HuggingFaceTB/SmolLM2-135M --corpus books.jsonl --store knowledge/`

    Several workers: give each `--world-size W` and its own `--rank`; any of them may stop and start at any time.
    """
    _exists_or_exit()
    with command_errors():
        from teacher_dump.dumping.run import dump

        config = DumpConfig(
            teacher, tuple(corpus), store, name, selection, top_k, tail_draws, top_p, max_k, draws, max_length, batch_size,
            dtype, device, shard_size, gguf_file, keep_context, skip_bad_rows, calibration,
        )  # fmt: skip
        signal.signal(signal.SIGTERM, _interrupt)
        report = dump(config, rank, world_size, repair=repair)
        standing = f", {report.shards_standing} were there" if report.shards_standing and not repair else ""
        speed = f" at {report.positions / report.seconds:,.0f} positions/s" if report.positions else ""
        done = "repaired" if repair else "dumped"
        note(
            f"{report.dump}: {report.shards} of {report.shards_planned} shards {done}{standing};"
            f" {report.positions:,} positions in {duration(report.seconds)}{speed}"
        )
        if report.skipped_rows:
            note(f"{report.skipped_rows} rows were left out; the commit records say which and why")


@app.command()
def estimate(
    teacher: TeacherOption,
    corpus: CorpusOption,
    store: StoreOption = Path("store"),
    name: NameOption = None,
    selection: SelectionOption = "top-k",
    top_k: TopKOption = DumpConfig.top_k,
    tail_draws: TailDrawsOption = DumpConfig.tail_draws,
    top_p: TopPOption = DumpConfig.top_p,
    max_k: MaxKOption = DumpConfig.max_k,
    draws: DrawsOption = DumpConfig.draws,
    max_length: MaxLengthOption = 512,
    batch_size: BatchSizeOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    shard_size: ShardSizeOption = 512,
    gguf_file: GgufOption = None,
    keep_context: KeepContextOption = False,
    skip_bad_rows: SkipBadRowsOption = False,
    calibration: CalibrationOption = None,
) -> None:
    """Predict what a dump takes, from a small sample. Takes the arguments of `run`, and writes nothing.

    Example: `teacher-dump estimate --teacher HuggingFaceTB/SmolLM2-135M --corpus books.jsonl --store knowledge/`
    """
    _exists_or_exit()
    with command_errors():
        from teacher_dump.dumping.estimate import estimate as predict

        config = DumpConfig(
            teacher, tuple(corpus), store, name, selection, top_k, tail_draws, top_p, max_k, draws, max_length, batch_size,
            dtype, device, shard_size, gguf_file, keep_context, skip_bad_rows, calibration,
        )  # fmt: skip
        found = predict(config)
        masses = " · ".join(f"k={k}: {mass:.3f}" for k, mass in found.top_k_mass.items())
        for label, value in (
            ("documents", f"{found.documents:,}"),
            ("positions", amount(found.positions)),
            ("time, one worker like this", f"{duration(found.seconds)} at {found.positions_per_second:,.0f} positions/s"),
            ("on disk", f"{byte_size(found.bytes)}, {found.bytes_per_position:.1f} bytes a position"),
            ("kept whole (float32)", byte_size(found.dense_bytes)),
            ("ratio", f"{found.ratio:,.0f}×"),
            ("mass of the k likeliest", masses),
            ("sample", f"{found.sample_positions:,} positions"),
        ):
            output.print(f"{label:<27} {value}", markup=False)
        if found.unusable_documents:
            note(f"{found.unusable_documents} of the sampled rows cannot be used: `run` says why, and leaves them out if asked")


@app.command()
def calibrate(
    teacher: TeacherOption,
    corpus: CorpusOption,
    file: Annotated[Path, typer.Option("--output", help="The calibration's file; an older one is replaced.")] = Path(
        "calibration.json"
    ),
    limit: Annotated[
        int, typer.Option("--limit", help="About how many targets to fit on, of documents drawn at random.")
    ] = 20_000,
    max_length: MaxLengthOption = 512,
    batch_size: BatchSizeOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    gguf_file: GgufOption = None,
    skip_bad_rows: SkipBadRowsOption = False,
) -> None:
    """Fit the temperature at which a teacher is as sure as it is right, on text that it was not trained on.

    Example: `teacher-dump calibrate --teacher HuggingFaceTB/SmolLM2-135M --corpus heldout.jsonl --output calibration.json`
    """
    _exists_or_exit()
    with command_errors():
        from teacher_dump.calibration import calibrate as fit_temperature
        from teacher_dump.calibration import describe

        check_output(file)
        config = DumpConfig(
            teacher, tuple(corpus), Path("store"), "calibration", max_length=max_length, batch_size=batch_size, dtype=dtype,
            device=device, gguf_file=gguf_file, skip_bad_rows=skip_bad_rows, top_k=1,
        )  # fmt: skip
        fit = fit_temperature(config, limit)
        write_calibration(file, fit.calibration)
        for line in describe(fit, file):
            output.print(line, markup=False)
        for doubt in fit.doubts:
            note(f"Warning: {doubt}")
        if fit.skipped_rows:
            note(f"{fit.skipped_rows} rows were left out")


@app.command()
def check(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")],
    teacher: TeacherOption,
    dump: Annotated[str | None, typer.Option("--dump", help="Which dump, when there are several.")] = None,
    sample: Annotated[int, typer.Option("--sample", help="How many sequences to ask again, drawn at random.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which ones.")] = 0,
    batch_size: BatchSizeOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    gguf_file: GgufOption = None,
) -> None:
    """Ask the teacher again about some of a dump, and tell numeric noise from damage and from another teacher or tokenizer.

    Needs no corpus. Exit code 1 when the verdict is anything but `agrees`.

    Example: `teacher-dump check knowledge/ --teacher HuggingFaceTB/SmolLM2-135M --sample 200`
    """
    _exists_or_exit()
    with command_errors():
        from teacher_dump.checking.agreement import AGREES, describe
        from teacher_dump.checking.agreement import check as ask_again

        found = ask_again(
            store, teacher, dump=dump, sample=sample, seed=seed, batch_size=batch_size, dtype=dtype, device=device,
            gguf_file=gguf_file,
        )  # fmt: skip
        for line in describe(found):
            output.print(line, markup=False)
        for sentence in found.notes:
            note(f"Note: {sentence}")
        if found.verdict != AGREES:
            raise typer.Exit(NOT_THE_SAME)


def _spread_files(arguments: list[str]) -> list[str]:
    """`--corpus a b c` as `--corpus a --corpus b --corpus c`, so that a shell's glob can be given."""
    spread: list[str] = []
    inside = first = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = first = argument == "--corpus"
        elif inside:
            if not first:
                spread.append("--corpus")
            first = False
        spread.append(argument)
    return spread


def main() -> None:
    """Entry point of the command."""
    app(args=_spread_files(sys.argv[1:]))


if __name__ == "__main__":
    main()
