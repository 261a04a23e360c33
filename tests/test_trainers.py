"""The store in the trainers that people have: one loss curve, resumes, evaluations, rows of their own, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, write_jsonl
from processes import Notes, run_ranks
from ranks import train_in_three_ways
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.cli import app as knowledge_store_cli
from knowledge_store.errors import InputError
from knowledge_store.reading.batches import Batches
from student_train import (
    DistillationCollator,
    DistillationDataset,
    DistillationTrainer,
    cross_entropy,
    forward_kl,
    select_targets,
)
from student_train.evaluation.configuration import EvaluateConfig
from student_train.evaluation.run import evaluate
from student_train.training.adapters import add_adapter
from student_train.training.configuration import TrainConfig
from student_train.training.run import train
from teacher_dump import DumpConfig, dump

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 7
STEPS = 16  # over more than an epoch, whose last step is short
SHARED = {
    "seed": SEED,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
# A float32 sum in another order; Adam makes more of it with every step.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def store(store_folder) -> KnowledgeStore:
    return KnowledgeStore.open(store_folder)


def load(student: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(student)


def adapted(model):
    return add_adapter(model, 2, base=model.config.name_or_path, seed=SEED)


def arguments(folder: Path, **changes) -> TrainingArguments:
    return TrainingArguments(str(folder), **{**SHARED, "per_device_train_batch_size": 4, **changes})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_three_trainers_have_one_loss_curve(store, store_folder, student, tmp_path):
    """Two processes with accumulation, of plain transformers, TRL and the command: the curve of one process without."""
    assert store.sequence_count("train") % 4  # the last step of an epoch is short
    alone = DistillationTrainer(load(student), args=arguments(tmp_path / "alone"), store=store, dump="train")
    alone.train()
    ranks = run_ranks(2, train_in_three_ways, str(store_folder), str(student), tmp_path, SHARED, folder=tmp_path / "said")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    curves = json.loads((tmp_path / "curves.json").read_text())
    expected = losses(alone)
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1
    for name in ("plain", "trl", "run"):
        assert curves[name] == pytest.approx(expected, abs=TOLERANCE), name
    heldout = alone.evaluate(DistillationDataset(store, "heldout", batch_size=3))["eval_loss"]
    assert store.sequence_count("heldout") % 2  # accelerate repeats a row, which counts once
    assert curves["evaluations"] == pytest.approx([heldout] * 2, abs=TOLERANCE)


class StopAt(TrainerCallback):
    """Stops training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_a_trainer_resumes_with_the_sequences_that_come_next(store, student, tmp_path, monkeypatch):
    """Over two epochs, stopped in the middle of the second one; nothing that was read is read again."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    read: list[int] = []

    def trained(folder: str, resume: bool = False, stop: int = 0, **changes) -> DistillationTrainer:
        given = arguments(tmp_path / folder, **settings | changes)
        trainer = DistillationTrainer(load(student), given, store=store, dump="train", callbacks=[StopAt(stop)])
        read.clear()  # what it looked at to know the dump
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")
    steps = 2 * -(-store.sequence_count("train") // 6)
    assert whole.state.global_step == steps == whole.state.max_steps and whole.state.epoch == 2
    stop = steps // 2 + 2
    first = trained("run", stop=stop)
    assert losses(first) == losses(whole)[:stop]
    batch_at = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda self, step: read.append(step) or batch_at(self, step))
    second = trained("run", resume=True, dataloader_num_workers=0)
    assert losses(second) == losses(whole)
    left = range(2 * (stop - steps // 2), -(-store.sequence_count("train") // 3))
    assert read == [*left]
    worked = trained("run", resume=True, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert losses(worked) == losses(whole)

    with pytest.raises(InputError, match="shuffled by the seed 7, and would go on with them shuffled by the seed 8: give"):
        trained("run", resume=True, data_seed=8)
    with pytest.raises(InputError, match="would go on with them as they are stored"):
        trained("run", resume=True, train_sampling_strategy="sequential")
    state = tmp_path / "run" / f"checkpoint-{stop}" / "trainer_state.json"
    kept = json.loads(state.read_text())
    del kept["stateful_callbacks"]["DumpSnapshots"]["attributes"]["order"]  # as an earlier one has it
    state.write_text(json.dumps(kept))
    assert losses(trained("run", resume=True)) == losses(whole)
    state.write_text(state.read_text().replace(str(store.snapshot("train")), "7"))
    with pytest.raises(InputError, match="other sequences in train than when this training began"):
        trained("run", resume=str(state.parent))


def test_evaluations_are_means_over_targets(store, student, tmp_path):
    """Of a dump, of rows of one's own, and of several by name; predictions are there where they are asked for."""
    heldout = DistillationDataset(store, "heldout", batch_size=3, shuffle=False)
    model = load(student)
    sums = count = 0
    with torch.no_grad():
        for batch in heldout:
            logits, targets = select_targets(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch)
            sums = sums + torch.stack([f(logits, targets).sum() for f in (forward_kl, cross_entropy)])
            count += len(logits)
    expected = (sums / count).tolist()
    seen = []

    def accuracy(prediction) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        seen.append(int((labels != -100).sum()))
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == labels)[labels != -100].mean())}

    given = arguments(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2, per_device_eval_batch_size=4)
    named = {"rows": rows_of(store, "heldout"), "dump": heldout}
    trainer = DistillationTrainer(model, given, eval_dataset=heldout, store=store, dump="train", compute_metrics=accuracy)
    before = trainer.evaluate()
    assert [before["eval_loss"], before["eval_nll"]] == pytest.approx(expected, abs=1e-5)
    assert 0 <= before["eval_accuracy"] <= 1 and before["eval_kl"] <= before["eval_loss"] and seen == [count]
    trainer.train()
    [after] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert after["eval_loss"] != before["eval_loss"]
    both = DistillationTrainer(load(student), given, eval_dataset=named, store=store, dump="heldout", ce_weight=0.25).evaluate()
    for name in named:
        mixed = 0.75 * expected[0] + 0.25 * expected[1]
        assert both[f"eval_{name}_loss"] == pytest.approx(mixed, abs=1e-5)
        assert both[f"eval_{name}_nll"] == pytest.approx(expected[1], abs=1e-5)
    assert trainer.predict(heldout).predictions.shape[0] >= heldout.sequences


def rows_of(store: KnowledgeStore, dump: str) -> list[dict]:
    """A dump's sequences as a tokeniser's rows."""
    ids = store.sequences(dump)["sequence_id"].to_pylist()
    return [
        {"input_ids": store[dump, place]["input_ids"].tolist(), "sequence_id": ids[place], "note": "unused"}
        for place in range(len(ids))
    ]


def test_rows_of_ones_own_are_the_dumps(store, student, tmp_path):
    """By the plain trainer's own loader: in order the same curve as the dump's sequences in order."""
    rows = rows_of(store, "train")
    by_tokens = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    settings = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "max_steps": 6}
    curves = []
    for data, changes in (
        (None, {}),
        (rows, {}),
        (by_tokens, {"remove_unused_columns": False, "dataloader_num_workers": 1}),
    ):
        given = arguments(tmp_path, **settings | changes)
        trainer = DistillationTrainer(load(student), given, train_dataset=data, store=store, dump="train")
        trainer.train()
        curves.append(losses(trainer))
    assert curves[1] == curves[0] and curves[2] == curves[0]
    grouped = DistillationTrainer(
        load(student),
        arguments(tmp_path, train_sampling_strategy="group_by_length", max_steps=2),
        train_dataset=rows,
        store=store,
        dump="train",
    )
    assert grouped.train().global_step == 2
    masked = [{**row, "completion_mask": [0] * len(row["input_ids"])} for row in rows]
    trainer = DistillationTrainer(load(student), arguments(tmp_path), train_dataset=masked, store=store, dump="train")
    assert not next(iter(trainer.get_train_dataloader()))["is_target"].any()
    strange = [*rows[:3], {"input_ids": [1, 2, 3]}, rows[4], {"input_ids": [5]}]
    with pytest.raises(
        InputError, match=r"2 of 6 rows are not in the dump train; the first is row 3\. .* max_length must be those"
    ):
        DistillationTrainer(load(student), arguments(tmp_path), train_dataset=strange, store=store, dump="train")


def test_what_trl_would_do_to_prompts_and_long_rows_is_refused_or_told(store, student, tmp_path):
    def trainer(**trl):
        given = arguments(tmp_path)
        for name, value in trl.items():
            setattr(given, name, value)  # as SFTConfig has them
        return DistillationTrainer(load(student), given, store=store, dump="train")

    longest = max(store.sequences("train")["length"].to_pylist())
    with pytest.warns(UserWarning, match=f"max_length=8 cuts nothing: .* of up to {longest} tokens"):
        trainer(max_length=8)
    trainer(max_length=longest, completion_only_loss=True)
    with pytest.raises(InputError, match="completion_only_loss=False does not go with learning from a store"):
        trainer(completion_only_loss=False)


def test_a_dump_whose_shards_are_not_all_there_is_read_with_a_warning(store_folder, student, teacher_folder, tmp_path):
    folder = shutil.copytree(store_folder, tmp_path / "store")
    commits = sorted((folder / "train" / "commits").iterdir())
    commits[-1].unlink()
    told = f"the dump train has {len(commits) - 1} of its {len(commits)} shards, and only these are read"
    store = KnowledgeStore.open(folder)
    with pytest.warns(UserWarning, match=f"^{told}"):
        DistillationTrainer(load(student), arguments(tmp_path), store=store, dump="train")
    dataset = DistillationDataset(store, "train", batch_size=4)
    for data in (
        {"train_dataset": dataset},
        {"store": KnowledgeStore.open(store_folder), "dump": "train", "eval_dataset": dataset},
    ):
        with pytest.warns(UserWarning, match=f"^{told}"):
            DistillationTrainer(load(student), arguments(tmp_path), **data)
    run = TrainConfig(str(folder), str(student), str(tmp_path / "run"), dump=("train",), steps=1, eval_fraction=0.0)
    evaluation = EvaluateConfig(str(teacher_folder), str(folder), dump="train", limit=1, output=str(tmp_path / "e.json"))
    for command, config in ((train, run), (evaluate, evaluation)):
        reporter = Notes()
        command(config, reporter=reporter)
        assert [note for note in reporter.notes if note.startswith(f"Warning: {told}")], command
    said = CliRunner().invoke(
        knowledge_store_cli, ["export", str(folder), "train", "--output", str(tmp_path / "train.parquet")]
    )
    assert said.exit_code == 0 and f"Warning: {told}" in " ".join(said.stderr.split())
    assert store.what_is_missing("heldout") is None


def test_the_collator_joins_rows_with_the_store(store):
    rows, collator = rows_of(store, "train"), DistillationCollator(store, "train")
    stored = [store["train", place] for place in range(3)]
    ids = [row["input_ids"] for row in rows[:3]]
    width = max(map(len, ids)) + 2
    padded = [[0] * (width - len(ids[0])) + ids[0], ids[1] + [0] * (width - len(ids[1]))]
    masks = [[0] * (width - len(ids[0])) + [1] * len(ids[0]), [1] * len(ids[1]) + [0] * (width - len(ids[1]))]
    labels = torch.tensor(ids[2])
    labels[: len(labels) // 2] = -100
    batch = collator(
        [
            {"input_ids": padded[0], "attention_mask": masks[0], "labels": padded[0]},  # padded on the left
            {"input_ids": padded[1], "attention_mask": masks[1], "sequence_id": rows[1]["sequence_id"]},  # on the right
            {"input_ids": torch.tensor(ids[2]), "labels": labels},
            {"input_ids": ids[0], "completion_mask": [1] * 9 + [0] * (len(ids[0]) - 9)},
            {"sequence_id": rows[1]["sequence_id"]},
        ]
    )
    assert batch["sequence_id"].tolist() == [rows[place]["sequence_id"] for place in (0, 1, 2, 0, 1)]
    for place in range(3):
        length = len(ids[place])
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["input_ids"][place, :length].tolist() == ids[place]
        assert np.array_equal(batch["candidate_ids"][place, :length].numpy(), stored[place]["candidate_ids"])
    assert batch["is_target"][0, : len(ids[0])].tolist() == stored[0]["is_target"].tolist()
    kept = stored[2]["is_target"] & (labels != -100).numpy()
    assert batch["is_target"][2, : len(kept)].tolist() == kept.tolist() and kept.any()
    completed = batch["is_target"][3]
    assert completed[:9].tolist() == stored[0]["is_target"][:9].tolist() and completed[:9].any() and not completed[9:].any()
    assert torch.equal(batch["labels"] != -100, batch["is_target"])
    assert collator.missing([*rows, {"input_ids": [4]}]) == [len(rows)]
    loader = DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=2)
    assert [part["sequence_id"].tolist() for part in loader] == [
        [row["sequence_id"] for row in rows[start : start + 4]] for start in range(0, len(rows), 4)
    ]
    assert pickle.loads(pickle.dumps(collator))(rows[:2])["sequence_id"].tolist() == batch["sequence_id"].tolist()[:2]
    for wrong, message in (
        ([rows[0], {"input_ids": [1, 2]}], "1 of 2 rows of a batch are not in the dump train; the first is row 1, of 2 tokens"),
        ([{"input_ids": ids[0], "sequence_id": rows[1]["sequence_id"]}], "not the tokens that the dump train has under it"),
        ([{"input_ids": ids[0], "labels": [*ids[0][1:], 0]}], "labels are not shifted"),
        ([{"input_ids": ids[0], "loss_mask": [1, 1]}], "row 0 of a batch has a loss_mask of 2 tokens"),
        ([{"text": "a lamp"}], "neither input_ids nor sequence_id, only text"),
    ):
        with pytest.raises(InputError, match=message):
            collator(wrong)


def test_a_row_of_tokens_with_several_targets_is_refused(loaded_teacher, tmp_path):
    """A text, the same as a prompt with its answer, and another text twice: its id says which of the first two is meant."""
    asked = {"prompt": "Who lit the lamp?", "completion": " The keeper did."}
    rows = [{"text": "".join(asked.values())}, asked, *[{"text": "The keeper did."}] * 2]
    corpus = write_jsonl(tmp_path / "rows.jsonl", rows)
    dump(DumpConfig("tiny", (corpus,), tmp_path / "store", "rows", max_length=48), teacher=loaded_teacher)
    store = KnowledgeStore.open(tmp_path / "store")
    text, answer, twin, _ = found = rows_of(store, "rows")
    collator = DistillationCollator(store)
    assert text["input_ids"] == answer["input_ids"] and collator.missing([{"input_ids": twin["input_ids"]}, *found]) == []
    batch = collator([text, answer])
    assert batch["is_target"].sum(dim=1).tolist() == store.sequences("rows")["targets"].to_pylist()[:2]
    for use in (collator, collator.missing):
        with pytest.raises(InputError, match=r"several sequences of the dump rows have the tokens of a row, .* give the row"):
            use([{"input_ids": answer["input_ids"]}])


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"loss": "nonsense"}, {}, "there is no loss 'nonsense'"),
        ({"loss_options": {"heat": 2.0}}, {}, "the loss forward-kl takes no 'heat': it takes temperature, tail"),
        ({"loss_options": {"temperature": -1.0}}, {}, "temperature"),
        ({"dump": None}, {}, "heldout"),
        ({"store": None}, {}, "a trainer needs a store to learn from"),
        ({"data_collator": print}, {}, "data_collator is made here"),
        ({"train_dataset": [{"input_ids": [1]}], "ordinals": np.arange(2)}, {}, "ordinals goes with the dump's own sequences"),
        ({"compute_loss_func": print}, {}, "compute_loss_func does not go with learning from a store"),
        ({}, {"label_smoothing_factor": 0.1}, 'label_smoothing_factor .* choose loss="label-smoothing"'),
        ({}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' does not go"),
        ({}, {"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({}, {"accelerator_config": {"split_batches": True}}, "split_batches"),
    ],
)
def test_what_does_not_fit_is_refused(store, student, tmp_path, options, settings, message):
    given = {"store": store, "dump": "train", **options}
    with pytest.raises(InputError, match=message):
        DistillationTrainer(load(student), arguments(tmp_path / "trainer", **settings), **given)


def test_another_vocabulary_is_refused(store, student, tmp_path):
    """By the tokenizer that is given, or else by the one that lies where the student was loaded from."""

    def make(model, **given) -> DistillationTrainer:
        return DistillationTrainer(model, arguments(tmp_path / "run", max_steps=1), store=store, dump="train", **given)

    own, other = make_tokenizer(), make_tokenizer(extra_words=("zebra",))
    message = "the vocabulary of the student is not that of the dump train"
    holder = make_tokenizer(extra_words=("zebra",))
    holder.tokenizer = "of another library"
    for tokenizer in (other, holder, SimpleNamespace(tokenizer=other)):  # a processor has one
        with pytest.raises(InputError, match=message):
            make(load(student), processing_class=tokenizer)
    folder = tmp_path / "other"
    shutil.copytree(student, folder)  # whose embeddings are padded
    other.save_pretrained(folder)
    for adapt in (lambda model: model, adapted):
        with pytest.raises(InputError, match=r"by the tokenizer in .*other; processing_class=.* token id 4 is '!' in the dump"):
            make(adapt(load(folder)))
        assert make(adapt(load(folder)), processing_class=own).train().global_step == 1
    for broken in (lambda file: file.write_text("{"), Path.unlink):
        broken(folder / "tokenizer.json")
        with pytest.warns(
            UserWarning, match="Neither the student's vocabulary nor .* compared with train: .* processing_class="
        ):
            assert make(load(folder)).train().global_step == 1
    with pytest.raises(InputError, match="the student has embeddings for 250 tokens and the dump train uses ids up to 399"):
        make(make_model(250, layers=1))


def test_a_base_student_of_conversations_stops(store, loaded_teacher, student, tmp_path):
    """Its settings lack the token that ends a turn, as `student-train run` finds; an adapter is saved with them too."""
    chats = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"{n}."}]} for n in range(8)]
    corpus = write_jsonl(tmp_path / "chat.jsonl", chats)
    dump(DumpConfig("tiny", (corpus,), tmp_path / "store", "chat", max_length=48), teacher=loaded_teacher)
    conversations, base = KnowledgeStore.open(tmp_path / "store"), tmp_path / "base"
    shutil.copytree(student, base)
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|system|>", None
    tokenizer.save_pretrained(base)
    end, stop = 0, tokenizer.eos_token_id
    (base / "chat_template.jinja").unlink()
    for adapt in (lambda model: model, adapted):
        model = load(base)
        model.config.eos_token_id = model.generation_config.eos_token_id = stop
        output, given = tmp_path / adapt.__name__, {} if adapt is adapted else {"processing_class": tokenizer}
        with pytest.warns(UserWarning) as warned:
            trainer = DistillationTrainer(
                adapt(model), arguments(output, max_steps=1), store=conversations, dump="chat", **given
            )
        ending, template = (str(each.message) for each in warned)
        assert ending == (
            "The targets of chat end with '<|end|>', and the student's generation settings stop at '<|system|>': the trained"
            " student's will stop at '<|end|>' and '<|system|>' (set model.generation_config.eos_token_id after this to have"
            " others)."
        )
        assert template.startswith("the conversations of chat were written by a chat template")
        trainer.train()
        trainer.save_model()
        assert GenerationConfig.from_pretrained(output).eos_token_id == [end, stop]
        tokenizer.eos_token = "<|system|>"
