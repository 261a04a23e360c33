"""The JSON files that `student-train evaluate` leaves, read back. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from knowledge_store.errors import InputError
from student_train.training.run_folder import Record, read_record

DESCRIPTION = "result of `student-train evaluate`"


def read_evaluation(path: Path) -> Record:
    """What `evaluate` wrote.

    Raises:
        InputError: the file cannot be read, or is something else; names it.
    """
    result = read_record(path, ("model", "parameters", "seconds", "config"), DESCRIPTION)
    if not result:
        raise InputError(f"{path} does not exist: name a file that `student-train evaluate` wrote")
    if "questions" not in result and "figures" not in result:
        raise InputError(f"{path} is not the {DESCRIPTION}: it has neither 'questions' nor 'figures'")
    return result
