"""Thrift's compact protocol as a tree that can be altered and written again: footers whose every part is what Thrift allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 7, 8, 9, 12
INTEGERS = (4, 5, 6)


@dataclass
class Value:
    """A value and its type; a struct's is a list of [field number, Value], a list's its Values."""

    kind: int
    value: Any

    def walk(self) -> Iterator[Value]:
        """This value and all within it."""
        yield self
        for each in self.value if isinstance(self.value, list) else []:
            yield from (each[1] if isinstance(each, list) else each).walk()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at


def parse(data: bytes, at: int = 0, kind: int = STRUCT, element: bool = False) -> tuple[Value, int]:
    """A value, and where it ends."""
    if kind in (TRUE, FALSE):
        return Value(kind, data[at] if element else None), at + element
    if kind in INTEGERS:
        raw, at = _varint(data, at)
        return Value(kind, raw >> 1 ^ -(raw & 1)), at
    if kind in (BYTE, DOUBLE):
        size = 1 if kind == BYTE else 8
        return Value(kind, data[at : at + size]), at + size
    if kind == BINARY:
        size, at = _varint(data, at)
        return Value(kind, data[at : at + size]), at + size
    values: list[Any] = []
    if kind == LIST:
        inner, size, at = data[at] & 0x0F, data[at] >> 4, at + 1
        if size == 15:
            size, at = _varint(data, at)
        for _ in range(size):
            value, at = parse(data, at, inner, element=True)
            values.append(value)
        return Value(kind, values), at
    assert kind == STRUCT, kind
    number = 0
    while data[at]:
        head, at = data[at], at + 1
        if head >> 4:
            number += head >> 4
        else:
            raw, at = _varint(data, at)
            number = raw >> 1 ^ -(raw & 1)
        value, at = parse(data, at, head & 0x0F)
        values.append([number, value])
    return Value(kind, values), at + 1


def _number(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _zigzag(value: int) -> bytes:
    return _number(2 * value if value >= 0 else -2 * value - 1)


def written(value: Value, element: bool = False) -> bytes:
    """The reverse of `parse`, each field with its whole number."""
    if value.kind in (TRUE, FALSE):
        return bytes([value.value or 0]) if element else b""
    if value.kind in INTEGERS:
        return _zigzag(value.value)
    if value.kind in (BYTE, DOUBLE):
        return bytes(value.value)
    if value.kind == BINARY:
        return _number(len(value.value)) + value.value
    if value.kind == LIST:
        inner = value.value[0].kind if value.value else STRUCT
        return bytes([0xF0 | inner]) + _number(len(value.value)) + b"".join(written(each, element=True) for each in value.value)
    fields = (bytes([each.kind]) + _zigzag(number) + written(each) for number, each in value.value)
    return b"".join(fields) + b"\0"
