"""Functions of modules that import torch or matplotlib, so that tables of them can be read without either."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def deferred(module: str, name: str) -> Callable[..., Any]:
    """The function of that name in a module, which is imported when the function is first called."""

    def function(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    function.__name__ = name
    return function
