"""Which column of a row holds what: by its own name, or as `--columns` says."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from knowledge_store.errors import InputError

JSON_MARK = ":json"
LEFT_OUT = "-"  # the name of no column


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
CHAT_COLUMNS = ("system", *TEMPLATE_COLUMNS)  # what belongs to a conversation beside its messages

TEXT = Shape("text", ("text",))
COMPLETION = Shape("prompt and completion", ("prompt", "completion"), CHAT_COLUMNS)
MESSAGES = Shape("messages", ("messages",), CHAT_COLUMNS)
SHAREGPT = Shape("ShareGPT", ("conversations",), CHAT_COLUMNS)
ALPACA = Shape("Alpaca", ("instruction", "output"), ("input", "history", *CHAT_COLUMNS))
CHOSEN = Shape("chosen and rejected", ("chosen", "rejected"), ("prompt", *CHAT_COLUMNS))
COMPLETIONS = Shape("prompt and completions", ("prompt", "completions"), ("scores", *CHAT_COLUMNS))
ALPACA_CHOSEN = Shape(
    "Alpaca with chosen and rejected", ("instruction", "chosen", "rejected"), ("input", "history", *CHAT_COLUMNS)
)
MASKS = ("assistant_masks", "assistant_tokens_mask", "completion_mask", "loss_mask")
PACKING = ("position_ids", "seq_lengths", "cu_seqlens", "segment_ids")  # each says whether a row is several texts
TOKENS = Shape("token ids", ("input_ids",), ("labels", *MASKS, "attention_mask", *PACKING))

SHAPES = (TEXT, COMPLETION, MESSAGES, SHAREGPT, ALPACA, TOKENS, CHOSEN, COMPLETIONS, ALPACA_CHOSEN)
GROUPS = (CHOSEN, COMPLETIONS, ALPACA_CHOSEN)  # whose rows are several answers to one prompt

# Columns of what a conversation is about and no template is given, and what to do instead of losing it.
UNSEEN = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "no teacher sees it here"),
    "functions": "the old form of `tools` is given to no template: name it with --columns tools=functions",
}

# Columns that say how many tokens of a row are its prompt, in ways that differ with padding: a mask says it plainly.
PROMPT_LENGTHS = ("prompt_length", "prompt_len", "prompt_lengths")

# Columns that say how what a model wrote has ended: by itself, or cut off. The second is that of vLLM and OpenAI's API.
FINISH, FINISH_REASON = "finish", "finish_reason"
STOPPED, CUT_OFF = "stop", "length"

# What is said in them, in small letters or capitals; other values mean nothing. A call ends a turn; what a filter, a client or
# a fault stopped has no end.
ENDINGS = {
    **dict.fromkeys((STOPPED, "tool_calls", "function_call"), STOPPED),
    **dict.fromkeys((CUT_OFF, "max_tokens", "content_filter", "abort", "error", "repetition"), CUT_OFF),
}

# Text of these that is blank or `null` says that there is none, as published data sets write it.
MAY_BE_BLANK = (*TEMPLATE_COLUMNS, "history")

# Text in these is the row's own; text in any other column that a shape takes is JSON.
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output", "system")

TEXT_OR_MESSAGES = ("prompt", "completion", "chosen", "rejected")  # of these, JSON where `--columns` says so


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
        """The shapes that the names allow whose required columns are all among those that are present; of two, one of which
        asks for all that the other does and more, the first."""
        found = [shape for shape, required in self._required if required <= present]
        if len(found) < 2:
            return found
        return [shape for shape in found if not any({*shape.required} < {*other.required} for other in found)]

    @cached_property
    def _required(self) -> list[tuple[Shape, frozenset[str]]]:
        return [(shape, frozenset(map(self.name, shape.required))) for shape in self.candidates]

    def is_json(self, part: str) -> bool:
        """Whether text in a column is JSON."""
        return part not in TEXT_COLUMNS or self.names.get(part, "").endswith(JSON_MARK)

    @cached_property
    def deciding(self) -> list[str]:
        """The named parts that some shape is read by, but those that are left out."""
        named = [part for part in self.names if self.name(part) != LEFT_OUT]
        return [part for part in named if any(part in shape.required for shape in SHAPES)]

    @cached_property
    def candidates(self) -> tuple[Shape, ...]:
        """The shapes that the names allow: those that take all of `deciding`, and need nothing that is left out."""
        return tuple(
            shape
            for shape in SHAPES
            if set(self.deciding) <= {*shape.required, *shape.optional} and LEFT_OUT not in map(self.name, shape.required)
        )

    @cached_property
    def shape(self) -> Shape | None:
        """The shape that the names decide, if any."""
        return self.candidates[0] if len(self.candidates) == 1 else None


OWN_NAMES = Columns({})


def read_columns(text: str | None) -> dict[str, str]:
    """What `--columns prompt=question,completion=answer` says: what a shape calls a column → its name. Empty without it.

    Raises:
        InputError: it cannot be meant.
    """
    names: dict[str, str] = {}
    parts = list(dict.fromkeys(part for shape in SHAPES for part in (*shape.required, *shape.optional)))
    beside = [part for part in (*UNSEEN, *PROMPT_LENGTHS, FINISH, FINISH_REASON) if part not in parts]
    for pair in text.split(",") if text is not None else []:
        part, sign, name = (word.strip() for word in pair.partition("="))
        if not sign or not name.removesuffix(JSON_MARK):
            raise InputError(f"--columns {text}: {pair!r} is not of the form NAME=COLUMN, as in prompt=question")
        if part in beside and name != LEFT_OUT:
            raise InputError(f"--columns {text}: {part} cannot be called otherwise; {part}={LEFT_OUT} leaves it out")
        if part not in (*parts, *beside):
            raise InputError(f"--columns {text}: there is no {part!r}; it names {', '.join([*parts, *beside])}")
        if part in names:
            raise InputError(f"--columns {text}: {part} is there twice")
        if name.endswith(JSON_MARK) and part not in TEXT_OR_MESSAGES:
            raise InputError(
                f"--columns {text}: {JSON_MARK} is for {', '.join(TEXT_OR_MESSAGES[:-1])} and {TEXT_OR_MESSAGES[-1]} alone"
            )
        names[part] = name
    columns = Columns(names)
    if not columns.candidates and len(columns.deciding) < 2:
        raise InputError(f"--columns {text} leaves out what a row is read by")
    if not columns.candidates:
        one, other = _apart(columns.deciding)
        raise InputError(f"--columns {text}: a row is {one.name} or {other.name}, not both")
    parts_of: dict[str, list[str]] = {}
    for part in dict.fromkeys([*names, *(columns.candidates[0].required if columns.deciding else ())]):
        parts_of.setdefault(columns.name(part), []).append(part)
    for name, same in parts_of.items():
        if len(same) > 1 and name != LEFT_OUT:
            raise InputError(f"--columns {text}: {' and '.join(same)} would both be the column {name!r}: name one for each")
    return names


def _apart(deciding: list[str]) -> tuple[Shape, Shape]:
    """Two shapes that no row has together, of parts that no shape takes all of."""
    takes = [[shape for shape in SHAPES if part in (*shape.required, *shape.optional)] for part in deciding]
    for place, shapes in enumerate(takes):
        for others in takes[:place]:
            if not set(shapes) & set(others):
                return others[0], shapes[0]
    return takes[0][0], takes[-1][-1]
