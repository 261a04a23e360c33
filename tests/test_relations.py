"""Losses of relations between sequences: as they are defined, blind to scale, rotation and width; and a run that has one."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import story_rows, write_jsonl

from knowledge_store.errors import InputError
from student_train import TrainConfig, train
from student_train.losses.relations import relational_angle, relational_distance
from student_train.training.configuration import check_config
from teacher_dump import DumpConfig, dump

pytestmark = pytest.mark.usefixtures("one_thread")


def case(vectors: np.ndarray, states: np.ndarray) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    """Four sequences, the third without a vector, and a row of padding; each has two targets of three positions."""
    is_target = torch.tensor([[False, True, True]] * 4 + [[False] * 3])
    batch = {
        "sequence_id": torch.tensor([3, 5, 8, 9, -1]), "is_target": is_target, "vector": torch.from_numpy(vectors).float(),
    }  # fmt: skip
    return SimpleNamespace(hidden_states=(None, torch.from_numpy(states).float().requires_grad_())), batch


def random_case(seed: int = 0):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(5, 6))
    vectors[2] = vectors[4] = 0
    return vectors, random.normal(size=(5, 3, 4))


def huber(one: float, other: float) -> float:
    apart = abs(one - other)
    return apart**2 / 2 if apart < 1 else apart - 0.5


def test_distances_as_they_are_defined():
    vectors, states = random_case()
    found = relational_distance(*case(vectors, states))
    means, known = states[:, 1:].mean(axis=1), (0, 1, 3)
    pairs = list(permutations(known, 2))
    teacher, student = ({pair: np.linalg.norm(rows[pair[0]] - rows[pair[1]]) for pair in pairs} for rows in (vectors, means))
    scales = [np.mean(list(each.values())) for each in (teacher, student)]
    for row in range(5):
        losses = [huber(student[p] / scales[1], teacher[p] / scales[0]) for p in pairs if p[0] == row]
        assert found[row].item() == pytest.approx(np.mean(losses) if losses else 0, rel=1e-5)


def test_angles_as_they_are_defined():
    vectors, states = random_case(1)
    found = relational_angle(*case(vectors, states))
    means = states[:, 1:].mean(axis=1)

    def cosine(rows, at, one, other):
        first, second = rows[one] - rows[at], rows[other] - rows[at]
        return first @ second / np.linalg.norm(first) / np.linalg.norm(second)

    for row in range(5):
        triples = [each for each in permutations((0, 1, 3), 3) if each[0] == row]
        losses = [huber(cosine(means, *each), cosine(vectors, *each)) for each in triples]
        assert found[row].item() == pytest.approx(np.mean(losses) if losses else 0, abs=1e-6)


@pytest.mark.parametrize("loss", [relational_distance, relational_angle])
def test_nothing_is_left_of_the_same_relations(loss):
    """Scaled, turned and moved; and with a twin, whose distance of 0 has a gradient that is finite."""
    random = np.random.default_rng(2)
    vectors = random.normal(size=(5, 4))
    vectors[1] = vectors[0]
    turned, _ = np.linalg.qr(random.normal(size=(4, 4)))
    outputs, batch = case(vectors, np.repeat((3 * vectors @ turned + 1)[:, None], 3, axis=1))
    values = loss(outputs, batch)
    assert values.abs().max() < 1e-5
    outputs, batch = case(vectors, np.repeat((vectors[:, :3])[:, None], 3, axis=1))
    loss(outputs, batch).sum().backward()
    assert outputs.hidden_states[1].grad.isfinite().all() and outputs.hidden_states[1].grad.any()


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher_folder, loaded_teacher):
    folder = tmp_path_factory.mktemp("relations")
    config = DumpConfig(
        str(teacher_folder), (write_jsonl(folder / "rows.jsonl", story_rows(12)),), folder / "store", "vectors",
        kinds=("positions", "vectors"), max_length=48, batch_size=4,
    )  # fmt: skip
    dump(config, teacher=loaded_teacher)
    dump(replace(config, name="last", vectors_pooling="last"), teacher=loaded_teacher)
    dump(replace(config, name="plain", kinds=("positions",)), teacher=loaded_teacher)
    return folder / "store"


@pytest.mark.parametrize("loss", ["relational-distance", "relational-angle"])
def test_a_run(settings, store, loss):
    """Mixed with the text, as they are meant to be."""
    run = train(TrainConfig(**{**settings, "store": str(store), "dump": "vectors", "loss": loss, "ce_weight": 0.5}))
    assert run.finished and run.step == 6


@pytest.mark.parametrize(
    ("name", "words"), [("last", "compares means over the targets"), ("plain", "needs the kind 'vectors', and the dump plain")]
)
def test_dumps_that_cannot_serve(settings, store, name, words):
    with pytest.raises(InputError, match=words):
        train(TrainConfig(**{**settings, "store": str(store), "dump": name, "loss": "relational-distance"}))


def test_a_part_of_the_targets_cannot_serve():
    """The teacher's vectors are the means over all of them."""
    config = TrainConfig("store", "student", "output", loss="relational-angle", positions_where="teacher_entropy > 1")
    with pytest.raises(InputError, match="does not go with --positions-where"):
        check_config(config)
