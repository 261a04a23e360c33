"""Runs over what was chosen by SQL: that and nothing else is trained on, told and kept, and mistakes are one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from processes import Notes, run_ranks
from ranks import choose_first
from test_student_cli import without
from test_student_training import assert_close, command, weights
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.cli import app
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.run import train
from student_train.training.split import split_ordinals

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = "SELECT dump, sequence_id FROM sequences WHERE dump = 'train' AND length > 30"
UNSURE = "token_logprob < -5"


def read(output, name: str = "run.json") -> dict:
    return json.loads((output / name).read_text())


def test_a_run_over_chosen_sequences_is_told_and_recorded(settings, tmp_path):
    store = KnowledgeStore.open(settings["store"])
    lengths = store.sequences("train")["length"].to_numpy()
    ordinals = np.asarray(split_ordinals(store, "train", eval_fraction=0.2)[0])
    chosen = ordinals[lengths[ordinals] > 30]
    notes = Notes()
    settings |= {"eval_fraction": 0.2, "steps": None, "epochs": 1, "where": LONG}
    train(TrainConfig(**settings), reporter=notes)
    assert f"--where chooses {len(chosen)} of {len(ordinals)} sequences to train on." in notes.notes
    run = read(tmp_path / "run")
    assert run["choice"] == {"where": {"sequences": len(chosen), "of": len(ordinals)}}
    assert run["sequences"]["train"] == len(chosen) and run["config"]["where"] == LONG
    assert run["identity"]["chosen sequences"] == store.choose_sequences(LONG, "train").sha256
    history = read(tmp_path / "run", "history.json")
    assert history["tokens"] == lengths[chosen].sum() and history["step"] == -(-len(chosen) // 4)


def test_batches_have_the_chosen_targets_and_no_others(store_folder):
    store = KnowledgeStore.open(store_folder)
    found = store.choose_targets(UNSURE, "train")
    mask = found.masks["train"]
    ids = store.sequences("train")["sequence_id"].to_pylist()
    met = 0
    for batch in DistillationDataset(store, "train", batch_size=3, targets=found.masks):
        for row, sequence in enumerate(batch["sequence_id"].tolist()):
            length = int(batch["attention_mask"][row].sum())
            expected = mask.positions(ids.index(sequence)) if sequence >= 0 else np.zeros(length, bool)
            assert batch["is_target"][row, :length].tolist() == expected.tolist()
            assert ((batch["labels"][row] != -100) == batch["is_target"][row]).all()
        assert (batch["token_logprob"][batch["is_target"]] < -5).all()
        met += int(batch["is_target"].sum())
    assert met == mask.counts().sum() > 0
    with pytest.raises(InputError, match="those of another dump"):
        next(iter(store.batches("heldout", targets={"heldout": mask})))


def test_only_chosen_targets_are_trained_on(settings, tmp_path):
    """All of them is the same run as without a choice, bit by bit; validation is the same whatever is chosen."""
    settings |= {"eval_fraction": 0.2, "evaluations": 1}
    results = {}
    for name, condition in {"none": None, "all": "token_id >= 0", "unsure": UNSURE}.items():
        notes = Notes()
        output = tmp_path / name
        train(TrainConfig(**settings | {"output": str(output), "positions_where": condition}), reporter=notes)
        entries = read(output, "history.json")["entries"]
        results[name] = weights(output), next(entry["eval_loss"] for entry in entries if "eval_loss" in entry)
    assert_close(results["none"][0], results["all"][0], 0)
    with pytest.raises(AssertionError):
        assert_close(results["none"][0], results["unsure"][0])
    assert results["none"][1] == results["all"][1] == results["unsure"][1]

    store = KnowledgeStore.open(settings["store"])
    found = store.choose_targets(UNSURE, "train")
    ordinals = np.asarray(split_ordinals(store, "train", eval_fraction=0.2)[0])
    counts, total = found.masks["train"].counts()[ordinals], found.targets["train"][ordinals].sum()
    left_out = int((counts == 0).sum())
    facts = {"targets": int(counts.sum()), "of": int(total), "sequences_left_out": left_out}
    assert read(tmp_path / "unsure")["choice"] == {"positions_where": facts}
    assert f"--positions-where chooses {counts.sum():,} of {total:,} targets, {counts.sum() / total:.1%}." in notes.notes
    assert (
        not left_out or f"{left_out} of {len(ordinals)} sequences have no target that counts, and are left out." in notes.notes
    )


def test_sequences_without_a_chosen_target_are_left_out(settings, tmp_path):
    store = KnowledgeStore.open(settings["store"])
    first, second = store.sequences("train")["sequence_id"].to_pylist()[:2]
    condition = f"sequence_id IN ({first}, {second}) AND position < 3"
    notes = Notes()
    train(TrainConfig(**settings | {"steps": 1, "positions_where": condition}), reporter=notes)
    assert read(tmp_path / "run")["sequences"]["train"] == 2
    assert any("have no target that counts, and are left out." in sentence for sentence in notes.notes)


def test_a_run_resumes_with_what_it_chose_and_no_other(settings, tmp_path):
    settings |= {"where": LONG, "positions_where": UNSURE}
    train(TrainConfig(**settings))
    assert train(TrainConfig(**settings)).began_at == settings["steps"]
    for changed, says in (
        ({"where": None}, "--where was SELECT dump.* and is now None"),
        ({"positions_where": "token_logprob < -4"}, "--positions-where was token_logprob < -5 and is now token_logprob < -4"),
    ):
        with pytest.raises(InputError, match=says):
            train(TrainConfig(**settings | changed))
    # The same words, and another answer.
    run = read(tmp_path / "run")
    run["identity"]["chosen sequences"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="chosen sequences was 000"):
        train(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--where", "SELECT dump, sequence_id FROM sequences WHERE lenght > 3", 'Candidate bindings: "length"'),
        ("--positions-where", "tail_logprb > 1", 'Candidate bindings: "tail_logprob"'),
    ],
)
def test_mistakes_are_found_before_torch_is_imported(option, value, says, store_folder, teacher_folder, tmp_path):
    output = tmp_path / "run"
    words = ["run", store_folder, "--student", teacher_folder, "--output", output, "--dump", "train", option, value]
    done = without("torch", *words)
    assert done.returncode == 2 and not output.exists(), done.stderr
    assert done.stderr.startswith(f"Error: {option}: ") and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"where": "SELECT dump, sequence_id FROM sequences WHERE dump = 'train' AND false"}, "--where: the query gives no"),
        ({"where": "SELECT dump, sequence_id FROM sequences"}, "--where: the query gives sequences of the dump 'heldout'"),
        ({"positions_where": "token_id < 0"}, "--positions-where: no target of train meets"),
        ({"where": LONG, "positions_where": "sequence_id = 0 AND position > 99"}, "--positions-where: no target"),
    ],
)
def test_a_choice_of_nothing_is_refused_and_nothing_is_written(settings, tmp_path, options, says):
    done = CliRunner().invoke(app, ["run", *command(settings | options)])
    assert done.exit_code == 2 and f"Error: {says}" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_choice_of_nothing_but_held_out_sequences_is_refused(settings):
    store = KnowledgeStore.open(settings["store"])
    _, held_out = split_ordinals(store, "train", eval_fraction=0.2)
    held_out_id = store.sequences("train")["sequence_id"][int(held_out[0])].as_py()
    settings |= {"eval_fraction": 0.2}
    with pytest.raises(InputError, match="--where: all of the 1 sequences that it gives are held out"):
        train(TrainConfig(**settings | {"where": f"SELECT 'train' AS dump, {held_out_id} AS sequence_id"}))
    with pytest.raises(InputError, match=r"--positions-where: none of the .* targets to train on meets it"):
        train(TrainConfig(**settings | {"positions_where": f"sequence_id = {held_out_id}"}))


def test_the_first_of_two_processes_chooses_for_both(settings, tmp_path):
    """The other one asks nothing, and both train on the same; what is refused, both refuse."""
    settings |= {"where": LONG, "positions_where": UNSURE}
    pair = command(settings | {"batch_size": 2, "output": tmp_path / "pair"})
    assert [rank.returncode for rank in run_ranks(2, choose_first, pair, folder=tmp_path / "said")] == [0, 0]
    train(TrainConfig(**settings))
    assert_close(weights(tmp_path / "pair"), weights(tmp_path / "run"))
    refused = command(settings | {"output": tmp_path / "refused", "positions_where": "position > 99"})
    ranks = run_ranks(2, choose_first, refused, folder=tmp_path / "said")
    for rank in ranks:
        assert rank.returncode == 2 and "\nError: --positions-where: no target of train meets" in f"\n{rank.stderr}", rank
    assert not (tmp_path / "refused").exists()


def test_a_choice_over_several_dumps(settings, tmp_path):
    """A dump of which nothing was chosen has no part in an epoch; one with a weight is refused."""
    settings |= {"dump": ("train", "heldout"), "eval_fraction": 0.2, "steps": 2}
    notes = Notes()
    train(TrainConfig(**settings | {"where": LONG, "positions_where": UNSURE}), reporter=notes)
    run = read(tmp_path / "run")
    [chosen, none] = run["dumps"]
    assert chosen["read"]["sequences"] == run["sequences"]["train"] > 0 == none["read"]["sequences"]
    assert run["choice"]["where"]["of"] > run["choice"]["where"]["sequences"] >= run["sequences"]["train"]
    with pytest.raises(InputError, match=r"heldout.*leave it out"):
        weighted = {"dump": ("train=1", "heldout=1"), "where": LONG, "output": str(tmp_path / "other")}
        train(TrainConfig(**settings | weighted))
    assert not (tmp_path / "other").exists()
