"""Runs of losses of preferences: what batches are given, what a run says and keeps, and what is refused beforehand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model
from processes import Notes
from stores import DOCUMENTS, MADE_BY, make_manifest, random_sequences, sequence_row, words
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainingArguments
from typer.testing import CliRunner

from knowledge_store import DumpWriter, KnowledgeStore, Shard
from knowledge_store.errors import InputError
from knowledge_store.format.sequences import tokens_table
from student_train import DistillationDataset, DistillationTrainer, TrainConfig, preferences, train
from student_train.cli import app
from student_train.losses.table import LOSSES
from student_train.training.mixture import Mixture
from student_train.training.preferences import preferences_for_run, reference_lines

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 11
SIZES = [2, 4, 3, 2, 2, 3, 2, 4, 2, 3]
ROWS = sum(SIZES)


def write_answers(folder: Path, dump: str, *, shift: float = 0.0, scores=None, truncated=(), same=(), groups=True, **changes):
    """A dump of groups of SIZES. All have the same tokens; `shift` is taken off what this teacher thinks of each, and in the
    groups of `same` all answers are one text."""
    plan = {"max_length": 64, **({"groups": True} if groups else {})}
    manifest = make_manifest(dump, VOCABULARY, shards=1, **{"plan": plan, **changes})
    writer = DumpWriter.open(folder, manifest, tokens_table(words(VOCABULARY), words(VOCABULARY)))
    windows = [(document, window) for document, size in enumerate(SIZES) for window in range(size)]
    knowledge = random_sequences(0, ROWS)
    for row, (document, window) in enumerate(windows):
        if document in same and window:
            knowledge[row] = knowledge[row - 1]
    rows = []
    for row, ((document, window), arrays) in enumerate(zip(windows, knowledge, strict=True)):
        knowledge[row] = {**arrays, "token_logprob": arrays["token_logprob"] - np.float32(shift)}
        values = {} if not groups else {"score": None if scores is None else scores[row]}
        rows.append({**sequence_row(document, arrays, window), **values, "truncated": document in truncated})
    writer.commit(Shard(0, 0, DOCUMENTS, rows, {"positions": knowledge}, made_by=MADE_BY))


def some_scores() -> list[float]:
    return [float(window) for size in SIZES for window in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preferences") / "store"
    write_answers(folder, "scored", scores=some_scores())
    write_answers(folder, "start")
    write_answers(folder, "judge", shift=1.0)
    write_answers(folder, "cut", scores=some_scores(), truncated=(3, 5))
    write_answers(folder, "twins", same=(0, 4), scores=some_scores())
    positions = make_manifest().kinds["positions"]
    write_answers(folder, "imported", kinds={"positions": {**positions, "unknown_tokens": True}})
    write_answers(folder, "plain", groups=False)
    write_answers(folder, "elsewhere", corpus={"files": [{"name": "other.jsonl", "bytes": 1, "sha256": "11"}]})
    write_answers(folder, "another", tokenizer={"size": VOCABULARY, "vocabulary_sha256": "22"})
    return folder


@pytest.fixture(scope="module")
def store(folder) -> KnowledgeStore:
    return KnowledgeStore.open(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    make_model(VOCABULARY, layers=1, seed=1).save_pretrained(folder)
    level = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    level.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=level, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def settings(folder, student, tmp_path) -> dict:
    return {
        "store": str(folder), "student": str(student), "output": str(tmp_path / "run"), "dump": "scored", "loss": "dpo",
        "reference": "start", "batch_size": 3, "learning_rate": 1e-3, "steps": 4, "eval_fraction": 0.3, "evaluations": 1,
        "keep_eos": True,
    }  # fmt: skip


def answers_of(store: KnowledgeStore, dump: str) -> dict[int, tuple[float, float]]:
    """Of each sequence the sum and the mean of what a dump's teacher thinks of its targets."""
    ids = store.sequences(dump)["sequence_id"].to_pylist()
    found = {}
    for ordinal, sequence in enumerate(ids):
        arrays = store[dump, ordinal]
        values = arrays["token_logprob"][arrays["is_target"]].astype(np.float64)
        found[sequence] = (values.sum(), values.mean())
    return found


def test_batches_have_what_the_dumps_say(store):
    asked = preferences(store, "scored", reference="start", scores="judge")
    reference, scores = answers_of(store, "start"), answers_of(store, "judge")
    seen = []
    for batch in DistillationDataset(store, "scored", groups=True, batch_size=4, prepare=asked):
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            if sequence < 0:
                assert batch["reference_logprob"][row] == 0 and batch["score"][row].isnan() and batch["group"][row] == -1
                continue
            seen.append(sequence)
            assert batch["reference_logprob"][row].item() == pytest.approx(reference[sequence][0], abs=1e-9)
            assert batch["score"][row].item() == pytest.approx(scores[sequence][1], abs=1e-9)
    assert sorted(seen) == sorted(reference)
    kept = preferences(store, "scored", reference="start")
    [batch] = DistillationDataset(store, "scored", groups=True, batch_size=10, prepare=kept, shuffle=False)
    assert batch["score"].tolist() == some_scores()
    with pytest.raises(InputError, match="are those of another dump"):
        kept({"sequence_id": np.array([10**9])})


@pytest.mark.parametrize(("loss", "options"), [("dpo", {"beta": 0.5, "scores": "judge"}), ("pro", {"reference": None})])
def test_a_run(settings, loss, options):
    """Half the groups accumulated twice are the same run; validation is over groups that are held out whole."""
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        given = {**settings, "loss": loss, "batch_size": size, "gradient_accumulation": accumulated, **options}
        notes = Notes()
        result = train(TrainConfig(**{**given, "output": f"{settings['output']}-{size}"}), reporter=notes)
        assert result.finished
        entries = json.loads((result.output / "history.json").read_text())["entries"]
        found.append([entry[name] for entry in entries for name in ("loss", "eval_loss", "eval_margin") if name in entry])
        assert all(0 <= entry["eval_accuracy"] <= 1 for entry in entries if "eval_loss" in entry)
        record = json.loads((result.output / "run.json").read_text())
        assert record["preferences"]["groups"] == {"train": 7, "eval": 3}
        assert record["sequences"]["train"] + record["sequences"]["eval"] == ROWS
        assert record["dumps"][0]["read"]["sequences"] == 7
        assert any("all of its 7 groups in an epoch; in the run about 14 groups" in line for line in notes.notes)
        weights = [line for line in notes.notes if "does not say which weights it is of" in line]
        assert len(weights) == (loss == "dpo")
    assert len(found[0]) >= 6 and found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


def test_another_reference_is_another_run(settings):
    train(TrainConfig(**{**settings, "eval_fraction": 0.0}))
    for change, reason in (({"reference": "judge"}, "--reference was start"), ({"scores": "judge"}, "--scores was None")):
        with pytest.raises(InputError, match=reason):
            train(TrainConfig(**{**settings, "eval_fraction": 0.0, **change}))


def test_held_out_groups_that_say_nothing_are_not_read(settings, store):
    config = TrainConfig(**{**settings, "dump": "twins", "loss": "rrhf", "reference": None, "scores": "twins"})
    all_of = np.arange(ROWS)
    train_on, held_out = {"twins": all_of[SIZES[0] : SIZES[0] + SIZES[1]]}, {"twins": all_of}
    found = preferences_for_run(config, store, Mixture({"twins": None}), LOSSES["rrhf"], train_on, held_out)
    assert found is not None and found.groups == {"train": {"twins": 1}, "eval": {"twins": 8}}
    documents = store.sequences("twins")["document"].to_numpy()
    assert set(documents[found.held_out["twins"]]) == set(range(10)) - {0, 4}
    assert found.lines == (
        "Of twins, 2 groups held out for validation whose scores are equal or not known can say nothing, and are not read.",
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reference": None}, "the loss dpo needs --reference: a dump of the same corpus by the student that the run begins"),
        ({"reference": "elsewhere"}, "--reference: the dumps scored and elsewhere are not of one corpus, tokenizer and plan"),
        ({"reference": "another"}, "vocabulary SHA-256 is None in the first and 22 in the second"),
        ({"reference": "plain"}, "the plan's groups is True in the first and None in the second"),
        ({"reference": "imported"}, "--reference: the dump imported does not know the teacher's log-probability of each token"),
        ({"reference": "nowhere"}, "no dump 'nowhere'"),
        ({"scores": "elsewhere"}, "--scores: the dumps scored and elsewhere are not of one corpus"),
        ({"dump": "plain"}, "the loss dpo learns from groups of answers, and the dump plain has none"),
        ({"loss": "rrhf"}, "the loss rrhf takes no --reference"),
        ({"loss": "forward-kl"}, "the loss forward-kl takes no --reference: losses of preferences do (dpo, rrhf, pro)"),
        ({"loss": "ce", "reference": None, "scores": "judge"}, "the loss ce takes no --scores"),
        ({"dump": "start"}, "of start have no scores: give them in the corpus, or --scores DUMP"),
        ({"dump": "cut"}, "of the 10 groups of cut have an answer that is cut"),
        ({"dump": "twins"}, "the dump start, given as reference, lacks 2 of the 27 sequences of twins"),
        (
            {"dump": "twins", "loss": "rrhf", "reference": None, "scores": "twins"},
            "all scores are equal in 2 of the 10 groups of twins",
        ),
        ({"where": "SELECT dump, sequence_id FROM sequences WHERE dump = 'scored' AND \"window\" = 0"}, "10 of the 10 groups"),
        ({"ce_weight": 0.5}, "the loss dpo takes no --ce-weight, which would be of the text of all answers"),
        ({"positions_where": "token_logprob < -1"}, "the loss dpo takes no --positions-where"),
        ({"rationale": "random"}, "the loss dpo takes no --rationale"),
        ({"hidden_weight": 0.1}, "the loss dpo takes no --hidden-weight"),
        ({"dump": None, "teachers": "scored=1,start=1"}, "the loss dpo takes no --teachers"),
        ({"loss": "pro", "reference": None, "beta": 0.2}, "the loss pro takes no --beta"),
        ({"loss": "jensen-shannon", "reference": None, "beta": 1.5}, "of jensen-shannon it must be below 1"),
        ({"temperature": 2.0}, "the loss dpo takes no --temperature"),
    ],
)
def test_what_is_refused_in_one_line_before_the_student_is_loaded(settings, options, reason, monkeypatch):
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("student_train.training.run.load_model", loaded)
    monkeypatch.setattr("student_train.training.run.load_tokenizer", loaded)
    given = {**settings, "eval_fraction": 0.0, **options}
    named = [word for name, value in given.items() if name not in ("store", "keep_eos") and value is not None
             for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    result = CliRunner().invoke(app, ["run", given["store"], *named])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and reason in " ".join(" ".join(lines).split()), result.output
    assert not Path(given["output"]).exists()


def test_several_dumps_with_one_reference(settings):
    with pytest.raises(InputError, match="--reference belongs to one dump, and the run trains on scored, cut"):
        train(TrainConfig(**{**settings, "dump": ("scored", "cut")}))


def test_a_reference_of_the_student_and_one_of_other_weights(settings, student):
    config, digest = TrainConfig(**settings), hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()

    def lines(**teacher) -> list[str]:
        return reference_lines(config, make_manifest("start", teacher={"name": "s", "vocabulary_size": VOCABULARY, **teacher}))

    assert lines(files={"model.safetensors": digest, "config.json": "44"}) == []
    [other], [unknown] = lines(files={"model.safetensors": "33"}), lines()
    assert "the reference start is of other weights than" in other and "its margins do not begin at 0" in other
    assert "does not say which weights it is of" in unknown


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=3, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3, logging_steps=1, seed=0, warmup_steps=1,
        weight_decay=0.01,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Neither the student's vocabulary")  # which lies in no folder
def test_a_plain_trainer(store, tmp_path):
    """From the dump itself and from a data set of groups it trains alike; what it would not hear is refused."""
    found = []
    asked = preferences(store, "scored", reference="start")
    dataset = DistillationDataset(store, "scored", groups=True, batch_size=3, prepare=asked)
    ways = {"dump": "scored", "reference": "start"}, {"train_dataset": dataset}
    for way in ways:
        trainer = DistillationTrainer(
            make_model(VOCABULARY, layers=1), arguments(tmp_path), store=store, loss="dpo", eval_dataset=dataset, **way
        )
        trainer.train()
        found.append(trainer.evaluate())
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"]) and 0 <= found[0]["eval_accuracy"] <= 1
    ungrouped = DistillationDataset(store, "scored", batch_size=3)
    rows = [{"sequence_id": 0}]
    for given, reason in (
        ({"train_dataset": ungrouped}, "the loss dpo reads groups of answers"),
        ({"train_dataset": rows, "store": store, "dump": "scored"}, "the loss dpo reads groups of answers"),
        ({"store": store, "dump": "scored"}, "the loss dpo needs --reference"),
        ({"train_dataset": dataset, "reference": "start"}, "reference goes with the dump's own sequences"),
    ):
        with pytest.raises(InputError, match=reason):
            DistillationTrainer(make_model(VOCABULARY, layers=1), arguments(tmp_path), loss="dpo", **given)
