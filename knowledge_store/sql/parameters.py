"""Values for the `?`, `$1` or `$name` of a statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knowledge_store.errors import InputError

Parameters = Sequence[Any] | Mapping[str, Any]


def plain_parameters(parameters: Parameters | None) -> list[Any] | dict[str, Any] | None:
    """Parameters with Python's numbers in place of numpy's, which DuckDB does not take."""
    if parameters is None:
        return None
    import numpy as np  # the command has no parameters, and does not wait for numpy

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, (list, tuple, np.ndarray)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return value

    if isinstance(parameters, Mapping):
        return {name: plain(value) for name, value in parameters.items()}
    return [plain(value) for value in parameters]


def check_json(parameters: list[Any] | dict[str, Any] | None) -> None:
    """Make sure that JSON can carry parameters to another process.

    Raises:
        InputError: it has no such value (a date, bytes); says what to do.
    """

    def check(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                check(item)
        elif isinstance(value, dict):
            for name, item in value.items():
                check(name)
                check(item)
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise InputError(
                f"a query in a process of its own takes no parameter of type {type(value).__name__}: give it as text, and cast"
                " it in the statement, as CAST(? AS DATE), or do not isolate the query"
            )

    check(parameters)
