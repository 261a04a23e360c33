"""What a dump will take: a small random sample of the corpus, really dumped (but to memory), and scaled up."""

from __future__ import annotations

import io
import random
import time
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from knowledge_store.catalogue.summary import DENSE_BYTES_PER_LOGPROB
from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import write_table
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.kinds.positions import positions_of
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.corpus.documents import Document, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence
from teacher_dump.dumping.configuration import SELECTION_OPTIONS, DumpConfig
from teacher_dump.dumping.plan import check_options, identity_manifest, length_batches
from teacher_dump.dumping.run import extract_batch, joined, predict_batch
from teacher_dump.teachers.local import Teacher, load_teacher

SAMPLE_DOCUMENTS = 64
SAMPLE_POSITIONS = 8192
MASSES = (1, 5, 16, 50)


@dataclass(frozen=True)
class Estimate:
    """A prediction for the whole corpus, from a sample.

    Attributes:
        documents: counted. positions: predicted.
        seconds: of the teacher's work, on this machine, one worker. positions_per_second: measured on the sample.
        bytes: of the knowledge on disk; the vocabulary and the table of sequences (tens of bytes each) are left out.
        bytes_per_position: measured on the sample; full row groups take a little less.
        dense_bytes: predicted positions with knowledge × vocabulary × 4. ratio: dense bytes for each byte on disk.
        top_k_mass: for each k, the mean mass of the k likeliest tokens over the sample.
        sample_positions: how large the sample was.
        unusable_documents: of the sample, how many could not be used.
    """

    documents: int
    positions: int
    seconds: float
    positions_per_second: float
    bytes: int
    bytes_per_position: float
    dense_bytes: int
    ratio: float
    top_k_mass: dict[int, float]
    sample_positions: int
    unusable_documents: int


def _sample_documents(config: DumpConfig) -> tuple[list[Document], int, int]:
    """A uniform random sample of the corpus's documents, and the whole corpus's documents and characters."""
    generator = random.Random(0)
    sample: list[Document] = []
    count = characters = 0
    with progress_bar("reading the corpus", None) as advance:
        for document in read_documents(config.corpus, Start(0, 0, 1, 0, 0), config.part_characters):
            count += 1
            characters += document.characters
            advance(document.characters)
            if len(sample) < SAMPLE_DOCUMENTS:
                sample.append(document)
            elif (place := generator.randrange(count)) < SAMPLE_DOCUMENTS:
                sample[place] = document
    return sample, count, characters


def _bytes(manifest: Manifest, arrays: Arrays, lengths: list[int]) -> int:
    """Bytes that positions take in a shard's columns (footers, a few kilobytes a shard, left out)."""
    keys = pa.table(
        {
            "sequence_id": pa.array(np.repeat(np.arange(len(lengths)), lengths)),
            "position": pa.array(np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])),
        }
    )
    table = KINDS["positions"].pack(KINDS["positions"].table(keys, arrays, manifest), manifest)
    return sum(write_table(io.BytesIO(), table.schema, [table]).column_bytes.values())


def estimate(config: DumpConfig, teacher: Teacher | None = None) -> Estimate:
    """Dump a sample to memory and predict the whole.

    Raises:
        InputError: something given cannot be used, or the sample holds nothing that can.
    """
    teacher = teacher or load_teacher(config.teacher, config.gguf_file, config.dtype, config.device)
    check_options(config, teacher)
    tokenizer = CorpusTokenizer(teacher.tokenizer, config.max_length)
    documents, count, characters = _sample_documents(config)
    sequences: list[TokenSequence] = []
    unusable = sampled_characters = 0
    for document in documents:
        try:
            sequences.extend(tokenizer.sequences(document))
            sampled_characters += document.characters
        except BadRow:
            unusable += 1
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    if not tokens:
        raise InputError("no row of the sampled corpus can be used: `teacher-dump run` says why")
    positions = round(tokens * characters / max(sampled_characters, 1))

    random.Random(0).shuffle(sequences)
    chosen: list[TokenSequence] = []
    for sequence in sequences:
        if chosen and sum(len(each.token_ids) for each in chosen) + len(sequence.token_ids) > SAMPLE_POSITIONS:
            break
        chosen.append(sequence)
    manifest = replace(identity_manifest(config, teacher), derived={"columns": {}})
    shown = sorted({*MASSES, *([config.top_k] if config.selection == "top-k" else [])})
    plain = {name: getattr(DumpConfig, name) for names in SELECTION_OPTIONS.values() for name in names}
    plain |= {"selection": "top-k", "top_k": min(max(shown), teacher.vocabulary_size), "tail_draws": 0}
    deep = replace(config, **plain)
    lengths = [len(sequence.token_ids) for sequence in chosen]
    predict_batch(config, teacher, chosen[:1])  # the first pass pays for what later ones find ready
    knowledge: list[Arrays] = []
    candidates: list[Arrays] = []
    ordered: list[int] = []
    seconds = 0.0
    with progress_bar("asking the teacher", sum(lengths), "positions") as advance:
        for indices in length_batches(lengths, config.batch_size * config.max_length):
            batch = [chosen[index] for index in indices]
            started = time.monotonic()
            prediction = predict_batch(config, teacher, batch)
            knowledge += extract_batch(config, prediction, batch, positions_of(manifest).temperature)["positions"]
            seconds += time.monotonic() - started
            candidates += extract_batch(deep, prediction, batch, None)["positions"]
            ordered += [lengths[index] for index in indices]
            advance(sum(lengths[index] for index in indices))
    arrays = joined(knowledge)
    kept = arrays["has_knowledge"]
    likeliest = joined(candidates)
    mass = np.exp(likeliest["candidate_logprobs"][likeliest["has_knowledge"]].astype(np.float64)).cumsum(axis=1).mean(axis=0)
    sample_bytes = _bytes(manifest, arrays, ordered)
    bytes_per_position = sample_bytes / len(kept)
    dense = positions * kept.mean() * teacher.vocabulary_size * DENSE_BYTES_PER_LOGPROB
    speed = len(kept) / seconds
    return Estimate(
        documents=count,
        positions=positions,
        seconds=positions / speed,
        positions_per_second=speed,
        bytes=round(positions * bytes_per_position),
        bytes_per_position=bytes_per_position,
        dense_bytes=round(dense),
        ratio=dense / max(positions * bytes_per_position, 1),
        top_k_mass={k: float(mass[min(k, deep.top_k) - 1]) for k in shown},
        sample_positions=len(kept),
        unusable_documents=unusable,
    )
