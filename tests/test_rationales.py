"""Rationales: which tokens they are, the second input that is made of them, and runs that learn it as a second task."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from conftest import make_model, make_tokenizer, write_jsonl
from processes import run_ranks
from safetensors.torch import load_file
from test_student_training import assert_close, command, weights
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.cli import app
from student_train.losses.rationale import rationale_count, rationale_nll
from student_train.rationales.choice import choose_rationales
from student_train.rationales.configuration import RationalesConfig
from student_train.rationales.contexts import Context, contexts
from student_train.rationales.overlap import Overlap, Share, measure_overlap
from student_train.rationales.second_input import SecondInput
from student_train.rationales.spans import AnswerPlaces
from student_train.training.configuration import TrainConfig
from student_train.training.dataset import DistillationDataset
from student_train.training.hidden_states import PROJECTOR_FILE
from student_train.training.mixin import DistillationTrainer
from student_train.training.rationale import check_trainer
from student_train.training.run import train
from teacher_dump import DumpConfig, dump

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("bank", "river", "garden", "small house")
COUNT = 5


def rows(count: int) -> list[dict]:
    """Questions whose answers stand in the prompt."""
    return [
        {
            "prompt": f"Question: where is {row}?\n{' or '.join(OPTIONS[(row + place) % 4] for place in range(3))}\nAnswer:",
            "completion": f" {OPTIONS[row % 4]}",
        }
        for row in range(count)
    ]


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory, teacher_folder, loaded_teacher) -> Path:
    """The dumps `both`, `text` with hidden states and no saliency, and `sal` with nothing else, of one corpus; and `other`."""
    folder = tmp_path_factory.mktemp("rationales")
    corpus, other = write_jsonl(folder / "corpus.jsonl", rows(20)), write_jsonl(folder / "other.jsonl", rows(7))
    for name, kinds, file in (
        ("both", ("positions", "saliency"), corpus),
        ("text", ("positions", "hidden"), corpus),
        ("sal", ("saliency",), corpus),
        ("other", ("saliency",), other),
    ):
        config = DumpConfig(str(teacher_folder), (file,), folder / "store", name, kinds=kinds, max_length=128)
        dump(config, teacher=loaded_teacher)
    return folder / "store"


@pytest.fixture
def store(store_folder) -> KnowledgeStore:
    return KnowledgeStore.open(store_folder)


@pytest.fixture
def settings(store_folder, student, tmp_path) -> dict:
    return {
        "store": str(store_folder),
        "student": str(student),
        "output": str(tmp_path / "run"),
        "dump": "both",
        "loss": "forward-kl",
        "batch_size": 4,
        "learning_rate": 1e-3,
        "steps": 5,
        "eval_fraction": 0.0,
        "rationale": "saliency",
    }


# --- which tokens -------------------------------------------------------------------------------------------------------


def test_the_most_salient_are_those_that_sql_ranks_first(store):
    found = choose_rationales(store, "both", "saliency", COUNT)
    ranked = store.sql(
        "SELECT sequence_id, list(position ORDER BY position) AS places FROM rationales"
        f" WHERE dump = 'both' AND rank <= {COUNT} GROUP BY sequence_id ORDER BY sequence_id"
    )
    assert found.sequence_ids.tolist() == ranked["sequence_id"].to_pylist()
    assert found.positions.tolist() == ranked["places"].to_pylist()


def test_saliency_of_another_dump_of_the_corpus_is_the_same(store):
    one = choose_rationales(store, "both", "saliency", COUNT)
    other = choose_rationales(store, "text", "saliency", COUNT, saliency_dump="sal")
    assert one.sha256 == other.sha256
    with pytest.raises(InputError, match="are not two teachers of one corpus"):
        choose_rationales(store, "text", "saliency", COUNT, saliency_dump="other")


def test_random_tokens_depend_on_the_seed_and_the_sequence_alone(store):
    one = choose_rationales(store, "both", "random", COUNT, seed=1)
    assert one.sha256 == choose_rationales(store, "text", "random", COUNT, seed=1).sha256
    assert one.sha256 != choose_rationales(store, "both", "random", COUNT, seed=2).sha256
    some = choose_rationales(store, "both", "random", COUNT, seed=1, wanted=one.sequence_ids[3:5])
    assert some.positions.tolist() == one.positions[3:5].tolist()
    for context, positions in zip(contexts(store, "both", shares=False), one.positions, strict=True):
        assert len(set(positions.tolist())) == COUNT and not context.is_target[positions].any()


def test_masked_tokens_are_none_of_the_answer(store):
    """Nor of any other place where all of it stands; and they rank first among the others."""
    plain, masked = (choose_rationales(store, "both", of, 12) for of in ("saliency", "masked"))
    texts = store.tokens("both")["text"].to_pylist()
    assert plain.sha256 != masked.sha256
    for row, context in enumerate(contexts(store, "both", shares=True)):
        place, letters = 0, np.zeros(len(context.token_ids), object)
        for position, token in enumerate(context.token_ids.tolist()):
            letters[position] = range(place, place + len(texts[token]))
            place += len(texts[token])
        prompt, answer = rows(20)[row]["prompt"], rows(20)[row]["completion"].strip()
        start = prompt.index(answer)
        taken = [set(letters[position]) & set(range(start, start + len(answer))) for position in masked.positions[row]]
        assert not any(taken)
        left = set(context.places.tolist()) - set(masked.positions[row].tolist())
        above = [other for other in left if context.shares[other] > context.shares[masked.positions[row]].min()]
        assert all(set(letters[other]) & set(range(start, start + len(answer))) for other in above)


@pytest.mark.parametrize(
    ("tokens", "answer", "expected"),
    [
        (["a", " cat", " sat", "\n", "Cat", "."], [" cat"], [0, 1, 0, 0, 1, 0]),  # a token's text within the answer's is not it
        (["con", "cat", " ca", "t", "s"], [" cat"], [0, 0, 0, 0, 0]),  # words of their own
        ([" ca", "t", " s", "at", "!"], [" cat", " sat"], [1, 1, 1, 1, 0]),  # cut in another way
        (["x", " cat"], [" dog"], [0, 0]),
        ([" ca", "t"], [" c", "at", "<|end|>"], [1, 1]),  # the sign of its end is none of its words
        (["<|end|>", " a"], ["<|end|>"], [0, 0]),
        (["首都", "是", "北", "京还是", "上海", "？"], ["北京"], [0, 0, 1, 1, 0, 0]),  # written without spaces
        (["在", "2008", "年", "12008年"], ["2008", "年"], [0, 1, 1, 0]),
        (["xa", " a", " a"], ["a a"], [0, 1, 1]),
    ],
)
def test_an_answer_is_found_by_its_characters(tokens, answer, expected):
    texts = [*tokens, *answer]
    context = Context(0, np.arange(len(texts)), np.arange(len(texts)) >= len(tokens))
    places = AnswerPlaces(texts)
    assert places.places(context, places.answers(context)).tolist() == expected


def test_parts_of_characters_are_found_where_the_same_tokens_stand():
    """Each decodes to the same sign, whatever it is a part of."""
    context = Context(0, np.array([1, 2, 0, 1, 3, 0, 1, 2]), np.arange(8) >= 6)
    places = AnswerPlaces([" or ", "\ufffd", "\ufffd", "\ufffd"])
    assert places.places(context, places.answers(context)).tolist() == [True, True, False, False, False, False]


# --- the second input ---------------------------------------------------------------------------------------------------


def test_the_second_input(store):
    rationales = choose_rationales(store, "both", "saliency", COUNT)
    [batch] = DistillationDataset(
        store, "both", batch_size=22, shuffle=False, prepare=SecondInput((rationales,), (7, 8)), ordinals=np.arange(20)
    )
    for row, (ids, counted) in enumerate(zip(batch["rationale_ids"], batch["rationale_is_target"], strict=True)):
        if batch["sequence_id"][row] < 0:
            assert (ids == -1).all() and not counted.any()
            continue
        tokens, target = batch["input_ids"][row], batch["is_target"][row]
        end = int(target.nonzero()[0, 0])
        expected = [*tokens[:end].tolist(), 7, 8, *tokens[rationales.positions[row].astype(np.int64)].tolist()]
        assert ids[ids >= 0].tolist() == expected and (ids[len(expected) :] == -1).all()
        assert counted.nonzero().flatten().tolist() == list(range(len(expected) - COUNT, len(expected)))
    assert rationale_count(batch) == 20 * COUNT


def test_each_dump_has_its_own_rationales(store):
    """Of two dumps with the same sequence ids."""
    rationales = [choose_rationales(store, name, "random", COUNT, seed=seed) for seed, name in enumerate(("both", "text"))]
    second = SecondInput(rationales, (7,))
    for batch in DistillationDataset(store, ["both", "text"], batch_size=8, prepare=second, kinds=("positions",)):
        for row, place in enumerate(batch["dump"].tolist()):
            if place < 0:
                continue
            [positions] = rationales[place].of(batch["sequence_id"][row : row + 1].numpy())
            counted = batch["rationale_ids"][row][batch["rationale_is_target"][row]]
            assert counted.tolist() == batch["input_ids"][row][positions].tolist()


def test_its_loss_is_that_of_whole_logits(store):
    model = make_model(480, layers=1, seed=3)
    rationales = choose_rationales(store, "both", "random", COUNT)
    [batch, *_] = DistillationDataset(store, "both", batch_size=8, prepare=SecondInput((rationales,), (7, 8)))
    loss = rationale_nll(model, batch)
    ids, counted = batch["rationale_ids"], batch["rationale_is_target"]
    logits = model(ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][counted[:, 1:]], ids[:, 1:][counted[:, 1:]], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --- runs ---------------------------------------------------------------------------------------------------------------


def entries(output: Path) -> list[dict]:
    return json.loads((output / "history.json").read_text())["entries"]


def test_the_loss_is_the_mean_of_both_tasks_by_their_shares(settings, tmp_path):
    """The label's part is the same as of a run without rationales before the first step, whatever its loss."""
    found = {}
    for name, options in {
        "plain": {"rationale": "none"},
        "both": {"rationale_weight": 0.3},
    }.items():
        output = tmp_path / name
        train(TrainConfig(**settings | options | {"output": str(output), "eval_fraction": 0.2, "evaluations": 1}))
        found[name] = next(entry for entry in entries(output) if "eval_loss" in entry)
    expected = 0.7 * found["plain"]["eval_loss"] + 0.3 * found["both"]["eval_rationale"]
    assert found["both"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["both"]["eval_nll"] == pytest.approx(found["plain"]["eval_nll"], rel=1e-6)
    run = json.loads((tmp_path / "both" / "run.json").read_text())
    example = run["rationale"].pop("example")
    assert run["rationale"] == {"of": "saliency", "tokens": COUNT, "sequences": 20, "dump": None}
    assert len(example["rationale"]) == COUNT and sum(example["shares"]) == pytest.approx(1, abs=1e-3)
    largest = sorted(range(len(example["shares"])), key=lambda place: -example["shares"][place])[:COUNT]
    assert sorted(largest) == example["rationale"] and not set(largest) & set(example["answer"])


@pytest.mark.parametrize("loss", ["ce", "forward-kl"])
def test_a_step_is_the_same_however_it_is_cut(settings, tmp_path, loss):
    """Each mean over its own count in the step: sequences of other lengths in other batches."""
    found = []
    for number, (batch_size, accumulation) in enumerate([(6, 1), (2, 3)]):
        output = str(tmp_path / str(number))
        options = {"output": output, "batch_size": batch_size, "gradient_accumulation": accumulation, "loss": loss}
        train(TrainConfig(**settings | options))
        found.append(weights(output))
    assert_close(found[0], found[1])


def test_without_weight_it_is_a_run_without_it(settings, tmp_path):
    train(TrainConfig(**settings | {"rationale": "none", "output": str(tmp_path / "none")}))
    train(TrainConfig(**settings | {"rationale_weight": 0.0}))
    assert_close(weights(tmp_path / "none"), weights(tmp_path / "run"), 0)
    train(TrainConfig(**settings | {"rationale": "random", "output": str(tmp_path / "random")}))
    with pytest.raises(AssertionError):
        assert_close(weights(tmp_path / "none"), weights(tmp_path / "random"))


def test_two_processes_learn_what_one_does(settings, tmp_path):
    """Two losses more, each a mean of its own, and the maps of hidden states."""
    settings |= {"dump": "text", "rationale_dump": "sal", "max_grad_norm": 0, "hidden_weight": 0.2}
    train(TrainConfig(**settings, hidden_projector=True))
    pair = settings | {"output": str(tmp_path / "pair"), "batch_size": 2}
    done = run_ranks(2, ranks.run_command, [*command(pair), "--hidden-projector"], folder=tmp_path / "said")
    assert [rank.returncode for rank in done] == [0, 0], done
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "pair"))
    assert_close(*(load_file(tmp_path / name / PROJECTOR_FILE) for name in ("run", "pair")))


def test_a_run_resumes_with_its_rationales_and_no_others(settings, tmp_path):
    train(TrainConfig(**settings))
    assert train(TrainConfig(**settings)).began_at == settings["steps"]
    with pytest.raises(InputError, match="--rationale-tokens was 5 and is now 4"):
        train(TrainConfig(**settings | {"rationale_tokens": 4}))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    run["identity"]["rationales"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="rationales was 000"):
        train(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rationale_weight": 1.0}, "--rationale-weight is 1.0; it must be at least 0 and below 1"),
        ({"rationale_weight": -0.1}, "--rationale-weight is -0.1"),
        ({"rationale_tokens": 90}, "20 of 20 sequences of the dump both have fewer than 90 tokens of context, and sequence"),
        ({"rationale": "masked", "rationale_tokens": 50}, "tokens of context that is not the answer's"),
        ({"dump": "text"}, "the dump text holds no knowledge of kind 'saliency'"),
        ({"dump": "text", "rationale_dump": "text"}, "the dump text holds no knowledge of kind 'saliency'"),
        ({"rationale": "none", "rationale_weight": 0.5}, "--rationale-weight says what --rationale learns"),
        ({"rationale": "random", "rationale_dump": "sal"}, "--rationale random reads no saliency"),
        ({"positions_where": "token_id > 3"}, "does not go with --positions-where"),
        ({"dump": "text", "rationale_dump": "other"}, "are not two teachers of one corpus"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_a_model_is_loaded(settings, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("student_train.training.run.load_model", None)
    with pytest.raises(InputError, match=says):
        train(TrainConfig(**settings | options))
    assert not (tmp_path / "run").exists()


def test_a_trainer_whose_batches_have_no_rationales(store):
    """It is told what they need before it begins, and takes those that have some."""
    rationales = choose_rationales(store, "both", "random", COUNT)
    have = DistillationDataset(store, "both", prepare=SecondInput((rationales,), (7, 8)))
    lack = DistillationDataset(store, "both")
    for weight, datasets, says in (
        (1.0, (have,), "rationale_weight is 1; it must be at least 0 and below 1"),
        (0.2, (None,), "belongs to batches with rationales"),
        (0.2, (have, lack), "belongs to batches with rationales"),
    ):
        with pytest.raises(InputError, match=says):
            DistillationTrainer(None, None, None, *datasets, store=store, dump="both", rationale_weight=weight)
    check_trainer(0.2, (have, have))


def test_a_context_that_the_student_has_no_room_for(store, settings, tmp_path):
    """Which has room for the text, with learnt positions."""
    longest = max(store.sequences("both")["length"].to_pylist())
    config = GPT2Config(vocab_size=408, n_positions=longest, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match=f"and the student's context has {longest}"):
        train(TrainConfig(**settings | {"student": str(tmp_path / "short")}))


# --- how often they hold the answer ---------------------------------------------------------------------------------------


def overlap_of(store, **options) -> Overlap:
    return measure_overlap(store, RationalesConfig(store.address, **options))


def test_the_overlap_against_a_plain_count(store):
    found = overlap_of(store, dump="both")
    texts = store.tokens("both")["text"].to_pylist()
    hits, expected, right = 0, 0.0, 0
    for row, context in enumerate(contexts(store, "both", shares=True, likeliest=True)):
        prompt, answer = rows(20)[row]["prompt"], rows(20)[row]["completion"].strip()
        start = prompt.index(answer)
        ends = np.cumsum([len(texts[token]) for token in context.token_ids[context.places]])
        starts = ends - [len(texts[token]) for token in context.token_ids[context.places]]
        held = (starts < start + len(answer)) & (ends > start)
        hits += held[np.argsort(-context.shares[context.places], kind="stable")[:COUNT]].any()
        draws = np.random.default_rng(row).permuted(np.tile(held, (4000, 1)), axis=1)[:, :COUNT]
        expected += draws.any(axis=1).mean()
        right += (context.likeliest == context.token_ids)[context.is_target][:-1].all()  # without the end of the sequence
    assert found.examples == found.stands.count == 20 and found.gold.count == hits and found.accuracy.count == right
    assert found.gold.random == pytest.approx(expected / 20, abs=0.01)
    assert found.chance == 0.25


def test_the_overlap_of_two_dumps_is_that_of_one(store):
    assert overlap_of(store, dump="text", rationale_dump="sal") == overlap_of(store, dump="both")
    alone = overlap_of(store, dump="sal")
    assert alone.gold == overlap_of(store, dump="both").gold and alone.own is alone.accuracy is None
    assert any("is not known" in warning for warning in alone.warnings())


def test_doubts_are_said(store):
    """The teacher's weights are random."""
    warnings = list(overlap_of(store, dump="both", chance=0.2).warnings())
    assert any("the teacher is right in 0%" in warning and "chance gives 20%" in warning for warning in warnings)
    sure = Share(90, 100, 0.3)
    assert not list(Overlap(100, 0, sure, sure, sure, sure, 0.2).warnings())
    doubtful = Share(33, 100, 0.3)
    assert len(list(Overlap(100, 0, sure, doubtful, sure, sure, 0.2).warnings())) == 1


def test_the_command_of_the_overlap(store_folder):
    result = CliRunner().invoke(app, ["rationales", str(store_folder), "--dump", "both"])
    assert result.exit_code == 0 and "20 examples, 5 tokens of each" in result.output
    assert "a rationale holds a token of the answer" in result.output and "Warning: the teacher is right in" in result.output
    for options, says in (
        (["--dump", "text"], "no knowledge of kind 'saliency'"),
        (["--dump", "both", "--rationale-tokens", "99"], "a lower --"),
    ):
        result = CliRunner().invoke(app, ["rationales", str(store_folder), *options])
        assert result.exit_code == 2 and result.output.count("\n") <= 3 and says in " ".join(result.output.split())
