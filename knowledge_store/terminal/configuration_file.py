"""A command's options in a YAML file, which `--config` reads and `--print-config` prints.

Its keys are the names of the options, with dashes or underscores, and its values what stands on a command line, read as such:
text that the option's own type makes something of. An option that is repeated has a list, or a mapping of NAME to VALUE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_origin, get_type_hints

from knowledge_store.errors import InputError
from knowledge_store.options import advice, flag_of, option_of


def option_values(path: Path, configuration: type) -> dict[str, str | list[str]]:
    """What a file says of a configuration's options: text by the name of the field, a list of it for a repeated option.

    Raises:
        InputError: the file is missing or no YAML mapping, or has a key that is no option or a value that no option takes.
    """
    names = {_key(field): field.name for field in fields(configuration) if option_of(field)}
    repeated = {name for name, annotation in get_type_hints(configuration).items() if get_origin(annotation) is tuple}
    values: dict[str, str | list[str]] = {}
    for written, value in _read(path).items():
        key = str(written).replace("-", "_")
        if key not in names:
            raise InputError(f"{path} has the key {written!r}, which is no option of this command{advice(key, names)}")
        if names[key] in values:
            raise InputError(f"{path} says twice what {key} is")
        if value is None:
            continue
        if names[key] in repeated:
            values[names[key]] = _words(value)
        elif isinstance(value, str):
            values[names[key]] = value
        else:
            raise InputError(f"{path} gives several values for {key}, which takes one")
    return values


def file_text(configuration: Any) -> str:
    """The file that says what a configuration says; what is None is left out."""
    declared = {_key(field): getattr(configuration, field.name) for field in fields(configuration) if option_of(field)}
    plain = {key: _plain(value) for key, value in declared.items() if value is not None}
    lists = (value if isinstance(value, list) else [value] for value in plain.values())
    # The library leaves some characters as they are that it reads as the end of a line.
    readable = all(str(item).isprintable() for items in lists for item in items)
    text: str = _yaml().safe_dump(plain, sort_keys=False, allow_unicode=readable)
    return text


def _key(field: Any) -> str:
    return flag_of(field).lstrip("-").replace("-", "_")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, bool | int | float) else str(value)


def _words(value: Any) -> list[str]:
    """The words that a repeated option is given."""
    if isinstance(value, Mapping):
        return [f"{name}={item if isinstance(item, str) else json.dumps(_typed(item))}" for name, item in value.items()]
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, str) else json.dumps(_typed(item)) for item in items]


def _typed(value: Any) -> Any:
    """Text within a list or mapping, of which JSON will be made, as the number or truth value that it looks like."""
    if isinstance(value, Mapping):
        return {str(name): _typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read(path: Path) -> dict[Any, Any]:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """Leaves words as they are written (1e-5 is no number to YAML, and 2024-01-01 a date), but for null."""

        yaml_implicit_resolvers: ClassVar = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise InputError(f"{path} has the key {twice!r} twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    try:
        with open(path, encoding="utf-8") as file:
            record = yaml.load(file, Loader)  # a safe one
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a YAML file: {reason}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} must be a mapping of options to values, such as `batch_size: 8`")
    return record


def _yaml() -> ModuleType:
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError("a file of options needs PyYAML: pip install pyyaml") from None
    return yaml
