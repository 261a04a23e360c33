"""JSON as rows hold it, read in one way everywhere: lines, lists, and columns of JSON text."""

from __future__ import annotations

import json
from typing import Any


class RepeatedName(ValueError):
    """An object has a name twice: one of its values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedName(f"an object with the name `{repeated}` twice")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def json_value(text: str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: why it stands for none, in words that end a sentence.
    """
    try:
        return DECODER.decode(text)
    except RepeatedName:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
