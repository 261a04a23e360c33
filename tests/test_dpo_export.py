"""Groups as pairs for TRL's DPOTrainer: the tokens that it makes of the corpus's rows, and the teacher's log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model, write_jsonl
from stores import write_group_store, write_store
from typer.testing import CliRunner

from knowledge_store import InputError, KnowledgeStore
from knowledge_store.cli import app
from teacher_dump import DumpConfig, dump

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TEXTS = [
    {"prompt": "How far?", "chosen": " As far as somebody looks.", "rejected": " A mile."},
    {"prompt": "In winter the book", "chosen": " was nearly empty.", "rejected": " slept, and they read old pages aloud."},
]
CHATS = [
    {"prompt": QUESTION, "chosen": said("Far enough."), "rejected": said("Near.")},
    {"prompt": QUESTION[1:], "chosen": said("As far as somebody looks for it."), "rejected": said("Not far at all.")},
]
OTHERS = [
    {"prompt": "When a storm", "completions": [" came", " went by", " on", " no"], "scores": [0.5, 3, -1, -1]},
    {"prompt": "When a storm", "completions": [" came", " went by"]},
    {"prompt": QUESTION, "chosen": [*said("Far."), *QUESTION[1:], *said("Far.")], "rejected": said("Near.")},
    {"prompt": "counted the sh", "chosen": "ips", "rejected": " and slept"},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory, loaded_teacher) -> KnowledgeStore:
    folder = tmp_path_factory.mktemp("pairs")
    corpus = write_jsonl(folder / "pairs.jsonl", [*TEXTS, *CHATS, *OTHERS])
    dump(DumpConfig("tiny", (corpus,), folder / "store", "pairs", max_length=64), teacher=loaded_teacher)
    write_store(folder / "store", "plain")
    return KnowledgeStore.open(folder / "store")


@pytest.fixture(scope="module")
def pairs(store, tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("exported") / "pairs.parquet"
    exported = store.export_dpo(path, "pairs")
    rows = pq.read_table(path).to_pylist()
    assert exported.pairs == len(rows)
    assert dict(exported.left_out) == {
        "an answer has no score": 1,
        "other tokens stand between an answer's targets": 1,
        "the tokens before the two answers differ": 1,
    }
    return rows


def test_tokens_are_those_that_trl_makes_of_the_rows(pairs, loaded_teacher):
    """Of a conversation, but for what its template writes after the last turn, which nobody learns."""
    datasets = pytest.importorskip("datasets")
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    tokenizer = loaded_teacher.tokenizer
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    for rows, found in ((TEXTS, pairs[:2]), (CHATS, pairs[2:4])):
        trained = trainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer), datasets.Dataset.from_list(rows), tokenizer, options, "train"
        )
        for theirs, row in zip(trained, found, strict=True):
            assert row["prompt_ids"] == theirs["prompt_ids"]
            for name in ("chosen_ids", "rejected_ids"):
                end = len(row[name])
                assert row[name] == theirs[name][:end] and tokenizer.decode(theirs[name][end:]).strip() == ""
                assert (end == len(theirs[name])) == (rows is TEXTS)


def test_log_probabilities_are_the_teachers(store, pairs, loaded_teacher):
    """Each to what rounding does to it (see FORMAT.md), and exactly those of the store."""
    table = store.sql(
        "SELECT sequence_id, sum(token_logprob::DOUBLE) AS logps FROM positions WHERE is_target AND dump = 'pairs' GROUP BY ALL"
    ).to_pydict()
    kept = dict(zip(table["sequence_id"], table["logps"], strict=True))
    for row in pairs:
        for which in ("chosen", "rejected"):
            answer = row[f"{which}_ids"]
            tokens = torch.tensor([row["prompt_ids"] + answer])
            with torch.inference_mode():
                logits = loaded_teacher.model(input_ids=tokens).logits[0, -len(answer) - 1 : -1]
            expected = torch.log_softmax(logits.double(), -1)[torch.arange(len(answer)), answer].sum().item()
            found = row[f"ref_{which}_logps"]
            assert found == pytest.approx(expected, abs=len(answer) * 3 / 16 + 1e-3)
            assert found == pytest.approx(kept[row[f"{which}_sequence_id"]], abs=1e-9)


def test_of_many_answers_the_best_stands_against_the_worst(pairs, loaded_teacher):
    """As in the loss: of equals the first is the best, and the last the worst."""
    row = pairs[4]
    assert loaded_teacher.tokenizer.decode(row["chosen_ids"]) == " went by<|end|>"
    assert loaded_teacher.tokenizer.decode(row["rejected_ids"]) == " no<|end|>"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # which TRL's own default sets
def test_trl_trains_on_them_without_a_reference_model(pairs, loaded_teacher, tmp_path):
    """With what the page says to leave out of its trainer: the tokenisation, and the pass of the reference."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")

    class StoredReference(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

        def _precompute_ref_logps(self, dataset, *arguments):
            return dataset

    options = trl.DPOConfig(
        output_dir=str(tmp_path), precompute_ref_log_probs=True, max_length=None, per_device_train_batch_size=5, max_steps=1,
        report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = loaded_teacher.tokenizer
    trainer = StoredReference(
        make_model(loaded_teacher.vocabulary_size),
        args=options,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    assert trainer.ref_model is None
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    # The student is the teacher still, so that all it is away from the reference is what rounding took.
    longest = max(len(row[name]) for row in pairs for name in ("chosen_ids", "rejected_ids"))
    assert abs(logged["rewards/chosen"]) < options.beta * longest / 16
    assert logged["loss"] == pytest.approx(np.log(2), abs=0.1)


def test_the_command_says_what_it_left_out(store, tmp_path):
    line = ["export", store.address, "pairs", "--output", str(tmp_path / "pairs.parquet"), "--format", "dpo"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0 and "pairs.parquet: 5 pairs" in done.stdout
    assert "1 group left out: an answer has no score" in done.stderr
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 2 and "exists already" in again.stderr
    plain = CliRunner().invoke(app, [*line[:2], "plain", "--output", str(tmp_path / "plain.parquet"), "--format", "dpo"])
    assert plain.exit_code == 2 and "dump 'plain' has no groups" in plain.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_groups_without_scores_are_no_pairs(tmp_path):
    store = KnowledgeStore.open(write_group_store(tmp_path / "store", sizes=((3, 3),)))
    with pytest.raises(InputError, match=r"no group to write \(of 2 an answer has no score"):
        store.export_dpo(tmp_path / "pairs.parquet")
    assert not (tmp_path / "pairs.parquet").exists()
