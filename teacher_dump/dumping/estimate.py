"""What a dump will take: a small random sample of the corpus, really dumped (but to memory), and scaled up."""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from dataclasses import dataclass, replace

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts, Sentence
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import write_table
from knowledge_store.kinds import KINDS, Totals
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.writing.shard import pack_shard
from teacher_dump.configuration import EstimateConfig
from teacher_dump.corpus.documents import Document, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.corpus.tally import Tally
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import batch_room, extract_batch, find_batching, length_batches, predict_batch
from teacher_dump.dumping.inspection import corpus_tokenizer, teacher_tokenizer
from teacher_dump.dumping.plan import ShardInput, identity_manifest, kept_parameters
from teacher_dump.dumping.publishing import Knowledge
from teacher_dump.dumping.request import chat_asked, fitted
from teacher_dump.dumping.teacher_pass import shard_of
from teacher_dump.extraction import EXTRACTORS, ExtractionBatch, check_needs
from teacher_dump.teachers.opening import open_teacher
from teacher_dump.teachers.protocol import Teacher

SAMPLE_DOCUMENTS = 256  # tokenised
SAMPLE_POSITIONS = 8192  # of their sequences, that the teacher is asked about


@dataclass(frozen=True)
class Estimate:
    """A prediction for the whole corpus, from a sample.

    Attributes:
        documents: counted. positions: predicted.
        seconds: of the teacher's work, on this machine, one worker. positions_per_second: measured on the sample.
        bytes: of the knowledge on disk; the vocabulary and the table of sequences (tens of bytes each) are not counted.
        bytes_per_position: measured on the sample; full row groups take a little less.
        comparisons: by name, such as "full distributions (float32)", the bytes of other ways to keep the same knowledge.
        figures: what the extractors say of the sample, by name, such as "top-5 coverage": the mean probability that the 5
            likeliest tokens hold.
        sample_positions: how large the sample was.
        sample_documents: how many were tokenised: those that `counts` is of.
        counts: what becomes of the rows of the sample; of those of the corpus, where all documents were the sample.
        max_length: of a sequence.
    """

    documents: int
    positions: int
    seconds: float
    positions_per_second: float
    bytes: int
    bytes_per_position: float
    comparisons: dict[str, int]
    figures: dict[str, float]
    sample_positions: int
    sample_documents: int
    counts: CorpusCounts
    max_length: int

    @property
    def sentences(self) -> list[Sentence]:
        """What becomes of the rows, in words."""
        sentences = self.counts.sentences(self.max_length)
        if self.sample_documents == self.documents:
            return sentences
        sample = f"in a sample of {self.sample_documents:,} of {self.documents:,} documents"
        return [replace(sentence, text=f"{sample}, {sentence.text}") for sentence in sentences]


def _sample_documents(config: EstimateConfig, reporter: Reporter) -> tuple[list[Document], int, int]:
    """A uniform random sample of the corpus's documents, and the whole corpus's documents and characters."""
    generator = random.Random(0)
    sample: list[Document] = []
    count = characters = 0
    with reporter.progress("reading the corpus", None) as advance:
        for document in read_documents(config.corpus, Start(0, 0, 1, 0, 0), config.part_characters, config.column_names):
            count += 1
            characters += document.characters
            advance(document.characters)
            if len(sample) < SAMPLE_DOCUMENTS:
                sample.append(document)
            elif (place := generator.randrange(count)) < SAMPLE_DOCUMENTS:
                sample[place] = document
    return sample, count, characters


def _stored(manifest: Manifest, sequences: list[TokenSequence], knowledge: Knowledge) -> tuple[int, dict[str, int]]:
    """Bytes that the sample's knowledge takes in a shard's columns (footers, a few kilobytes a shard, are not counted), and
    those of what its kinds compare it with."""
    sample = ShardInput(0, 0, len(sequences), sequences, [])
    tables, statistics = pack_shard(shard_of(manifest, sample, knowledge, {}), manifest)
    total = 0
    comparisons: Counter[str] = Counter()
    for kind in manifest.kinds:
        table = tables[kind]
        columns = write_table(io.BytesIO(), table.schema, table.row_groups, table.columns).column_bytes
        total += sum(columns.values())
        prefix = f"{kind}."
        measured = {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}
        facts = KINDS[kind].facts(manifest, Totals(measured, total))
        comparisons.update({label: int(facts[fact] or 0) for label, fact in EXTRACTORS[kind].comparisons.items()})
    return total, dict(comparisons)


def estimate(config: EstimateConfig, teacher: Teacher | None = None, *, reporter: Reporter = SILENT) -> Estimate:
    """Dump a sample to memory and predict the whole.

    Args:
        config: what would be dumped.
        teacher: already loaded as `config` says; loaded here when None.
        reporter: hears of progress.

    Raises:
        InputError: something given cannot be used, or the sample holds nothing that can.
    """
    config = with_local_corpus(config, reporter=reporter)
    config = fitted(config, teacher, reporter=reporter)
    chat = chat_asked(config)
    tokenizer = corpus_tokenizer(config, teacher_tokenizer(config, teacher, weights=config.teacher_url is None), chat)
    documents, count, characters = _sample_documents(config, reporter)
    sequences: list[TokenSequence] = []
    tally = Tally(config.too_long)
    for document in documents:
        try:
            windows = tokenizer.sequences(document)
        except BadRow as problem:
            tally.leave_out(document, problem)
        else:
            tally.use(document, windows)
            sequences.extend(windows)
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    if not tokens:
        reasons = "; ".join(f"{left.rows:,} {reason}" for reason, left in tally.counts.by_reason)
        raise InputError(f"no row of the sampled corpus can be used ({reasons}): `teacher-dump preview` shows rows")
    # Characters of unusable rows count on both sides: in the corpus as in the sample, they become no token.
    positions = round(tokens * characters / max(sum(document.characters for document in documents), 1))

    teacher = teacher or open_teacher(config, config.loading, config.max_length, reporter=reporter)
    check_needs(config.kinds, teacher)
    config = fitted(config, teacher, reporter=reporter)
    batching = find_batching(config, teacher, config.max_length, reporter)
    manifest = replace(identity_manifest(config, teacher, "estimate", chat, reporter=reporter), derived={"columns": {}})
    random.Random(0).shuffle(sequences)
    chosen: list[TokenSequence] = []
    for sequence in sequences:
        if chosen and sum(len(other.token_ids) for other in chosen) + len(sequence.token_ids) > SAMPLE_POSITIONS:
            break
        chosen.append(sequence)
    parameters = kept_parameters(manifest)
    lengths = [len(sequence.token_ids) for sequence in chosen]
    predict_batch(config, teacher, chosen[:1], parameters)  # the first pass pays for what later ones find ready
    knowledge: Knowledge = {kind: [] for kind in parameters}
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    ordered: list[TokenSequence] = []
    seconds = 0.0
    with reporter.progress("asking the teacher", sum(lengths), "positions") as advance:
        for indices in length_batches(lengths, batch_room(config, teacher, config.max_length, parameters), batching):
            batch = [chosen[index] for index in indices]
            started = time.monotonic()
            prediction = predict_batch(config, teacher, batch, parameters)
            for kind, extracted in extract_batch(config, parameters, prediction, batch).items():
                knowledge[kind] += extracted
            seconds += time.monotonic() - started
            for kind, kept in parameters.items():
                figures = EXTRACTORS[kind].sample_figures
                for name, (total, number) in (
                    figures(ExtractionBatch(batch, prediction, kept, config.kinds)) if figures else {}
                ).items():
                    sums[name] += total  # type: ignore[assignment]
                    counts[name] += number
            ordered += batch
            advance(sum(lengths[index] for index in indices))
    stored_bytes, comparisons = _stored(manifest, ordered, knowledge)
    sample = sum(lengths)
    bytes_per_position = stored_bytes / sample
    speed = sample / seconds
    return Estimate(
        documents=count,
        positions=positions,
        seconds=positions / speed,
        positions_per_second=speed,
        bytes=round(positions * bytes_per_position),
        bytes_per_position=bytes_per_position,
        comparisons={label: round(positions * size / sample) for label, size in comparisons.items()},
        figures={name: sums[name] / number for name, number in counts.items() if number},
        sample_positions=sample,
        sample_documents=len(documents),
        counts=tally.counts,
        max_length=config.max_length,
    )
