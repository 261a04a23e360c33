"""JSON files that notice when they were altered.

Every JSON file of a store is one object that carries, under "sha256", the SHA-256 of the rest of itself in canonical
form (keys sorted, no white space, UTF-8). Reading checks it, and refuses duplicate keys and non-finite numbers, which
JSON parsers disagree about.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from knowledge_store.errors import DamageError, InputError
from knowledge_store.storage import Storage

SEAL = "sha256"
_SHA256 = re.compile("[0-9a-f]{64}")
MAX_BYTES = 64 * 2**20  # half a million shards in a manifest; in Python's objects, some twenty times as much
MAX_DEPTH = 32


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def json_sha256(value: Any) -> str:
    """SHA-256 (hexadecimal) of a JSON value in canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def is_sha256(text: Any) -> bool:
    """Whether a value is a SHA-256 as a store writes it."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def seal(record: dict[str, Any]) -> bytes:
    """The bytes of a sealed JSON file that holds `record`, readable by people.

    Raises:
        InputError: nobody would read so large a file.
    """
    sealed = {**record, SEAL: json_sha256(record)}
    data = (json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if len(data) > MAX_BYTES:
        raise InputError(
            f"a record of {len(data):,} bytes would be written, and {MAX_BYTES:,} are read at most:"
            " give another --shard-size (a manifest lists the shards, a shard's record the rows left out)"
        )
    return data


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def check_depth(value: Any) -> None:
    """ValueError: a JSON value is nested more deeply than anything that a store holds."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def unseal(data: bytes, path: object) -> dict[str, Any]:
    """Parse a sealed JSON file and check its seal.

    Raises:
        DamageError: the bytes are not such a file, or were altered.
    """
    try:
        record = json.loads(data, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        check_depth(record)
        seal_found = record.pop(SEAL, None)
        intact = seal_found == json_sha256(record)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DamageError(f"{path} is damaged: what stands from {place} on is not JSON") from None
    except UnicodeError:
        raise DamageError(f"{path} is damaged: it is not UTF-8") from None
    except RecursionError:
        raise DamageError(f"{path} is damaged: it is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    if not intact:
        raise DamageError(f"{path} is damaged: its contents do not match its SHA-256")
    return record


def check_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Make sure that a JSON value has what a reader will ask of it.

    Args:
        value: the value.
        shape: a dict of required keys and their shapes (`...` stands for every key), a list with the shape of its items, or
            the type that a value must have.
        name: what to call it.

    Raises:
        ValueError: saying what is missing or of another type.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not an object")
        for key, inner_shape in shape.items():
            if key is ...:
                for item in value:
                    check_shape(value[item], inner_shape, f"{name}.{item}")
            elif key not in value:
                raise ValueError(f"{name} has no {key!r}")
            else:
                check_shape(value[key], inner_shape, f"{name}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is not a list")
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{name}[{index}]")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        raise ValueError(f"{name} has the wrong type")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is not a 64-bit number")


def read_record(storage: Storage, name: str) -> dict[str, Any]:
    """Read and check a sealed JSON file.

    Raises:
        MissingFileError: it is not there.
        DamageError: it is altered, or is no file (a pipe, a device).
        StoreError: it cannot be read.
    """
    data = storage.read(name, 0, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DamageError(f"{storage.locate(name)} is damaged: it has more than {MAX_BYTES:,} bytes")
    return unseal(data, storage.locate(name))
