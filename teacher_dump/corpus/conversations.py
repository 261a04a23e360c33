"""Conversations: which rows are some, what a chat template makes of them, and which of its tokens are the assistant's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_store.errors import InputError
from teacher_dump.corpus.messages import Turns
from teacher_dump.corpus.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template at work on conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def render(self, turns: Turns, arguments: dict[str, Any], add_generation_prompt: bool = False) -> str:
        """A conversation as text.

        Raises:
            BadRow: the template refuses it.
            InputError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                "the corpus has conversations, and the teacher's tokenizer has no chat template:"
                " give rows with `text`, or `prompt` and `completion` as strings"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
                )
            )
        except Exception as error:  # a template is a program of its own, and a row can make it fail in any way
            raise BadRow(f"the chat template refuses it: {str(error).splitlines()[0] if str(error) else error!r}") from None

    def tokens(self, turns: Turns, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's token ids, int64 (L,), and which of them are the assistant's, bool (L,).

        Raises:
            BadRow: nothing in it is the assistant's, or the template refuses it.
            InputError: the tokenizer cannot be used for conversations.
        """
        if not any(turn["role"] == "assistant" for turn in turns):
            raise BadRow("no message has the role `assistant`, so nothing is there to learn")
        if not self.tokenizer.is_fast:
            raise InputError(
                "the corpus has `messages`, and the teacher's tokenizer (a slow one) cannot tell which of its tokens are the"
                " assistant's: give rows with `prompt` and `completion`"
            )
        whole = self.render(turns, arguments)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        # Some tokenizers leave white space out of their offsets, and transformers then loses what the marks say.
        sound_offsets = bool((begins < ends).all())
        if sound_offsets and _GENERATION_MARK.search(self.tokenizer.get_chat_template(tools=arguments.get("tools"))):
            marked = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
            )
            token_ids, is_target = np.array(marked["input_ids"], np.int64), np.array(marked["assistant_masks"], bool)
        else:
            # A token of white space that was left out begins where the one before it ended.
            begins = np.where(begins < ends, begins, np.minimum(begins, np.concatenate([[0], ends[:-1]])))
            token_ids, is_target = np.array(encoded["input_ids"], np.int64), np.zeros(len(begins), bool)
            for start, stop in self._assistant_spans(turns, arguments, whole):
                # A token that begins before the assistant's turn is not the assistant's to predict.
                is_target |= (begins >= start) & (ends <= stop)
        if not is_target.any():
            raise BadRow("the chat template leaves nothing of the assistant's messages, so nothing is there to learn")
        return token_ids, is_target

    def _assistant_spans(self, turns: Turns, arguments: dict[str, Any], whole: str) -> list[tuple[int, int]]:
        """Where in the rendered conversation the assistant's words are, its end-of-turn token included."""
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            asked = self.render(turns[:index], arguments, add_generation_prompt=True)
            answered = self.render(turns[: index + 1], arguments)
            if not answered.startswith(asked) or not whole.startswith(answered):
                raise BadRow(
                    "the chat template does not mark the assistant's tokens with {% generation %} (or the tokenizer cannot"
                    f" place them), and renders this conversation differently turn by turn (message {index + 1})"
                )
            # White space after the end-of-turn token is the template's, not the assistant's.
            spans.append((len(asked), len(answered.rstrip())))
        return spans
