"""What a dump will take is known before it is made."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TEXT, story_rows, write_jsonl
from processes import Command

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from teacher_dump import DumpConfig, dump, estimate

COUNT = 400
FULL = "full distributions (float32)"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Rows of which none repeats another: repetition is what a sample cannot see."""
    generator = random.Random(0)
    words = TEXT.split()
    rows = [{"text": " ".join(generator.choices(words, k=generator.randint(5, 60)))} for _ in range(COUNT)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "rows.jsonl", rows)


@pytest.fixture
def config(tmp_path, corpus, teacher_folder) -> DumpConfig:
    return DumpConfig(str(teacher_folder), (corpus,), tmp_path / "store", max_length=48)


def test_near_the_dump_itself_and_nothing_is_written(config, loaded_teacher):
    """256 of 400 rows are sampled: positions within 15 %, masses within 0.02, bytes of the knowledge within 25 %."""
    predicted = estimate(config, teacher=loaded_teacher)
    assert not config.store.exists()
    dump(config, teacher=loaded_teacher)
    (real,) = KnowledgeStore.open(config.store).info()
    assert predicted.documents == real.documents == COUNT
    assert predicted.positions == pytest.approx(real.positions, rel=0.15)
    knowledge = sum(size for name, size in real.column_bytes.items() if name.startswith("positions."))
    assert predicted.bytes == pytest.approx(knowledge, rel=0.25)
    assert predicted.comparisons == {FULL: pytest.approx(real.facts["positions.dense_bytes"], rel=0.15)}
    assert predicted.figures["top-5 coverage"] == pytest.approx(real.statistics["positions.mean_top_k_mass"], abs=0.02)
    assert predicted.seconds > 0 and predicted.positions_per_second > 0 and predicted.counts.rows_left_out == 0


def test_coverage_grows_with_k_to_one(config, tmp_path, loaded_teacher):
    few = write_jsonl(tmp_path / "few.jsonl", story_rows(5))
    whole = replace(config, corpus=(few,), top_k=loaded_teacher.vocabulary_size)
    figures = estimate(whole, teacher=loaded_teacher).figures
    depths = [1, 5, 16, 50, loaded_teacher.vocabulary_size]
    assert list(figures) == [f"top-{depth} coverage" for depth in depths]
    coverages = list(figures.values())
    assert sorted(coverages) == coverages and 0 < coverages[0] < coverages[3] < 1
    assert coverages[4] == pytest.approx(1, abs=1e-5)


def test_more_candidates_take_more_room(config, loaded_teacher):
    few, many = (estimate(replace(config, top_k=k), teacher=loaded_teacher) for k in (1, 20))
    assert few.bytes < many.bytes and few.comparisons == many.comparisons
    assert few.positions == many.positions


def test_only_targets_cost_knowledge(tmp_path, loaded_teacher):
    rows = [{"prompt": row["text"], "completion": " The end."} for row in story_rows(50)]
    config = DumpConfig("tiny", (write_jsonl(tmp_path / "c.jsonl", rows),), tmp_path / "s", max_length=256)
    targets, everything = (estimate(replace(config, keep_context=keep), teacher=loaded_teacher) for keep in (False, True))
    assert targets.positions == everything.positions
    assert targets.comparisons[FULL] < everything.comparisons[FULL] / 2 and targets.bytes < everything.bytes / 2


def test_rows_that_cannot_be_used_are_counted(tmp_path, loaded_teacher):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "The lamp burns."}\nbroken\n')
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=40)
    assert estimate(config, teacher=loaded_teacher).counts.rows_left_out == 1
    corpus.write_text('{"text": "The lamp burns."}\nbroken\n{"text": ""}\n')
    report = dump(replace(config, skip_bad_rows=True), teacher=loaded_teacher)
    assert estimate(config, teacher=loaded_teacher).counts == report.counts and report.counts.rows_left_out == 2
    corpus.write_text("broken\n")
    with pytest.raises(InputError, match="no row of the sampled corpus can be used"):
        estimate(config, teacher=loaded_teacher)


def test_the_text_of_rows_that_cannot_be_used_becomes_no_positions(tmp_path, corpus, loaded_teacher, teacher_folder):
    """Every other row has a prompt that leaves no room for its completion, and four times as much text as the others."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    good = [{"text": text} for text in texts[::2]]
    bad = [{"prompt": " ".join(texts[index : index + 4]) + " x" * 200, "completion": " y"} for index in range(len(good))]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [row for pair in zip(good, bad, strict=True) for row in pair])
    config = DumpConfig(str(teacher_folder), (mixed,), tmp_path / "store", max_length=48, skip_bad_rows=True)
    predicted = estimate(config, teacher=loaded_teacher)
    report = dump(config, teacher=loaded_teacher)
    assert predicted.positions == pytest.approx(report.positions, rel=0.35)
    left_out = predicted.counts.rows_left_out * predicted.documents / predicted.sample_documents
    assert left_out == pytest.approx(report.counts.rows_left_out, rel=0.25) and report.counts.rows_left_out == len(bad)
    assert all(sentence.text.startswith("in a sample of 256 of 400 documents, ") for sentence in predicted.sentences)


def test_the_command_takes_the_arguments_of_run(config, tmp_path):
    result = Command(
        "estimate", "--teacher", config.teacher, "--corpus", *config.corpus, "--top-k", 7,
        "--max-length", 48, folder=tmp_path / "log",
    ).wait()  # fmt: skip
    assert result.returncode == 0, result
    labels = [line[:29].strip() for line in result.stdout.splitlines()]
    assert labels == [
        "on disk", "documents", "positions", "time, one worker like this", FULL,
        *(f"top-{depth} coverage" for depth in (1, 5, 7, 16, 50)), "sample",
    ]  # fmt: skip
    assert not list(tmp_path.glob("store*"))
