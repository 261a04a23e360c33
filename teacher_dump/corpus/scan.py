"""A corpus looked through before it is dumped: every row is tokenised and counted, and where each shard begins is noted, so
that a worker goes straight to its shard."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from knowledge_store.format.corpus_counts import CorpusCounts
from knowledge_store.reporter import Advance
from teacher_dump.corpus.documents import Document, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.tally import Tally
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence

FIGURES_EVERY = 64  # documents
DOCUMENTS_AT_ONCE = 16  # of a thread
THREADS = min(8, os.cpu_count() or 1)


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


def _tokenised(
    tokenizer: CorpusTokenizer, documents: Iterator[Document]
) -> Iterator[tuple[Document, list[TokenSequence] | BadRow]]:
    """Documents with their sequences, or why there are none, in order.

    Several threads tokenise: a tokenizer that is written in Rust lets others work meanwhile.
    """
    # The first is done alone: whatever a tokenizer makes ready at its first call, no two threads make at once.
    for document in islice(documents, 1):
        yield from _tokenise(tokenizer, [document])
    executor = ThreadPoolExecutor(THREADS, "tokeniser")
    waiting: deque[Future[list[tuple[Document, list[TokenSequence] | BadRow]]]] = deque()
    try:
        while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
            waiting.append(executor.submit(_tokenise, tokenizer, batch))
            if len(waiting) > 2 * THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _tokenise(tokenizer: CorpusTokenizer, documents: list[Document]) -> list[tuple[Document, list[TokenSequence] | BadRow]]:
    found: list[tuple[Document, list[TokenSequence] | BadRow]] = []
    for document in documents:
        try:
            found.append((document, tokenizer.sequences(document)))
        except BadRow as problem:
            found.append((document, problem))
    return found


def scan(
    files: tuple[Path, ...],
    tokenizer: CorpusTokenizer,
    shard_size: int,
    part_characters: int,
    too_long: str = "cut",
    advance: Advance = lambda amount, **figures: None,
    column_names: Mapping[str, str] | None = None,
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

    Raises:
        InputError: a file cannot be read as what its name says, or the tokenizer cannot be used for the corpus.
    """
    starts: list[Start] = []
    positions: list[int] = []
    columns: dict[str, str | None] = {}
    tally = Tally(too_long)
    count = passed = 0
    sizes = [path.stat().st_size for path in files]
    begins = [sum(sizes[:file]) for file in range(len(files))]
    began = time.monotonic()
    documents = read_documents(files, Start(0, 0, 1, 0, 0), part_characters, column_names)
    for document, sequences in _tokenised(tokenizer, documents):
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
        if isinstance(sequences, BadRow):
            tally.leave_out(document, sequences)
        else:
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
