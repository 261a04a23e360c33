"""A new kind of knowledge, from the teacher to the student: one schema, one extractor, one loss, and one line in a dict each.

If this test needs a change anywhere else, the seam between the three packages has come apart.
"""

from __future__ import annotations

import pyarrow as pa
from conftest import save_teacher, story_rows, write_jsonl

from knowledge_store import KINDS, Field, Kind, KnowledgeStore, verify
from knowledge_store.reporter import Reporter
from student_train.evaluation.configuration import EvaluateConfig
from student_train.evaluation.figures import FIGURES
from student_train.evaluation.run import evaluate
from student_train.losses.table import LOSSES, Loss
from student_train.training.configuration import TrainConfig
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


def test_a_kind_is_three_functions_and_three_lines(monkeypatch, tmp_path, teacher_folder, loaded_teacher):
    monkeypatch.setitem(KINDS, "summaries", SUMMARIES)
    monkeypatch.setitem(EXTRACTORS, "summaries", Extractor(frozenset({Ability.HIDDEN_STATES}), extract_summaries))
    needs = {"kinds": ("summaries",), "columns": ("vector",), "hidden_states": True}
    monkeypatch.setitem(LOSSES, "summaries", Loss(match_summaries, whole_batch=True, unit="sequence", **needs))

    corpus = write_jsonl(tmp_path / "stories.jsonl", story_rows(12))
    kinds = ("positions", "summaries")
    config = DumpConfig(str(teacher_folder), (corpus,), tmp_path / "store", "both", max_length=48, shard_size=4, kinds=kinds)
    dump(config, teacher=loaded_teacher)

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

    # What a kind has no figures for is said; with a function for it, it is measured like any other.
    reporter, notes = Reporter(), []
    monkeypatch.setattr(reporter, "note", notes.append)
    question = EvaluateConfig(str(tmp_path / "run"), str(tmp_path / "store"), output=str(tmp_path / "evaluation.json"))
    assert evaluate(question, reporter=reporter)["not_evaluated"] == ["summaries"]
    assert notes == ["The kind summaries of the dump both is not evaluated: no figures exist for it."]
    monkeypatch.setitem(FIGURES, "summaries", lambda model, store, dump, ordinals, **_: {"distance": len(ordinals)})
    measured = evaluate(question)
    assert measured["figures"]["summaries"]["distance"] == measured["sequences"] == len(store) and not measured["not_evaluated"]
