"""Which column of a row holds what: by its own name, or as `--columns` says."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from knowledge_store.errors import InputError

JSON_MARK = ":json"


@dataclass(frozen=True, eq=False)
class Shape:
    """A form that rows have.

    Attributes:
        name: as people read it.
        required: the columns that make a row one of it; optional: those that it takes where they are there.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

TEXT = Shape("text", ("text",))
COMPLETION = Shape("prompt and completion", ("prompt", "completion"), TEMPLATE_COLUMNS)
MESSAGES = Shape("messages", ("messages",), TEMPLATE_COLUMNS)
SHAREGPT = Shape("ShareGPT", ("conversations",), ("system", *TEMPLATE_COLUMNS))
ALPACA = Shape("Alpaca", ("instruction", "output"), ("input", "system", "history", *TEMPLATE_COLUMNS))
MASKS = ("assistant_masks", "completion_mask", "loss_mask")
TOKENS = Shape("token ids", ("input_ids",), ("labels", *MASKS, "attention_mask", "position_ids"))

SHAPES = (TEXT, COMPLETION, MESSAGES, SHAREGPT, ALPACA, TOKENS)

# What `finish` says of a completion that a model wrote: it ended by itself, or was cut off.
FINISH = "finish"
STOPPED, CUT_OFF = "stop", "length"

# Text in these is the row's own; text in any other column that a shape takes is JSON.
TEXT_COLUMNS = ("text", "prompt", "completion", "instruction", "input", "output", "system")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        names: what a shape calls a column → its name in the corpus. Others have their own names.
    """

    names: Mapping[str, str]

    def name(self, part: str) -> str:
        """The corpus's name of a column that a shape calls `part`."""
        return self.names.get(part, part).removesuffix(JSON_MARK)

    def optional(self, shape: Shape) -> list[str]:
        """What a shape takes where it is there. A column that was named for another part is not taken by its own name."""
        taken = {self.name(part) for part in self.names}
        return [part for part in shape.optional if part in self.names or part not in taken]

    def shapes(self, present: Set[str]) -> list[Shape]:
        """The shapes whose required columns are all among those that are present."""
        return [shape for shape, required in self._required if required <= present]

    @cached_property
    def _required(self) -> list[tuple[Shape, frozenset[str]]]:
        return [(shape, frozenset(map(self.name, shape.required))) for shape in SHAPES]

    def is_json(self, part: str) -> bool:
        """Whether text in a column is JSON."""
        return part not in TEXT_COLUMNS or self.names.get(part, "").endswith(JSON_MARK)

    @cached_property
    def shape(self) -> Shape | None:
        """The shape that the names decide, if any."""
        return next((shape for shape in SHAPES if any(part in self.names for part in shape.required)), None)


OWN_NAMES = Columns({})


def read_columns(text: str | None) -> dict[str, str]:
    """What `--columns prompt=question,completion=answer` says: what a shape calls a column → its name. Empty without it.

    Raises:
        InputError: it cannot be meant.
    """
    names: dict[str, str] = {}
    parts = list(dict.fromkeys(part for shape in SHAPES for part in (*shape.required, *shape.optional)))
    for pair in text.split(",") if text is not None else []:
        part, sign, name = (word.strip() for word in pair.partition("="))
        if not sign or not name.removesuffix(JSON_MARK):
            raise InputError(f"--columns {text}: {pair!r} is not of the form NAME=COLUMN, as in prompt=question")
        if part not in parts:
            raise InputError(f"--columns {text}: there is no {part!r}; it names {', '.join(parts)}")
        if part in names:
            raise InputError(f"--columns {text}: {part} is there twice")
        if name.endswith(JSON_MARK) and part not in ("prompt", "completion"):
            raise InputError(f"--columns {text}: {JSON_MARK} is for prompt and completion alone")
        names[part] = name
    decided = [shape for shape in SHAPES if any(part in names for part in shape.required)]
    if len(decided) > 1:
        raise InputError(f"--columns {text}: a row is {decided[0].name} or {decided[1].name}, not both")
    columns = Columns(names)
    parts_of: dict[str, list[str]] = {}
    for part in dict.fromkeys([*names, *(decided[0].required if decided else ())]):
        parts_of.setdefault(columns.name(part), []).append(part)
    for name, same in parts_of.items():
        if len(same) > 1:
            raise InputError(f"--columns {text}: {' and '.join(same)} would both be the column {name!r}: name one for each")
    return names
