"""The JSON files that `run` and `evaluate` leave, read back: a run's record, its history, and the result of an evaluation.

They are files like any other, and may come from anybody. Whoever reads one here gets what the rest of the code asks of it, or
one line that names the file. Needs no torch.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.format.records import MAX_BYTES, check_depth, check_shape, open_at_once

Record = dict[str, Any]

RUN_FILE = "run.json"
HISTORY_FILE = "history.json"

CONFIDENCES = ("first_token", "options", "sequence")
BINS = 15  # of reliability diagrams, and of the gaps that a result keeps of each sequence

# Longer than anybody trains; a time that is not a number is not below it either.
_MOST_SECONDS = 1e12
_NUMBER = int | float
_FIGURES = dict.fromkeys(
    ("nll", "kl_lower_bound", "top_1_agreement", "accuracy", "brier", "ece_10", "ece_15", "adaptive_ece", "full_ece"), _NUMBER
)
_SCORES = {name: [_NUMBER] for name in ("nll", "kl_lower_bound", "top_1_agreement", "accuracy", "brier")}
_ANSWERS = {name: [_NUMBER] for name in ("confidence", "correct", "nll", "brier")}
_DUMP = {
    "name": str,
    "teacher": str,
    "sequences": int,
    "positions": int,
    "vocabulary_size": int,
    "quantisation_step": _NUMBER,
}
_DUMP_OPTIONAL = {"bytes": int, "bytes_read": int, "targets": int, "selection": str, "top_k": int}
_RUN = {
    "config": {"loss": str, "ce_weight": _NUMBER, "temperature": _NUMBER},
    "sequences": {...: int},
    "world_size": int,
    "parameters": int,
}
_CONFIG_OPTIONAL = {**dict.fromkeys(("first_c", "beta", "skew", "smoothing"), _NUMBER), "tail": str}
_HISTORY = {"finished": bool, "seconds": _NUMBER, "entries": [{"step": int}]}
_ENTRY_OPTIONAL = dict.fromkeys(("loss", "eval_loss", "eval_nll", "eval_kl"), _NUMBER)
_QUESTIONS = {"count": int, "options": [int], "answer_as": str, "shared_first_token": int}


def read_object(path: Path) -> Record | None:
    """The object in a JSON file; None when there is no such file.

    Raises:
        InputError: it cannot be read, is no file (a pipe, a device), has more than `MAX_BYTES`, or holds something else than
            an object of text that is sound Unicode, nested no more than `MAX_DEPTH` deep.
    """
    try:
        with open(path, "rb", opener=open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is not a file")
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        record = json.loads(data.decode())
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
        check_depth(record)
        json.dumps(record, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise InputError(f"{path} cannot be read: its text is not sound Unicode") from None
    except RecursionError:
        raise InputError(f"{path} cannot be read: it is nested too deep") from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {printable(str(error))}") from None
    return record


def printable(text: str) -> str:
    """Text from a file or of a name, for a message, a page or a picture: one line of what can be written."""
    return "".join(each if each.isprintable() else "�" for each in text)


def read_run(folder: Path) -> Record:
    """What `run` wrote of itself before the first step; empty when there is none. Raises InputError."""
    return _read(folder / RUN_FILE, _check_run, "record of a training run")


def read_history(folder: Path) -> Record:
    """A run's history.json; empty before the first log. Raises InputError."""
    return _read(folder / HISTORY_FILE, _check_history, "history of a training run")


def read_evaluation(path: Path) -> Record:
    """What `evaluate` wrote. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path} cannot be read: it is a link to nothing")
    return _read(path, _check_evaluation, "result of `student-train evaluate`")


def _read(path: Path, check: Any, name: str) -> Record:
    record = read_object(path)
    if record is None:
        return {}
    try:
        check(record)
    except ValueError as error:
        raise InputError(f"{path} is no {name}: {printable(str(error))}") from None
    return record


def _check(value: Any, name: str, shape: Any, optional: Record | None = None) -> None:
    """ValueError: a value does not have a shape, or a key that may be left out is there and does not have its own."""
    check_shape(value, shape, name)
    check_shape(value, {key: each for key, each in (optional or {}).items() if key in value}, name)


def _check_run(record: Record) -> None:
    _check(record, "it", _RUN, {"identity": {}, "dump": _DUMP, "versions": {}})
    _check(record["config"], "it.config", {}, _CONFIG_OPTIONAL)
    _check(record.get("dump", {}), "it.dump", {}, _DUMP_OPTIONAL)


def _check_history(record: Record) -> None:
    _check(record, "it", _HISTORY)
    _check_seconds(record)
    for index, entry in enumerate(record["entries"]):
        _check(entry, f"it.entries[{index}]", {}, _ENTRY_OPTIONAL)


def _check_seconds(record: Record) -> None:
    if not 0 <= record["seconds"] < _MOST_SECONDS:
        raise ValueError("it.seconds is no time")


def _check_evaluation(result: Record) -> None:
    if not ("questions" in result or ("dump" in result and "student" in result)):
        raise ValueError("it has neither questions nor a dump and a student")
    _check(result, "it", {"parameters": int, "seconds": _NUMBER}, {"dump": _DUMP, "versions": {}, "post_hoc": {"file": str}})
    _check(result.get("dump", {}), "it.dump", {}, _DUMP_OPTIONAL)
    _check_seconds(result)
    if "questions" in result:
        _check_on_questions(result)
    else:
        _check_on_text(result)


def _check_on_questions(result: Record) -> None:
    _check(result["questions"], "it.questions", _QUESTIONS)
    if not any(name in result for name in CONFIDENCES):
        raise ValueError(f"it has none of {', '.join(CONFIDENCES)}")
    for place, part in (("it", result), ("it.post_hoc", result.get("post_hoc", {}))):
        for name in CONFIDENCES:
            if name in part:
                _check_figures(part[name], f"{place}.{name}", drawn=True)
                _check(part[name], f"{place}.{name}", {"answers": {}}, {"temperature": _NUMBER})
                answers = part[name]["answers"]
                _check_columns(answers, f"{place}.{name}.answers", _ANSWERS)
                if any(value < 0 or value > 1 for value in answers["confidence"]):
                    raise ValueError(f"{place}.{name}.answers.confidence is not between 0 and 1")


def _check_on_text(result: Record) -> None:
    _check(result, "it", {"positions": int, "student": {}, "teacher": {}})
    _check_figures(result["teacher"], "it.teacher")
    parts = {"it": result}
    if "post_hoc" in result:
        parts["it.post_hoc"] = result["post_hoc"]
        _check(result["post_hoc"], "it.post_hoc", {"temperature": _NUMBER, "student": {}, "per_sequence": {}})
    for place, part in parts.items():
        _check_figures(part["student"], f"{place}.student", drawn=True)
        if "per_sequence" in part:
            _check_columns(
                part["per_sequence"], f"{place}.per_sequence", {"targets": [_NUMBER], "gaps_15": [[_NUMBER]]}, _SCORES
            )
            if any(len(row) != BINS for row in part["per_sequence"]["gaps_15"]):
                raise ValueError(f"{place}.per_sequence.gaps_15 is not rows of {BINS}")
    if "coverage" in result:
        shape = {"mean_by_rank": [_NUMBER], "histogram": {"edges": [_NUMBER], "counts": [_NUMBER]}}
        _check(result["coverage"], "it.coverage", shape)
        histogram = result["coverage"]["histogram"]
        if not result["coverage"]["mean_by_rank"] or len(histogram["edges"]) != len(histogram["counts"]) + 1:
            raise ValueError("it.coverage is not that of a dump")


def _check_figures(figures: Any, name: str, *, drawn: bool = False) -> None:
    """`drawn`: it must have what its reliability diagram is made of."""
    _check(figures, name, {}, {**_FIGURES, "intervals": {...: [_NUMBER]}})
    if drawn or "reliability" in figures:
        _check(figures, name, {"ece_15": _NUMBER, "nll": _NUMBER, "reliability": {}})
        columns = {"counts": [int], "confidence": [_NUMBER], "accuracy": [_NUMBER]}
        _check_columns(figures["reliability"], f"{name}.reliability", columns)
        if len(figures["reliability"]["counts"]) != BINS or min(figures["reliability"]["counts"]) < 0:
            raise ValueError(f"{name}.reliability is not counts in {BINS} bins")


def _check_columns(columns: Any, name: str, shape: Record, optional: Record | None = None) -> None:
    """Lists as long as each other, none of them empty."""
    _check(columns, name, shape, optional)
    lengths = {len(columns[key]) for key in (*shape, *(optional or {})) if key in columns}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(f"{name} is not lists of one length")
