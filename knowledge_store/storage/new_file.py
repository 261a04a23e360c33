"""A file outside any store, such as an export: it has its name once it is whole, and replaces none."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.storage.naming import give_name


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name when the context ends without an error.

    Args:
        output: the file, in a folder that there is.

    Raises:
        InputError: there is such a file already, or no such folder, or it cannot be written.
    """
    if output.exists():
        raise InputError(f"{output} exists already: name another file, or remove it")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent}: make it, or name another file")
    unfinished = output.with_name(f".{output.name}.{uuid.uuid4().hex[:12]}.unfinished")
    try:
        yield unfinished
        if not give_name(unfinished, output):
            raise InputError(f"{output} exists already: name another file, or remove it")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
