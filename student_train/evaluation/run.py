"""How good is a model, and how far can it be trusted: on a held-out dump, or on multiple-choice questions.

On a dump only target positions count, and the teacher's own figures come straight from the store, on the same positions. The
divergence is over candidates and tail, so it is a lower bound of the full one: a model can be further from the teacher than
this says, never closer. Logits are read a slice of positions at a time beyond the model's own output.

Every figure has its 95% bootstrap interval beside it, over whole sequences or whole questions, and what the report needs to
compare two models on the same ones is kept.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from knowledge_store import KnowledgeStore
from knowledge_store.calibration.file import check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.records import json_sha256
from knowledge_store.kinds.positions import positions_of
from knowledge_store.terminal.progress import progress_bar
from student_train.evaluation.metrics import (
    FullVocabularyCalibration,
    brier_from_sums,
    calibration_gaps,
    describe_answers,
    describe_scores,
    group_sizes,
    group_sums,
)
from student_train.evaluation.multiple_choice import FIT_QUESTIONS, measure_questions, rounded
from student_train.evaluation.questions import Question, check_answer_as, read_questions, tokenise
from student_train.evaluation.results import read_object
from student_train.losses.divergences import Targets, cross_entropy, forward_kl, predicting, select_targets
from student_train.training.data import DistillationDataset, check_student, describe_dump
from student_train.training.models import head_at, load_model, load_tokenizer
from student_train.training.run_folder import versions, write_json

# Positions looked at in one go: bounds what the metrics need beyond the logits themselves.
SLICE = 512
COVERAGE_BINS = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation; each field is an option of `student-train evaluate`.

    Attributes:
        model: folder or hub id.
        store: folder of the store; or else `questions`.
        dump: which dump; may be left out when the store has one.
        batch_size: sequences in one forward pass.
        limit: evaluate on this many sequences or questions, spread evenly over them all; None for all.
        output: file to write; None for `MODEL/evaluations/DUMP.json` or `MODEL/evaluations/QUESTIONS.letter.json` (nothing
            for a hub id).
        gguf_file: name of a GGUF file in the model's folder.
        questions: a file of multiple-choice questions (see `read_questions`).
        answer_as: "letter" or "text", how questions are answered.
        post_hoc_temperature: measure once more at a temperature of the model: a file of other questions to fit one on, or a
            calibration (`.json`) of this model.
    """

    model: str
    store: str | None = None
    dump: str | None = None
    batch_size: int = 8
    limit: int | None = None
    output: str | None = None
    gguf_file: str | None = None
    questions: str | None = None
    answer_as: str = "letter"
    post_hoc_temperature: str | None = None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model on a dump or on questions, and write the result as JSON.

    Returns:
        What was written. On a dump: `student` and `teacher` with what `describe_answers` gives of nll (nats per token) and
        the student's brier (full vocabulary); the student's full_ece, kl_lower_bound (nats per token) and
        top_1_agreement; `coverage` of the candidates; positions, sequences and seconds; `per_sequence`, the student's sums
        over each sequence. A dump of draws alone knows no candidates, and everything that needs them is left out. On
        questions: what `measure_questions` gives, `headline` (the confidence to judge by) and seconds.

    Raises:
        InputError: an option, the model, the store or the questions cannot be used, or the vocabularies differ.
    """
    _check(config)
    result, path = _evaluate_questions(config) if config.questions else _evaluate_dump(config)
    result = {"model": config.model, **result, "config": asdict(config), "versions": versions()}
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
    return result


def _check(config: EvaluateConfig) -> None:
    if (config.store is None) == (config.questions is None):
        raise InputError("give either --store, to measure on a dump, or --questions, to measure on a file of questions")
    if config.questions and config.dump:
        raise InputError("--dump names a dump of --store, and has no meaning with --questions")
    if config.store and config.answer_as != EvaluateConfig.answer_as:
        raise InputError("--answer-as says how --questions are answered, and has no meaning with --store")
    if config.store and config.post_hoc_temperature and not _is_calibration(config.post_hoc_temperature):
        raise InputError(
            "--post-hoc-temperature of a file of questions serves --questions: for a dump, fit the model's temperature with"
            " `teacher-dump calibrate` and give its calibration (.json)"
        )
    if config.batch_size < 1:
        raise InputError("--batch-size must be at least 1")
    if config.limit is not None and config.limit < 1:
        raise InputError("--limit must be at least 1")
    check_answer_as(config.answer_as)


def output_path(config: EvaluateConfig, dump: str | None = None) -> Path | None:
    """Where the result goes: named after the dump, or after the file of questions and how they are answered."""
    if config.output:
        return Path(config.output)
    folder = Path(config.model)
    name = f"{_questions_name(config)}.{config.answer_as}" if config.questions else dump
    return folder / "evaluations" / f"{name}.json" if folder.is_dir() else None


def _questions_name(config: EvaluateConfig) -> str:
    return Path(str(config.questions)).name.removesuffix(".jsonl")


def _checked_path(config: EvaluateConfig, dump: str | None = None) -> Path | None:
    """Raises InputError where a result cannot go, or would take the place of one of something else."""
    path = output_path(config, dump)
    if path and path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    if path and not config.output and path.exists():
        try:
            former = (read_object(path) or {}).get("config")
        except InputError:
            former = None
        source = (former.get("questions") or former.get("store")) if isinstance(former, dict) else None
        if not isinstance(source, str):
            raise InputError(f"{path} is there and is no result of `student-train evaluate`: give --output")
        if Path(source).resolve() != Path(str(config.questions or config.store)).resolve():
            raise InputError(f"{path} holds the results on {source}: give --output for those on another")
    return path


def _is_calibration(path: str) -> bool:
    return Path(path).suffix == ".json"


def _given_temperature(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """The temperature of a calibration file, which must be one of this model; None when no such file is given."""
    if config.post_hoc_temperature is None or not _is_calibration(config.post_hoc_temperature):
        return None
    calibration = read_calibration(Path(config.post_hoc_temperature))
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
    return model.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


# ---- questions


def _evaluate_questions(config: EvaluateConfig) -> tuple[dict[str, Any], Path | None]:
    assert config.questions
    questions = read_questions(config.questions, config.answer_as)
    others: list[Question] | None = None
    if config.post_hoc_temperature and not _is_calibration(config.post_hoc_temperature):
        others = _others(read_questions(config.post_hoc_temperature, config.answer_as), questions, config)
    if config.limit is not None and config.limit < len(questions):
        questions = [questions[index] for index in np.linspace(0, len(questions) - 1, config.limit).round().astype(int)]
    path = _checked_path(config)
    tokenizer = load_tokenizer(config.model, config.gguf_file)
    temperature = _given_temperature(config, tokenizer)
    model = load_model(config.model, config.gguf_file)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = tokenise(questions, tokenizer, config.answer_as, longest)
    fit_on = None if others is None else tokenise(others, tokenizer, config.answer_as, longest)
    began = time.monotonic()
    measured = measure_questions(_on_device(model), asked, batch_size=config.batch_size, fit_on=fit_on, temperature=temperature)
    clashing = sum(not each.told_apart for each in asked)
    result = {
        "parameters": model.num_parameters(),
        "questions": {
            "name": _questions_name(config),
            "file": str(config.questions),
            "answer_as": config.answer_as,
            "count": len(questions),
            "options": sorted({len(question.options) for question in questions}),
            "shared_first_token": clashing,
            # Two results are of the same questions when these are the same.
            "sha256": json_sha256([[each.text, list(each.options), each.answer] for each in questions]),
        },
        "headline": "sequence" if clashing else "first_token",
        "seconds": round(time.monotonic() - began, 3),
        **measured,
    }
    if "post_hoc" in result:
        result["post_hoc"] = {"file": str(config.post_hoc_temperature), **result["post_hoc"]}
    return result, path


def _others(found: list[Question], questions: list[Question], config: EvaluateConfig) -> list[Question]:
    """The questions to fit a temperature on, spread evenly over their file: none that is measured on."""
    measured = {(question.text, frozenset(question.options)) for question in questions}
    others = [question for question in found if (question.text, frozenset(question.options)) not in measured]
    if not others:
        raise InputError(
            f"--post-hoc-temperature {config.post_hoc_temperature} has no questions but those of {config.questions}: a"
            " temperature must be fitted on others than it is measured on"
        )
    if len(others) > FIT_QUESTIONS:
        others = [others[index] for index in np.linspace(0, len(others) - 1, FIT_QUESTIONS).round().astype(int)]
    return others


# ---- a dump


def _evaluate_dump(config: EvaluateConfig) -> tuple[dict[str, Any], Path | None]:
    assert config.store
    store = KnowledgeStore.open(config.store)
    dump = store.dump(config.dump)
    path = _checked_path(config, dump)
    tokenizer = load_tokenizer(config.model, config.gguf_file)
    temperature = _given_temperature(config, tokenizer)
    model = load_model(config.model, config.gguf_file)
    check_student(store, dump, model.config, tokenizer, name=config.model)
    measured = measure(
        _on_device(model), store, dump, batch_size=config.batch_size, limit=config.limit, temperature=temperature
    )
    if temperature is not None:
        measured["post_hoc"] = {"file": str(config.post_hoc_temperature), **measured["post_hoc"]}
    return {"parameters": model.num_parameters(), "dump": describe_dump(store, dump), **measured}, path


def measure(
    model: PreTrainedModel,
    store: KnowledgeStore,
    dump: str,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """The figures of `evaluate` for a model in memory, which stays on its device and is put in evaluation mode.

    Args:
        model: a causal language model.
        store: an open store.
        dump: which dump.
        batch_size: sequences in one forward pass.
        limit: as in `EvaluateConfig`.
        temperature: measure the model once more with its logits divided by this, as `post_hoc`.

    Raises:
        InputError: the chosen sequences have no target positions.
    """
    sequences = store.sequences(dump)
    lengths = sequences["length"].to_numpy()
    targets = sequences["targets"].to_numpy()
    ordinals = np.arange(len(lengths))
    if limit is not None and limit < len(lengths):
        ordinals = np.linspace(0, len(lengths) - 1, limit).round().astype(np.int64)
    # Sequences of one length together leave little padding.
    ordinals = ordinals[np.argsort(-lengths[ordinals], kind="stable")]
    positions = int(targets[ordinals].sum())
    if not positions:
        raise InputError(f"the dump {dump} has no target positions to evaluate on")
    candidates = positions_of(store.manifest(dump)).selection.candidates
    dataset = DistillationDataset(store, dump, batch_size=batch_size, ordinals=ordinals, shuffle=False, kinds=("positions",))
    model.eval()
    device = next(model.parameters()).device
    students = [_Student(1.0), *([] if temperature is None else [_Student(temperature)])]
    stored: list[dict[str, np.ndarray]] = []
    began = time.monotonic()
    with torch.no_grad(), progress_bar("evaluating", positions, "positions") as advance:
        for batch in DataLoader(dataset, batch_size=None):
            batch = {name: value.to(device) for name, value in batch.items()}
            with head_at(model, *predicting(batch)):
                outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            logits, chosen = select_targets(outputs.logits, batch)
            rows = batch["is_target"][:, 1:].nonzero()[:, 0]
            stored.append({"sequence": _numpy(batch["sequence_id"][rows]), **_stored(chosen, candidates)})
            for start in range(0, len(logits), SLICE):
                part = chosen.part(slice(start, start + SLICE))
                for student in students:
                    student.add(logits[start : start + SLICE], part, candidates)
                advance(len(part.token_ids))
    known = _joined(stored)
    result: dict[str, Any] = {
        "positions": positions,
        "sequences": len(ordinals),
        "seconds": round(time.monotonic() - began, 3),
        "student": students[0].figures(known),
        "teacher": _teacher(known, candidates),
        "per_sequence": students[0].per_sequence(known),
    }
    if candidates:
        result["coverage"] = _coverage(known["cumulative"])
    if temperature is not None:
        scaled = students[1]
        result["post_hoc"] = {
            "temperature": temperature,
            "student": scaled.figures(known),
            "per_sequence": scaled.per_sequence(known),
        }
    return result


def _numpy(column: Tensor) -> np.ndarray:
    return column.cpu().numpy()


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stored(targets: Targets, candidates: int) -> dict[str, np.ndarray]:
    """Of N positions: the text's token and what the store says of the teacher, whose choice is its first candidate."""
    columns = {"token": targets.token_ids, "teacher_nll": -targets.token_logprob}
    if candidates:
        kept = torch.exp(targets.candidate_logprobs)
        cumulative = kept.cumsum(dim=-1)
        # Batches of top-p differ in how many candidates they have.
        missing = candidates - cumulative.shape[-1]
        columns |= {
            "teacher_choice": targets.candidate_ids[:, 0],
            "teacher_confidence": kept[:, 0],
            "cumulative": torch.cat([cumulative, cumulative[:, -1:].expand(-1, missing)], dim=-1),
        }
    return {name: _numpy(column) for name, column in columns.items()}


def _teacher(known: dict[str, np.ndarray], candidates: int) -> dict[str, Any]:
    scores = {"nll": known["teacher_nll"]}
    if not candidates:  # of a teacher that was only drawn from, nobody knows what it finds likeliest
        return describe_scores(scores, known["sequence"])
    confidence = np.minimum(known["teacher_confidence"], 1.0)
    return describe_answers(confidence, known["teacher_choice"] == known["token"], scores, known["sequence"])


class _Student:
    """A model's figures at a temperature, collected slice by slice."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.vocabulary = FullVocabularyCalibration()
        self.parts: list[dict[str, np.ndarray]] = []
        self.found: dict[str, np.ndarray] = {}

    def add(self, logits: Tensor, targets: Targets, candidates: int) -> None:
        """Take in N positions."""
        logits = logits.float() / self.temperature
        nll = cross_entropy(logits, targets)
        probabilities = torch.softmax(logits, dim=-1)
        confidence, choice = probabilities.max(dim=-1)
        self.vocabulary.add(probabilities, targets.token_ids)
        squares = probabilities.square_().sum(dim=-1)
        columns = {"nll": nll, "confidence": confidence, "choice": choice, "squares": squares}
        if candidates:
            columns["kl_lower_bound"] = forward_kl(logits, targets, tail="bucket")
        self.parts.append({name: _numpy(column) for name, column in columns.items()})

    def _columns(self, known: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Confidence, correct, and the scores to average."""
        self.found = self.found or _joined(self.parts)
        found = self.found
        scores = {"nll": found["nll"], "brier": brier_from_sums(found["squares"], np.exp(-found["nll"].astype(np.float64)))}
        if "teacher_choice" in known:
            scores["kl_lower_bound"] = found["kl_lower_bound"]
            scores["top_1_agreement"] = found["choice"] == known["teacher_choice"]
        return np.minimum(found["confidence"], 1.0), found["choice"] == known["token"], scores

    def figures(self, known: dict[str, np.ndarray]) -> dict[str, Any]:
        """For JSON."""
        confidence, correct, scores = self._columns(known)
        return {**describe_answers(confidence, correct, scores, known["sequence"]), "full_ece": self.vocabulary.error}

    def per_sequence(self, known: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Sums over the targets of each sequence, for the comparison of two models: how many there are, scores, correct
        answers, and `gaps_15`, which is `calibration_gaps` in 15 bins."""
        confidence, correct, scores = self._columns(known)
        groups = known["sequence"]
        sums = {name: group_sums(values, groups) for name, values in {**scores, "accuracy": correct}.items()}
        return {
            "targets": group_sizes(len(groups), groups).astype(int).tolist(),
            **{name: rounded(values) for name, values in sums.items()},
            "gaps_15": rounded(calibration_gaps(confidence, correct, 15, groups=groups)),
        }


def _coverage(cumulative: np.ndarray) -> dict[str, Any]:
    """How much of the teacher's probability the candidates hold: (N, K) cumulative over ranks."""
    counts, edges = np.histogram(np.clip(cumulative[:, -1], 0, 1), bins=COVERAGE_BINS, range=(0, 1))
    return {
        "mean_by_rank": cumulative.mean(axis=0, dtype=np.float64).tolist(),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
