"""What lies in the folders that a report compares: runs, their histories, and the results of evaluations."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knowledge_store.errors import InputError
from student_train.evaluation.results import read_evaluation
from student_train.training.run_folder import Record, read_history, read_run


@dataclass(frozen=True)
class Run:
    """What a folder holds: any of the three may be empty."""

    name: str
    run: Record
    history: Record
    evaluations: dict[str, Record]  # by the file's name


def read_folder(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise InputError(f"there is no run at {folder}")
    evaluations = {path.stem: read_evaluation(path) for path in sorted(folder.glob("evaluations/*.json"))}
    run = Run(name, read_run(folder), read_history(folder), evaluations)
    if not (run.run or run.history or run.evaluations):
        raise InputError(
            f"{folder} holds neither a training run nor an evaluation: `student-train evaluate {folder}` makes one"
        )
    return run


def folder_names(folders: list[Path]) -> list[str]:
    """Folder names; longer where two are alike."""
    plain = [folder.resolve().name for folder in folders]
    return [
        name if plain.count(name) == 1 else "/".join(folder.resolve().parts[-2:])
        for name, folder in zip(plain, folders, strict=True)
    ]


def records(run: Run) -> list[Record]:
    return [run.run, *run.evaluations.values()]


def dumps_of(record: Record) -> list[Record]:
    """The facts of the dumps that a run learned from, or of the one that an evaluation read."""
    return [*record.get("dumps", ()), *([record["dump"]] if "dump" in record else ())]


def listed(names: Sequence[str]) -> str:
    marked = [f"<b>{html.escape(name)}</b>" for name in names]
    return marked[0] if len(marked) == 1 else f"{', '.join(marked[:-1])} and {marked[-1]}"


def listed_numbers(numbers: Iterable[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(numbers))
