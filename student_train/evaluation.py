"""How good is a model on a held-out dump: against the text, and against the teacher whose knowledge the dump keeps.

Only target positions count. The teacher's own figures come straight from the store, on the same positions. The divergence
is over candidates and tail, so it is a lower bound of the full one: a model can be further from the teacher than this
says, never closer. Logits are read a slice of positions at a time beyond the model's own output.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.progress import progress_bar
from student_train.calibration import reliability
from student_train.data import DistillationDataset, check_student, describe_dump
from student_train.losses import Targets, cross_entropy, forward_kl, select_targets
from student_train.models import load_model, load_tokenizer
from student_train.run_folder import versions, write_json

# Positions looked at in one go: bounds what the metrics need beyond the logits themselves.
SLICE = 512
BINS = (10, 15)
COVERAGE_BINS = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation; each field is an option of `student-train evaluate`.

    Attributes:
        model: folder or hub id.
        store: folder of the store.
        dump: which dump; may be left out when the store has one.
        batch_size: sequences in one forward pass.
        limit: evaluate on this many sequences, spread evenly over the dump; None for all.
        output: file to write; None for `MODEL/evaluations/DUMP.json` (nothing for a hub id).
        gguf_file: name of a GGUF file in the model's folder.
    """

    model: str
    store: str
    dump: str | None = None
    batch_size: int = 8
    limit: int | None = None
    output: str | None = None
    gguf_file: str | None = None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model on a dump and write the result as JSON.

    Returns:
        what was written: `student` and `teacher` with nll (nats per token), accuracy, ece_10, ece_15 and reliability
        bins; the student's kl_lower_bound (nats per token) and top_1_agreement; `coverage` of the candidates; positions,
        sequences and seconds.

    Raises:
        InputError: the model or the store cannot be used, or the vocabularies differ.
    """
    if config.batch_size < 1:
        raise InputError("--batch-size must be at least 1")
    if config.limit is not None and config.limit < 1:
        raise InputError("--limit must be at least 1")
    store = KnowledgeStore.open(config.store)
    dump = store.dump(config.dump)
    tokenizer = load_tokenizer(config.model, config.gguf_file)
    model = load_model(config.model, config.gguf_file)
    check_student(store, dump, model.config, tokenizer, name=config.model)
    path = output_path(config, dump)
    if path and path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    result = measure(model.to(device), store, dump, batch_size=config.batch_size, limit=config.limit)
    result = {
        "model": config.model,
        "parameters": model.num_parameters(),
        "dump": describe_dump(store, dump),
        "config": asdict(config),
        **result,
        "versions": versions(),
    }
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
    return result


def output_path(config: EvaluateConfig, dump: str) -> Path | None:
    """Where the result goes."""
    if config.output:
        return Path(config.output)
    folder = Path(config.model)
    return folder / "evaluations" / f"{dump}.json" if folder.is_dir() else None


def measure(
    model: PreTrainedModel, store: KnowledgeStore, dump: str, *, batch_size: int = 8, limit: int | None = None
) -> dict[str, Any]:
    """The figures of `evaluate` for a model in memory, which stays on its device and is put in evaluation mode.

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
    dataset = DistillationDataset(store, dump, batch_size=batch_size, ordinals=ordinals, shuffle=False, kinds=("positions",))
    model.eval()
    device = next(model.parameters()).device
    parts: list[dict[str, np.ndarray]] = []
    began = time.monotonic()
    with torch.no_grad(), progress_bar("evaluating", positions, "positions") as advance:
        for batch in DataLoader(dataset, batch_size=None):
            batch = {name: value.to(device) for name, value in batch.items()}
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            logits, chosen = select_targets(outputs.logits, batch)
            for start in range(0, len(logits), SLICE):
                part = Targets(*(column[start : start + SLICE] for column in chosen))
                parts.append(_figures(logits[start : start + SLICE], part))
                advance(len(part.token_ids))
    seconds = time.monotonic() - began
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        "positions": positions,
        "sequences": len(ordinals),
        "seconds": round(seconds, 3),
        "student": {
            "nll": _mean(found["nll"]),
            "kl_lower_bound": _mean(found["kl"]),
            "top_1_agreement": _mean(found["choice"] == found["teacher_choice"]),
            **_answers(found["confidence"], found["choice"] == found["token"]),
        },
        "teacher": {
            "nll": _mean(found["teacher_nll"]),
            **_answers(found["teacher_confidence"], found["teacher_choice"] == found["token"]),
        },
        "coverage": _coverage(found["cumulative"]),
    }


def _figures(logits: Tensor, targets: Targets) -> dict[str, np.ndarray]:
    """Of N positions: what the student and the teacher make of each."""
    logits = logits.float()
    best, choice = logits.max(dim=-1)
    candidates = torch.exp(targets.candidate_logprobs)
    columns = {
        "nll": cross_entropy(logits, targets),
        "kl": forward_kl(logits, targets),
        "choice": choice,
        "confidence": torch.exp(best - torch.logsumexp(logits, dim=-1)),
        "token": targets.token_ids,
        "teacher_nll": -targets.token_logprob,
        "teacher_choice": targets.candidate_ids[:, 0],
        "teacher_confidence": candidates[:, 0],
        "cumulative": candidates.cumsum(dim=-1),
    }
    return {name: column.cpu().numpy() for name, column in columns.items()}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))


def _answers(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    bins = {count: reliability(np.minimum(confidence, 1.0), correct, count) for count in BINS}
    return {
        "accuracy": _mean(correct),
        **{f"ece_{count}": found.error for count, found in bins.items()},
        "reliability": bins[max(BINS)].as_dict(),
    }


def _coverage(cumulative: np.ndarray) -> dict[str, Any]:
    """How much of the teacher's probability the candidates hold: (N, K) cumulative over ranks."""
    counts, edges = np.histogram(np.clip(cumulative[:, -1], 0, 1), bins=COVERAGE_BINS, range=(0, 1))
    return {
        "mean_by_rank": cumulative.mean(axis=0, dtype=np.float64).tolist(),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
