"""Options that name layers of a teacher. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from knowledge_store.errors import InputError


def check_layers(option: str, layers: Iterable[int], teacher: Mapping[str, Any]) -> None:
    """Make sure that a teacher has some layers, where it is known how many it has.

    Args:
        option: that named them, for the message.
        layers: as transformers counts hidden states; see `kinds.vectors`.
        teacher: what is known of it (see `Teacher.description`).

    Raises:
        InputError: it has not.
    """
    count = teacher.get("layers")
    for layer in layers:
        if count is not None and not -count - 1 <= layer <= count:
            raise InputError(
                f"{option} {layer} is outside the teacher, which has {count} layers: use 0 (the embeddings) to {count} (the"
                f" last, before the norm), or -1 (after it) to -{count + 1}"
            )
