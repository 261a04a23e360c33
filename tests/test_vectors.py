"""Vectors: pooled as they say, in 8 bits, alike in any batch, found again by SQL; dumps, checks, and what is refused."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VECTORS_DUMPS, save_teacher
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import Command, Moment
from stores import contents
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore, verify
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.kinds.quantisation import GROUP, from_steps, in_steps
from teacher_dump import CheckConfig, DumpConfig, check, dump, estimate, repair
from teacher_dump.checking.agreement import AGREES, DAMAGE, OTHER_TEACHER
from teacher_dump.cli import app
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.extraction.states import extract_vectors
from teacher_dump.teachers import local
from teacher_dump.teachers.local import load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = 15  # of them

TYPICAL = """
SELECT sequence_id, list_cosine_similarity(vector, centre) AS similarity FROM vectors JOIN (
    SELECT dump, list(value ORDER BY place)::FLOAT[] AS centre FROM (
        SELECT dump, place, avg(value) AS value
        FROM (SELECT dump, generate_subscripts(vector, 1) AS place, unnest(vector) AS value FROM vectors) GROUP BY ALL)
    GROUP BY dump) USING (dump)
"""


# --- numbers in 8 bits --------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 150)), elements=st.floats(-(2.0**99), 2.0**99, width=32))
)
def test_each_value_lies_within_half_a_step(values):
    steps, scales = in_steps(values)
    assert steps.dtype == np.int8 and scales.shape == (len(values), -(-values.shape[1] // GROUP))
    kept = from_steps(steps, scales).astype(np.float64)
    half = np.repeat(scales.astype(np.float64), GROUP, axis=1)[:, : values.shape[1]] / 2
    assert (np.abs(kept - values) <= half * (1 + 1e-5) + 1e-36).all()


def test_scales_of_another_number_of_groups():
    with pytest.raises(ValueError, match="70 values have 1 scales"):
        from_steps(np.zeros((2, 70), np.int8), np.zeros((2, 1), np.float32))


# --- dumps --------------------------------------------------------------------------------------------------------------


def test_all_is_verified(states_store):
    assert verify(states_store).damage == []


@pytest.mark.parametrize("name", VECTORS_DUMPS)
def test_vectors_are_of_the_states_that_transformers_gives(states_store, loaded_teacher, name):
    """Each sequence asked by itself, without padding; within half a step of what is kept."""
    opened = KnowledgeStore.open(states_store)
    kept = opened.manifest(name).kinds["vectors"]
    for ordinal in range(SEQUENCES):
        both = opened["states", ordinal]
        tokens = torch.from_numpy(both["input_ids"])[None]
        with torch.inference_mode():
            states = loaded_teacher.model(tokens, output_hidden_states=True).hidden_states[kept["layer"]][0]
        places = both["is_target"] if kept["over"] == "targets" else np.arange(len(both["input_ids"])) > 0
        chosen = states[torch.from_numpy(places)]
        expected = (chosen[-1] if kept["pooling"] == "last" else chosen.mean(dim=0)).numpy()
        vector = opened[name, ordinal]["vector"]
        assert vector.shape == (32,) and vector.dtype == np.float32
        assert np.abs(vector - expected).max() <= np.abs(expected).max() / 254 * 1.001 + 1e-5


def test_beside_positions_they_change_nothing(tmp_path, states_store, states_options, loaded_teacher):
    dump(DumpConfig(store=tmp_path / "store", name="states", **states_options), teacher=loaded_teacher)
    for file in sorted((tmp_path / "store/states/positions").iterdir()):
        assert file.read_bytes() == (states_store / "states/positions" / file.name).read_bytes()


def test_questions_of_the_readme(states_store):
    """Near-duplicates, and the most typical and most unusual rows."""
    opened = KnowledgeStore.open(states_store)
    [twins] = opened.sql(
        "SELECT one.sequence_id AS one, other.sequence_id AS other FROM vectors AS one JOIN vectors AS other"
        " ON one.dump = other.dump AND one.sequence_id < other.sequence_id"
        " WHERE one.dump = 'states' AND list_cosine_similarity(one.vector, other.vector) > 0.9999"
    ).to_pylist()
    assert (twins["one"] >> 16, twins["other"] >> 16) == (6, 7)
    rows = opened.sql(f"{TYPICAL} WHERE dump = 'mean' ORDER BY similarity").to_pylist()
    vectors = np.stack([opened["mean", ordinal]["vector"] for ordinal in range(SEQUENCES)])
    centre = vectors.mean(axis=0)
    expected = np.sort(vectors @ centre / np.linalg.norm(vectors, axis=1) / np.linalg.norm(centre))
    assert np.allclose([row["similarity"] for row in rows], expected, atol=1e-5)
    [facts] = opened.sql("SELECT * FROM dumps WHERE dump = 'mean'").to_pylist()
    assert (facts["vectors.layer"], facts["vectors.over"], facts["vectors.vectors"]) == (1, "all", SEQUENCES)
    lines = next(dict(facts.lines) for facts in opened.info() if facts.dump == "states")
    assert lines["vectors"] == "15, the mean of the states of the targets in the last layer, 32 values each"


def one_shard(store: Path) -> bool:
    return len(list(store.glob("states/commits/*.json"))) == 1


def test_a_dump_that_was_killed_resumes(tmp_path, states_options, states_store, loaded_teacher):
    """kill -9 in the middle; the same command makes what one run makes. Then what is damaged is repaired."""
    words = [
        "run", tmp_path / "store", "--teacher", states_options["teacher"], "--corpus", states_options["corpus"][0],
        "--name", "states", "--kind", "positions", "--kind", "vectors", "--kind", "hidden",
        "--max-length", 48, "--batch-size", 4, "--shard-size", 4,
    ]  # fmt: skip
    moment = Moment(tmp_path / "store", one_shard)
    assert Command(*words, folder=tmp_path / "log", at=moment).wait().returncode == -signal.SIGKILL
    config = DumpConfig(store=tmp_path / "store", name="states", **states_options, **VECTORS_DUMPS["states"])
    assert dump(config, teacher=loaded_teacher).shards_existing == 1
    made, whole = contents(tmp_path / "store"), contents(states_store)
    assert all(whole[name] == made[name] for name in made)
    path = tmp_path / "store/states/vectors/00001.parquet"
    path.write_bytes(b"damaged")
    assert repair(config, teacher=loaded_teacher).shards == 1
    assert path.read_bytes() == (states_store / "states/vectors/00001.parquet").read_bytes()
    with pytest.raises(MismatchError, match="--vectors-layer was -1 and is now 1"):
        dump(replace(config, vectors_layer=1), teacher=loaded_teacher)


def test_estimate(tmp_path, states_options, loaded_teacher, states_store):
    predicted = estimate(DumpConfig(store=tmp_path / "none", **states_options, **VECTORS_DUMPS["mean"]), teacher=loaded_teacher)
    [real] = [facts for facts in KnowledgeStore.open(states_store).info() if facts.dump == "mean"]
    kept = sum(size for name, size in real.column_bytes.items() if name.startswith("vectors."))
    assert predicted.bytes == pytest.approx(kept, rel=0.5)


def test_a_layer_outside_the_teacher(tmp_path, states_options, monkeypatch):
    """Refused before the teacher is loaded."""
    monkeypatch.setattr(local, "load_teacher", None)
    config = DumpConfig(store=tmp_path / "store", kinds=("vectors",), vectors_layer=3, **states_options)
    complaint = r"--vectors-layer 3 is outside the teacher, which has 2 layers: use 0 .* to 2 .*, or -1"
    with pytest.raises(InputError, match=complaint):
        dump(config)
    command = [
        "run", str(tmp_path / "store"), "--teacher", states_options["teacher"], "--corpus", str(states_options["corpus"][0]),
        "--kind", "vectors", "--vectors-layer", "-4", "--max-length", "48",
    ]  # fmt: skip
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 2 and "--vectors-layer -4 is outside" in answer.stderr


def test_a_model_that_gives_no_hidden_states(tmp_path, states_options, teacher_folder):
    teacher = load_teacher(str(teacher_folder), device="cpu")
    forward = teacher.model.model.forward
    teacher.model.model.forward = lambda output_hidden_states=None, **more: forward(**more)
    config = DumpConfig(store=tmp_path / "store", name="d", kinds=("vectors",), vectors_layer=1, **states_options)
    with pytest.raises(InputError, match=r"tiny does not give the hidden states of layer 1 \(it gives none\)"):
        dump(config, teacher=teacher)
    assert not list(tmp_path.glob("store/d/commits/*"))


# --- check --------------------------------------------------------------------------------------------------------------


def test_the_same_teacher_agrees_and_another_does_not(tmp_path, states_store, loaded_teacher, teacher_folder):
    found = check(CheckConfig(states_store, "loaded", dump="states"), loaded_teacher)
    assert found.keys() == {"positions", "vectors", "hidden"} and all(found[kind].verdict == AGREES for kind in found)
    assert (
        max(*found["vectors"].distances, *found["hidden"].distances) < 1e-2 and found["vectors"].lines[-2] == "Verdict: agrees"
    )
    short = load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu")
    assert check(CheckConfig(states_store, "loaded", dump="states"), short)["vectors"].verdict == AGREES
    other = load_teacher(str(save_teacher(tmp_path / "other", seed=5)), device="cpu")
    found = check(CheckConfig(states_store, "loaded", dump="states"), other)["vectors"]
    assert found.verdict == OTHER_TEACHER and "in the median sequence" in found.reasons[0]


def test_a_dump_that_was_wrong_when_it_was_made(tmp_path, states_options, loaded_teacher, monkeypatch):
    """What no hash can find: two sequences have the opposite of their vectors."""

    def spoiled(batch):
        arrays = extract_vectors(batch)
        for sequence, own in zip(batch.sequences, arrays, strict=True):
            if sequence.document.number in (6, 7):
                own["vector"] = -own["vector"]
        return arrays

    monkeypatch.setitem(EXTRACTORS, "vectors", replace(EXTRACTORS["vectors"], function=spoiled))
    config = DumpConfig(store=tmp_path / "store", name="d", **states_options, **VECTORS_DUMPS["states"])
    dump(config, teacher=loaded_teacher)
    monkeypatch.undo()
    found = check(CheckConfig(tmp_path / "store", "loaded", dump="d"), loaded_teacher)["vectors"]
    assert found.verdict == DAMAGE and 0 < found.sequences_off < SEQUENCES / 2
