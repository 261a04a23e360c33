"""Hidden states: those of transformers, where they are asked for, within their bounds; dumps, sizes, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HIDDEN_DUMPS
from datasets import load_from_disk
from safetensors.torch import load_file
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.cli import app
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.kinds.hidden import HiddenParameters
from knowledge_store.reading.speculators import draft_layers
from knowledge_store.writing.copy import copy
from teacher_dump import CheckConfig, DumpConfig, check, dump, estimate, repair
from teacher_dump.checking.agreement import AGREES
from teacher_dump.cli import app as teacher_app
from teacher_dump.extraction.hidden import HiddenOptions
from teacher_dump.teachers import local

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", HIDDEN_DUMPS)
def test_states_are_those_that_transformers_gives(states_store, loaded_teacher, name):
    """At the positions that were asked for, each sequence by itself; in 8 bits within half a step of each group's."""
    opened = KnowledgeStore.open(states_store)
    kept = HiddenParameters.from_record(opened.manifest(name).kinds["hidden"])
    for ordinal in range(opened.sequence_count(name)):
        both, own = opened["states", ordinal], opened[name, ordinal]
        document, window = divmod(int(own["sequence_id"]), 2**16)
        places = np.arange(len(both["input_ids"])) if kept.where == "all" else np.flatnonzero(both["is_target"]) - 1
        places = places[(document + window) % kept.every :: kept.every]
        assert np.flatnonzero(own["has_hidden"]).tolist() == places.tolist()
        model, layer_outputs = loaded_teacher.model, []
        handle = model.model.layers[-1].register_forward_hook(lambda _, given, result, seen=layer_outputs: seen.append(result))
        with torch.inference_mode():
            answer = model(torch.from_numpy(both["input_ids"])[None], output_hidden_states=True)
            assert torch.equal(model.model.norm(layer_outputs[0]), answer.hidden_states[-1])
        handle.remove()
        for index, layer in enumerate(kept.layers):
            # Of the last of two layers, before the norm that transformers has behind it.
            states = layer_outputs[0] if layer == 2 else answer.hidden_states[layer]
            expected = states[0, torch.from_numpy(places)].numpy()
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


def test_a_model_whose_last_layer_cannot_be_found(loaded_teacher, monkeypatch):
    monkeypatch.setitem(loaded_teacher.description, "layers", 7)
    with pytest.raises(InputError, match="has no list of 7 layers"):
        loaded_teacher.predict(np.zeros((1, 3), np.int64), np.ones((1, 3), bool), layers=(7,))


# --- files for speculators ----------------------------------------------------------------------------------------------


def test_an_export_for_speculators(states_store, tmp_path):
    """A data set that `datasets` loads, and for each row a file of the same tokens with the states that the dump keeps."""
    opened = KnowledgeStore.open(states_store, cache_size=0)
    count = opened.sequence_count("draft")
    assert opened.export_speculators(tmp_path / "drafts", "draft") == count
    rows = load_from_disk(str(tmp_path / "drafts"))
    assert rows.column_names == ["input_ids", "loss_mask", "seq_len"] and len(rows) == count
    for number, row in enumerate(rows):
        sequence = opened["draft", number]
        file = load_file(tmp_path / "drafts" / "hidden_states" / f"hs_{number}.safetensors")
        assert torch.equal(row["input_ids"], file["token_ids"]) and row["seq_len"] == len(row["input_ids"])
        assert row["loss_mask"].tolist() == sequence["is_target"].astype(int).tolist()
        expected = torch.from_numpy(sequence["hidden"]).reshape(-1, 3, 32).to(torch.bfloat16)
        assert torch.equal(file["hidden_states"], expected)


def test_a_stopped_export_goes_on_and_a_whole_one_is_left_alone(states_store, tmp_path, monkeypatch):
    opened = KnowledgeStore.open(states_store, cache_size=0)
    opened.export_speculators(tmp_path / "whole", "draft")
    read, output = KnowledgeStore.__getitem__, tmp_path / "stopped"

    def stopping(self, item):
        if item[1] == 3:
            raise KeyboardInterrupt
        return read(self, item)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KnowledgeStore, "__getitem__", stopping)
        opened.export_speculators(output, "draft")
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "hidden_states"]  # no data set yet
    assert sorted(path.name for path in (output / "hidden_states").iterdir()) == [f"hs_{n}.safetensors" for n in range(3)]
    before = (output / "hidden_states" / "hs_0.safetensors").stat().st_mtime_ns
    command = ["export", str(states_store), "draft", "--format", "speculators", "--output", str(output)]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0 and "samples; train with --target-layer-ids 0 1" in " ".join(run.stdout.split())
    assert (output / "hidden_states" / "hs_0.safetensors").stat().st_mtime_ns == before
    files = [
        sorted((path.relative_to(folder), path.read_bytes()) for path in folder.rglob("*.*"))
        for folder in (output, tmp_path / "whole")
    ]
    assert files[0] == files[1] and not any(".unfinished" in name.name for name, _ in files[0])
    assert CliRunner().invoke(app, command).exit_code == 2
    with pytest.raises(InputError, match="exists already"):
        opened.export_speculators(output, "draft")
    refused = CliRunner().invoke(app, [*command, "--where", "is_target"])
    assert refused.exit_code == 2 and "choose rows of a Parquet file" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "states",
            r"the hidden states of -1; speculators needs .* of layer 2, before .* --hidden-layers 0,1,2 --hidden-where all",
        ),
        ("exact", "keeps the hidden states of 1, -1; speculators needs"),
        ("part", "keeps hidden states at some positions, and speculators needs all"),
        ("alone", "does not hold its tokens: dump with --kind positions --kind hidden"),
        ("plain", "holds no knowledge of kind 'hidden'"),
    ],
)
def test_dumps_that_speculators_cannot_use(states_store, name, says):
    manifest = KnowledgeStore.open(states_store).manifest("draft" if name in ("part", "alone", "plain") else name)
    kinds = {
        "part": {**manifest.kinds, "hidden": {**manifest.kinds["hidden"], "every": 2}},
        "alone": {"hidden": manifest.kinds["hidden"]},
        "plain": {"positions": manifest.kinds.get("positions")},
    }.get(name, manifest.kinds)
    with pytest.raises(InputError, match=says):
        draft_layers(replace(manifest, kinds=kinds))


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


@pytest.mark.parametrize("name", ["states", "layers"])
def test_check(states_store, loaded_teacher, name):
    """Also of a dump without its tokens, which another dump of the corpus has; alone it is refused."""
    found = check(CheckConfig(states_store, "loaded", dump=name), loaded_teacher)["hidden"]
    assert found.verdict == AGREES and max(found.distances) < 1e-2


def test_states_whose_tokens_no_dump_has_are_not_checked(states_store, tmp_path, loaded_teacher):
    copy(states_store, tmp_path / "alone", "exact")
    with pytest.raises(InputError, match=r"'exact' does not hold its tokens, and no other dump of .* has all of them"):
        check(CheckConfig(tmp_path / "alone", "loaded", dump="exact"), loaded_teacher)


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
    command = [
        "run", str(tmp_path / "store"), "--teacher", states_options["teacher"], "--corpus", str(states_options["corpus"][0]),
        "--kind", "hidden", "--max-length", "48", "--max-bytes", "10",
    ]  # fmt: skip
    answer = CliRunner().invoke(teacher_app, command)
    assert answer.exit_code == 2 and "--max-bytes allows 10 B" in answer.stderr.splitlines()[-1]
