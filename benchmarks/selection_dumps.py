"""Dumps of several selections of one corpus, from one pass of the teacher, written by the writer of every dump."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.teacher_states import predictions
from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import Arrays
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence
from teacher_dump.dumping.batches import extract_batch
from teacher_dump.dumping.plan import ShardReader, make_manifest
from teacher_dump.dumping.teacher_pass import shard_of
from teacher_dump.extraction.positions import positions_parameters
from teacher_dump.teachers.local import LocalTeacher
from teacher_dump.teachers.prediction import LocalPrediction

TAU = (0.2, 0.1, 0.05, 0.025)
ARMS: dict[str, dict[str, Any]] = {
    "top-5": {"draw_weight": 0.0},
    **{f"top-5, τ = {weight:g}": {"draw_weight": weight} for weight in TAU},
    **{f"threshold, τ = {weight:g}": {"selection": "threshold", "draw_weight": weight} for weight in TAU},
    "top-5, τ = 0.1, draw seed 1": {"draw_weight": 0.1, "draw_seed": 1},
}
Look = Callable[[Sequence[TokenSequence], LocalPrediction], None]


def dump_arms(
    base: DumpConfig, teacher: LocalTeacher, states: Path, look: Look | None = None, shards: int | None = None
) -> KnowledgeStore:
    """Dump each of ARMS into a store of its own making, under the arm's place in the list (`arm-0`, …), without the entropy of
    tails, which is the same in each.

    Args:
        base: everything but the selection; its store is made anew.
        teacher: that is asked.
        states: where its hidden states are kept.
        look: is shown each batch of sequences and the teacher's prediction of it.
        shards: how many of the corpus's first; None for all.
    """
    shutil.rmtree(base.store, ignore_errors=True)
    configs = [
        replace(base, name=f"arm-{number}", tail_entropy=False, **options) for number, options in enumerate(ARMS.values())
    ]
    parameters = [positions_parameters(config) for config in configs]
    manifest = make_manifest(base, teacher)
    tokens = tokens_table(*teacher.tokens())
    writers = [
        DumpWriter.open(base.store, make_manifest(config, teacher, derived=manifest.derived), tokens) for config in configs
    ]
    reader = ShardReader(base, manifest, CorpusTokenizer(teacher.tokenizer, base.max_length))
    for number in range(min(shards or manifest.shard_count, manifest.shard_count)):
        shard = reader.read(number)
        knowledge: list[list[Arrays]] = [[{}] * len(shard.sequences) for _ in configs]
        for indices, sequences, prediction in predictions(base, teacher, shard, states):
            for config, kept, found in zip(configs, parameters, knowledge, strict=True):
                extracted = extract_batch(config, {"positions": kept}, prediction, sequences)["positions"]
                for index, arrays in zip(indices, extracted, strict=True):
                    found[index] = arrays
            if look is not None:
                look(sequences, prediction)
        for writer, found in zip(writers, knowledge, strict=True):
            writer.commit(shard_of(writer.manifest, shard, {"positions": found}, {"device": teacher.device_name}))
    return KnowledgeStore.open(base.store)


def sizes(store: KnowledgeStore) -> dict[str, dict[str, float]]:
    """Of each arm: bytes of every file but index and vocabulary, and over targets candidates and draws, a position each."""
    found: dict[str, Mapping[str, float]] = {}
    summaries = {summary.dump: summary for summary in store.info()}
    for number, (arm, options) in enumerate(ARMS.items()):
        name = f"arm-{number}"
        drawn = ", avg(len(tail_ids)) AS draws" if options["draw_weight"] else ""
        [row] = store.sql(
            f"SELECT avg(len(candidate_ids)) AS candidates{drawn} FROM positions WHERE dump = '{name}' AND is_target"
        ).to_pylist()
        found[arm] = {
            "bytes": summaries[name].bytes / summaries[name].positions,
            "ids": sum(row.values()),
            **row,
            "columns": {column: size / summaries[name].positions for column, size in summaries[name].column_bytes.items()},
        }
    return found
