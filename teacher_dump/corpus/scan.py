"""A corpus looked through before it is dumped: every row is tokenised and counted, and where each shard begins is noted, so
that a worker goes straight to its shard.

It is looked through piece by piece, each for itself and in any order. What was found is then put together in the order of the
pieces, and is what one look through the whole would have found.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.reporter import Advance
from teacher_dump.corpus.documents import Document, place_text, read_documents
from teacher_dump.corpus.pieces import Piece, PlacedPiece, cut_corpus, place_piece
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.tally import MAX_PIECE_REASONS, Tally
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence
from teacher_dump.fingerprints import check_unchanged, file_stamps

FIGURES_EVERY = 64  # documents
DOCUMENT_COLUMNS = ("file", "row", "part", "offset", "positions")  # of the first four, see Start; how many tokens it has


@dataclass(frozen=True)
class Scan:
    """What looking through the whole corpus found: how many documents, where shards begin, the types of its own columns, and
    what becomes of its rows. `columns_read`: the names of the columns that the rows were read from."""

    documents: int
    shards: list[Start]
    columns: dict[str, str]
    counts: CorpusCounts
    columns_read: tuple[str, ...]


@dataclass(frozen=True)
class PieceScan:
    """What looking through one piece of a corpus found, with documents counted from 0.

    Attributes:
        documents: int64 (documents, 5), see DOCUMENT_COLUMNS.
        unnumbered: index of the .jsonl file in the middle of which it begins: its rows are counted as if one line came before.
        ends_in: index of the .jsonl file in the middle of which it ends. lines: how many lines of that file are in it.
        columns: types of the corpus's own columns; None for one that has no value.
        counts: what becomes of the rows.
        columns_read: the names of the columns that the rows were read from.
        notes: what a person should know of its conversations.
    """

    documents: np.ndarray
    unnumbered: int | None
    ends_in: int | None
    lines: int
    columns: dict[str, str | None]
    counts: CorpusCounts
    columns_read: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def columns_sentence(read: Collection[str], kept: Collection[str]) -> str | None:
    """Which columns of a corpus its rows are read from, and which are kept beside them; None where none are."""
    return f"Columns read: {', '.join(read)}; kept beside and unseen by the teacher: {', '.join(kept)}" if kept else None


def column_type(value: Any) -> str | None:
    """The type of a corpus's own column that has a value; None of one that has none."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "double" if isinstance(value, float) else "string"


def common_type(one: str | None, other: str | None) -> str | None:
    """The type of a column that has values of two types."""
    if one is None or other is None or one == other:
        return one or other
    return "double" if {one, other} == {"int64", "double"} else "string"


def column_value(value: Any, column_type: str) -> Any:
    """A corpus column's value as the type its column has: anything that is no string becomes JSON text in a string column."""
    if value is None or (column_type == "string" and isinstance(value, str)):
        return value
    if column_type == "string":
        return json.dumps(value, ensure_ascii=False, default=str)
    return float(value) if column_type == "double" else value


def _check_tokens(sequences: list[TokenSequence], vocabulary_size: int, piece: PlacedPiece) -> None:
    for sequence in sequences:
        if (largest := sequence.token_ids.max()) >= vocabulary_size:
            raise InputError(
                f"{_row_place(sequence.document, piece)}: the teacher's tokenizer gives token {largest}, and its config.json"
                f" has a vocabulary of {vocabulary_size:,}: they do not belong together"
            )


def _row_place(document: Document, piece: PlacedPiece) -> str:
    """Where a document of a piece stands, as people read it."""
    shift = piece.lines_before - 1 if document.file == piece.unnumbered else 0
    return place_text(piece.files, document.file, document.row + shift)


def _other_sort(document: Document, piece: PlacedPiece) -> str:
    """That a row is a group of answers in a corpus of none, or the other way round."""
    group, other = "several answers to compare", "one text or answer"
    here, before = (group, other) if document.is_group else (other, group)
    return (
        f"{_row_place(document, piece)}: it has {here}, and the rows before it have {before}: a corpus has groups of answers in"
        " all of its rows or in none; put them into a corpus of their own"
    )


@dataclass(frozen=True)
class Scanner:
    """How a corpus is looked through.

    Attributes:
        files: checked by `check_files`.
        tokenizer: that makes the sequences.
        part_characters: longest text that is one document.
        too_long: what becomes of rows that are too long: cut, skip or refuse.
        column_names: what `--columns` says.
        vocabulary_size: how many tokens the teacher's model knows, where that is known without it.
        groups: whether its rows are groups of answers (see `has_groups`).
    """

    files: tuple[Path, ...]
    tokenizer: CorpusTokenizer
    part_characters: int
    too_long: str = "cut"
    column_names: Mapping[str, str] | None = None
    vocabulary_size: int | None = None
    groups: bool = False

    @cached_property
    def _stamps(self) -> list[tuple[int, int]]:
        return file_stamps(self.files)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [size for size, _ in self._stamps]

    def check_unchanged(self) -> None:
        """Make sure that no file was written since its size was looked at (InputError: one was)."""
        check_unchanged(self.files, self._stamps)

    @cached_property
    def _begins(self) -> list[int]:
        """Bytes of the files before each, and of all."""
        return list(accumulate(self.sizes, initial=0))

    @cached_property
    def pieces(self) -> list[Piece]:
        """The pieces of the corpus, in order."""
        return cut_corpus(self.files, self.sizes)

    def bytes(self, piece: Piece) -> int:
        """Bytes of the files from where a piece begins to where it ends, roughly."""
        begin, end = (self._begins[cut.file] + cut.at for cut in (piece.begin, piece.end))
        return end - begin

    def scan(self, piece: Piece, advance: Advance = lambda amount, **figures: None) -> PieceScan:
        """Read and tokenise a piece. Nothing is held of it but the documents at hand, and five numbers of each.

        Args:
            piece: of this corpus.
            advance: called with the bytes of the files that were passed since the last call; those of a compressed file or of
                Parquet pass as a whole, or nearly so. Beside them, how fast it goes.

        Raises:
            InputError: a file cannot be read as what its name says, the tokenizer cannot be used for the corpus (it gives
                tokens that the model does not know), or some rows are groups of answers and others are not.
        """
        placed = place_piece(self.files, piece)
        documents = array("q")
        columns: dict[str, str | None] = {}
        columns_read: dict[str, None] = {}
        tally = Tally(self.too_long, MAX_PIECE_REASONS)
        total, passed = self.bytes(piece), 0
        before = self._begins[piece.begin.file] + piece.begin.at
        began = time.monotonic()
        for document in read_documents(placed.files, placed.start, self.part_characters, self.column_names):
            if not placed.holds(document):
                break
            if document.is_group != self.groups and document.problem is None:
                raise InputError(_other_sort(document, placed))
            place = self._begins[document.file] + min(document.offset, self.sizes[document.file]) - before
            figures = {}
            if (document.number + 1) % FIGURES_EVERY == 0:
                speed = tally.positions / max(time.monotonic() - began, 1e-9)
                figures = {"tokens/s": f"{speed:,.0f}", "rows": f"{tally.rows:,}", "left out": f"{tally.rows_left_out:,}"}
            place = min(max(place, passed), total)
            advance(place - passed, **figures)
            passed = place
            positions = 0
            try:
                sequences = self.tokenizer.sequences(document)
            except BadRow as problem:
                tally.leave_out(document, problem)
            else:
                if self.vocabulary_size is not None:
                    _check_tokens(sequences, self.vocabulary_size, placed)
                tally.use(document, sequences)
                positions = sum(len(sequence.token_ids) for sequence in sequences)
            documents.extend((document.file, document.row, document.part, document.offset, positions))
            if document.problem is None and document.part == 0:
                columns_read |= dict.fromkeys(document.columns_read)
                for name, value in (document.columns or {}).items():
                    columns[name] = common_type(columns.get(name), column_type(value))
        advance(total - passed)
        found = np.array(documents, np.int64).reshape(-1, len(DOCUMENT_COLUMNS))
        notes = tuple(self.tokenizer.notes)
        return PieceScan(
            found, placed.unnumbered, placed.ends_in, placed.lines, columns, tally.counts, tuple(columns_read), notes
        )


class ScanSum:
    """Puts together what was found of the pieces of a corpus, in their order.

    Args:
        shard_size: documents in a shard.
        too_long: what becomes of rows that are too long.
    """

    def __init__(self, shard_size: int, too_long: str):
        self._shard_size = shard_size
        self._documents = 0
        self._lines = 0  # of the .jsonl file in the middle of which the next piece begins
        self._starts: list[Start] = []
        self._positions: list[int] = []
        self._columns: dict[str, str | None] = {}
        self._columns_read: dict[str, None] = {}
        self._tally = Tally(too_long)
        self.notes: dict[str, None] = {}

    def add(self, piece: PieceScan) -> None:
        """Add the piece that follows those that were added."""
        documents, counts = piece.documents, piece.counts
        if piece.unnumbered is not None:
            shift = self._lines - 1
            documents = documents.copy()
            documents[documents[:, 0] == piece.unnumbered, 1] += shift
            left_out = {
                reason: replace(left, row=left.row + shift) if left.file == piece.unnumbered else left
                for reason, left in counts.left_out.items()
            }
            counts = replace(counts, left_out=left_out)
        self._lines = piece.lines + (self._lines if piece.unnumbered == piece.ends_in else 0)
        self._tally.add(counts)
        for name, kind in piece.columns.items():
            self._columns[name] = common_type(self._columns.get(name), kind)
        self._columns_read |= dict.fromkeys(piece.columns_read)
        self.notes |= dict.fromkeys(piece.notes)
        if not len(documents):
            return
        number, size = self._documents, self._shard_size
        self._documents += len(documents)
        firsts = range(-number % size, len(documents), size)  # of shards that begin here
        self._starts += [Start(number + first, *documents[first, :4].tolist()) for first in firsts]
        self._positions += [0] * len(firsts)
        bounds = [0, *firsts] if not firsts or firsts[0] else list(firsts)
        for back, positions in enumerate(reversed(np.add.reduceat(documents[:, 4], bounds).tolist()), 1):
            self._positions[-back] += positions

    @property
    def whole(self) -> Scan:
        """What was found of all pieces that were added."""
        shards = [replace(start, positions=size) for start, size in zip(self._starts, self._positions, strict=True)]
        columns = {name: kind or "string" for name, kind in self._columns.items()}
        return Scan(self._documents, shards, columns, self._tally.counts, tuple(self._columns_read))


def scan(scanner: Scanner, shard_size: int, advance: Advance = lambda amount, **figures: None) -> tuple[Scan, list[str]]:
    """Look through all of a corpus, one piece after the other.

    Returns:
        what was found, and what a person should know of its conversations.

    Raises:
        InputError: as of `Scanner.scan`.
    """
    found = ScanSum(shard_size, scanner.too_long)
    for piece in scanner.pieces:
        found.add(scanner.scan(piece, advance))
    return found.whole, list(found.notes)
