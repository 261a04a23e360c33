"""A column of a kind's table, as its kind declares it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.parquet import COMPRESSION_LEVEL, COUNTING

PLAIN = "PLAIN"
SPLIT = "BYTE_STREAM_SPLIT"  # byte by byte: of numbers that are alike in their higher bytes


@dataclass(frozen=True)
class Field:
    """A column.

    Attributes:
        name: of the column, and of its array in a batch.
        type: of one value: an integer, a float, a bool, text (`pa.string()`) or bytes (`pa.binary()`).
        shape: of a row: "scalar" is one value, a number so many, "ragged" any number.
        nullable: whether a row may have none; a batch has `padding` there (text: None).
        padding: what stands in a batch where there is no value: behind a ragged row, behind a sequence.
        encoding: Parquet's name of how values are encoded; None for a dictionary.
        level: of the compression with Zstandard.
        identifying: whether the values are the same whatever device the teacher ran on.
        infinite: whether a float may be infinite. NaN never stands in a store.

    Raises (on construction):
        InputError: nothing can be kept of that type, or it does not hold the padding.
    """

    name: str
    type: pa.DataType
    shape: Literal["scalar", "ragged"] | int = "scalar"
    nullable: bool = False
    padding: Any = 0
    encoding: str | None = None
    level: int = COMPRESSION_LEVEL
    identifying: bool = False
    infinite: bool = False

    def __post_init__(self) -> None:
        plain = pa.types.is_integer(self.type) or pa.types.is_floating(self.type) or pa.types.is_boolean(self.type)
        if not plain and not self.is_text:
            raise InputError(
                f"the field {self.name!r} is declared as {self.type}: declare the type of one value (a number, a bool, text or"
                ' bytes), and lists by its shape (a fixed width, or "ragged"), in a field each'
            )
        if isinstance(self.shape, int) and self.shape < 1:
            raise InputError(f"the field {self.name!r} is declared {self.shape} values wide: declare at least 1")
        if pa.types.is_integer(self.type) or pa.types.is_boolean(self.type):
            try:
                holds = bool(np.full(1, self.padding, self.dtype)[0] == self.padding)
            except (OverflowError, TypeError, ValueError):
                holds = False
            if not holds:
                raise InputError(
                    f"the field {self.name!r} is declared as {self.type}, which does not hold its padding {self.padding!r}"
                )

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """That of an array of its values."""
        # Not `to_pandas_dtype`, for which most versions of Arrow need pandas.
        return pa.array([], self.type).to_numpy(zero_copy_only=False).dtype

    @property
    def is_text(self) -> bool:
        """Whether its values are Python objects: they come as lists, and never enter the decoded cache."""
        return self.type in (pa.string(), pa.binary())

    @property
    def is_list(self) -> bool:
        """Whether a row has several values."""
        return self.shape != "scalar"

    @property
    def column(self) -> pa.Field:
        """The column in Arrow and in Parquet."""
        return pa.field(self.name, pa.list_(pa.field("element", self.type)) if self.is_list else self.type)

    @property
    def path(self) -> str:
        """The path of its values in a Parquet schema."""
        return f"{self.name}.list.element" if self.is_list else self.name


SEQUENCE_ID = Field("sequence_id", pa.int64(), encoding=COUNTING, identifying=True)
KEYS = {
    "position": (SEQUENCE_ID, Field("position", pa.int32(), encoding=COUNTING, identifying=True)),
    "sequence": (SEQUENCE_ID,),
    "item": (SEQUENCE_ID, Field("item", pa.int32(), encoding=COUNTING, identifying=True)),
}
