"""A folder of texts that a teacher wrote, as the files of a corpus.

`generation` writes it: a manifest that says how many files there are, and these, each of which is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from knowledge_store.errors import DamageError, InputError, MissingFileError
from knowledge_store.format.records import check_shape, read_record
from knowledge_store.quantities import counted
from knowledge_store.storage import open_storage

MANIFEST = "manifest.json"
CONTENTS = "generated texts"
VERSION = 1

_SHAPE = {"contents": str, "version": int, "settings": dict, "prompts": {"parts": [dict], "rows": int}, "columns": dict}


def part_name(number: int) -> str:
    """The name of a file of the folder."""
    return f"part-{number:06d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder of texts says.

    Raises:
        MissingFileError: there is none. InputError: the folder is of something else.
    """
    storage = open_storage(folder)
    try:
        record = read_record(storage, MANIFEST)
        if record.get("contents") != CONTENTS:
            raise ValueError
        if record.get("version") != VERSION:
            raise InputError(
                f"{folder} was made by another version of teacher-dump generate (its form is {record.get('version')}, and this"
                f" knows {VERSION}): name another folder"
            )
        check_shape(record, _SHAPE)
    except MissingFileError:
        raise
    except (DamageError, ValueError):
        raise InputError(f"{folder / MANIFEST} is not of texts that teacher-dump generate wrote, or was altered") from None
    return record


def is_generated(folder: Path) -> bool:
    """Whether something is a folder with the manifest of such texts."""
    try:
        return folder.is_dir() and bool(read_manifest(folder))
    except (MissingFileError, InputError):
        return False


def missing_parts(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """The numbers of the files that are not there yet."""
    present = {entry.name for entry in open_storage(folder).files("")}
    return [number for number in range(len(manifest["prompts"]["parts"])) if part_name(number) not in present]


def generated_files(folder: Path) -> list[Path]:
    """The files of a folder of texts, in order.

    Raises:
        InputError: not all of them are there yet.
    """
    manifest = read_manifest(folder)
    count = len(manifest["prompts"]["parts"])
    if missing := missing_parts(folder, manifest):
        raise InputError(
            f"{folder} is not finished: {counted(len(missing), 'file', 'files')} of {count:,} are missing. Give its"
            " `teacher-dump generate` again, which goes on where it was stopped"
        )
    return [folder / part_name(number) for number in range(count)]


def check_finished(files: Iterable[Path]) -> None:
    """Make sure that a corpus takes no texts from a folder that is not finished.

    Raises:
        InputError: it does.
    """
    for folder in dict.fromkeys(path.parent for path in files if path.name.startswith("part-")):
        if is_generated(folder):
            generated_files(folder)
