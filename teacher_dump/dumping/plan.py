"""The plan of a dump: its manifest, whether new or existing, and the sequences of each shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.kind import Parameters
from knowledge_store.quantities import counted
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.configuration import CorpusOptions, DumpConfig, EstimateConfig
from teacher_dump.corpus.chat.rendering import Renderer
from teacher_dump.corpus.documents import SUFFIXES_READ_THROUGH, Document, check_files, problem_text, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.scan import column_value, scan
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence, describe_tokenizer
from teacher_dump.dumping.request import chat_asked, check_length, parameters_asked
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.fingerprints import corpus_record
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
    config: EstimateConfig, teacher: Teacher, dump: str, existing: Manifest | None = None, *, reporter: Reporter = SILENT
) -> Manifest:
    """The manifest of the dump that `config` asks for, with nothing derived yet.

    Args:
        config, teacher, dump: what is asked, of whom, and the dump's name.
        existing: the dump's manifest, where it has been begun.
        reporter: hears of progress.

    Raises:
        InputError: the corpus cannot be used, or an option does not fit the teacher.
    """
    chat = chat_asked(config, existing)
    dated = config.template_date is not None or Renderer(teacher.tokenizer, chat).asks_for_date()
    return Manifest(
        dump=dump,
        kinds={name: _parameters(name, config, teacher).to_record() for name in config.kinds},
        teacher=teacher.description,
        tokenizer=describe_tokenizer(teacher.tokenizer),
        corpus={"files": corpus_files(config, config.corpus, teacher, reporter)},
        plan={
            "max_length": config.max_length,
            "shard_size": config.shard_size,
            "part_characters": config.part_characters,
            "chat": chat.record(dated),
        },
        derived={},
    )


def _parameters(kind: str, config: EstimateConfig, teacher: Teacher) -> Parameters:
    EXTRACTORS[kind].check(config.kind_options(kind), teacher.description, describe_tokenizer(teacher.tokenizer))
    return parameters_asked(config, kind)


def kept_parameters(manifest: Manifest) -> dict[str, Parameters]:
    """The parameters of each kind of a dump."""
    return {name: KINDS[name].parameters.from_record(record) for name, record in manifest.kinds.items()}


def corpus_tokenizer(config: CorpusOptions, teacher: Teacher, manifest: Manifest | None = None) -> CorpusTokenizer:
    """What makes sequences of a corpus's documents, as the options and a dump's manifest say.

    Raises:
        InputError: there is no room for text, or the file of the chat template cannot be used.
    """
    return CorpusTokenizer(teacher.tokenizer, config.max_length, chat_asked(config, manifest))


def make_manifest(
    config: DumpConfig, teacher: Teacher, existing: Manifest | None = None, *, reporter: Reporter = SILENT
) -> Manifest:
    """The manifest of a dump: the one that exists, where it is the same dump; else a new one, for which the corpus is scanned.

    Raises:
        InputError: the corpus cannot be used, or an option does not fit the teacher.
    """
    manifest = identity_manifest(config, teacher, config.dump_name, existing, reporter=reporter)
    if existing is None:
        return replace(manifest, derived=_scan_corpus(config, reporter))
    if existing.differences(manifest):
        return manifest  # which is refused: see `mismatch`
    _check_bad_rows(config, existing.derived["bad_rows"], existing.derived["first_problem"])
    return existing


def _scan_corpus(config: DumpConfig, reporter: Reporter) -> dict[str, Any]:
    with reporter.progress("reading the corpus", sum(path.stat().st_size for path in config.corpus)) as advance:
        scanned = scan(config.corpus, config.shard_size, config.part_characters, advance)
    _check_bad_rows(config, scanned.bad_rows, scanned.first_problem)
    if not any(shard.characters for shard in scanned.shards):
        raise InputError(f"the corpus has no row that can be used: {scanned.first_problem or 'it has no text'}")
    return {
        "documents": scanned.documents,
        "bad_rows": scanned.bad_rows,
        "first_problem": scanned.first_problem,
        "columns": scanned.columns,
        "shards": [asdict(start) for start in scanned.shards],
    }


def _check_bad_rows(config: DumpConfig, bad_rows: int, first_problem: str | None) -> None:
    # At least: which rows the tokenizer refuses is known once their shards are read.
    if bad_rows and not config.skip_bad_rows:
        more = f" (at least {counted(bad_rows - 1, 'more row', 'more rows')} cannot be used)" if bad_rows > 1 else ""
        raise InputError(f"{first_problem}{more}. Repair the corpus, or pass --skip-bad-rows to leave such rows out")


@dataclass(frozen=True)
class ShardInput:
    """The sequences of one shard, in order, and the rows that were skipped."""

    shard: int
    first_document: int
    documents: int
    characters: int
    sequences: list[TokenSequence]
    skipped: list[dict[str, Any]]

    @property
    def positions(self) -> int:
        """Tokens in all its sequences."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def _skipped(file: str, row: int, problem: str) -> dict[str, Any]:
    """What a commit record says of a skipped row; `reason` has no numbers or quotations in it, so that it can be counted by."""
    reason = problem.split(" (")[0].split(": ")[0]
    return {"file": file, "row": row, "reason": reason, **({"detail": problem} if problem != reason else {})}


class ShardReader:
    """Reads and tokenises shards.

    A shard that follows the last one read is read from there on, and so is any later one of a file that cannot be entered in
    the middle (a compressed one, or a Parquet row group): a corpus is then read once, not once for each shard.
    """

    def __init__(self, config: DumpConfig, manifest: Manifest, tokenizer: CorpusTokenizer):
        self._config, self._manifest, self._tokenizer = config, manifest, tokenizer
        self._documents: Iterator[Document] = iter(())
        self._next: Document | None = None

    def read(self, shard: int) -> ShardInput:
        """The sequences of one shard.

        Raises:
            InputError: a row cannot be used and is not to be skipped; names file and line.
        """
        config, derived = self._config, self._manifest.derived
        starts = derived["shards"]
        start = Start(**starts[shard])
        end = starts[shard + 1]["document"] if shard + 1 < len(starts) else derived["documents"]
        names = [file["name"] for file in self._manifest.corpus["files"]]
        sequences: list[TokenSequence] = []
        skipped: list[dict[str, Any]] = []
        self._go_to(start)
        while (document := self._next) is not None and document.number < end:
            try:
                own = self._tokenizer.sequences(document)
                sequences.extend(own)
                if not own:
                    skipped.append(_skipped(names[document.file], document.row, "no text to learn from"))
            except BadRow as reason:
                if not config.skip_bad_rows:
                    place = problem_text(config.corpus, document.file, document.row, str(reason))
                    raise InputError(
                        f"{place}. Pass --skip-bad-rows to leave such rows out, or repair it and dump under another --name"
                    ) from None
                skipped.append(_skipped(names[document.file], document.row, str(reason)))
            self._next = next(self._documents, None)
        return ShardInput(shard, start.document, end - start.document, start.characters, sequences, skipped)

    def _go_to(self, start: Start) -> None:
        here = self._next
        follows = here is not None and here.number == start.document
        passes = here is not None and here.number < start.document and here.file == start.file
        if not follows and not (passes and self._config.corpus[start.file].suffix in SUFFIXES_READ_THROUGH):
            self._documents = read_documents(self._config.corpus, start, self._config.part_characters)
            self._next = next(self._documents, None)
        while self._next is not None and self._next.number < start.document:
            self._next = next(self._documents, None)


def corpus_columns(manifest: Manifest, sequence: TokenSequence) -> dict[str, Any]:
    """The corpus's own columns of a sequence's row, as the types they are stored with."""
    own = sequence.document.columns or {}
    return {name: column_value(own.get(name), kind) for name, kind in manifest.derived["columns"].items()}
