"""Bytes of a dump on disk: as it is, at other k, idea by idea, beside other tools' layouts, and how near its entropy.

    python -m benchmarks.size --text wikitext2-test.txt --teacher smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

Each teacher reads the text once, in float32 (`--characters` for its beginning only); what it says of the 50 likeliest tokens
is kept unrounded in `--work`, so that a second run asks nothing. From that one pass come dumps by the writer of every dump.
Bytes are of every file but the index, which is derived, and the vocabulary, the same for every dump of a tokenizer and told
apart.

* KL: from the unrounded candidates and tail to what a reader makes of the stored ones, in nats, mean over positions; beside it
  that of rounding each log-probability by itself, as format versions 1 and 2 did.
* What each idea saves: the positions as they are stored, but for that one idea, written in the same way.
* What was tried and left out: the same, with one idea more.
* The floor: the bits that an adaptive model spends on the same numbers, each told from those before it (prediction by partial
  matching, method C, over contexts that are named below). No bound, but what a simple model of the data needs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import knowledge_store.format.parquet
from benchmarks.layouts import LAYOUTS, Records
from benchmarks.measurement import RESULTS, keep
from benchmarks.pictures import picture
from knowledge_store import DumpWriter, KnowledgeStore, Manifest
from knowledge_store.format.layout import TOKENS_FILE, table_file
from knowledge_store.format.parquet import COUNTING, TEXT, Columns, write_table
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.kinds.field import PLAIN, SPLIT
from knowledge_store.kinds.positions import positions_of
from knowledge_store.kinds.positions.packing import NO_TOKEN, ZERO, id_bytes, packed_ids, quantise
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.dumping.batches import extract_batch, length_batches, predict_batch
from teacher_dump.dumping.plan import ShardInput, ShardReader, make_manifest
from teacher_dump.dumping.teacher_pass import shard_of
from teacher_dump.extraction.positions import positions_parameters
from teacher_dump.teachers.local import load_teacher
from teacher_dump.teachers.protocol import Teacher

MAX_K = 50
KEPT = (5, 16, 50)
RATIO = 100_000  # the figure that the literature cites


# The teacher's pass


def ask(config: DumpConfig, teacher: Teacher, shard: ShardInput, path: Path) -> list[Arrays]:
    """What the teacher says of each sequence of a shard, kept in `path`: the 50 likeliest tokens unrounded, and beside them the
    draws of a default dump and its tails' entropy (`tail_ids`, `tail_entropy`)."""
    lengths = [len(sequence.token_ids) for sequence in shard.sequences]
    if not path.exists():
        found: list[Arrays] = [{}] * len(lengths)
        both = [positions_parameters(each) for each in (replace(config, top_k=MAX_K, draw_weight=0.0), config)]
        with progress_bar(f"asking {config.dump_name}", sum(lengths), "positions") as advance:
            for indices in length_batches(lengths, config.batch_size * config.max_length):
                sequences = [shard.sequences[index] for index in indices]
                prediction = predict_batch(config, teacher, sequences)
                extracted = [extract_batch(config, {"positions": each}, prediction, sequences)["positions"] for each in both]
                for index, arrays, drawn in zip(indices, *extracted, strict=True):
                    found[index] = {**arrays, **{name: drawn[name] for name in ("tail_ids", "tail_entropy")}}
                advance(sum(len(sequence.token_ids) for sequence in sequences))
        unfinished = path.with_suffix(".unfinished.npz")
        width = max(each["tail_ids"].shape[1] for each in found)  # a batch is as wide as one of its positions needs
        for each in found:
            missing = width - each["tail_ids"].shape[1]
            each["tail_ids"] = np.pad(each["tail_ids"], ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        np.savez(unfinished, **{name: np.concatenate([each[name] for each in found]) for name in found[0]})  # type: ignore[arg-type]
        unfinished.replace(path)
    with np.load(path) as kept:
        arrays = dict(kept)
    ends = np.cumsum(lengths).tolist()
    return [
        {name: array[end - length : end] for name, array in arrays.items()} for end, length in zip(ends, lengths, strict=True)
    ]


def fewer(arrays: Arrays, k: int, draws: bool) -> Arrays:
    """The k likeliest of the candidates, the others in the tail; with the draws, which belong to k = 5, or without."""
    tail = arrays["tail_logprob"].astype(np.float64)
    rest = arrays["candidate_logprobs"][:, k:].astype(np.float64)
    if rest.shape[1]:
        tail = np.logaddexp(tail, np.logaddexp.reduce(rest, axis=1))
    found = {name: array for name, array in arrays.items() if draws or not name.startswith("tail_")}
    return {
        **found,
        "candidate_ids": arrays["candidate_ids"][:, :k],
        "candidate_logprobs": arrays["candidate_logprobs"][:, :k],
        "tail_logprob": tail.astype(np.float32),
    }


# The dumps


@dataclass(frozen=True)
class Dump:
    """A dump that was written: its manifest, the rows of its positions and sequences, and the files' bytes."""

    manifest: Manifest
    positions: int
    bytes: int
    vocabulary_bytes: int
    index_bytes: int
    column_bytes: dict[str, int]
    dense_bytes: int

    @property
    def per_position(self) -> float:
        """Bytes of everything but index and vocabulary."""
        return (self.bytes - self.vocabulary_bytes) / self.positions


def write(folder: Path, config: DumpConfig, manifest: Manifest, shards: list[ShardInput], knowledge: list[list[Arrays]],
          tokens: pa.Table, k: int, draws: bool) -> Dump:  # fmt: skip
    """A dump of the k likeliest tokens in a store of its own, by the writer of every dump."""
    shutil.rmtree(folder, ignore_errors=True)
    rule = replace(config, top_k=k, draw_weight=config.draw_weight if draws else 0.0).rule
    parameters = replace(positions_of(manifest), selection=rule, tail_entropy=draws)
    writer = DumpWriter.open(folder, replace(manifest, kinds={"positions": parameters.to_record()}), tokens)
    for shard, sequences in zip(shards, knowledge, strict=True):
        positions = [fewer(arrays, k, draws) for arrays in sequences]
        writer.commit(shard_of(writer.manifest, shard, {"positions": positions}, {"device": "numbers"}))
    store = KnowledgeStore.open(folder)
    [summary] = store.info()
    files = [path for path in folder.rglob("*") if path.is_file()]
    index = sum(path.stat().st_size for path in files if path.suffix == ".duckdb")
    return Dump(
        manifest=writer.manifest,
        positions=summary.positions,
        bytes=sum(path.stat().st_size for path in files) - index,
        vocabulary_bytes=(folder / config.dump_name / TOKENS_FILE).stat().st_size,
        index_bytes=index,
        column_bytes=summary.column_bytes,
        dense_bytes=int(summary.facts["positions.dense_bytes"] or 0),
    )


def mean_kl(store: Path, knowledge: list[list[Arrays]], k: int, step: float) -> tuple[float, float]:
    """Mean over positions of KL(unrounded ‖ rounded), candidates and tail, in nats: as stored, and each rounded by itself."""
    total, alone, count = 0.0, 0.0, 0
    opened = KnowledgeStore.open(store, cache_size=0)
    ordinal = 0
    for sequences in knowledge:
        for arrays in sequences:
            here = arrays["has_knowledge"]
            unrounded = fewer(arrays, k, False)
            stored = opened[ordinal]
            ordinal += 1

            def normal(found: Arrays, here: np.ndarray = here) -> np.ndarray:
                both = np.concatenate([found["candidate_logprobs"], found["tail_logprob"][:, None]], axis=1)[here].astype(
                    np.float64
                )
                return both - np.logaddexp.reduce(both, axis=1, keepdims=True)

            p, q = normal(unrounded), normal(stored)
            by_itself = np.round(p / step) * step
            by_itself -= np.logaddexp.reduce(by_itself, axis=1, keepdims=True)
            with np.errstate(invalid="ignore"):
                total += float(np.where(np.isneginf(p), 0, np.exp(p) * (p - q)).sum())
                alone += float(np.where(np.isneginf(p), 0, np.exp(p) * (p - by_itself)).sum())
            count += int(here.sum())
    return total / count, alone / count


# What each idea saves


def logical_tables(store: Path, manifest: Manifest) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Each row group of each shard: as it is used, and as it is stored."""
    kind = KINDS["positions"]
    folder = store / manifest.dump
    for number in range(manifest.shard_count):
        with pq.ParquetFile(table_file(str(folder), "positions", number)) as file:
            for group in range(file.num_row_groups):
                stored = file.read_row_group(group)
                yield kind.unpack(stored, manifest), stored


def below_zero(column: pa.ChunkedArray, step: float) -> pa.Array:
    """Log-probabilities as the nearest whole steps below 0, stored as steps are; null stays null, and −∞ is ∞ steps."""
    column = column.combine_chunks()
    if pa.types.is_list(column.type):
        values = below_zero(pa.chunked_array([column.values]), step)
        return pa.ListArray.from_arrays(column.offsets, values, mask=column.is_null())
    there = column.is_valid().to_numpy(zero_copy_only=False)
    return pa.array((np.round(column.fill_null(0).to_numpy() / -step) + ZERO).astype(np.float32), mask=~there)


def changed(stored: pa.Table, columns: dict[str, pa.Array], without: tuple[str, ...] = ()) -> pa.Table:
    """The table with some columns in place of those of the same name or of `without`, which must be as many or fewer."""
    for name in without:
        stored = stored.drop_columns(name)
    for name, column in columns.items():
        if name in stored.column_names:
            stored = stored.set_column(stored.column_names.index(name), name, column)
        else:
            stored = stored.append_column(name, column)
    return stored


def as_used(table: pa.Table, step: float) -> pa.Table:
    """The columns as they are used, each log-probability rounded by itself, as format versions 1 and 2 kept them."""
    columns: dict[str, pa.Array] = {}
    for name in ("token_logprob", "candidate_logprobs", "tail_logprob"):
        column = table[name].combine_chunks()
        values = column.values if pa.types.is_list(column.type) else column
        multiples = pa.array(
            quantise(values.fill_null(0).to_numpy(), step), mask=values.is_null().to_numpy(zero_copy_only=False)
        )
        lists = pa.types.is_list(column.type)
        columns[name] = pa.ListArray.from_arrays(column.offsets, multiples, mask=column.is_null()) if lists else multiples
    return changed(table, columns)


def undone(idea: str, table: pa.Table, stored: pa.Table, manifest: Manifest) -> pa.Table:
    """The stored table without one of its ideas."""
    step = positions_of(manifest).quantisation_step
    if idea == "gaps between candidates, the first for nothing":
        return changed(stored, {"candidate_steps": below_zero(table["candidate_logprobs"], step)}, ("gap_steps",))
    if idea == "log-odds of the tail":
        return changed(stored, {"tail_steps": below_zero(table["tail_logprob"], step)})
    if idea == "a token that is a candidate says nothing":
        return changed(stored, {"token_steps": below_zero(table["token_logprob"], step)})
    if idea == "ids side by side in a byte string":
        return changed(stored, {"candidate_ids": table["candidate_ids"]})
    assert idea == "steps split by byte"  # under other names they go into dictionaries, as floats do
    return stored.rename_columns([name.replace("_steps", "_count") for name in stored.column_names])


UNDONE = (
    "gaps between candidates, the first for nothing",
    "log-odds of the tail",
    "a token that is a candidate says nothing",
    "ids side by side in a byte string",
    "steps split by byte",
)


def by_frequency(ids: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """A number for each token id, the frequentest first, as if counted over the whole dump beforehand."""
    counts = np.bincount(ids, minlength=int(max(ids.max(), token_ids.max())) + 1)
    order = np.argsort(-counts, kind="stable")
    numbers = np.empty(len(order), np.uint32)
    numbers[order] = np.arange(len(order), dtype=np.uint32)
    return numbers


def encodings(schema: pa.Schema) -> Columns:
    """How the store would encode these columns, of which some are made up here."""
    chosen = {name: COUNTING for name in schema.names if name in ("sequence_id", "position")}
    for column in schema:
        value_type = column.type.value_type if pa.types.is_list(column.type) else column.type
        path = f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name
        if column.name.endswith("_steps"):
            chosen[path] = SPLIT
        elif pa.types.is_binary(column.type):
            chosen[path] = TEXT
        elif value_type == pa.uint32():
            chosen[path] = PLAIN
    return Columns(chosen)


def table_bytes(groups: list[pa.Table]) -> int:
    """Bytes of a file with these row groups, by the writer of every shard."""
    file = io.BytesIO()
    write_table(file, groups[0].schema, groups, encodings(groups[0].schema))
    return len(file.getvalue())


def ideas(store: Path, dump: Dump) -> dict[str, dict[str, float]]:
    """Bytes a position that each idea saves, alone, and that ideas which were left out would."""
    manifest = dump.manifest
    pairs = list(logical_tables(store, manifest))
    tables, stored = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    own = table_bytes(stored)

    def saved(groups: list[pa.Table]) -> float:
        return round((table_bytes(groups) - own) / dump.positions, 3)

    kept = {idea: saved([undone(idea, *pair, manifest) for pair in pairs]) for idea in UNDONE}
    kept["all of them: each log-probability rounded by itself, columns as they are used"] = saved(
        [as_used(table, positions_of(manifest).quantisation_step) for table in tables]
    )

    left_out: dict[str, float] = {}
    lists = [table["candidate_ids"].combine_chunks() for table in tables]
    nulled = []
    for table, ids in zip(tables, lists, strict=True):
        tokens = np.repeat(table["token_id"].to_numpy(), pc.list_value_length(ids).fill_null(0).to_numpy())
        values = pa.array(ids.values.to_numpy(), mask=ids.values.to_numpy() == tokens)
        nulled.append(pa.ListArray.from_arrays(ids.offsets, values, mask=ids.is_null()))
    plain = table_bytes([changed(one, {"candidate_ids": ids}) for one, ids in zip(stored, lists, strict=True)])
    null = table_bytes([changed(one, {"candidate_ids": ids}) for one, ids in zip(stored, nulled, strict=True)])
    left_out["a candidate that is the token left null (in lists of ids)"] = round((plain - null) / dump.positions, 3)

    every = np.concatenate([ids.values.to_numpy() for ids in lists])
    numbers = by_frequency(every, np.concatenate([table["token_id"].to_numpy() for table in tables]))
    renumbered = []
    for one, table, ids in zip(stored, tables, lists, strict=True):
        again = pa.ListArray.from_arrays(ids.offsets, pa.array(numbers[ids.values.to_numpy()]), mask=ids.is_null())
        tokens = pa.array(numbers[table["token_id"].to_numpy()])
        counts = pc.list_value_length(ids).fill_null(0).to_numpy().astype(np.int64)
        width = id_bytes(manifest.vocabulary_size)
        octets = packed_ids(again.values.to_numpy(), counts, ids.is_valid().to_numpy(zero_copy_only=False), width)
        renumbered.append(changed(one, {"candidate_ids": octets, "token_id": tokens}))
    mapping = io.BytesIO()
    table = pa.table({"token_id": np.argsort(numbers).astype(np.uint32)})
    write_table(mapping, table.schema, [table], encodings(table.schema))
    left_out["ids numbered by frequency, the table of numbers not counted"] = -saved(renumbered)
    left_out["ids numbered by frequency"] = round(-saved(renumbered) - len(mapping.getvalue()) / dump.positions, 3)
    larger = [pa.concat_tables(stored[at : at + 4]).combine_chunks() for at in range(0, len(stored), 4)]
    left_out["row groups four times as large"] = -saved(larger)
    level = knowledge_store.format.parquet.COMPRESSION_LEVEL
    try:
        knowledge_store.format.parquet.COMPRESSION_LEVEL = 22
        left_out["Zstandard at its highest level, 22"] = -saved(stored)
    finally:
        knowledge_store.format.parquet.COMPRESSION_LEVEL = level
    return {"saved_by": kept, "left_out": left_out}


# The floor


def matching_bits(symbols: np.ndarray, contexts: list[np.ndarray], alphabet: int) -> float:
    """Bits of coding whole numbers one after the other by partial matching, method C: the longest context in which the symbol
    has been seen tells it, each one in which it has not costs an escape, and a symbol that is new everywhere log2(alphabet).
    Moffat (1990), "Implementing the PPM data compression scheme".

    Args:
        symbols: int64 (N,).
        contexts: longest first; int64 (N,) each.
        alphabet: how many symbols there are.
    """
    seen: list[dict[int, dict[int, int]]] = [{} for _ in contexts]
    parts: list[float] = []
    for symbol, *places in zip(symbols.tolist(), *(context.tolist() for context in contexts), strict=True):
        share = 1.0
        for counts_of, place in zip(seen, places, strict=True):
            counts = counts_of.get(place)
            if counts:
                total = counts[-1] + len(counts) - 1
                if symbol in counts:
                    share *= counts[symbol] / total
                    break
                share *= (len(counts) - 1) / total
        else:
            share /= alphabet
        parts.append(share)
        for counts_of, place in zip(seen, places, strict=True):
            counts = counts_of.setdefault(place, {-1: 0})  # under −1 how many there were
            counts[-1] += 1
            counts[symbol] = counts.get(symbol, 0) + 1
    return float(-np.log2(np.array(parts)).sum())


def hashed(*columns: np.ndarray | int) -> np.ndarray:
    """One number for several, int64."""
    found = np.zeros(max(np.size(column) for column in columns), np.int64)
    for column in columns:
        found = found * 1_000_003 + np.asarray(column, np.int64) + 1
    return found


def floor(store: Path, dump: Dump) -> dict[str, float]:
    """Bytes a position of partial matching, for each column that is stored."""
    manifest = dump.manifest
    pairs = list(logical_tables(store, manifest))
    table = pa.concat_tables([pair[0] for pair in pairs]).combine_chunks()
    stored = pa.concat_tables([pair[1] for pair in pairs]).combine_chunks()
    tokens = table["token_id"].to_numpy().astype(np.int64)
    before = np.concatenate([[0], tokens[:-1]])
    before_that = np.concatenate([[0, 0], tokens[:-2]])
    here = table["candidate_ids"].is_valid().to_numpy()
    k = positions_of(manifest).selection.candidates
    ids = pc.list_flatten(table["candidate_ids"]).to_numpy().astype(np.int64).reshape(-1, k)
    gaps = pc.list_flatten(stored["gap_steps"]).to_numpy().astype(np.int64).reshape(-1, k - 1) - ZERO
    tail = stored["tail_steps"].to_numpy(zero_copy_only=False)[here].astype(np.int64) - ZERO
    vocabulary, previous, older = manifest.vocabulary_size, before[here], before_that[here]
    bits: dict[str, float] = {
        "token_id": matching_bits(tokens, [hashed(before, before_that), hashed(before), np.zeros_like(tokens)], vocabulary)
    }
    bits["candidate_ids"] = bits["gap_steps"] = 0.0
    for rank in range(k):
        upper = ids[:, rank - 1] if rank else np.full(len(ids), -1)
        contexts = [hashed(previous, upper, older), hashed(previous, upper), hashed(previous), np.zeros(len(ids), np.int64)]
        bits["candidate_ids"] += matching_bits(ids[:, rank], contexts, vocabulary)
    for rank in range(k - 1):
        upper = gaps[:, rank - 1] if rank else np.zeros(len(gaps), np.int64)
        contexts = [hashed(upper, tail // 4), hashed(upper), np.zeros(len(gaps), np.int64)]
        bits["gap_steps"] += matching_bits(gaps[:, rank], contexts, 1 << 10)
    bits["tail_steps"] = matching_bits(tail, [hashed(ids[:, 0]), np.zeros_like(tail)], 1 << 10)
    unknown = stored["token_steps"].is_valid().to_numpy()
    surprise = stored["token_steps"].drop_null().to_numpy().astype(np.int64) - ZERO
    bits["token_steps"] = matching_bits(surprise, [hashed(tail[unknown[here]]), np.zeros_like(surprise)], 1 << 10)
    # That the token is no candidate costs nothing: the ids say it, except where it is one in another place.
    return {name: round(each / 8 / dump.positions, 3) for name, each in bits.items()}


# All of it


def records(knowledge: list[list[Arrays]], k: int, vocabulary_size: int) -> Records:
    """What other layouts are given: predictions alone."""
    sequences = [fewer(arrays, k, False) for shard in knowledge for arrays in shard]
    here = [arrays["has_knowledge"] for arrays in sequences]
    names = {"ids": "candidate_ids", "logprobs": "candidate_logprobs"}
    names |= {name: name for name in ("tail_logprob", "token_id", "token_logprob")}
    columns = {
        name: np.concatenate([each[column][kept] for each, kept in zip(sequences, here, strict=True)])
        for name, column in names.items()
    }
    return Records(**columns, lengths=np.array([int(kept.sum()) for kept in here]), vocabulary_size=vocabulary_size)


def measure(config: DumpConfig, work: Path) -> dict[str, Any]:
    """Everything about one teacher."""
    teacher = load_teacher(config.teacher, config.gguf_file, config.dtype, config.device)
    manifest = make_manifest(config, teacher)
    reader = ShardReader(config, manifest, CorpusTokenizer(teacher.tokenizer, config.max_length))
    shards = [reader.read(number) for number in range(manifest.shard_count)]
    knowledge = [ask(config, teacher, shard, work / f"{config.dump_name}-{shard.shard:05d}.npz") for shard in shards]
    tokens = tokens_table(*teacher.tokens())
    del teacher, reader

    store = work / "store"
    found: dict[str, Any] = {
        "teacher": manifest.teacher["name"].rsplit("/", 1)[-1],
        "vocabulary_size": manifest.vocabulary_size,
    }
    per_k: dict[str, dict[str, float | None]] = {}
    for k in KEPT:
        dump = write(store, config, manifest, shards, knowledge, tokens, k, False)
        here = records(knowledge, k, manifest.vocabulary_size)
        others = {name: layout(here) for name, layout in LAYOUTS.items()}
        known = {name: None if math.isnan(size) else round(size, 2) for name, size in others.items()}
        per_k[str(k)] = {"knowledge-store": round(dump.per_position, 2), **known}
    drawn = write(store, config, manifest, shards, knowledge, tokens, KEPT[0], True)
    dump = write(store, config, manifest, shards, knowledge, tokens, KEPT[0], False)
    columns = sorted(dump.column_bytes.items(), key=lambda item: -item[1])
    kls = mean_kl(store, knowledge, KEPT[0], positions_of(manifest).quantisation_step)
    return {
        **found,
        "positions": dump.positions,
        "shards": len(shards),
        "bytes_per_position": round(dump.per_position, 3),
        "draw_weight": config.draw_weight,
        "bytes_per_position_with_draws": round(drawn.per_position, 3),
        "bytes_per_position_of_draws": round(drawn.column_bytes["positions.tail_ids"] / dump.positions, 3),
        "bytes_per_position_of_tail_entropy": round(drawn.column_bytes["positions.tail_entropy"] / dump.positions, 3),
        "vocabulary_bytes": dump.vocabulary_bytes,
        "index_bytes": dump.index_bytes,
        **dict(zip(("mean_kl", "mean_kl_each_by_itself"), kls, strict=True)),
        "dense_bytes": dump.dense_bytes,
        "ratio": round(dump.dense_bytes / (dump.bytes - dump.vocabulary_bytes)),
        "ratio_with_vocabulary": round(dump.dense_bytes / dump.bytes),
        "bytes_per_position_of_a_ratio_of_100000": round(dump.dense_bytes / dump.positions / RATIO, 3),
        "column_bytes_per_position": {column: round(size / dump.positions, 3) for column, size in columns},
        **ideas(store, dump),
        "floor": floor(store, dump),
        "per_k": per_k,
    }


def draw(teachers: list[dict[str, Any]], path: Path) -> None:
    """Bytes a position against k beside other layouts, and of each column beside what partial matching needs."""
    with picture(path, 1, 2, figsize=(12, 4.2), width_ratios=[1, 1.1]) as panels:
        by_k, columns = panels
        first = teachers[0]
        for name in first["per_k"][str(KEPT[0])]:
            ours = name == "knowledge-store"
            values = [first["per_k"][str(k)][name] for k in KEPT]
            by_k.plot(
                KEPT,
                values,
                marker="o",
                markersize=3,
                linewidth=2.4 if ours else 1,
                color="black" if ours else None,
                label=name,
            )
        by_k.set(xscale="log", yscale="log", xlabel="candidates, k", ylabel="bytes a position", title=f"{first['teacher']}")
        by_k.set_xticks(KEPT, [str(k) for k in KEPT], minor=False)
        by_k.legend(frameon=False, fontsize=7)
        names = list(first["floor"])
        places = np.arange(len(names))[::-1]
        for number, found in enumerate(teachers):
            stored = [found["column_bytes_per_position"].get(f"positions.{name}", 0.0) for name in names]
            shift = 0.2 - 0.4 * number
            columns.barh(places + shift, stored, 0.36, color=f"C{number}", alpha=0.45, label=f"{found['teacher']}: stored")
            columns.barh(
                places + shift, [found["floor"][name] for name in names], 0.18, color=f"C{number}", label="a model needs"
            )
        columns.set_yticks(places, names)
        columns.set(xlabel="bytes a position", title="Columns, and what an adaptive model of them needs")
        columns.legend(frameon=False, fontsize=7)


def show(found: dict[str, Any]) -> None:
    """Print one teacher's figures for a person."""
    print(f"\n{found['teacher']}, vocabulary {found['vocabulary_size']:,}, {found['positions']:,} positions")
    print(f"  bytes a position {found['bytes_per_position']:.3f}, with draws {found['bytes_per_position_with_draws']:.3f}")
    print(f"  mean KL {found['mean_kl']:.2e} nats; each by itself {found['mean_kl_each_by_itself']:.2e}")
    print(f"  ratio {found['ratio']:,}, with the vocabulary {found['ratio_with_vocabulary']:,}")
    print(f"  floor {sum(found['floor'].values()):.2f}: {found['floor']}")
    for title in ("saved_by", "left_out"):
        for idea, saved in found[title].items():
            print(f"  {title.replace('_', ' '):<9} {saved:>7.3f}  {idea}")
    print(f"  {'bytes a position at k':<44}" + "".join(f"{k:>8}" for k in KEPT))
    for name in found["per_k"][str(KEPT[0])]:
        sizes = [found["per_k"][str(k)][name] for k in KEPT]
        print(f"  {name:<44}" + "".join("       –" if size is None else f"{size:>8.1f}" for size in sizes))


def main() -> None:
    """Measure every teacher, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", action="append", required=True, help="folder or hub id, and a GGUF file in it")
    parser.add_argument("--text", required=True, type=Path, help="a .txt file")
    parser.add_argument("--characters", type=int, nargs="+", default=[0], help="of the text, for each teacher; 0 for all")
    parser.add_argument("--work", type=Path, default=Path(".bench/size"), help="where the teachers' answers are kept")
    options = parser.parse_args()
    found = []
    for number, (folder, *gguf_file) in enumerate(options.teacher):
        name = f"teacher-{number}"
        work = options.work / name
        work.mkdir(parents=True, exist_ok=True)
        characters = options.characters[min(number, len(options.characters) - 1)]
        whole = options.text.read_text()
        text = work / options.text.name
        content = whole[: characters or None]
        # Answers of another teacher or text are no answers.
        asked = json.dumps([folder, gguf_file, hashlib.sha256(content.encode()).hexdigest()])
        if not (work / "asked").exists() or (work / "asked").read_text() != asked:
            shutil.rmtree(work)
            work.mkdir()
            text.write_text(content)
            (work / "asked").write_text(asked)
        config = DumpConfig(
            folder, (text,), work / "none", name, gguf_file=gguf_file[0] if gguf_file else None, dtype="float32",
            top_k=KEPT[0],
        )  # fmt: skip
        found.append(measure(config, work))
        show(found[-1])
    keep("size", {"teachers": found})
    draw(found, RESULTS / "size.svg")


if __name__ == "__main__":
    main()
