"""Every selection from the teacher to a batch: what is kept, what is refused, and that it is the same however it is made."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from command_server import forked_command
from conftest import story_rows, write_jsonl
from processes import Command
from stores import (
    commit,
    log_softmax,
    make_manifest,
    random_sequences,
    with_draws,
    words,
)

from knowledge_store import DumpWriter, KnowledgeStore, verify
from knowledge_store.calibration.file import Calibration, write_calibration
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds.positions import positions_of
from knowledge_store.kinds.positions.packing import MAX_STEPS, NO_TOKEN, pack_draws, unpack_draws
from knowledge_store.kinds.positions.selection import Selection
from teacher_dump import DumpConfig, dump
from teacher_dump.extraction.sampling import starts

FIXTURES = Path(__file__).parent / "fixtures"

SELECTIONS = {
    "plain": {"top_k": 5, "draw_weight": 0.0},
    "drawn": {"top_k": 5},
    "nucleus": {"selection": "top-p", "top_p": 0.6, "max_k": 12, "draw_weight": 0.1},
    "above": {"selection": "threshold", "draw_weight": 0.1, "draw_seed": 5},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "stories.jsonl", story_rows(12))


@pytest.fixture(scope="module")
def store(tmp_path_factory, corpus, loaded_teacher) -> Path:
    """One dump of each selection, of the same corpus."""
    folder = tmp_path_factory.mktemp("selections") / "store"
    for name, options in SELECTIONS.items():
        dump(DumpConfig("tiny", (corpus,), folder, name, max_length=48, shard_size=4, **options), teacher=loaded_teacher)
    return folder


def full_logprobs(teacher, sequence) -> np.ndarray:
    """The teacher's log-probabilities of each position's token and all others, (L, V) float64; position 0 has none."""
    with torch.no_grad():
        logits = teacher.model(torch.from_numpy(sequence["input_ids"])[None]).logits[0]
    return np.concatenate([np.zeros((1, logits.shape[1])), log_softmax(logits.numpy())[:-1]])


def test_all_are_sound(store):
    found = verify(store)
    assert (found.damage, found.dumps, found.shards) == ([], 4, 12)


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_is_kept_is_the_teachers(store, loaded_teacher, name):
    opened = KnowledgeStore.open(store)
    rule = positions_of(opened.manifest(name)).selection
    for ordinal in (0, 5):
        sequence = opened[name, ordinal]
        full = full_logprobs(loaded_teacher, sequence)
        for position in np.flatnonzero(sequence["is_target"]):
            logprobs = sequence["candidate_logprobs"][position]
            there = logprobs > -np.inf
            ids = sequence["candidate_ids"][position][there]
            assert ids.tolist() == np.argsort(-full[position])[: len(ids)].tolist()
            np.testing.assert_allclose(logprobs[there], full[position][ids], atol=0.13)
            tail = 1 - np.exp(full[position][ids]).sum()
            np.testing.assert_allclose(np.exp(sequence["tail_logprob"][position]), tail, atol=0.07)
            if rule.name == "top-p":
                mass = np.exp(full[position][ids]).cumsum()
                assert len(ids) == 12 or mass[-1] >= 0.6 - 1e-5
                assert len(ids) == 1 or mass[-2] < 0.6 + 1e-5
            elif rule.name == "threshold":
                assert set(ids.tolist()) == set(np.flatnonzero(np.exp(full[position]) >= rule.draw_weight).tolist())
            else:
                assert len(ids) == rule.candidates
            if rule.draw_weight:
                assert sequence["draw_weight"][position] == np.float32(rule.draw_weight)
                drawn = sequence["tail_ids"][position]
                drawn = drawn[drawn >= 0]
                rest = np.exp(full[position])
                rest[ids] = 0
                begin = starts(sequence["sequence_id"], len(sequence["input_ids"]), rule.draw_seed)[position]
                points = np.arange(begin, tail / rule.draw_weight, 1) * rule.draw_weight
                assert drawn.tolist() == np.searchsorted(rest.cumsum(), points, side="right").tolist()


def test_the_columns(store):
    opened = KnowledgeStore.open(store)
    rows = opened.sql("SELECT * FROM positions WHERE dump = 'above' AND is_target").to_pylist()
    assert {len(row["candidate_ids"]) for row in rows} >= {0, 1, 2}
    assert all(len(row["candidate_logprobs"]) == len(row["candidate_ids"]) for row in rows)
    assert all(abs(row["tail_logprob"]) < 1e-6 for row in rows if not row["candidate_ids"])
    mass = sum(sum(np.exp(row["candidate_logprobs"])) + 0.1 * len(row["tail_ids"]) for row in rows) / len(rows)
    assert mass == pytest.approx(1, abs=0.01)
    [row] = opened.sql("SELECT count(tail_ids) AS n FROM positions WHERE dump = 'plain'").to_pylist()
    assert row["n"] == 0
    summaries = {summary.dump: summary for summary in opened.info()}
    assert [summaries[name].facts["positions.selection"] for name in SELECTIONS] == [
        "top-k 5",
        "top-k 5 + draws of weight 0.05",
        "top-p 0.6, at most 12 + draws of weight 0.1",
        "threshold 0.1 + draws of weight 0.1, seed 5",
    ]
    assert 0 < summaries["above"].statistics["positions.mean_top_k_mass"] < 1
    assert summaries["above"].statistics["positions.mean_top_1_accuracy"] is None
    assert 0.5 < summaries["nucleus"].statistics["positions.mean_top_k_mass"] < 1  # twelve do not always reach it
    assert summaries["above"].statistics["positions.mean_nll"] == pytest.approx(
        summaries["plain"].statistics["positions.mean_nll"], abs=1e-3
    )
    answer = forked_command("knowledge_store", "info", store)
    assert answer.returncode == 0
    assert "threshold 0.1 + draws of weight 0.1, seed 5" in answer.stdout


def test_draws_do_not_depend_on_batch_rank_or_restart(store, tmp_path, corpus, loaded_teacher):
    """The same shards whatever the batches are, and byte for byte whoever makes them."""
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", "drawn", max_length=48, shard_size=4, **SELECTIONS["drawn"])
    for rank in (1, 0):
        dump(config, rank, 2, teacher=loaded_teacher)
    for shard in range(3):
        name = f"drawn/positions/{shard:05}.parquet"
        assert (tmp_path / "s" / name).read_bytes() == (store / name).read_bytes()
    dump(replace(config, name="one", batch_size=1), teacher=loaded_teacher)
    opened, alone = KnowledgeStore.open(store), KnowledgeStore.open(tmp_path / "s")
    for ordinal in range(len(alone.sequences("one"))):
        for column in ("tail_ids", "candidate_ids"):
            assert np.array_equal(alone["one", ordinal][column], opened["drawn", ordinal][column])


def test_another_selection_is_another_dump(store, tmp_path, corpus, loaded_teacher):
    shutil.copytree(store, tmp_path / "s")
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", "drawn", max_length=48, shard_size=4, draw_weight=0.1)
    with pytest.raises(MismatchError, match=r"--draw-weight was 0\.05 and is now 0\.1"):
        dump(config, teacher=loaded_teacher)
    with pytest.raises(MismatchError, match=r"--draw-weight was 0\.05 and is now 0$|--draw-weight was 0\.05 and is now 0[.;]"):
        dump(replace(config, draw_weight=0.0), teacher=loaded_teacher)
    with pytest.raises(MismatchError, match=r"--draw-seed was 0 and is now 1"):
        dump(replace(config, draw_weight=0.05, draw_seed=1), teacher=loaded_teacher)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_sequence_as_a_person_reads_it(store, name):
    opened = KnowledgeStore.open(store)
    sequence = opened[name, 0]
    answer = forked_command("knowledge_store", "sequence", store, sequence["sequence_id"], "--dump", name)
    assert answer.returncode == 0
    lines = answer.stdout.splitlines()[1:]
    for position in np.flatnonzero(sequence["has_knowledge"]):
        line = lines[position]
        there = sequence["candidate_logprobs"][position] > -np.inf
        assert line.partition(", drawn: ")[0].count("%") - 2 == there.sum()  # beside the candidates: the token and the others
        drawn = (sequence["tail_ids"][position] >= 0).any() if "tail_ids" in sequence else False
        assert ("drawn: " in line) == drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "top-q"}, "--selection is 'top-q'; it must be top-k, top-p or threshold"),
        ({"draw_weight": -0.1}, "--draw-weight is -0.1; it must be at least 0 and below 1"),
        ({"draw_weight": 1.0}, "--draw-weight is 1.0; it must be at least 0 and below 1"),
        ({"draw_weight": 1e-6}, "the draw weight is 1e-06; it must be at least 1/65,536 and below 1, or 0"),
        ({"draw_seed": -1}, "--draw-seed is -1; it must be at least 0"),
        ({"draw_weight": 0.0, "draw_seed": 1}, "--draw-seed decides where draws fall, and --draw-weight 0 keeps none"),
        ({"selection": "threshold", "draw_weight": 0.0}, "--selection threshold needs a --draw-weight above 0"),
        ({"selection": "threshold", "top_k": 9}, "--top-k is not an option of the selection threshold"),
        ({"selection": "top-p", "top_p": 0.0}, "--top-p is 0.0; it must be above 0 and at most 1"),
        ({"selection": "top-p", "max_k": 0}, "--max-k is 0; it must be at least 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(InputError) as raised:
        DumpConfig("tiny", (Path("c.jsonl"),), Path("s"), **options)
    assert message in str(raised.value)


def test_the_command_refuses_them_in_one_line(tmp_path, teacher_folder, corpus):
    arguments = (tmp_path / "s", "--teacher", teacher_folder, "--corpus", corpus)
    line = ("run", *arguments, "--max-length", 48, "--selection", "top-p", "--max-k", 500)
    answer = Command(*line, folder=tmp_path / "said").wait()
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "--max-k 500 is above the teacher's vocabulary of 408 tokens" in answer.stderr
    assert not (tmp_path / "s").exists()


# --- the tail at another temperature ----------------------------------------------------------------------------------------


def test_the_tail_at_the_calibrations_temperature(tmp_path, corpus, loaded_teacher):
    from teacher_dump.corpus.tokenisation import describe_tokenizer

    figures = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}
    calibration = Calibration(
        "temperature", 1.7, loaded_teacher.description, describe_tokenizer(loaded_teacher.tokenizer), {}, 500, figures, figures
    )
    write_calibration(tmp_path / "c.json", calibration)
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=48, shard_size=4, calibration=tmp_path / "c.json")
    dump(config, teacher=loaded_teacher)
    assert not verify(tmp_path / "s").damage
    opened = KnowledgeStore.open(tmp_path / "s")
    assert positions_of(opened.manifest()).temperature == 1.7
    sequence = opened[3]
    full = full_logprobs(loaded_teacher, sequence)
    tempered = full / 1.7 - np.logaddexp.reduce(full / 1.7, axis=1, keepdims=True)
    for position in np.flatnonzero(sequence["is_target"]):
        kept = np.append(sequence["candidate_logprobs"][position] / 1.7, sequence["tail_logsumexp"][position])
        kept -= np.logaddexp.reduce(kept)
        ids = sequence["candidate_ids"][position]
        np.testing.assert_allclose(kept[:-1], tempered[position][ids], atol=0.13)
        np.testing.assert_allclose(np.exp(kept[-1]), 1 - np.exp(tempered[position][ids]).sum(), atol=0.04)
    with pytest.raises(MismatchError, match=r"temperature of --calibration was 1\.7 and is now absent"):
        dump(replace(config, calibration=None), teacher=loaded_teacher)


# --- damage -----------------------------------------------------------------------------------------------------------------


DRAWN = {"name": "top-k", "k": 3, "draw_weight": 0.05, "draw_seed": 0}


def drawn_knowledge(tempered: bool = False) -> list[dict[str, np.ndarray]]:
    """Knowledge of a few sequences, with draws made up of the ids after the candidates."""
    found = [with_draws(arrays, weight=0.05) for arrays in random_sequences(0, 3)]
    tails = [{"tail_logsumexp": arrays["tail_logprob"] / 2} if tempered else {} for arrays in found]
    return [arrays | tail for arrays, tail in zip(found, tails, strict=True)]


def small_store(folder: Path, record: dict, knowledge: list[dict[str, np.ndarray]], **changes) -> Path:
    manifest = make_manifest(shards=1, selection=record, **changes)
    writer = DumpWriter.open(folder, manifest, tokens_table(words(11), words(11)))
    commit(writer, 0, knowledge)
    return folder


def redrawn(change, row: int = 1) -> list[dict[str, np.ndarray]]:
    """With other draws at one position: what a function makes of the list of them."""
    knowledge = drawn_knowledge()
    ids = [[token for token in drawn if token >= 0] for drawn in knowledge[0]["tail_ids"].tolist()]
    ids[row] = change(ids[row])
    width = max(map(len, ids))
    knowledge[0]["tail_ids"] = np.array([drawn + [-1] * (width - len(drawn)) for drawn in ids])
    return knowledge


@pytest.mark.parametrize(
    ("knowledge", "complaint"),
    [
        (drawn_knowledge(), None),
        (redrawn(lambda ids: [*ids[:-1], 11]), "a drawn token's id is not below the vocabulary size, 11"),
        (redrawn(lambda ids: ids[:-3]), "a position does not have as many draws of weight 0.05 as its tail is large"),
        (redrawn(lambda ids: sorted(ids + ids)), "a position does not have as many draws of weight 0.05 as its tail is large"),
        (redrawn(lambda ids: ids[::-1]), "drawn tokens are not in the order of their ids"),
    ],
)
def test_verify_knows_the_rules_of_draws(tmp_path, knowledge, complaint):
    folder = small_store(tmp_path / "s", DRAWN, knowledge)
    assert [sentence.partition(": ")[2] for sentence in verify(folder).damage] == ([complaint] if complaint else [])


def test_drawn_tokens_are_kept_up_to_the_last_that_a_float_holds():
    kept = np.array([True, True, False])
    ids = np.array([[MAX_STEPS - 1, MAX_STEPS], [NO_TOKEN, NO_TOKEN], [5, NO_TOKEN]])
    assert unpack_draws(pa.chunked_array([pack_draws(ids, kept)])).to_pylist() == [[MAX_STEPS - 1, MAX_STEPS], [], None]
    with pytest.raises(InputError, match=f"id, {MAX_STEPS + 1}, is above {MAX_STEPS}: dump with --draw-weight 0"):
        pack_draws(ids + 1, kept)


def test_verify_finds_a_drawn_candidate(tmp_path):
    knowledge = drawn_knowledge()
    drawn = set(knowledge[0]["tail_ids"][1].tolist())
    knowledge[0]["candidate_ids"][1, 0] = min(drawn - {-1})
    folder = small_store(tmp_path / "s", DRAWN, knowledge)
    assert any(sentence.endswith("a drawn token is among the candidates") for sentence in verify(folder).damage)


def test_verify_knows_the_rules_of_a_threshold(tmp_path):
    record = {"name": "threshold", "draw_weight": 0.05, "draw_seed": 0}
    knowledge = [with_draws(arrays, weight=0.05) for arrays in random_sequences(0, 3, k=1)]
    [complaint] = verify(small_store(tmp_path / "s", record, knowledge)).damage
    assert complaint.endswith("a token that is less likely than a draw's weight was drawn twice")
    [complaint] = verify(small_store(tmp_path / "t", record | {"draw_weight": 0.3}, drawn_knowledge())).damage
    assert complaint.endswith("a candidate is less likely than 0.3")


def test_a_tempered_tail_without_a_teacher(tmp_path):
    calibration = {"temperature": 2.0, "sha256": "00"}
    knowledge = drawn_knowledge(tempered=True)
    assert not verify(small_store(tmp_path / "t", DRAWN, knowledge, calibration=calibration)).damage
    knowledge[0]["tail_logsumexp"][1] = -np.inf
    [complaint] = verify(small_store(tmp_path / "u", DRAWN, knowledge, calibration=calibration)).damage
    assert complaint.endswith("tail_logsumexp is not a finite number although there is a tail, or the reverse")
    knowledge[0]["tail_logsumexp"][1] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        small_store(tmp_path / "v", DRAWN, knowledge, calibration=calibration)


@pytest.mark.parametrize(
    "record",
    [
        {"name": "top-k"},
        {"name": "top-k", "k": 0},
        {"name": "top-k", "k": 5, "draw_weight": True, "draw_seed": 0},
        {"name": "top-k", "k": 5, "draw_weight": 0.5, "draw_seed": 0.0},
        {"name": "top-k", "k": 5, "draw_weight": 0.5, "draw_seed": -1},
        {"name": "top-k", "k": 5, "draw_weight": 0.5},
        {"name": "top-k", "k": 5, "draw_weight": 0, "draw_seed": 0},
        {"name": "top-k", "k": 5, "draw_weight": float("nan"), "draw_seed": 0},
        {"name": "top-k", "k": 5, "draw_seed": 1},
        {"name": "top-k", "k": 5, "tail_draws": 4},
        {"name": "top-p", "p": 2.0, "max_k": 3},
        {"name": "threshold"},
        {"name": "threshold", "draw_weight": 1.0, "draw_seed": 0},
        {"name": "threshold", "k": 5, "draw_weight": 0.1, "draw_seed": 0},
        {"name": "random-sampling", "draws": 5},
        {"name": "beam"},
    ],
)
def test_a_selection_that_is_not_known_is_refused(record):
    with pytest.raises(ValueError, match=r"selection|draw|candidates|probability"):
        Selection.from_record(record)


@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection(draw_weight=0.1),
        Selection("top-p", draw_weight=2**-16, draw_seed=2**32 - 1, p=0.5),
        Selection.threshold(0.07, 3),
    ],
)
def test_a_selection_survives_its_record(selection):
    assert Selection.from_record(selection.to_record()) == selection
