"""The plan of a dump: its manifest, whether new or existing, and the sequences of each shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError, MismatchError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.kind import Parameters
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.configuration import CorpusOptions, DumpConfig, EstimateConfig
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.chat.rendering import Renderer
from teacher_dump.corpus.documents import SUFFIXES_READ_THROUGH, Document, check_files, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.scan import column_value
from teacher_dump.corpus.sources import corpus_record
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence, describe_tokenizer
from teacher_dump.dumping.inspection import look_through
from teacher_dump.dumping.request import chat_asked, check_length, corpus_groups, parameters_asked, plan_record
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.fingerprints import file_sha256, file_stamps
from teacher_dump.teachers.protocol import Teacher


def corpus_files(config: CorpusOptions, files: tuple[Path, ...], teacher: Teacher, reporter: Reporter) -> list[dict[str, Any]]:
    """What a manifest says of a corpus that a teacher is asked about (see `corpus_record`).

    Raises:
        InputError: a file cannot be used, or the sequences are longer than the teacher knows positions.
    """
    check_length(config, teacher.description)
    check_files(files)
    return corpus_record(files, reporter=reporter)


def identity_manifest(
    config: EstimateConfig, teacher: Teacher, dump: str, chat: ChatOptions, *, reporter: Reporter = SILENT
) -> Manifest:
    """The manifest of the dump that `config` asks for, with nothing derived yet.

    Args:
        config, teacher, dump: what is asked, of whom, and the dump's name.
        chat: how conversations are rendered.
        reporter: hears of progress.

    Raises:
        InputError: the corpus cannot be used, or an option does not fit the teacher.
    """
    dated = config.template_date is not None or Renderer(teacher.tokenizer, chat).asks_for_date()
    files = corpus_files(config, config.corpus, teacher, reporter)
    groups = corpus_groups(config)
    if config.like is not None and config.like.has_groups != bool(groups):
        has, other = ("are groups of answers", "are not") if groups else ("are no groups of answers", "are")
        raise InputError(
            f"the rows of {config.corpus[0]} {has}, and those of the dump {config.like.dump} {other}: give it a --name of its"
            " own instead of --append"
        )
    return Manifest(
        dump=dump,
        kinds={name: _parameters(name, config, teacher).to_record() for name in config.kinds},
        teacher=teacher.description,
        tokenizer=describe_tokenizer(teacher.tokenizer),
        corpus={"files": files, "columns": config.column_names},
        plan={**plan_record(config, chat.record(dated)), **groups},
        derived={},
    )


def _parameters(kind: str, config: EstimateConfig, teacher: Teacher) -> Parameters:
    if config.like is None:  # else they fitted this teacher before
        EXTRACTORS[kind].check(config.kind_options(kind), teacher.description, describe_tokenizer(teacher.tokenizer))
    return parameters_asked(config, kind)


def kept_parameters(manifest: Manifest) -> dict[str, Parameters]:
    """The parameters of each kind of a dump."""
    return {name: KINDS[name].parameters.from_record(record) for name, record in manifest.kinds.items()}


def make_manifest(
    config: DumpConfig,
    teacher: Teacher,
    chat: ChatOptions | None = None,
    derived: dict[str, Any] | None = None,
    *,
    reporter: Reporter = SILENT,
) -> Manifest:
    """The manifest of the dump that `config` asks for.

    Args:
        config: of the dump.
        teacher: that is loaded.
        chat: how conversations are rendered; as in a dump that begins today without it.
        derived: what `look_through` gave; None to look through the corpus now.
        reporter: hears of progress.

    Raises:
        InputError: the corpus cannot be used, or an option does not fit the teacher.
    """
    chat = chat or chat_asked(config)
    manifest = identity_manifest(config, teacher, config.dump_name, chat, reporter=reporter)
    return replace(manifest, derived=derived or look_through(config, teacher.tokenizer, chat, reporter=reporter))


@dataclass(frozen=True)
class ShardInput:
    """The sequences of one shard, in order, and the rows that were skipped."""

    shard: int
    first_document: int
    documents: int
    sequences: list[TokenSequence]
    skipped: list[dict[str, Any]]

    @property
    def positions(self) -> int:
        """Tokens in all its sequences."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def _skipped(file: str, row: int, problem: BadRow) -> dict[str, Any]:
    """What a commit record says of a skipped row."""
    detail = {"detail": str(problem)} if str(problem) != problem.reason else {}
    return {"file": file, "row": row, "reason": problem.reason, **detail}


class ShardReader:
    """Reads and tokenises shards.

    A shard that follows the last one read is read from there on, and so is any later one of a file that cannot be entered in
    the middle (a compressed one, or a Parquet row group): a corpus is then read once, not once for each shard.
    """

    def __init__(self, config: DumpConfig, manifest: Manifest, tokenizer: CorpusTokenizer):
        self._config, self._manifest, self._tokenizer = config, manifest, tokenizer
        self._stamps = file_stamps(config.corpus)
        self._documents: Iterator[Document] = iter(())
        self._next: Document | None = None

    def read(self, shard: int) -> ShardInput:
        """The sequences of one shard. Rows that cannot be used are left out: `look_through` has seen that they may be.

        Raises:
            MismatchError: it has another number of tokens than when the corpus was looked through, or a file was changed since.
        """
        derived = self._manifest.derived
        starts = derived["shards"]
        start = Start(**starts[shard])
        end = starts[shard + 1]["document"] if shard + 1 < len(starts) else derived["documents"]
        names = [file["name"] for file in self._manifest.corpus["files"]]
        sequences: list[TokenSequence] = []
        skipped: list[dict[str, Any]] = []
        self._go_to(start)
        while (document := self._next) is not None and document.number < end:
            try:
                sequences.extend(self._tokenizer.sequences(document))
            except BadRow as problem:
                skipped.append(_skipped(names[document.file], document.row, problem))
            self._next = next(self._documents, None)
        self._check_files(start.file, starts[shard + 1]["file"] if shard + 1 < len(starts) else len(names) - 1)
        shard_input = ShardInput(shard, start.document, end - start.document, sequences, skipped)
        if shard_input.positions != start.positions:
            raise MismatchError(
                f"shard {shard} has {shard_input.positions:,} tokens, and had {start.positions:,} when the corpus was looked"
                " through: use the versions of transformers and tokenizers that began the dump, or give this one another --name"
            )
        return shard_input

    def _check_files(self, first: int, last: int) -> None:
        """Make sure that some files were not changed while they were read (MismatchError: one was)."""
        part = slice(first, last + 1)
        for number, (path, stamp) in enumerate(
            zip(self._config.corpus[part], file_stamps(self._config.corpus[part]), strict=True), first
        ):
            if stamp == self._stamps[number]:
                continue
            if file_sha256(path) != self._manifest.corpus["files"][number]["sha256"]:
                raise MismatchError(
                    f"{path} was changed since the dump was begun: put it back and resume, or give a dump of what it is now"
                    " another --name"
                )
            self._stamps[number] = stamp

    def _go_to(self, start: Start) -> None:
        document = self._next
        follows = document is not None and document.number == start.document
        passes = document is not None and document.number < start.document and document.file == start.file
        if not follows and not (passes and self._config.corpus[start.file].suffix in SUFFIXES_READ_THROUGH):
            self._documents = read_documents(
                self._config.corpus, start, self._config.part_characters, self._config.column_names
            )
            self._next = next(self._documents, None)
        while self._next is not None and self._next.number < start.document:
            self._next = next(self._documents, None)


def corpus_columns(manifest: Manifest, sequence: TokenSequence) -> dict[str, Any]:
    """The corpus's own columns of a sequence's row, as the types they are stored with."""
    columns = sequence.document.columns or {}
    return {name: column_value(columns.get(name), kind) for name, kind in manifest.derived["columns"].items()}
