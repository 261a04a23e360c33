"""What the page shows at once: facts from the index, one page of sequences, one sequence, one position. Each is an answer to an
SQL statement, and comes with it.

None of these statements reads more than the index, or the row groups of a few sequences.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.sequences import SEQUENCE_COLUMNS, sequence_id, sequences_schema, split_sequence_id
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.positions import knows_tokens
from knowledge_store.page.questions import Asked
from knowledge_store.sql.excerpt import excerpt
from knowledge_store.sql.mixed_columns import field_of, mixed_columns
from knowledge_store.sql.named_files import file_rows
from knowledge_store.sql.query import Statements
from knowledge_store.sql.quoting import identifier, literal

SEQUENCES = 50  # of a page
POSITIONS = 1024  # of a sequence, at once
BEGINNING = 32  # tokens of a sequence in a list
CONNECTIONS = 4  # that are kept
BARS = 80  # of a picture of shards
JUDGED = ("dump", "sequence_id", "position", "logprob")  # columns of a student's file, without which it is none

Answer = dict[str, Any]
Part = tuple[str, int, int]  # a dump, and the first and the last of its shards


class Page:
    """Answers about a store.

    Args:
        dumps: of the store, as they stood when it was opened.
        files: Parquet files beside it, by their names in SQL.

    Raises (on construction):
        InputError: a file or its name cannot be used.
    """

    def __init__(self, dumps: Dumps, files: Mapping[str, str]):
        self.dumps, self.files = dumps, dict(files)
        self.students = {name: columns for name, path in self.files.items() if (columns := _judged(path))}
        self._idle: list[tuple[Part | None, Statements]] = []
        self._lock = threading.Lock()
        self._judged = {name: _judged_dump(self.files[name]) for name in self.students}
        with self._connected(None):
            pass  # the names of the files are none of the store's own

    def ask(self, sql: str, rows: int = POSITIONS, part: Part | None = None) -> Answer:
        """The answer to a statement of the page's own (see `sql.excerpt`), with `sql` and the `seconds` it took.

        Args:
            sql: the statement.
            rows: the most that are shown.
            part: the shards that its answer lies in, where that is known: no others are opened.
        """
        started = time.perf_counter()
        with self._connected(part) as statements:
            answer = excerpt(*statements.answer(sql), rows)
        return {"sql": sql, "seconds": round(time.perf_counter() - started, 4), **answer}

    @contextmanager
    def _connected(self, part: Part | None) -> Iterator[Statements]:
        """A connection that nobody else uses."""
        with self._lock:
            place = next((place for place, (of, _) in enumerate(self._idle) if of == part), None)
            statements = None if place is None else self._idle.pop(place)[1]
        if statements is None:
            # Which dumps are closed is shown beside the list: what the page shows of the others is true without them.
            dumps = replace(self.dumps, closed={}) if part is None else self.dumps.part(*part)
            statements = Statements(dumps, files=self.files)
        try:
            yield statements
        except BaseException:
            statements.close()  # it is not used again
            raise
        with self._lock:
            self._idle.append((part, statements))
            surplus = [self._idle.pop(0)[1] for _ in range(len(self._idle) - CONNECTIONS)]
        for other in surplus:
            other.close()

    def _shards(self, manifest: Manifest) -> pa.Table:
        return self.dumps.index.shards.filter(pc.field("dump") == manifest.dump)

    def _around(self, manifest: Manifest, number: int) -> Part:
        """The shard that a sequence is in, and those before and after it, as the plan has them.

        Raises:
            InputError: no shard is committed.
        """
        shards = self._shards(manifest)
        if not len(shards):
            raise InputError(f"dump {manifest.dump!r} has no committed shard yet")
        document, _ = split_sequence_id(number)
        place = bisect_right(shards["first_document"].to_pylist(), document) - 1
        first, last = max(place - 1, 0), min(place + 1, len(shards) - 1)
        return manifest.dump, shards["shard"][first].as_py(), shards["shard"][max(last, 0)].as_py()

    def store(self) -> Answer:
        """What is in the store."""
        facts = {}
        for manifest in self.dumps.manifests.values():
            facts[manifest.dump] = {
                "kinds": list(manifest.kinds),
                "teacher": str(manifest.teacher["name"]),
                "entropy": _keeps_entropy(manifest),
                "columns": _corpus_columns(manifest),
            }
        return {
            "address": self.dumps.storage.address,
            "dumps": self.ask("SELECT * FROM dumps ORDER BY dump", 1000) if facts else None,
            "facts": facts,
            "closed": {name: str(error) for name, error in self.dumps.closed.items()},
            "students": {name: {"dump": self._judged[name]} for name in self.students},
            "files": list(self.files),
            "window": POSITIONS,
        }

    def dump(self, name: str) -> Answer:
        """One dump: its shards in at most BARS groups, each with what the index says of it."""
        manifest = self.dumps.manifest(name)
        shards = manifest.shard_count
        group = f"shard * {BARS} // {shards}" if shards > BARS else "shard"
        means = [
            f'sum("{kind}.{statistic}" * {weight}) / nullif(sum({weight}), 0) AS "{kind}.{statistic}"'
            for kind in manifest.kinds
            for statistic, over in KINDS[kind].statistics.items()
            if over is not None and (weight := f'"{kind}.{over}"')
        ]
        columns = ", ".join(["sum(positions)::BIGINT AS positions", *means])
        sql = f"""SELECT min(shard) AS shard, {columns}
FROM shards WHERE dump = {literal(manifest.dump)} GROUP BY {group} ORDER BY 1"""
        return {"shards": self.ask(sql, BARS + 1)}

    def sequences(self, name: str, page: int) -> Answer:
        """One page of a dump's sequences (counted from 1), in their order.

        The index says in which shards they are: no others are read.

        Raises:
            InputError: there is no such dump or page.
        """
        manifest = self.dumps.manifest(name)
        shards = self._shards(manifest)
        counts, firsts = shards["sequences"].to_pylist(), shards["first_document"].to_pylist()
        documents = shards["documents"].to_pylist()
        ends = list(accumulate(counts))
        total = ends[-1] if ends else 0
        pages = max(-(-total // SEQUENCES), 1)
        if not 1 <= page <= pages:
            raise InputError(f"dump {manifest.dump!r} has {pages:,} pages of sequences, and no page {page:,}")
        start = (page - 1) * SEQUENCES
        within = [place for place, end in enumerate(ends) if end > start and end - counts[place] < start + SEQUENCES]
        found: Answer = {"page": page, "pages": pages, "total": total, "sequences": None, "beginnings": None}
        if not within:
            return found
        first, last = within[0], within[-1]
        part = (manifest.dump, shards["shard"][first].as_py(), shards["shard"][last].as_py())
        low, high = sequence_id(firsts[first], 0), sequence_id(firsts[last] + documents[last], 0)
        own = ["file", "row", "length", "targets", *_corpus_columns(manifest)]
        before = ends[first] - counts[first]
        found["sequences"] = self.ask(
            f"""SELECT sequence_id, {", ".join(map(identifier, own))}
FROM sequences
WHERE dump = {literal(manifest.dump)} AND sequence_id >= {low} AND sequence_id < {high}
ORDER BY sequence_id
LIMIT {SEQUENCES} OFFSET {start - before}""",
            SEQUENCES,
            part,
        )
        ids = [row[0] for row in found["sequences"]["rows"]]
        found["beginnings"] = self._beginnings(manifest, ids, part)
        return found

    def _beginnings(self, manifest: Manifest, ids: list[int], part: Part) -> Answer | None:
        if "positions" not in manifest.kinds or not ids:
            return None
        return self.ask(
            f"""SELECT sequence_id, string_agg(token_text, '' ORDER BY position) AS beginning
FROM positions
WHERE dump = {literal(manifest.dump)} AND sequence_id >= {ids[0]} AND sequence_id <= {ids[-1]} AND position < {BEGINNING}
GROUP BY sequence_id
ORDER BY sequence_id""",
            SEQUENCES,
            part,
        )

    def sequence(self, name: str, number: int, start: int) -> Answer:
        """A sequence's row, its neighbours, and up to POSITIONS of its tokens from position `start` on, each with what is known
        of it; for each file of a student, that too.

        Raises:
            InputError: there is no such dump or sequence, or the dump holds no tokens.
        """
        manifest = self.dumps.manifest(name)
        part = self._around(manifest, number)
        dump, ask = literal(manifest.dump), partial(self.ask, part=part)
        here = f"dump = {dump} AND sequence_id = {number}"
        window = f"{here} AND position >= {start} AND position < {start + POSITIONS}"
        own = ", ".join(map(identifier, [*SEQUENCE_COLUMNS, *_corpus_columns(manifest)]))
        row = ask(f"SELECT {own}\nFROM sequences\nWHERE {here}", 1)
        if not row["rows"]:
            raise InputError(f"dump {manifest.dump!r} has no sequence {number}")
        found: Answer = {"sequence": row, "start": start, "window": POSITIONS, "saliency": None, "students": {}}
        found |= self._neighbours(manifest, number, part)
        found["tokens"] = ask(self._tokens(manifest, window)) if _tokens_of(manifest) else None
        if "saliency" in manifest.kinds:
            found["saliency"] = ask(
                f"SELECT position, share\nFROM saliency\nWHERE {window} AND share IS NOT NULL\nORDER BY position"
            )
        for student, columns in self.students.items():
            kl = "kl" if "kl" in columns else "kl_lower_bound"
            if kl in columns:
                found["students"][student] = ask(
                    f"SELECT position, {kl} AS kl\nFROM {identifier(student)}\nWHERE {window}\nORDER BY position"
                )
        return found

    def _neighbours(self, manifest: Manifest, number: int, part: Part) -> dict[str, int | None]:
        """The sequences before and after one."""
        near = f"FROM sequences WHERE dump = {literal(manifest.dump)} AND sequence_id"
        row = self.ask(
            f"""SELECT (SELECT max(sequence_id) {near} < {number}) AS before,
       (SELECT min(sequence_id) {near} > {number}) AS after""",
            1,
            part,
        )
        return dict(zip(("before", "after"), row["rows"][0], strict=True))

    def _tokens(self, manifest: Manifest, window: str) -> str:
        if "positions" not in manifest.kinds:
            return f"""SELECT position, text AS token_text, is_target
FROM saliency JOIN tokens USING (dump, token_id)
WHERE {window}
ORDER BY position"""
        entropy = ", teacher_entropy AS entropy" if _keeps_entropy(manifest) else ""
        return f"""SELECT position, token_text, is_target, -token_logprob AS surprise, exp(tail_logprob) AS tail{entropy}
FROM positions
WHERE {window}
ORDER BY position"""

    def position(self, name: str, number: int, position: int) -> Answer:
        """What is known of one position: the teacher's prediction, its candidates and draws, and each student's.

        Raises:
            InputError: there is no such dump.
        """
        manifest = self.dumps.manifest(name)
        if "positions" not in manifest.kinds:
            return {"students": {}}
        ask = partial(self.ask, part=self._around(manifest, number))
        here = f"dump = {literal(manifest.dump)} AND sequence_id = {number} AND position = {position}"
        entropy = ", teacher_entropy" if _keeps_entropy(manifest) else ""
        found: Answer = {"students": {}, "draws": None}
        found["prediction"] = ask(
            f"""SELECT position, token_id, token_text, is_target, exp(token_logprob) AS probability,
       exp(tail_logprob) AS tail{entropy}
FROM positions
WHERE {here}"""
        )
        found["candidates"] = ask(
            f"""SELECT rank, token_id, token_text, exp(logprob) AS probability
FROM candidates
WHERE {here}
ORDER BY rank"""
        )
        if "tail_ids" in KINDS["positions"].schema(manifest).names:
            found["draws"] = ask(
                f"""SELECT token_id, text AS token_text, count(*) AS times
FROM (SELECT dump, unnest(tail_ids) AS token_id FROM positions WHERE {here}) JOIN tokens USING (dump, token_id)
GROUP BY ALL
ORDER BY times DESC, token_id"""
            )
        for student, columns in self.students.items():
            found["students"][student] = ask(_judgement(student, columns, here))
        return found

    def asked(self, dump: str, column: str = "", text: str = "", other: str = "") -> Asked:
        """What a question is about, checked.

        Raises:
            InputError: there is no such dump, column, other dump or file.
        """
        manifest = self.dumps.manifest(dump)
        if column and column not in sequences_schema(manifest).names:
            raise InputError(f"dump {manifest.dump!r} has no column {column!r}: `sequences` has the columns of the corpus")
        if other and other not in self.students and other not in self.dumps.manifests:
            raise InputError(f"there is no dump and no student's file {other!r}")
        judged, known = self.students.get(other, ()), "positions" not in manifest.kinds or knows_tokens(manifest)
        field = field_of(column, manifest, mixed_columns(self.dumps.manifests.values())) if column else ""
        return Asked(manifest.dump, _keeps_entropy(manifest), column, text, other, judged, known, field)


def _judgement(student: str, columns: tuple[str, ...], here: str) -> str:
    """What a student makes of a position, and the text of its likeliest token."""
    known = [identifier(name) for name in columns if name not in ("dump", "sequence_id", "position", "token_id", "logprob")]
    texts = ""
    if "likeliest_id" in columns:
        known.append("text AS likeliest_text")
        texts = " LEFT JOIN (SELECT dump, token_id AS likeliest_id, text FROM tokens) USING (dump, likeliest_id)"
    return f"""SELECT {", ".join(["exp(logprob) AS probability", *known])}
FROM (SELECT * FROM {identifier(student)} WHERE {here}){texts}"""


def _keeps_entropy(manifest: Manifest) -> bool:
    return "positions" in manifest.kinds and "tail_entropy" in KINDS["positions"].schema(manifest).names


def _tokens_of(manifest: Manifest) -> bool:
    """Whether a dump's tokens can be asked for: `positions` have them, and saliency that stands alone."""
    return bool({"positions", "saliency"} & set(manifest.kinds))


def _corpus_columns(manifest: Manifest) -> list[str]:
    return [name for name in sequences_schema(manifest).names if name not in SEQUENCE_COLUMNS]


def _judged(path: str) -> tuple[str, ...]:
    """The columns of a file, where it is one of a student's positions."""
    columns = tuple(file_rows(path).schema.names)
    return columns if set(JUDGED) <= set(columns) else ()


def _judged_dump(path: str) -> str | None:
    """The dump that a student's file is of; None of an empty one."""
    batch = next(pq.ParquetFile(path).iter_batches(1, columns=["dump"]), None)
    return None if batch is None or not len(batch) else str(batch["dump"][0])
