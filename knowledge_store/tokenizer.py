"""What teachers and students ask of a tokenizer alike, with no library of tokenizers imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer of transformers puts before a text of its own accord."""
    special = set(tokenizer.all_special_ids)
    for text in _texts(tokenizer):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not plain or special.intersection(plain):
            continue
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return list(whole[:start])
    return []


def _texts(tokenizer: Any) -> Iterator[str]:
    """Short texts, of which one has a token: a vocabulary without an unknown token has none for the letters that it lacks."""
    yield "a"
    for token in sorted(tokenizer.get_vocab().values()):
        yield tokenizer.decode([token])
