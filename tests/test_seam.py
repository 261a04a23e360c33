"""A new kind of knowledge, from the teacher to the student: schema, extractor, loss, figures, and one line in a dict each.

If this test needs a change anywhere else, the seam between the three packages has come apart.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import save_teacher, story_rows, write_jsonl
from typer.testing import CliRunner

from knowledge_store import KINDS, Field, Kind, KnowledgeStore, verify
from knowledge_store.reporter import Reporter
from student_train.cli import app
from student_train.evaluation.comparison import mean_difference
from student_train.evaluation.configuration import EvaluateConfig
from student_train.evaluation.figures import KindFigures, Metric, Row
from student_train.evaluation.kinds import FIGURES, measurements
from student_train.evaluation.run import evaluate
from student_train.losses.table import LOSSES, Loss
from student_train.report.html import write_report
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.run import train
from student_train.training.run_folder import read_history
from teacher_dump import DumpConfig, dump
from teacher_dump.extraction import EXTRACTORS, Extractor
from teacher_dump.teachers.protocol import Ability

SUMMARIES = Kind(
    name="summaries",
    per="sequence",
    fields=lambda manifest: (Field("vector", pa.float32(), shape=32),),
)


def extract_summaries(batch):
    """The teacher's mean last hidden state over each sequence, (1, H)."""
    hidden = batch.prediction.hidden.float().cpu().numpy()
    return [{"vector": states[mask].mean(0, keepdims=True)} for states, mask in zip(hidden, batch.attention_mask, strict=True)]


def match_summaries(outputs, batch):
    """Squared distance between the student's mean hidden state and the teacher's, (B,)."""
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (outputs.hidden_states[-1] * mask).sum(1) / mask.sum(1).clamp(min=1)
    return (mean - batch["vector"]).square().mean(-1)


def dump_summaries(monkeypatch, folder, teacher_folder, loaded_teacher):
    """A dump `both` in the folder's `store`, of 12 stories with their summaries."""
    monkeypatch.setitem(KINDS, "summaries", SUMMARIES)
    monkeypatch.setitem(EXTRACTORS, "summaries", Extractor(frozenset({Ability.HIDDEN_STATES}), extract_summaries))
    corpus = write_jsonl(folder / "stories.jsonl", story_rows(12))
    kinds = ("positions", "summaries")
    config = DumpConfig(str(teacher_folder), (corpus,), folder / "store", "both", max_length=48, shard_size=4, kinds=kinds)
    dump(config, teacher=loaded_teacher)


def test_a_kind_is_three_functions_and_three_lines(monkeypatch, tmp_path, teacher_folder, loaded_teacher):
    dump_summaries(monkeypatch, tmp_path, teacher_folder, loaded_teacher)
    needs = {"kinds": ("summaries",), "columns": ("vector",), "hidden_states": True}
    monkeypatch.setitem(LOSSES, "summaries", Loss(match_summaries, whole_batch=True, unit="sequence", **needs))

    assert not verify(tmp_path / "store").damage
    store = KnowledgeStore.open(tmp_path / "store")
    counted = store.sql("SELECT count(*) AS n, min(len(vector)) AS width FROM summaries NATURAL JOIN sequences")
    assert counted.to_pylist() == [{"n": len(store), "width": 32}]
    batch = store.batches(batch_size=3)[0]
    assert batch["vector"].shape == (3, 32) and batch["candidate_ids"].shape[-1] == 5

    # A student that is not its teacher, so that there is a distance to lessen.
    student = save_teacher(tmp_path / "student", seed=1)
    result = train(
        TrainConfig(
            store=str(tmp_path / "store"), student=str(student), output=str(tmp_path / "run"), loss="summaries",
            steps=12, batch_size=32, learning_rate=3e-3, eval_fraction=0.0,
        )
    )  # fmt: skip
    assert result.finished

    losses = [entry["loss"] for entry in read_history(tmp_path / "run")["entries"] if "loss" in entry]
    assert losses[-1] < losses[0]  # each step is over the whole dump

    # A kind that has no figures is named, and the others are measured.
    reporter, notes = Reporter(), []
    monkeypatch.setattr(reporter, "note", notes.append)
    question = EvaluateConfig(str(tmp_path / "run"), str(tmp_path / "store"), output=str(tmp_path / "evaluation.json"))
    assert evaluate(question, reporter=reporter)["not_evaluated"] == ["summaries"]
    assert notes[1:] == ["The kind summaries of the dump both is not evaluated: no figures exist for it."]
    assert "learnt from the dump both" in notes[0]


def measure_summaries(model, store, dump, ordinals, *, batch_size, **_):
    """The distance of `match_summaries`, of each sequence and on average."""
    dataset = DistillationDataset(store, dump, batch_size=batch_size, ordinals=ordinals, shuffle=False)
    distances: list[float] = []
    with torch.no_grad():
        for batch in dataset:
            outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
            distances += match_summaries(outputs, batch)[batch["sequence_id"] >= 0].tolist()
    return {"distance": float(np.mean(distances)), "of_sequences": distances}


SUMMARY_FIGURES = KindFigures(
    title="Summaries <toy>",
    metrics=(Metric("distance", "Distance", "squared & mean", ".4f"),),
    rows=lambda record: [Row("student", record, record["of_sequences"])],
    measure=measure_summaries,
    differences=lambda one, other: {"distance": mean_difference(one, other, np.ones(len(one)))},
)


def test_figures_of_a_kind_are_measured_printed_compared_and_reported(monkeypatch, tmp_path, teacher_folder, loaded_teacher):
    dump_summaries(monkeypatch, tmp_path, teacher_folder, loaded_teacher)
    monkeypatch.setitem(FIGURES, "summaries", SUMMARY_FIGURES)
    folders = [save_teacher(tmp_path / f"student{seed}", seed=seed) for seed in (1, 2)]
    printed = [CliRunner().invoke(app, ["evaluate", str(tmp_path / "store"), "--model", str(folder)]) for folder in folders]
    results = [json.loads((folder / "evaluations" / "both.json").read_text()) for folder in folders]
    distances = [result["figures"]["summaries"]["distance"] for result in results]
    count = len(KnowledgeStore.open(tmp_path / "store"))
    assert all(result["sequences"] == count and not result["not_evaluated"] for result in results)
    assert distances[0] != distances[1] and min(distances) > 0

    for done, distance in zip(printed, distances, strict=True):
        assert done.exit_code == 0, done.stderr
        [line] = [line for line in done.stdout.splitlines() if "Distance (squared & mean)" in line]
        assert f"{distance:.4f}" in line
        assert f"{count} sequences of both" in done.stdout and "KL to the teacher" in done.stdout

    first, second = (measurements(result)[1] for result in results)
    assert second.comparable(first) and not second.comparable(measurements(results[0])[0])
    [one], [other] = first.rows, second.rows
    difference = SUMMARY_FIGURES.differences(other.kept, one.kept)["distance"]
    assert difference.value == pytest.approx(distances[1] - distances[0]) and difference.low < difference.high

    page = write_report(folders, tmp_path / "report.html").read_text()
    section = page[page.index("Summaries &lt;toy&gt;: both") :]
    section = section[: section.index("</section>")]
    assert (
        page.index("On the text of a dump: both")
        and f"{count} sequences of <b>both</b>" in section
        and "squared &amp; mean" in section
    )
    assert all(f"{distance:.4f}" in section for distance in distances)
    for text in (section, printed[0].stdout[printed[0].stdout.index("sequences of both") :]):
        assert "small type" not in text and "In brackets" not in text and "alibration error" not in text
    assert "alibration error" in page and printed[0].stdout.count("In brackets") == 1
    assert "more than chance" in section and f"{difference.value:+.4f}".replace("-", "−") in section
