"""What a teacher that cannot be hashed is known by: the likeliest next token at 64 fixed prompts. No torch here.

The prompts are the beginnings of one text, so that one request asks about all. Where two tokens are nearly as likely, numeric
noise (another batch, another device) decides which is first: a fingerprint is the same where every token that was the likeliest
is so still, or nearly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teacher_dump.teachers.protocol import Likeliest

PROMPTS = 64
DEPTH = 5  # likeliest tokens that are looked at
NOISE = 0.5  # nats: how far rounding to 16 bits at every step of a model moves two likely tokens against each other, at most
TEXT = (
    "The sun rises in the east and sets in the west. There are seven days in a week and twelve months in a year. Water boils at"
    " one hundred degrees and freezes at zero. One, two, three, four, five, six, seven, eight, nine, ten. Monday, Tuesday,"
    " Wednesday, Thursday, Friday, Saturday, Sunday. The capital of France is Paris, and the capital of Germany is Berlin. Once"
    " upon a time there was a king who had three daughters, and the youngest of them was the cleverest."
)


def fingerprint(answers: Likeliest) -> list[int]:
    """The likeliest tokens at the prompts, by what a teacher answers to them."""
    return [int(token) for token in answers.ids[:, 0]]


def same_fingerprint(kept: Sequence[int], answers: Likeliest) -> bool:
    """Whether a teacher that answers so may be the one that had the fingerprint `kept`."""
    if len(kept) != len(answers.ids):
        return False
    among = answers.ids == np.array(kept, np.int64)[:, None]
    behind = answers.logprobs[:, 0] - np.where(among, answers.logprobs, -np.inf).max(axis=1)
    return bool((behind <= NOISE).all())
