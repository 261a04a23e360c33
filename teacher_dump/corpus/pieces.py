"""A corpus in pieces that several processes can look through at once: where each begins and ends.

A .jsonl file is cut between two lines, and a .parquet file between two row groups. To get to the middle of any other file is to
read what comes before, so those are whole in one piece. Which pieces there are follows from the sizes of the files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.rows import Start

PIECES = 256  # of a corpus whose pieces have neither the smallest nor the largest size
MIN_PIECE_BYTES = 1 << 20
MAX_PIECE_BYTES = 1 << 26

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Cut:
    """A place in a corpus: before the first line that begins at or after byte `at` of a .jsonl file, or the first row group of
    a .parquet file that does, roughly. In any other file `at` is 0."""

    file: int
    at: int


@dataclass(frozen=True)
class Piece:
    """All rows of a corpus from one place to another."""

    begin: Cut
    end: Cut


def cut_corpus(files: Sequence[Path], sizes: Sequence[int]) -> list[Piece]:
    """The pieces of a corpus, in order; a piece may turn out to have no rows.

    Args:
        files: of the corpus, at least one.
        sizes: of each, in bytes.
    """
    size = min(max(sum(sizes) // PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    cuts = [Cut(0, 0)]
    passed = 0  # bytes of the files before
    for file, path in enumerate(files):
        following = size * (passed // size + 1)
        while following < passed + sizes[file]:
            at = following - passed
            cuts.append(Cut(file, at) if path.suffix in (".jsonl", ".parquet") else Cut(file + 1, 0))
            following += size
        passed += sizes[file]
    whole = dict.fromkeys([*cuts, Cut(len(files), 0)])
    return [Piece(begin, end) for begin, end in pairwise(whole)]


@dataclass(frozen=True)
class PlacedPiece:
    """A piece whose first row was found.

    Attributes:
        files: those that have rows of it, and all before them.
        start: its first document, as number 0; `row` where it is known, else as if one line came before it.
        unnumbered: index of the first file where that is not known, since the piece begins in its middle.
        end: the first byte of a .jsonl file, or row from 0 of a .parquet file, that is beyond it in the last of the files; None
            where all of that file is in it.
    """

    files: tuple[Path, ...]
    start: Start
    unnumbered: int | None
    end: int | None

    def holds(self, document: Document) -> bool:
        """Whether a document of these files, from the start on, is in the piece."""
        if self.end is None or document.file < len(self.files) - 1:
            return True
        place = document.row - 1 if self.files[-1].suffix == ".parquet" else document.offset
        return place < self.end

    @property
    def ends_in(self) -> int | None:
        """Index of the .jsonl file in the middle of which it ends, if it does."""
        return len(self.files) - 1 if self.end is not None and self.files[-1].suffix == ".jsonl" else None

    @property
    def lines(self) -> int:
        """How many lines of that file are in it."""
        if self.end is None or self.ends_in is None:
            return 0
        begin = self.start.offset if self.start.file == len(self.files) - 1 else 0
        return _line_ends(self.files[-1], begin, _line_start(self.files[-1], self.end))

    @property
    def lines_before(self) -> int:
        """How many lines come before it in its first file."""
        return _line_ends(self.files[self.start.file], 0, self.start.offset)


def place_piece(files: tuple[Path, ...], piece: Piece) -> PlacedPiece:
    """Find the first row of a piece.

    Raises:
        InputError: a file cannot be read as what its name says.
    """
    begin, end = piece.begin, piece.end
    start, unnumbered = Start(0, begin.file, 1, 0, 0), None
    if begin.at:
        path = files[begin.file]
        if path.suffix == ".parquet":
            start = Start(0, begin.file, _first_row(path, begin.at) + 1, 0, 0)
        else:
            start, unnumbered = Start(0, begin.file, 2, 0, _line_start(path, begin.at)), begin.file
    if not end.at:
        return PlacedPiece(files[: end.file], start, unnumbered, None)
    path = files[end.file]
    beyond = _first_row(path, end.at) if path.suffix == ".parquet" else end.at
    return PlacedPiece(files[: end.file + 1], start, unnumbered, beyond)


def _line_start(path: Path, at: int) -> int:
    """The first byte from `at` on that begins a line, or the file's size (InputError: it cannot be read)."""
    try:
        with open(path, "rb") as file:
            file.seek(at - 1)
            file.readline()
            return file.tell()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _line_ends(path: Path, begin: int, end: int) -> int:
    """How many lines end in some bytes of a file (InputError: it cannot be read)."""
    lines = 0
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            while begin < end and (chunk := file.read(min(READ_BYTES, end - begin))):
                lines += chunk.count(b"\n")
                begin += len(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return lines


def _first_row(path: Path, at: int) -> int:
    """The first row, from 0, of the first row group that begins at or after byte `at`, were all as much compressed; the number
    of rows where there is none (InputError: it cannot be read)."""
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        share = at / path.stat().st_size * sum(group.total_byte_size for group in groups)
        row = passed = 0
        for group in groups:
            if passed >= share:
                break
            row, passed = row + group.num_rows, passed + group.total_byte_size
        return row
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
