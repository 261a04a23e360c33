"""A few rows of a corpus as the tokens that a teacher would see. No model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.configuration import PreviewConfig
from teacher_dump.corpus.documents import place_text, read_documents
from teacher_dump.corpus.rows import BadRow, Start, stops
from teacher_dump.corpus.scan import columns_sentence
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.corpus.tally import Tally
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.inspection import corpus_tokenizer, teacher_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A character may take several tokens, none of which is text by itself.
UNFINISHED = "\ufffd"
MAX_TOKENS_OF_A_CHARACTER = 8


@dataclass(frozen=True)
class PreviewToken:
    """A token as a person reads it.

    Attributes:
        token_id: its id.
        text: what it adds to the text; empty where a character is not finished with it.
        is_target: whether it counts for training.
        is_special: whether it is one of the tokenizer's special tokens.
    """

    token_id: int
    text: str
    is_target: bool
    is_special: bool


@dataclass(frozen=True)
class PreviewSequence:
    """A sequence: its tokens, how many tokens and targets of the row are cut off behind them, and what it is worth beside the
    other answers of a group (None where nobody says)."""

    tokens: tuple[PreviewToken, ...]
    tokens_cut: int
    targets_cut: int
    score: float | None = None

    @property
    def targets(self) -> int:
        """How many of its tokens count for training."""
        return sum(token.is_target for token in self.tokens)


@dataclass(frozen=True)
class PreviewRow:
    """A row, or a part of a long text.

    Attributes:
        place: its file and number, as people read them.
        part: of a text that is too long for one document, counted from 0.
        sequences: what becomes of it.
        is_group: whether these are several answers to one prompt.
        dropped_reasoning: messages of which the chat template leaves the reasoning out.
        problem: why it cannot be used; None where it can.
        stops: whether it would stop a dump whatever becomes of bad rows: it is too long, and such rows are refused.
    """

    place: str
    part: int
    sequences: tuple[PreviewSequence, ...]
    dropped_reasoning: int = 0
    problem: str | None = None
    stops: bool = False
    is_group: bool = False


@dataclass(frozen=True)
class Preview:
    """A few rows, and what became of them in numbers. `columns`: which columns they are read from and which are kept beside
    them, in words; None where none are."""

    rows: list[PreviewRow]
    counts: CorpusCounts
    columns: str | None


def preview(config: PreviewConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, reporter: Reporter = SILENT) -> Preview:
    """The first rows of a corpus as tokens. A text that is too long for one document counts as a row for each of its parts.

    Args:
        config: the teacher, the corpus, and how many rows.
        tokenizer: the teacher's, already loaded; loaded here when None.
        reporter: hears of progress where the corpus is downloaded, and of turns that have no end.

    Raises:
        InputError: something given cannot be used. A row that cannot be used is no error here: it says why.
    """
    config = with_local_corpus(config, reporter=reporter)
    tokenizer = tokenizer or teacher_tokenizer(config, None, weights=False)
    cutter = corpus_tokenizer(config, tokenizer)
    tally = Tally(config.too_long)
    rows = []
    read: dict[str, None] = {}
    kept: dict[str, None] = {}
    for document in islice(
        read_documents(config.corpus, Start(0, 0, 1, 0, 0), config.part_characters, config.column_names), config.rows
    ):
        place = place_text(config.corpus, document.file, document.row)
        read |= dict.fromkeys(document.columns_read)
        kept |= dict.fromkeys(document.columns or ())
        try:
            sequences = cutter.sequences(document)
        except BadRow as problem:
            tally.leave_out(document, problem)
            refused = stops(problem, config.too_long, skip_bad_rows=True)
            rows.append(PreviewRow(place, document.part, (), problem=str(problem), stops=refused))
            continue
        tally.use(document, sequences)
        shown = tuple(_sequence(tokenizer, sequence) for sequence in sequences)
        dropped = sum(sequence.dropped_reasoning for sequence in sequences)
        rows.append(PreviewRow(place, document.part, shown, dropped, is_group=document.is_group))
    for note in cutter.notes:
        reporter.note(note)
    return Preview(rows, tally.counts, columns_sentence(read, kept))


def _sequence(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> PreviewSequence:
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} | set(
        tokenizer.all_special_ids
    )
    texts = token_texts(tokenizer, sequence.token_ids)
    tokens = (
        PreviewToken(token, text, is_target, token in special)
        for token, text, is_target in zip(sequence.token_ids.tolist(), texts, sequence.is_target.tolist(), strict=True)
    )
    return PreviewSequence(tuple(tokens), sequence.tokens_cut, sequence.targets_cut, sequence.score)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> Iterator[str]:
    """What each of some tokens, int64 (L,), adds to the text of those before it; put together, that is the text.

    Decoders drop a space in front of what they take for a text's beginning, and give a sign of replacement for the bytes of
    half a character: so each token is decoded behind the one before it, and those of one character together, with the last.
    """
    ids = token_ids.tolist()
    anchor = start = 0  # ids[anchor:start] have been given, and stand before what comes
    for end in range(1, len(ids) + 1):
        before = _decoded(tokenizer, ids[anchor:start])
        text = _decoded(tokenizer, ids[anchor:end])
        unfinished = text.endswith(UNFINISHED) and end - start < MAX_TOKENS_OF_A_CHARACTER and end < len(ids)
        if unfinished:
            yield ""
            continue
        yield text.removeprefix(before)
        anchor, start = start, end


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
