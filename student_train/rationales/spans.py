"""Where an answer stands in a context, by the characters that its words take up there.

That a token's text is part of the answer's text says little: `a` is part of nearly every answer. A token is the answer's here
where the characters that it stands for are some of those of a place where the whole answer stands, as words of their own, in
letters small or capital.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from student_train.rationales.contexts import Context

# As special tokens are written, `<|im_end|>` and `</s>`: they end an answer, and are no part of its words.
_TAG = re.compile(r"\s*<[^<>\s]+>\s*")


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
            for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", whole, re.IGNORECASE):
                found |= (starts < match.end()) & (ends > match.start())
        return found

    def _text(self, token: int) -> str:
        return (self._texts[token] or "") if 0 <= token < len(self._texts) else ""
