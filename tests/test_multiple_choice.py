"""Answers to multiple-choice questions, against each option's likelihood computed by itself in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, save_teacher, write_jsonl
from processes import Notes
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.architectures import cases
from benchmarks.tiny_architectures import tiny_config, tiny_model
from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from knowledge_store.errors import InputError
from student_train.evaluation.bootstrap import bootstrap_calibration_error, bootstrap_interval
from student_train.evaluation.configuration import EvaluateConfig
from student_train.evaluation.multiple_choice import CONFIDENCES, fit_temperatures, measure_questions, score
from student_train.evaluation.questions import TokenisedQuestion, read_questions, tokenise
from student_train.evaluation.run import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def question_rows(count: int, start: int = 0) -> list[dict]:
    """Questions of various lengths, with two to four options of various lengths."""
    words = list(dict.fromkeys(TEXT.replace("\n", " ").split()))
    rows = []
    for row in range(start, start + count):
        begin = (5 * row) % 40
        pool = [word.strip('.,:"?') for word in words[begin : begin + 12]]
        options = list(dict.fromkeys([pool[0], f"{pool[1]} {pool[2]}", f"{pool[3]} the {pool[4]}", pool[5]]))
        text = " ".join(words[(3 * row) % 30 :][: 3 + row % 9])
        rows.append({"question": f"{row} {text}?", "options": options[: 2 + row % 3], "answer": row % 2})
    return rows


CLASH = {"question": "Which one?", "options": ["the ship", "the lamp", "a book"], "answer": 1}


@pytest.fixture(scope="module")
def model(teacher_folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(teacher_folder):
    return AutoTokenizer.from_pretrained(teacher_folder)


def plain_logprobs(model: PreTrainedModel, question: TokenisedQuestion) -> tuple[np.ndarray, np.ndarray]:
    """Full-vocabulary logits at the first token, float64, and the options' log-likelihoods, one at a time."""
    likelihoods = []
    with torch.no_grad():
        first = model(torch.tensor([question.context])).logits[0, -1].double()
        for tokens in question.completions:
            ids = [*question.context, *tokens]
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            begin = len(question.context)
            likelihoods.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids))))
    return first.numpy(), np.array(likelihoods)


def plainly(model, questions, name: str, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """Confidence, correct, nll and brier of each question that a confidence serves."""
    columns: dict[str, list] = {"confidence": [], "correct": [], "nll": [], "brier": []}
    for question in questions:
        first, likelihoods = plain_logprobs(model, question)
        heads = [tokens[0] for tokens in question.completions]
        if name != "sequence" and len(set(heads)) < len(heads):
            continue
        if name == "first_token":
            scaled = np.exp(first / temperature - (first / temperature).max())
            probabilities = (scaled / scaled.sum())[heads]
            classes = [*probabilities, 1 - probabilities.sum()]
        else:
            compared = first[heads] if name == "options" else likelihoods
            scaled = np.exp(compared / temperature - (compared / temperature).max())
            probabilities = classes = scaled / scaled.sum()
        truth = np.arange(len(classes)) == question.answer
        columns["confidence"].append(probabilities.max())
        columns["correct"].append(probabilities.argmax() == question.answer)
        columns["nll"].append(-np.log(probabilities[question.answer]))
        columns["brier"].append(((np.array(classes) - truth) ** 2).sum())
    return {name: np.array(values) for name, values in columns.items()}


def check(found: dict, plain: dict[str, np.ndarray]) -> None:
    """All figures of one confidence."""
    confidence, correct = plain["confidence"], plain["correct"]
    assert found["questions"] == len(correct)
    assert found["answers"]["correct"] == correct.astype(int).tolist()
    for name in ("confidence", "nll", "brier"):
        assert found["answers"][name] == pytest.approx(plain[name], rel=2e-4, abs=1e-6)
    for name, values in (("nll", plain["nll"]), ("brier", plain["brier"]), ("accuracy", correct)):
        assert found[name] == pytest.approx(values.mean(), abs=1e-4)
        assert found["intervals"][name] == pytest.approx(bootstrap_interval(values), abs=1e-3)
    assert found["ece_10"] == pytest.approx(expected_calibration_error(confidence, correct, 10), abs=1e-5)
    assert found["intervals"]["ece_15"] == pytest.approx(bootstrap_calibration_error(confidence, correct, 15), abs=1e-4)
    assert sum(found["reliability"]["counts"]) == len(correct)


@pytest.mark.parametrize("answer_as", ["letter", "text"])
def test_against_one_option_at_a_time(model, tokenizer, tmp_path, answer_as):
    path = write_jsonl(tmp_path / "q.jsonl", [*question_rows(24), CLASH])
    questions = tokenise(read_questions(path, answer_as), tokenizer, answer_as)
    found = measure_questions(model, questions, batch_size=4, temperature=1.7)
    apart = sum(question.first_tokens_differ for question in questions)
    assert apart == len(questions) if answer_as == "letter" else 0 < apart < len(questions)
    for name in CONFIDENCES:
        check(found[name], plainly(model, questions, name))
        check(found["post_hoc"][name], plainly(model, questions, name, 1.7))
        assert found["post_hoc"][name]["temperature"] == 1.7
    if answer_as == "letter":
        assert found["options"]["answers"]["nll"] == pytest.approx(found["sequence"]["answers"]["nll"], rel=1e-4)


def test_the_head_computes_what_is_asked_for_and_no_more(model, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", question_rows(6))
    questions = tokenise(read_questions(path), tokenizer)
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    try:
        score(model, questions, batch_size=6)
    finally:
        handle.remove()
    assert [tuple(shape[:-1]) for shape in shapes] == [(1, 6)]  # one pass, one position for each question
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3  # and the model is as it was


def test_a_batch_of_any_size_gives_the_same(model, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [*question_rows(7), CLASH])
    questions = tokenise(read_questions(path, "text"), tokenizer, "text")
    one, many = (score(model, questions, batch_size=size) for size in (1, 16))
    assert np.allclose(one.sequence, many.sequence, atol=1e-4)
    assert np.allclose(one.first, many.first, atol=1e-4)


ARCHITECTURES = {
    **dict.fromkeys(["llama", "gpt2", "bloom", "mistral, sliding window"], True),
    **dict.fromkeys(["mamba", "rwkv"], False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_question_is_read_once_where_a_model_can_go_on_from_it(name):
    architecture, settings = cases()[name]
    model = tiny_model(tiny_config(architecture, **settings))
    generator = np.random.default_rng(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.integers(3, 400, generator.integers(low, high)).tolist())

    questions = [TokenisedQuestion(tokens(9, 12), tuple(tokens(1, 5) for _ in range(4)), 0) for _ in range(6)]
    questions.append(TokenisedQuestion(tokens(5, 6), ((7,), (8,)), 0))
    notes = Notes()
    found = score(model, questions, batch_size=8, reporter=notes)
    assert any("reads each anew" in sentence for sentence in notes.notes) != ARCHITECTURES[name]
    for index, question in enumerate(questions):
        first, likelihoods = plain_logprobs(model, question)
        assert found.sequence[index, : len(likelihoods)] == pytest.approx(likelihoods, abs=1e-4)
        assert found.first[index, : len(likelihoods)] == pytest.approx(first[list(question.first_tokens)], abs=1e-4)


def test_no_question_is_read_twice(model):
    context, options = tuple(range(10, 50)), ((1, 2, 3), (4, 5), (6, 7, 8), (9,))
    sizes = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].numel()))
    try:
        score(model, [TokenisedQuestion(context, options, 0)] * 30, batch_size=9)
    finally:
        handle.remove()
    trial = 2 * (3 * 42 + 40 + 6)
    assert sum(sizes) == trial + 30 * (40 + 6)  # three options of two tokens to read, one of them padded


def test_temperatures_are_those_of_the_lowest_likelihood(model, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [*question_rows(12), CLASH])
    questions = tokenise(read_questions(path, "text"), tokenizer, "text")
    fitted = fit_temperatures(score(model, questions, keep_logits=True))
    for name in CONFIDENCES:
        temperature = fitted[name].temperature
        best, colder, hotter = (
            plainly(model, questions, name, at)["nll"].mean() for at in (temperature, temperature / 1.1, temperature * 1.1)
        )
        assert fitted[name].nll == pytest.approx(best, abs=1e-4)
        assert fitted[name].nll_before == pytest.approx(plainly(model, questions, name)["nll"].mean(), abs=1e-4)
        assert fitted[name].at_edge or (best < colder and best < hotter)


@pytest.fixture
def config(teacher_folder, tmp_path) -> EvaluateConfig:
    path = write_jsonl(tmp_path / "test.jsonl", question_rows(8))
    return EvaluateConfig(str(teacher_folder), questions=str(path), output=str(tmp_path / "result.json"))


def test_the_result(config, tmp_path):
    others = write_jsonl(tmp_path / "validation.jsonl", [*question_rows(3), *question_rows(20, start=50)])
    found = evaluate(replace(config, post_hoc_temperature=str(others)))
    assert found["questions"]["name"] == "test" and found["questions"]["count"] == 8
    assert found["headline"] == "first_token" and found["questions"]["shared_first_token"] == 0
    assert found["questions"]["options"] == [2, 3, 4]
    assert found["post_hoc"]["questions"] == 20  # three of the others are measured on
    scaled = found["post_hoc"]["options"]
    assert scaled["fitted_nll"][1] <= scaled["fitted_nll"][0]
    assert scaled["accuracy"] == found["options"]["accuracy"]
    text = Path(str(config.output)).read_text()
    assert json.loads(text)["first_token"]["answers"] == found["first_token"]["answers"]
    assert len(text.splitlines()) < 400  # lists are lines, not columns


def test_options_that_share_their_first_token(config, tmp_path):
    path = write_jsonl(tmp_path / "clash.jsonl", [CLASH, {**CLASH, "question": "And now?"}])
    found = evaluate(replace(config, questions=str(path), answer_as="text", output=str(tmp_path / "clash.json")))
    assert found["headline"] == "sequence" and found["questions"]["shared_first_token"] == 2
    assert "first_token" not in found and "options" not in found
    assert found["sequence"]["questions"] == 2
    fitted = evaluate(replace(config, answer_as="text", post_hoc_temperature=str(path)))["post_hoc"]
    assert fitted["sequence"]["temperature"] > 0
    assert "first_token" not in fitted and "options" not in fitted  # nothing to fit them on


def test_limit_and_the_place_of_the_result(config, tmp_path):
    model = save_teacher(tmp_path / "model")
    found = evaluate(replace(config, model=str(model), limit=3, output=None))
    assert found["questions"]["count"] == 3
    assert json.loads((model / "evaluations" / "test.letter.json").read_text())["questions"] == found["questions"]
    assert found["questions"]["sha256"] != evaluate(config)["questions"]["sha256"]


def test_no_result_takes_the_place_of_another(config, tmp_path):
    model = save_teacher(tmp_path / "model")
    config = replace(config, model=str(model), output=None)
    letters, texts = evaluate(config), evaluate(replace(config, answer_as="text"))
    kept = {path.name: json.loads(path.read_text())["questions"] for path in (model / "evaluations").iterdir()}
    assert kept == {"test.letter.json": letters["questions"], "test.text.json": texts["questions"]}
    other = tmp_path / "other" / "test.jsonl"
    other.parent.mkdir()
    write_jsonl(other, question_rows(3))
    with pytest.raises(InputError, match=r"test\.letter\.json holds the results on .*: give --output"):
        evaluate(replace(config, questions=str(other)))
    (model / "evaluations" / "test.letter.json").write_text("[]")
    with pytest.raises(InputError, match=r"test\.letter\.json is not the result of `student-train evaluate`"):
        evaluate(config)


def test_bad_input(config, tmp_path):
    absent = replace(config, questions=str(tmp_path / "absent.jsonl"), model="/no/such/model")
    with pytest.raises(InputError, match="there is no file"):  # before the model is looked at
        evaluate(absent)
    with pytest.raises(InputError, match="--answer-as is 'number'; it must be letter or text"):
        evaluate(replace(config, answer_as="number"))
    with pytest.raises(InputError, match="has no questions but those of"):
        evaluate(replace(config, post_hoc_temperature=config.questions))
    with pytest.raises(InputError, match="there is no file"):
        evaluate(replace(config, post_hoc_temperature=str(tmp_path / "absent.jsonl")))
    long = write_jsonl(tmp_path / "long.jsonl", [{**CLASH, "question": "why " * 200}])
    with pytest.raises(InputError, match=r"long\.jsonl, line 1: the question has .* tokens, and the model takes at most 256"):
        evaluate(replace(config, questions=str(long)))
    assert not Path(str(config.output)).exists()
