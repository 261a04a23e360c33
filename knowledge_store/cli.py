"""The command `knowledge-store`: a thin layer over `KnowledgeStore` and `verify`."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from knowledge_store.configuration import (
    BrowseConfig,
    CopyConfig,
    ExportConfig,
    InfoConfig,
    OneDumpOptions,
    ReindexConfig,
    RemoveConfig,
    RenameConfig,
    SequenceConfig,
    ServeConfig,
    SqlConfig,
    VerifyConfig,
)
from knowledge_store.errors import InputError, LimitError
from knowledge_store.isolation.child import leave_out_pandas
from knowledge_store.quantities import amount, byte_size
from knowledge_store.sql.answers import Format, aligned, visible
from knowledge_store.sql.isolated import asked
from knowledge_store.sql.named_files import parse_named_files
from knowledge_store.sql.statement import Statement
from knowledge_store.storage import StorePlace, repairing
from knowledge_store.terminal.commands import Command, application, command
from knowledge_store.terminal.console import end_at_sigterm, messages, note, output
from knowledge_store.terminal.progress import TerminalReporter

if TYPE_CHECKING:
    from knowledge_store.catalogue.summary import DumpSummary
    from knowledge_store.store import KnowledgeStore

app = application("Query, verify and keep a store of a teacher's knowledge.")

NOT_SOUND = 1  # damaged, or not checked: then nothing is proven
SHOWN_SHARE = 0.005


def _open(store: StorePlace, **options: Any) -> KnowledgeStore:
    """The store, and with it the libraries that reading it takes: `sql` leaves both to its child."""
    from knowledge_store.store import KnowledgeStore

    return KnowledgeStore.open(store, reporter=TerminalReporter(), **options)


@command(app, InfoConfig)
def info(config: InfoConfig) -> None:
    """Show what a store holds: dumps, sizes, what was skipped or truncated, and what each kind of knowledge says of itself.

    Example: `knowledge-store info knowledge/`
    """
    opened = _open(config.store)
    summaries = opened.info()
    if opened.closed and not summaries:
        opened.dump(next(iter(opened.closed)))  # says why
    for sentence in opened.closed.values():
        note(f"Closed: {sentence}")
    if config.as_json:
        records = [{**summary.to_record(), "closed": None} for summary in summaries]
        records += [{"dump": name, "closed": sentence} for name, sentence in opened.closed.items()]
        typer.echo(json.dumps(records, indent=1, ensure_ascii=False))
        return
    if not summaries:
        note(f"{opened.storage.address} holds no dump yet")
    for summary in summaries:
        _print_summary(summary)


def _rows(summary: DumpSummary) -> list[str]:
    """What became of the corpus's rows: of all, as the manifest says, or else of those in the committed shards."""
    if summary.counts is not None:
        return [sentence.text for sentence in summary.counts.sentences(summary.max_length)]
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in summary.skip_reasons.items())
    sentences = [f"{summary.skipped_rows:,} rows left out: {reasons}"] if summary.skipped_rows else []
    return [*sentences, f"{summary.truncated:,} sequences cut"] if summary.truncated else sentences


def _conversations(chat: dict[str, Any]) -> str:
    """How conversations are rendered, as the plan says; it may come from anybody."""
    parts = [f"train on {chat['train_on']}"] if "train_on" in chat else []
    if "template_sha256" in chat:
        parts.append(f"a chat template of its own (SHA-256 {str(chat['template_sha256'])[:12]}…)")
    if "date" in chat:
        parts.append(f"template date {chat['date']}")
    return ", ".join(parts)


def _print_summary(summary: DumpSummary) -> None:
    shards = f"{summary.shards} of {summary.shards_planned} shards"
    lines = [
        ("teacher", f"{summary.teacher} (vocabulary {summary.vocabulary_size:,})"),
        ("documents", f"{summary.documents:,} of {summary.documents_planned:,}"),
        ("sequences", f"{summary.sequences:,} of at most {summary.max_length} tokens"),
        ("positions", amount(summary.positions)),
    ]
    if summary.groups is not None:
        lines.insert(2, ("groups", f"{summary.groups:,}, with an answer for each sequence"))
    for label, sentence in zip(("corpus", "", ""), _rows(summary), strict=False):
        lines.append((label, sentence))
    if summary.chat:
        lines.append(("conversations", _conversations(summary.chat)))
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


@command(app, SqlConfig, cls=_SqlCommand)
def sql(config: SqlConfig) -> None:
    """Answer one SELECT statement over `positions`, `candidates`, `sequences`, `tokens`, `shards` and `dumps`.

    It may come from anybody: it runs in a process of its own, can write nothing, read nothing but the store and the files that
    `--with` names, and not outlive its limits.

    Example: `knowledge-store sql knowledge/ "SELECT token_text, avg(tail_logprob) FROM positions GROUP BY 1 ORDER BY 2"`
    """
    statement = _statement(config.query, config.file)
    form, files = config.format, parse_named_files(config.files)
    limited = Statement(statement, config.memory_limit * 2**30, config.timeout, files=files, kept=True)
    with asked(str(config.store), limited, form.value, note) as answer:
        text = io.TextIOWrapper(answer, encoding="utf-8", newline="")
        if form is Format.table and (names := text.readline()):
            output.print(Text(names.rstrip("\n"), style="bold"))
        shutil.copyfileobj(text, sys.stdout)


def _statement(query: str | None, file: Path | None) -> str:
    """The statement that was given in one of three ways."""
    if (query is None) == (file is None):
        raise InputError("give one statement: as QUERY, as `-` for standard input, or with --file")
    if query is not None and query != "-":
        return query
    source = file or "standard input"
    try:
        return (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"the statement cannot be read from {source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the statement cannot be read from {source}: its byte {error.start} is not UTF-8; save it as UTF-8"
        ) from None


@command(app, OneDumpOptions)
def view(config: OneDumpOptions) -> None:
    """Print SQL that creates a dump's relations in any DuckDB, over the committed files.

    Example: `knowledge-store view knowledge/ smollm2-books > books.sql; duckdb -init books.sql`
    """
    typer.echo(_open(config.store).view(config.dump))


@command(app, ExportConfig)
def export(config: ExportConfig) -> None:
    """Write a dump's knowledge for other programs: a Parquet file of plain columns, or what other trainers learn from.

    Example: `knowledge-store export knowledge/ smollm2-books --output books.parquet --where "is_target"`
    """
    if config.format != "parquet" and (config.where is not None or config.kind is not None):
        raise InputError(f"--where and --kind choose rows of a Parquet file: leave them out with --format {config.format}")
    store = _open(config.store, **({} if config.format == "parquet" else {"cache_size": 0}))
    if missing := store.what_is_missing(config.dump):
        note(f"Warning: {missing}")
    if config.format == "distillkit":
        sequences = store.export_distillkit(config.output, config.dump, TerminalReporter())
        output.print(f"{config.output}: {sequences:,} sequences, and compression_config.yaml", markup=False)
        return
    if config.format == "dpo":
        exported = store.export_dpo(config.output, config.dump, TerminalReporter())
        output.print(f"{config.output}: {exported.pairs:,} pairs", markup=False)
        for reason, count in exported.left_out.most_common():
            note(f"{count:,} {'group' if count == 1 else 'groups'} left out: {reason}")
        return
    if config.format == "speculators":
        from knowledge_store.reading.speculators import draft_layers

        samples = store.export_speculators(config.output, config.dump, TerminalReporter())
        *layers, _ = draft_layers(store.manifest(config.dump))
        words = f"{config.output}: {samples:,} samples; train with --target-layer-ids {' '.join(map(str, layers))}"
        output.print(words, markup=False)
        return
    rows = store.export(config.output, config.dump, config.kind, config.where, TerminalReporter())
    output.print(f"{config.output}: {rows:,} rows, {byte_size(config.output.stat().st_size)}", markup=False)


@command(app, VerifyConfig)
def verify(config: VerifyConfig) -> None:
    """Check every file: hashes, counts and the format's rules. Exit code 1 when anything is damaged, or closed and not checked.

    The store may come from anybody: it is read in a process of its own, which does not outlive its limits.

    Example: `knowledge-store verify knowledge/`
    """
    from knowledge_store.writing.isolated import verify_isolated

    try:
        verification = verify_isolated(str(config.store), TerminalReporter(), config.memory_limit * 2**30)
    except LimitError as error:
        messages.print(f"Limits: {visible(str(error))}", style="red", markup=False)
        raise typer.Exit(NOT_SOUND) from None
    for sentence in verification.notes:
        note(f"Note: {sentence}")
    for sentence in verification.damage:
        messages.print(f"Damage: {visible(sentence)}", style="red", markup=False)
    for sentence in verification.closed:
        messages.print(f"Closed: {visible(sentence)}", style="red", markup=False)
    counts = f"{verification.dumps} dumps, {verification.shards} shards, {verification.positions:,} positions"
    checked = f"{counts}, {byte_size(verification.bytes)}"
    if not verification.sound:
        note(f"{len(verification.damage)} damaged, {len(verification.closed)} closed and not checked; sound: {checked}")
    if verification.damage:
        note(f"Damaged shards are made again by {repairing(config.store)}")
    if not verification.sound:
        raise typer.Exit(NOT_SOUND)
    output.print(f"Sound: {checked}", markup=False)


@command(app, ReindexConfig)
def reindex(config: ReindexConfig) -> None:
    """Build the index again from the commit records. Never needed: opening a store rebuilds a missing or outdated one.

    Example: `knowledge-store reindex knowledge/`
    """
    opened = _open(config.store, rebuild_index=True)
    if config.bundle:
        from knowledge_store.writing.bundles import replace_bundles

        for name in opened.dumps:
            output.print(
                f"Bundled {replace_bundles(opened.storage, opened.manifest(name)):,} commit records of {name}", markup=False
            )
    for sentence in opened.closed.values():
        note(f"Closed: {sentence}")
    shards = sum(summary.shards for summary in opened.info())
    output.print(f"Indexed {shards:,} shards of {len(opened.dumps)} dumps", markup=False)


@command(app, RemoveConfig)
def remove(config: RemoveConfig) -> None:
    """Remove a dump, after asking.

    Example: `knowledge-store remove knowledge/ smollm2-books`
    """
    opened = _open(config.store)
    name = opened.removable(config.dump)
    held = "it cannot be read"
    for summary in opened.info():
        if summary.dump == name:
            held = f"{summary.positions:,} positions, {byte_size(summary.bytes)}"
    question = f"Remove {name}: {held}, for good?"
    if not config.yes and not typer.confirm(question, default=False, err=True):
        note("Nothing was removed")
        raise typer.Exit(1)
    opened.remove(name)
    output.print(f"Removed {name}", markup=False)


@command(app, RenameConfig)
def rename(config: RenameConfig) -> None:
    """Rename a dump, in a store that is a local folder.

    Nothing may write to the dump at the same time. A rename that was cut off is finished by the same command.

    Example: `knowledge-store rename knowledge/ smollm2-books books`
    """
    _open(config.store).rename(config.old, config.new)
    output.print(f"Renamed {config.old} to {config.new}", markup=False)


@command(app, CopyConfig)
def copy(config: CopyConfig) -> None:
    """Copy the committed shards of dumps into another store; each file's digest is checked on the way.

    The same command again resumes a copy that was cut off, and copies the shards that were committed since.

    Example: `knowledge-store copy knowledge/ /mnt/archive/knowledge/ --dump smollm2-books`
    """
    from knowledge_store.writing.copy import copy as copy_dumps

    copied = copy_dumps(config.source, config.destination, config.dump, TerminalReporter(), repair=config.repair)
    existing = f", {copied.existing:,} existed already and were checked" if copied.existing else ""
    names = ", ".join(copied.dumps) or "no dump"
    output.print(f"Copied {names}: {copied.shards:,} shards, {byte_size(copied.bytes)}{existing}", markup=False)


@command(app, SequenceConfig)
def sequence(config: SequenceConfig) -> None:
    """Show one sequence as a person reads it: each token, and what the teacher expected there.

    Example: `knowledge-store sequence knowledge/ 65536`
    """
    opened = _open(config.store)
    name = opened.dump(config.dump)
    ids = opened.sequences(name)["sequence_id"].to_numpy()
    ordinal = int(ids.searchsorted(config.sequence_id))
    if ordinal == len(ids) or ids[ordinal] != config.sequence_id:
        raise InputError(f"dump {name!r} has no sequence {config.sequence_id}: `SELECT sequence_id FROM sequences` lists them")
    for header, rows in opened.shown(ordinal, name):
        for number, line in enumerate(aligned(header, rows)):
            output.print(Text(line, style="" if number else "bold"))


@command(app, BrowseConfig)
def browse(config: BrowseConfig) -> None:
    """Look into a store with a browser: its dumps, sequences token by token, questions, SQL. Ctrl-C ends it.

    The page is for this machine alone. With `--with`, it shows students beside their teacher.

    Example: `knowledge-store browse knowledge/ --with student=positions.parquet`
    """
    try:
        from knowledge_store.page.browse import browse as serve_page
        from knowledge_store.page.browse import listen
    except ImportError as error:
        raise InputError(f"`browse` needs {error.name}: pip install 'knowledge-store[serve]'") from None
    files = parse_named_files(config.files)
    opened = _open(config.store)
    with listen(config.bind) as listening:
        serve_page(opened, listening, files, lambda address: note(f"The page is at {address} (Ctrl-C ends it)"), config.open)


@command(app, ServeConfig)
def serve(config: ServeConfig) -> None:
    """Serve stores over the network, to this package and to any ADBC client. Ends at Ctrl-C or SIGTERM.

    A client opens `grpc+tls://HOST:PORT` with a token. Nothing is ever written. Standard error gets a JSON line for each call.

    Example: `knowledge-store serve knowledge/ --token-file tokens`
    """
    # Arrow looks at it when it is imported. The system's pool gives back what Arrow's own one keeps, some 25 MiB.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    from knowledge_store.serving.service import serve as serve_stores

    def log(line: str) -> None:
        sys.stderr.write(f"{line}\n")  # in one piece: calls end in threads of their own
        sys.stderr.flush()

    def ready(sentence: str) -> None:
        print(sentence, flush=True)

    if not serve_stores(config, log, ready):
        os._exit(0)  # and not wait for a client that takes nothing


def main() -> None:
    """Entry point of the command. SIGTERM ends it as Ctrl-C does: unfinished files are removed."""
    end_at_sigterm()
    leave_out_pandas()
    app()


if __name__ == "__main__":
    main()
