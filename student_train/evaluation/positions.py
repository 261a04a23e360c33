"""The measuring of the figures of the kind `positions`: a model on held-out text, against the text and against the teacher.

Only target positions count, and the teacher's own figures come straight from the store, on the same positions. The divergence
at each position is that of `full_kl`, where a dump keeps draws and the entropy of what they are from. With candidates there is
also that over them and their tail, a lower bound: a model can be further from the teacher than this says, never closer. Logits
are read a slice of positions at a time beyond the model's own output. This file and `position_figures`, which declares the
figures, know the columns of that kind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import POSITIONS, knows_likeliest, knows_tokens, positions_of
from knowledge_store.reporter import SILENT, Reporter
from student_train.evaluation.bootstrap import calibration_gaps, group_sizes, group_sums
from student_train.evaluation.judged_positions import kl_percentiles, perplexity_change, write_positions
from student_train.evaluation.metrics import (
    FullVocabularyCalibration,
    brier_from_sums,
    check_finite,
    describe_answers,
    describe_scores,
    known_intervals,
    rounded,
    standard_error,
)
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.full_kl import full_kl, knows_full_kl, rounding_floor
from student_train.losses.head import head_at
from student_train.losses.targets import Targets, predicting, select_targets
from student_train.training.dataset import DistillationDataset

# Positions looked at in one go: bounds what the metrics need beyond the logits themselves.
SLICE = 512
COVERAGE_BINS = 20


def position_figures(
    model: PreTrainedModel,
    store: KnowledgeStore,
    dump: str,
    ordinals: np.ndarray,
    *,
    batch_size: int = 8,
    temperature: float | None = None,
    positions_file: Path | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """A `figures.Measure` of the kind `positions`.

    Returns:
        `positions` (how many targets); `student` and `teacher` with what `describe_answers` gives of nll (nats per token) and
        the student's brier (full vocabulary); the student's full_ece, kl and kl_lower_bound (nats per token),
        kl_standard_error, percentiles of kl_lower_bound over positions, top_1_agreement and perplexity_change (a share of the
        teacher's perplexity); the teacher's kl, the floor that rounding makes, and its kl_standard_error, that of draws alone;
        `per_sequence`, the student's sums over each sequence; `coverage`, how much of the teacher's probability the top-k
        candidates hold. With a temperature, `post_hoc`: the student once more. Where a dump does not say which token the
        teacher finds likeliest (selection threshold), what needs it is left out.

    Raises:
        InputError: the sequences have no target positions, the model gives numbers that are not finite, or the file of
            positions cannot be written.
    """
    positions = int(store.sequences(dump)["targets"].to_numpy()[ordinals].sum())
    if not positions:
        raise InputError(f"the dump {dump} has no target positions to evaluate on")
    manifest = store.manifest(dump)
    if not knows_tokens(manifest):
        raise InputError(
            f"an evaluation needs the teacher's log-probability of each token, and the dump {dump} does not know it of tokens"
            " that are no candidate: evaluate on a dump that the teacher itself was asked for"
        )
    parameters, likeliest = positions_of(manifest), knows_likeliest(manifest)
    candidates, step = parameters.selection.candidates, parameters.quantisation_step
    dataset = DistillationDataset(store, dump, batch_size=batch_size, ordinals=ordinals, shuffle=False, kinds=(POSITIONS.name,))
    device = next(model.parameters()).device
    students = [_Student(1.0), *([] if temperature is None else [_Student(temperature)])]
    parts: list[dict[str, np.ndarray]] = []
    with torch.no_grad(), reporter.progress("evaluating", positions, "positions") as advance:
        for batch in DataLoader(dataset, batch_size=None):
            batch = {name: value.to(device) for name, value in batch.items()}
            with head_at(model, *predicting(batch), batch["input_ids"].shape[1]):
                outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            logits, targets = select_targets(outputs.logits, batch)
            rows, columns = predicting(batch)
            place = {"sequence": _numpy(batch["sequence_id"][rows]), "position": _numpy(columns + 1)}
            parts.append({**place, **_stored(targets, candidates, step, likeliest)})
            for start in range(0, len(logits), SLICE):
                part = targets.part(slice(start, start + SLICE))
                for student in students:
                    student.add(logits[start : start + SLICE], part)
                advance(len(part.token_ids))
    stored = _joined(parts)
    result: dict[str, Any] = {
        "positions": positions,
        "student": students[0].figures(stored),
        "teacher": {**_teacher(stored), **students[0].floor(stored)},
        "per_sequence": students[0].per_sequence(stored),
    }
    result["coverage"] = _coverage(stored["cumulative"])
    if temperature is not None:
        scaled = students[1]
        result["post_hoc"] = {
            "temperature": temperature,
            "student": scaled.figures(stored),
            "per_sequence": scaled.per_sequence(stored),
        }
    if positions_file is not None:
        write_positions(positions_file, dump, students[0].by_position(stored))
    return result


def _numpy(column: Tensor) -> np.ndarray:
    return column.cpu().numpy()


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stored(targets: Targets, candidates: int, step: float, likeliest: bool) -> dict[str, np.ndarray]:
    """Of N positions: the text's token and what the store says of the teacher, whose choice is its first candidate."""
    kept = torch.exp(targets.candidate_logprobs)
    columns = {
        "token": targets.token_ids,
        "teacher_nll": -targets.token_logprob,
        "floor": rounding_floor(targets, step),
        # Batches differ in how many candidates they have, but where there are k.
        "cumulative": pad(kept, (0, candidates - kept.shape[-1])).cumsum(dim=-1),
    }
    if likeliest:
        columns |= {"teacher_choice": targets.candidate_ids[:, 0], "teacher_confidence": kept[:, 0]}
    return {name: _numpy(column) for name, column in columns.items()}


def _teacher(stored: dict[str, np.ndarray]) -> dict[str, Any]:
    scores = {"nll": stored["teacher_nll"]}
    if "teacher_choice" not in stored:  # with a threshold, nobody knows what the teacher finds likeliest where it keeps nothing
        return describe_scores(scores, stored["sequence"])
    confidence = np.minimum(stored["teacher_confidence"], 1.0)
    return describe_answers(confidence, stored["teacher_choice"] == stored["token"], scores, stored["sequence"])


class _Student:
    """A model's figures at a temperature, collected slice by slice."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.vocabulary = FullVocabularyCalibration()
        self.parts: list[dict[str, np.ndarray]] = []
        self.columns: dict[str, np.ndarray] = {}

    def add(self, logits: Tensor, targets: Targets) -> None:
        """Take in N positions (InputError: the model gives numbers that are not finite)."""
        logits = logits.float() / self.temperature
        scores = {"nll": cross_entropy(logits, targets), "kl_lower_bound": forward_kl(logits, targets, tail="bucket")}
        if knows_full_kl(targets):
            scores["kl"], scores["draw_variance"] = full_kl(logits, targets)
        columns = {name: _numpy(column) for name, column in scores.items()}
        check_finite(*columns.values())
        probabilities = torch.softmax(logits, dim=-1)
        confidence, choice = probabilities.max(dim=-1)
        self.vocabulary.add(probabilities, targets.token_ids)
        squares = probabilities.square_().sum(dim=-1)
        more = {"confidence": confidence, "choice": choice, "squares": squares}
        self.parts.append({**columns, **{name: _numpy(column) for name, column in more.items()}})

    def _columns(self, stored: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Confidence, correct, and the scores to average."""
        self.columns = columns = self.columns or _joined(self.parts)
        nll = columns["nll"]
        brier = brier_from_sums(columns["squares"], np.exp(-nll.astype(np.float64)))
        scores = {"nll": nll, "brier": brier, "kl_lower_bound": columns["kl_lower_bound"]}
        if "teacher_choice" in stored:
            scores["top_1_agreement"] = columns["choice"] == stored["teacher_choice"]
        if "kl" in columns:
            scores["kl"] = columns["kl"]
        return np.minimum(columns["confidence"], 1.0), columns["choice"] == stored["token"], scores

    def figures(self, stored: dict[str, np.ndarray]) -> dict[str, Any]:
        """For JSON."""
        confidence, correct, scores = self._columns(stored)
        figures = {**describe_answers(confidence, correct, scores, stored["sequence"]), "full_ece": self.vocabulary.error}
        if "kl" in scores:
            groups = stored["sequence"]
            figures["kl_standard_error"] = standard_error(group_sums(scores["kl"], groups), group_sizes(len(groups), groups))
        figures["perplexity_change"], interval = perplexity_change(scores["nll"], stored["teacher_nll"], stored["sequence"])
        figures["intervals"] |= known_intervals({"perplexity_change": interval})
        if "kl_lower_bound" in scores:
            figures |= kl_percentiles(scores["kl_lower_bound"])
        return figures

    def floor(self, stored: dict[str, np.ndarray]) -> dict[str, float]:
        """What the teacher itself would score, where the whole divergence is known."""
        self._columns(stored)
        if "kl" not in self.columns:
            return {}
        variance = self.columns["draw_variance"].sum(dtype=np.float64)
        floor = float(stored["floor"].mean(dtype=np.float64))
        return {"kl": floor, "kl_standard_error": math.sqrt(variance) / len(stored["floor"])}

    def by_position(self, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray | None]:
        """What `write_positions` keeps of each position."""
        _, _, scores = self._columns(stored)
        return {
            "sequence_id": stored["sequence"],
            "position": stored["position"],
            "token_id": stored["token"],
            "logprob": -self.columns["nll"],
            "kl": scores.get("kl"),
            "kl_lower_bound": scores.get("kl_lower_bound"),
            "likeliest_id": self.columns["choice"],
            "confidence": self.columns["confidence"],
            "agrees": scores.get("top_1_agreement"),
        }

    def per_sequence(self, stored: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Sums over the targets of each sequence, for the comparison of two models: how many there are, scores, correct
        answers, and `gaps_15`, which is `calibration_gaps` in 15 bins."""
        confidence, correct, scores = self._columns(stored)
        groups = stored["sequence"]
        sums = {name: group_sums(values, groups) for name, values in {**scores, "accuracy": correct}.items()}
        return {
            "targets": group_sizes(len(groups), groups).astype(int).tolist(),
            **{name: rounded(values) for name, values in sums.items()},
            "gaps_15": rounded(calibration_gaps(confidence, correct, 15, groups=groups)),
        }


def _coverage(cumulative: np.ndarray) -> dict[str, Any]:
    """Top-k coverage, how much of the teacher's probability the candidates hold: (N, K) cumulative over ranks."""
    counts, edges = np.histogram(np.clip(cumulative[:, -1], 0, 1), bins=COVERAGE_BINS, range=(0, 1))
    return {
        "mean_by_rank": cumulative.mean(axis=0, dtype=np.float64).tolist(),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
