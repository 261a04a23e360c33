"""Rows that are token ids already."""

from __future__ import annotations

from typing import Any

from teacher_dump.corpus.columns import MASKS, PROMPT_LENGTHS, Columns

IGNORED = -100  # the label of a token that is context, as transformers has it


def token_content(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Document from `input_ids` and what goes with it.

    A token is a target where `labels` has its id, not −100, and every mask that is there has 1. Padding, where
    `attention_mask` is 0 at an end, is left out.

    Args:
        given: input_ids; if there, labels, masks, attention_mask, position_ids, segment_ids (which of a row's texts a token is
            of): lists of one length; seq_lengths, as TRL's packing says how long each of them is; and cu_seqlens, as attention
            over packed texts is told where each begins and the last ends.

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
    borders = _numbers(given, "cu_seqlens", None) if "cu_seqlens" in given else []
    segments = _numbers(given, "segment_ids", length)[begin:end] if "segment_ids" in given else []
    for name, several in (
        ("seq_lengths", isinstance(lengths, list) and sum(map(bool, lengths)) > 1),
        ("cu_seqlens", any(begin < border < end and any(is_target[border:end]) for border in borders)),
        ("segment_ids", len({*segments} - {0}) > 1),  # 0 is padding
    ):
        if several:
            raise ValueError(
                f"`{name}` says that several texts are packed in one row, which would see each other; give each a row, or leave"
                f" the column out with {name}=- in --columns where it says something else"
            )
    for number, token in enumerate(token_ids[begin:end], begin + 1):
        if token < 0:
            raise ValueError(f"`input_ids` has a negative number ({token} at token {number})")
    return {"token_ids": tuple(token_ids[begin:end]), "is_target": tuple(is_target[begin:end])}


def check_prompt_length(record: dict[str, Any], given: dict[str, Any], columns: Columns) -> None:
    """Make sure that no prompt beside which nothing says which tokens count is learned (ValueError: one would be)."""
    if any(part in given for part in ("labels", *MASKS)):
        return
    for name in PROMPT_LENGTHS:
        if record.get(columns.name(name)):
            raise ValueError(
                f"`{name}` says that a prompt stands in `{columns.name('input_ids')}`, and nothing says which tokens count, so"
                f" that it would be learned too: give `labels` ({IGNORED} for the prompt) or a `completion_mask`, or, where all"
                f" tokens count, leave it out with {name}=- in --columns"
            )


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
