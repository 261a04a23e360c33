"""What each selection costs on disk, and how far its targets stray, on a real vocabulary.

    python -m benchmarks.studies.selections --teacher smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --corpus wikitext2.txt

The teacher reads a part of the corpus once, and every selection takes what it keeps from that one pass: real dumps, written by
the writer of every dump. Bytes are of every file of the dump but the vocabulary, over its positions. Beside them, over the
target positions: ids kept, and the squared error ‖q̂ − q‖² of the target q̂ that candidates and draws make of the teacher's
whole distribution q: the error of the gradient with respect to the student's logits. With draws it is all variance, which
averages out; without, all bias, which stays.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import STUDIES, keep
from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import Arrays
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.dumping.batches import extract_batch, length_batches, predict_batch
from teacher_dump.dumping.plan import ShardReader, make_manifest
from teacher_dump.dumping.teacher_pass import shard_of
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.positions import positions_parameters
from teacher_dump.extraction.sampling import independent_points, systematic_points
from teacher_dump.teachers.local import load_teacher

SELECTIONS: dict[str, dict[str, Any]] = {
    "top-5": {"top_k": 5, "tail_draws": 0},
    **{f"top-5, {m} tail draws": {"top_k": 5, "tail_draws": m} for m in (1, 2, 4, 8)},
    "top-9": {"top_k": 9, "tail_draws": 0},
    "top-12": {"top_k": 12, "tail_draws": 0},
    "top-p 0.95, at most 32": {"selection": "top-p", "top_p": 0.95, "max_k": 32, "tail_draws": 0},
    **{f"random sampling, {n} draws": {"selection": "random-sampling", "draws": n} for n in (6, 12, 22, 50)},
}
# Independent draws beside the same candidates, to see what evenly spaced ones are worth; nothing is stored of it.
ERROR_POSITIONS = 1024


def squared_errors(logits: Tensor, q: Tensor, config: DumpConfig, key: int, points: Any) -> Tensor:
    """‖q̂ − q‖² at N positions, float64 (N,), of targets drawn again; q (N, V) is the softmax in float64."""
    rule = config.rule
    at = torch.from_numpy(points(key, len(logits), rule.draws)) if rule.draws else None
    found = knowledge_of(logits.clone(), torch.zeros(len(logits), dtype=torch.long), rule, at)
    error = q.scatter_add(1, found["candidate_ids"], -found["candidate_logprobs"].double().exp())
    if rule.draws:
        share = found["tail_counts"].double() / rule.draws
        error.scatter_add_(1, found["tail_ids"], -found["tail_logprob"].double().exp()[:, None] * share)
    return error.square().sum(dim=1)


def main() -> None:
    """Dump every selection from one pass, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--shards", type=int, default=1, help="of the corpus's beginning; a shard has about 32,000 positions")
    parser.add_argument("--work", type=Path, default=Path(".selections"))
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher, arguments.gguf_file)
    shutil.rmtree(arguments.work, ignore_errors=True)
    base = DumpConfig(arguments.teacher, (arguments.corpus,), arguments.work, shard_size=4, gguf_file=arguments.gguf_file)
    configs = {
        name: replace(base, name=f"selection-{number}", **options) for number, (name, options) in enumerate(SELECTIONS.items())
    }
    parameters = {name: positions_parameters(config) for name, config in configs.items()}
    manifest = make_manifest(base, teacher)
    tokens = tokens_table(*teacher.tokens())
    writers = {
        name: DumpWriter.open(arguments.work, make_manifest(config, teacher), tokens) for name, config in configs.items()
    }
    reader = ShardReader(base, manifest, CorpusTokenizer(teacher.tokenizer, base.max_length))
    errors: dict[str, list[Tensor]] = {}
    positions = mass = 0.0
    for number in range(min(arguments.shards, manifest.shard_count)):
        shard = reader.read(number)
        lengths = [len(sequence.token_ids) for sequence in shard.sequences]
        knowledge: dict[str, list[Arrays]] = {name: [{}] * len(lengths) for name in configs}
        with progress_bar(f"shard {number}", sum(lengths), "positions") as advance:
            for indices in length_batches(lengths, base.batch_size * base.max_length):
                sequences = [shard.sequences[index] for index in indices]
                prediction = predict_batch(base, teacher, sequences)
                for name, config in configs.items():
                    extracted = extract_batch(config, {"positions": parameters[name]}, prediction, sequences)["positions"]
                    for index, arrays in zip(indices, extracted, strict=True):
                        knowledge[name][index] = arrays
                if positions < ERROR_POSITIONS:
                    places = torch.arange(min(255, len(sequences[0].token_ids)))
                    for _, logits in prediction.logit_slices(torch.zeros_like(places), places):
                        q = torch.softmax(logits.double(), dim=1)
                        for name, config in configs.items():
                            points = systematic_points if config.rule.candidates else independent_points
                            errors.setdefault(name, []).append(squared_errors(logits, q, config, int(positions), points))
                            if config.rule.candidates and config.rule.draws:
                                errors.setdefault(f"{name}, independent", []).append(
                                    squared_errors(logits, q, config, int(positions), independent_points)
                                )
                        mass += float(q.topk(5, dim=1).values.sum())
                        positions += len(logits)
                advance(sum(len(sequence.token_ids) for sequence in sequences))
        for name, writer in writers.items():
            writer.commit(shard_of(writer.manifest, shard, {"positions": knowledge[name]}, {}))
    store = KnowledgeStore.open(arguments.work)
    figures: dict[str, Any] = {"teacher": manifest.teacher["name"], "vocabulary_size": manifest.vocabulary_size}
    summaries = {summary.dump: summary for summary in store.info()}
    for name, config in configs.items():
        summary = summaries[config.dump_name]
        [ids] = store.sql(
            f"SELECT avg(len(candidate_ids)) AS candidates{', avg(len(tail_ids)) AS drawn' if config.rule.draws else ''}"
            f" FROM positions WHERE dump = '{config.dump_name}' AND is_target"
        ).to_pylist()
        figures[name] = {
            "positions": summary.positions,
            "bytes_per_position": summary.bytes / summary.positions,
            "ids": sum(value for value in ids.values() if value is not None),
            "mass_of_candidates": summary.statistics["positions.mean_top_k_mass"],
            "squared_error": float(torch.cat(errors[name]).mean()),
        }
        if f"{name}, independent" in errors:
            figures[name]["squared_error_of_independent_draws"] = float(torch.cat(errors[f"{name}, independent"]).mean())
    keep("selections", {**figures, "error_positions": int(positions), "mass_of_five_there": mass / positions}, STUDIES)
    print(f"{'':<28} {'bytes/position':>14} {'ids':>6} {'error':>8}")
    for name in configs:
        row = figures[name]
        print(f"{name:<28} {row['bytes_per_position']:>14.2f} {row['ids']:>6.2f} {row['squared_error']:>8.4f}")


if __name__ == "__main__":
    main()
