"""All files read once, before anything is written: what the dump is going to hold, and everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts, LeftOut
from knowledge_store.format.sequences import WINDOW_BITS
from knowledge_store.kinds.positions.kind import PositionsParameters
from knowledge_store.kinds.positions.selection import Selection
from knowledge_store.reporter import Reporter
from teacher_dump.corpus.rows import Start
from teacher_dump.importers.alignment import Alignment
from teacher_dump.importers.asking import Sample
from teacher_dump.importers.configuration import PREDICTS, ImportConfig
from teacher_dump.importers.knowledge import candidates_of
from teacher_dump.importers.layout import BadLayout, Layout, LayoutRow

SHARD_VALUES = 2**24  # log-probabilities in a shard, about: it is held in memory
WRAPPED = 2**17  # ids above it have lost their upper bits where 17 were kept
TOO_SHORT = "fewer than two tokens, or no prediction of one"
WHOLE = 1 - 1e-5  # candidates whose probabilities sum to so much
MANY = 0.99  # of the positions
FEW = 1000  # of a file that does not tell by itself, and is believed where all files together tell


@dataclass
class Scan:
    """What the files hold.

    Attributes:
        starts: of each shard. documents: rows.
        longest: tokens of the longest sequence. least, most: candidates at a position. highest: id among them.
        unknown: whether some token's log-probability is. context: whether some prediction is of a token that is no target.
        given_tail: whether the files say the tail. whole: positions whose candidates reach one, and
            are not all tokens.
    """

    starts: list[Start] = field(default_factory=list)
    documents: int = 0
    longest: int = 0
    least: int = 2**31
    most: int = 0
    highest: int = -1
    sequences: int = 0
    positions: int = 0
    targets: int = 0
    predictions: int = 0
    unknown: bool = False
    context: bool = False
    given_tail: bool = True
    whole: int = 0
    too_short: int = 0
    first_short: tuple[int, int] = (0, 0)
    sample: Sample = field(default_factory=Sample)
    alignments: list[Alignment] = field(default_factory=list)

    def derived(self) -> dict[str, object]:
        """Of the manifest."""
        left_out = {}
        if self.too_short:
            file, row = self.first_short
            left_out[TOO_SHORT] = LeftOut(self.too_short, False, file, row, TOO_SHORT)
        counts = CorpusCounts(
            rows=self.documents,
            sequences=self.sequences,
            positions=self.positions,
            targets=self.targets,
            left_out=left_out,
        )
        return {
            "documents": self.documents,
            "counts": counts.to_record(),
            "columns": {},
            "shards": [asdict(start) for start in self.starts],
        }

    def most_kept(self, layout: Layout) -> int:
        """Candidates that are kept at a position, at most."""
        return self.least if layout.token_beside else self.most

    def parameters(self, layout: Layout) -> PositionsParameters:
        """Of the kind `positions`: with as many candidates everywhere top-k, else as many as there are (top-p of 1)."""
        kept = self.most_kept(layout)
        selection = Selection("top-k", kept) if min(self.least, kept) == kept else Selection("top-p", kept)
        return PositionsParameters(
            selection,
            keep_context=self.context,
            tail="exact" if self.given_tail else "remainder",
            unknown_tokens=self.unknown,
        )


def file_rows(config: ImportConfig, layout: Layout, start: Start | None = None) -> Iterator[tuple[int, LayoutRow]]:
    """The rows of all files from a place on, each with the index of its file.

    Raises:
        InputError: a file is not of its layout; names it.
    """
    for file, path in enumerate(config.files):
        if start is not None and file < start.file:
            continue
        here = start is not None and file == start.file
        first, offset = (start.row, start.offset) if here and start is not None else (1, 0)
        try:
            for row in layout.rows(path, first, offset):
                yield file, row
        except BadLayout as error:
            raise InputError(f"{path} is not of the layout {config.format}: {error}") from None


def scan(config: ImportConfig, layout: Layout, vocabulary: int, reporter: Reporter) -> Scan:
    """Read all files.

    Raises:
        InputError: something is wrong with them; names the file and the row.
    """
    found = Scan(alignments=[Alignment() for _ in config.files])
    begun: tuple[int, LayoutRow] | None = None
    shard_positions = values = 0
    with reporter.progress("reading the files", sum(path.stat().st_size for path in config.files), "bytes") as advance:
        file = 0
        for file_index, row in file_rows(config, layout):
            if file_index > file:
                advance(sum(path.stat().st_size for path in config.files[file:file_index]))
                file = file_index
            if begun is None or values >= SHARD_VALUES or found.documents - found.starts[-1].document >= config.shard_size:
                _close(found, shard_positions)
                begun, shard_positions, values = (file_index, row), 0, 0
                found.starts.append(Start(found.documents, file_index, row.number, 0, row.offset))
            positions, size = _row(found, config, layout, file_index, row, vocabulary)
            shard_positions, values = shard_positions + positions, values + size
            found.documents += 1
        advance(sum(path.stat().st_size for path in config.files[file:]))
    _close(found, shard_positions)
    _judge(found, config, layout, vocabulary)
    return found


def _close(found: Scan, positions: int) -> None:
    """Note how many tokens the last shard has."""
    if found.starts:
        found.starts[-1] = Start(**{**asdict(found.starts[-1]), "positions": positions})


def _row(found: Scan, config: ImportConfig, layout: Layout, file: int, row: LayoutRow, vocabulary: int) -> tuple[int, int]:
    """Take in a row; how many tokens and log-probabilities it has."""
    path = config.files[file]
    if len(row.sequences) >= 1 << WINDOW_BITS:
        raise InputError(
            f"{path}, row {row.number} holds {len(row.sequences):,} texts, and may hold {(1 << WINDOW_BITS) - 1:,}"
        )
    positions = values = used = 0
    for sequence in row.sequences:
        try:
            candidates = candidates_of(sequence, vocabulary, layout.slack)
        except BadLayout as error:
            raise InputError(f"{path}, row {row.number}: {error}") from None
        if not len(candidates.places):
            continue
        used += 1
        tokens = sequence.token_ids
        found.alignments[file].add(tokens, candidates, vocabulary)
        found.sample.add(path.name, tokens, candidates)
        found.sequences += 1
        found.predictions += len(candidates.places)
        found.longest = max(found.longest, len(tokens))
        found.least, found.most = min(found.least, int(candidates.counts.min())), max(found.most, int(candidates.counts.max()))
        found.highest = max(found.highest, int(candidates.ids.max()))
        found.unknown |= bool(np.isnan(candidates.token_logprobs).any())
        found.given_tail &= candidates.tail is not None
        reach_one = (np.exp(candidates.logprobs).sum(axis=1) >= WHOLE) & (candidates.counts < vocabulary)
        found.whole += int(reach_one.sum())
        targets = len(candidates.places)
        if sequence.is_target is not None:
            targets = int(sequence.is_target[candidates.places].sum())
            found.context |= targets < len(candidates.places)
        found.targets += targets
        positions += len(tokens)
        values += candidates.logprobs.size
    if not used:
        found.first_short = found.first_short if found.too_short else (file, row.number)
        found.too_short += 1
    found.positions += positions
    return positions, values


def _judge(found: Scan, config: ImportConfig, layout: Layout, vocabulary: int) -> None:
    """Refuse files that nothing can be made of, or whose predictions stand beside other tokens than they are of."""
    if not found.sequences:
        raise InputError(f"{config.files[0]} and what follows hold no sequence of two tokens with a prediction")
    if not found.targets:
        raise InputError(
            f"{config.files[0]} and what follows have no token that counts for training: look at their labels, or the mask of"
            " their targets"
        )
    if config.teacher:  # which is asked, and knows better
        return
    if layout.narrow_ids and vocabulary > WRAPPED > found.highest:
        raise InputError(
            f"no candidate's id reaches {WRAPPED:,}, in a vocabulary of {vocabulary:,}: ids were cut to 17 bits when the files"
            " were written, and nobody can tell which they were; give --teacher where they are as they should be"
        )
    together = Alignment.of_all(found.alignments)
    sound = together.complaint() is None
    if not together.positions:
        raise InputError(f"{config.files[0]}: {together.complaint()}: give --teacher, which is then asked for a sample")
    for path, alignment in zip(config.files, found.alignments, strict=True):
        silent = not alignment.positions and len(config.files) > 1
        few = sound and alignment.positions < FEW and not alignment.is_off
        complaint = None if silent or few else alignment.complaint()
        if complaint is not None:
            other = PREDICTS[1 - layout.shift]
            fits = alignment.is_off and alignment.farther == (1 if layout.shift == 0 else -1)
            advice = f"give --row-predicts {other} if that is how the file has it" if fits else "make the file anew"
            raise InputError(f"{path}: {complaint}; {advice}, or give --teacher, which is then asked for a sample")


def notes(found: Scan) -> list[str]:
    """What a person should know of what the files do not hold."""
    said = []
    if found.whole >= MANY * found.predictions and not found.given_tail:
        said.append(
            "The candidates' probabilities sum to one at nearly every position: they were made to, and what the teacher left to"
            " other tokens is lost."
        )
    if found.unknown:
        said.append(
            "The log-probability of tokens that are no candidate is unknown: what needs it refuses this dump, and the losses do"
            " not."
        )
    return said
