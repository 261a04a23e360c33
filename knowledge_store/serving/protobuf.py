"""As much of the protobuf wire format as Flight SQL's commands take: messages of numbers, texts and bytes.

https://protobuf.dev/programming-guides/encoding/ says what stands on the wire. What is read comes from anybody: it is never
longer than it is, and anything else than fields of a message is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from knowledge_store.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 4096

Value = int | bytes


class Message:
    """The fields of a message, by their numbers.

    Args:
        data: its bytes.

    Raises (on construction, and where a field is asked for as what it is not):
        InputError: they are no message.
    """

    def __init__(self, data: bytes):
        self._fields: dict[int, list[Value]] = {}
        at, count = 0, 0
        while at < len(data):
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            value: Value
            if wire == VARINT:
                value, at = _varint(data, at)
            elif wire == BYTES:
                size, at = _varint(data, at)
                value, at = data[at : at + size], at + size
            elif wire in (FIXED64, FIXED32):
                size = 8 if wire == FIXED64 else 4
                value, at = data[at : at + size], at + size
            else:
                raise InputError("this is no command of Flight SQL: a field has a type that there is not")
            count += 1
            if not number or at > len(data) or count > MAX_FIELDS:
                raise InputError("this is no command of Flight SQL: it is cut off, or has too many fields")
            self._fields.setdefault(number, []).append(value)

    def bytes(self, number: int) -> bytes | None:
        """The last value of a field of bytes; None where it is not there."""
        values = self._fields.get(number, [])
        if any(not isinstance(value, bytes) for value in values):
            raise InputError(f"this is no command of Flight SQL: its field {number} is a number")
        return values[-1] if values else None  # type: ignore[return-value]

    def text(self, number: int) -> str | None:
        """The last value of a field of text; None where it is not there."""
        value = self.bytes(number)
        return None if value is None else _text(value, number)

    def texts(self, number: int) -> list[str]:
        """All values of a field of text."""
        self.bytes(number)
        return [_text(value, number) for value in self._fields.get(number, []) if isinstance(value, bytes)]

    def number(self, number: int) -> int:
        """The last value of a number; 0 where it is not there."""
        value = self._fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise InputError(f"this is no command of Flight SQL: its field {number} is no number")
        return value

    def numbers(self, number: int) -> list[int]:
        """All values of a repeated number, packed or not."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value) and len(found) < MAX_FIELDS:
                one, at = _varint(value, at)
                found.append(one)
        return found


def message(fields: Sequence[tuple[int, Value]]) -> bytes:
    """The bytes of a message of some fields: its numbers are varints, its bytes are preceded by their length."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(_varint_bytes(number << 3 | VARINT) + _varint_bytes(value))
        else:
            parts.append(_varint_bytes(number << 3 | BYTES) + _varint_bytes(len(value)) + value)
    return b"".join(parts)


def _text(value: bytes, number: int) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InputError(f"this is no command of Flight SQL: its field {number} is not UTF-8") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        octet = data[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value & (2**64 - 1), at
    raise InputError("this is no command of Flight SQL: a number in it does not end")


def _varint_bytes(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)
