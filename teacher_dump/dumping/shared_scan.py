"""Looking through a corpus together: workers that begin a dump each take pieces of its corpus, and share through the store what
they find, until all of it is there. It stays when they are killed, so that others go on from there.

A worker marks a piece as begun before it reads it, and takes those first that nobody has begun. One that was begun and is not
done after a while is taken again: whoever began it may be gone. Nothing is replaced, so two workers at one piece do no harm.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pyarrow as pa

from knowledge_store.errors import DamageError, MissingFileError, StoreError
from knowledge_store.format.corpus_counts import COUNTS_SHAPE, CorpusCounts
from knowledge_store.format.integrity import FILE_SHAPE, FileRecord, TableFile
from knowledge_store.format.layout import FORMAT_NAME, FORMAT_VERSION, scan_file, scan_folder
from knowledge_store.format.manifest import Manifest, manifest_exists, read_manifest
from knowledge_store.format.parquet import COUNTING, Columns, publish_table, read_table
from knowledge_store.format.records import check_shape, json_sha256, read_record, seal
from knowledge_store.reporter import Advance, Reporter
from knowledge_store.storage import Storage, contents
from knowledge_store.writing.writer import create_store
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.chat.rendering import Renderer
from teacher_dump.corpus.pieces import MAX_PIECE_BYTES, MIN_PIECE_BYTES, PIECES
from teacher_dump.corpus.scan import DOCUMENT_COLUMNS, PieceScan, Scan, Scanner, ScanSum
from teacher_dump.corpus.sources import corpus_record
from teacher_dump.corpus.tokenisation import describe_tokenizer
from teacher_dump.dumping.request import plan_record
from teacher_dump.extraction import kinds_with_context

PATIENCE = 10.0  # seconds, at least, until a piece that another worker has begun is taken again
SLOWER = 3  # how much longer than the longest of this worker's pieces that may take
LOOK_EVERY = 0.5  # seconds between looks for what others have done

DOCUMENTS_SCHEMA = pa.schema([(name, pa.int64()) for name in DOCUMENT_COLUMNS])
_COLUMNS = Columns(dict.fromkeys(DOCUMENT_COLUMNS, COUNTING), dict.fromkeys(DOCUMENT_COLUMNS, 3), DOCUMENT_COLUMNS)
_SHAPE = {"documents": FILE_SHAPE, "lines": int, "columns": dict, "counts": COUNTS_SHAPE, "columns_read": [str], "notes": [str]}


@dataclass(frozen=True)
class Sharing:
    """With whom a corpus is looked through: the workers that have this store; this one is `rank` of `world_size`."""

    storage: Storage
    rank: int
    world_size: int

    def pays(self, pieces: int) -> bool:
        """Whether anything is to be shared of a corpus of so many pieces, or to be kept for when this worker is killed."""
        return pieces > 1 or self.world_size > 1


class _Done(Exception):
    """Another worker has done the piece that is being scanned."""


class _Begun(Exception):
    """Another worker has put all pieces together, and begun the dump."""


def shared_scan(
    config: DumpConfig, scanner: Scanner, chat: ChatOptions, sharing: Sharing, reporter: Reporter
) -> tuple[Scan, list[str]] | Manifest:
    """Look through a corpus together with other workers.

    Args:
        config: of the dump.
        scanner: of its corpus.
        chat: how conversations are rendered.
        sharing: this worker among all.
        reporter: hears of progress.

    Returns:
        what was found, as of `scan`; or the dump's manifest, where another worker has published it meanwhile.

    Raises:
        InputError: the corpus cannot be used.
        DamageError: what was found in a piece is damaged; says what to remove.
        StoreError: the store cannot be written.
    """
    pieces = _Pieces(config, scanner, sharing, scan_folder(config.dump_name, _key(config, scanner, chat, reporter)))
    create_store(sharing.storage)
    try:
        with reporter.progress("looking through the corpus", sum(scanner.sizes)) as advance:
            pieces.scan(advance)
        found = ScanSum(config.shard_size, config.too_long)
        for piece in range(len(scanner.pieces)):
            found.add(pieces.read(piece))
        return found.whole, list(found.notes)
    except _Begun:
        return read_manifest(sharing.storage, config.dump_name)
    except (DamageError, StoreError):
        if not manifest_exists(sharing.storage, config.dump_name):
            raise
        return read_manifest(sharing.storage, config.dump_name)  # with it, what was found is removed


def _key(config: DumpConfig, scanner: Scanner, chat: ChatOptions, reporter: Reporter) -> str:
    """The SHA-256 of everything that decides what is found in a piece."""
    tokenizer = scanner.tokenizer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    dated = config.template_date is not None or Renderer(tokenizer, chat).asks_for_date()
    return json_sha256(
        {
            "format": FORMAT_VERSION,
            "corpus": corpus_record(config.corpus, reporter=reporter),
            "columns": config.column_names,
            "plan": {**plan_record(config, chat.record(dated)), **({"groups": True} if scanner.groups else {})},
            "tokenizer": describe_tokenizer(tokenizer),
            "tokenizer_backend": None if backend is None else json_sha256(backend.to_str()),
            "vocabulary_size": scanner.vocabulary_size,
            "with_context": list(kinds_with_context(config.kinds)),
            "pieces": [PIECES, MIN_PIECE_BYTES, MAX_PIECE_BYTES],
            "versions": {name: version(name) for name in ("transformers", "tokenizers")},
        }
    )


class _Pieces:
    """The pieces of a corpus, scanned by several workers, each once if all live."""

    def __init__(self, config: DumpConfig, scanner: Scanner, sharing: Sharing, folder: str):
        self._dump, self._scanner, self._sharing, self._folder = config.dump_name, scanner, sharing, folder
        self._storage = sharing.storage
        self._longest = 0.0  # seconds that a piece took this worker

    def scan(self, advance: Advance) -> None:
        """Take pieces until all are done (_Begun: the dump has a manifest)."""
        count = len(self._scanner.pieces)
        share = list(range(self._sharing.rank % count, count, self._sharing.world_size))
        others = sorted(set(range(count)) - set(share))
        random.Random(self._sharing.rank).shuffle(others)
        done = self._done()
        for piece in done:
            advance(self._bytes(piece))
        waiting: dict[int, float] = {}
        for piece in share + others:
            if piece in done:
                continue
            self._check_begun()
            if self._storage.create(scan_file(self._folder, piece, "begun"), contents(_mark())):
                self._take(piece, advance)
            else:
                waiting[piece] = time.monotonic()
        for piece in self._until_done(waiting):
            advance(self._bytes(piece))

    def _until_done(self, waiting: dict[int, float]) -> Iterator[int]:
        """Wait for pieces that others have begun, and since when, and take what takes too long; yields each that is done."""
        alone = self._sharing.world_size == 1
        for piece in self._done() & waiting.keys():
            del waiting[piece]
            yield piece
        while waiting:
            self._check_begun()
            for piece in [piece for piece in waiting if self._is_done(piece)]:
                del waiting[piece]
                yield piece
            patience = 0.0 if alone else max(PATIENCE, SLOWER * self._longest)
            overdue = [piece for piece, since in waiting.items() if time.monotonic() - since >= patience]
            if overdue:
                self._take(overdue[0], lambda amount, **figures: None)
            elif waiting:
                time.sleep(LOOK_EVERY)

    def _bytes(self, piece: int) -> int:
        return self._scanner.bytes(self._scanner.pieces[piece])

    def _check_begun(self) -> None:
        if manifest_exists(self._storage, self._dump):
            raise _Begun

    def _done(self) -> set[int]:
        names = (entry.name.partition(".") for entry in self._storage.files(self._folder))
        return {int(stem) for stem, _, suffix in names if suffix == "json" and stem.isdecimal()}

    def _is_done(self, piece: int) -> bool:
        try:
            self._storage.size(scan_file(self._folder, piece, "json"))
        except MissingFileError:
            return False
        return True

    def _take(self, piece: int, advance: Advance) -> None:
        """Scan a piece and publish what was found, unless another worker is quicker."""
        began = looked = time.monotonic()

        def look(amount: float, **figures: str) -> None:
            nonlocal looked
            advance(amount, **figures)
            if time.monotonic() - looked >= LOOK_EVERY:
                looked = time.monotonic()
                if self._is_done(piece):
                    raise _Done

        with suppress(_Done):
            self._publish(piece, self._scanner.scan(self._scanner.pieces[piece], look))
        self._longest = max(self._longest, time.monotonic() - began)

    def _publish(self, piece: int, found: PieceScan) -> None:
        self._scanner.check_unchanged()  # the folder's name says of what it is
        table = pa.table([pa.array(column) for column in found.documents.T], schema=DOCUMENTS_SCHEMA)
        name = scan_file(self._folder, piece, "parquet")
        documents, _ = publish_table(self._storage, name, DOCUMENTS_SCHEMA, [table], _COLUMNS)
        record = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "documents": documents.as_dict(),
            "unnumbered": found.unnumbered,
            "ends_in": found.ends_in,
            "lines": found.lines,
            "columns": found.columns,
            "counts": found.counts.to_record(),
            "columns_read": list(found.columns_read),
            "notes": list(found.notes),
        }
        self._storage.create(scan_file(self._folder, piece, "json"), contents(seal(record)))

    def read(self, piece: int) -> PieceScan:
        """What was found in a piece (MissingFileError: it is not there any more)."""
        name = scan_file(self._folder, piece, "json")
        try:
            record = read_record(self._storage, name)
            try:
                check_shape(record, _SHAPE, "it")
                file = FileRecord.from_dict(record["documents"])
            except ValueError as error:
                raise DamageError(f"{self._storage.locate(name)} is damaged: {error}") from None
            table = read_table(TableFile(self._storage, scan_file(self._folder, piece, "parquet"), file, DOCUMENTS_SCHEMA))
        except MissingFileError:
            raise
        except DamageError as error:
            advice = f"remove {self._storage.locate(self._folder)}, and the corpus is looked through again"
            raise DamageError(f"{error}: {advice}") from None
        return PieceScan(
            documents=np.stack([table[column].to_numpy() for column in DOCUMENT_COLUMNS], axis=1),
            unnumbered=record["unnumbered"],
            ends_in=record["ends_in"],
            lines=record["lines"],
            columns=record["columns"],
            counts=CorpusCounts.from_record(record["counts"]),
            columns_read=tuple(record["columns_read"]),
            notes=tuple(record["notes"]),
        )


def _mark() -> bytes:
    """Who has begun a piece, for people to read."""
    return f"{platform.node()} {os.getpid()}\n".encode()
