"""The command `knowledge-store`: a thin layer over `KnowledgeStore` and `verify`."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from knowledge_store.errors import InputError, KnowledgeStoreError, LimitError
from knowledge_store.isolation.child import MEMORY_LIMIT as READING_LIMIT
from knowledge_store.quantities import amount, byte_size
from knowledge_store.sql.answers import Format, aligned, visible
from knowledge_store.sql.isolated import asked
from knowledge_store.sql.limits import MEMORY_LIMIT, TIMEOUT
from knowledge_store.terminal.commands import Command, StoreArgument, application, command
from knowledge_store.terminal.console import messages, note, output
from knowledge_store.terminal.progress import TerminalReporter

if TYPE_CHECKING:
    from knowledge_store.catalogue.summary import DumpSummary
    from knowledge_store.store import KnowledgeStore

app = application("Query, verify and keep a store of a teacher's knowledge.")

DAMAGED = 1
SHOWN_SHARE = 0.005


def _dump_names(context: typer.Context, incomplete: str) -> list[str]:
    """The dumps of the store that was named, for a shell that completes a word."""
    store = context.params.get("store")
    try:
        names = [] if store is None else list(_open(Path(store)).dumps)
    except (KnowledgeStoreError, OSError):
        names = []
    return [name for name in names if name.startswith(incomplete)]


DumpArgument = Annotated[str, typer.Argument(metavar="DUMP", help="The dump's name.", autocompletion=_dump_names)]
DumpOption = Annotated[
    str | None, typer.Option("--dump", help="Which dump, when there are several.", autocompletion=_dump_names)
]


def _open(store: Path, **options: Any) -> KnowledgeStore:
    """The store, and with it the libraries that reading it takes: `sql` leaves both to its child."""
    from knowledge_store.store import KnowledgeStore

    return KnowledgeStore.open(store, **options)


@command(app)
def info(
    store: StoreArgument,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON array, an object for each dump."),
    ] = False,
) -> None:
    """Show what a store holds: dumps, sizes, what was skipped or truncated, and what each kind of knowledge says of itself.

    Example: `knowledge-store info knowledge/`
    """
    opened = _open(store)
    summaries = opened.info()
    if opened.closed and not summaries:
        opened.dump(next(iter(opened.closed)))  # says why
    for sentence in opened.closed.values():
        note(f"Closed: {sentence}")
    if as_json:
        records = [{**summary.to_record(), "closed": None} for summary in summaries]
        records += [{"dump": name, "closed": sentence} for name, sentence in opened.closed.items()]
        typer.echo(json.dumps(records, indent=1, ensure_ascii=False))
        return
    if not summaries:
        note(f"{store} holds no dump yet")
    for summary in summaries:
        _print_summary(summary)


def _rows(summary: DumpSummary) -> list[str]:
    """What became of the corpus's rows: of all, as the manifest says, or else of those in the committed shards."""
    if summary.counts is not None:
        return [sentence.text for sentence in summary.counts.sentences(summary.max_length)]
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in summary.skip_reasons.items())
    sentences = [f"{summary.skipped_rows:,} rows left out: {reasons}"] if summary.skipped_rows else []
    return [*sentences, f"{summary.truncated:,} sequences cut"] if summary.truncated else sentences


def _print_summary(summary: DumpSummary) -> None:
    shards = f"{summary.shards} of {summary.shards_planned} shards"
    lines = [
        ("teacher", f"{summary.teacher} (vocabulary {summary.vocabulary_size:,})"),
        ("documents", f"{summary.documents:,} of {summary.documents_planned:,}"),
        ("sequences", f"{summary.sequences:,} of at most {summary.max_length} tokens"),
        ("positions", amount(summary.positions)),
    ]
    for label, sentence in zip(("corpus", "", ""), _rows(summary), strict=False):
        lines.append((label, sentence))
    lines += summary.lines
    if summary.bytes_per_position is not None:
        on_disk = f"{byte_size(summary.bytes)}, {summary.bytes_per_position:.2f} bytes a position"
        lines.append(("on disk", f"{on_disk} (and {byte_size(summary.tokens_bytes)} for the vocabulary)"))
    state = "complete" if summary.complete else "incomplete: run the same `teacher-dump run` again to resume"
    output.print(f"[bold]{summary.dump}[/bold]  {shards}, {state}")
    for label, value in lines:
        output.print(f"  {label:<23} {visible(value)}", markup=False)
    if not summary.positions:
        return
    shown = {name: size for name, size in summary.column_bytes.items() if size >= SHOWN_SHARE * summary.bytes}
    shown["the rest: footers, records, small columns"] = summary.bytes - sum(shown.values())
    for name, size in sorted(shown.items(), key=lambda item: -item[1]):
        output.print(f"    {size / summary.positions:6.2f} bytes a position  {visible(name)}", markup=False)


class _SqlCommand(Command):
    """Its statement may begin with a comment, which begins as an option does: `-- longest first` and a new line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # No option here has lines. A space in front changes no statement.
        return super().parse_args(ctx, [f" {word}" if word.startswith("--") and "\n" in word else word for word in args])


@command(app, cls=_SqlCommand)
def sql(
    store: StoreArgument,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="One SELECT statement; `-` reads it from standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the statement from this file.")] = None,
    format: Annotated[Format, typer.Option(help="json is one array of row objects.")] = Format.table,
    memory_limit: Annotated[float, typer.Option(help="For the query and its answer, in GiB.")] = MEMORY_LIMIT / 2**30,
    timeout: Annotated[float, typer.Option(help="In seconds, after which the query is interrupted.")] = TIMEOUT,
) -> None:
    """Answer one SELECT statement over `positions`, `candidates`, `sequences`, `tokens`, `shards` and `dumps`.

    It may come from anybody: it runs in a process of its own, can write nothing, read nothing but the store, and not outlive
    its limits.

    Example: `knowledge-store sql knowledge/ "SELECT token_text, avg(tail_logprob) FROM positions GROUP BY 1 ORDER BY 2"`
    """
    statement = _statement(query, file)
    with asked(store, statement, format.value, memory_limit * 2**30, timeout, note) as answer:
        text = io.TextIOWrapper(answer, encoding="utf-8", newline="")
        if format is Format.table and (names := text.readline()):
            output.print(Text(names.rstrip("\n"), style="bold"))
        shutil.copyfileobj(text, sys.stdout)


def _statement(query: str | None, file: Path | None) -> str:
    """The statement that was given in one of three ways."""
    if (query is None) == (file is None):
        raise InputError("give one statement: as QUERY, as `-` for standard input, or with --file")
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        return sys.stdin.read() if query == "-" else str(query)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the statement cannot be read from {file or 'standard input'}: {error}") from None


@command(app)
def view(store: StoreArgument, dump: DumpArgument) -> None:
    """Print SQL that creates a dump's relations in any DuckDB, over the committed files.

    Example: `knowledge-store view knowledge/ smollm2-books > books.sql; duckdb -init books.sql`
    """
    typer.echo(_open(store).view(dump))


@command(app)
def export(
    store: StoreArgument,
    dump: DumpArgument,
    file: Annotated[Path, typer.Option("--output", help="The Parquet file to write; an existing one is never replaced.")],
    where: Annotated[str | None, typer.Option(help="A condition in SQL: only rows that meet it are written.")] = None,
    kind: Annotated[str | None, typer.Option(help="Which kind of knowledge, when the dump has several.")] = None,
) -> None:
    """Write a dump's knowledge as a Parquet file of plain columns, for pandas, polars and others.

    Example: `knowledge-store export knowledge/ smollm2-books --output books.parquet --where "is_target"`
    """
    rows = _open(store).export(file, dump, kind, where, TerminalReporter())
    output.print(f"{file}: {rows:,} rows, {byte_size(file.stat().st_size)}", markup=False)


@command(app)
def verify(
    store: StoreArgument,
    memory_limit: Annotated[float, typer.Option(help="For reading one shard, in GiB.")] = READING_LIMIT / 2**30,
) -> None:
    """Check every file: hashes, counts and the format's rules. Exit code 1 when anything is damaged.

    The store may come from anybody: it is read in a process of its own, which does not outlive its limits.

    Example: `knowledge-store verify knowledge/`
    """
    from knowledge_store.writing.isolated import verify_isolated

    try:
        found = verify_isolated(str(store), TerminalReporter(), memory_limit * 2**30)
    except LimitError as error:
        messages.print(f"Limits: {visible(str(error))}", style="red", markup=False)
        raise typer.Exit(DAMAGED) from None
    for sentence in found.notes:
        note(f"Note: {sentence}")
    for sentence in found.damage:
        messages.print(f"Damage: {visible(sentence)}", style="red", markup=False)
    checked = f"{found.dumps} dumps, {found.shards} shards, {found.positions:,} positions, {byte_size(found.bytes)}"
    if found.damage:
        note(f"{len(found.damage)} damaged or closed; sound: {checked}")
    if len(found.damage) > found.closed:
        note("Damaged shards are made again by the command that made the dump, with --repair: teacher-dump run … --repair")
    if found.damage:
        raise typer.Exit(DAMAGED)
    output.print(f"Sound: {checked}", markup=False)


@command(app)
def reindex(store: StoreArgument) -> None:
    """Build the index again from the commit records. Never needed: opening a store rebuilds a missing or outdated one.

    Example: `knowledge-store reindex knowledge/`
    """
    opened = _open(store, rebuild_index=True)
    for sentence in opened.closed.values():
        note(f"Closed: {sentence}")
    shards = sum(summary.shards for summary in opened.info())
    output.print(f"Indexed {shards:,} shards of {len(opened.dumps)} dumps", markup=False)


@command(app)
def remove(
    store: StoreArgument,
    dump: DumpArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a dump, after asking.

    Example: `knowledge-store remove knowledge/ smollm2-books`
    """
    opened = _open(store)
    name = dump if dump in opened.closed else opened.dump(dump)
    held = "it cannot be read"
    for summary in opened.info():
        if summary.dump == name:
            held = f"{summary.positions:,} positions, {byte_size(summary.bytes)}"
    question = f"Remove {name}: {held}, for good?"
    if not yes and not typer.confirm(question, default=False, err=True):
        note("Nothing was removed")
        raise typer.Exit(1)
    opened.remove(name)
    output.print(f"Removed {name}", markup=False)


@command(app)
def rename(
    store: StoreArgument,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The dump's name.", autocompletion=_dump_names)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
) -> None:
    """Rename a dump, in a store that is a local folder.

    Nothing may write to the dump at the same time. A rename that was cut off is finished by the same command.

    Example: `knowledge-store rename knowledge/ smollm2-books books`
    """
    _open(store).rename(old, new)
    output.print(f"Renamed {old} to {new}", markup=False)


@command(app)
def copy(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The store to copy from.")],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="The store to copy to; made when missing.")],
    dump: Annotated[str | None, typer.Option("--dump", help="Copy this dump alone.")] = None,
) -> None:
    """Copy the committed shards of dumps into another store; each file's digest is checked on the way.

    The same command again resumes a copy that was cut off, and copies the shards that were committed since.

    Example: `knowledge-store copy knowledge/ /mnt/archive/knowledge/ --dump smollm2-books`
    """
    from knowledge_store.writing.copy import copy as copy_dumps

    copied = copy_dumps(source, destination, dump, TerminalReporter())
    existing = f", {copied.existing:,} existed already" if copied.existing else ""
    names = ", ".join(copied.dumps) or "no dump"
    output.print(f"Copied {names}: {copied.shards:,} shards, {byte_size(copied.bytes)}{existing}", markup=False)


@command(app)
def sequence(
    store: StoreArgument,
    sequence_id: Annotated[int, typer.Argument(metavar="ID", help="A sequence_id.")],
    dump: DumpOption = None,
) -> None:
    """Show one sequence as a person reads it: each token, and what the teacher expected there.

    Example: `knowledge-store sequence knowledge/ 65536`
    """
    opened = _open(store)
    name = opened.dump(dump)
    ids = opened.sequences(name)["sequence_id"].to_numpy()
    ordinal = int(ids.searchsorted(sequence_id))
    if ordinal == len(ids) or ids[ordinal] != sequence_id:
        raise InputError(f"dump {name!r} has no sequence {sequence_id}: `SELECT sequence_id FROM sequences` lists them")
    for header, rows in opened.shown(ordinal, name):
        for number, line in enumerate(aligned(header, rows)):
            output.print(Text(line, style="" if number else "bold"))


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command. SIGTERM ends it as Ctrl-C does: unfinished files are removed."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


if __name__ == "__main__":
    main()
