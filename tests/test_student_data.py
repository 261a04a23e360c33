"""Batches as tensors: nothing lost, nothing repeated, for any workers, ranks and interruptions; splits; vocabularies."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from conftest import make_tokenizer, write_jsonl
from processes import Notes
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from student_train.losses.table import LOSSES
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.dump_facts import describe_dump
from student_train.training.knowledge import columns_read
from student_train.training.split import split_ordinals
from student_train.training.vocabulary import check_student
from teacher_dump import DumpConfig, dump


@pytest.fixture
def store(store_folder):
    return KnowledgeStore.open(store_folder)


def ids_of(batches) -> list[tuple[int, ...]]:
    return [tuple(batch["sequence_id"].tolist()) for batch in batches]


def test_tensors_and_labels(store):
    batch = next(iter(DistillationDataset(store, "train", batch_size=4)))
    rows, length = batch["input_ids"].shape
    assert batch["candidate_ids"].shape == (rows, length, positions_of(store.manifest("train")).selection.candidates)
    assert batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"] != -100, batch["is_target"])
    assert torch.equal(batch["labels"][batch["is_target"]], batch["input_ids"][batch["is_target"]])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(store, workers):
    alone = ids_of(DistillationDataset(store, "train", batch_size=4))
    dataset = DistillationDataset(store, "train", batch_size=4)
    assert ids_of(DataLoader(dataset, batch_size=None, num_workers=workers)) == alone
    seen = [item for batch in alone for item in batch if item >= 0]
    assert sorted(seen) == sorted(store.sequences("train")["sequence_id"].to_pylist())


def test_endless_with_workers_resumes_anywhere(store):
    def take(dataset, count, workers):
        loader = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
        return ids_of(next(loader) for _ in range(count))

    endless = DistillationDataset(store, "train", batch_size=4, seed=5, endless=True)
    per_epoch = endless.batches_per_epoch
    whole = take(endless, 2 * per_epoch + 3, 0)
    assert take(endless, 2 * per_epoch + 3, 2) == whole
    for taken in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        again = DistillationDataset(store, "train", batch_size=4, endless=True, **endless.state_after(taken))
        assert take(again, 3, 2) == whole[taken : taken + 3]
        assert again.state_after(3) == endless.state_after(taken + 3)
    with pytest.raises(TypeError, match="no length"):
        len(endless)


def test_ranks_share_an_epoch(store):
    ranks = [DistillationDataset(store, "train", batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    first, second = (list(rank) for rank in ranks)
    assert len(first) == len(second) == len(ranks[0]) == len(ranks[1])
    together = [a + b for a, b in zip(ids_of(first), ids_of(second), strict=True)]
    one = DistillationDataset(store, "train", batch_size=6)
    assert [tuple(item for item in row if item >= 0) for row in together] == [
        tuple(item for item in row if item >= 0) for row in ids_of(one)
    ]


def test_padding_rows_attend_to_something_and_count_for_nothing(store):
    *_, last = DistillationDataset(store, "train", batch_size=len(store.sequences("train")) + 2)
    padding = last["sequence_id"] < 0
    assert padding.sum() == 2
    assert last["attention_mask"][padding].sum(-1).tolist() == [1, 1]
    assert not last["is_target"][padding].any()


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_several_dumps_epoch_after_epoch(store, order):
    weights = {"train": 1, "heldout": 3}
    dataset = DistillationDataset(store, weights, batch_size=5, seed=2, order=order, endless=True)
    assert dataset.dumps == ("train", "heldout") and dataset.sequences == sum(map(store.sequence_count, weights))
    found = list(itertools.islice(dataset, dataset.batches_per_epoch + 2))
    expected = list(store.batches(weights, batch_size=5, seed=2, order=order))
    expected += itertools.islice(store.batches(weights, batch_size=5, seed=2, epoch=1, order=order), 2)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one["dump"], other["dump"]) and np.array_equal(one["input_ids"], other["input_ids"])
    state = dataset.state_after(dataset.batches_per_epoch + 2)
    assert state == {"seed": 2, "epoch": 1, "consumed": 10, "snapshot": {dump: store.snapshot(dump) for dump in weights}}


def test_a_started_worker_opens_the_store_again(store):
    dataset = DistillationDataset(store, "train", batch_size=4)
    assert ids_of(pickle.loads(pickle.dumps(dataset))) == ids_of(dataset)


def test_split_is_by_document(store):
    train, held_out = split_ordinals(store, "train", eval_fraction=0.2)
    sequences = store.sequences("train")
    assert sorted([*train, *held_out]) == list(range(len(sequences)))
    rows = np.array(sequences["row"].to_pylist())
    assert not set(rows[train]) & set(rows[held_out])
    assert len(set(rows[held_out])) == round(0.2 * len(set(rows)))
    assert len(set(rows)) < len(rows)  # some documents have several windows, or this proves little
    again = split_ordinals(store, "train", eval_fraction=0.2)
    assert np.array_equal(again[0], train) and np.array_equal(again[1], held_out)
    everything, nothing = split_ordinals(store, "train", eval_fraction=0)
    assert len(everything) == len(sequences) and not len(nothing)
    assert len(split_ordinals(store, "train", eval_fraction=1e-6)[1]) >= 1


@pytest.mark.parametrize(("fraction", "message"), [(1.0, "below 1"), (-0.1, "at least 0"), (0.999, "leaves none")])
def test_split_refuses(store, fraction, message):
    with pytest.raises(InputError, match=message):
        split_ordinals(store, "heldout", eval_fraction=fraction)


@pytest.fixture
def config(teacher_folder):
    return AutoConfig.from_pretrained(teacher_folder)


def test_the_teachers_vocabulary_fits(store, config, teacher_folder):
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    check_student(store, "train", config, tokenizer)
    config.vocab_size = len(tokenizer)  # fewer unused rows than the teacher
    check_student(store, "train", config, tokenizer)
    config.vocab_size = len(tokenizer) + 64  # more of them
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    check_student(store, "train", config, tokenizer)


def test_another_vocabulary_is_refused_by_name(store, config, teacher_folder):
    other = make_tokenizer(extra_words=("zebra",))  # shifts every token behind it
    with pytest.raises(InputError, match=r"token id 4 is '.*' in the dump and 'zebra' in the student; .*more"):
        check_student(store, "train", config, other)
    longer = AutoTokenizer.from_pretrained(teacher_folder)
    size = len(longer)
    longer.add_tokens(["zebra"])  # unlike a special token, it changes how text is cut
    with pytest.raises(InputError, match=f"token id {size} is absent in the dump and 'zebra' in the student"):
        check_student(store, "train", config, longer)
    small = copy.deepcopy(config)
    small.vocab_size = size - 3
    with pytest.raises(InputError, match=f"embeddings for {size - 3} tokens"):
        check_student(store, "train", small, AutoTokenizer.from_pretrained(teacher_folder))


def renamed(tokenizer, old: str, new: str, special: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with another name for one of its special tokens."""
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = record["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    entry = next(entry for entry in record["added_tokens"] if entry["content"] == old)
    entry |= {"content": new, "special": special}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)))


def test_a_renamed_token_that_no_sequence_holds_is_told_and_any_other_is_refused(store, config):
    own = make_tokenizer()
    reporter = Notes()
    check_student(store, "train", config, renamed(own, "<|system|>", "<|new|>"), reporter=reporter)
    assert reporter.notes == [
        "Tokens that no sequence of train holds have other names in the student: token id 3 is '<|system|>' in the dump and"
        " '<|new|>' in the student"
    ]
    for message, other in (
        ("token id 0 is '<.end.>' in the dump and '<.new.>' in the student", renamed(own, "<|end|>", "<|new|>")),  # it is held
        ("token id 3 is '<.system.>' in the dump and 'new'", renamed(own, "<|system|>", "new", special=False)),
        ("token id 2 is '<.assistant.>' in the dump and '<.system.>' in the student; token id 3", swapped(own)),
    ):
        with pytest.raises(InputError, match=message):
            check_student(store, "train", config, other)


def swapped(tokenizer) -> PreTrainedTokenizerFast:
    """With the names of two special tokens changed over."""
    text = tokenizer.backend_tokenizer.to_str()
    for old, new in (("<|assistant|>", "<|a|>"), ("<|system|>", "<|assistant|>"), ("<|a|>", "<|system|>")):
        text = text.replace(old, new)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))


def test_tokens_behind_the_students_vocabulary_may_be_missing_where_no_sequence_holds_them(tmp_path, config, loaded_teacher):
    """As Qwen 2.5 has them missing that Qwen 3 has."""
    teacher = replace(loaded_teacher, tokenizer=make_tokenizer())
    teacher.tokenizer.add_tokens(["<think>", "</think>"])
    for name, text in (("plain", "The lamp burns."), ("thinking", "<think>The lamp</think> burns.")):
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text}])
        dump(DumpConfig("tiny", (corpus,), tmp_path / "store", name, max_length=40), teacher=teacher)
    store = KnowledgeStore.open(tmp_path / "store")
    reporter = Notes()
    check_student(store, "plain", config, make_tokenizer(), reporter=reporter)
    assert "is '<think>' in the dump and absent in the student; token id" in reporter.notes[0]
    with pytest.raises(InputError, match="is '<think>' in the dump and absent in the student"):
        check_student(store, "thinking", config, make_tokenizer())


# As they stand on disk: candidates are told by their gaps and the tail.
CANDIDATES = {"candidate_ids", "gap_steps", "tail_steps"}
DRAWS = {"tail_ids"}


@pytest.mark.parametrize(
    ("options", "read", "stored"),
    [
        ({"loss": "ce"}, set(), set()),
        ({"loss": "first"}, {"candidate_ids", "candidate_logprobs"}, CANDIDATES),
        ({}, {"candidate_ids", "candidate_logprobs", "tail_logprob", "tail_ids"}, {*CANDIDATES, *DRAWS}),
        ({"tail": "bucket"}, {"candidate_ids", "candidate_logprobs", "tail_logprob"}, CANDIDATES),
        ({"temperature": 2.0}, {"candidate_ids", "candidate_logprobs", "tail_logprob"}, CANDIDATES),
        ({"calibration": "c.json"}, {"candidate_ids", "candidate_logprobs", "tail_logprob"}, CANDIDATES),
    ],
)
def test_the_bytes_of_what_a_loss_reads(store, options, read, stored):
    config = TrainConfig("store", "student", "output", **options)
    columns = columns_read(store.manifest("train"), config, LOSSES[config.loss])
    assert columns == {"positions": {"token_id", "is_target", *read}}
    facts = describe_dump(store, "train", columns)
    columns = next(summary for summary in store.info() if summary.dump == "train").column_bytes
    left_out = sum(columns[f"positions.{name}"] for name in {*CANDIDATES, *DRAWS, "token_steps", "tail_entropy"} - stored)
    assert facts["bytes_read"] == facts["bytes"] - left_out and left_out > 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_persistent_workers_read_the_epoch_that_is_set(store):
    dataset = DistillationDataset(store, "train", batch_size=4)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True, prefetch_factor=4)
    epochs = []
    for epoch in (0, 1, 1, 5):
        dataset.set_epoch(epoch)
        if epoch == 5:
            next(iter(loader))  # one that is given up in the middle
        epochs.append(ids_of(loader))
    expected = [ids_of(DistillationDataset(store, "train", batch_size=4, epoch=epoch)) for epoch in (0, 1, 1, 5)]
    assert epochs == expected and expected[0] != expected[1] != expected[3]


def test_an_epoch_that_is_set_is_whole_but_for_the_one_that_the_plan_begins_with(store):
    whole = DistillationDataset(store, "train", batch_size=4, seed=2)
    begun = DistillationDataset(store, "train", batch_size=4, **whole.state_after(whole.batches_per_epoch + 2))
    whole.set_epoch(1)
    assert ids_of(begun) == ids_of(whole)[2:]
    begun.set_epoch(2), whole.set_epoch(2)
    assert ids_of(begun) == ids_of(whole) and len(begun) == len(whole) == whole.batches_per_epoch
    assert begun.state_after(1)["epoch"] == 2
    with pytest.raises(InputError, match=r"begins with epoch 1, so there is no epoch 0 to read"):
        begun.set_epoch(0)
    begun.set_epoch(3), begun.pass_over(3, 2), whole.set_epoch(3)
    passed = list(begun)
    assert passed[:2] == [{}, {}] and ids_of(passed[2:]) == ids_of(whole)[2:]


def test_ranks_are_found_where_nobody_gives_them(store, monkeypatch):
    dataset = DistillationDataset(store, "train", batch_size=3)
    alone = len(dataset)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = DistillationDataset(store, "train", batch_size=3, rank=1, world_size=2)
    assert len(dataset) == len(second) < alone
    assert ids_of(dataset) == ids_of(second)
    sent = pickle.loads(pickle.dumps(dataset))  # to a worker that a loader starts
    monkeypatch.delenv("RANK")
    assert ids_of(sent) == ids_of(second) and len(dataset) == alone
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="RANK=2 and WORLD_SIZE=2"):
        len(dataset)
    with pytest.raises(InputError, match="both rank and world_size"):
        DistillationDataset(store, "train", rank=1)


def test_a_loader_that_would_divide_or_collate_again_is_refused(store):
    dataset = DistillationDataset(store, "train", batch_size=4, rank=0, world_size=2)
    with pytest.raises(InputError, match="give its DataLoader batch_size=None"):
        next(iter(DataLoader(dataset, batch_size=4)))
    with pytest.raises(InputError, match="give its DataLoader batch_size=None"):
        next(iter(DataLoader(dataset, batch_size=4, num_workers=1)))
    for divided in (
        prepare_data_loader(DataLoader(dataset, batch_size=1), num_processes=2, process_index=0, dispatch_batches=False),
        IterableDatasetShard(dataset, num_processes=2),
    ):
        with pytest.raises(InputError, match="leave its DataLoader out of"):
            next(iter(divided))
    dispatcher = prepare_data_loader(DataLoader(dataset, batch_size=None), put_on_device=True, device=torch.device("cpu"))
    assert ids_of(dispatcher) == ids_of(dataset)  # of one process, which accelerate gives everything
    dispatcher.state = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    with pytest.raises(InputError, match="leave its DataLoader out of"):
        next(iter(dispatcher))
