"""Rows that are token ids already."""

from __future__ import annotations

from typing import Any

from teacher_dump.corpus.columns import MASKS

IGNORED = -100  # the label of a token that is context, as transformers has it


def token_content(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Document from `input_ids` and what goes with it.

    A token is a target where `labels` has its id, not −100, and every mask that is there has 1. Padding, where
    `attention_mask` is 0 at an end, is left out.

    Args:
        given: input_ids; if there, labels, masks, attention_mask, position_ids: lists of one length; and seq_lengths, as TRL's
            packing says how long each of a row's texts is.

    Raises:
        ValueError: naming the column and the token, counted from 1.
    """
    token_ids = _numbers(given, "input_ids", None)
    length = len(token_ids)
    is_target = [True] * length
    if "labels" in given:
        labels = _numbers(given, "labels", length)
        for number, (label, token) in enumerate(zip(labels, token_ids, strict=True), 1):
            if label not in (IGNORED, token):
                raise ValueError(
                    f"`labels` disagrees with `input_ids` ({label} at token {number}, which is {token}): a label is the id of"
                    f" the token where it stands, not of the next one, or {IGNORED} for context"
                )
        is_target = [label != IGNORED for label in labels]
    for name in MASKS:
        if name in given:
            is_target = [target and kept == 1 for target, kept in zip(is_target, _mask(given, name, length), strict=True)]
    begin, end = 0, length
    if "attention_mask" in given:
        seen = _mask(given, "attention_mask", length)
        if 1 in seen:
            begin, end = seen.index(1), length - seen[::-1].index(1)
        else:
            end = 0
        if 0 in seen[begin:end]:
            hole = seen.index(0, begin) + 1
            raise ValueError(f"`attention_mask` is 0 between tokens that are seen (at token {hole})")
    if "position_ids" in given:
        positions = _numbers(given, "position_ids", length)[begin:end]
        if positions != list(range(len(positions))):
            raise ValueError(
                "`position_ids` do not count from 0: several texts packed in one row would see each other; give each a row"
            )
    lengths = given.get("seq_lengths")
    if isinstance(lengths, list) and sum(map(bool, lengths)) > 1:
        raise ValueError(
            "`seq_lengths` says that several texts are packed in one row, which would see each other; give each a row"
        )
    for number, token in enumerate(token_ids[begin:end], begin + 1):
        if token < 0:
            raise ValueError(f"`input_ids` has a negative number ({token} at token {number})")
    return {"token_ids": tuple(token_ids[begin:end]), "is_target": tuple(is_target[begin:end])}


def _numbers(given: dict[str, Any], name: str, length: int | None) -> list[int]:
    numbers = given[name]
    if not isinstance(numbers, list):
        raise ValueError(f"`{name}` is not a list of whole numbers")
    for number, value in enumerate(numbers, 1):
        if not isinstance(value, int) or (length is None and isinstance(value, bool)):
            raise ValueError(f"`{name}` is not a list of whole numbers (at token {number} it has {value!r})")
    if length is not None and len(numbers) != length:
        raise ValueError(f"`{name}` is not as long as `input_ids` ({len(numbers):,} and {length:,})")
    return numbers


def _mask(given: dict[str, Any], name: str, length: int) -> list[int]:
    mask = _numbers(given, name, length)
    for number, value in enumerate(mask, 1):
        if value not in (0, 1):
            raise ValueError(f"`{name}` is neither 0 nor 1 ({value} at token {number})")
    return mask
