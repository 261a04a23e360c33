"""Stores made from numpy arrays alone, with no teacher and no torch: for tests of `knowledge_store` by itself."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store import DumpWriter, Manifest, Shard
from knowledge_store.catalogue.index import index_path
from knowledge_store.format.commits import CommitRecord, read_commit
from knowledge_store.format.integrity import DigestingFile, FileRecord, TableFile
from knowledge_store.format.manifest import read_manifest
from knowledge_store.format.parquet import read_table, write_table
from knowledge_store.format.records import read_record
from knowledge_store.format.sequences import corpus_column, sequence_id, token_hash, tokens_table
from knowledge_store.kinds import Arrays
from knowledge_store.storage import open_storage
from knowledge_store.writing.repair import repair_shard

MADE_BY = {"host": "here", "device": "cpu"}
DOCUMENTS = 100  # in a shard of the plan; a test may use fewer


def make_manifest(dump: str = "small", vocabulary: int = 11, k: int = 3, shards: int = 2, **changes: Any) -> Manifest:
    """A manifest of `shards` shards, `DOCUMENTS` documents each. Fields of `PositionsParameters` (`selection` as a record) are
    those of its positions; `kinds` may be a tuple of names."""
    positions = {
        "selection": {"name": "top-k", "k": k}, "quantisation_step": 0.125, "calibration": {}, "keep_context": False,
        "tail_entropy": False,
    }  # fmt: skip
    positions |= {name: changes.pop(name) for name in list(positions) if name in changes}
    kinds = changes.pop("kinds", ("positions",))
    if not isinstance(kinds, dict):
        kinds = {name: positions if name == "positions" else {} for name in kinds}
    fields: dict[str, Any] = {
        "dump": dump,
        "kinds": kinds,
        "teacher": {"name": "numbers", "vocabulary_size": vocabulary},
        "tokenizer": {"size": vocabulary},
        "corpus": {"files": [{"name": "numbers.jsonl", "bytes": 1, "sha256": "00"}]},
        "plan": {"max_length": 64},
        "derived": {
            "documents": DOCUMENTS * shards,
            "columns": {},
            "shards": [{"document": DOCUMENTS * n} for n in range(shards)],
        },
    }
    columns = changes.pop("columns", {})
    fields["derived"] = {**fields["derived"], "columns": columns}
    return Manifest(**{**fields, **changes})


def words(vocabulary: int) -> list[str | None]:
    """A text for each token id."""
    return [f"w{token}" for token in range(vocabulary)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, the plain way."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def knowledge_of(tokens: np.ndarray, logits: np.ndarray, k: int, targets: np.ndarray | None = None) -> Arrays:
    """What an extractor hands over for one sequence: logits[t − 1] predicts tokens[t]."""
    length, vocabulary = logits.shape
    logprobs = np.concatenate([np.zeros((1, vocabulary)), log_softmax(logits)[:-1]])
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    candidates = np.take_along_axis(logprobs, ids, axis=1)
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(axis=1))
    is_target = np.arange(length) > 0 if targets is None else targets
    return {
        "token_id": tokens.astype(np.uint32),
        "is_target": is_target,
        "has_knowledge": is_target,
        "token_logprob": logprobs[np.arange(length), tokens].astype(np.float32),
        "candidate_ids": ids.astype(np.uint32),
        "candidate_logprobs": candidates.astype(np.float32),
        "tail_logprob": tail.astype(np.float32),
    }


def sequence_row(document: int, knowledge: Arrays, window: int = 0, **own: Any) -> dict[str, Any]:
    """A row of `sequences` for this knowledge."""
    return {
        "sequence_id": sequence_id(document, window),
        "document": document,
        "file": "numbers.jsonl",
        "row": document + 1,
        "part": 0,
        "window": window,
        "length": len(knowledge["token_id"]),
        "targets": int(knowledge["is_target"].sum()),
        "truncated": False,
        "token_hash": token_hash(knowledge["token_id"]),
        **{corpus_column(name): value for name, value in own.items()},
    }


def apart(arrays: Arrays, rows: list[dict[str, Any]]) -> list[Arrays]:
    """The reverse of `joined`, for sequences of these rows of `sequences`."""
    ends = np.cumsum([row["length"] for row in rows])
    return [
        {name: array[end - row["length"] : end] for name, array in arrays.items()} for end, row in zip(ends, rows, strict=True)
    ]


def random_sequences(seed: int, count: int, vocabulary: int = 11, k: int = 3, longest: int = 9) -> list[Arrays]:
    """Knowledge of `count` sequences of 2 to `longest` tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, count)
    return [knowledge_of(random.integers(0, vocabulary, n), random.normal(0, 2, (n, vocabulary)), k) for n in lengths.tolist()]


def commit(writer: DumpWriter, shard: int, knowledge: list[Arrays], repair: bool = False, **more: Any) -> None:
    """Commit sequences as the documents of a shard, or repair it with them; `more` has corpus columns, a value per sequence."""
    first = DOCUMENTS * shard
    rows = [
        sequence_row(first + index, arrays, **{name: values[index] for name, values in more.items()})
        for index, arrays in enumerate(knowledge)
    ]
    publish = partial(repair_shard, writer) if repair else writer.commit
    publish(Shard(shard, first, DOCUMENTS, rows, {"positions": knowledge}, made_by=MADE_BY))


def write_store(
    folder: Any,
    dump: str = "small",
    shards: int = 2,
    vocabulary: int = 11,
    k: int = 3,
    size: int = 4,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A store with one complete dump of random knowledge, in a folder or a storage; returns which."""
    manifest = make_manifest(dump, vocabulary, k, shards, **changes)
    writer = DumpWriter.open(folder, manifest, tokens_table(words(vocabulary), words(vocabulary)))
    for shard in range(shards):
        commit(writer, shard, random_sequences(seed + shard, size, vocabulary, k))
    return folder


def write_group_store(
    folder: Any, dump: str = "groups", sizes: Any = ((2, 3), (4, 2, 2)), seed: int = 0, **changes: Any
) -> Any:
    """A store with a complete dump of groups of random knowledge: `sizes` has of each shard how many answers each of its groups
    has. Of two answers the first scores 1 and the second 0; of more the scores are unknown. A document of no answer is left
    out. Returns `folder`."""
    vocabulary = 11
    plan = {"max_length": 64, "groups": True}
    manifest = make_manifest(dump, vocabulary, shards=len(sizes), plan=plan, **changes)
    writer = DumpWriter.open(folder, manifest, tokens_table(words(vocabulary), words(vocabulary)))
    for shard, of_shard in enumerate(sizes):
        windows = [(DOCUMENTS * shard + place, window, size) for place, size in enumerate(of_shard) for window in range(size)]
        knowledge = random_sequences(seed + shard, len(windows))
        rows = [
            {**sequence_row(document, arrays, window), "score": 1.0 - window if size == 2 else None}
            for (document, window, size), arrays in zip(windows, knowledge, strict=True)
        ]
        writer.commit(Shard(shard, DOCUMENTS * shard, DOCUMENTS, rows, {"positions": knowledge}, made_by=MADE_BY))
    return folder


DRAW_WEIGHT = 0.0625  # of what `with_draws` makes up


def with_draws(arrays: Arrays, vocabulary: int = 11, weight: float = DRAW_WEIGHT) -> Arrays:
    """Knowledge with as many draws as its tails are large: the first tokens outside the candidates, one after the other."""
    rows = []
    for ids, logprobs, tail in zip(arrays["candidate_ids"], arrays["candidate_logprobs"], arrays["tail_logprob"], strict=True):
        outside = np.setdiff1d(np.arange(vocabulary), ids[logprobs > -np.inf])
        rows.append(np.sort(np.resize(outside, round(float(np.exp(tail)) / weight))))
    drawn = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
    for row, ids in zip(drawn, rows, strict=True):
        row[: len(ids)] = ids
    return {**arrays, "tail_ids": drawn}


def drawn_sequences(seed: int, count: int, vocabulary: int = 11, k: int = 3) -> list[Arrays]:
    """`random_sequences` of a calibrated dump with draws."""
    found = random_sequences(seed, count, vocabulary, k)
    return [{**with_draws(arrays, vocabulary), "tail_logsumexp": arrays["tail_logprob"] / 2} for arrays in found]


def write_drawn_store(folder: Path) -> Path:
    """A store with one small dump that has draws and a calibration."""
    selection = {"name": "top-k", "k": 3, "draw_weight": DRAW_WEIGHT, "draw_seed": 0}
    manifest = make_manifest(selection=selection, calibration={"temperature": 2.0, "sha256": "00"})
    writer = DumpWriter.open(folder, manifest, tokens_table(words(11), words(11)))
    for shard in range(2):
        if not writer.committed(shard):
            commit(writer, shard, drawn_sequences(shard, 3))
    return folder


def assert_close(found: pa.Table, expected: pa.Table, most: float = 1e-6) -> None:
    """The same tables, but for the last digits of log-probabilities: another machine's exp and ln may round differently."""
    for name in expected.column_names:
        if not name.endswith(("_logprob", "_logprobs")):
            assert found[name].equals(expected[name]), name
            continue
        for one, other in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
            assert (one is None) == (other is None)
            np.testing.assert_allclose([] if one is None else one, [] if other is None else other, rtol=1e-6, atol=most)


def contents(store: Path) -> dict[str, object]:
    """Every file of a store: bytes, or for a commit record all that does not say who made it and when."""
    found: dict[str, object] = {}
    for path in sorted(store.rglob("*")):
        if path.is_dir():
            continue
        name = str(path.relative_to(store))
        if path.parent.name == "commits":
            found[name] = {
                key: value for key, value in json.loads(path.read_text()).items() if key not in ("made_by", "sha256")
            }
        else:
            found[name] = path.read_bytes()
    return found


def record_of(path: Any) -> FileRecord:
    """The record of a Parquet file, as its writer would have made it."""
    return record_of_bytes(path.read_bytes())


def record_of_bytes(data: bytes) -> FileRecord:
    """The same of its bytes."""
    digesting = DigestingFile(io.BytesIO())
    length = int.from_bytes(data[-8:-4], "little") + 8
    digesting.write(data[:-length])
    digesting.digests()
    digesting.write(data[-length:])
    return digesting.record()


def stored_table(store: Any, table: str, shard: int = 0, dump: str = "small") -> pa.Table:
    """A table of a shard as it stands in its file."""
    return pq.read_table(pa.BufferReader(open_storage(store).read(f"{dump}/{table}/{shard:05d}.parquet")))


def published_file(store: Any, name: str) -> TableFile:
    """A Parquet file of a store as readers know it, whatever its record says of it: it has the bytes that stand there now."""
    storage = open_storage(store)
    data = storage.read(name)
    schema = pq.read_schema(pa.BufferReader(data)).remove_metadata()
    return TableFile(storage, name, record_of_bytes(data), schema)


def table_file_of(path: Path, record: FileRecord | None = None) -> TableFile:
    """A Parquet file of a store as readers know it; by default whatever its record says of it."""
    schema = pq.read_schema(path).remove_metadata()
    return TableFile(open_storage(path.parent), path.name, record or record_of(path), schema)


def manifest_of(store: Any, dump: str = "small") -> Manifest:
    """The manifest of a dump."""
    return read_manifest(open_storage(store), dump)


def commit_of(store: Any, shard: int, dump: str = "small") -> CommitRecord:
    """The commit record of a shard."""
    return read_commit(open_storage(store), dump, shard)


def sealed_json(path: Path) -> dict[str, Any]:
    """A sealed JSON file."""
    return read_record(open_storage(path.parent), path.name)


def rewrite(path: Path, table: pa.Table) -> FileRecord:
    """Write a table as a Parquet file of a store, in one row group."""
    with open(path, "wb") as file:
        return write_table(file, table.schema, [table])


def index_of(store: Any) -> Path:
    """The file of a store's index."""
    return index_path(open_storage(store))


def read_whole(path: Path) -> pa.Table:
    """A Parquet file of a store, whatever its record says of it."""
    return read_table(table_file_of(path))
