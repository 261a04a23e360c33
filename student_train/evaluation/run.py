"""An evaluation from beginning to end: on a held-out dump, or on multiple-choice questions.

Every figure has its 95% bootstrap interval beside it, over whole sequences or whole questions, and what the report needs to
compare two models on the same ones is kept. `kinds` says what is measured on a dump, `multiple_choice` what on questions.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from knowledge_store import KnowledgeStore
from knowledge_store.calibration.file import check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.records import json_sha256
from knowledge_store.reporter import SILENT, Reporter
from student_train.evaluation.configuration import EvaluateConfig, check_evaluation
from student_train.evaluation.kinds import evaluated_ordinals, measure
from student_train.evaluation.multiple_choice import FIT_QUESTIONS, measure_questions
from student_train.evaluation.questions import Question, read_questions, tokenise
from student_train.evaluation.samples import sample_continuations
from student_train.training.context import check_context
from student_train.training.dump_facts import describe_dump
from student_train.training.models import load_configuration, load_model, load_tokenizer
from student_train.training.run_folder import learnt_from, versions, write_json
from student_train.training.vocabulary import check_student


def evaluate(config: EvaluateConfig, *, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Evaluate a model on a dump or on questions, and write the result as JSON.

    Returns:
        What was written. On a dump: what `kinds.measure` returns, and `samples`, which `sample_continuations` returns. On
        questions: what `measure_questions` returns, `headline` (the confidence to judge by) and seconds.

    Raises:
        InputError: an option, the model, the store or the questions cannot be used, the vocabularies differ, or the model's
            context is too short.
    """
    path = check_evaluation(config)
    result = _evaluate_questions(config, reporter) if config.questions else _evaluate_dump(config, reporter)
    options = asdict(replace(config, store=config.store_address))
    options["keep_positions"] = config.keep_positions and str(config.keep_positions)
    result = {"model": config.model, **result, "config": options, "versions": versions()}
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
    return result


def _evaluate_dump(config: EvaluateConfig, reporter: Reporter) -> dict[str, Any]:
    assert config.store
    store = KnowledgeStore.open(config.store, reporter=reporter)
    dump = store.dump(config.dump)
    if missing := store.what_is_missing(dump):
        reporter.note(f"Warning: {missing}")
    if learnt_from(config.model, store, dump):
        reporter.note(
            f"Warning: {config.model} learnt from the dump {dump}, or from a part of it: what it scores there says little of"
            " other text"
        )
    tokenizer = load_tokenizer(config.model, config.gguf_file)
    temperature = _given_temperature(config, tokenizer)
    check_student(store, dump, load_configuration(config.model, config.gguf_file), tokenizer, name=config.model)
    model = load_model(config.model, config.gguf_file)
    check_context(store, dump, model, evaluated_ordinals(store, dump, config.limit), name=config.model, reporter=reporter)
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "limit": config.limit,
        "temperature": temperature,
        "positions_file": config.keep_positions,
    }
    measured = measure(_on_device(model), store, dump, **options, reporter=reporter)
    return {
        "parameters": model.num_parameters(),
        "dump": describe_dump(store, dump),
        **measured,
        "samples": sample_continuations(model, tokenizer, store, dump, reporter=reporter),
    }


def _evaluate_questions(config: EvaluateConfig, reporter: Reporter) -> dict[str, Any]:
    assert config.questions
    questions = read_questions(config.questions, config.answer_as)
    others: list[Question] | None = None
    if config.post_hoc_temperature and not config.calibration:
        others = _others(read_questions(config.post_hoc_temperature, config.answer_as), questions, config)
    if config.limit is not None and config.limit < len(questions):
        questions = [questions[index] for index in np.linspace(0, len(questions) - 1, config.limit).round().astype(int)]
    tokenizer = load_tokenizer(config.model, config.gguf_file)
    temperature = _given_temperature(config, tokenizer)
    model = load_model(config.model, config.gguf_file)
    max_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokenised = tokenise(questions, tokenizer, config.answer_as, max_tokens)
    fit_on = None if others is None else tokenise(others, tokenizer, config.answer_as, max_tokens)
    started = time.monotonic()
    measured = measure_questions(
        _on_device(model), tokenised, batch_size=config.batch_size, fit_on=fit_on, temperature=temperature, reporter=reporter
    )
    clashing = sum(not question.first_tokens_differ for question in tokenised)
    return {
        "parameters": model.num_parameters(),
        "questions": {
            "name": config.questions_name,
            "file": str(config.questions),
            "answer_as": config.answer_as,
            "count": len(questions),
            "options": sorted({len(question.options) for question in questions}),
            "shared_first_token": clashing,
            # Two results are of the same questions when these are the same.
            "sha256": json_sha256([[question.text, list(question.options), question.answer] for question in questions]),
        },
        "headline": "sequence" if clashing else "first_token",
        "seconds": round(time.monotonic() - started, 3),
        **measured,
    }


def _others(candidates: list[Question], questions: list[Question], config: EvaluateConfig) -> list[Question]:
    """The questions to fit a temperature on, spread evenly over their file: none that is measured on."""
    measured = {(question.text, frozenset(question.options)) for question in questions}
    others = [question for question in candidates if (question.text, frozenset(question.options)) not in measured]
    if not others:
        raise InputError(
            f"--post-hoc-temperature {config.post_hoc_temperature} has no questions but those of {config.questions}: a"
            " temperature must be fitted on others than it is measured on"
        )
    if len(others) > FIT_QUESTIONS:
        others = [others[index] for index in np.linspace(0, len(others) - 1, FIT_QUESTIONS).round().astype(int)]
    return others


def _given_temperature(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """The temperature of a calibration file, which must be one of this model; None when no such file is given."""
    if config.calibration is None:
        return None
    calibration = read_calibration(config.calibration)
    if calibration.method != "temperature":
        raise InputError(
            f"{config.post_hoc_temperature} is a calibration of method {calibration.method}: a model takes a temperature of"
            " the whole distribution, as `teacher-dump calibrate` fits it"
        )
    folder = Path(config.model)
    vocabulary = {"vocabulary_sha256": json_sha256(tokenizer.get_vocab())}
    if not folder.is_dir():
        # The files of a hub's model are not at hand to be hashed.
        if calibration.tokenizer.get("vocabulary_sha256") != vocabulary["vocabulary_sha256"]:
            raise InputError(f"{config.post_hoc_temperature} was fitted with another tokenizer than that of {config.model}")
    else:
        weights = [folder / config.gguf_file] if config.gguf_file else sorted(folder.glob("*.safetensors"))
        model = {"name": config.model, "files": {path.name: _sha256(path) for path in weights if path.is_file()}}
        check_calibration(calibration, model, vocabulary)
    return calibration.temperature


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # Weights of 8 bits are loaded to where they stay, and refuse to be moved.
    return model if model.device.type == device else model.to(device)
