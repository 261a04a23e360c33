"""Hidden states: those of transformers, where they are asked for, within their bounds; dumps, sizes, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HIDDEN_DUMPS, run_command

from knowledge_store import KnowledgeStore, verify
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.kinds.hidden import HiddenParameters
from teacher_dump import DumpConfig, dump, estimate, repair
from teacher_dump.extraction.hidden import HiddenOptions
from teacher_dump.teachers import local

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", HIDDEN_DUMPS)
def test_states_are_those_that_transformers_gives(states_store, loaded_teacher, name):
    """At the positions that were asked for, each sequence by itself; in 8 bits within half a step of each group's."""
    assert verify(states_store).damage == []
    opened = KnowledgeStore.open(states_store)
    kept = HiddenParameters.from_record(opened.manifest(name).kinds["hidden"])
    for ordinal in range(opened.sequence_count(name)):
        both, own = opened["states", ordinal], opened[name, ordinal]
        document, window = divmod(int(own["sequence_id"]), 2**16)
        places = np.arange(len(both["input_ids"])) if kept.where == "all" else np.flatnonzero(both["is_target"]) - 1
        places = places[(document + window) % kept.every :: kept.every]
        assert np.flatnonzero(own["has_hidden"]).tolist() == places.tolist()
        with torch.inference_mode():
            answer = loaded_teacher.model(torch.from_numpy(both["input_ids"])[None], output_hidden_states=True)
        for index, layer in enumerate(kept.layers):
            expected = answer.hidden_states[layer][0, torch.from_numpy(places)].numpy()
            found = own["hidden"][places, 32 * index : 32 * (index + 1)]
            bound = 2.0**-11 if kept.precision == "float16" else 1 / 254
            assert (np.abs(found - expected) <= np.abs(expected).max(axis=1, keepdims=True) * bound * 1.01 + 1e-5).all()
        assert (own["hidden"][~own["has_hidden"]] == 0).all()


def test_targets_are_predicted_from_the_states_before_them(states_store, loaded_teacher):
    """The head makes of the state at t − 1 what `positions` keeps of token t."""
    opened = KnowledgeStore.open(states_store)
    one = opened["states", 0]
    before = np.flatnonzero(one["is_target"]) - 1
    with torch.inference_mode():
        logits = loaded_teacher.model.lm_head(torch.from_numpy(one["hidden"][before])).log_softmax(dim=1)
    kept = torch.from_numpy(one["token_logprob"][before + 1])
    tokens = torch.from_numpy(one["input_ids"][before + 1])
    assert (logits.gather(1, tokens[:, None])[:, 0] - kept).abs().max() < 0.3


def test_sql_and_what_info_tells(states_store):
    opened = KnowledgeStore.open(states_store)
    for name, width in (("states", 32), ("layers", 64), ("exact", 64)):
        rows = opened.sql(
            f"SELECT sequence_id, \"position\", hidden FROM hidden WHERE dump = '{name}' AND hidden IS NOT NULL ORDER BY ALL"
        )
        states = np.array(rows["hidden"].to_pylist(), np.float32)
        arrays = [opened[name, ordinal] for ordinal in range(opened.sequence_count(name))]
        assert states.shape[1] == width and np.array_equal(
            states, np.concatenate([a["hidden"][a["has_hidden"]] for a in arrays])
        )
    [lines] = [dict(facts.lines) for facts in opened.info() if facts.dump == "layers"]
    assert lines["hidden states"].endswith(", everywhere, one of 3 of these positions; 64 values each, int8")
    [schema] = {tuple(pq.read_schema(file).names) for file in states_store.glob("states/hidden/*.parquet")}
    assert schema == ("sequence_id", "position", "steps", "scales")


def test_a_dump_resumes_and_is_repaired(tmp_path, states_options, states_store, loaded_teacher):
    config = DumpConfig(store=tmp_path / "store", name="layers", **states_options, **HIDDEN_DUMPS["layers"])
    assert dump(config, 1, 2, teacher=loaded_teacher).shards == 1
    assert dump(config, teacher=loaded_teacher).shards_existing == 1
    for file in states_store.glob("layers/hidden/*.parquet"):
        assert (tmp_path / "store/layers/hidden" / file.name).read_bytes() == file.read_bytes()
    path = tmp_path / "store/layers/hidden/00001.parquet"
    path.write_bytes(b"damaged")
    assert repair(config, teacher=loaded_teacher).shards == 1
    assert path.read_bytes() == (states_store / "layers/hidden/00001.parquet").read_bytes()
    with pytest.raises(MismatchError, match="--hidden-every was 3 and is now 2"):
        dump(replace(config, hidden_every=2), teacher=loaded_teacher)


def test_a_dump_that_would_be_too_large(tmp_path, states_options, loaded_teacher, monkeypatch):
    """Refused by what it would take, before the teacher is loaded; told to, it is made, and resumed without a word."""
    config = DumpConfig(store=tmp_path / "store", name="d", max_bytes=1000, **states_options, **HIDDEN_DUMPS["states"])
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"--kind hidden would take .* kB .* --max-bytes (\d+)"),
    ):
        patch.setattr(local, "load_teacher", None)
        dump(config)
    with pytest.raises(InputError, match="--kind hidden would take"):
        dump(config, teacher=loaded_teacher)
    assert not (tmp_path / "store").exists()
    assert dump(replace(config, max_bytes=10**6), teacher=loaded_teacher).shards
    assert dump(config, teacher=loaded_teacher).shards == 0
    predicted = estimate(config, teacher=loaded_teacher)
    [real] = KnowledgeStore.open(tmp_path / "store").info()
    kept = sum(size for name, size in real.column_bytes.items() if name.startswith(("positions.", "hidden.")))
    assert predicted.bytes == pytest.approx(kept, rel=0.5)


def test_options_that_cannot_be_used(tmp_path, states_options, monkeypatch):
    for layers, words in (("1,1", "named twice"), ("first", "is no list of layers"), ("", "is no list of layers")):
        with pytest.raises(InputError, match=words):
            HiddenOptions(hidden_layers=layers)
    monkeypatch.setattr(local, "load_teacher", None)
    with pytest.raises(InputError, match="--hidden-layers 3 is outside the teacher, which has 2 layers"):
        dump(DumpConfig(store=tmp_path / "store", kinds=("hidden",), hidden_layers="-3,3", **states_options))
    answer = run_command(
        "teacher_dump", "run", tmp_path / "store", "--teacher", states_options["teacher"],
        "--corpus", states_options["corpus"][0], "--kind", "hidden", "--max-length", 48, "--max-bytes", 10,
    )  # fmt: skip
    assert answer.returncode == 2 and "--max-bytes allows 10 B" in answer.stderr.splitlines()[-1]
