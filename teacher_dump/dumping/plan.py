"""The plan of a dump: its manifest, whether new or standing already, and the sequences and batches of each shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from knowledge_store.calibration.file import check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.layout import MANIFEST_FILE
from knowledge_store.format.manifest import Manifest, read_manifest
from knowledge_store.kinds.positions import PositionsParameters
from knowledge_store.storage import open_storage
from knowledge_store.storage.local import disk_errors
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.corpus.documents import (
    SUFFIXES_READ_THROUGH,
    Document,
    check_files,
    file_names,
    problem_text,
    read_documents,
)
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.scan import column_value, scan
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence
from teacher_dump.dumping.configuration import QUANTISATION_STEP, DumpConfig
from teacher_dump.dumping.fingerprints import file_sha256
from teacher_dump.teachers.local import Teacher, describe_tokenizer


def check_options(config: DumpConfig, teacher: Teacher) -> None:
    """Make sure the options fit the teacher, and the corpus files are there.

    Raises:
        InputError: naming what does not fit.
    """
    most = {"top-k": ("--top-k", config.top_k), "top-p": ("--max-k", config.max_k)}.get(config.selection)
    if most is not None and most[1] > teacher.vocabulary_size:
        raise InputError(f"{most[0]} {most[1]} is above the teacher's vocabulary of {teacher.vocabulary_size:,} tokens")
    positions = teacher.description["max_positions"]
    if positions is not None and config.max_length > positions:
        raise InputError(f"--max-length {config.max_length} is above the {positions} positions the teacher knows")
    check_files(config.corpus)


def identity_manifest(config: DumpConfig, teacher: Teacher) -> Manifest:
    """The manifest of the dump that `config` asks for, with nothing derived yet."""
    files = [
        {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in zip(file_names(config.corpus), config.corpus, strict=True)
    ]
    return Manifest(
        dump=config.dump_name,
        kinds={name: _parameters(name, config, teacher) for name in config.kinds},
        teacher=teacher.description,
        tokenizer=describe_tokenizer(teacher.tokenizer),
        corpus={"files": files},
        plan={
            "max_length": config.max_length,
            "shard_size": config.shard_size,
            "part_characters": config.part_characters,
        },
        derived={},
    )


def _parameters(kind: str, config: DumpConfig, teacher: Teacher) -> dict[str, Any]:
    """The record of a kind's parameters. InputError: the calibration belongs to another teacher or tokenizer."""
    if kind != "positions":
        return {}
    calibration = _calibration(config, teacher)
    return PositionsParameters(config.rule, QUANTISATION_STEP, calibration, config.keep_context).to_record()


def _calibration(config: DumpConfig, teacher: Teacher) -> dict[str, Any]:
    """What the manifest says of the dump's calibration. InputError: it belongs to another teacher or tokenizer."""
    if config.calibration is None:
        return {}
    calibration = read_calibration(config.calibration)
    check_calibration(calibration, teacher.description, describe_tokenizer(teacher.tokenizer))
    return calibration.to_manifest()


def make_manifest(config: DumpConfig, teacher: Teacher, anew: bool = False) -> Manifest:
    """The manifest of a dump. The corpus is scanned only where no such dump stands yet, or `anew`.

    Raises:
        InputError: the corpus cannot be used, or an option does not fit the teacher.
    """
    check_options(config, teacher)
    manifest = identity_manifest(config, teacher)
    folder = config.store / config.dump_name
    with disk_errors("read", folder):
        begun = (folder / MANIFEST_FILE).is_file()
    if begun and not anew:
        standing = read_manifest(open_storage(config.store), config.dump_name)
        if standing.differences(manifest):
            return manifest  # the writer refuses it, and says what differs
        _check_bad_rows(config, standing.derived["bad_rows"], standing.derived["first_problem"])
        return standing
    return replace(manifest, derived=_scan_corpus(config))


def _scan_corpus(config: DumpConfig) -> dict[str, Any]:
    # Characters are not known before they are read; for plain text bytes are close, and nothing hangs on it.
    size = sum(path.stat().st_size for path in config.corpus) if all(_plain(path.name) for path in config.corpus) else None
    with progress_bar("reading the corpus", size) as advance:
        found = scan(config.corpus, config.shard_size, config.part_characters, advance)
    _check_bad_rows(config, found.bad_rows, found.first_problem)
    if not any(shard.characters for shard in found.shards):
        raise InputError(f"the corpus has no row that can be used: {found.first_problem or 'it has no text'}")
    return {
        "documents": found.documents,
        "bad_rows": found.bad_rows,
        "first_problem": found.first_problem,
        "columns": found.columns,
        "shards": [asdict(start) for start in found.shards],
    }


def _plain(name: str) -> bool:
    return name.endswith((".txt", ".jsonl"))


def _check_bad_rows(config: DumpConfig, bad_rows: int, first_problem: str | None) -> None:
    if bad_rows and not config.skip_bad_rows:
        more = f" ({bad_rows - 1} more rows cannot be used)" if bad_rows > 1 else ""
        raise InputError(f"{first_problem}{more}. Mend the corpus, or pass --skip-bad-rows to leave such rows out")


@dataclass(frozen=True)
class ShardInput:
    """The sequences of one shard, in order, and the rows that were left out."""

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


class ShardReader:
    """Reads and tokenises shards.

    A shard that follows the last one read goes on from there, and so does any later one of a file that cannot be entered in
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
                found = self._tokenizer.sequences(document)
                sequences.extend(found)
                if not found:
                    skipped.append({"file": names[document.file], "row": document.row, "reason": "no text to learn from"})
            except BadRow as reason:
                if not config.skip_bad_rows:
                    place = problem_text(config.corpus, document.file, document.row, str(reason))
                    raise InputError(
                        f"{place}. Pass --skip-bad-rows to leave such rows out, or mend it and dump under another --name"
                    ) from None
                skipped.append({"file": names[document.file], "row": document.row, "reason": str(reason)})
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


def length_batches(lengths: list[int], room: int) -> list[np.ndarray]:
    """Batches of sequences of like length, longest first: each has at most `room` positions, padding included.

    A longest-first order meets the largest batch at once, so that a device too small for it fails at the start.
    """
    batches: list[np.ndarray] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > room:
            batches.append(np.array(batch))
            batch = []
        batch.append(index)
    return [*batches, np.array(batch)] if batch else batches


def corpus_columns(manifest: Manifest, sequence: TokenSequence) -> dict[str, Any]:
    """The corpus's own columns of a sequence's row, as the types they are stored with."""
    own = sequence.document.columns or {}
    return {name: column_value(own.get(name), kind) for name, kind in manifest.derived["columns"].items()}
