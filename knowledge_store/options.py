"""Options declared once: a field of a frozen dataclass is the option of a command, with its help, default and limits.

`terminal.commands` makes the command's options of them. Nothing here imports what prints or parses.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from knowledge_store.errors import InputError

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What a command says of a field.

    Attributes:
        help: one sentence.
        flag: the option's name, `--max-length`; made from the field's name when empty.
        argument: it is given by its place, not by its name.
        metavar: what stands for its value in the help.
        min, max: the smallest and largest number that is taken.
    """

    help: str
    flag: str = ""
    argument: bool = False
    metavar: str | None = None
    min: float | None = None
    max: float | None = None


def option(
    default: Any = MISSING,
    *,
    help: str,
    flag: str = "",
    argument: bool = False,
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
) -> Any:
    """A field of a configuration that a command takes as an option (see `Option`); without a default it is required."""
    return field(default=default, metadata={_KEY: Option(help, flag, argument, metavar, min, max)})


def option_of(configuration_field: Field[Any]) -> Option | None:
    """What a command says of a field; None for one that only the library has."""
    found = configuration_field.metadata.get(_KEY)
    return found if isinstance(found, Option) else None


def flag_of(configuration_field: Field[Any]) -> str:
    """The name of a field's option, `--max-length`."""
    found = option_of(configuration_field)
    return (found.flag if found else "") or f"--{configuration_field.name.replace('_', '-')}"


def check_options(configuration: Any) -> None:
    """Make sure that the numbers of a configuration lie within the limits of its fields.

    Raises:
        InputError: naming the option and its limit.
    """
    for each in fields(configuration):
        found, value = option_of(each), getattr(configuration, each.name)
        if found is None or value is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if found.min is not None and not value >= found.min:
            raise InputError(f"{flag_of(each)} is {value}; it must be at least {found.min:,}")
        if found.max is not None and not value <= found.max:
            raise InputError(f"{flag_of(each)} is {value}; it must be at most {found.max:,}")
