"""What more a byte can buy: other encodings of what positions keep, each alone, and how far an entropy coder would come.

    python -m benchmarks.studies.encodings --work .selections

On the dumps that `benchmarks.studies.selections` or `benchmarks.studies.fidelity` left in its work folder: one idea is changed
at a time, and the tables are written as every shard is: Parquet, Zstandard, the project's row groups. What gains less than 0.3
bytes a position is not worth a rule of the format.

* Draws, of several weights: bytes of their column alone, encoded in several ways. Numbers by frequency are of the same dump,
  and the table of them is not counted.
* Candidates and the token: by how much the table shrinks (below 0: grows) where they are numbered by frequency, the token is
  its place among them, or there are differences to the row before.
* Gaps between candidates coarser where the candidates are unlikely: bytes and mean KL to what was not rounded, beside steps
  that are equal everywhere, and what is gained at the same KL. A dump does not keep what was not rounded: each value is put at
  random into its step.
* The floor: bits of an adaptive model that codes each number by those before it (prediction by partial matching with the token
  before, the rank above, …; see `benchmarks.size`). It learns from the dump alone, as it goes. The draws of a position are a
  set, for which log2(n!) bits are taken off.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.measurement import STUDIES, keep
from benchmarks.selection_dumps import ARMS
from benchmarks.size import by_frequency, hashed, matching_bits
from benchmarks.studies.selections import row_groups, table_bytes
from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.columns import list_offsets
from knowledge_store.kinds.positions import positions_of
from knowledge_store.kinds.positions.packing import ZERO, exact_steps, id_bytes, logprobs_of, packed_ids

DRAWN = ("top-5, τ = 0.2", "top-5, τ = 0.1", "top-5, τ = 0.05", "threshold, τ = 0.1")
Tables = list[pa.Table]


@dataclass(frozen=True)
class Packed:
    """A dump's positions: the row groups as they are stored."""

    manifest: Manifest
    tables: Tables

    @property
    def positions(self) -> int:
        """Rows of all tables."""
        return sum(len(table) for table in self.tables)


def read(folder: Path) -> dict[str, Packed]:
    """Every arm of DRAWN, and top-5."""
    store = KnowledgeStore.open(folder)
    found = {}
    for name in ("top-5", *DRAWN):
        dump = f"arm-{list(ARMS).index(name)}"
        paths = sorted((folder / dump / "positions").glob("*.parquet"))
        found[name] = Packed(store.manifest(dump), [table for path in paths for table in row_groups(path)])
    return found


# Draws


def lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A list column's values side by side, int64, how many each row has, and which rows are there."""
    counts = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    return pc.list_flatten(column).to_numpy().astype(np.int64), counts, column.is_valid().to_numpy()


def as_lists(values: np.ndarray, counts: np.ndarray, kept: np.ndarray, kind: pa.DataType) -> pa.Array:
    """The reverse of `lists`."""
    return pa.ListArray.from_arrays(list_offsets(counts), pa.array(values).cast(kind), mask=pa.array(~kept))


def differences(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each value to the one before in its row, the first of a row itself."""
    found = np.diff(values, prepend=0)
    first = (np.cumsum(counts) - counts)[counts > 0]
    found[first] = values[first]
    return found


def split(values: np.ndarray, counts: np.ndarray, kept: np.ndarray) -> pa.Array:
    """Whole numbers as steps are stored."""
    return as_lists((values + ZERO).astype(np.float32), counts, kept, pa.float32())


def once(values: np.ndarray, counts: np.ndarray, kept: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Each drawn token once, and how often it was drawn."""
    rows = np.repeat(np.arange(len(counts)), counts)
    new = np.ones(len(values), bool)
    new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    often = np.diff(np.append(np.flatnonzero(new), len(values)))
    fewer = np.bincount(rows[new], minlength=len(counts))
    return as_lists(values[new], fewer, kept, pa.uint32()), as_lists(often, fewer, kept, pa.uint16())


def in_order(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Values in ascending order within their rows."""
    return values[np.lexsort((values, np.repeat(np.arange(len(counts)), counts)))]


def draws(packed: Packed) -> dict[str, float]:
    """Bytes a position of draws that are encoded in several ways."""
    size = id_bytes(packed.manifest.vocabulary_size)
    drawn = [lists(KINDS["positions"].codec.unpack(table, packed.manifest)["tail_ids"]) for table in packed.tables]
    whole = np.concatenate([values for values, _, _ in drawn])
    numbers = by_frequency(whole, np.zeros(1, np.int64)).astype(np.int64)
    tokens = np.concatenate([table["token_id"].to_numpy() for table in packed.tables]).astype(np.int64)
    known = by_frequency(tokens, whole).astype(np.int64)  # a dump counts its corpus before the teacher is asked
    ways: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, pa.Array]]] = {
        "a list of integers, plain": lambda v, c, k: {"tail_ids": as_lists(v, c, k, pa.uint32())},
        "a list of integers, each token once beside its count": lambda v, c, k: dict(
            zip(("tail_ids", "tail_counts"), once(v, c, k), strict=True)
        ),
        "split by byte": lambda v, c, k: {"tail_steps_of_ids": split(v, c, k)},
        "side by side in a byte string": lambda v, c, k: {"tail_ids": packed_ids(v.astype(np.uint32), c, k, size)},
        "differences, split by byte": lambda v, c, k: {"tail_steps_of_ids": split(differences(v, c), c, k)},
        "numbered by the frequency of draws, split by byte": lambda v, c, k: {
            "tail_steps_of_ids": split(in_order(numbers[v], c), c, k)
        },
        "numbered by the frequency of the corpus's tokens, split by byte": lambda v, c, k: {
            "tail_steps_of_ids": split(in_order(known[v], c), c, k)
        },
        "numbered by the frequency of draws, differences, split by byte": lambda v, c, k: {
            "tail_steps_of_ids": split(differences(in_order(numbers[v], c), c), c, k)
        },
        "delta-encoded within the row group": lambda v, c, k: {"tail_deltas": as_lists(v, c, k, pa.uint32())},
        "in a dictionary": lambda v, c, k: {"tail_dictionary": as_lists(v, c, k, pa.uint32())},
    }
    return {name: table_bytes([pa.table(way(*part)) for part in drawn]) / packed.positions for name, way in ways.items()}


# Candidates and the token


def candidates(packed: Packed) -> dict[str, float]:
    """By how many bytes a position the table shrinks, for each idea alone."""
    vocabulary = packed.manifest.vocabulary_size
    size, k = id_bytes(vocabulary), positions_of(packed.manifest).selection.candidates
    plain = table_bytes(packed.tables)
    unpacked = [KINDS["positions"].codec.unpack(table, packed.manifest) for table in packed.tables]
    every = np.concatenate([lists(table["candidate_ids"])[0] for table in unpacked])
    numbers = by_frequency(every, np.concatenate([table["token_id"].to_numpy() for table in unpacked]).astype(np.int64))

    def numbered(stored: pa.Table, used: pa.Table) -> pa.Table:
        ids, counts, kept = lists(used["candidate_ids"])
        return replaced(
            stored, candidate_ids=packed_ids(numbers[ids], counts, kept, size), token_id=pa.array(numbers[used["token_id"]])
        )

    def place(used: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        ids, counts, kept = lists(used["candidate_ids"])
        rows = np.repeat(np.arange(len(counts)), counts)
        same = ids == used["token_id"].to_numpy()[rows]
        places = np.full(len(counts), -1)
        places[rows[same]] = np.flatnonzero(same) - (np.cumsum(counts) - counts)[rows[same]]
        return places, same, counts, kept

    def token_by_place(stored: pa.Table, used: pa.Table) -> pa.Table:
        places, _, _, _ = place(used)
        token = pa.array(used["token_id"].to_numpy(), mask=places >= 0)
        own = pa.array((places + ZERO).astype(np.float32), mask=places < 0)
        return replaced(stored, token_id=token).append_column("place_steps", own)

    def candidate_by_place(stored: pa.Table, used: pa.Table) -> pa.Table:
        places, same, counts, kept = place(used)
        ids = lists(used["candidate_ids"])[0][~same].astype(np.uint32)
        own = pa.array((places + ZERO).astype(np.float32), mask=places < 0)
        fewer = packed_ids(ids, counts - (places >= 0), kept, size)
        return replaced(stored, candidate_ids=fewer).append_column("place_steps", own)

    def tail_by_difference(stored: pa.Table, used: pa.Table) -> pa.Table:
        steps = stored["tail_steps"].fill_null(ZERO).to_numpy().astype(np.float64)
        moved = (np.diff(steps, prepend=ZERO) + ZERO).astype(np.float32)
        return replaced(stored, tail_steps=pa.array(moved, mask=stored["tail_steps"].is_null().to_numpy()))

    def ids_by_difference(stored: pa.Table, used: pa.Table) -> pa.Table:
        ids, counts, kept = lists(used["candidate_ids"])
        matrix = np.zeros((len(counts), k), np.int64)
        matrix[np.arange(k) < counts[:, None]] = ids
        moved = np.diff(matrix, axis=0, prepend=0)[np.arange(k) < counts[:, None]] % 256**size
        return replaced(stored, candidate_ids=packed_ids(moved.astype(np.uint32), counts, kept, size))

    def gaps_by_rank(stored: pa.Table, used: pa.Table) -> pa.Table:
        steps, _, kept = lists(stored["gap_steps"])
        matrix = np.zeros((len(kept), k - 1))
        matrix[kept] = steps.reshape(-1, k - 1)
        stored = stored.drop_columns("gap_steps")
        for rank in range(k - 1):
            stored = stored.append_column(f"gap_{rank}_steps", pa.array(matrix[:, rank].astype(np.float32), mask=~kept))
        return stored

    ideas = {
        "candidates and tokens numbered by frequency, the table of numbers not counted": numbered,
        "the token as its place among the candidates": token_by_place,
        "a candidate that is the token as its place alone": candidate_by_place,
        "the tail as the difference to the row before": tail_by_difference,
        "candidates as differences to the row before": ids_by_difference,
        "gaps of each rank in a column of their own": gaps_by_rank,
    }
    found = {}
    for name, idea in ideas.items():
        changed = [idea(stored, used) for stored, used in zip(packed.tables, unpacked, strict=True)]
        found[name] = (plain - table_bytes(changed)) / packed.positions
    found["the table of numbers, 2 bytes a token (3 above 65,536)"] = -vocabulary * size / packed.positions
    return found


def replaced(table: pa.Table, **columns: pa.Array) -> pa.Table:
    """The table with other columns in the places of those of the same names."""
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


# Gaps


def rounded(exact: np.ndarray, bounds: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of each candidate below the first, and the gaps that are stored.

    Args:
        exact: in steps, (N, K).
        bounds: a candidate that follows one further below the first than that, in steps, is rounded to twice as many steps.
    """
    below, gaps = np.zeros_like(exact), np.zeros((len(exact), exact.shape[1] - 1))
    for rank in range(1, exact.shape[1]):
        unit = 2.0 ** sum((below[:, rank - 1] > bound).astype(float) for bound in bounds) if bounds else np.ones(len(exact))
        gaps[:, rank - 1] = np.maximum(np.round((exact[:, rank] - below[:, rank - 1]) / unit), 0)
        below[:, rank] = below[:, rank - 1] + gaps[:, rank - 1] * unit
    return below, gaps


def gap_steps(packed: Packed) -> list[dict[str, Any]]:
    """Bytes a position of the gaps, and mean KL in nats, with gaps in steps of other sizes."""
    stored = pa.concat_tables(packed.tables)
    kept = stored["gap_steps"].is_valid().to_numpy()
    gaps, _, _ = lists(stored["gap_steps"])
    width = positions_of(packed.manifest).selection.candidates
    generator = np.random.default_rng(0)

    def unrounded(steps: np.ndarray) -> np.ndarray:
        return np.maximum(steps + generator.uniform(-0.5, 0.5, steps.shape), 0)

    below = np.zeros((int(kept.sum()), width))
    below[:, 1:] = unrounded(np.cumsum(gaps.reshape(-1, width - 1) - ZERO, axis=1))
    below.sort(axis=1)
    tail_steps = unrounded(stored["tail_steps"].to_numpy(zero_copy_only=False)[kept].astype(np.float64) - ZERO)
    logprobs, tail = logprobs_of([*below.T], tail_steps, positions_of(packed.manifest).quantisation_step)
    q = np.concatenate([logprobs, tail[:, None]], axis=1).astype(np.float64)
    found = []
    for size in (1 / 16, 1 / 8, 3 / 16, 1 / 4):
        for nats in ((), (1.5, 3.0), (1.0, 2.0, 3.0), (2.0,)):
            exact, tail_steps = exact_steps(logprobs, tail, size)
            below, gaps = rounded(exact, tuple(bound / size for bound in nats))
            # The tail stays in steps of 1/8, so that gaps alone differ.
            tail_eighths = np.round(tail_steps * size * 8)
            p = np.concatenate(
                [part.reshape(len(below), -1) for part in logprobs_of([*below.T], tail_eighths * (1 / 8) / size, size)], 1
            )
            p = p - np.logaddexp.reduce(p, axis=1, keepdims=True)
            kl = float((np.exp(q) * (q - p)).sum(axis=1).mean())
            whole = np.zeros((len(kept), gaps.shape[1]))
            whole[kept] = gaps
            groups, start = [], 0
            for table in packed.tables:
                here = slice(start, start + len(table))
                counts = np.where(kept[here], gaps.shape[1], 0)
                groups.append(pa.table({"gap_steps": split(whole[here][kept[here]].ravel(), counts, kept[here])}))
                start += len(table)
            found.append({"step": size, "doubled_below": list(nats), "bytes": table_bytes(groups) / packed.positions, "kl": kl})
    equal = sorted((row["kl"], row["bytes"]) for row in found if not row["doubled_below"])
    for row in found:
        if row["doubled_below"] and equal[0][0] <= row["kl"] <= equal[-1][0]:
            same = np.interp(math.log(row["kl"]), [math.log(kl) for kl, _ in equal], [size for _, size in equal])
            row["gained_at_this_kl"] = float(same - row["bytes"])
    return found


# The floor


def floor(packed: Packed) -> dict[str, float]:
    """Bytes a position of partial matching, for each column."""
    vocabulary = packed.manifest.vocabulary_size
    used = pa.concat_tables([KINDS["positions"].codec.unpack(table, packed.manifest) for table in packed.tables])
    stored = pa.concat_tables(packed.tables)
    tokens = used["token_id"].to_numpy().astype(np.int64)
    before, older = np.concatenate([[0], tokens[:-1]]), np.concatenate([[0, 0], tokens[:-2]])
    nothing = np.zeros_like(tokens)
    bits = {"token_id": matching_bits(tokens, [hashed(before, older), before, nothing], vocabulary)}

    def ragged(values: np.ndarray, counts: np.ndarray, narrow: bool) -> float:
        rows = np.repeat(np.arange(len(counts)), counts)
        first = np.arange(len(values)) == np.repeat(np.cumsum(counts) - counts, counts)
        upper = np.where(first, -1, np.concatenate([[0], values[:-1]]))
        contexts = [hashed(before[rows], upper, older[rows]), hashed(before[rows], upper), before[rows], np.zeros_like(values)]
        return matching_bits(values, contexts if narrow else [before[rows], np.zeros_like(values)], vocabulary)

    ids, counts, _ = lists(used["candidate_ids"])
    bits["candidate_ids"] = ragged(ids, counts, True)
    tail = stored["tail_steps"].fill_null(ZERO).to_numpy().astype(np.float64)
    tail = np.where(np.isposinf(tail), 0, tail - ZERO).astype(np.int64)
    gaps, gap_counts, _ = lists(stored["gap_steps"])
    gaps = np.minimum(gaps - ZERO, 1023)
    rows = np.repeat(np.arange(len(gap_counts)), gap_counts)
    rank = np.arange(len(gaps)) - np.repeat(np.cumsum(gap_counts) - gap_counts, gap_counts)
    upper = np.where(rank == 0, -1, np.concatenate([[0], gaps[:-1]]))
    gap_contexts = [hashed(rank, upper, tail[rows] // 4), hashed(rank, upper), rank, np.zeros_like(gaps)]
    bits["gap_steps"] = matching_bits(gaps, gap_contexts, 1024)
    bits["tail_steps"] = matching_bits(np.minimum(tail, 1023), [before, nothing], 1024)
    there = stored["token_steps"].is_valid().to_numpy()
    surprise = np.minimum(stored["token_steps"].drop_null().to_numpy().astype(np.int64) - ZERO, 1023)
    bits["token_steps"] = matching_bits(surprise, [tail[there], np.zeros_like(surprise)], 1024)
    if positions_of(packed.manifest).selection.name == "threshold":
        bits["number of candidates"] = matching_bits(counts, [hashed(before, older), before, nothing], 64)
    if "tail_ids" in stored.column_names:
        drawn, drawn_counts, _ = lists(used["tail_ids"])
        bits["number of draws"] = matching_bits(drawn_counts, [tail, nothing], 64)
        order = sum(math.lgamma(count + 1) / math.log(2) for count in drawn_counts.tolist())
        bits["tail_ids"] = ragged(drawn, drawn_counts, False) - order
    return {name: value / 8 / packed.positions for name, value in bits.items()}


def main() -> None:
    """Measure all of it, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="of the study that left its dumps there")
    arguments = parser.parse_args()
    packed = read(arguments.work / "store")
    manifest = packed["top-5"].manifest
    figures: dict[str, Any] = {
        "teacher": manifest.teacher["name"],
        "vocabulary_size": manifest.vocabulary_size,
        "positions": packed["top-5"].positions,
        "bytes_of_draws": {},
        "bytes_saved_by": candidates(packed["top-5"]),
        "gaps": gap_steps(packed["top-5"]),
        "floor": {},
    }
    for name in DRAWN:
        counts = [pc.list_value_length(table["tail_ids"]).drop_null() for table in packed[name].tables]
        average = float(np.concatenate([part.to_numpy() for part in counts]).mean())
        figures["bytes_of_draws"][name] = {"draws": average, **draws(packed[name])}
    for name in ("top-5", "top-5, τ = 0.1", "threshold, τ = 0.1"):
        parts = floor(packed[name])
        stored = table_bytes(packed[name].tables) / packed[name].positions
        figures["floor"][name] = {"stored": stored, "all": sum(parts.values()), **parts}
    keep(f"encodings-{manifest.vocabulary_size}", figures, STUDIES)


if __name__ == "__main__":
    main()
