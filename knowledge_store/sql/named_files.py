"""Parquet files beside a store, which a statement asks by the names that they are given. Imports no pyarrow: the command leaves
that to its child."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_store.errors import InputError

if TYPE_CHECKING:
    import pyarrow.dataset as ds

NamedFiles = Mapping[str, str | Path]
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_named_files(words: Iterable[str]) -> dict[str, str]:
    """Files by their names, from words such as "q4=q4.parquet".

    Raises:
        InputError: a word is no name and file, or a name is given twice.
    """
    files: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise InputError(f"--with takes NAME=FILE, such as q4=q4.parquet, and not {word!r}")
        if name in files:
            raise InputError(f"--with gives the name {name!r} to two files: give each its own")
        files[name] = path
    return files


def checked_files(files: NamedFiles | None) -> dict[str, str]:
    """The absolute paths of files by their names, in small letters as SQL compares them.

    Raises:
        InputError: a name is none that SQL takes without quotes, or there is no such file.
    """
    checked: dict[str, str] = {}
    for name, path in (files or {}).items():
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name for a file in SQL: take letters, digits and _, a letter first")
        if name.lower() in checked:
            raise InputError(f"two files have the name {name.lower()!r} in SQL, which knows no capitals: give each its own")
        if not Path(path).is_file():
            raise InputError(f"there is no file {path}, which {name} was to name: give the path of a Parquet file")
        checked[name.lower()] = str(Path(path).absolute())
    return checked


def file_rows(path: str) -> ds.Dataset:
    """The rows of a file, read as they are asked for.

    Raises:
        InputError: it is no Parquet file, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.dataset as ds

    try:
        return ds.dataset(path, format="parquet")
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as a Parquet file: {reason}") from None
