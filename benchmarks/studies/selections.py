"""What each selection costs on disk, and how noisy its targets are, on a real vocabulary.

    python -m benchmarks.studies.selections --teacher smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --corpus wikitext2.txt

The teacher reads a part of the corpus once, and every arm takes what it keeps from that one pass: real dumps, written by the
writer of every dump. Bytes are of every file of the dump but vocabulary and index, over its positions. Beside them, over the
target positions: ids kept, and the noise Σ_j Var(q̂_j) of the target q̂ that candidates and draws make of the teacher's
distribution q, which is that of the gradient with respect to the student's logits z for Σ −q̂_j z_j. It is exact, no average
over draws: of points spaced s apart a token of probability q is drawn ⌊q/s⌋ or ⌈q/s⌉ times, which with the fraction f of q/s
has the variance s² · f · (1 − f); of n independent draws it is q · (1 − q) / n. Candidates alone have no noise but a bias,
which no number of passes averages out: for them Σ q_j² over the tail stands in its place.

Two arms are of rules that the project had before and has no more: so many draws from the tail at each position, each of them
tail / draws, and random sampling. They are drawn here, and their columns written as the format had them: each drawn token once,
beside how often it was drawn.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.measurement import STUDIES, keep
from benchmarks.pictures import picture
from benchmarks.selection_dumps import ARMS, TAU, dump_arms, sizes
from knowledge_store.format.parquet import COUNTING, TEXT, Columns, write_table
from knowledge_store.format.sequences import sequence_id
from knowledge_store.kinds.columns import list_offsets
from knowledge_store.kinds.field import PLAIN, SPLIT
from knowledge_store.kinds.positions.packing import ZERO
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.extraction.sampling import likeliest
from teacher_dump.teachers.local import LocalTeacher, load_teacher
from teacher_dump.teachers.prediction import LocalPrediction

K = 5
TAIL_DRAWS = (2, 4, 8)
SAMPLES = (6, 22)
BASELINE = f"top-{K}, 4 tail draws"  # the project's default before draws had a constant weight
LARGEST = 64  # more tokens cannot be as likely as the smallest spacing
STEP = 1 / 8  # nats, of the token's own log-probability


def variance(largest: Tensor, squares: Tensor, candidates: Tensor, spacing: Tensor | float) -> Tensor:
    """Σ Var of systematic draws, float64 (N,).

    Args:
        largest: the LARGEST probabilities of each distribution, float64 (N, LARGEST).
        squares: Σ q² of all, (N,).
        candidates: which of the largest are no part of the tail, bool (N, LARGEST).
        spacing: of the points, (N, 1) or for all.
    """
    kept = torch.where(candidates, largest, 0.0)
    rare = spacing * (1 - kept.sum(dim=1, keepdim=True)) - (squares - kept.square().sum(dim=1))[:, None]
    often = ~candidates & (largest >= spacing)
    fraction = torch.frac(largest / spacing)
    exact = spacing**2 * fraction * (1 - fraction) - (spacing * largest - largest.square())
    return (rare + torch.where(often, exact, 0.0).sum(dim=1, keepdim=True))[:, 0].clamp(min=0)


class Noise:
    """What is looked at beside the dumps: the noise of every arm, and the draws of the rules that are no more."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.drawn: dict[str, dict[tuple[int, int], np.ndarray]] = {}
        self.token_logprobs: dict[tuple[int, int], float] = {}

    def look(self, sequences: Sequence[TokenSequence], prediction: LocalPrediction) -> None:
        """At every target of a batch."""
        for row, sequence in enumerate(sequences):
            key = sequence_id(sequence.document.number, sequence.window)
            generator = np.random.Generator(np.random.Philox(key=key))
            targets = torch.from_numpy(np.flatnonzero(sequence.is_target))
            tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))[targets]
            for part, logits in prediction.logit_slices(torch.full_like(targets, row), targets - 1):
                q = torch.softmax(logits, dim=1)
                self._measure(q)
                self._draw(q, tokens[part], [(key, int(place)) for place in targets[part]], generator)

    def _measure(self, q: Tensor) -> None:
        largest = likeliest(q, min(LARGEST, q.shape[1]))[0].double()
        squares = q.square().sum(dim=1).double()
        first = (torch.arange(largest.shape[1]) < K).expand_as(largest)
        tail = 1 - largest[:, :K].sum(dim=1, keepdim=True)
        found = {"top-5": squares - largest[:, :K].square().sum(dim=1)}
        for name, options in ARMS.items():
            if weight := options["draw_weight"]:
                threshold = options.get("selection") == "threshold"
                found[name] = variance(largest, squares, largest >= weight if threshold else first, weight)
        for draws in TAIL_DRAWS:
            found[f"top-{K}, {draws} tail draws"] = variance(largest, squares, first, tail.clamp(min=1e-12) / draws)
        for draws in SAMPLES:
            found[f"random sampling, {draws} draws"] = (1 - squares) / draws
        for name, values in found.items():
            self.parts.setdefault(name, []).append(values)

    def _draw(self, q: Tensor, tokens: Tensor, places: list[tuple[int, int]], generator: np.random.Generator) -> None:
        own = q.gather(1, tokens[:, None])[:, 0].log()
        self.token_logprobs |= dict(zip(places, own.tolist(), strict=True))
        sums = q.cumsum(dim=1, dtype=torch.float64)
        for draws in SAMPLES:
            points = torch.from_numpy(generator.random((len(q), draws))) * sums[:, -1:]
            self._note(f"random sampling, {draws} draws", sums, points, places)
        tail = q.scatter(1, likeliest(q, K)[1], 0.0)
        sums = tail.cumsum(dim=1, dtype=torch.float64)
        start = torch.from_numpy(generator.random((len(q), 1)))
        for draws in TAIL_DRAWS:
            self._note(f"top-{K}, {draws} tail draws", sums, (start + torch.arange(draws)) / draws * sums[:, -1:], places)

    def _note(self, name: str, sums: Tensor, points: Tensor, places: list[tuple[int, int]]) -> None:
        ids = torch.searchsorted(sums, points, right=True).clamp(max=sums.shape[1] - 1).sort(dim=1).values.numpy()
        self.drawn.setdefault(name, {}).update(zip(places, ids, strict=True))

    def sizes(self, stored: list[pa.Table]) -> dict[str, dict[str, float]]:
        """Of the rules that are no more, as `selection_dumps.sizes`, without the files' fixed parts.

        Args:
            stored: the row groups of the dump of top-5 without draws; what stands there of the candidates is no part of
                random sampling.
        """
        positions = sum(len(table) for table in stored)
        found = {}
        for name, drawn in self.drawn.items():
            groups, ids = [], 0
            for table in stored:
                keys = list(zip(table["sequence_id"].to_pylist(), table["position"].to_pylist(), strict=True))
                absent = np.array([key not in drawn for key in keys])
                unique = [np.unique(drawn[key], return_counts=True) if key in drawn else ((), ()) for key in keys]
                offsets = list_offsets(np.array([len(tokens) for tokens, _ in unique]))
                ids += offsets[-1].as_py()
                for column, (index, kind) in {"tail_ids": (0, pa.uint32()), "tail_counts": (1, pa.uint16())}.items():
                    values = pa.array(np.concatenate([pair[index] for pair in unique])).cast(kind)
                    lists = pa.ListArray.from_arrays(offsets, values, mask=pa.array(absent))
                    table = table.append_column(column, lists)
                if name.startswith("random"):
                    steps = [round(-self.token_logprobs.get(key, 0.0) / STEP) + ZERO for key in keys]
                    table = table.drop_columns(["candidate_ids", "gap_steps", "tail_steps"])
                    own = pa.array(np.array(steps, np.float32), mask=absent)
                    table = table.set_column(table.column_names.index("token_steps"), "token_steps", own)
                groups.append(table)
            candidates = 0 if name.startswith("random") else K
            found[name] = {"bytes": table_bytes(groups) / positions, "ids": candidates + ids / len(drawn)}
        return found


def table_bytes(groups: list[pa.Table]) -> int:
    """Bytes of a file with these row groups of positions, by the writer of every shard; columns that no dump has are encoded as
    their names say."""
    encoding = {}
    for column in groups[0].schema:
        path = f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name
        kind = column.type.value_type if pa.types.is_list(column.type) else column.type
        if column.name in ("sequence_id", "position", "tail_deltas"):
            encoding[path] = COUNTING
        elif pa.types.is_floating(kind):
            encoding[path] = SPLIT
        elif pa.types.is_binary(kind):
            encoding[path] = TEXT
        elif column.name in ("token_id", "candidate_ids", "tail_ids"):
            encoding[path] = PLAIN
    file = io.BytesIO()
    write_table(file, groups[0].schema, groups, Columns(encoding))
    return len(file.getvalue())


def beside(rows: dict[str, dict[str, Any]], rule: str) -> dict[str, float | None]:
    """What a rule takes or gives between two of its weights, where the baseline's noise or bytes lie. Noise goes with τ, and
    bytes with the number of draws, which goes with 1/τ; None where no two weights enclose it."""
    arms = {weight: rows[f"{rule}, τ = {weight:g}"] for weight in TAU}
    weights = np.array(sorted(arms))
    noise, size = (np.array([arms[weight][name] for weight in weights]) for name in ("noise", "bytes"))
    reference = rows[BASELINE]
    weight = np.interp(reference["noise"], noise, weights, np.nan, np.nan)
    same_noise = float(np.interp(1 / weight, 1 / weights[::-1], size[::-1])) if weight == weight else None
    inverse = np.interp(reference["bytes"], size[::-1], 1 / weights[::-1], np.nan, np.nan)
    same_bytes = float(np.interp(1 / inverse, weights, noise)) if inverse == inverse else None
    return {"bytes_at_the_noise_of_4_tail_draws": same_noise, "noise_at_the_bytes_of_4_tail_draws": same_bytes}


def measure(
    base: DumpConfig, teacher: LocalTeacher, states: Path, shards: int | None = None
) -> tuple[dict[str, dict[str, Any]], int]:
    """Dump every arm from one pass (see `selection_dumps.dump_arms`).

    Returns:
        bytes, ids and noise of each arm and of the rules that are no more, and how many positions a dump has.
    """
    noise = Noise()
    rows: dict[str, dict[str, Any]] = sizes(dump_arms(base, teacher, states, noise.look, shards))
    paths = sorted((base.store / "arm-0" / "positions").glob("*.parquet"))
    stored = [table for path in paths for table in row_groups(path)]
    positions = sum(len(table) for table in stored)
    fixed = rows["top-5"]["bytes"] - table_bytes(stored) / positions
    rows |= {name: {**row, "bytes": row["bytes"] + fixed} for name, row in noise.sizes(stored).items()}
    for name, parts in noise.parts.items():
        rows[name]["noise"] = float(torch.cat(parts).mean())
    return rows, positions


def row_groups(path: Path) -> list[pa.Table]:
    """The row groups of a Parquet file."""
    with pq.ParquetFile(path) as file:
        return [file.read_row_group(group) for group in range(file.num_row_groups)]


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Noise against bytes: what each rule takes and gives, over its weights or numbers of draws."""
    lines = {
        "top-5, τ from 0.2 to 0.025": [f"top-{K}, τ = {weight:g}" for weight in TAU],
        "threshold, τ from 0.2 to 0.025": [f"threshold, τ = {weight:g}" for weight in TAU],
        "top-5, 2, 4 and 8 tail draws (before)": [f"top-{K}, {draws} tail draws" for draws in TAIL_DRAWS],
        "random sampling, 6 and 22 draws (before)": [f"random sampling, {draws} draws" for draws in SAMPLES],
    }
    with picture(path, figsize=(6, 3.6)) as axis:
        for label, names in lines.items():
            axis.plot([rows[name]["bytes"] for name in names], [rows[name]["noise"] for name in names], "o-", ms=4, label=label)
        axis.set(yscale="log", xlabel="bytes a position", ylabel="noise, Σ Var of the target")
        axis.legend(frameon=False)


def main() -> None:
    """Dump every arm from one pass, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument(
        "--shards", type=int, default=1, help="of the corpus's beginning; of two documents each, some 15,600 positions"
    )
    parser.add_argument("--work", type=Path, default=Path(".selections"), help="for the dumps and the teacher's hidden states")
    parser.add_argument("--name", default="selections", help="of the result")
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher, arguments.gguf_file, arguments.dtype)
    base = DumpConfig(
        arguments.teacher, (arguments.corpus,), arguments.work / "store", gguf_file=arguments.gguf_file, shard_size=2,
        dtype=arguments.dtype, batch_size=2,
    )  # fmt: skip
    rows, positions = measure(base, teacher, arguments.work / "states", arguments.shards)
    figures = {
        "teacher": arguments.gguf_file or Path(arguments.teacher).name,
        "dtype": arguments.dtype,
        "vocabulary_size": teacher.vocabulary_size,
        "positions": positions,
        "arms": rows,
        "beside": {rule: beside(rows, rule) for rule in (f"top-{K}", "threshold")},
    }
    keep(arguments.name, figures, STUDIES)
    draw(rows, STUDIES / f"{arguments.name}.svg")
    print(f"{'':<28} {'bytes/position':>14} {'ids':>6} {'noise':>8}")
    for name, row in rows.items():
        print(f"{name:<28} {row['bytes']:>14.2f} {row['ids']:>6.2f} {row['noise']:>8.4f}")


if __name__ == "__main__":
    main()
