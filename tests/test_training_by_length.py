"""Training by length groups: in a run, and by the sampler under the loaders of torch, accelerate and transformers."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from processes import Notes
from safetensors.torch import load_file
from stores import write_store
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from knowledge_store import InputError, KnowledgeStore
from student_train import DistillationTrainer, LengthGroupSampler, TrainConfig, train


def cut(rows, size: int) -> list[list]:
    """Consecutive parts of so many."""
    rows = [*rows]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


LENGTHS = np.random.default_rng(0).integers(2, 9, 42).tolist()


def sampler(epoch: int = 0, **changes) -> LengthGroupSampler:
    found = LengthGroupSampler(LENGTHS, **{"group_by_length": 24, "global_batch": 12, "seed": 3} | changes)
    found.set_epoch(epoch)
    return found


def test_every_row_once_in_an_order_of_each_epoch():
    for epoch in (0, 1):
        assert len(sampler(epoch)) == len(LENGTHS)
        assert sorted(sampler(epoch)) == list(range(len(LENGTHS)))
        assert [*sampler(epoch)] == [*sampler(epoch)]
    assert [*sampler(0)] != [*sampler(1)]
    assert [*sampler(0)] != [*sampler(0, seed=4)]


def test_it_is_the_order_of_a_store(tmp_path):
    store = KnowledgeStore.open(write_store(tmp_path / "store", shards=3, size=5))
    plan = {"group_by_length": 8, "global_batch": 4, "seed": 2}
    rows = LengthGroupSampler(store.sequences()["length"].to_pylist(), **plan)
    rows.set_epoch(1)
    batches = store.batches(batch_size=2, epoch=1, **plan)
    ids = store.sequences()["sequence_id"].to_numpy()[[*rows]]
    assert ids.tolist() == [row for batch in batches for row in batch["sequence_id"].tolist() if row >= 0]
    assert rows.padding_share(2) == batches.padding_share()


@pytest.mark.parametrize(("batch_size", "processes", "accumulated"), [(6, 2, 1), (3, 2, 2), (2, 3, 2), (1, 4, 3), (4, 1, 3)])
def test_accelerate_divides_it_into_the_same_steps(batch_size, processes, accumulated):
    """Whole steps: accelerate fills up the last one with rows from the beginning."""
    ranks = [
        [*BatchSamplerShard(BatchSampler(sampler(), batch_size, drop_last=False), processes, rank)] for rank in range(processes)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    steps = [sorted(chain(*chain(*step))) for step in cut(zip(*ranks, strict=True), accumulated)]
    assert steps[:3] == [sorted(rows) for rows in cut(sampler(), 12)][:3]
    spread = sum(LENGTHS[batch[0]] - LENGTHS[batch[-1]] for rank in ranks for batch in rank[: 36 // batch_size // processes])
    assert spread <= len(LENGTHS)  # sorted, and neighbours in length


class Rows(torch.utils.data.Dataset):
    """Rows that are their own number, again and again."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {"input_ids": [row] * LENGTHS[row]}


class Grouped(Trainer):
    """Groups its rows by length; remembers what it was given."""

    def _get_train_sampler(self, train_dataset=None):
        arguments = self.args
        global_batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return LengthGroupSampler(LENGTHS, group_by_length=24, global_batch=global_batch, seed=arguments.seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += inputs["input_ids"][:, 0].tolist()
        return super().training_step(model, inputs, num_items_in_batch)


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    tokens = [torch.tensor(row["input_ids"]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return {"input_ids": ids, "labels": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)}


def test_a_trainer_resumes_in_the_middle_of_a_later_epoch(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    expected = [*sampler(0, seed=42), *sampler(1, seed=42)]

    def train(**resume) -> list[int]:
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            num_train_epochs=2,
            save_steps=6,  # of 8: four steps in each epoch
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Grouped(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), arguments, padded, Rows())
        trainer.seen = []
        trainer.train(**resume)
        return trainer.seen

    assert train() == expected
    assert train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-6")) == expected[42 + 24 :]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group_by_length": 0}, "group_by_length is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
    ],
)
def test_impossible_groups_are_refused(changes, reason):
    with pytest.raises(InputError, match=reason):
        sampler(**changes)
    with pytest.raises(InputError, match="no row"):
        LengthGroupSampler([], group_by_length=1, global_batch=1)


def test_a_group_of_one_step_trains_the_same_student(settings, tmp_path):
    """Its sequences are those of the step without groups. Larger groups do not depend on how a step is divided either."""

    def trained(name: str, **changes) -> dict[str, torch.Tensor]:
        told = Notes()
        output = tmp_path / name
        train(TrainConfig(**settings | {"steps": 6, "output": str(output)} | changes), reporter=told)
        assert any("of the batches is padding" in note for note in told.notes)
        return load_file(output / "model.safetensors")

    def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    plain = trained("plain")
    divided = {"batch_size": 1, "gradient_accumulation": 4}
    assert difference(plain, trained("sorted", group_by_length=4, **divided)) < 1e-4
    grouped = trained("grouped", group_by_length=12)
    assert difference(grouped, plain) > 1e-3
    assert difference(grouped, trained("grouped-divided", group_by_length=12, **divided)) < 1e-4


def test_a_trainer_of_the_store_groups_the_whole_step(settings, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=3, report_to="none", use_cpu=True
    )
    store = KnowledgeStore.open(settings["store"])
    model = AutoModelForCausalLM.from_pretrained(settings["student"])
    trainer = DistillationTrainer(model, arguments, store=store, dump="train", group_by_length=12)
    assert (trainer.train_dataset.plan.group_by_length, trainer.train_dataset.plan.global_batch) == (12, 6)
    with pytest.raises(InputError, match="group_by_length goes with the dump's own"):
        DistillationTrainer(model, arguments, train_dataset=Rows(), store=store, dump="train", group_by_length=12)
