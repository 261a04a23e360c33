"""Where an answer stands in a context, by the characters that its words take up there.

That a token's text is part of the answer's text says little: `a` is part of nearly every answer. A token is the answer's here
where the characters that it stands for are some of those of a place where the whole answer stands, as words of their own, in
letters small or capital. Scripts whose letters have no capitals are mostly written without spaces between words, or with
particles that stick to them: there an answer may stand anywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from student_train.rationales.contexts import Context

# As special tokens are written, `<|im_end|>` and `</s>`: they end an answer, and are no part of its words.
_TAG = re.compile(r"\s*<[^<>\s]+>\s*")
_PART = "\N{REPLACEMENT CHARACTER}"  # what a token that is not whole characters is decoded to
_WITHOUT_CAPITALS = ("Lo", "Lm")  # categories of letters: Chinese, Japanese, Thai and so on


class AnswerPlaces:
    """Finds answers in contexts.

    Args:
        texts: of each token id, as the store's `tokens` has them; None where there is none.
    """

    def __init__(self, texts: Sequence[str | None]):
        self._texts = texts

    def is_word(self, token: int) -> bool:
        """Whether a token is part of an answer's words, and no sign of its end."""
        text = self._text(token)
        return bool(text) and not _TAG.fullmatch(text)

    def answers(self, context: Context, said: np.ndarray | None = None) -> list[str]:
        """The texts of the answers, each a run of targets, without white space around them; empty ones are left out.

        Args:
            context: the sequence.
            said: tokens to read at the targets instead of those that stand there, int64 (L,).
        """
        tokens = context.token_ids if said is None else said
        targets = np.flatnonzero(context.is_target)
        runs = np.split(targets, np.flatnonzero(np.diff(targets) > 1) + 1)
        texts = ("".join(self._text(token) for token in tokens[run].tolist() if self.is_word(token)).strip() for run in runs)
        return [text for text in texts if text]

    def places(self, context: Context, answers: Sequence[str]) -> np.ndarray:
        """Which positions of the context are of one of the answers, bool (N,), as `context.places` has them."""
        places = context.places
        texts = [self._text(token) for token in context.token_ids[places].tolist()]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        starts = ends - [len(text) for text in texts]
        whole = "".join(texts)
        found = np.zeros(len(places), bool)
        for answer in answers:
            for match in re.finditer(rf"(?=({re.escape(answer)}))", whole, re.IGNORECASE):
                start, end = match.span(1)
                if _are_apart(whole[start - 1 : start], answer[0]) and _are_apart(whole[end : end + 1], answer[-1]):
                    found |= (starts < end) & (ends > start)
        return found

    def _text(self, token: int) -> str:
        text = (self._texts[token] or "") if 0 <= token < len(self._texts) else ""
        # A part of a character, which all look alike: equal only where it is the same token.
        return f"{_PART}{token}{_PART}" if _PART in text else text


def _are_apart(outside: str, edge: str) -> bool:
    """Whether the first or last character of an answer is of another word than the one beside it, which may be none."""
    spaced = bool(re.match(r"\w", outside)) and unicodedata.category(outside) not in _WITHOUT_CAPITALS
    return not spaced or unicodedata.category(edge) in _WITHOUT_CAPITALS
