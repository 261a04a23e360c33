"""A corpus looked through before it is dumped: every row is tokenised and counted, and where each shard begins is noted, so
that a worker goes straight to its shard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.reporter import Advance
from teacher_dump.corpus.documents import place_text, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.tally import Tally
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence

FIGURES_EVERY = 64  # documents


@dataclass(frozen=True)
class Scan:
    """What looking through the whole corpus found: how many documents, where shards begin, the types of its own columns, and
    what becomes of its rows."""

    documents: int
    shards: list[Start]
    columns: dict[str, str]
    counts: CorpusCounts


def _column_type(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "double" if isinstance(value, float) else "string"


def _common_type(one: str | None, other: str | None) -> str | None:
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


def _check_tokens(sequences: list[TokenSequence], vocabulary_size: int, files: tuple[Path, ...]) -> None:
    for sequence in sequences:
        if (largest := sequence.token_ids.max()) >= vocabulary_size:
            place = place_text(files, sequence.document.file, sequence.document.row)
            raise InputError(
                f"{place}: the teacher's tokenizer gives token {largest}, and"
                f" its config.json has a vocabulary of {vocabulary_size:,}: they do not belong together"
            )


def scan(
    files: tuple[Path, ...],
    tokenizer: CorpusTokenizer,
    shard_size: int,
    part_characters: int,
    too_long: str = "cut",
    advance: Advance = lambda amount, **figures: None,
    column_names: Mapping[str, str] | None = None,
    vocabulary_size: int | None = None,
) -> Scan:
    """Read and tokenise the whole corpus once. Nothing is held of it but the documents at hand.

    Args:
        files: checked by `check_files`.
        tokenizer: that makes the sequences.
        shard_size: documents in a shard.
        part_characters: longest text that is one document.
        too_long: what becomes of rows that are too long: cut, skip or refuse.
        advance: called with the bytes of the files that were passed since the last call; those of a compressed file or of
            Parquet pass as a whole, or nearly so. Beside them, how fast it goes.
        column_names: what `--columns` says.
        vocabulary_size: how many tokens the teacher's model knows, where that is known without it.

    Raises:
        InputError: a file cannot be read as what its name says, or the tokenizer cannot be used for the corpus: it gives tokens
            that the model does not know.
    """
    starts: list[Start] = []
    positions: list[int] = []
    columns: dict[str, str | None] = {}
    tally = Tally(too_long)
    count = passed = 0
    sizes = [path.stat().st_size for path in files]
    begins = [sum(sizes[:file]) for file in range(len(files))]
    began = time.monotonic()
    for document in read_documents(files, Start(0, 0, 1, 0, 0), part_characters, column_names):
        if document.number % shard_size == 0:
            starts.append(Start(document.number, document.file, document.row, document.part, document.offset))
            positions.append(0)
        count = document.number + 1
        place = begins[document.file] + min(document.offset, sizes[document.file])
        figures = {}
        if count % FIGURES_EVERY == 0:
            speed = tally.positions / max(time.monotonic() - began, 1e-9)
            figures = {"tokens/s": f"{speed:,.0f}", "rows": f"{tally.rows:,}", "left out": f"{tally.rows_left_out:,}"}
        advance(place - passed, **figures)
        passed = place
        try:
            sequences = tokenizer.sequences(document)
        except BadRow as problem:
            tally.leave_out(document, problem)
        else:
            if vocabulary_size is not None:
                _check_tokens(sequences, vocabulary_size, files)
            tally.use(document, sequences)
            positions[-1] += sum(len(sequence.token_ids) for sequence in sequences)
        if document.problem is None and document.part == 0:
            for name, value in (document.columns or {}).items():
                columns[name] = _common_type(columns.get(name), _column_type(value))
    advance(sum(sizes) - passed)
    shards = [
        Start(start.document, start.file, start.row, start.part, start.offset, size)
        for start, size in zip(starts, positions, strict=True)
    ]
    return Scan(count, shards, {name: kind or "string" for name, kind in columns.items()}, tally.counts)
