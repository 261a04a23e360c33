"""Options declared once: a field of a frozen dataclass is the option of a command, with its help, default and limits.

`terminal.commands` makes the command's options of them. Nothing here imports what prints or parses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError

PATH = "<path>"  # metavar of a path that is kept as text
_KEY = "option"
HUB = "hf"  # the scheme of its addresses
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # of an address, of which a path keeps one /


@dataclass(frozen=True)
class Option:
    """What a command says of a field.

    Attributes:
        help: one sentence.
        flag: the option's name, `--max-length`; made from the field's name when empty.
        argument: it is given by its place, not by its name.
        metavar: what stands for its value in the help; its choices where it has any and this is None, and else its type.
        min, max: the smallest and largest number that is taken.
        above, below: the same, where the limit itself is not taken.
        choices: the only values that are taken; empty for any.
        names_dump: its value is the name of a dump of STORE, which a shell completes.
        of_hub: its paths may be addresses of the hub, hf://….
    """

    help: str
    flag: str = ""
    argument: bool = False
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    names_dump: bool = False
    of_hub: bool = False

    @property
    def limits(self) -> str:
        """What a value must be, in words: "above 0 and at most 1"."""
        if self.choices:
            names = [str(choice) for choice in self.choices]
            return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
        words = (("at least", self.min), ("above", self.above), ("at most", self.max), ("below", self.below))
        return " and ".join(f"{word} {limit:,}" for word, limit in words if limit is not None)

    def allows(self, value: Any) -> bool:
        """Whether a value lies within the limits; None always does, and text where there are no choices."""
        if value is None or isinstance(value, bool):
            return True
        if self.choices:
            return value in self.choices
        if not isinstance(value, int | float):
            return True
        return (
            (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def option(
    default: Any = MISSING,
    *,
    help: str,
    flag: str = "",
    argument: bool = False,
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] = (),
    names_dump: bool = False,
    of_hub: bool = False,
) -> Any:
    """A field of a configuration that a command takes as an option (see `Option`); without a default it is required."""
    declared = Option(help, flag, argument, metavar, min, max, above, below, choices, names_dump, of_hub)
    return field(default=default, metadata={_KEY: declared})


def option_of(configuration_field: Field[Any]) -> Option | None:
    """What a command says of a field; None for one that only the library has."""
    declared = configuration_field.metadata.get(_KEY)
    return declared if isinstance(declared, Option) else None


def flag_of(configuration_field: Field[Any]) -> str:
    """The name of a field's option, `--max-length`."""
    declared = option_of(configuration_field)
    return (declared.flag if declared else "") or f"--{configuration_field.name.replace('_', '-')}"


def advice(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known: which ones are like it, if any."""
    near = get_close_matches(word, list(known), cutoff=0.5)
    return f": do you mean {' or '.join(near)}?" if near else ""


def check_options(configuration: Any) -> None:
    """Make sure that the values of a configuration lie within the limits of its fields, and that its paths are no addresses.

    Raises:
        InputError: naming the option and its limits.
    """
    for configuration_field in fields(configuration):
        declared, value = option_of(configuration_field), getattr(configuration, configuration_field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if declared is None or not (isinstance(path, Path) or (path is not None and declared.metavar == PATH)):
                continue
            if (scheme := _SCHEME.match(str(path))) and not (declared.of_hub and scheme[1] == HUB):
                raise InputError(
                    f"{flag_of(configuration_field)} is of this machine, and not at {scheme[1]}://…: only a store may be in a"
                    " bucket"
                )
        if declared is not None and not declared.allows(value):
            shown = repr(value) if isinstance(value, str) else value
            raise InputError(f"{flag_of(configuration_field)} is {shown}; it must be {declared.limits}")
