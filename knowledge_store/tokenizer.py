"""What teachers and students ask of a tokenizer alike, with no library of tokenizers imported."""

from __future__ import annotations

from typing import Any


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer of transformers puts before a text of its own accord."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []
